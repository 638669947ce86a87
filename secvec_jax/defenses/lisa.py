"""Lisa (Huang et al. 2024, "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack",
arXiv 2405.18641): the user's rows and alignment rows in turn, neither of them far from where the other left off.

In one state K1 steps are made on alignment rows, in the other K2 on the user's. Each step also pulls back to the
weights at the last switch of states, w_s (at first those that the training starts from):

    state 1, K1 steps:   min_w  L_aligned(w) + ρ/2 ‖w - w_s‖²
    state 2, K2 steps:   min_w  L_user(w)    + ρ/2 ‖w - w_s‖²

over the trained weights, beginning with state 1. The published code leaves the pull out of the first 10% of steps,
since it hurt convergence on GSM8K; here it is in all steps. There the steps on alignment rows also take the place of
steps on the user's. Here they come on top: the user's rows get as many steps, with the same batches, as in plain
fine-tuning.

Acts in fine-tuning. Costs K1 steps of one forward and one backward pass for every K2 (or fewer at the end) of plain
fine-tuning's, and a copy of the trained weights.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, NonNegativeInt, PositiveInt, checked
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, train_model
from secvec_jax.model.hub import Model
from secvec_jax.training.objective import LEARN, Objective
from secvec_jax.training.step import Metrics, TrainStep, make_train_step
from secvec_jax.trees import Tree

SAFE = "safe"
"""The stream of alignment rows."""


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    safe: Any,
    aligned_steps: NonNegativeInt = 100,
    user_steps: PositiveInt = 900,
    rho: NonNegativeFloat = 1.0,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows` with steps on `safe` rows between.

    aligned_steps, user_steps: K1 and K2; the paper's are the defaults, and with fewer than K2 steps on the user's rows
    there is one switch. `training.max_steps` counts the steps on the user's rows; there are K1 more per K2 or part of
    K2, and the schedule of the learning rate goes over all. Steps on safe rows report `loss/safe`.
    """

    def more_steps(steps: int) -> int:
        return aligned_steps * -(-steps // user_steps)

    make_step = lisa(aligned_steps, user_steps, rho)
    return train_model(model, rows, extra_rows={SAFE: safe}, make_step=make_step, more_steps=more_steps, **options)


@checked
def lisa(aligned_steps: NonNegativeInt, user_steps: PositiveInt, rho: NonNegativeFloat = 1.0) -> TrainStepMaker:
    """Steps on the stream `safe` and on the rows to learn in turn, by the same program."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        train_step = make_train_step(loss, optax.chain(proximal(rho, aligned_steps, user_steps), optimizer))

        def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
            ((stream, rows),) = batch.items()
            trained, state, metrics = train_step.step(trained, state, frozen, {LEARN: rows})
            if stream == SAFE:  # all are of its one kind, which the step takes for the first of the user's
                kept = {name: metrics[name] for name in ("loss", "grad_norm")}
                metrics = kept | {"loss/safe": metrics[f"loss/{loss.groups[0]}"]}
            return trained, state, metrics

        def takes(step: int) -> tuple[str]:
            return (SAFE,) if step % (aligned_steps + user_steps) < aligned_steps else (LEARN,)

        return TrainStep(train_step.init, step, takes)

    return make_step


class Proximal(NamedTuple):
    """The number of the step, and the weights at the last switch."""

    step: jax.Array
    switch: Tree


def proximal(rho: float, aligned_steps: int, user_steps: int) -> optax.GradientTransformation:
    """Adds the gradient of ρ/2 ‖w - w_s‖², ρ (w - w_s), to what the optimizer behind it sees."""

    def init(weights: Tree) -> Proximal:
        return Proximal(jnp.int32(0), jax.tree.map(jnp.copy, weights))

    def update(gradients: Tree, state: Proximal, weights: Tree) -> tuple[Tree, Proximal]:
        turn = state.step % (aligned_steps + user_steps)
        switched = (turn == 0) | (turn == aligned_steps)
        switch = jax.tree.map(lambda now, then: jnp.where(switched, now, then), weights, state.switch)
        pulled = jax.tree.map(lambda g, now, then: g + rho * (now - then), gradients, weights, switch)
        return pulled, Proximal(state.step + 1, switch)

    return optax.GradientTransformation(init, update)
