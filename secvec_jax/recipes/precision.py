"""The precision of a model during training: lower where its weights stay frozen."""

from typing import NamedTuple

from secvec_jax.config import Training
from secvec_jax.defenses.base import Defense
from secvec_jax.defenses.training_settings import check_trained_weights
from secvec_jax.errors import UserError
from secvec_jax.inference import frozen_precision
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision
from secvec_jax.vectors.lora import LoRA

CHANGES_WEIGHTS = ("alignment", "after fine-tuning")
"""Stages of defenses that change weights in addition to those that fine-tuning trains."""


class Named(NamedTuple):
    """How a user writes the settings that decide the precision of the weights."""

    frozen_weights: str
    task_lora: str
    defense: str


FLAGS = Named("--frozen-weights {}", "add --task-lora.rank 8", "choose another --defense")
ARGUMENTS = Named("frozen_weights={!r}", "pass task=LoRA(8)", "pass another defense")


def training_precision(
    asked: Precision | None,
    training: Training,
    task_lora: LoRA | None,
    defense: Defense | None = None,
    named: Named = FLAGS,
) -> Precision:
    """The precision of the model's weights during training; starts JAX where that depends on the devices.

    The arguments are those of `check_precision_settings`, and so are the errors.
    """
    check_precision_settings(asked, training, task_lora, defense, named)
    if _why_trained(task_lora, defense, named) is None:
        return frozen_precision(asked)
    return "bfloat16" if check_trained_weights(training, full=task_lora is None) else "float32"


def check_precision_settings(
    asked: Precision | None,
    training: Training,
    task_lora: LoRA | None,
    defense: Defense | None = None,
    named: Named = FLAGS,
) -> None:
    """Raise UserError if a lower precision is set for weights that are trained, or that the defense changes.

    asked: the precision of frozen weights (`--frozen-weights`). defense: that of the training, if any. Does not start
    JAX: settings are made before the processes of a cluster have found each other.
    """
    in_bfloat16 = check_trained_weights(training, full=task_lora is None)
    if in_bfloat16 and defense is not None and defense.stage in CHANGES_WEIGHTS:
        raise UserError(f"trained_weights is 'bfloat16', which is not for {defense.name!r}: it trains in float32")
    because = _why_trained(task_lora, defense, named)
    if because is not None and asked not in (None, "float32"):
        raise UserError(f"{named.frozen_weights.format(asked)} is for frozen weights, {because}, or leave it out")


def check_loaded_precision(model: Model, training: Training, task_lora: LoRA | None, defense: Defense) -> None:
    """Raise UserError for a model, loaded by the caller, whose precision is lower than training needs."""
    because = _why_trained(task_lora, defense, ARGUMENTS)
    needed = training_precision(None, training, task_lora, defense, ARGUMENTS)
    if because is not None and model.precision not in ("float32", needed):
        raise UserError(
            f"the model's weights are in {model.precision}, which is for frozen weights, {because}, or load it in "
            "float32"
        )


def _why_trained(task_lora: LoRA | None, defense: Defense | None, named: Named) -> str | None:
    """Why the weights cannot be in lower precision, and what to do; None if they stay frozen."""
    if task_lora is None:
        return f"and all weights are trained: {named.task_lora}"
    if defense is not None and defense.stage in CHANGES_WEIGHTS:
        return f"and {defense.name!r} changes them: {named.defense}"
    return None
