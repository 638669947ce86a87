"""Attention over packed, padded or cached tokens: the only place that chooses a kernel."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from secvec_jax.batch import SHARED
from secvec_jax.sharding import AXIS_RULES, platform

Attend = Callable[[jax.Array, Sequence[jax.Array], Sequence[jax.Array]], jax.Array]
"""Query `[B, T, N, H]`, runs of keys `[B, K, H, S_i]` and of values `[B, K, S_i, H]` -> `[B, T, N, H]`."""

KERNEL = "attention"
"""The name under which a fused kernel's results can be kept for the backward pass."""

_LANES = 128
_BLOCKS = 8
"""More blocks of queries would skip little more, and each is a program of its own."""


def among_themselves(
    segments: jax.Array, positions: jax.Array, *, window: int | None, shared: bool, softcap: float | None = None
) -> Attend:
    """Attention of packed lines `[B, T]` over themselves.

    shared: whether a token may be of the segment `SHARED`, which TPUs' fused kernel does not know.
    """
    if platform() == "tpu" and not shared and segments.shape[1] % _LANES == 0:
        return partial(_splash, segments=segments, window=window, softcap=softcap)
    mask = visible(segments, segments, positions, positions, window=window)
    return partial(_in_blocks if platform() == "cpu" else attend, mask=mask, softcap=softcap)


def visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    offset: jax.Array | int = 0,
    window: int | None = None,
) -> jax.Array:
    """Which keys each query may see, `[B, 1, T, S]`.

    A token sees tokens of its own segment, and of the segment `SHARED`, at its own slot or before; the queries
    start at slot `offset` of the keys. Segment 0 is padding. `window` bounds how many positions back are seen.
    """
    query_slots = jnp.arange(query_segments.shape[1]) + offset
    key_slots = jnp.arange(key_segments.shape[1])
    shown = (query_segments[:, :, None] == key_segments[:, None, :]) | (key_segments == SHARED)[:, None, :]
    shown &= query_slots[:, None] >= key_slots[None, :]
    if window is not None:
        shown &= query_positions[:, :, None] - key_positions[:, None, :] < window
    return shown[:, None]


