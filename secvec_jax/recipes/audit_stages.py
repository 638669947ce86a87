"""The stages of an audit: the prompts, each model's replies and losses, a judge's grades, and the comparison."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from secvec_jax.assets import cache_dir
from secvec_jax.data.benchmarks import refusal_prefixes
from secvec_jax.data.rows import Row, full_prompt_of, response_of
from secvec_jax.defenses.security_vectors import PHASE2
from secvec_jax.distributed import all_gather_json, on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit import Audit, Limits, Line, compared, unmeasured_limits
from secvec_jax.evaluation.audit_changes import changes
from secvec_jax.evaluation.audit_judge import graded, harm_metrics, judge_notes
from secvec_jax.evaluation.audit_measures import (
    MEASURES,
    MIN_BEGINNINGS,
    AuditPrompts,
    Measured,
    are_enough,
    general_kl,
    generic_beginnings,
    measure,
    num_replies,
    reply_losses,
    same_vocabulary,
)
from secvec_jax.evaluation.audit_samples import samples_of
from secvec_jax.evaluation.judge_client import Judge, check_answers
from secvec_jax.evaluation.prefill import GENERIC, GIVEN, Beginning, compliant_beginnings
from secvec_jax.evaluation.results import Results
from secvec_jax.inference import as_model
from secvec_jax.model.embedded import UNALIGNED, unaligned
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision, is_quantized
from secvec_jax.recipes.export import run_of
from secvec_jax.workspace import inputs
from secvec_jax.workspace.inputs import known
from secvec_jax.workspace.result_cache import cached_result, inputs_of, settings_of_replies
from secvec_jax.workspace.splits import PACKAGED_SEED, Sizes, make_splits
from secvec_jax.workspace.stage import Stage
from secvec_jax.workspace.stages import Stages

_LONG_SHARE = 0.5
"""Share of the prompts that the measures that take longest use."""

_TRUSTED = 0.5
"""Share of harmful prompts that the original model should refuse for an audit of its refusals to mean much."""


@dataclasses.dataclass(frozen=True)
class AuditRequest:
    """What to audit.

    models: by role, values or what `sv.load` takes. rows_of: kind -> rows; None: packaged ones. whole_replies: keep
    replies to harmful prompts whole, as is always done for a judge. precision: of the weights of models that are loaded
    here.
    """

    models: Mapping[str, Any]
    rows_of: Callable[[str], Sequence[Row] | None]
    system: str | None
    limits: Limits
    max_prompts: int
    reply_tokens: int
    judge: Judge | None = None
    whole_replies: bool = False
    precision: Precision = "float32"

    @property
    def max_long_prompts(self) -> int:
        """Prompts for the measures that take longest."""
        return math.ceil(_LONG_SHARE * self.max_prompts)

    def model(self, role: str) -> Model:
        """The model of a role, loaded on each call."""
        return as_model(self.models[role], self.precision)

    def name(self, role: str) -> str:
        """The name of a role's model in reports."""
        model = self.models[role]
        return model.name if isinstance(model, Model) else str(model)


