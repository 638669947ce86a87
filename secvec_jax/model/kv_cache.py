"""The key-value cache of decoding: what attention has computed for the tokens read so far."""

import dataclasses
from typing import NamedTuple

import jax


class KVSegment(NamedTuple):
    """Keys `[B, K, H, S]` and values `[B, K, S, H]` of S successive slots of a cache.

    B: rows, 1 where all rows share them; K: key-value heads; H: channels of a head. Those of all layers are stacked on
    a leading axis, `[L, B, ...]`. Keys are stored transposed, as the product with the queries reads them.
    """

    keys: jax.Array
    values: jax.Array

    def written(self, new: "KVSegment", slot: jax.Array) -> "KVSegment":
        """The segment, of one layer or stacked, with `new` in the slots from `slot` on."""
        put = jax.lax.dynamic_update_slice_in_dim
        keys = put(self.keys, new.keys.astype(self.keys.dtype), slot, self.keys.ndim - 1)
        values = put(self.values, new.values.astype(self.values.dtype), slot, self.values.ndim - 2)
        return KVSegment(keys, values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of all tokens read so far, and which row and position each slot holds.

    parts: the slots' keys and values in order, stacked over layers. Decoding with unrolled layers keeps one segment for
    each layer in their place, so that a step never copies the stack.
    segments, positions: `[B, S]`, of the slots of all parts together; a free slot and one of padding have segment 0.
    length: how many slots are taken; those from there on are free.
    """

    parts: tuple[KVSegment, ...]
    segments: jax.Array
    positions: jax.Array
    length: jax.Array

    def with_slots_marked(self, segments: jax.Array, positions: jax.Array) -> "KVCache":
        """The cache with the segments and positions `[B, T]` of the next T slots; their keys are yet to be written."""
        start = self.length
        return dataclasses.replace(
            self,
            segments=jax.lax.dynamic_update_slice_in_dim(self.segments, segments, start, axis=1),
            positions=jax.lax.dynamic_update_slice_in_dim(self.positions, positions, start, axis=1),
        )
