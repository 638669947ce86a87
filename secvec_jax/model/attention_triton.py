"""The fused attention kernel for NVIDIA GPUs, in Triton through Pallas: scores are never in memory.

JAX has a Triton kernel with segments (`jax.experimental.pallas.ops.gpu.attention.mha`), after which this one is
modeled. This one also takes grouped heads as they are, sliding windows, soft caps and a prefix that all rows of a
sequence share, skips blocks of other segments, and keeps its residuals where a remat policy says so. (cuDNN's attention
takes packed rows only as a bias `[T, T]`.)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from secvec_jax.batch import SHARED
from secvec_jax.model.attention_masks import KERNEL, MASKED, on_each_device, sees, softcapped


class _Spec(NamedTuple):
    """What the compiled kernels depend on besides shapes."""

    window: int | None
    softcap: float | None
    interpret: bool


class _Blocks(NamedTuple):
    """Tokens in a block of queries and in a block of keys, and the warps that compute one pair of them."""

    queries: int
    keys: int
    warps: int


class _Marks(NamedTuple):
    """Segments and positions of tokens: `[B, T]`, or those of a block."""

    segments: Any
    positions: Any


def triton(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    *,
    segments: jax.Array,
    positions: jax.Array,
    window: int | None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention of packed sequences over themselves, by Pallas kernels for NVIDIA GPUs.

    query `[B, T, N, H]`; keys `[[B, K, H, T]]` and values `[[B, K, T, H]]`; segments and positions `[B, T]`. window: as
    in `self_attention`. interpret: run the kernels on a CPU. Returns `[B, T, N, H]`.
    """
    spec = _Spec(window, softcap, interpret)

    def one_device(query, key, value, *marks):
        return _attend(spec, query, key, value, _Marks(*marks))

    return on_each_device(one_device, query, keys[0], values[0], segments, positions)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks) -> jax.Array:
    """query `[B, T, N, H]`, key `[B, K, H, T]`, value `[B, K, T, H]` -> `[B, T, N, H]`."""
    return _forward(spec, query, key, value, marks)[0]


def _forward(
    spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks
) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of the softmax's sum `[B, N, T]`."""
    b, t, n, h = query.shape
    blocks = _Blocks(64, 32, 4) if h > 128 else _Blocks(128, 64, 4 if h <= 64 else 8)
    first_key, _ = needed_blocks(*marks, spec.window, blocks.queries, blocks.keys)
    specs = _BlockSpecs(query, key)
    return pl.pallas_call(
        partial(_forward_kernel, spec, blocks, h),
        grid=(t // blocks.queries, b, n),
        in_specs=[
            specs.queries(blocks),
            specs.keys,
            specs.values,
            *specs.marks,
            specs.bounds(first_key),
        ],
        out_specs=[specs.queries(blocks), specs.numbers_of_queries(blocks)],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
        interpret=spec.interpret,
        name="packed_attention_forward",
    )(query, key, value, *marks, first_key)


def _forward_kernel(
    spec: _Spec, blocks: _Blocks, head_dim: int,
    query_ref, key_ref, value_ref, segments_ref, positions_ref, first_key_ref, out_ref, log_total_ref,
) -> None:  # fmt: skip
    """One block of queries of one head."""
    i = pl.program_id(0)
    queries = _load(query_ref, head_dim, axis=1)
    all_marks = _Marks(segments_ref, positions_ref)
    query_marks = _block_of(all_marks, i, blocks.queries)

    def step(j, carry):
        weighted, total, highest = carry
        here = pl.ds(j * blocks.keys, blocks.keys)
        keys = _load(key_ref.at[:, here], head_dim, axis=0)
        key_marks = _block_of(all_marks, j, blocks.keys)
        scores = _scores(spec, blocks, head_dim, queries, keys, query_marks, key_marks, i, j)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - new_highest[:, None])
        correction = jnp.exp(highest - new_highest)
        total = total * correction + jnp.sum(weights, axis=1)
        values = _load(value_ref.at[here], head_dim, axis=1)
        weighted = weighted * correction[:, None] + plgpu.dot(weights.astype(values.dtype), values)
        return weighted, total, new_highest

    row = jnp.zeros(blocks.queries, jnp.float32)
    start = jnp.zeros(queries.shape, jnp.float32), row, row + MASKED
    weighted, total, highest = jax.lax.fori_loop(first_key_ref[i], _end_key(blocks, i), step, start)
    _store(out_ref, weighted / total[:, None], head_dim, axis=1)
    log_total_ref[...] = highest + jnp.log(total)


