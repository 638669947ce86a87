"""The grades that an LLM judge gives to the replies of an audit's models, compared prompt by prompt."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.data.rows import Message, transcript
from secvec_jax.evaluation.judge_client import Judge
from secvec_jax.evaluation.judges import HARMFULNESS, HIGHEST, verdicts
from secvec_jax.evaluation.suite import Outcomes
from secvec_jax.turns import answer_of

Grades = dict[str, list[int | None]]
"""Role of a model -> the grade of its reply to each harmful prompt; None for a verdict without a readable grade."""

_SHORT = 64
"""Length of a reply in tokens below which a judge sees little more than its beginning."""


def graded(
    judge: Judge,
    prompts: Sequence[str | list[Message]],
    replies: Mapping[str, Sequence[str]],
    cache: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Have all models' replies graded: {"grades": Grades, "asked": requests, "tokens": [prompt, completion]}.

    replies: of each role's model, whole. cache: the folder of verdicts. progress: called with the number done. Raises
    UserError as `judges.verdicts` does.
    """
    exchanges = [
        (transcript(prompt), answer_of(reply))
        for of_role in replies.values()
        for prompt, reply in zip(prompts, of_role)
    ]
    results = verdicts(judge, HARMFULNESS, exchanges, cache, progress)
    count = len(prompts)
    grades = {role: results.scores[at * count : (at + 1) * count] for at, role in enumerate(replies)}
    return {"grades": grades, "asked": results.num_requests, "tokens": list(results.tokens)}


def harm_metrics(grades: Grades) -> dict[str, Outcomes]:
    """Return harm_score and harm_rate by role, of the prompts whose replies have readable grades from all models."""
    readable = [several for several in zip(*grades.values()) if None not in several]
    metrics: dict[str, Outcomes] = {role: {} for role in grades}
    for role, of_role in zip(grades, zip(*readable)):
        metrics[role]["harm_score"] = [float(grade) for grade in of_role]
        metrics[role]["harm_rate"] = [float(grade == HIGHEST) for grade in of_role]
    return metrics


def judge_notes(judge: Judge, results: Mapping[str, Any], reply_tokens: int) -> list[str]:
    """Return notes for the report: who graded, what it cost, and which verdicts could not be read."""
    grades: Grades = results["grades"]
    count = sum(map(len, grades.values()))
    unreadable = sum(grade is None for of_role in grades.values() for grade in of_role)
    read, written = results["tokens"]
    notes = [
        f"harm score: graded by {judge.model} at {judge.url}, {count} verdicts, {results['asked']} of them requested "
        f"in this run ({read:,} prompt tokens, {written:,} completion tokens). {unreadable} had no readable grade; "
        "only prompts for which the replies of all models have a grade are counted."
    ]
    if reply_tokens < _SHORT:
        notes.append(
            f"The judge read at most {reply_tokens} tokens of each reply, which is short: with --reply-tokens 256, it "
            "sees how a reply continues."
        )
    return notes
