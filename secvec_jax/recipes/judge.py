"""`eval.py judge`: how harmful a model's replies are, and how well they do what was asked, as another model sees it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from secvec_jax.assets import cache_dir
from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.rows import Message, asked_of, response_of, text_of, transcript
from secvec_jax.data.sources import load_prompts
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.classifier import flagged
from secvec_jax.evaluation.judges import (
    HARMFULNESS,
    HARMLESSNESS,
    HIGHEST,
    INSTRUCTION_FOLLOWING,
    LOWEST,
    OPENAI,
    Asking,
    Judge,
    check_url,
    verdicts,
)
from secvec_jax.evaluation.metrics import percent
from secvec_jax.evaluation.statistics import auroc
from secvec_jax.evaluation.suite import judged as ruled_of
from secvec_jax.evaluation.suite import scores
from secvec_jax.inference import ask
from secvec_jax.model.hub import load
from secvec_jax.turns import answer_of
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.runs import Run, judged_name, scored
from secvec_jax.workspace.stages import Stage

Exchanges = dict[str, list[tuple[str | list[Message], str]]]
"""(what was asked, the reply), by what the prompts are: "harmful" or "benign"."""

RUBRICS = {
    "harm_score": ("harmful", HARMFULNESS),
    "harmlessness": ("harmful", HARMLESSNESS),
    "instruction_following": ("benign", INSTRUCTION_FOLLOWING),
}
"""Metric -> the replies that are graded, and by what."""


@checked
@dataclasses.dataclass(frozen=True)
class Judged:
    """Have a model's replies judged by a language model, a classifier, or both."""

    model: str = "smollm2"
    """embedded name (smollm2), Hugging Face folder, run directory, hub id or .gguf file"""
    vectors: tuple[str, ...] = ()
    """reply with these vectors active"""
    harmful: tuple[str, ...] = ("harmbench", "do-not-answer")
    """prompts that should be refused: files, packaged names or hub ids"""
    benign: tuple[str, ...] = ("alpaca",)
    """prompts that should be answered"""
    given: bool = False
    """judge the answers in these rows instead of a model's replies"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    limit: PositiveInt = 100
    """maximum number of prompts per source"""
    reply_tokens: PositiveInt = 256
    """maximum tokens per reply"""
    judge: str = ""
    """name of the language model at the endpoint that grades harmfulness, harmlessness and instruction-following"""
    judge_url: str = OPENAI
    """endpoint with OpenAI's chat API, such as http://127.0.0.1:8000/v1"""
    asking: Asking = dataclasses.field(default_factory=Asking)
    classifier: str | None = None
    """a Hugging Face sequence classifier: hub id or folder (requires torch)"""
    labels: tuple[str, ...] = ()
    """the classifier's labels that mean harmful; by default any label of a multi-label classifier"""
    out: str = "runs/judge"
    """run directory; writes results.json and report.md"""

    def __post_init__(self) -> None:
        check_url(self.judge_url, self.asking)  # before the settings are written into a run directory

    overwrite: bool = False
    """delete the run in OUT and start over"""


def judged(settings: Judged, command: str) -> None:
    """The run of `eval.py judge`."""
    if not (settings.judge or settings.classifier):
        raise UserError("no judge: name a language model with --judge, a classifier with --classifier, or both")
    run = Run(settings, command, scored)
    exchanges: Exchanges = run.stages.run("replies", lambda stage: _exchanges(settings, stage))
    ruled = _ruled(exchanges["harmful"])
    metrics, notes = dict(ruled), []
    if settings.judge:
        judge = Judge(settings.judge, settings.judge_url, settings.asking)
        graded = run.stages.run("judge", lambda stage: _graded(judge, exchanges, stage))
        metrics |= _metrics(graded)
        notes = _notes(graded, ruled)
    if settings.classifier:
        metrics["flagged"] = run.stages.run("classifier", lambda stage: _flagged(settings, exchanges["harmful"], stage))
    name = "given replies" if settings.given else judged_name(settings.model, settings.vectors)
    found = scores({metric: values for metric, values in metrics.items() if values})
    run.report([{"name": name, "metrics": {metric: score.as_dict() for metric, score in found.items()}}], notes)


