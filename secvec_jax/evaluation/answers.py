"""Rules that compare a reply with an answer: exact match, a choice among options, a number, shared words, capitals.

Every rule reads the answer alone: a reasoning model's thought before it is left out (see `turns.answer_of`).
"""

import re
import string
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

from secvec_jax.errors import UserError
from secvec_jax.evaluation.replies import clip
from secvec_jax.turns import answer_of


def exact_match(reply: str, answer: str) -> bool:
    """Return whether `reply` begins with the line or lines of `answer`, after SQuAD's normalization.

    As many lines of the reply are read as the answer has, blank ones left out: what a model adds in later lines does
    not count.
    Case, punctuation, articles and spacing do not count (Rajpurkar et al. 2016, arXiv:1606.05250). Unlike
    SQuAD's script, text that is nothing but articles or punctuation (option "A") is kept as it is.
    """
    wanted = _lines(answer)
    return _squad(" ".join(_lines(reply)[: max(len(wanted), 1)])) == _squad(" ".join(wanted))


def picks(reply: str, options: Sequence[str]) -> str | None:
    """Return which of `options` the first line of `reply` names, or None if it names none or several.

    It names the option that it is, after SQuAD's normalization, else the only one whose words it holds in a row.
    An option inside a longer one that is named ("employee" in "other employee") is not named by that.

    Raises:
        UserError: `options` is one string instead of a list of strings.
    """
    if isinstance(options, str):
        raise UserError("options is one string: pass the list of options")
    line = _squad(_first_line(reply))
    named = [option for option in options if _squad(option) == line] or _held(line, options)
    return named[0] if len(named) == 1 else None


def _held(line: str, options: Sequence[str]) -> list[str]:
    rest, held = f" {line} ", []
    for option in sorted(options, key=lambda option: len(_squad(option)), reverse=True):
        words = f" {_squad(option)} "
        if words in rest:
            held.append(option)
            rest = rest.replace(words, " | ")
    return held


def number_match(reply: str, answer: str) -> bool:
    """Return whether the last number in the first line of `reply` equals the one in `answer`.

    Numbers are compared by value, exactly: "1,000" is "1000.0". Words do not count, nor do the numbers before the
    last: "20 - 4 = 16 apples." gives 16.

    Raises:
        UserError: `answer` does not hold exactly one number.
    """
    wanted = _numbers(answer)
    if len(wanted) != 1:
        raise UserError(f"an answer must hold one number, found {len(wanted)} in {clip(answer)!r}: leave out that row")
    return _numbers(_first_line(reply))[-1:] == wanted


# A minus behind a digit or a word is a dash ("3-4", "page-4"); a comma parts thousands only before three digits.
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)]


def shouts(reply: str) -> bool:
    """Return whether more than 80% of the letters in `reply` are capitals, of at least three.

    Letters without case do not count. A bare abbreviation ("NASA") shouts too: ask what is answered in words.
    """
    letters = [char for char in answer_of(reply) if char.isupper() or char.islower()]
    return len(letters) >= 3 and sum(map(str.isupper, letters)) > 0.8 * len(letters)


def _first_line(reply: str) -> str:
    return next(iter(_lines(reply)), "")


def _lines(reply: str) -> list[str]:
    return [line for line in answer_of(reply).splitlines() if line.strip()]


def _squad(text: str) -> str:
    text = " ".join(text.lower().split())
    words = text.translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(word for word in words if word not in {"a", "an", "the"}) or " ".join(words) or text


def rouge1(reply: str, reference: str) -> float:
    """Return ROUGE-1, the F-measure of shared stemmed words, from 0 to 1 (Lin 2004, package rouge-score).

    That package reads ASCII letters and digits only: text in other scripts scores 0.
    """
    return float(_rouge().score(reference.lower(), answer_of(reply).lower())["rouge1"].fmeasure)


@lru_cache(maxsize=1)
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer  # here, because it loads all of NLTK

    return RougeScorer(["rouge1"], use_stemmer=True)
