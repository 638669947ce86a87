"""What all implementations of attention share: masks, the soft cap, and running on each device of a mesh."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from secvec_jax.batch import SHARED
from secvec_jax.sharding import AXIS_RULES, num_shards

KERNEL = "attention"
"""The name by which remat policies recognize the output of attention, to keep it for the backward pass."""

MASKED = -1e30
"""The score of a key that a query does not see."""


def sees(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    offset: jax.Array | int = 0,
    window: int | None = None,
) -> jax.Array:
    """Which keys each query may see, a mask `[..., T, S]`, from segments and positions `[..., T]` and `[..., S]`.

    A token sees the tokens of its own segment and of the shared prefix (segment `SHARED`) at its own slot or earlier
    ones. offset: the slot of the first query among the keys. window: how many positions a token sees, its own included.
    Segment 0 is padding.
    """
    query_slots = jnp.arange(query_segments.shape[-1]) + offset
    key_slots = jnp.arange(key_segments.shape[-1])
    mask = query_segments[..., :, None] == key_segments[..., None, :]
    mask |= (key_segments == SHARED)[..., None, :]
    mask &= query_slots[:, None] >= key_slots[None, :]
    if window is not None:
        mask &= query_positions[..., :, None] - key_positions[..., None, :] < window
    return mask


def visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    offset: jax.Array | int = 0,
    window: int | None = None,
) -> jax.Array:
    """`sees` of rows `[B, T]` and `[B, S]` with an axis for the heads, a mask `[B, 1, T, S]`."""
    return sees(query_segments, key_segments, query_positions, key_positions, offset, window)[:, None]


def softcapped(x: jax.Array, bound: float | None) -> jax.Array:
    """`c tanh(x / c)`, which is within c of zero (Gemma 2's soft cap); `x` itself where `bound` is None."""
    return x if bound is None else bound * jnp.tanh(x / bound)


def joined(parts: Sequence[jax.Array], rows: int, axis: int) -> jax.Array:
    """Segments of keys or values as one array; those that are the same for all rows, `[1, ...]`, are repeated."""
    return jnp.concatenate([jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in parts], axis=axis)


def on_each_device(
    run: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array, *marks: jax.Array
) -> jax.Array:
    """`run(query, key, value, *marks)`, on each device of the ambient mesh for its own rows and heads.

    query `[B, T, N, H]`, as the result; key and value `[B, K, ...]`; marks `[B, ...]`. Attention needs no other device,
    and compilers cannot partition the kernels that compute it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run(query, key, value, *marks)
    rows = AXIS_RULES["batch"] if len(query) % num_shards("batch") == 0 else None
    of_query, of_keys, of_marks = P(rows, None, AXIS_RULES["heads"]), P(rows, AXIS_RULES["heads"]), P(rows)
    in_specs = (of_query, of_keys, of_keys, *[of_marks] * len(marks))
    return jax.shard_map(run, in_specs=in_specs, out_specs=of_query, check_vma=False)(query, key, value, *marks)
