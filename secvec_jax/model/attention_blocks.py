"""The blocks of queries and keys that the fused attention kernel for GPUs works on, and which of them it needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from secvec_jax.batch import SHARED


class Blocks(NamedTuple):
    """Tokens in a block of queries and in a block of keys, the warps that compute one pair of them, and the stages of
    the pipeline that loads the next pairs."""

    queries: int
    keys: int
    warps: int
    stages: int = 2

    @property
    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


# For heads of 65 to 128 channels, these three were the fastest of eight on an H200 (benchmarks/RESULTS.md).


def forward_blocks(head_dim: int) -> Blocks:
    """The blocks of the forward pass."""
    if head_dim > 128:
        return Blocks(64, 32, 4)
    return Blocks(128, 64, 4) if head_dim <= 64 else Blocks(64, 64, 4, stages=3)


def query_gradient_blocks(head_dim: int) -> Blocks:
    """The blocks of the backward pass that computes the gradient of the queries."""
    return Blocks(32, 32, 4) if head_dim > 128 else Blocks(64, 64, 4)


def key_gradient_blocks(head_dim: int) -> Blocks:
    """The blocks of the backward pass that computes the gradients of keys and values."""
    if head_dim > 128:
        return Blocks(32, 32, 4)
    return Blocks(64, 64, 4, stages=2 if head_dim <= 64 else 1)


class BlockSpecs:
    """Which part of each array a kernel sees; its grid is (blocks, rows, heads). Heads are padded to a power of two."""

    def __init__(self, query: jax.Array, key: jax.Array) -> None:
        _, t, n, h = query.shape
        self.head_dim, group = pl.next_power_of_2(h), n // key.shape[1]
        self.marks = [pl.BlockSpec((None, t), lambda i, b, n: (b, 0))] * 2
        self.keys = pl.BlockSpec((None, None, self.head_dim, t), lambda i, b, n: (b, jax.lax.div(n, group), 0, 0))
        self.values = pl.BlockSpec((None, None, t, self.head_dim), lambda i, b, n: (b, jax.lax.div(n, group), 0, 0))
        self.queries_of_group = pl.BlockSpec((None, t, None, group, self.head_dim), lambda i, b, n: (b, 0, n, 0, 0))
        self.numbers_of_group = pl.BlockSpec((None, None, group, t), lambda i, b, n: (b, n, 0, 0))

    def queries(self, blocks: Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, blocks.queries, None, self.head_dim), lambda i, b, n: (b, i, n, 0))

    def numbers_of_queries(self, blocks: Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, blocks.queries), lambda i, b, n: (b, n, i))

    def block_of_keys(self, blocks: Blocks) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.head_dim, blocks.keys), lambda i, b, n: (b, n, 0, i))

    def block_of_values(self, blocks: Blocks) -> pl.BlockSpec:
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
    # Padding comes last and gets the highest number: with 0, its block would seem to need all rows before it.
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