def audited(
    request: AuditRequest, stages: Stages, reads: Mapping[str, Mapping[str, Path | str]] = MappingProxyType({})
) -> Audit:
    """Measure the models, one stage each, and compare them. reads: {role: files that its model is read from}."""
    notes: list[str] = []
    if (difference := _precision_note(_check_precisions(request))) is not None:
        notes.append(difference)
    if request.judge is not None:
        try_judge(request.judge, stages)
    before = request.model("before")
    prompts, data, available = _prompts(request, before, notes)
    beginnings: list[Beginning | None] = stages.run("unaligned", partial(_beginnings, request, prompts))
    if not are_enough(beginnings):
        notes.append(
            f"{request.name('unaligned')} complies with fewer than {MIN_BEGINNINGS} of the harmful prompts, so all "
            f'replies were prefilled with the same text, "{GENERIC}", instead of its replies '
            "(--unaligned names another model)."
        )
        beginnings = generic_beginnings(len(prompts.harmful))
    else:
        complied = [index for index, beginning in enumerate(beginnings) if beginning is not None]
        used = _spread(complied, request.max_long_prompts)
        beginnings = [beginning if index in used else None for index, beginning in enumerate(beginnings)]
        notes.append(
            f"prefill: the prefills are the first tokens of {request.name('unaligned')}'s own replies to {len(used)} "
            f"of the {len(complied)} harmful prompts that it complies with."
        )

    other: dict[str, Model] = {}

    def model_of(role: str) -> Model:
        """The model of a role, kept until another one is needed: at most one besides `before` is in memory."""
        if role == "before":
            return before
        if role not in other:
            other.clear()
            other[role] = request.model(role)
        return other[role]

    def measured(role: str, stage: Stage) -> dict[str, Any]:
        model = model_of(role)
        comparable = same_vocabulary(before, model)
        progress = stage.replies(num_replies(prompts, beginnings), "replying")
        whole = request.whole_replies or request.judge is not None

        def make() -> dict[str, Any]:
            values = measure(model, prompts, beginnings, request.reply_tokens, comparable, progress, whole)
            return dataclasses.asdict(values)

        inputs = [MEASURES, dataclasses.asdict(prompts), beginnings, request.reply_tokens, comparable, whole]
        try:
            values = cached_result("replies", [*inputs_of(model), *inputs], make, stage.print)
            if data and comparable:
                values["metrics"]["data_loss"] = reply_losses(model, data)
        except UserError as error:  # says which of the models
            raise UserError(f"{request.name(role)}: {error}") from error
        return cast(dict[str, Any], values)

    roles = [role for role in ("before", "after", "reference") if request.models[role] is not None]
    by_role = {role: Measured(**stages.run(role, partial(measured, role), reads=reads.get(role))) for role in roles}

    def general(stage: Stage) -> dict[str, Any]:
        others = [role for role in roles if role != "before"]
        replies, count = by_role["before"].benign_replies, request.max_long_prompts
        return {role: general_kl(before, model_of(role), prompts.benign[:count], replies[:count]) for role in others}

    all_files = {label: path for files in reads.values() for label, path in files.items()}
    kl = stages.run("general", general, reads=all_files)
    for role, divergences in kl.items():
        if isinstance(divergences, str):
            notes.append(f"{role}: {divergences}")
        else:
            by_role[role].metrics["kl"] = divergences
    if any(isinstance(divergences, list) for divergences in kl.values()):
        by_role["before"].metrics["kl"] = [0.0] * len(prompts.benign[: request.max_long_prompts])
    grades = None
    if request.judge is not None:
        replies = {role: measured.harmful_replies for role, measured in by_role.items()}
        judged = stages.run("judge", partial(_judged, request.judge, prompts, replies), reads=all_files)
        grades = judged["grades"]
        for role, metrics in harm_metrics(grades).items():
            by_role[role].metrics.update(metrics)
        notes += judge_notes(request.judge, judged, request.reply_tokens)
    measured_before, measured_after = by_role["before"].metrics, by_role["after"].metrics
    if any(name.endswith("_loss") and name not in measured_after for name in measured_before):
        notes.append("Losses are not compared: they are per token, and the models have different vocabularies.")
    if not any(kl.get("after", ())) and by_role["after"].metrics == by_role["before"].metrics:
        notes.append("Both models compute the same on every prompt: check that they are not one model.")
    refusal = by_role["before"].metrics.get("refusal", [])
    if refusal and sum(refusal) < _TRUSTED * len(refusal):
        notes.append(
            f"The original model refuses only {round(sum(refusal))} of {len(refusal)} harmful prompts: an audit shows "
            "what fine-tuning changed, not that the model was safe before (train.py align teaches refusals)."
        )
    notes.append("The packaged harmful prompts, and the rules that classify replies, are in English.")
    if is_quantized(request.precision) and any(isinstance(request.models[role], str | Path) for role in roles):
        notes.append(
            f"The models' weights are quantized to {request.precision}: changes that are smaller than a quantization "
            "step are lost (bfloat16 rounds less)."
        )
    reference = by_role["reference"].metrics if "reference" in by_role else None
    lines = compared(by_role["before"].metrics, by_role["after"].metrics, request.limits, reference)
    unmeasured = tuple(
        name for name in unmeasured_limits(request.limits, [line.metric for line in lines]) if name != "tasks"
    )
    notes += [
        f"limits.{name} is {getattr(request.limits, name):g}, and nothing was measured for it: the audit cannot pass."
        for name in unmeasured
    ]
    needing = [line.metric for line in lines if line.prompts_needed]
    if any(name in ("harmful_loss", "benign_loss") for name in needing):
        notes.append(f"The losses of harmful and benign answers are measured on at most {_MAX_ROWS} rows each.")
    if any(name not in ("harmful_loss", "benign_loss") for name in needing):
        notes.append(
            f"For more prompts: --max-prompts, up to the {available['harmful']} harmful and {available['benign']} "
            "benign ones that there are (prefill and kl use half), or more of your own with --harmful and --benign."
        )
    changed = changes(prompts, by_role["before"], by_role["after"], beginnings, by_role["after"].metrics.get("kl"))
    names = {role: request.name(role) for role in roles}
    return Audit(
        names["before"],
        names["after"],
        _ordered(lines),
        changed,
        tuple(notes),
        names.get("reference"),
        stages.seconds,
        samples_of(prompts, by_role, names, beginnings, grades),
        unmeasured,
    )


