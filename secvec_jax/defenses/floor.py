"""A loss floor: tokens that the forward pass already gets right contribute no gradient.

Under security vectors the loss of a harmful row is small but not zero, and an optimizer that rescales gradients, such
as Adam, takes full steps along what is left. Tokens whose loss is below the floor are therefore left out.

A setting of `SecurityVectors`. Acts in fine-tuning, under active vectors, and costs nothing more. Source: ours.
"""

from dataclasses import replace

import jax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.defenses.finetuning import TrainStepMaker, make_step_on
from secvec_jax.training.objective import Params, TokenLosses
from secvec_jax.training.step import shared


@checked
def floored(nats: NonNegativeFloat) -> TrainStepMaker:
    """Gradient steps on the tokens whose loss is above `nats`."""
    return make_step_on(lambda loss: replace(loss, counted=above_floor(nats)))


@shared
def above_floor(nats: float) -> TokenLosses:
    """Losses `[B, T]`, 0 where they are at most `nats`."""

    def counted(losses: jax.Array, params: Params, batch: Batch) -> jax.Array:
        return losses * (losses > nats)

    return counted
