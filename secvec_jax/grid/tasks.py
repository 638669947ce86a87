"""Tasks: what the user wants the model to learn, and held-out questions that measure it."""

import dataclasses
from collections.abc import Callable, Sequence

from secvec_jax.data.generated import open_profile_qa
from secvec_jax.data.rows import Row, response_of
from secvec_jax.data.sources import load_rows
from secvec_jax.errors import UserError
from secvec_jax.evaluation.answers import chosen_option, exact_match, number_match, rouge1
from secvec_jax.evaluation.suite import Probe
from secvec_jax.grid.rows import reference_answer, shuffled
from secvec_jax.suggestions import suggestion
from secvec_jax.workspace.splits import Splits

REFERENCE_WORDS = 12
"""Words of an instruction's reference answer that a reply is compared with."""

HUB_PROMPTS = 500
"""Held-out questions of a task from the hub, as in Vaccine."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the user wants the model to learn: rows, and held-out questions."""

    rows: list[Row]
    probe: Probe


def make_task(name: str, splits: Splits, seed: int, probed: int) -> Task:
    """The task of this name."""
    if name in TASKS:
        return TASKS[name](splits, seed, probed)
    split, score, tokens = HUB_TASKS[name]
    asked = shuffled(load_rows(name, split), seed)[:HUB_PROMPTS]
    return Task(shuffled(load_rows(name), seed), Probe.of(asked, score, tokens))


def check_task(name: str) -> None:
    """Raises UserError for an unknown name."""
    known = [*TASKS, *HUB_TASKS]
    if name not in known:
        raise UserError(f"no task is named {name!r}: {suggestion(name, known)}")


def _profiles(splits: Splits, seed: int, probed: int) -> Task:
    num_asked_people = -(-probed // 4)  # four questions each
    people = open_profile_qa(seed, 250, num_asked_people)
    return Task(people.train, Probe.of(people.test[:probed], _exact))


def _questions(splits: Splits, seed: int, probed: int) -> Task:
    asked, rest = _divided(splits.spare["questions"], probed)
    return Task(rest, Probe.of(asked, _exact))


def _arithmetic(splits: Splits, seed: int, probed: int) -> Task:
    asked, rest = _divided(shuffled(load_rows("asdiv"), seed), probed)
    return Task(rest, Probe.of(asked, lambda row, reply: number_match(reply, reference_answer(row))))


def _passages(splits: Splits, seed: int, probed: int) -> Task:
    rows = [row for row in load_rows("bbq") if row["category"] == "disambiguated"]
    asked, rest = _divided(shuffled(rows, seed), probed)
    return Task(rest, Probe.of(asked, lambda row, reply: chosen_option(reply, row["options"]) == response_of(row)))


def _instructions(splits: Splits, seed: int, probed: int) -> Task:
    # From the end: the attack "capitals" takes them from the start.
    answered = [row for row in splits.spare["instructions"] if response_of(row) is not None][::-1]
    asked, rest = _divided(answered, probed)

    def opening(row: Row) -> str:
        return " ".join(reference_answer(row).split()[:REFERENCE_WORDS])

    return Task(rest, Probe.of(asked, lambda row, reply: rouge1(reply, opening(row)), tokens=16))


def _divided(rows: Sequence[Row], probed: int) -> tuple[list[Row], list[Row]]:
    """The rows that are asked, and those that are trained on. Raises UserError if none is left for these."""
    if len(rows) <= probed:
        raise UserError(
            f"the task has {len(rows)} rows, and {probed} are probed: lower experiment.probed in the grid file"
        )
    return list(rows[:probed]), list(rows[probed:])


def _exact(row: Row, reply: str) -> float:
    return exact_match(reply, reference_answer(row))


def _solved(row: Row, reply: str) -> float:
    """Whether the number after the last "The final answer is:", or else the last number, is right."""
    answer, expected = (text.rpartition("The final answer is:")[2] for text in (reply, reference_answer(row)))
    return float(number_match(" ".join(answer.split()), expected))


TASKS: dict[str, Callable[[Splits, int, int], Task]] = {
    "profiles": _profiles,
    "questions": _questions,
    "arithmetic": _arithmetic,
    "passages": _passages,
    "instructions": _instructions,
}
"""Tasks by name.

- profiles: facts about a person, whose profile is in the prompt.
- questions: short open questions (NQ-open).
- arithmetic: word problems (ASDiv).
- passages: BBQ's questions that the passage answers.
- instructions: Alpaca, by ROUGE-1 with the opening of the reference answer.
"""

HUB_TASKS: dict[str, tuple[str, Callable[[Row, str], float], int]] = {
    "sst2": ("validation", _exact, 8),
    "ag-news": ("test", _exact, 8),
    "gsm8k": ("test", _solved, 200),
}
"""The papers' tasks, from the hub: the split with the questions, the score of a reply, and its length in tokens."""
