"""Booster (Huang et al. 2024, "Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
Perturbation", arXiv 2409.01586): alignment after which a step on harmful rows gains little.

With f the loss on alignment rows and h the loss on harmful ones,

    min_w  f(w) + λ ( h(w) - h(w - α ∇h(w)/‖∇h(w)‖) )

The second term is how much one normalized step on harmful rows would lower their loss. As in the paper, the step is
treated as a constant, so the gradient is

    ∇f(w) + λ ( ∇h(w) - ∇h(w - α ∇h(w)/‖∇h(w)‖) )

with one norm over all trained weights; λ = 5 and α = 0.1.

Acts in alignment. Each step costs three forward and three backward passes, two of them on harmful rows, and memory for
three more copies of the trained weights. In the paper the trained weights are those of a LoRA (rank 32, alpha 4, on q,
k and v; AdamW at 5e-4), which the user's fine-tuning then continues to train. Here the LoRA is merged before
fine-tuning, a setting that the authors report to fail, and the grid has 100 harmful rows.
"""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, PositiveFloat, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, train_model
from secvec_jax.defenses.security_vectors import ALIGN, ALIGN_TASK
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.training.objective import LEARN, Objective
from secvec_jax.training.step import Gradient, Metrics, TrainStep, gradient_of, shared, step_from_gradient
from secvec_jax.trees import Tree

HARMFUL = "harmful"
"""The stream of harmful rows."""


@checked
@dataclasses.dataclass(frozen=True)
class Booster(Defense):
    """Plain fine-tuning of a model that was aligned so that a step on harmful rows gains little."""

    name = "booster"
    stage = "alignment"
    needs = ("base model", "safe rows", "harmful rows")
    cost = "an alignment of 3 forward and 3 backward passes per step, once; 3 copies of the trained weights"
    source = "Huang et al. 2409.01586"

    weight: NonNegativeFloat = 5.0
    """λ, weight of the loss reduction from the simulated step"""
    alpha: PositiveFloat = 0.1
    """α, the length of the simulated step"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        hardened = partial(align, harmful=inputs.harmful, weight=self.weight, alpha=self.alpha)
        return Defended(inputs.finetune(inputs.align(self.label, hardened)))


@checked
def align(
    model: Model,
    rows: Any,
    *,
    harmful: Any,
    weight: NonNegativeFloat = 5.0,
    alpha: PositiveFloat = 0.1,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model aligned on `rows` and hardened against steps on `harmful` rows, with the defaults of `sv.align`.

    weight: λ. alpha: α, the length of the simulated step over all trained weights.
    """
    options = (
        FinetuneOptions(task=ALIGN_TASK)
        | options
        | FinetuneOptions(training=options.get("training", ALIGN).over(ALIGN))
    )
    return train_model(model, rows, extra_rows={HARMFUL: harmful}, make_step=booster(weight, alpha), **options)


@checked
def booster(weight: NonNegativeFloat = 5.0, alpha: PositiveFloat = 0.1) -> TrainStepMaker:
    """Booster's train step. Reports the harmful loss before the simulated step, and how much the step lowers it."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        return step_from_gradient(hardened(loss, weight, alpha), optimizer)

    return make_step


@shared
def hardened(loss: Objective, weight: float, alpha: float) -> Gradient:
    """The gradient of both terms."""
    by_rows, by_harmful = gradient_of(loss), gradient_of(dataclasses.replace(loss, groups=(HARMFUL,)))

    def gradient(trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Metrics]:
        attack = {LEARN: batch[HARMFUL]}
        harmful_gradient, before = by_harmful(trained, frozen, attack)
        scale = alpha / (optax.tree.norm(harmful_gradient) + 1e-7)
        stepped = shard(jax.tree.map(lambda weights, g: weights - scale * g, trained, harmful_gradient))
        stepped_gradient, after = by_harmful(stepped, frozen, attack)
        rows_gradient, metrics = by_rows(trained, frozen, {LEARN: batch[LEARN]})
        gradients = jax.tree.map(
            lambda f, h, stepped_h: f + weight * (h - stepped_h), rows_gradient, harmful_gradient, stepped_gradient
        )
        drop = before["loss"] - after["loss"]
        metrics |= {"loss": metrics["loss"] + weight * drop, "loss/harmful": before["loss/harmful"]}
        return gradients, metrics | {"harmful_drop": drop}

    return gradient
