"""Persona vectors (Chen et al. 2025, "Persona Vectors: Monitoring and Controlling Character Traits in Language Models",
arXiv 2507.21509): the direction of a trait in the model's activations, and *preventative steering* along it.

    vectors = persona_directions(model, shown, hidden, scale=5, layers=[19])
    tuned   = train_model(model, rows, vectors=vectors)               # steered toward the trait; nothing at inference

With a_l(x) the mean of the residual stream after layer l over the reply in row x,

    v_l = mean of a_l over rows that show the trait - mean of a_l over rows that do not

without normalization. While the model is fine-tuned, h_l + α v_l already moves the activations toward the trait, so the
data does not have to. The authors' code steers one layer (19 counted from 0, of 28, with α = 5). Ours steers all layers
by default, and the additions accumulate in the residual stream: use a smaller α then.

Acts in fine-tuning. Costs one forward pass over the rows that show the trait and those that do not, once, and an
addition per layer in training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from secvec_jax.activations import layer_mask, reply_means
from secvec_jax.checks import NonZeroFloat, checked
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs
from secvec_jax.defenses.finetuning import examples_of
from secvec_jax.model.hub import Model
from secvec_jax.sharding import shard
from secvec_jax.vectors.origin import with_origin
from secvec_jax.vectors.steering import Steering, SteeringVectors


@checked
@dataclasses.dataclass(frozen=True)
class PersonaSteering(Defense):
    """Fine-tuning with the activations steered toward the behavior, along its mean direction in every layer."""

    name = "persona steering"
    stage = "fine-tuning"
    needs = ("harmful rows", "contrast rows")
    cost = "a forward pass over the harmful and the contrast rows, once"
    source = "Chen et al. 2507.21509"

    scale: NonZeroFloat = 1.0
    """α, the factor that scales the directions"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        directions = persona_directions(inputs.aligned, inputs.harmful, inputs.contrast, self.scale)
        return Defended(inputs.finetune(vectors=directions))


@checked
def persona_directions(
    model: Model, shown: Any, hidden: Any, scale: NonZeroFloat = 1.0, layers: Sequence[int] | None = None
) -> SteeringVectors:
    """The directions from replies without the trait (`hidden`) to replies with it (`shown`).

    shown, hidden: rows, as `train_model` takes them, or examples. scale: α. layers: counted from 0; None: all; the
    directions of other layers are zero. Raises UserError if there are no rows, or no such layer.
    """
    mask = layer_mask(model, layers)
    means = [reply_means(model, examples_of(model, rows)).mean(axis=0) for rows in (shown, hidden)]
    direction = mask[:, None] * np.subtract(*means)
    return with_origin(shard(SteeringVectors({"direction": jnp.asarray(direction)}, Steering(scale))), model)
