"""The min-min bi-level form of phase 1: min over θ, min over θs of E[CE(f(x; θ, θs), y)].

As in unlearnable examples (Huang et al. 2021): a throw-away copy of the backbone takes M steps as the user's
fine-tuning would, under the active vectors; then the vectors take a step with the copy frozen; and so on until the
harmful loss is small. The vectors thus also explain what a backbone on its way would still learn. The copy is thrown
away: the backbone in the caller's hands never changes.

Ours, not the paper's to the letter: with a KL on benign rows, that KL is in the copy's loss too, though the user's has
none, and holds the vectors to the copy as it has become; M inner steps and one outer step alternate on mini-batches,
where the published template makes passes over the data; the inner SGD has no momentum and no schedule.
"""

from typing import Protocol

import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.sharding import shard
from secvec_jax.training.phase import Phase, merge
from secvec_jax.training.step import Loss, Metrics, TrainStep, make_train_step
from secvec_jax.trees import Tree


class Schedule(Protocol):
    """What the alternation needs to know."""

    @property
    def inner_steps(self) -> int: ...
    @property
    def inner_optimizer(self) -> str: ...
    @property
    def inner_learning_rate(self) -> float: ...


_INNER = {"sgd": optax.sgd, "adamw": optax.adam}
"""Without momentum and weight decay, as `Training`'s adamw by default."""


def min_min(
    params: Tree, loss: Loss, outer: optax.GradientTransformation, schedule: Schedule
) -> tuple[Phase, TrainStep]:
    """The phase that trains the copy and the vectors, and the method that moves one of them a step.

    outer: the optimizer of the vectors; the copy moves by the schedule's own. Of every `inner_steps + 1` steps the last
    is the vectors'. Each step differentiates only what it moves.
    """
    copy_moves = Phase({"backbone": "train", "vectors": "freeze"})
    vectors_move = Phase({"backbone": "freeze", "vectors": "train"})
    inner = copy_moves.optimizer(_INNER[schedule.inner_optimizer](schedule.inner_learning_rate), params)
    train_steps = {
        "copy": (copy_moves, make_train_step(loss, inner)),
        "vectors": (vectors_move, make_train_step(loss, vectors_move.optimizer(outer, params))),
    }

    def init(trained: Tree) -> Tree:
        states = {name: train_step.init(phase.split(trained)[0]) for name, (phase, train_step) in train_steps.items()}
        return {"step": shard(jnp.int32(0)), "states": states}

    def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
        name = "vectors" if int(state["step"]) % (schedule.inner_steps + 1) == schedule.inner_steps else "copy"
        phase, train_step = train_steps[name]
        moved, still = phase.split(trained)
        moved, own, metrics = train_step.step(moved, state["states"][name], still, batch)
        both = merge(moved, still)
        return both, {"step": state["step"] + 1, "states": state["states"] | {name: own}}, metrics

    return Phase({"backbone": "train", "vectors": "train"}), TrainStep(init, step)
