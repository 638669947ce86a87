"""Weight averaging, EMA (Kim et al. 2025, "Rethinking Safety in LLM Fine-tuning: An Optimization Perspective", arXiv
2508.12531): the model that is served is a moving average of the weights during fine-tuning.

    w_t = w_{t-1} - step          w̄_t = η w̄_{t-1} + (1 - η) w_t          w̄_0 = w_0, the aligned model

The moving average is the paper's, whose aim is the loss of safety from benign rows. Ours: steps are taken from w_t, as
in plain fine-tuning, not from the average; w̄ is evaluated, validated and returned; and η = 0.9, which was not tuned.
After n steps the aligned model still has the weight η^n (0.35 after ten steps), so a larger η in a short run undoes the
fine-tuning, whatever the rows. Where weights are trained in bfloat16, so is the average, and changes of less than its
last bit are lost.

Acts in fine-tuning. Costs a copy of the trained weights, and no further pass.
"""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import Fraction, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, train_model
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.training.objective import Objective
from secvec_jax.training.step import Metrics, TrainStep, make_train_step, shared
from secvec_jax.trees import Tree


@checked
@dataclasses.dataclass(frozen=True)
class EMA(Defense):
    """Plain fine-tuning whose result is a moving average of the weights of all steps."""

    name = "ema"
    stage = "fine-tuning"
    cost = "a copy of the weights"
    source = "Kim et al. 2508.12531"

    decay: Fraction = 0.9
    """η, the share of the average that a step keeps"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(finetune(inputs.aligned, inputs.rows, decay=self.decay, **inputs.options))


@checked
def finetune(model: Model, rows: Any, *, decay: Fraction = 0.9, **options: Unpack[FinetuneOptions]) -> Model:
    """The moving average of the weights of a plain fine-tuning on `rows`. decay: η."""
    return train_model(model, rows, make_step=ema(decay), **options)


@checked
def ema(decay: Fraction = 0.9) -> TrainStepMaker:
    """Steps of plain fine-tuning, with its compiled program, whose trained part is the average of the weights."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        return averaged(make_train_step(loss, optimizer), decay)

    return make_step


@shared
def averaged(train_step: TrainStep, decay: float) -> TrainStep:
    """The train step, with the average as the trained part and the weights themselves in the optimizer's state."""

    @partial(jax.jit, donate_argnums=0)
    def average(mean: Tree, weights: Tree) -> Tree:
        def moved(mean: jax.Array, now: jax.Array) -> jax.Array:
            return (decay * mean.astype(jnp.float32) + (1 - decay) * now.astype(jnp.float32)).astype(mean.dtype)

        return shard(jax.tree.map(moved, mean, weights))

    @jax.jit
    def copy(weights: Tree) -> Tree:  # the trained part and the state are donated separately
        return shard(jax.tree.map(jnp.copy, weights))

    def init(trained: Tree) -> Tree:
        return {"weights": copy(trained), "optimizer": train_step.init(trained)}

    def step(mean: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        weights, optimizer, metrics = train_step.step(state["weights"], state["optimizer"], frozen, batch)
        return average(mean, weights), {"weights": weights, "optimizer": optimizer}, metrics

    return TrainStep(init, step, train_step.takes)
