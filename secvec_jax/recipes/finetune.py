"""`train.py finetune`: phase 2, fine-tuning on the user's rows under security vectors, or by another defense."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from secvec_jax.checks import MISSING, Fraction, NonNegativeInt, SettingError, Texts, checked
from secvec_jax.config import Training
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.advice import default_rate
from secvec_jax.defenses.base import Defense, Need
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.registry import as_mapping, read_defense
from secvec_jax.defenses.security_vectors import PHASE2
from secvec_jax.defenses.training_settings import check_unused, extra_batch_size
from secvec_jax.defenses.user_inputs import argument_of, check_given, reads_of
from secvec_jax.errors import UserError
from secvec_jax.evaluation.records import is_number
from secvec_jax.evaluation.refusal_sample import change
from secvec_jax.files import read_log
from secvec_jax.model.hub import load
from secvec_jax.model.quantized import Precision
from secvec_jax.presets import preset_field, section_of
from secvec_jax.recipes import preset_choice
from secvec_jax.recipes.precision import check_precision_settings, training_precision
from secvec_jax.recipes.run_inputs import DEFENSE_VARIANTS, GIVEN, RunInputs, check_precision, trainings
from secvec_jax.recipes.training_run import TrainingRun, rows_by_source
from secvec_jax.training.frozen import FrozenTrees
from secvec_jax.training.profiling import check_steps
from secvec_jax.training.validation import EVAL_LOSS
from secvec_jax.vectors.lora import LoRA, drift
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.inputs import Inputs, packaged
from secvec_jax.workspace.packaged_rows import CONTENTS
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stage import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Finetune:
    """Phase 2: fine-tune on your data, with the security vectors active and frozen, or under another defense."""

    data: Texts
    """training rows: files (FILE:prompt=COLUMN,response=COLUMN for other columns), packaged names or hub dataset ids,
    shuffled together; the loss of each is reported separately"""
    vectors: tuple[str, ...] = ()
    """run directories of `train.py vectors`, their vector files, or PEFT adapter folders, all active at once; none:
    train without protection; required, except with a --defense, which needs no vectors or trains its own"""
    model: str = "smollm2"
    """the model to fine-tune, which the vectors were trained for"""
    task_lora: LoRA | None = None
    """train a task LoRA, merged at the end, instead of all weights"""
    frozen_weights: Precision | None = None
    """with --task-lora: precision of the model's own, frozen weights: float32, bfloat16, int8 (one scale per output
    channel) or nf4 (4 bits, blocks of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU. The saved
    model has the weights of --model in full precision, with the task LoRA merged in"""
    out: str = "runs/finetune"
    """run directory; the model, without vectors, is written to OUT/model, a task LoRA also to OUT/task"""
    defense: str | dict[str, Any] | None = dataclasses.field(default=None, metadata=DEFENSE_VARIANTS)
    """defense to train under, such as guarded-vectors; without a name, all defenses are listed with what they need and
    cost (default: security vectors)"""
    safe: tuple[str, ...] = ()
    """for a defense: rows that teach the model to be safe, refusals and as many benign rows; by default packaged ones
    and the model's own replies"""
    harmful: tuple[str, ...] = ()
    """for a defense: about 100 rows of the behavior that fine-tuning must not teach; by default packaged ones"""
    benign: tuple[str, ...] = ()
    """for a defense: rows that have nothing to do with the behavior; by default packaged ones"""
    contrast: tuple[str, ...] = ()
    """for a defense: rows whose prompts call for the behavior and whose replies do not show it; by default packaged
    refusals"""
    base: str | None = None
    """for a defense: the model before it was aligned"""
    eliciting_prompt: str | None = None
    """for a defense: a system prompt that asks for the behavior; by default one that asks to comply with everything"""
    eval_data: str | None = None
    """validation rows; their loss is measured every epoch, and the model with the lowest loss is kept"""
    eval_fraction: Fraction = 0.0
    """share of the rows to hold out as validation rows, such as 0.05"""
    training: Training = PHASE2
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the start and at the end; 0: none
    """
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    preset: str | None = preset_field(section_of("finetune"))
    """settings by model size and hardware, such as 7-8b-80gb, which other flags override; without a name, all presets
    are listed (default: the one for the model's size and the devices, if there is one; none: no preset)"""
    profile: str | None = None
    """steps to profile, such as 10:15; the trace is written to OUT/profile, for XProf"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_steps(self.profile)
        if isinstance(self.defense, dict) and "name" not in self.defense:
            setting = next(iter(self.defense), "NAME")
            raise UserError(f"--defense.{setting} is given without --defense: name the defense that it is for")
        if self.defense is None and not self.vectors:
            raise SettingError("vectors", MISSING)
        default = "security vectors" if self.vector_files else "none"
        defense = read_defense(default if self.defense is None else self.defense)
        needs_vectors = "security vectors" in defense.reads
        if self.vectors and not self.vector_files and needs_vectors:
            raise UserError(f"{defense.name!r} needs vectors: leave out --vectors none, and they are trained")
        given = [need for need in GIVEN if getattr(self, argument_of(need))]
        given += ["security vectors"] if self.vector_files else []
        check_given(defense, given, CONTENTS, lambda argument: f"--{argument.replace('_', '-')}")
        if defense.extra_batch:
            extra_batch_size(self.training, defense.extra_batch)
        object.__setattr__(self, "defense", as_mapping(defense))  # however it was written
        check_precision_settings(self.frozen_weights, self.training, self.task_lora, defense)
        check_unused(self.training, validates=self.eval_data is not None or self.eval_fraction > 0)

    def default_preset(self) -> str | None:
        """The default preset (see `preset_choice`)."""
        return preset_choice.default_preset(self, "finetune")

    @property
    def precision(self) -> Precision:
        """The precision of the model's weights."""
        defense = read_defense(self.defense)
        return training_precision(self.frozen_weights, self.training, self.task_lora, defense)

    @property
    def vector_files(self) -> Sequence[str]:
        """The files of --vectors; empty for the word none. Raises UserError for files and none at once."""
        words = [name for name in self.vectors if name.strip().lower() == "none"]
        if words and len(self.vectors) > 1:
            raise UserError("--vectors has both files and none: give one or the other")
        return () if words else self.vectors


def finetune(settings: Finetune, command: str) -> None:
    """Run `train.py finetune`."""
    defense = read_defense(settings.defense)
    run = TrainingRun(settings, command, lambda: _packaged_inputs(settings, defense))

    def work(stage: Stage) -> dict[str, Any]:
        rows = rows_by_source(settings.data, settings.ignore_fields)
        model = load(settings.model, settings.precision)
        run.note(preset_choice.line(settings))
        vectors = load_several(settings.vector_files, model)
        run.note(f"defense: {defense.label}, {_summary(defense)}")
        run.note(default_rate(model, settings.training, PHASE2, settings.task_lora))
        before = run.measure_refusals(model, stage, "at the start: ")
        if before is not None:
            run.note(before.no_refusals)
        frozen = FrozenTrees()
        check_precision(run, stage, model, settings.vector_files)
        with trainings(run.stages, stage) as on_step, run.profiled():
            options = FinetuneOptions(
                task=settings.task_lora,
                training=settings.training,
                eval_rows=_eval_rows(settings),
                checkpoints=run.checkpoints,
                on_step=on_step,
                frozen=frozen,
            )
            defended = defense.apply(RunInputs(run, stage, model, rows, options, vectors))
        tuned, system = defended.model, defended.system
        run.save(tuned, model, stage, system)
        values: dict[str, Any] = {"drift": drift(tuned.backbone, model.backbone), **defended.notes}
        after = run.sample(tuned, stage, system)
        ending: list[str | None] = [] if before is None or after is None else [change(before, after)]
        values |= {} if after is None else after.as_dict()
        ending += [_learned(run.folder / "metrics.jsonl", rows), str(frozen)]
        if tuned is model:
            ending.append("the defense found nothing to train on: the model is unchanged")
        if system is not None:
            ending.append(f"the defense is a system prompt: serve the model with it ({run.system_file}): {system}")
        facts: dict[str, Any] = {"frozen": frozen.fingerprints} | ({} if system is None else {"system": system})
        if "security vectors" in defense.reads and "vectors" in frozen.fingerprints:
            facts["vectors"] = list(settings.vector_files) or [str(run.folder / "vectors")]
        return values | {"notes": [*run.notes, *(line for line in ending if line)], "facts": facts}

    run.finish(run.stages.run("finetune", work), f"the model is in {run.folder / 'model'}")


def _summary(defense: Defense) -> str:
    """The first line of its help, to follow its name."""
    text = (defense.__doc__ or "").partition("\n")[0].rstrip(".")
    return text[0].lower() + text[1:]


def _packaged_inputs(settings: Finetune, defense: Defense) -> Inputs:
    """The content of the packaged rows, if the defense reads any."""
    reads: Sequence[Need] = reads_of(defense, bool(settings.vector_files))
    from_package = [need for need in reads if need.endswith(" rows") and not getattr(settings, argument_of(need))]
    return packaged(sources("held-out")) if from_package else {}


def _learned(log: Path, kinds: Collection[str]) -> str | None:
    """How the loss of the user's rows, of these kinds, changed, by the training lines of the log; None if it has none.

    Of a defense that trains several times, in the last training on these rows.
    """
    trainings: dict[str, list[dict[str, Any]]] = {}
    for record in read_log(log):
        stage = record.get("stage")
        if isinstance(stage, str) and re.fullmatch(r"finetune( \d+)?", stage):
            trainings.setdefault(stage, []).append(record)
    found = {stage: losses for stage, records in trainings.items() if (losses := _losses(records, kinds))}
    if not found:
        return None
    stage, (measured, first, last) = list(found.items())[-1]
    if first is None:
        text = f"the {measured} was {last:.2f} at the end of the training, and was not measured before"
    else:
        text = f"the {measured} was {first:.2f} at first and {last:.2f} at the end of the training"
    return text if stage == list(trainings)[-1] else f"{text}; another training, on other rows, followed"


def _losses(records: Sequence[dict[str, Any]], kinds: Collection[str]) -> tuple[str, float | None, float] | None:
    """What was measured in a training, and its mean over the kinds at first and at the end; None if it was not.

    At first is None if it was measured once. A step has the losses of the kinds that are among its rows.
    """
    evaluated = [record[EVAL_LOSS] for record in records if is_number(record.get(EVAL_LOSS))]
    if evaluated:
        return "validation loss", evaluated[0] if len(evaluated) > 1 else None, evaluated[-1]
    names = [f"loss/{kind}" for kind in kinds]
    by_kind = [[record[name] for record in records if is_number(record.get(name))] for name in names]
    ends = [(losses[0], losses[-1]) for losses in by_kind if losses]
    if not ends:
        return None
    first, last = (sum(values) / len(ends) for values in zip(*ends))
    return "loss of your rows", first, last


def _eval_rows(settings: Finetune) -> Any:
    """The validation rows, or the share of the rows to hold out; None for neither. Raises UserError for both."""
    if settings.eval_data is None:
        return settings.eval_fraction or None
    if settings.eval_fraction:
        raise UserError("--eval-data and --eval-fraction are both given: choose one")
    return load_rows(settings.eval_data, ignore_fields=settings.ignore_fields)
