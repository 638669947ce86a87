"""`train.py align`: teach a model to refuse, before it is fine-tuned on data that is not trusted."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from secvec_jax.checks import NonNegativeInt, checked
from secvec_jax.config import Training
from secvec_jax.defenses.advice import default_rate, note_few_steps, only_refusals
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK
from secvec_jax.defenses.training_settings import check_unused
from secvec_jax.errors import UserError
from secvec_jax.model.embedded import is_base
from secvec_jax.model.hub import Model, load
from secvec_jax.model.quantized import Precision
from secvec_jax.presets import preset_field, section_of
from secvec_jax.recipes import preset_choice
from secvec_jax.recipes.precision import check_precision_settings, training_precision
from secvec_jax.recipes.training_run import TrainingRun, rows_by_source
from secvec_jax.training.profiling import check_steps
from secvec_jax.vectors.lora import LoRA, drift
from secvec_jax.workspace.inputs import packaged
from secvec_jax.workspace.packaged_rows import CONTENTS, PackagedRows
from secvec_jax.workspace.splits import sources
from secvec_jax.workspace.stage import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Align:
    """Teach a model to refuse harmful requests (or anything else): fine-tune it without vectors."""

    data: tuple[str, ...] = ()
    """rows with answers: JSONL, JSON, CSV or Parquet files, packaged names or hub dataset ids; the loss of each is
    reported separately; by default packaged refusals, and the model's own replies to benign prompts"""
    model: str = "smollm2"
    """embedded name (smollm2, smollm2-aligned, gemma3-270m), Hugging Face folder, run directory, hub id or .gguf"""
    out: str = "runs/align"
    """run directory; the model is written to OUT/model"""
    task_lora: LoRA | None = ALIGN_TASK
    """train a LoRA and merge it at the end; --no-task-lora: train all weights"""
    frozen_weights: Precision | None = None
    """with --task-lora: precision of the model's own, frozen weights: float32, bfloat16, int8 (one scale per output
    channel) or nf4 (4 bits, blocks of 64, as in QLoRA); by default bfloat16 on GPUs and TPUs, float32 on CPU. The saved
    model has the weights of --model in full precision, with the task LoRA merged in"""
    preset: str | None = preset_field(section_of("align"))
    """settings by model size and hardware, such as 135m-cpu, which other flags override; without a name, all presets
    are listed (default: the one for the model's size and the devices, if there is one; none: no preset)"""
    training: Training = ALIGN
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the end; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    profile: str | None = None
    """steps to profile, such as 10:15; the trace is written to OUT/profile, for XProf"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_steps(self.profile)
        check_precision_settings(self.frozen_weights, self.training, self.task_lora)
        check_unused(self.training, validates=False)
        if not self.data and is_base(self.model):
            raise UserError(
                f"{self.model} is a base model, whose own replies are not worth keeping: give --data with refusals and "
                "answers, such as --data refusals alpaca"
            )

    @property
    def precision(self) -> Precision:
        """The precision of the model's weights."""
        return training_precision(self.frozen_weights, self.training, self.task_lora)

    def default_preset(self) -> str | None:
        """The default preset (see `preset_choice`)."""
        return preset_choice.default_preset(self, "align")


def align(settings: Align, command: str) -> None:
    """Run `train.py align`."""
    run = TrainingRun(settings, command, lambda: {} if settings.data else packaged(sources("held-out")))

    def work(stage: Stage) -> dict[str, Any]:
        own_rows = rows_by_source(settings.data, settings.ignore_fields) if settings.data else None
        model = load(settings.model, settings.precision)
        rows = packaged_rows(model, stage) if own_rows is None else own_rows
        _ = run.prompts  # a download that fails should fail before the training
        run.note(preset_choice.line(settings))
        run.note(default_rate(model, settings.training, ALIGN))
        run.note(only_refusals(model, rows))
        with run.profiled():
            aligned = train_model(
                model,
                rows,
                task=settings.task_lora,
                training=settings.training,
                checkpoints=run.checkpoints,
                on_step=note_few_steps(stage.on_step(), run.note),
            )
        run.save(aligned, model, stage)
        values: dict[str, Any] = {"drift": drift(aligned.backbone, model.backbone)}
        sample = run.measure_refusals(aligned, stage, "at the end: ")
        if sample is not None:
            run.note(sample.over_refusals)
            values |= sample.as_dict()
        return values | {"notes": run.notes}

    def packaged_rows(model: Model, stage: Stage) -> dict[str, Sequence[Any]]:
        run.note(f"rows: packaged ({CONTENTS['safe rows']}); --data gives your own")
        training = settings.training.over(ALIGN)
        show_replies = partial(stage.replies, what="its own replies")
        return dict(PackagedRows(model, training, run.folder / "own-replies.json", show_replies).alignment())

    run.finish(run.stages.run("align", work), f"the model is in {run.folder / 'model'}")