def _check_precisions(request: AuditRequest) -> Mapping[str, Precision]:
    """Each model's precision. Raises UserError if they differ and one is quantized: an audit would show rounding."""
    precisions: dict[str, Precision] = {
        role: model.precision if isinstance(model, Model) else request.precision
        for role in ("before", "after", "reference")
        if (model := request.models[role]) is not None
    }
    if len(set(precisions.values())) > 1 and any(map(is_quantized, precisions.values())):
        raise UserError(
            f"the models' weights differ in precision ({_listed(precisions)}), so rounding would look like an effect "
            "of training: load the models in the same precision, with sv.load(NAME, PRECISION)"
        )
    return precisions


def _precision_note(precisions: Mapping[str, Precision]) -> str | None:
    if len(set(precisions.values())) == 1:
        return None
    return f"The models' weights differ in precision ({_listed(precisions)}): part of a small difference is rounding."


def _listed(precisions: Mapping[str, Precision]) -> str:
    return ", ".join(f"{role} in {precision}" for role, precision in precisions.items())


def try_judge(judge: Judge, stages: Stages) -> None:
    """Raise UserError if the judge does not answer, minutes before its grades are needed."""
    stages.run("judge's endpoint", lambda stage: on_main_process(lambda: check_answers(judge)))


def _judged(judge: Judge, prompts: AuditPrompts, replies: Mapping[str, Sequence[str]], stage: Stage) -> dict[str, Any]:
    """The judge's grades. Only the main process sends requests."""
    grades: dict[str, Any] = {}
    progress = stage.replies(sum(map(len, replies.values())), "grading")
    on_main_process(lambda: grades.update(graded(judge, prompts.harmful, replies, cache_dir() / "verdicts", progress)))
    first: dict[str, Any] = all_gather_json(grades)[0]
    return first


def _beginnings(request: AuditRequest, prompts: AuditPrompts, stage: Stage) -> list[Beginning | None]:
    """The prefills, from the cache folder if another audit made the same ones."""

    unaligned = cache(lambda: request.model("unaligned"))

    def make() -> list[Beginning | None]:
        progress = stage.replies(len(prompts.harmful), "compliant replies")
        return compliant_beginnings(unaligned(), prompts.harmful, refusal_prefixes(), progress)

    source = request.models["unaligned"]
    digest = known(inputs.model, str(source)) if isinstance(source, str | Path) else None
    # A model that is identified by its files need not be loaded.
    model = inputs_of(unaligned()) if digest is None else [digest, request.precision, *settings_of_replies()]
    prefills = cached_result("beginnings", [*model, list(prompts.harmful), list(GIVEN)], make, stage.print)
    return cast(list[Beginning | None], prefills)