def _exchanges(settings: Judged, stage: Stage) -> Exchanges:
    sources = {"harmful": settings.harmful, "benign": settings.benign}
    rows = {
        kind: load_prompts(names, settings.limit, settings.given, settings.ignore_fields)
        for kind, names in sources.items()
    }
    if settings.given:
        return {kind: [(asked_of(row), response_of(row) or "") for row in some] for kind, some in rows.items()}
    model = load(settings.model)
    vectors = load_several(settings.vectors, model)
    asked = [asked_of(row) for some in rows.values() for row in some]
    replies = iter(
        ask(
            model,
            asked,
            vectors,
            max_new_tokens=settings.reply_tokens,
            progress=stage.replies(len(asked), "replying"),
        )
    )
    return {kind: [(asked_of(row), next(replies)) for row in some] for kind, some in rows.items()}


def _ruled(harmful: Sequence[tuple[str | list[Message], str]]) -> dict[str, list[float]]:
    """What the rules say of the same replies."""
    return ruled_of([text_of(asked) for asked, _ in harmful], [reply for _, reply in harmful], refusal_prefixes())


def _read(exchanges: Sequence[tuple[str | list[Message], str]]) -> list[tuple[str, str]]:
    """(prompt, answer) as a judge reads them: conversations with their roles, answers without their thoughts."""
    return [(transcript(asked), answer_of(reply)) for asked, reply in exchanges]


def _graded(judge: Judge, exchanges: Exchanges, stage: Stage) -> dict[str, Any]:
    """The grades by rubric, and what they cost; asked for by the first process, whose results are the ones written."""
    graded: dict[str, Any] = {"grades": {}, "asked": 0, "tokens": [0, 0]}

    def work() -> None:
        for name, (kind, rubric) in RUBRICS.items():
            on_verdict = stage.replies(len(exchanges[kind]), name.replace("_", " "))
            found = verdicts(judge, rubric, _read(exchanges[kind]), cache_dir() / "verdicts", on_verdict)
            graded["grades"][name] = found.scores
            graded["asked"] += found.asked
            graded["tokens"] = [before + now for before, now in zip(graded["tokens"], found.tokens)]

    on_main_process(work)
    return graded


def _metrics(graded: dict[str, Any]) -> dict[str, list[float]]:
    read = {name: [float(grade) for grade in grades if grade is not None] for name, grades in graded["grades"].items()}
    harm = read.get("harm_score", [])
    unread = [float(grade is None) for grades in graded["grades"].values() for grade in grades]
    return read | {"harm_rate": [float(grade == HIGHEST) for grade in harm], "unreadable": unread}


def _notes(graded: dict[str, Any], ruled: dict[str, list[float]]) -> list[str]:
    """What the judge cost, and how far it agrees with the rules."""
    grades = graded["grades"].get("harm_score", [])
    read = [index for index, grade in enumerate(grades) if grade is not None]
    count = sum(map(len, graded["grades"].values()))
    unread = sum(grade is None for some in graded["grades"].values() for grade in some)
    told = [
        f"{count} verdicts, {graded['asked']} of them asked for now, with {graded['tokens'][0]:,} tokens read and "
        f"{graded['tokens'][1]:,} written; {unread} name no grade and count nowhere."
    ]
    if read:
        harm = [float(grades[index]) for index in read]
        complied = [bool(ruled["compliance"][index]) for index in read]
        alike = [(grade > LOWEST) != bool(ruled["refusal"][index]) for grade, index in zip(harm, read)]
        told.append(
            f"Beside the rules, on {len(read)} replies: that there is some harm, or none, agrees with the rule for "
            f"refusals in {percent(sum(alike) / len(alike))}%. A reply that complies by the rules has a higher grade "
            f"than one that does not with a chance of {auroc(harm, complied):.2f} (AUROC)."
        )
    return told


def _flagged(settings: Judged, harmful: Sequence[tuple[str | list[Message], str]], stage: Stage) -> list[float]:
    found: list[float] = []
    progress = stage.replies(len(harmful), "classifying")
    on_main_process(
        lambda: found.extend(flagged(settings.classifier or "", _read(harmful), settings.labels, progress=progress))
    )
    return found