def softcapped(x: jax.Array, bound: float | None) -> jax.Array:
    """`c tanh(x / c)` for a bound c (Gemma 2), `x` without one."""
    return x if bound is None else bound * jnp.tanh(x / bound)


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    mask: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped key-value heads, over one or more runs of keys: shared, cached, fresh ones.

    query `[B, T, N, H]`; keys `[B, K, H, S_i]` and values `[B, K, S_i, H]`, with N a multiple of K; those of a run
    that is the same for all rows may be `[1, ...]`. mask `[B, 1, T, S]` with S the sum of the S_i; returns
    `[B, T, N, H]`. Scores are held in float32, and bound by `softcap`, which XLA's own attention has not.
    """
    if platform() != "cpu" and softcap is None:
        key, value = (
            jnp.concatenate([jnp.broadcast_to(run, (len(query), *run.shape[1:])) for run in runs], axis=axis)
            for runs, axis in ((keys, 3), (values, 2))
        )
        return jax.nn.dot_product_attention(query, key.transpose(0, 3, 1, 2), value.swapaxes(1, 2), mask=mask)
    return _attend_by_batched_products(query, keys, values, mask, softcap)


def _in_blocks(query, keys, values, mask, softcap=None):
    """`attend` for one run of keys, block by block of queries: none is compared with the keys behind its block."""
    length = query.shape[1]
    block = max(_LANES, -(-length // _BLOCKS))
    [keys], [values] = keys, values
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        seen = mask[:, :, start:end, :end]
        parts.append(attend(query[:, start:end], (keys[..., :end],), (values[:, :, :end],), seen, softcap))
    return jnp.concatenate(parts, axis=1)


def _attend_by_batched_products(query, keys, values, mask, softcap=None):
    """The same as batched matrix products: half the time of the general one on XLA's CPU backend.

    The runs meet in the scores alone, so that no cache is copied to put fresh keys behind it.
    """
    (b, t, n, h), k = query.shape, keys[0].shape[1]
    query = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
    scores = jnp.concatenate([_product_of_rows(query, key, jnp.float32) for key in keys], axis=-1)
    s = scores.shape[-1]
    scores = softcapped(scores.reshape(b, k, n // k, t, s) * h**-0.5, softcap)
    scores = jnp.where(mask[:, :, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, k, -1, s).astype(values[0].dtype)
    ends = np.cumsum([value.shape[2] for value in values])[:-1]
    parts = zip(jnp.split(weights, ends, axis=-1), values)
    out = sum(_product_of_rows(part, value, value.dtype) for part, value in parts)
    out = out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
    return checkpoint_name(out, KERNEL)


def _product_of_rows(rows: jax.Array, table: jax.Array, dtype) -> jax.Array:
    """`[B, K, R, X]` times `[B, K, X, Y]`, or times `[1, K, X, Y]`, read once for all rows."""
    if len(table) == len(rows):
        return jnp.matmul(rows, table, preferred_element_type=dtype)
    b, k, r, x = rows.shape
    out = jnp.matmul(rows.swapaxes(0, 1).reshape(k, b * r, x), table[0], preferred_element_type=dtype)
    return out.reshape(k, b, r, -1).swapaxes(0, 1)


def _splash(query, keys, values, *, segments, window, softcap=None, interpret=False):
    """Splash attention, the TPU's fused kernel, on each device's lines and heads; no scores in memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def one_device(query, key, value, segments):
        _, heads, length, _ = query.shape
        mask = splash.CausalMask((length, length))
        if window is not None:
            mask = splash.LocalMask((length, length), (window - 1, 0), 0)
        block, wide = _splash_blocks(length, query.shape[-1])
        kernel = splash.make_splash_mha_single_device(
            mask=splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                # The backward kernel writes a gradient of the queries for each block of keys.
                block_kv_dkv=wide,
                block_kv_dkv_compute=block,
                use_fused_bwd_kernel=True,
            ),
            residual_checkpoint_name=KERNEL,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.vmap(kernel)(query, key, value, splash.SegmentIds(segments, segments))

    run = one_device
    if not jax.sharding.get_abstract_mesh().empty:
        lines, heads = P(AXIS_RULES["batch"]), P(AXIS_RULES["batch"], AXIS_RULES["heads"])
        run = jax.shard_map(run, in_specs=(heads, heads, heads, lines), out_specs=heads, check_vma=False)
    query = query.swapaxes(1, 2) * query.shape[-1] ** -0.5
    return run(query.astype(keys[0].dtype), keys[0].swapaxes(2, 3), values[0], segments).swapaxes(1, 2)


def _splash_blocks(length: int, head_dim: int) -> tuple[int, int]:
    """Splash's blocks, and those of keys in its backward kernel, which keeps them and their gradients in VMEM."""
    widest = 2048 * _LANES // max(head_dim, _LANES)
    sizes = [size for size in (2048, 1024, 512, 256, _LANES) if length % size == 0]
    return next(size for size in sizes if size <= 512), next(size for size in sizes if size <= widest)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face, `[B, T, N, H]`."""
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if platform() == "tpu":
        return _rotate_by_product(x, angles)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotate_by_product(x: jax.Array, angles: jax.Array) -> jax.Array:
    """The same with the halves swapped by a product with zeros and ones: TPUs pad half a head to a whole register."""
    cos, sin = (jnp.concatenate([f(angles)] * 2, axis=-1)[:, :, None] for f in (jnp.cos, jnp.sin))
    one = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * one, one], [-one, 0 * one]]), x.dtype)
    swapped = jax.lax.dot_general(x, swap, (((3,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
