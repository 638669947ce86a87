"""Rule-based scoring of a reply: exact match, multiple choice, numbers, ROUGE-1 and all capitals.

Every rule reads only the final answer of a reply. A reasoning model's thinking is ignored (see `turns.answer_of`).
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
    """Return whether `reply` begins with the line or lines of `answer`, after SQuAD normalization.

    Only as many non-blank lines of the reply are compared as the answer has; later lines are ignored. Case,
    punctuation, articles and spacing are ignored too (Rajpurkar et al. 2016, arXiv:1606.05250). Unlike SQuAD's script,
    text that consists only of articles or punctuation (option "A") is kept.
    """
    expected = _lines(answer)
    compared = _lines(reply)[: max(len(expected), 1)]
    return _squad(" ".join(compared)) == _squad(" ".join(expected))


def chosen_option(reply: str, options: Sequence[str]) -> str | None:
    """Return which of `options` the first line of `reply` names, or None if it names none or several.

    After SQuAD normalization, the line names the option it equals, or else the only option it contains as a phrase.
    An option contained in a longer one ("employee" in "other employee") is not counted when the longer one matches.

    Raises:
        UserError: `options` is one string instead of a list of strings.
    """
    if isinstance(options, str):
        raise UserError("options is a single string: pass a list of options")
    line = _squad(_first_line(reply))
    named = [option for option in options if _squad(option) == line] or _contained(line, options)
    return named[0] if len(named) == 1 else None


def _contained(line: str, options: Sequence[str]) -> list[str]:
    """Return the options that `line` contains, longest first; a match is removed before shorter options are tried."""
    remaining = f" {line} "
    contained = []
    for option in sorted(options, key=lambda option: len(_squad(option)), reverse=True):
        phrase = f" {_squad(option)} "
        if phrase in remaining:
            contained.append(option)
            remaining = remaining.replace(phrase, " | ")
    return contained


def number_match(reply: str, answer: str) -> bool:
    """Return whether the last number in the first line of `reply` equals the one in `answer`.

    Numbers are compared exactly, by value: "1,000" equals "1000.0". Words and earlier numbers are ignored:
    "20 - 4 = 16 apples." gives 16.

    Raises:
        UserError: `answer` does not contain exactly one number.
    """
    expected = _numbers(answer)
    if len(expected) != 1:
        raise UserError(
            f"an answer must contain exactly one number, got {len(expected)} in {clip(answer)!r}: remove that row"
        )
    return _numbers(_first_line(reply))[-1:] == expected


# A minus after a digit or a word is a dash ("3-4", "page-4"); a comma separates thousands only before three digits.
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(number.replace(",", "")) for number in _NUMBER.findall(text)]


def is_all_caps(reply: str) -> bool:
    """Return whether `reply` has at least three letters and more than 80% of them are capitals.

    Letters without case are ignored. A bare abbreviation ("NASA") counts as shouting, so use prompts that are answered
    in words.
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
    """Return the ROUGE-1 F-measure of stemmed words, from 0 to 1 (Lin 2004, computed by the rouge-score package).

    The package reads only ASCII letters and digits: text in other scripts scores 0.
    """
    return float(_rouge().score(reference.lower(), answer_of(reply).lower())["rouge1"].fmeasure)


@lru_cache(maxsize=1)
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer  # imported lazily: it loads all of NLTK

    return RougeScorer(["rouge1"], use_stemmer=True)
