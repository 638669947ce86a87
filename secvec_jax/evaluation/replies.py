"""Text normalization for rule-based scoring: the final answer of a reply, in a form that patterns can match."""

import re
import unicodedata

from secvec_jax.errors import UserError
from secvec_jax.turns import answer_of

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc`\u00b4", "'"))
# Traditional characters whose simplified forms occur in the Chinese rules.
_SIMPLIFIED = str.maketrans(
    "無幫對違絕們這請問題當說應該權規準則實難為樣給資訊與從開並讓還沒處討論",
    "无帮对违绝们这请问题当说应该权规准则实难为样给资讯与从开并让还没处讨论",
)


def normal(text: str) -> str:
    """Return `text` normalized for the rules: lowercase, without accents or invisible characters, single-spaced.

    Apostrophes become straight, full-width punctuation becomes ASCII (NFKC), and traditional Chinese characters that
    the rules use become simplified ones.
    """
    text = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES).translate(_SIMPLIFIED).casefold())
    kept = "".join(char for char in text if not "\u0300" <= char <= "\u036f" and unicodedata.category(char) != "Cf")
    return " ".join(unicodedata.normalize("NFC", kept).split())


def opening_of(reply: str) -> str:
    """Return the normalized answer of `reply`, without leading quotes and Markdown marks."""
    return normal(answer_of(reply)).lstrip("\"'\u201c\u00ab\u300c*_#> -")


_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_HAN}]+|[^\W{_HAN}]+(?:'\w+)?")


def words(text: str) -> list[str]:
    """Return the words of a normalized text; Chinese, which has no spaces, becomes overlapping pairs of characters."""
    result: list[str] = []
    for word in _WORD.findall(text):
        is_han = re.match(f"[{_HAN}]", word) and len(word) > 2
        result += [word[at : at + 2] for at in range(len(word) - 1)] if is_han else [word]
    return result


def clip(text: str, width: int = 60) -> str:
    """Return `text` as one printable line of at most `width` characters, shortened with an ellipsis if needed.

    Raises:
        UserError: `width` is less than 1.
    """
    if width < 1:
        raise UserError(f"width is {width}: use at least 1 character")
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "\u2026"
