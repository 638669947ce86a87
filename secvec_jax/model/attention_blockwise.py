"""Attention in blocks, with an online softmax, in plain JAX: for inputs that no fused kernel supports.

The scores `[T, S]` never exist: one loop runs over pairs of a block of queries and a block of keys that it may see, and
keeps the running maximum and sum of the softmax (Milakov & Gimelshein 2018; Dao et al. 2022). The backward pass
computes the scores of each pair again from the logarithm of that sum. Memory grows with T, not with T².
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from secvec_jax.batch import SHARED
from secvec_jax.model.attention_masks import KERNEL, MASKED, joined, on_each_device, softcapped, visible

_BLOCKS = (512, 256, 128)
"""Tokens in a block of queries or keys."""

_MAX_SCORE_BYTES = 32 << 20
"""Limit for the scores of one pair of blocks; the largest blocks within it are used."""

_LAST_POSITION = np.iinfo(np.int32).max // 2
"""The position given to prefix keys: later than all tokens', so that they are in every window."""


class _Spec(NamedTuple):
    """What the compiled program depends on besides shapes.

    consecutive: whether positions within a segment count slots, so that a window bounds slots as well.
    """

    prefix_len: int
    window: int | None
    softcap: float | None
    consecutive: bool
    query_block: int
    key_block: int

    def pairs(self, queries: int, keys: int) -> list[tuple[int, int]]:
        """The (query block, key block) pairs of which a query may see a key, for `queries` and `keys` slots."""
        needed = []
        for i in range(queries // self.query_block):
            first_slot = self.prefix_len + i * self.query_block
            last_slot = first_slot + self.query_block - 1
            for j in range(min(keys // self.key_block, last_slot // self.key_block + 1)):
                distance = first_slot - (j * self.key_block + self.key_block - 1)
                outside = self.consecutive and self.window is not None and distance >= self.window
                if not outside or j * self.key_block < self.prefix_len:
                    needed.append((i, j))
        return needed


class _Marks(NamedTuple):
    """Segments and positions of the queries `[B, T]` and of the keys `[B, S]`."""

    query_segments: jax.Array
    query_positions: jax.Array
    key_segments: jax.Array
    key_positions: jax.Array


def blockwise(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    *,
    segments: jax.Array,
    positions: jax.Array,
    window: int | None,
    shared_prefix: bool,
    softcap: float | None = None,
    block: int | None = None,
) -> jax.Array:
    """Attention of packed sequences over themselves, and over the keys before them, which every token sees.

    query `[B, T, N, H]`; keys `[B, K, H, S_i]` and values `[B, K, S_i, H]`, of which the last are those of the tokens
    and the others adapters' prefixes; segments and positions `[B, T]`. The other arguments are those of
    `attention.self_attention`. block: tokens in a block; None: by the size of the scores. Returns `[B, T, N, H]`.
    """
    rows, length = segments.shape
    key, value = joined(keys, rows, axis=3), joined(values, rows, axis=2)
    prefix_len = key.shape[3] - length
    before = jnp.full((rows, prefix_len), SHARED, segments.dtype)
    late = jnp.full((rows, prefix_len), _LAST_POSITION, positions.dtype)
    key_segments = jnp.concatenate([before, segments], axis=1)
    key_positions = jnp.concatenate([late, positions], axis=1)

    def one_device(query, key, value, *marks):
        b, _, n, h = query.shape
        size = block or next((size for size in _BLOCKS if 4 * b * n * size**2 <= _MAX_SCORE_BYTES), _BLOCKS[-1])
        spec = _Spec(prefix_len, window, softcap, not shared_prefix, min(size, length), min(size, key.shape[3]))
        grouped = _padded(query.reshape(b, length, key.shape[1], -1, h), 1, spec.query_block)
        query_segments, query_positions = (_padded(x, 1, spec.query_block) for x in marks[:2])
        key_marks = [_padded(x, 1, spec.key_block) for x in marks[2:]]
        padded_marks = _Marks(query_segments, query_positions, *key_marks)
        key, value = _padded(key, 3, spec.key_block), _padded(value, 2, spec.key_block)
        out = _attend(spec, grouped, key, value, padded_marks)
        return out[:, :length].reshape(b, length, n, h)

    return on_each_device(one_device, query, key, value, segments, positions, key_segments, key_positions)


def _padded(x: jax.Array, axis: int, block: int) -> jax.Array:
    """`x` with zeros at the end of the axis, up to a multiple of `block`; keys there are after all queries."""
    missing = -x.shape[axis] % block
    return x if missing == 0 else jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks) -> jax.Array:
    """query `[B, T, K, G, H]`, key `[B, K, H, S]`, value `[B, K, S, H]`, in whole blocks -> `[B, T, K, G, H]`."""
    return _forward(spec, query, key, value, marks)[0]


def _forward(
    spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks
) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the softmax's sum `[B, K, G, T]`."""
    b, t, k, g, h = query.shape
    size = spec.query_block

    def step(carry, pair):
        weighted, total, highest, out, log_total = carry
        i, j, starts = pair
        # The first pair of a query block resets the running sums.
        weighted, total = (jnp.where(starts, 0.0, x) for x in (weighted, total))
        highest = jnp.where(starts, MASKED, highest)
        scores = _scores(spec, _queries(query, i, size), _key_block(spec, key, j), marks, i, j)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_highest[..., None])
        correction = jnp.exp(highest - new_highest)
        total = total * correction + jnp.sum(weights, axis=-1)
        weighted = weighted * correction[..., None]
        weighted += _product(weights.astype(value.dtype), _value_block(spec, value, j))
        # The last pair of a query block writes its result; XLA does it in place.
        out = _written(out, _as_queries((weighted / total[..., None]).astype(out.dtype)), i * size, axis=1)
        log_total = _written(log_total, new_highest + jnp.log(total), i * size, axis=3)
        return (weighted, total, new_highest, out, log_total), None

    row = jnp.zeros((b, k, g, size), jnp.float32)
    one_block = jnp.zeros((b, k, g, size, h), jnp.float32), row, row
    outputs = jnp.zeros_like(query), jnp.zeros((b, k, g, t), jnp.float32)
    pairs = _with_starts(spec.pairs(t, key.shape[3]), by=0)
    (*_, out, log_total), _ = jax.lax.scan(step, (*one_block, *outputs), pairs)
    return out, log_total


def _forward_rule(spec, query, key, value, marks):
    out, log_total = _forward(spec, query, key, value, marks)
    out, log_total = checkpoint_name(out, KERNEL), checkpoint_name(log_total, KERNEL)
    return out, (query, key, value, marks, out, log_total)


def _backward_rule(spec, residuals, gradient):
    query, key, value, marks, out, log_total = residuals
    size, keys_size = spec.query_block, spec.key_block
    *kv_heads, h, _ = key.shape
    # What the softmax's normalization subtracts from every score's gradient.
    mean = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1).transpose(0, 2, 3, 1)

    def step(carry, pair):
        key_gradient, value_gradient, query_gradients, key_gradients, value_gradients = carry
        i, j, starts = pair
        key_gradient, value_gradient = (jnp.where(starts, 0.0, x) for x in (key_gradient, value_gradient))
        queries, slope = _queries(query, i, size), _queries(gradient, i, size)
        keys, values = _key_block(spec, key, j), _value_block(spec, value, j)
        scores = _scores(spec, queries, keys, marks, i, j)
        weights = jnp.exp(scores - _slice(log_total, i, size, 3)[..., None])
        value_gradient += _product(_rows(weights.astype(value.dtype)).swapaxes(2, 3), _rows(slope))
        by_weights = _product(slope, values.swapaxes(2, 3))
        by_scores = weights * (by_weights - _slice(mean, i, size, 3)[..., None])
        if spec.softcap is not None:
            # Masked scores are far below the bound, and their weights are zero.
            by_scores *= 1 - (jnp.maximum(scores, -spec.softcap) / spec.softcap) ** 2
        by_scores = (by_scores * h**-0.5).astype(key.dtype)
        key_gradient += _product(_rows(queries).swapaxes(2, 3), _rows(by_scores))
        query_gradient = _as_queries(_product(by_scores, keys.swapaxes(2, 3)))
        query_gradient += _slice(query_gradients, i, size, 1)
        query_gradients = _written(query_gradients, query_gradient, i * size, axis=1)
        key_gradients = _written(key_gradients, key_gradient.astype(key.dtype), j * keys_size, axis=3)
        value_gradients = _written(value_gradients, value_gradient.astype(value.dtype), j * keys_size, axis=2)
        return (key_gradient, value_gradient, query_gradients, key_gradients, value_gradients), None

    one_block = jnp.zeros((*kv_heads, h, keys_size), jnp.float32), jnp.zeros((*kv_heads, keys_size, h), jnp.float32)
    outputs = jnp.zeros(query.shape, jnp.float32), jnp.zeros_like(key), jnp.zeros_like(value)
    by_keys = sorted(spec.pairs(query.shape[1], key.shape[3]), key=lambda pair: pair[::-1])
    (*_, query_gradients, key_gradients, value_gradients), _ = jax.lax.scan(
        step, (*one_block, *outputs), _with_starts(by_keys, by=1)
    )
    return query_gradients.astype(query.dtype), key_gradients, value_gradients, None


