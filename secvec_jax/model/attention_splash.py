"""Splash attention, the fused kernel for TPUs: scores are never in memory."""

from collections.abc import Sequence

import jax

from secvec_jax.model.attention_masks import KERNEL, on_each_device

LANES = 128
"""Sequences are a multiple of this many tokens."""


def splash(
    query: jax.Array,
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    *,
    segments: jax.Array,
    window: int | None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention of packed sequences over themselves.

    query `[B, T, N, H]`; keys `[[B, K, H, T]]` and values `[[B, K, T, H]]`; segments `[B, T]`, without `SHARED`.
    window: as in `self_attention`. interpret: run the kernel on a CPU. Returns `[B, T, N, H]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    def one_device(query, key, value, segments):
        query, key = query.swapaxes(1, 2), key.swapaxes(2, 3)
        _, heads, length, _ = query.shape
        mask = splash_attention.CausalMask((length, length))
        if window is not None:
            mask = splash_attention.LocalMask((length, length), (window - 1, 0), 0)
        block, wide = splash_blocks(length, query.shape[-1])
        kernel = splash_attention.make_splash_mha_single_device(
            mask=splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=splash_attention.BlockSizes(
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
        segment_ids = splash_attention.SegmentIds(segments, segments)
        return jax.vmap(kernel)(query, key, value, segment_ids).swapaxes(1, 2)

    query = (query * query.shape[-1] ** -0.5).astype(keys[0].dtype)
    return on_each_device(one_device, query, keys[0], values[0], segments)


def splash_blocks(length: int, head_dim: int) -> tuple[int, int]:
    """(block size, key block size of the backward kernel, which keeps keys, values and their gradients in VMEM)."""
    widest = 2048 * LANES // max(head_dim, LANES)
    sizes = [size for size in (2048, 1024, 512, 256, LANES) if length % size == 0]
    return next(size for size in sizes if size <= 512), next(size for size in sizes if size <= widest)
