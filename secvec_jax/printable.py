"""Text of others made safe to show: on a terminal, in Markdown and in plots.

Rows, replies of models and judges, names of files and values in other people's YAML and JSON are text that somebody
else wrote. A terminal obeys the escape sequences in it, a viewer of Markdown its links and HTML, rich its markup. These
functions are the only ones that decide what is shown of such text: `printable` for terminals (used by `UserError`, by
`terminal.Console` and by the log handler), and `markdown`, `code` and `fenced` for reports and model cards.
"""

import re
import unicodedata

LONGEST_MESSAGE = 1_000
"""Characters of a message; what is longer is cut in the middle."""

_KINDS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that are shown as escapes: controls, formats (bidirectional overrides, tags), halves of a
character, and line and paragraph separators."""
_HARMLESS = frozenset("\u200c\u200d\u00ad")
"""Format characters that words and emoji are written with: the joiners and the soft hyphen."""
_PLAIN = re.compile(r"[ -~]*\Z")


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with each character that a terminal or a reader could be misled by as a visible escape (`\x1b`).

    keep: control characters to leave as they are, such as "\n".
    """
    if _PLAIN.match(text):
        return text
    return "".join(char if char in keep or _is_shown(char) else _escaped(char) for char in text)


def is_printable(text: str, keep: str = "") -> bool:
    """Return whether `printable` changes nothing."""
    return printable(text, keep) == text


def one_line(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Return `text` as one printable line of at most `longest` characters, whose middle is left out if it is longer."""
    if len(text) > 4 * longest:
        text = f"{text[: 2 * longest]} {text[-2 * longest :]}"  # a line of megabytes need not be read
    line = printable(" ".join(text.split()))
    if len(line) <= longest:
        return line
    kept = (longest - 5) // 2
    return f"{line[:kept]} ... {line[-kept:]}"


def _is_shown(char: str) -> bool:
    return unicodedata.category(char) not in _KINDS or char in _HARMLESS


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if char != "\xad" else char


class Markdown(str):
    """Text that is Markdown already: `markdown` leaves it as it is."""

    __slots__ = ()


_ACTIVE = re.compile(r"\\(?=[!-/:-@\[-`{-~]|\Z)|[`*<|]|&(?=#?\w+;)|\](?=[(\[:])")
"""What has a meaning in Markdown within a line: escapes, code, emphasis, HTML, cells, entities and links."""
_BLOCK = re.compile(r"(?:[#>+=~\[-]|\d+[.)](?=\s))")
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
    """Return `text` as inline code of Markdown, or as `markdown` where code cannot hold it."""
    is_plain = is_printable(text) and text.strip() and not set(text) & {"`", "|"}
    return Markdown(f"`{text}`") if is_plain else markdown(text)


def fenced(text: str, language: str = "") -> Markdown:
    """Return `text`, of one or more lines, as a code block of Markdown that nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{printable(text, keep=chr(10))}\n{fence}")
