"""`eval.py judge`: grade the harmfulness and helpfulness of a model's replies with an LLM judge or a classifier."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from secvec_jax.assets import cache_dir
from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.rows import Message, full_prompt_of, last_user_text, response_of, transcript
from secvec_jax.data.sources import load_prompts
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.classifier import flagged
from secvec_jax.evaluation.judge_client import OPENAI, Judge, JudgeRequests, check_judge
from secvec_jax.evaluation.judges import (
    HARMFULNESS,
    HARMLESSNESS,
    HIGHEST,
    INSTRUCTION_FOLLOWING,
    LOWEST,
    verdicts,
)
from secvec_jax.evaluation.metrics import percent
from secvec_jax.evaluation.statistics import auroc
from secvec_jax.evaluation.suite import classify_replies, scores
from secvec_jax.inference import ask, frozen_precision
from secvec_jax.model.hub import load
from secvec_jax.model.quantized import Precision
from secvec_jax.turns import answer_of
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.runs import Run, result_name, scoring_inputs
from secvec_jax.workspace.stage import Stage

Exchanges = dict[str, list[tuple[str | list[Message], str]]]
"""Kind of prompt ("harmful" or "benign") -> (prompt, reply) pairs."""

RUBRICS = {
    "harm_score": ("harmful", HARMFULNESS),
    "harmlessness": ("harmful", HARMLESSNESS),
    "instruction_following": ("benign", INSTRUCTION_FOLLOWING),
}
"""Metric -> (kind of prompt whose replies are graded, rubric)."""


@checked
@dataclasses.dataclass(frozen=True)
class JudgeRun:
    """Judge a model's replies with an LLM, a classifier, or both."""

    model: str = "smollm2"
    """embedded name (smollm2, smollm2-aligned, gemma3-270m), Hugging Face folder, run directory, hub id or .gguf"""
    vectors: tuple[str, ...] = ()
    """reply with these vectors active"""
    frozen_weights: Precision | None = None
    """precision of the model's weights: float32, bfloat16, int8 (one scale per output channel) or nf4 (4 bits, blocks
    of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU"""
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
    asking: JudgeRequests = dataclasses.field(default_factory=JudgeRequests)
    classifier: str | None = None
    """a Hugging Face sequence classifier: hub id or folder (requires torch)"""
    labels: tuple[str, ...] = ()
    """the classifier's labels that mean harmful; by default any label of a multi-label classifier"""
    out: str = "runs/judge"
    """run directory; writes results.json and report.md"""

    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_judge(self.judge, self.judge_url, self.asking)  # before the settings are written into a run directory
        for name in ("model", "vectors", "frozen_weights", "reply_tokens"):
            if self.given and getattr(self, name) != getattr(JudgeRun, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --given, which judges the replies in the rows: "
                    "omit one of them"
                )
        if self.labels and self.classifier is None:
            raise UserError("--labels are those of a classifier, and none is named: name one with --classifier")


def judge(settings: JudgeRun, command: str) -> None:
    """Run `eval.py judge`. Raises UserError without a judge, and as `verdicts` and `flagged` do."""
    if not (settings.judge or settings.classifier):
        raise UserError("no judge is set: name an LLM with --judge, a classifier with --classifier, or both")
    run = Run(settings, command, scoring_inputs)
    exchanges: Exchanges = run.stages.run("replies", lambda stage: _exchanges(settings, stage))
    ruled = _ruled(exchanges["harmful"])
    metrics, notes = dict(ruled), []
    if settings.judge:
        llm_judge = Judge(settings.judge, settings.judge_url, settings.asking)
        graded = run.stages.run("judge", lambda stage: _graded(llm_judge, exchanges, stage))
        metrics |= _metrics(graded)
        notes = _notes(graded, ruled)
    if settings.classifier:
        metrics["flagged"] = run.stages.run("classifier", lambda stage: _flagged(settings, exchanges["harmful"], stage))
    name = "given replies" if settings.given else result_name(settings.model, settings.vectors)
    by_metric = scores({metric: values for metric, values in metrics.items() if values})
    run.report([{"name": name, "metrics": {metric: score.as_dict() for metric, score in by_metric.items()}}], notes)


