"""The stages of `train.py protect`, except its vectors (see `protect_vectors`)."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from secvec_jax.data.rows import Row
from secvec_jax.defenses.advice import default_rate, settings_measured
from secvec_jax.defenses.base import Defense
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.identity import of_rows
from secvec_jax.defenses.inputs import Groups, choose_held_out, row_keys
from secvec_jax.defenses.registry import evidence_of
from secvec_jax.defenses.screening import Screening
from secvec_jax.defenses.screening import screen as score_rows
from secvec_jax.defenses.user_inputs import UserInputs
from secvec_jax.digests import of_values
from secvec_jax.distributed import on_main_process
from secvec_jax.errors import UserError
from secvec_jax.evaluation.audit import Audit
from secvec_jax.evaluation.refusal_sample import RefusalSample, measure, sample_prompts
from secvec_jax.files import atomic_file
from secvec_jax.inference import as_model, frozen_precision
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import is_quantized
from secvec_jax.recipes.audit_stages import AuditRequest, audited, before_alignment
from secvec_jax.recipes.preflight import estimate
from secvec_jax.recipes.protect_work import FINE_TUNE, RECOMMENDED, Work, default_training
from secvec_jax.recipes.run_inputs import trainings
from secvec_jax.recipes.screen import write_histogram
from secvec_jax.recipes.training_run import TASK_FOLDER, save_trained
from secvec_jax.training.frozen import FrozenTrees
from secvec_jax.trees import fingerprint
from secvec_jax.vectors.kinds import Vectors
from secvec_jax.vectors.lora import drift, merge
from secvec_jax.vectors.peft import load_peft
from secvec_jax.workspace.result_cache import cached_result, inputs_of
from secvec_jax.workspace.stage import Stage

_MIN_HELD_OUT, _ENOUGH = 8, 40
"""At least 8 of the user's rows are held out if there are 40 or more."""


def preflight(work: Work) -> None:
    """Whether the model refuses and answers, what the rows are, and what the fine-tuning will take."""
    request = work.request

    def run(stage: Stage) -> dict[str, Any] | None:
        # The rows first: a problem with a file should be reported before a minute has passed.
        stage.say("reading the rows")
        full, extra_batch = request.task_lora is None, request.defense.extra_batch
        took = estimate(work.model, work.groups, request.training, full=full, extra_batch=extra_batch)
        work.note(str(took))
        if request.vectors is None:
            work.rows_for("harmful rows")  # if they do not fit, that is reported now
        work.note("chat template: the model's own")  # without one, encoding the rows has failed above
        work.note(settings_measured(work.model, request.training, request.task_lora))
        work.note(default_rate(work.model, request.training, default_training(request.task_lora), request.task_lora))
        if not request.check_prompts:
            return None
        sample = _refusals(work, stage)
        work.note(f"before: {sample}")
        work.note(sample.over_refusals)
        return {"refusal": sample.refusal.value, "no_refusals": sample.no_refusals}

    outcome = work.stage("preflight", run)
    if outcome is not None and outcome["no_refusals"] is not None:
        raise UserError(
            f"{outcome['no_refusals']}: run train.py align --model {work.model_name} --out runs/aligned, with packaged "
            "rows or --data of your own, and give its --out as the model"
        )


def _refusals(work: Work, stage: Stage) -> RefusalSample:
    """How often the model refuses packaged prompts, from the cache if that was measured before."""
    suite = sample_prompts(work.request.check_prompts)

    def make() -> dict[str, Any]:
        stage.say("measuring refusals")
        return measure(work.model, suite).as_dict()

    inputs = [*inputs_of(work.model), list(suite.refusals), list(suite.harmful), list(suite.benign), suite.reply_tokens]
    return RefusalSample.from_dict(cached_result("refusals before", inputs, make, work.note))


