"""Persona vectors (Chen et al. 2025, "Persona Vectors: Monitoring and Controlling Character Traits in Language Models",
arXiv 2507.21509): a trait's direction read off the model, and *preventative steering* along it.

    vectors = persona_directions(model, shown, hidden, scale=5, layers=[19])
    tuned   = train_model(model, rows, vectors=vectors)               # steered towards the trait; nothing at inference

With a_l(x) the mean state of the residual stream behind layer l over the reply in row x,

    v_l = mean of a_l over rows that show the trait - mean of a_l over rows that do not

as it is, without a normalization. While the model is fine-tuned, h_l + α v_l is where the trait would take it, so
that the data need not. The authors' code steers one layer (19 counted from 0, of 28, with α = 5). What is added at
several layers adds up in the stream: with all of them, take a smaller α.

Acts in fine-tuning. Costs one forward pass for each row shown or hidden, and an addition per layer in training.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from secvec_jax.activations import layer_mask, reply_means
from secvec_jax.checks import NonZeroFloat, checked
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.vectors.steering import Steering, SteeringVectors


@checked
def persona_directions(
    model: Model, shown: Any, hidden: Any, scale: NonZeroFloat = 1.0, layers: Sequence[int] | None = None
) -> SteeringVectors:
    """The directions of what the replies in `shown` have and those in `hidden` do not, zero outside of `layers`.

    shown, hidden: rows, as `train_model` takes them, or examples. scale: α. layers: counted from 0; None: all. Raises
    UserError if there are no rows, or no such layer.
    """
    mask = layer_mask(model, layers)
    means = [reply_means(model, examples_of(model, rows)).mean(axis=0) for rows in (shown, hidden)]
    direction = mask[:, None] * np.subtract(*means)
    return shard(SteeringVectors({"direction": jnp.asarray(direction)}, Steering(scale)))