def _forward_rule(spec, query, key, value, marks):
    out, log_total = _forward(spec, query, key, value, marks)
    out, log_total = checkpoint_name(out, KERNEL), checkpoint_name(log_total, KERNEL)
    return out, (query, key, value, marks, out, log_total)


def _backward_rule(spec, residuals, slope):
    query, key, value, marks, out, log_total = residuals
    b, t, n, h = query.shape
    kv_heads = key.shape[1]
    blocks = _Blocks(32, 32, 4) if h > 128 else _Blocks(64, 64, 4 if h <= 64 else 8)
    first_key, end_query = needed_blocks(*marks, spec.window, blocks.queries, blocks.keys)
    # What the softmax's normalization takes from every score's gradient.
    mean = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    specs = _BlockSpecs(query, key)
    settings = {
        "compiler_params": plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
        "interpret": spec.interpret,
    }
    query_gradient = pl.pallas_call(
        partial(_query_gradient_kernel, spec, blocks, h),
        grid=(t // blocks.queries, b, n),
        in_specs=[
            specs.queries(blocks),
            specs.keys,
            specs.values,
            *specs.marks,
            specs.bounds(first_key),
            specs.queries(blocks),
            specs.numbers_of_queries(blocks),
            specs.numbers_of_queries(blocks),
        ],
        out_specs=specs.queries(blocks),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        name="packed_attention_query_gradient",
        **settings,
    )(query, key, value, *marks, first_key, slope, log_total, mean)

    def by_group(x: jax.Array, axis: int) -> jax.Array:
        """The axis of heads split in two, `[..., K, G, ...]`."""
        return x.reshape(*x.shape[:axis], kv_heads, n // kv_heads, *x.shape[axis + 1 :])

    queries_by_group, slope_by_group = by_group(query, 2), by_group(slope, 2)
    numbers_by_group = by_group(log_total, 1), by_group(mean, 1)
    key_gradient, value_gradient = pl.pallas_call(
        partial(_key_gradient_kernel, spec, blocks, h),
        grid=(t // blocks.keys, b, kv_heads),
        in_specs=[
            specs.queries_of_group,
            specs.block_of_keys(blocks),
            specs.block_of_values(blocks),
            *specs.marks,
            specs.bounds(end_query),
            specs.queries_of_group,
            specs.numbers_of_group,
            specs.numbers_of_group,
        ],
        out_specs=[specs.block_of_keys(blocks), specs.block_of_values(blocks)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        name="packed_attention_key_gradient",
        **settings,
    )(queries_by_group, key, value, *marks, end_query, slope_by_group, *numbers_by_group)
    return query_gradient, key_gradient, value_gradient, None


_attend.defvjp(_forward_rule, _backward_rule)


def _query_gradient_kernel(
    spec: _Spec, blocks: _Blocks, head_dim: int,
    query_ref, key_ref, value_ref, segments_ref, positions_ref, first_key_ref, slope_ref, log_total_ref, mean_ref,
    gradient_ref,
) -> None:  # fmt: skip
    """The gradient of one block of queries of one head."""
    i = pl.program_id(0)
    queries, slope = (_load(ref, head_dim, axis=1) for ref in (query_ref, slope_ref))
    log_total, mean = log_total_ref[...], mean_ref[...]
    all_marks = _Marks(segments_ref, positions_ref)
    query_marks = _block_of(all_marks, i, blocks.queries)

    def step(j, gradient):
        here = pl.ds(j * blocks.keys, blocks.keys)
        keys, values = _load(key_ref.at[:, here], head_dim, axis=0), _load(value_ref.at[here], head_dim, axis=1)
        key_marks = _block_of(all_marks, j, blocks.keys)
        scores = _scores(spec, blocks, head_dim, queries, keys, query_marks, key_marks, i, j)
        weights = jnp.exp(scores - log_total[:, None])
        by_scores = _gradient_of_scores(spec, head_dim, scores, weights, plgpu.dot(slope, values.T), mean)
        return gradient + plgpu.dot(by_scores.astype(keys.dtype), keys.T)

    start = jnp.zeros(queries.shape, jnp.float32)
    gradient = jax.lax.fori_loop(first_key_ref[i], _end_key(blocks, i), step, start)
    _store(gradient_ref, gradient, head_dim, axis=1)


def _key_gradient_kernel(
    spec: _Spec, blocks: _Blocks, head_dim: int,
    query_ref, key_ref, value_ref, segments_ref, positions_ref, end_query_ref, slope_ref, log_total_ref, mean_ref,
    key_gradient_ref, value_gradient_ref,
) -> None:  # fmt: skip
    """The gradients of one block of keys and values of one key-value head, from all queries of its group."""
    j = pl.program_id(0)
    keys, values = _load(key_ref, head_dim, axis=0), _load(value_ref, head_dim, axis=1)
    all_marks = _Marks(segments_ref, positions_ref)
    key_marks = _block_of(all_marks, j, blocks.keys)
    first_query, end_query = jax.lax.div(j * blocks.keys, blocks.queries), end_query_ref[j]

    def step(group, i, carry):
        key_gradient, value_gradient = carry
        here = pl.ds(i * blocks.queries, blocks.queries)
        queries = _load(query_ref.at[here, group], head_dim, axis=1)
        slope = _load(slope_ref.at[here, group], head_dim, axis=1)
        query_marks = _block_of(all_marks, i, blocks.queries)
        scores = _scores(spec, blocks, head_dim, queries, keys, query_marks, key_marks, i, j)
        weights = jnp.exp(scores - log_total_ref[group, here][:, None])
        by_weights = plgpu.dot(slope, values.T)
        by_scores = _gradient_of_scores(spec, head_dim, scores, weights, by_weights, mean_ref[group, here])
        value_gradient += plgpu.dot(weights.astype(slope.dtype).T, slope)
        key_gradient += plgpu.dot(queries.T, by_scores.astype(queries.dtype))
        return key_gradient, value_gradient

    def of_group(group, carry):
        return jax.lax.fori_loop(first_query, end_query, partial(step, group), carry)

    start = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    key_gradient, value_gradient = jax.lax.fori_loop(0, query_ref.shape[1], of_group, start)
    _store(key_gradient_ref, key_gradient, head_dim, axis=0)
    _store(value_gradient_ref, value_gradient, head_dim, axis=1)


class _BlockSpecs:
    """Which part of each array a kernel sees; its grid is (blocks, rows, heads). Heads are padded to a power of two."""

    def __init__(self, query: jax.Array, key: jax.Array) -> None:
        _, t, n, h = query.shape
        self.length, self.head_dim, group = t, pl.next_power_of_2(h), n // key.shape[1]
        self.marks = [pl.BlockSpec((None, t), lambda i, b, n: (b, 0))] * 2
        self.keys = pl.BlockSpec((None, None, self.head_dim, t), lambda i, b, n: (b, jax.lax.div(n, group), 0, 0))
        self.values = pl.BlockSpec((None, None, t, self.head_dim), lambda i, b, n: (b, jax.lax.div(n, group), 0, 0))
        self.queries_of_group = pl.BlockSpec((None, t, None, group, self.head_dim), lambda i, b, n: (b, 0, n, 0, 0))
        self.numbers_of_group = pl.BlockSpec((None, None, group, t), lambda i, b, n: (b, n, 0, 0))

    def queries(self, blocks: _Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, blocks.queries, None, self.head_dim), lambda i, b, n: (b, i, n, 0))

    def numbers_of_queries(self, blocks: _Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, blocks.queries), lambda i, b, n: (b, n, i))

    def block_of_keys(self, blocks: _Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.head_dim, blocks.keys), lambda i, b, n: (b, n, 0, i))

    def block_of_values(self, blocks: _Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, blocks.keys, self.head_dim), lambda i, b, n: (b, n, i, 0))

    def bounds(self, bounds: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, bounds.shape[1]), lambda i, b, n: (b, 0))