def _exchanges(settings: JudgeRun, stage: Stage) -> Exchanges:
    sources = {"harmful": settings.harmful, "benign": settings.benign}
    rows = {
        kind: load_prompts(names, settings.limit, settings.given, settings.ignore_fields)
        for kind, names in sources.items()
    }
    if settings.given:
        return {
            kind: [(full_prompt_of(row), response_of(row) or "") for row in kind_rows]
            for kind, kind_rows in rows.items()
        }
    model = load(settings.model, frozen_precision(settings.frozen_weights))
    vectors = load_several(settings.vectors, model)
    prompts = [full_prompt_of(row) for kind_rows in rows.values() for row in kind_rows]
    replies = iter(
        ask(
            model,
            prompts,
            vectors,
            max_new_tokens=settings.reply_tokens,
            progress=stage.replies(len(prompts), "replying"),
        )
    )
    return {kind: [(full_prompt_of(row), next(replies)) for row in kind_rows] for kind, kind_rows in rows.items()}


def _ruled(harmful: Sequence[tuple[str | list[Message], str]]) -> dict[str, list[float]]:
    """Return the rule-based metrics of the same replies."""
    prompts = [last_user_text(prompt) for prompt, _ in harmful]
    replies = [reply for _, reply in harmful]
    return classify_replies(prompts, replies, refusal_prefixes())


def _read(exchanges: Sequence[tuple[str | list[Message], str]]) -> list[tuple[str, str]]:
    """Return (prompt, answer) as shown to a judge: conversations with roles, answers without thinking."""
    return [(transcript(prompt), answer_of(reply)) for prompt, reply in exchanges]


def _graded(judge: Judge, exchanges: Exchanges, stage: Stage) -> dict[str, Any]:
    """Return the grades by rubric and their cost. Only the main process sends requests, since it writes the results."""
    graded: dict[str, Any] = {"grades": {}, "asked": 0, "tokens": [0, 0]}

    def work() -> None:
        for name, (kind, rubric) in RUBRICS.items():
            on_verdict = stage.replies(len(exchanges[kind]), name.replace("_", " "))
            graded_now = verdicts(judge, rubric, _read(exchanges[kind]), cache_dir() / "verdicts", on_verdict)
            graded["grades"][name] = graded_now.scores
            graded["asked"] += graded_now.num_requests
            graded["tokens"] = [total + new for total, new in zip(graded["tokens"], graded_now.tokens)]

    on_main_process(work)
    return graded


def _metrics(graded: dict[str, Any]) -> dict[str, list[float]]:
    readable = {
        name: [float(grade) for grade in grades if grade is not None] for name, grades in graded["grades"].items()
    }
    harm = readable.get("harm_score", [])
    unreadable = [float(grade is None) for grades in graded["grades"].values() for grade in grades]
    return readable | {"harm_rate": [float(grade == HIGHEST) for grade in harm], "unreadable": unreadable}


def _notes(graded: dict[str, Any], ruled: dict[str, list[float]]) -> list[str]:
    """Return notes for the report: the cost of the judge, and its agreement with the rules."""
    harm_grades = graded["grades"].get("harm_score", [])
    readable = [index for index, grade in enumerate(harm_grades) if grade is not None]
    count = sum(map(len, graded["grades"].values()))
    unreadable = sum(grade is None for grades in graded["grades"].values() for grade in grades)
    notes = [
        f"{count} verdicts, {graded['asked']} of them requested in this run ({graded['tokens'][0]:,} prompt tokens, "
        f"{graded['tokens'][1]:,} completion tokens); {unreadable} without a readable grade are excluded from means."
    ]
    if readable:
        harm = [float(harm_grades[index]) for index in readable]
        complied = [bool(ruled["compliance"][index]) for index in readable]
        agreement = [(grade > LOWEST) != bool(ruled["refusal"][index]) for grade, index in zip(harm, readable)]
        notes.append(
            f"Agreement with the rules, on {len(readable)} replies: a grade above {LOWEST} coincides with no refusal "
            f"(and {LOWEST} with a refusal) in {percent(sum(agreement) / len(agreement))}%. A reply that complies by "
            f"the rules has a higher grade than one that does not with probability {auroc(harm, complied):.2f} (AUROC)."
        )
    return notes


def _flagged(settings: JudgeRun, harmful: Sequence[tuple[str | list[Message], str]], stage: Stage) -> list[float]:
    """Return the classifier's flags, computed on the main process only."""
    flags: list[float] = []
    progress = stage.replies(len(harmful), "classifying")
    on_main_process(
        lambda: flags.extend(flagged(settings.classifier or "", _read(harmful), settings.labels, progress=progress))
    )
    return flags
