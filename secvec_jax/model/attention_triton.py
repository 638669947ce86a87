"""The fused attention kernel for NVIDIA GPUs, in Triton through Pallas: scores are never in memory.

JAX has a Triton kernel with segments (`jax.experimental.pallas.ops.gpu.attention.mha`), after which this one is
modeled. This one also supports grouped heads, sliding windows, soft caps and a prefix that all rows of a sequence
share, skips blocks of other segments, and keeps its residuals where a remat policy says so. (cuDNN's attention takes
packed rows only as a bias `[T, T]`.)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from secvec_jax.model.attention_blocks import (
    Blocks,
    BlockSpecs,
    forward_blocks,
    key_gradient_blocks,
    needed_blocks,
    query_gradient_blocks,
)
from secvec_jax.model.attention_masks import KERNEL, MASKED, on_each_device, sees, softcapped


class _Spec(NamedTuple):
    """What the compiled kernels depend on besides shapes."""

    window: int | None
    softcap: float | None
    interpret: bool


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
    blocks = forward_blocks(h)
    first_key, _ = needed_blocks(*marks, spec.window, blocks.queries, blocks.keys)
    specs = BlockSpecs(query, key)
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
        compiler_params=blocks.compiler_params,
        interpret=spec.interpret,
        name="packed_attention_forward",
    )(query, key, value, *marks, first_key)


def _forward_kernel(
    spec: _Spec, blocks: Blocks, head_dim: int,
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
    # What the softmax's normalization subtracts from every score's gradient.
    mean = jnp.sum(out.astype(jnp.float32) * slope.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    of_softmax = slope, log_total, mean
    query_gradient = _query_gradient(spec, query, key, value, marks, *of_softmax)
    key_gradient, value_gradient = _key_gradient(spec, query, key, value, marks, *of_softmax)
    return query_gradient, key_gradient, value_gradient, None


def _query_gradient(
    spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks, *of_softmax: jax.Array
) -> jax.Array:
    """The gradient of the query. of_softmax: the output's gradient `[B, T, N, H]`, the logarithm of the softmax's sum
    and the mean of its gradient, `[B, N, T]`."""
    b, t, n, h = query.shape
    blocks, specs = query_gradient_blocks(h), BlockSpecs(query, key)
    first_key, _ = needed_blocks(*marks, spec.window, blocks.queries, blocks.keys)
    return pl.pallas_call(
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
        compiler_params=blocks.compiler_params,
        interpret=spec.interpret,
        name="packed_attention_query_gradient",
    )(query, key, value, *marks, first_key, *of_softmax)


def _key_gradient(
    spec: _Spec, query: jax.Array, key: jax.Array, value: jax.Array, marks: _Marks, *of_softmax: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of the key and of the value. of_softmax: as in `_query_gradient`."""
    b, t, n, h = query.shape
    kv_heads = key.shape[1]
    blocks, specs = key_gradient_blocks(h), BlockSpecs(query, key)
    _, end_query = needed_blocks(*marks, spec.window, blocks.queries, blocks.keys)

    def by_group(x: jax.Array, axis: int) -> jax.Array:
        """The axis of heads split in two, `[..., K, G, ...]`."""
        return x.reshape(*x.shape[:axis], kv_heads, n // kv_heads, *x.shape[axis + 1 :])

    slope, log_total, mean = of_softmax
    return pl.pallas_call(
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
        compiler_params=blocks.compiler_params,
        interpret=spec.interpret,
        name="packed_attention_key_gradient",
    )(by_group(query, 2), key, value, *marks, end_query, by_group(slope, 2), by_group(log_total, 1), by_group(mean, 1))


_attend.defvjp(_forward_rule, _backward_rule)


def _query_gradient_kernel(
    spec: _Spec, blocks: Blocks, head_dim: int,
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
    spec: _Spec, blocks: Blocks, head_dim: int,
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


def _end_key(blocks: Blocks, i: jax.Array) -> jax.Array:
    """The end of the blocks of keys that are not after all queries of block i."""
    return jax.lax.div((i + 1) * blocks.queries + (blocks.keys - 1), blocks.keys)


def _block_of(marks: _Marks, number: jax.Array, size: int) -> _Marks:
    return _Marks(*(ref[pl.ds(number * size, size)] for ref in marks))


def _scores(
    spec: _Spec, blocks: Blocks, head_dim: int, queries: jax.Array, keys: jax.Array,
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
