"""`sv.defend`: any defense on a user's own model and rows, as a function that returns values."""

import os
from collections.abc import Callable
from typing import Any

from secvec_jax.arguments import instance
from secvec_jax.checks import checked
from secvec_jax.config import Training
from secvec_jax.defenses.base import Defended, Defense, Need
from secvec_jax.defenses.finetuning import FinetuneOptions
from secvec_jax.defenses.inputs import as_options, as_row_source, as_task, groups_of
from secvec_jax.defenses.registry import read_defense
from secvec_jax.defenses.training_settings import PHASE2, extra_batch_size
from secvec_jax.defenses.user_inputs import UserInputs, argument_of, check_given
from secvec_jax.errors import UserError
from secvec_jax.inference import VectorsLike, as_model, as_vectors
from secvec_jax.model.hub import Model
from secvec_jax.progress import step_progress
from secvec_jax.training.checkpoints import Checkpoints
from secvec_jax.training.trainer import OnStep
from secvec_jax.vectors.lora import LoRA, LoRAVectors
from secvec_jax.workspace.packaged_rows import PackagedRows


@checked
def defend(
    model: Model,
    rows: Any,
    defense: Any,
    *,
    vectors: VectorsLike = None,
    safe: Any = None,
    harmful: Any = None,
    benign: Any = None,
    contrast: Any = None,
    base: Any = None,
    eliciting_prompt: str | None = None,
    task: LoRA | LoRAVectors | None = None,
    training: Training = PHASE2,
    eval_rows: Any = None,
    checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> Defended:
    """The model fine-tuned on `rows` by a defense: `sv.defenses.GuardedVectors(weight=1.0)`, or its name.

        defended = sv.defend(model, rows, sv.defenses.GuardedVectors(), vectors=vectors, safe=safe)
        defended.model, defended.system, defended.notes

    `defended.system` is the system prompt that the model must be served with, for the defenses that are one; None for
    all others. `sv.defenses.DEFENSES` has all defenses, and the `needs` of each are what it reads besides the rows:

    vectors: security vectors, a value, a file or several; without them, a defense that needs them trains them. safe,
    harmful, benign, contrast: rows, in any form that `sv.finetune` takes; None: packaged ones, if the defense
        reads them (AdvBench and others, downloaded on first use).
    base: the model before it was aligned. eliciting_prompt: a system prompt that asks for the behavior.

    task, training, eval_rows, checkpoints and on_step are as in `sv.finetune`; a defense with several training runs
    calls on_step in each. Raises UserError for an input that the defense does not read, and for a missing one without a
    default.
    """
    model = as_model(model)
    if not isinstance(defense, Defense):
        fix = "pass one of sv.defenses, such as sv.defenses.GuardedVectors(), or its name"
        defense = read_defense(instance("defense", defense, (str, dict), fix))
    checkpoints, on_step = as_options(training, checkpoints, on_step)
    adapters = as_vectors(vectors, model)
    if vectors is not None and not adapters:
        raise UserError("vectors is empty: pass security vectors, or vectors=None for those that the defense trains")
    given = sources_of(safe, harmful, benign, contrast, base, eliciting_prompt)
    packaged = PackagedRows(model, training.over(PHASE2)).sources()
    vectors_given: tuple[Need, ...] = ("security vectors",) if adapters else ()
    check_given(defense, [*given, *vectors_given], packaged, lambda argument: f"{argument}=")
    if defense.extra_batch:
        extra_batch_size(training, defense.extra_batch)
    sources = packaged | given
    with step_progress("defend", on_step) as show:
        options = FinetuneOptions(
            task=as_task(task), training=training, eval_rows=eval_rows, checkpoints=checkpoints, on_step=show
        )
        inputs = UserInputs(model, groups_of(rows), options, sources, adapters or None)
        return defense.apply(inputs)


def sources_of(
    safe: Any, harmful: Any, benign: Any, contrast: Any, base: Any, eliciting_prompt: str | None
) -> dict[Need, Callable[[], Any]]:
    """{need: function that checks and returns its value}, for each need that the caller gives."""
    values: dict[Need, Any] = {
        "safe rows": safe,
        "harmful rows": harmful,
        "benign rows": benign,
        "contrast rows": contrast,
        "base model": base,
        "eliciting prompt": eliciting_prompt,
    }

    def source_of(need: Need, value: Any) -> Callable[[], Any]:
        if need == "base model":
            return lambda: as_model(value)
        if need == "eliciting prompt":
            return lambda: value
        return lambda: as_row_source(value, argument_of(need))

    return {need: source_of(need, value) for need, value in values.items() if value is not None}