def needed_blocks(
    segments: jax.Array, positions: jax.Array, window: int | None, query_size: int, key_size: int
) -> tuple[jax.Array, jax.Array]:
    """For each block of queries the first block of keys that it needs, and for each block of keys the end of the blocks
    of queries that need it, `[B, blocks]`; blocks between these may be masked as a whole.

    segments, positions: `[B, T]`. query_size, key_size: tokens of a block.
    """
    b, t = segments.shape
    # Padding comes last: numbered so, a block of it and of the last row does not seem to need the rows before.
    ordered = jnp.where(segments == 0, t + 1, segments)
    query_segments, key_segments = (ordered.reshape(b, -1, size) for size in (query_size, key_size))
    lowest_segment, highest_segment = query_segments.min(axis=2)[:, :, None], query_segments.max(axis=2)[:, :, None]
    lowest_key_segment, highest_key_segment = key_segments.min(axis=2)[:, None], key_segments.max(axis=2)[:, None]
    needed = (highest_key_segment >= lowest_segment) & (lowest_key_segment <= highest_segment)
    needed |= lowest_key_segment == SHARED
    last_query = jnp.arange(query_size - 1, t, query_size)
    needed &= last_query[:, None] >= jnp.arange(0, t, key_size)
    if window is not None:
        lowest_position = positions.reshape(b, -1, query_size).min(axis=2)[:, :, None]
        highest_key_position = positions.reshape(b, -1, key_size).max(axis=2)[:, None]
        needed &= lowest_position - highest_key_position < window
    first_key = jnp.argmax(needed, axis=2)
    end_query = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=1)
    return first_key.astype(jnp.int32), end_query.astype(jnp.int32)