_attend.defvjp(_forward_rule, _backward_rule)


def _with_starts(pairs: list[tuple[int, int]], by: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pairs as arrays, and whether each is the first of its query block (by=0) or of its key block (by=1)."""
    i, j = np.array(pairs, np.int32).T
    leading = (i, j)[by]
    starts = np.append(True, leading[1:] != leading[:-1])
    return jnp.asarray(i), jnp.asarray(j), jnp.asarray(starts)


def _scores(spec: _Spec, queries: jax.Array, keys: jax.Array, marks: _Marks, i: jax.Array, j: jax.Array) -> jax.Array:
    """The scores `[B, K, G, queries, keys]`, float32, of one pair of blocks; `MASKED` where a query sees no key."""
    query_marks = [_slice(x, i, spec.query_block, 1) for x in marks[:2]]
    key_marks = [_slice(x, j, spec.key_block, 1) for x in marks[2:]]
    offset = spec.prefix_len + i * spec.query_block - j * spec.key_block
    mask = visible(query_marks[0], key_marks[0], query_marks[1], key_marks[1], offset, spec.window)
    scores = softcapped(_product(queries, keys) * queries.shape[-1] ** -0.5, spec.softcap)
    return jnp.where(mask[:, :, None], scores, MASKED)


def _product(groups: jax.Array, table: jax.Array) -> jax.Array:
    """The product of `[B, K, G, R, X]`, or `[B, K, R, X]`, and `[B, K, X, Y]`, float32."""
    rows = groups if groups.ndim == 4 else _rows(groups)
    out = jnp.matmul(rows, table, preferred_element_type=jnp.float32)
    return out.reshape(*groups.shape[:-1], table.shape[-1])


def _rows(groups: jax.Array) -> jax.Array:
    """`[B, K, G, R, X]` -> `[B, K, G R, X]`: the queries of a group read the same keys."""
    return groups.reshape(*groups.shape[:2], -1, groups.shape[-1])


def _slice(x: jax.Array, block: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _queries(x: jax.Array, i: jax.Array, size: int) -> jax.Array:
    """Block i of `[B, T, K, G, H]`, as `[B, K, G, size, H]`."""
    return _slice(x, i, size, 1).transpose(0, 2, 3, 1, 4)


def _as_queries(block: jax.Array) -> jax.Array:
    """`[B, K, G, size, H]` -> `[B, size, K, G, H]`."""
    return block.transpose(0, 3, 1, 2, 4)


def _key_block(spec: _Spec, key: jax.Array, j: jax.Array) -> jax.Array:
    return _slice(key, j, spec.key_block, 3)


def _value_block(spec: _Spec, value: jax.Array, j: jax.Array) -> jax.Array:
    return _slice(value, j, spec.key_block, 2)


def _written(x: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, start, axis)
