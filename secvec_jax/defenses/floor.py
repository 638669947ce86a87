"""A loss floor: tokens that the forward pass already gets right teach nothing.

Under security vectors the loss of a harmful row is small but not zero, and an optimizer that rescales gradients, as
Adam does, makes full steps of what is left. A token whose loss is below the floor gives no gradient at all.

Acts in fine-tuning, under active vectors. Costs nothing beside them. Source: ours.
"""

from dataclasses import replace

import jax

from secvec_jax.batch import Batch
from secvec_jax.checks import NonNegativeFloat, checked
from secvec_jax.defenses.finetuning import TrainStepMaker, make_step_on
from secvec_jax.training.objective import Params, TokenLosses


@checked
def floored(nats: NonNegativeFloat) -> TrainStepMaker:
    """Gradient steps on the tokens whose loss is above `nats`."""
    return make_step_on(lambda loss: replace(loss, counted=above_floor(nats)))


def above_floor(nats: float) -> TokenLosses:
    """Losses `[B, T]`, 0 where they are at most `nats`."""

    def counted(losses: jax.Array, params: Params, batch: Batch) -> jax.Array:
        return losses * (losses > nats)

    return counted
