"""`train.py finetune`: phase 2, fine-tuning on the user's rows with the security vectors active and frozen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from secvec_jax.checks import Fraction, NonNegativeInt, Texts, checked
from secvec_jax.config import Training
from secvec_jax.data.sources import load_rows
from secvec_jax.defenses.advice import default_rate
from secvec_jax.defenses.finetuning import train_model
from secvec_jax.defenses.security_vectors import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.model.hub import load
from secvec_jax.recipes.training_run import TrainingRun, rows_by_source
from secvec_jax.trees import distance
from secvec_jax.vectors.lora import LoRA
from secvec_jax.vectors.store import load_several
from secvec_jax.workspace.stages import Stage


@checked
@dataclasses.dataclass(frozen=True)
class Finetune:
    """Phase 2: fine-tune on your data, with the security vectors active and frozen."""

    data: Texts
    """training rows: files, packaged names or hub dataset ids, shuffled together; the loss of each is reported
    separately"""
    vectors: Texts
    """run directories of `train.py vectors`, their vector files, or PEFT adapter folders, all active at once; none:
    train without protection"""
    model: str = "smollm2"
    """the model that the vectors were trained for"""
    task_lora: LoRA | None = None
    """train a task LoRA, merged at the end, instead of all weights"""
    out: str = "runs/finetune"
    """run directory; the model, without vectors, is written to OUT/model, a task LoRA also to OUT/task"""
    eval_data: str | None = None
    """validation rows; their loss is measured every epoch, and the model with the lowest loss is kept"""
    eval_fraction: Fraction = 0.0
    """share of the rows to hold out as validation rows, such as 0.05"""
    training: Training = PHASE2
    check_prompts: NonNegativeInt = 24
    """number of packaged prompts, harmful and benign each, for measuring refusals at the start; 0: none"""
    ignore_fields: tuple[str, ...] = ()
    """fields of rows that may be ignored although they could hold training data; "*": all unknown fields"""
    overwrite: bool = False
    """delete the run in OUT and start over"""


def finetune(settings: Finetune, command: str) -> None:
    """Run `train.py finetune`."""
    vector_files = _vector_files(settings.vectors)
    run = TrainingRun(settings, command)

    def work(stage: Stage) -> dict[str, Any]:
        rows = rows_by_source(settings.data, settings.ignore_fields)
        model = load(settings.model)
        vectors = load_several(vector_files, model)
        run.note(default_rate(model, settings.training, PHASE2))
        sample = run.measure_refusals(model, stage, "at the start: ")
        if sample is not None:
            run.note(sample.no_refusals)
        tuned = train_model(
            model,
            rows,
            vectors=vectors,
            task=settings.task_lora,
            training=settings.training,
            eval_rows=_eval_rows(settings),
            checkpoints=run.checkpoints,
            on_step=stage.on_step(),
        )
        run.save(tuned, model, stage)
        return {"drift": float(distance(tuned.backbone, model.backbone)), "notes": run.notes}

    run.finish(run.stages.run("finetune", work), f"the model is in {run.folder / 'model'}")


def _vector_files(vectors: Sequence[str]) -> Sequence[str]:
    """The files of --vectors; empty for the word none. Raises UserError for files and none at once."""
    words = [name for name in vectors if name.strip().lower() == "none"]
    if words and len(vectors) > 1:
        raise UserError("--vectors has both files and none: give one or the other")
    return () if words else vectors


def _eval_rows(settings: Finetune) -> Any:
    """The validation rows, or the share of the rows to hold out; None for neither. Raises UserError for both."""
    if settings.eval_data is None:
        return settings.eval_fraction or None
    if settings.eval_fraction:
        raise UserError("--eval-data and --eval-fraction are both given: choose one")
    return load_rows(settings.eval_data, ignore_fields=settings.ignore_fields)
