"""Attention over packed, padded or cached tokens: masks, kernels, and the choice of a kernel by platform."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from secvec_jax.batch import SHARED
from secvec_jax.model.kv_cache import KVCache
from secvec_jax.sharding import AXIS_RULES, platform

Attend = Callable[[jax.Array, Sequence[jax.Array], Sequence[jax.Array]], jax.Array]
"""Attention with its mask bound: queries `[B, T, N, H]`, segments of keys `[B, K, H, S_i]` and of values
`[B, K, S_i, H]` -> `[B, T, N, H]`."""

KERNEL = "attention"
"""The name by which remat policies recognize the output of attention, to keep it for the backward pass."""

_LANES = 128
_MAX_QUERY_BLOCKS = 8
"""Each block of queries is compiled separately, and more blocks would skip few more keys."""


def self_attention(
    segments: jax.Array,
    positions: jax.Array,
    *,
    window: int | None,
    shared_prefix: bool,
    prefix_len: int = 0,
    softcap: float | None = None,
) -> Attend:
    """Attention of packed sequences `[B, T]` over themselves, and over `prefix_len` keys of adapters before them.

    shared_prefix: whether tokens may have the segment `SHARED`, which the fused kernel for TPUs does not support.
    """
    if prefix_len:
        mask = visible(segments, segments, positions, positions, window=window)
        return partial(attend, mask=_after_prefix(prefix_len, mask), softcap=softcap)
    if platform() == "tpu" and not shared_prefix and segments.shape[1] % _LANES == 0:
        return partial(_splash, segments=segments, window=window, softcap=softcap)
    mask = visible(segments, segments, positions, positions, window=window)
    return partial(_in_blocks if platform() == "cpu" else attend, mask=mask, softcap=softcap)


def cached_attention(
    segments: jax.Array,
    positions: jax.Array,
    cache: KVCache,
    *,
    window: int | None,
    in_cache: bool,
    prefix_len: int = 0,
    softcap: float | None = None,
) -> Attend:
    """Attention of tokens `[B, T]` over a cache and over themselves, and over `prefix_len` keys of adapters before it.

    in_cache: whether the tokens' own keys are already in the cache, from slot `cache.length` on; else they are one more
    segment of keys after it.
    """
    over_cache = visible(segments, cache.segments, positions, cache.positions, cache.length, window)
    if in_cache:
        mask = _after_prefix(prefix_len, over_cache)
    else:
        over_themselves = visible(segments, segments, positions, positions, window=window)
        mask = _after_prefix(prefix_len, over_cache, over_themselves)
    return partial(attend, mask=mask, softcap=softcap)


def _after_prefix(prefix_len: int, *masks: jax.Array) -> jax.Array:
    """The masks `[B, 1, T, S_i]`, concatenated after `prefix_len` keys that every query sees."""
    everywhere = jnp.ones((*masks[0].shape[:3], prefix_len), bool)
    return jnp.concatenate([everywhere, *masks], axis=-1)


def visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    offset: jax.Array | int = 0,
    window: int | None = None,
) -> jax.Array:
    """Which keys each query may see, a mask `[B, 1, T, S]`.

    A token sees the tokens of its own segment and of the shared prefix (segment `SHARED`) at its own slot or earlier
    ones. offset: the slot of the first query among the keys. window: how many positions a token sees, its own included.
    Segment 0 is padding.
    """
    query_slots = jnp.arange(query_segments.shape[1]) + offset
    key_slots = jnp.arange(key_segments.shape[1])
    mask = (query_segments[:, :, None] == key_segments[:, None, :]) | (key_segments == SHARED)[:, None, :]
    mask &= query_slots[:, None] >= key_slots[None, :]
    if window is not None:
        mask &= query_positions[:, :, None] - key_positions[:, None, :] < window
    return mask[:, None]


def softcapped(x: jax.Array, bound: float | None) -> jax.Array:
    """`c tanh(x / c)`, which is within c of zero (Gemma 2's soft cap); `x` itself where `bound` is None."""
    return x if bound is None else bound * jnp.tanh(x / bound)


def attend(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    mask: jax.Array,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped key-value heads, over one or more segments of keys (shared, cached, new).

    query `[B, T, N, H]`; keys `[B, K, H, S_i]` and values `[B, K, S_i, H]`, where N is a multiple of K. A segment that
    is the same for all rows may be `[1, ...]`. mask `[B, 1, T, S]`, with S the sum of the S_i. softcap: the bound of
    the scores, which are float32. Returns `[B, T, N, H]`.
    """
    if platform() != "cpu" and softcap is None:  # JAX's own attention has no soft cap
        key, value = (
            jnp.concatenate([jnp.broadcast_to(part, (len(query), *part.shape[1:])) for part in parts], axis=axis)
            for parts, axis in ((keys, 3), (values, 2))
        )
        return jax.nn.dot_product_attention(query, key.transpose(0, 3, 1, 2), value.swapaxes(1, 2), mask=mask)
    return _attend_by_batched_products(query, keys, values, mask, softcap)


def _in_blocks(query, keys, values, mask, softcap=None):
    """Causal `attend` over one segment of keys, in blocks of queries: no scores are computed of keys after a block."""
    length = query.shape[1]
    block = max(_LANES, -(-length // _MAX_QUERY_BLOCKS))
    [keys], [values] = keys, values
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        block_mask = mask[:, :, start:end, :end]
        outputs.append(attend(query[:, start:end], (keys[..., :end],), (values[:, :, :end],), block_mask, softcap))
    return jnp.concatenate(outputs, axis=1)


def _attend_by_batched_products(query, keys, values, mask, softcap=None):
    """`attend` as batched matrix products, which take half the time of JAX's attention on XLA's CPU backend.

    Only the scores of the segments are concatenated, so no cache is copied to append new keys to it.
    """
    b, t, n, h = query.shape
    k = keys[0].shape[1]
    query = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
    scores = jnp.concatenate([_product_of_rows(query, key, jnp.float32) for key in keys], axis=-1)
    s = scores.shape[-1]
    scores = softcapped(scores.reshape(b, k, n // k, t, s) * h**-0.5, softcap)
    scores = jnp.where(mask[:, :, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).reshape(b, k, -1, s).astype(values[0].dtype)
    ends = np.cumsum([value.shape[2] for value in values])[:-1]
    weights_by_segment = jnp.split(weights, ends, axis=-1)
    out = sum(_product_of_rows(weight, value, value.dtype) for weight, value in zip(weights_by_segment, values))
    out = out.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
    return checkpoint_name(out, KERNEL)


def _product_of_rows(rows: jax.Array, table: jax.Array, dtype) -> jax.Array:
    """The product of `[B, K, R, X]` and `[B, K, X, Y]`, or `[1, K, X, Y]`, which is then read once for all B."""
    if len(table) == len(rows):
        return jnp.matmul(rows, table, preferred_element_type=dtype)
    b, k, r, x = rows.shape
    out = jnp.matmul(rows.swapaxes(0, 1).reshape(k, b * r, x), table[0], preferred_element_type=dtype)
    return out.reshape(k, b, r, -1).swapaxes(0, 1)


def _splash(query, keys, values, *, segments, window, softcap=None, interpret=False):
    """Splash attention, the fused kernel for TPUs, on each device's rows and heads; scores are never in memory."""
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
        rows, heads = P(AXIS_RULES["batch"]), P(AXIS_RULES["batch"], AXIS_RULES["heads"])
        run = jax.shard_map(run, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    query = query.swapaxes(1, 2) * query.shape[-1] ** -0.5
    return run(query.astype(keys[0].dtype), keys[0].swapaxes(2, 3), values[0], segments).swapaxes(1, 2)


def _splash_blocks(length: int, head_dim: int) -> tuple[int, int]:
    """(block size, key block size of the backward kernel, which keeps keys, values and their gradients in VMEM)."""
    widest = 2048 * _LANES // max(head_dim, _LANES)
    sizes = [size for size in (2048, 1024, 512, 256, _LANES) if length % size == 0]
    return next(size for size in sizes if size <= 512), next(size for size in sizes if size <= widest)


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) of `x` `[B, T, N, H]`, in the half-split layout of Hugging Face.

    positions `[B, T]`; frequencies `[H / 2]`, in radians per position.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if platform() == "tpu":
        return _rotate_by_product(x, angles)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotate_by_product(x: jax.Array, angles: jax.Array) -> jax.Array:
    """`rotate`, swapping the halves by a product with zeros and ones: TPUs pad half a head to a whole register."""
    cos, sin = (jnp.concatenate([f(angles)] * 2, axis=-1)[:, :, None] for f in (jnp.cos, jnp.sin))
    one = np.eye(x.shape[-1] // 2)
    swap = jnp.asarray(np.block([[0 * one, one], [-one, 0 * one]]), x.dtype)
    swapped = jax.lax.dot_general(x, swap, (((3,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
