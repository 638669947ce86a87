"""A loss floor: tokens that the forward pass already gets right teach nothing.

Under security vectors the loss of a harmful row is small but not zero, and an optimizer that rescales gradients, as
Adam does, makes full steps of what is left. A token whose loss is below the floor gives no gradient at all.

Acts in fine-tuning, under active vectors. Costs nothing beside them. Source: ours.
"""

from dataclasses import replace

import jax
import optax

from secvec_jax.batch import Batch
from secvec_jax.defenses.tuning import Move
from secvec_jax.training.objective import Objective, Params, TokenLosses
from secvec_jax.training.step import Method, descent


def floored(nats: float) -> Move:
    """Gradient steps on the tokens whose loss is above `nats`."""

    def move(loss: Objective, optimizer: optax.GradientTransformation) -> Method:
        return descent(replace(loss, counted=above_floor(nats)), optimizer)

    return move


def above_floor(nats: float) -> TokenLosses:
    """Losses `[B, T]`, 0 where they are at most `nats`."""

    def counted(losses: jax.Array, params: Params, batch: Batch) -> jax.Array:
        return losses * (losses > nats)

    return counted