def screen_rows(work: Work, vectors: Vectors) -> Screening:
    """The score of each row under the vectors; the suspects are listed and none is dropped here."""

    def run(stage: Stage) -> dict[str, Any]:
        stage.say("scoring data")
        scored = score_rows(work.model, vectors, work.rows)
        screening = scored.with_known(**_known_scores(work, vectors, stage))
        on_main_process(lambda: _write_suspects(work, screening))
        then = "left out" if work.request.drop else "trained on like all others; --drop leaves them out"
        work.note(
            f"suspects: {len(screening.suspects)} of {len(work.rows)} rows score above {screening.threshold:+.2f} nats "
            f"per token, and are {then}"
        )
        return dataclasses.asdict(screening)

    return Screening(**work.stage("screen", run, reads={"the vectors": work.vectors_file}))


def _known_scores(work: Work, vectors: Vectors, stage: Stage) -> dict[str, list[float]]:
    """The scores of the harmful and the benign rows, from the cache if these vectors have scored them before."""
    rows = {"harmful": work.rows_for("harmful rows"), "benign": work.rows_for("benign rows")}

    def make() -> dict[str, list[float]]:
        scores = {}
        for kind, known in rows.items():
            stage.say(f"scoring {kind} rows")
            scores[kind] = score_rows(work.model, vectors, known).scores
        return scores

    inputs = [*inputs_of(work.model), fingerprint(vectors), *(of_rows(known) for known in rows.values())]
    return cast(dict[str, list[float]], cached_result("scores of known rows", inputs, make, work.note))


def _write_suspects(work: Work, screening: Screening) -> None:
    """Write suspects.jsonl, with the location and score of each row and none of its text, and a histogram."""
    with atomic_file(work.folder / "suspects.jsonl") as staging, staging.open("w") as file:
        for index in screening.suspects:
            line = {"row": index, "where": work.rows.where(index), "score": round(screening.scores[index], 4)}
            file.write(json.dumps(line) + "\n")
    write_histogram(work.folder / "histogram.png", screening)


class _Division(NamedTuple):
    """The rows to learn, by kind; the held-out ones; and the indices of all that are not learned."""

    learned: Groups
    held_out: list[Row]
    left_out: set[int]


def divide(work: Work, screening: Screening) -> _Division:
    """Hold out rows, with all their copies and no suspects, since they measure what should be learned; leave out the
    rows to drop."""
    suspects = set(screening.suspects)
    clean = [index for index in range(len(work.rows)) if index not in suspects]
    count = num_held_out(len(clean), work.request.eval_fraction)
    order = np.random.default_rng(work.request.training.seed).permutation(len(clean))
    keys = row_keys(work.rows.select(clean))
    held_out = {clean[position] for position in choose_held_out(keys, order.tolist(), count, set())}
    left_out = held_out | (suspects if work.request.drop else set())
    learned: Groups = {}
    start = 0
    for name, group in work.groups.items():
        kept = [index for index in range(len(group)) if start + index not in left_out]
        start += len(group)
        if kept:
            learned[name] = group.select(kept)
    if not learned:
        raise UserError(
            f"no row is left to train on: {len(suspects)} of {len(work.rows)} are suspects, and dropped; leave drop out"
        )
    work.facts |= {"suspects": len(suspects), "dropped": len(suspects) if work.request.drop else 0}
    return _Division(learned, list(work.rows.select(sorted(held_out))), left_out)


def num_held_out(count: int, fraction: float) -> int:
    """How many of `count` rows are held out: the fraction, but at least 8 if there are 40 or more."""
    if not fraction:
        return 0
    fewest = _MIN_HELD_OUT if count >= _ENOUGH else 0
    return max(0, min(max(round(fraction * count), fewest), count - 1))


