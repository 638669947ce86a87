"""Attention over packed, padded or cached tokens: the choice of an implementation, and the plain one."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from secvec_jax.model.attention_blockwise import blockwise
from secvec_jax.model.attention_masks import KERNEL, MASKED, joined, softcapped, visible
from secvec_jax.model.attention_splash import LANES, splash
from secvec_jax.model.kv_cache import KVCache
from secvec_jax.sharding import device_kind, platform

Attend = Callable[[jax.Array, Sequence[jax.Array], Sequence[jax.Array]], jax.Array]
"""Attention with its mask bound: queries `[B, T, N, H]`, segments of keys `[B, K, H, S_i]` and of values
`[B, K, S_i, H]` -> `[B, T, N, H]`."""

Path = Literal["plain", "blocks of queries", "splash", "triton", "blockwise"]
"""How self-attention is computed.

plain: matrix products over all scores. blocks of queries: the same without the scores of later keys. splash: the fused
kernel for TPUs. triton: the fused kernel for GPUs. blockwise: an online softmax in plain JAX.
"""

PATHS: dict[Path, str] = {
    "plain": "plain, with all scores in memory",
    "blocks of queries": "plain, in blocks of queries",
    "splash": "Splash, fused",
    "triton": "Triton, fused",
    "blockwise": "blockwise, with an online softmax",
}
"""The name of each in the summary of a training."""

_PRE_AMPERE = ("GTX", "TITAN", "Quadro", "RTX 20")
"""Parts of the names of NVIDIA GPUs for which Triton does not compile products of 16-bit matrices."""

_TRITON_MULTIPLE = 128
"""Sequences of a multiple of this many tokens are whole blocks of all Triton kernels."""

_SMALLEST_QUERY_BLOCK = 128
_MAX_QUERY_BLOCKS = 8
"""Each block of queries is compiled separately, and more blocks would skip few more keys."""


def attention_path(
    length: int, head_dim: int, dtype: DTypeLike, *, shared_prefix: bool = True, prefix_len: int = 0
) -> Path:
    """How self-attention over sequences of `length` tokens is computed on the platform that programs are compiled for.

    dtype: of activations. shared_prefix: whether tokens may have the segment `SHARED`. prefix_len: the number of keys
    of adapters.
    """
    backend = platform()
    if backend == "cpu":
        return "plain" if prefix_len else "blocks of queries"
    if backend == "tpu" and not shared_prefix and not prefix_len and length % LANES == 0:
        return "splash"
    if backend == "gpu" and not prefix_len and _triton_takes(length, head_dim, dtype):
        return "triton"
    return "blockwise"


def _triton_takes(length: int, head_dim: int, dtype: DTypeLike) -> bool:
    kind = device_kind()
    supported = kind.startswith("NVIDIA") and not any(name in kind for name in _PRE_AMPERE)
    return supported and length % _TRITON_MULTIPLE == 0 and head_dim <= 256 and jnp.dtype(dtype).itemsize == 2


def self_attention(
    segments: jax.Array,
    positions: jax.Array,
    *,
    path: Path,
    window: int | None,
    shared_prefix: bool,
    prefix_len: int = 0,
    softcap: float | None = None,
) -> Attend:
    """Attention of packed sequences `[B, T]` over themselves, and over `prefix_len` keys of adapters before them.

    path: `attention_path` of the same arguments.
    """
    marks: dict[str, Any] = {"segments": segments, "positions": positions}
    match path:
        case "splash":
            return partial(splash, segments=segments, window=window, softcap=softcap)
        case "triton":
            from secvec_jax.model.attention_triton import triton  # Pallas takes a tenth of a second to import

            return partial(triton, **marks, window=window, softcap=softcap)
        case "blockwise":
            return partial(blockwise, **marks, window=window, shared_prefix=shared_prefix, softcap=softcap)
    mask = visible(segments, segments, positions, positions, window=window)
    if path == "plain":
        return partial(attend, mask=_after_prefix(prefix_len, mask), softcap=softcap)
    return partial(_in_blocks, mask=mask, softcap=softcap)


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
        key, value = joined(keys, len(query), axis=3), joined(values, len(query), axis=2)
        return jax.nn.dot_product_attention(query, key.transpose(0, 3, 1, 2), value.swapaxes(1, 2), mask=mask)
    return _attend_by_batched_products(query, keys, values, mask, softcap)


def _in_blocks(query, keys, values, mask, softcap=None):
    """Causal `attend` over one segment of keys, in blocks of queries: no scores are computed of keys after a block."""
    length = query.shape[1]
    block = max(_SMALLEST_QUERY_BLOCK, -(-length // _MAX_QUERY_BLOCKS))
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
    scores = jnp.where(mask[:, :, None], scores, MASKED)
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
