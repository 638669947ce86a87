"""Elastic weight consolidation, EWC (Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks",
arXiv 1612.00796), as a baseline of Vaccine (Huang et al. 2024, arXiv 2402.01109): important weights stay close.

    min_w  L(w) + λ Σ_i F_i (w_i - w0_i)²        F_i = Σ_b (∂L_b/∂w_i)²  at w0

w0 are the trained weights at the start, b are the mini-batches of one pass over alignment rows, and L_b is the mean
loss over the tokens of a batch. As in Vaccine's code there is no factor 1/2, and F is a sum over batches, not a mean
over rows: the same λ is stronger with more rows and with smaller batches.

In that code the trained weights are those of the LoRA that alignment trained, and λ = 1e9 (1e6 and 1e12 were also
tried). A fresh LoRA has B = 0, so F = 0 for all of A, and the penalty acts on B alone. The penalty is a spring of
stiffness 2 λ F_i: plain gradient steps diverge if the learning rate exceeds 1 / (λ F_i). Use adamw, as that code does,
or a small λ: the default in the grid is 1e3.

Acts in fine-tuning. Costs one forward and one backward pass over the alignment rows, once, and memory for two more
copies of the trained weights (w0 and F).
"""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.config import Training
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import (
    FinetuneOptions,
    TrainStepMaker,
    finetune_phase,
    forward_settings,
    stream_of,
    train_model,
)
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.training.objective import LEARN, Backbone, Objective, Params
from secvec_jax.training.step import Gradient, Metrics, TrainStep, gradient_of, shared, step_from_gradient
from secvec_jax.trees import Tree
from secvec_jax.vectors.lora import LoRA, LoRAVectors


@checked
@dataclasses.dataclass(frozen=True)
class EWC(Defense):
    """Fine-tuning with a penalty on changes of the weights that matter most to alignment."""

    name = "ewc"
    stage = "fine-tuning"
    needs = ("safe rows",)
    cost = "a forward and a backward pass over the safe rows, once; 2 more copies of the weights"
    source = "Kirkpatrick et al. 1612.00796"

    weight: NonNegativeFloat = 1e3
    """λ, weight of the penalty"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        model = finetune(inputs.aligned, inputs.rows, safe=inputs.safe, weight=self.weight, **inputs.options)
        return Defended(model)


@checked
def finetune(
    model: Model, rows: Any, *, safe: Any, weight: NonNegativeFloat = 1e9, **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned on `rows`, with a penalty on changes of weights that the `safe` rows need. weight: λ."""
    training, task = options.get("training", PHASE2).over(PHASE2), options.get("task")
    if isinstance(task, LoRA):  # initialized here and not in train_model, since w0 is what training starts from
        task = options["task"] = task.init(model.architecture, jax.random.key(training.seed))
    anchor = {"start": model.backbone if task is None else task, "fisher": fisher(model, safe, task, training)}
    return train_model(model, rows, anchor=anchor, make_step=ewc(weight), **options)


@checked
def fisher(model: Model, rows: Any, task: LoRAVectors | None = None, training: Training = PHASE2) -> Tree:
    """F on `rows`, one pass in batches of `training.batch_size` packed sequences: a tree like the adapter `task`, or,
    without one, like the decoder."""
    params = Params(Backbone(model.backbone, task))
    trained, frozen = finetune_phase(params).split(params)
    gradient = gradient_of(Objective(**forward_settings(training)))

    @partial(jax.jit, donate_argnums=0)
    def add(total: Tree, trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> Tree:
        gradients, _ = gradient(trained, frozen, batch)
        return shard(jax.tree.map(lambda summed, g: summed + jnp.square(g), total, shard(gradients)))

    stream = dataclasses.replace(stream_of(model, {"safe": rows}, training), epochs=1)
    total = shard(jax.tree.map(jnp.zeros_like, trained))
    for batch in stream.batches():  # every process reads all substreams, since they may differ in length
        total = add(total, trained, frozen, shard({LEARN: {key: array[None] for key, array in batch.items()}}))
    return total.backbone.decoder if task is None else total.backbone.adapter


@checked
def ewc(weight: NonNegativeFloat) -> TrainStepMaker:
    """Gradient steps with the penalty, for an anchor {"start": w0, "fisher": F}. Reports the penalty, times λ."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        return step_from_gradient(with_penalty(loss, weight), optimizer)

    return make_step


@shared
def with_penalty(loss: Objective, weight: float) -> Gradient:
    """The gradient of the loss and of the penalty."""
    plain = gradient_of(loss)

    def gradient(trained: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Metrics]:
        gradients, metrics = plain(trained, frozen, batch)
        # Once a step: inside the loss it would count once for every micro-batch.
        penalty_value, penalty_gradient = jax.value_and_grad(penalty)(trained, weight, **frozen.anchor)
        metrics |= {"loss": metrics["loss"] + penalty_value, "penalty": penalty_value}
        return jax.tree.map(jnp.add, gradients, penalty_gradient), metrics

    return gradient


def penalty(trained: Tree, weight: float, start: Tree, fisher: Tree) -> jax.Array:
    """λ Σ_i F_i (w_i - w0_i)²."""
    leaves = zip(*map(jax.tree.leaves, (trained, start, fisher)), strict=True)
    return weight * sum((jnp.sum(f * jnp.square(now - then)) for now, then, f in leaves), start=jnp.float32(0))
