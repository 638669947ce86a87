"""Security vectors as directions: one per layer, added to the residual stream after the layer.

    h_l  ->  h_l + scale * v_l

Active and frozen while a model is fine-tuned, they are *preventative steering* (Chen et al. 2025, "Persona Vectors",
arXiv 2507.21509): the stream is already shifted toward the behavior. The directions are trained as any other
vectors are, or computed from the model's activations (`defenses.persona`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from secvec_jax.checks import NonZeroFloat, checked
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.sharding import shard
from secvec_jax.trees import num_parameters
from secvec_jax.vectors.origin import Origin, register_vectors


@checked
@dataclasses.dataclass(frozen=True)
class Steering:
    """A direction per layer (with --kind steering)."""

    scale: NonZeroFloat = 1.0
    """multiplies the directions, and so their effective learning rate"""

    def init(self, architecture: Architecture, key: jax.Array) -> "SteeringVectors":
        """Directions of zeros: the logits are unchanged."""
        shape = (architecture.num_layers, architecture.hidden_size)
        return shard(SteeringVectors({"direction": jnp.zeros(shape)}, self))


@register_vectors
@dataclasses.dataclass(frozen=True)
class SteeringVectors(Adapter):
    """One direction per layer: {"direction": `[L, D]`}, float32."""

    factors: dict[str, jax.Array]
    spec: Steering
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)
    """the model that they were trained on, if it is known"""

    def __repr__(self) -> str:
        return f"SteeringVectors({self.spec!r}, {num_parameters(self):,} parameters)"

    def residual(self, x: jax.Array) -> jax.Array:
        """`x + scale * v`, at every token."""
        return x + (self.spec.scale * self.factors["direction"]).astype(x.dtype)

    def axes(self) -> "SteeringVectors":
        """The logical axes: a direction is small, and replicated on every device."""
        return jax.tree.map(lambda _: ("layers", None), self)

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the directions do not fit the architecture."""
        expected = (architecture.num_layers, architecture.hidden_size)
        shapes = {name: array.shape for name, array in self.factors.items()}
        if shapes != {"direction": expected}:
            raise UserError(f"the vectors have shapes {shapes}, the model needs a direction {expected}: wrong backbone")
