"""`train.py align`: teach a model to refuse, before it is fine-tuned on data that is not trusted."""

import dataclasses
from typing import Any

from secvec_jax.checks import NonNegativeInt, Texts, checked
from secvec_jax.config import Training
from secvec_jax.defenses.advice import default_rate, note_few_steps, only_refusals
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK
from secvec_jax.model.hub import load
from secvec_jax.recipes.training_run import TrainingRun, rows_by_source
from secvec_jax.training.profiling import check_steps
from secvec_jax.trees import distance
from secvec_jax.vectors.lora import LoRA
from secvec_jax.workspace.stages import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Align:
    """Teach a model to refuse harmful requests (or anything else): fine-tune it without vectors."""

    data: Texts
    """rows with answers: JSONL, JSON, CSV or Parquet files, packaged names or hub dataset ids; the loss of each is
    reported separately"""
    model: str = "smollm2"
    """embedded name (smollm2, gemma3-270m), Hugging Face folder, run directory, hub id or .gguf file"""
    out: str = "runs/align"
    """run directory; the model is written to OUT/model"""
    task_lora: LoRA | None = ALIGN_TASK
    """train a LoRA and merge it at the end; --no-task-lora: train all weights"""
    training: Training = ALIGN
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the end; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    profile: str | None = None
    """steps of which to write a profiler trace to OUT/profile, for XProf: 10:15"""
    overwrite: bool = False
    """delete the run in OUT and start over"""

    def __post_init__(self) -> None:
        check_steps(self.profile)


def align(settings: Align, command: str) -> None:
    """Run `train.py align`."""
    run = TrainingRun(settings, command)

    def work(stage: Stage) -> dict[str, Any]:
        rows = rows_by_source(settings.data, settings.ignore_fields)
        model = load(settings.model)
        _ = run.prompts  # a download that fails should fail before the training
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
        values: dict[str, Any] = {"drift": float(distance(aligned.backbone, model.backbone))}
        sample = run.measure_refusals(aligned, stage, "at the end: ")
        if sample is not None:
            run.note(sample.over_refusals)
            values |= sample.as_dict()
        return values | {"notes": run.notes}

    run.finish(run.stages.run("align", work), f"the model is in {run.folder / 'model'}")
