"""Make untrusted text safe to show: on a terminal, in Markdown and in plots.

Rows, replies of models and judges, file names and values in other people's YAML and JSON are untrusted text. A terminal
obeys escape sequences in it, a Markdown viewer links and HTML, rich its markup. These functions are the only ones that
decide what is shown of such text: `printable` for terminals (used by `UserError`, by `terminal.Console` and by the log
handler), and `markdown`, `code` and `fenced` for reports and model cards.
"""

import re

LONGEST_MESSAGE = 1_000
"""Limit for a message in characters; longer ones are cut in the middle."""

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # controls, among them the escape that begins a terminal's sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing, with which text can look like another
    "\u180e\u200b\u2028\u2029\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible
    "\ud800-\udfff]"  # halves of a character
)


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with each character that a terminal or a reader could be misled by as a visible escape (`\x1b`).

    keep: control characters to leave as they are, such as "\n".
    """
    return _HIDDEN.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def hidden(text: str, keep: str = "\n\r\t") -> str:
    """Return the first character that `printable` changes, as its escape; "" if there is none."""
    hidden_characters = (match[0] for match in _HIDDEN.finditer(text))
    return next((_escaped(char) for char in hidden_characters if char not in keep), "")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Return `text` as one printable line of at most `longest` characters, whose middle is left out if it is longer."""
    if len(text) > 4 * longest:
        text = f"{text[: 2 * longest]} {text[-2 * longest :]}"  # a line of megabytes need not be read
    line = printable(" ".join(text.split()))
    if len(line) <= longest:
        return line
    kept = (longest - 5) // 2
    return f"{line[:kept]} ... {line[-kept:]}"


class Markdown(str):
    """Text that is Markdown already: `markdown` leaves it as it is."""

    __slots__ = ()


_ACTIVE = re.compile(
    r"\\(?=[!-/:-@\[-`{-~]|\Z)"  # an escape
    r"|[`*<|]|(?<![^\W_])_|_(?![^\W_])|~(?=~)"  # code, emphasis (which no _ within a word is), HTML, cells, deletions
    r"|&(?=#?\w+;)|\](?=[(\[:])"  # entities, links
    r"|:(?=//)|(?<=\bwww)\."  # addresses, which GitHub and the Hub make links of
)
"""What has a meaning in Markdown within a line, in CommonMark or as GitHub extends it."""
_BLOCK = re.compile(r"(?:[#>+=~\[-]|\d+[.)](?=\s|\Z))")
"""What has a meaning at the beginning of a line: headings, quotes, lists, rules, fences and definitions of links."""
_ENTITIES = {"<": "&lt;", "&": "&amp;"}


def markdown(text: str) -> Markdown:
    """Return `text` as Markdown that shows it: one printable line without links, images, HTML or the end of a cell."""
    if isinstance(text, Markdown):
        return text
    line = printable(" ".join(text.split()))
    return Markdown(_ACTIVE.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), line))


def paragraph(text: str) -> Markdown:
    """Return `text` as `markdown` that may stand at the beginning of a line."""
    line = markdown(text)
    first = None if isinstance(text, Markdown) else _BLOCK.match(line)
    return Markdown(f"{line[: first.end() - 1]}\\{line[first.end() - 1 :]}") if first else line


def code(text: str) -> Markdown:
    """Return `text` as inline code of Markdown, or as a `paragraph` where code cannot hold it."""
    is_plain = not hidden(text, keep="") and text.strip() and not set(text) & {"`", "|"}
    return Markdown(f"`{text}`") if is_plain else paragraph(text)


def fenced(text: str, language: str = "") -> Markdown:
    """Return `text`, of one or more lines, as a code block of Markdown that nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = printable(text, keep="\n")
    return Markdown(f"{fence}{language}\n{shown}\n{fence}")