_ORDER = (
    "refusal", "compliance", "unclear", "harm_score", "harm_rate", "prefill_5", "prefill_25", "over_refusal",
    "refusal_system", "compliance_system", "unclear_system", "over_refusal_system", "harmful_loss", "kl",
    "benign_loss", "data_loss",
)  # fmt: skip


def _ordered(lines: Sequence[Line]) -> tuple[Line, ...]:
    return tuple(sorted(lines, key=lambda line: _ORDER.index(line.metric)))


# ---------------------------------------------------------------------------------------------- prompts


def _prompts(request: AuditRequest, model: Model, notes: list[str]) -> tuple[AuditPrompts, list[Row], dict[str, int]]:
    """The given prompts, packaged ones where none are given, and the user's held-out rows, at most `max_prompts` of
    each kind; and how many prompts there are.

    Copies are left out, which adds a note: they get the same reply, and would only make the intervals narrower.
    """

    def distinct(what: str, items: Sequence[Any]) -> list[Any]:
        kept = list({json.dumps(item, sort_keys=True): item for item in items}.values())
        if len(kept) < len(items):
            notes.append(f"{len(items) - len(kept)} of {len(items)} {what} are copies of others, and are left out.")
        return kept

    harmful, benign, data = map(request.rows_of, ("harmful", "benign", "data"))
    packaged_rows = {"harmful": (), "benign": ()} if harmful and benign else _packaged(model)

    def rows_of(rows: Sequence[Row]) -> list[Row]:
        """Those that have an answer, each once: copies would make intervals narrower."""
        answered = {json.dumps(row["messages"]): row for row in rows if response_of(row) is not None}
        return _spread(list(answered.values()), _MAX_ROWS)

    harmful_prompts = distinct("harmful prompts", [full_prompt_of(row) for row in harmful or packaged_rows["harmful"]])
    benign_rows = list(benign or packaged_rows["benign"])
    benign_prompts = distinct("benign prompts", [full_prompt_of(row) for row in benign_rows])
    prompts = AuditPrompts(
        harmful=_spread(harmful_prompts, request.max_prompts),
        benign=_spread(benign_prompts, request.max_prompts),
        harmful_rows=rows_of(harmful or packaged_rows["unseen"]),
        benign_rows=rows_of(benign_rows),
        system=request.system,
    )
    available = {"harmful": len(harmful_prompts), "benign": len(benign_prompts)}
    return prompts, _spread(distinct("held-out rows", data or ()), request.max_prompts), available


_MAX_ROWS = 32
"""Rows of each kind whose loss is measured."""


def _packaged(model: Model) -> dict[str, Sequence[Row]]:
    """Prompts on which this package never trains: those of the quickstart with its default settings."""
    # Only prompts and rows are used, which no length of a training limits.
    splits = make_splits(
        model, Sizes(), dataclasses.replace(PHASE2, max_seq_len=model.architecture.max_length), PACKAGED_SEED
    )
    harmful: list[Row] = [{"messages": [{"role": "user", "content": str(text)}]} for text in splits.suite.harmful]
    return {"harmful": harmful, "unseen": splits.held_out["harmful"], "benign": splits.held_out["benign"]}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def before_alignment(model: Any) -> str:
    """The model whose compliant replies are the prefills: the one that `model` was aligned from, according to run
    directories.

    smollm2 if they do not say it, and for the packaged aligned model.
    """
    if not isinstance(model, str | Path):
        return UNALIGNED
    name, aligned = str(model), False
    seen: set[Path] = set()
    while (folder := run_of(name)) is not None and folder not in seen:
        seen.add(folder)
        with contextlib.suppress(UserError):
            settings = Results.load(folder).config
            name, aligned = str(settings.get("model", "")), "vectors" not in settings
    return unaligned(name) if aligned else UNALIGNED