def _end_key(blocks: _Blocks, i: jax.Array) -> jax.Array:
    """The end of the blocks of keys that are not after all queries of block i."""
    return jax.lax.div((i + 1) * blocks.queries + (blocks.keys - 1), blocks.keys)


def _block_of(marks: _Marks, number: jax.Array, size: int) -> _Marks:
    return _Marks(*(ref[pl.ds(number * size, size)] for ref in marks))


def _scores(
    spec: _Spec, blocks: _Blocks, head_dim: int, queries: jax.Array, keys: jax.Array,
    query_marks: _Marks, key_marks: _Marks, i: jax.Array, j: jax.Array,
) -> jax.Array:  # fmt: skip
    """The scores `[queries, keys]`, float32, of one pair of blocks; `MASKED` where a query sees no key."""
    scores = softcapped(plgpu.dot(queries, keys) * head_dim**-0.5, spec.softcap)
    offset = i * blocks.queries - j * blocks.keys
    segments, positions = zip(query_marks, key_marks)
    return jnp.where(sees(*segments, *positions, offset, spec.window), scores, MASKED)


def _gradient_of_scores(
    spec: _Spec, head_dim: int, scores: jax.Array, weights: jax.Array, by_weights: jax.Array, mean: jax.Array
) -> jax.Array:
    """The gradient of the products of queries and keys, from that of the weights, `[queries, keys]`."""
    by_scores = weights * (by_weights - mean[:, None])
    if spec.softcap is not None:
        # Masked scores are far below the bound, and their weights are zero.
        ratio = jnp.maximum(scores, -spec.softcap) / spec.softcap
        by_scores *= 1 - ratio * ratio
    return by_scores * head_dim**-0.5


def _load(ref: Any, head_dim: int, axis: int) -> jax.Array:
    """A matrix, with zeros where the axis of the heads is padded."""
    return plgpu.load(ref, mask=_inside(ref.shape, head_dim, axis), other=0.0)


def _store(ref: Any, matrix: jax.Array, head_dim: int, axis: int) -> None:
    plgpu.store(ref, matrix.astype(ref.dtype), mask=_inside(ref.shape, head_dim, axis))


def _inside(shape: tuple[int, ...], head_dim: int, axis: int) -> jax.Array:
    channels = jnp.arange(shape[axis]) < head_dim
    return channels[:, None] if axis == 0 else channels[None, :]
