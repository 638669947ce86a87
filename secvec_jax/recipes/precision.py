"""What a training's model is held in: in fewer bits where its weights stay frozen."""

from secvec_jax.config import Training
from secvec_jax.defenses.base import Defense
from secvec_jax.defenses.finetuning import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.inference import frozen_precision
from secvec_jax.model.hub import Model
from secvec_jax.model.quantized import Precision, is_quantized
from secvec_jax.vectors.lora import LoRA, LoRAVectors

CHANGES_WEIGHTS = ("alignment", "after fine-tuning")
"""Stages of defenses that change weights in addition to those that fine-tuning trains."""


def training_precision(
    asked: Precision | None,
    training: Training,
    task_lora: LoRA | LoRAVectors | None,
    defense: Defense | None = None,
) -> Precision:
    """What the model's weights are held in during a training.

    asked: of weights that stay frozen (`--frozen-weights`). defense: how the training is defended, if it is.
    Raises UserError if weights that are trained are to be held in fewer bits.
    """
    because = _why_trained(task_lora, defense)
    if because is None:
        return frozen_precision(asked)
    if asked not in (None, "float32"):
        raise UserError(f"--frozen-weights {asked} is for frozen weights, {because}, or leave --frozen-weights out")
    in_bfloat16 = task_lora is None and training.over(PHASE2).trained_weights == "bfloat16"
    return "bfloat16" if in_bfloat16 else "float32"


def check_held(model: Model, task_lora: LoRA | LoRAVectors | None, defense: Defense) -> None:
    """Raise UserError for a model, loaded by the caller, that is held in fewer bits than the training needs."""
    because = _why_trained(task_lora, defense)
    if because is not None and is_quantized(model.precision):
        raise UserError(f"the model is held in {model.precision}, which is for frozen weights, {because}")


def _why_trained(task_lora: LoRA | LoRAVectors | None, defense: Defense | None) -> str | None:
    """Why the weights cannot be held in fewer bits, and what to do; None if they stay frozen."""
    if task_lora is None:
        return "and all weights are trained: add --task-lora.rank 8"
    if defense is not None and defense.stage in CHANGES_WEIGHTS:
        return f"and {defense.name!r} changes them: choose another --defense"
    return None
