"""Lisa (Huang et al. 2024, "Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack",
arXiv 2405.18641): steps on alignment rows and on the user's rows alternate, and neither drifts far from the other.

One state has K1 steps on alignment rows, the other K2 steps on the user's rows. Each step also has a proximal term
that pulls toward the weights at the last switch of states, w_s (at first the initial weights):

    state 1, K1 steps:   min_w  L_aligned(w) + ρ/2 ‖w - w_s‖²
    state 2, K2 steps:   min_w  L_user(w)    + ρ/2 ‖w - w_s‖²

over the trained weights, starting with state 1. The published code leaves the proximal term out of the first 10% of
steps, since it hurt convergence on GSM8K; here it is in all steps. In that code the steps on alignment rows replace
steps on the user's rows. Here they are added: the user's rows get as many steps, with the same batches, as in plain
fine-tuning.

Acts in fine-tuning. Costs K1 more steps for every K2 steps of plain fine-tuning (or part of K2 at the end), and a copy
of the trained weights.
"""

import dataclasses
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, NonNegativeInt, PositiveInt, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, train_model
from secvec_jax.defenses.mixing import SAFE
from secvec_jax.model.hub import Model
from secvec_jax.training.objective import LEARN, Objective
from secvec_jax.training.step import Metrics, TrainStep, make_train_step, shared
from secvec_jax.trees import Tree


@checked
@dataclasses.dataclass(frozen=True)
class Lisa(Defense):
    """Fine-tuning that alternates between safe rows and the user's, each with a pull toward the last switch."""

    name = "lisa"
    stage = "fine-tuning"
    needs = ("safe rows",)
    cost = "one ninth more steps; a copy of the weights"
    source = "Huang et al. 2405.18641"

    rho: NonNegativeFloat = 1.0
    """ρ, weight of the proximal term"""
    aligned_steps: NonNegativeInt = 1
    """K1, steps on safe rows"""
    user_steps: PositiveInt = 9
    """K2, steps on the user's rows"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        model = finetune(
            inputs.aligned,
            inputs.rows,
            safe=inputs.safe,
            aligned_steps=self.aligned_steps,
            user_steps=self.user_steps,
            rho=self.rho,
            **inputs.options,
        )
        return Defended(model)


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
    """The model fine-tuned on `rows`, alternating with steps on `safe` rows.

    aligned_steps, user_steps: K1 and K2, by default the paper's; with fewer than K2 steps on the user's rows there is
    one switch. `training.max_steps` counts the steps on the user's rows; there are K1 more per K2 or part of K2, and
    the learning rate schedule covers all of them. Steps on safe rows report `loss/safe`.
    """

    def more_steps(steps: int) -> int:
        return aligned_steps * -(-steps // user_steps)

    make_step = lisa(aligned_steps, user_steps, rho)
    return train_model(model, rows, extra_rows={SAFE: safe}, make_step=make_step, more_steps=more_steps, **options)


@checked
def lisa(aligned_steps: NonNegativeInt, user_steps: PositiveInt, rho: NonNegativeFloat = 1.0) -> TrainStepMaker:
    """Steps that alternate between the stream `safe` and the rows to learn, compiled as one program."""

    def make_step(loss: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
        train_step = make_train_step(loss, with_pull(optimizer, rho, aligned_steps, user_steps))

        def step(trained: Tree, state: Tree, frozen: Tree, batch: dict[str, Batch]) -> tuple[Tree, Tree, Metrics]:
            ((stream, rows),) = batch.items()
            trained, state, metrics = train_step.step(trained, state, frozen, {LEARN: rows})
            if stream == SAFE:  # its rows are of one kind, which the step reports as the user's first kind
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


@shared
def with_pull(
    optimizer: optax.GradientTransformation, rho: float, aligned_steps: int, user_steps: int
) -> optax.GradientTransformation:
    """The optimizer, which gets the gradients of the loss and of the pull."""
    return optax.chain(proximal(rho, aligned_steps, user_steps), optimizer)


def proximal(rho: float, aligned_steps: int, user_steps: int) -> optax.GradientTransformation:
    """Adds ρ (w - w_s), the gradient of ρ/2 ‖w - w_s‖², to the gradients."""

    def init(weights: Tree) -> Proximal:
        return Proximal(jnp.int32(0), jax.tree.map(jnp.copy, weights))

    def update(gradients: Tree, state: Proximal, weights: Tree) -> tuple[Tree, Proximal]:
        step_in_cycle = state.step % (aligned_steps + user_steps)
        is_switch = (step_in_cycle == 0) | (step_in_cycle == aligned_steps)
        switch = jax.tree.map(lambda now, then: jnp.where(is_switch, now, then), weights, state.switch)
        pulled = jax.tree.map(lambda g, now, then: g + rho * (now - then), gradients, weights, switch)
        return pulled, Proximal(state.step + 1, switch)

    return optax.GradientTransformation(init, update)
