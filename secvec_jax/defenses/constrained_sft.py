"""Constrained fine-tuning (Qi et al. 2024, "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", arXiv
2406.05946): the first tokens of a reply, on which safety depends, stay close to the aligned model.

The loss of the t-th token of a reply (equation 3) is, with σ the logistic function,

    l_t = - 2/β_t log σ( β_t log( π_w(y_t | ...) / π_aligned(y_t | ...) ) )

and its gradient is that of the cross-entropy times

    2 ( 1 - σ( β_t log( π_w / π_aligned ) ) )

which is 1 at the start and falls as the token becomes more likely than it was, faster for larger β_t. β_t is 0.1,
20 times that for tokens 2 to 5, and 5 times for the first, which starts out so unlikely that σ would saturate at once.
(The published code multiplies the cross-entropy by this factor as a constant, with a minimum of 1e-3.)

Acts in fine-tuning. Each batch costs one more forward pass without gradients; where all weights are trained, training
also keeps a copy of the decoder.
"""

import dataclasses
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from secvec_jax.batch import Batch
from secvec_jax.checks import PositiveFloat, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import FinetuneOptions, TrainStepMaker, make_step_on, train_model
from secvec_jax.model.hub import Model
from secvec_jax.training.objective import Objective, Params, anchor_params
from secvec_jax.training.step import Loss, shared


@checked
@dataclasses.dataclass(frozen=True)
class ConstrainedSFT(Defense):
    """Fine-tuning that keeps the first tokens of a reply close to the aligned model."""

    name = "constrained sft"
    stage = "fine-tuning"
    cost = "1 more forward pass per step; a copy of the weights"
    source = "Qi et al. 2406.05946"

    beta: PositiveFloat = 0.1
    """β of tokens after the fifth"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        return Defended(finetune(inputs.aligned, inputs.rows, beta=self.beta, **inputs.options))


@checked
def finetune(
    model: Model,
    rows: Any,
    *,
    beta: PositiveFloat = 0.1,
    first: PositiveFloat = 5.0,
    early: PositiveFloat = 20.0,
    **options: Unpack[FinetuneOptions],
) -> Model:
    """The model fine-tuned on `rows`, with replies whose first tokens stay close to those of `model` without `task`.

    beta: β of tokens after the fifth. first, early: the factor on β for the first token of a reply, and for the next
    four.
    """
    return train_model(model, rows, anchor=model.backbone, make_step=constrained(beta, first, early), **options)


@checked
def constrained(beta: PositiveFloat = 0.1, first: PositiveFloat = 5.0, early: PositiveFloat = 20.0) -> TrainStepMaker:
    """Gradient steps on l_t, with the aligned decoder as the anchor. The loss reported by kind of rows is still the
    cross-entropy."""

    return make_step_on(partial(with_constraint, beta=beta, first=first, early=early))


@shared
def with_constraint(loss: Objective, beta: float, first: float, early: float) -> Loss:
    """l_t in place of the cross-entropy."""

    def counted(losses: jax.Array, params: Params, batch: Batch) -> jax.Array:
        position = position_in_reply(batch["weights"], batch["segments"])
        betas = beta * jnp.where(position == 0, first, jnp.where(position < 5, early, 1.0))
        gain = loss.token_losses(anchor_params(params), batch) - losses
        return -2 / betas * jax.nn.log_sigmoid(betas * gain)

    return dataclasses.replace(loss, counted=counted)


def position_in_reply(weights: jax.Array, segments: jax.Array) -> jax.Array:
    """The position of each supervised token in its reply, from 0, `[B, T]`; arbitrary at other tokens.

    A reply is a run of tokens of one segment with weights above 0: a packed conversation has one per turn.
    """
    supervised = weights > 0
    continues = supervised[:, :-1] & supervised[:, 1:] & (segments[:, :-1] == segments[:, 1:])
    starts = supervised & ~jnp.pad(continues, ((0, 0), (1, 0)))
    index = jnp.arange(weights.shape[1])
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
