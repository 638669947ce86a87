"""The min-min bi-level form of phase 1: min over θ, min over θs of E[CE(f(x; θ, θs), y)].

As in unlearnable examples (Huang et al. 2021): a temporary copy of the model takes M steps as the user's fine-tuning
would, under the active vectors; then the vectors take a step with the copy frozen; and so on until the harmful loss is
small. The vectors thus also explain what a model in the middle of fine-tuning would still learn. The copy is discarded:
the caller's model never changes.

This is our reading of the paper's form. With a KL on benign rows, the loss of the copy has that KL as well, which a
user's fine-tuning does not have, and the KL of the vectors is measured against the current copy. M inner steps
and one outer step alternate on mini-batches, where the published template makes passes over the data; the inner SGD has
no momentum and no schedule.

Each step of the vectors costs M more forward and backward passes, with gradients and optimizer state for all weights of
the copy.
"""

from typing import Protocol

import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.sharding import shard
from secvec_jax.training.phase import Phase, combine
from secvec_jax.training.step import Loss, Metrics, TrainStep, make_train_step, shared
from secvec_jax.trees import Tree


class Schedule(Protocol):
    """The settings of the alternation; `Phase1` has them."""

    @property
    def inner_steps(self) -> int: ...
    @property
    def inner_optimizer(self) -> str: ...
    @property
    def inner_learning_rate(self) -> float: ...


_INNER = {"sgd": optax.sgd, "adamw": optax.adam}
"""Without momentum and weight decay, like the default adamw of `Training`."""


@shared
def _inner(optimizer: str, learning_rate: float) -> optax.GradientTransformation:
    return _INNER[optimizer](learning_rate)


def min_min(
    params: Tree, loss: Loss, outer: optax.GradientTransformation, schedule: Schedule
) -> tuple[Phase, TrainStep]:
    """The phase that trains the copy and the vectors, and the train step that updates one of them at a time.

    outer: the optimizer of the vectors; the schedule names that of the copy. Of every `inner_steps + 1` steps the last
    updates the vectors. Each step differentiates only what it updates.
    """
    copy_phase = Phase({"backbone": "train", "vectors": "freeze"})
    vectors_phase = Phase({"backbone": "freeze", "vectors": "train"})
    inner = copy_phase.optimizer(_inner(schedule.inner_optimizer, schedule.inner_learning_rate), params)
    train_steps = {
        "copy": (copy_phase, make_train_step(loss, inner)),
        "vectors": (vectors_phase, make_train_step(loss, vectors_phase.optimizer(outer, params))),
    }

    def init(trained: Tree) -> Tree:
        states = {name: train_step.init(phase.split(trained)[0]) for name, (phase, train_step) in train_steps.items()}
        return {"step": shard(jnp.int32(0)), "states": states}

    def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        name = "vectors" if int(state["step"]) % (schedule.inner_steps + 1) == schedule.inner_steps else "copy"
        phase, train_step = train_steps[name]
        updated, frozen_now = phase.split(trained)
        updated, optimizer_state, metrics = train_step.step(updated, state["states"][name], frozen_now, batch)
        states = state["states"] | {name: optimizer_state}
        return combine(updated, frozen_now), {"step": state["step"] + 1, "states": states}, metrics

    return Phase({"backbone": "train", "vectors": "train"}), TrainStep(init, step)