def fine_tune(work: Work, vectors: Vectors, rows: _Division) -> str | None:
    """Fine-tune under the defense and export the model; returns the system prompt that it must be served with."""
    request, folder = work.request, work.model_folder

    def run(stage: Stage) -> dict[str, Any]:
        work.note(f"defense: {request.defense.label} ({_reason(request.defense)})")
        count = len(work.rows) - len(rows.left_out)
        work.note(f"training on {count} rows; {len(rows.held_out)} others are held out for the audit")
        frozen = FrozenTrees()
        with trainings(work.stages, stage) as on_step:
            options = FinetuneOptions(
                task=request.task_lora,
                training=request.training,
                checkpoints=work.checkpoints(FINE_TUNE),
                on_step=on_step,
                frozen=frozen,
            )
            adapters = (vectors,) if "security vectors" in request.defense.reads else None
            inputs = UserInputs(work.model, rows.learned, options, work.needs(stage), adapters)
            defended = request.defense.apply(inputs)
        stage.say("exporting")
        # In the dtype of the model before, as eval.py export does.
        dtype = work.model.metadata.dtype
        unsaved = save_trained(work.folder, defended.model, work.model, defended.system, dtype=dtype)
        work.note(unsaved)
        work.note(str(frozen))
        if defended.model is work.model:
            work.note("the defense found nothing to train on: the model is unchanged")
        changed = drift(defended.model.backbone, work.model.backbone)
        task = None
        if request.task_lora is not None and defended.model is not work.model:
            task = "saved" if unsaved is None else "merged"
        results = {"drift": changed, "system": defended.system, "frozen": frozen.fingerprints, "task LoRA": task}
        return {**results, **defended.notes}

    def forget() -> None:
        for made in (folder, work.folder / TASK_FOLDER, work.folder / "checkpoints" / FINE_TUNE):
            shutil.rmtree(made, ignore_errors=True)

    reads = {"the vectors": work.vectors_file, "which rows": of_values(sorted(rows.left_out))}
    outcome = work.stage(FINE_TUNE, run, reads=reads, makes=work.made, forget=forget)
    system: str | None = outcome["system"]
    work.task_lora = outcome["task LoRA"]
    work.facts |= {name: outcome[name] for name in ("drift", "frozen")} | ({} if system is None else {"system": system})
    if "security vectors" in request.defense.reads:
        work.facts["vectors"] = [str(work.vectors_file)]
    return system


def _reason(defense: Defense) -> str:
    """Why this defense: what was measured of it."""
    why = "recommended" if defense.name == RECOMMENDED else "as asked"
    return f"{why}; {evidence_of(type(defense))}"


def audit_export(work: Work, held_out: Sequence[Row], system: str | None) -> Audit:
    """The audit of the exported model against the original.

    It reads the exported files. If the model is quantized, which would round a task LoRA, it takes the original model
    with the LoRA stored separately, as in training.
    """
    request = work.request
    before: Any = request.model
    after: Any = str(work.model_folder)
    precision = before.precision if isinstance(before, Model) else frozen_precision(request.frozen_weights)
    precision_note: tuple[str, ...] = ()
    if is_quantized(work.precision):
        before, after = work.model, exported_model(work)
        precision_note = (
            f"In this audit, the weights are {work.precision} and the task LoRA is kept apart from them, in float32; "
            f"in the exported files, it is merged into the weights, which are {before.metadata.dtype}.",
        )
    served = "\n".join(text for text in (system, request.system) if text is not None) or None
    questions = AuditRequest(
        {"before": before, "after": after, "reference": None, "unaligned": before_alignment(request.model)},
        lambda kind: held_out if kind == "data" and held_out else None,
        served,
        request.limits,
        request.max_prompts,
        request.reply_tokens,
        request.judge,
        request.keep_replies,
        precision,
    )
    work.forget_model()  # three do not fit in a small machine's memory: the audit loads what it is not given
    audit = audited(questions, work.stages, {"after": work.made})
    return dataclasses.replace(audit, notes=(*precision_note, *audit.notes))


def exported_model(work: Work) -> Model:
    """The exported model, read back; a quantized one is the original model with the task LoRA stored separately."""
    if not is_quantized(work.precision) or work.task_lora == "merged":
        return as_model(str(work.model_folder))
    model = dataclasses.replace(work.model, name=str(work.model_folder))
    if work.task_lora is None:
        return model
    adapter = load_peft(work.folder / TASK_FOLDER, work.model)
    return model.with_merged(merge(model.backbone, adapter), adapter)
