"""Security vectors as a soft prompt at every layer (prefix-tuning, Li & Liang 2021).

In every layer, each token also attends to `virtual_tokens` trained keys and values:

    softmax(q [K_prompt, K]ᵀ) [V_prompt, V]

They have no positions, so the positions of the sequence are the same as without them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from secvec_jax.checks import NonZeroFloat, PositiveInt, checked
from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.kv_cache import KVSegment
from secvec_jax.sharding import shard
from secvec_jax.trees import num_parameters
from secvec_jax.vectors.origin import Origin, register_vectors


@checked
@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt per layer (with --kind prompt)."""

    virtual_tokens: PositiveInt = 16
    """number of virtual tokens"""
    scale: NonZeroFloat = 1.0
    """multiplies the values, and so their effective learning rate"""

    def init(self, architecture: Architecture, key: jax.Array) -> "SoftPromptVectors":
        """Random keys, and values of zeros."""
        keys, values = _shapes(architecture, self.virtual_tokens)
        return shard(SoftPromptVectors({"keys": jax.random.normal(key, keys), "values": jnp.zeros(values)}, self))


@register_vectors
@dataclasses.dataclass(frozen=True)
class SoftPromptVectors(Adapter):
    """A soft prompt of every layer: {"keys": `[L, K, H, P]`, "values": `[L, K, P, H]`}, float32."""

    factors: dict[str, jax.Array]
    spec: SoftPrompt
    origin: Origin | None = dataclasses.field(default=None, compare=False, repr=False)
    """the model that they were trained on, if it is known"""

    def __repr__(self) -> str:
        return f"SoftPromptVectors({self.spec!r}, {num_parameters(self):,} parameters)"

    def prefix(self) -> KVSegment:
        """The keys and values, the same for all rows."""
        keys = self.factors["keys"][..., None, :, :, :]
        values = self.spec.scale * self.factors["values"][..., None, :, :, :]
        return KVSegment(keys, values)

    def axes(self) -> "SoftPromptVectors":
        """The logical axes: a soft prompt is small, and replicated on every device."""
        return jax.tree.map(lambda _: ("layers", None, None, None), self)

    def check(self, architecture: Architecture) -> None:
        """Raises UserError if the prompt does not fit the architecture."""
        keys, values = _shapes(architecture, self.spec.virtual_tokens)
        shapes = {name: array.shape for name, array in self.factors.items()}
        if shapes != {"keys": keys, "values": values}:
            raise UserError(f"the vectors have shapes {shapes}, the model needs {keys} and {values}: wrong backbone")


def _shapes(architecture: Architecture, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = (architecture.num_layers, architecture.num_kv_heads)
    return (*start, architecture.head_dim, count), (*start, count, architecture.head_dim)
