"""Attention kernels measured by `gpu.py`: one layer's attention over packed sequences, forward and backward."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_rows import MOST, Row, config, packed, segment_starts, timed

from secvec_jax.inference import compute_dtype
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.attention import attention_path, self_attention
from secvec_jax.model.attention_masks import visible
from secvec_jax.model.hf_config import from_hf_config

Marks = dict[str, jax.Array]
"""`segments`, `positions` `[B, T]`; `starts`, `lengths` of the segments `[B, segments]`; boolean attention `mask`
`[B, 1, T, T]`."""

Kernel = Callable[[Marks, jax.Array, jax.Array, jax.Array], jax.Array]
"""Query `[B, T, N, H]`, key and value `[B, T, K, H]` -> `[B, T, N, H]`."""


class Problem(NamedTuple):
    """Packed sequences of several segments each, and the architecture of the attention heads."""

    architecture: Architecture
    lines: int
    length: int
    segments: int

    def marks(self) -> Marks:
        batch = packed(self.lines, self.length, self.segments, self.architecture.vocab_size)
        segments, positions = jnp.asarray(batch["segments"]), jnp.asarray(batch["positions"])
        starts = segment_starts(self.lines, self.length, self.segments)
        return {
            "segments": segments,
            "positions": positions,
            "starts": jnp.asarray(starts),
            "lengths": jnp.asarray(np.diff(starts, append=np.int32(self.length)).astype(np.int32)),
            "mask": visible(segments, segments, positions, positions),
        }


def library(marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The kernel that training uses on this device."""
    path = attention_path(query.shape[1], query.shape[3], query.dtype, shared_prefix=False)
    attend = self_attention(marks["segments"], marks["positions"], path=path, window=None, shared_prefix=False)
    return attend(query, [key.transpose(0, 2, 3, 1)], [value.swapaxes(1, 2)])


def masked(
    marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array, implementation: str | None = None
) -> jax.Array:
    """`jax.nn.dot_product_attention` with the boolean mask of packed sequences."""
    return jax.nn.dot_product_attention(query, key, value, mask=marks["mask"], implementation=implementation)


def cudnn_rows(marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention with a length per row: the same rows, padded to the longest instead of packed (see `shape`)."""
    lengths = marks["lengths"].reshape(-1)
    ends = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn", **ends)


def cudnn_offsets(marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Causal attention within segments given by offsets: cuDNN's native packing, which `jax.nn` does not expose."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths, offsets = marks["lengths"], jnp.pad(marks["starts"], ((0, 0), (0, 1)), constant_values=-1)
    where = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
    settings = {"scale": query.shape[-1] ** -0.5, "mask_type": MaskType.PADDING_CAUSAL}
    # JAX computes the strides of keys and values from the number of query heads.
    key, value = (repeated(x, query.shape[2]) for x in (key, value))
    return dot_product_attention(query, key, value, **where, **settings)


def triton(marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array, block: int | None = None) -> jax.Array:
    """The Pallas kernel with segment ids. block: block size of all its loops; None: the kernel's defaults."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    sizes = BlockSizes.get_default() if block is None else BlockSizes(*[block] * 6)
    key, value = (repeated(x, query.shape[2]) for x in (key, value))
    return mha(query, key, value, marks["segments"], query.shape[-1] ** -0.5, True, sizes)


def repeated(x: jax.Array, heads: int) -> jax.Array:
    """Repeat key or value heads, for kernels that do not support grouped-query attention."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


ROWS_WITH_LENGTHS = "cudnn, rows with lengths"

KERNELS: dict[str, Kernel] = {
    "as the library": library,
    "xla, packed mask": partial(masked, implementation="xla"),
    "cudnn, packed mask": partial(masked, implementation="cudnn"),
    ROWS_WITH_LENGTHS: cudnn_rows,
    "cudnn, packed offsets": cudnn_offsets,
    "triton, segments": triton,
    "triton, segments, blocks of 64": partial(triton, block=64),
}


def attention(row: Row) -> dict[str, Any]:
    """Measure the row's kernel for every model and length; `error` gives the reason where it is not available."""
    results: dict[str, Any] = {}
    for model, length in row["cases"]:
        problem = Problem(from_hf_config(config(model)), row["tokens"] // length, length, row["segments"])
        try:
            results[f"{model} {length}"] = times(row["kind"], problem)
        except Exception as error:  # kernels and their compilers fail with many kinds of errors
            results[f"{model} {length}"] = {"error": (str(error).strip().splitlines() or [repr(error)])[0][:300]}
    return {"attempt": 0, "shapes": results, "device": jax.devices()[0].device_kind}


def times(kind: str, problem: Problem) -> dict[str, Any]:
    """Measure both passes: seconds, TFLOP/s, temporary memory and the difference from exact results.

    TFLOP/s count 3a per token with a = 2 T d, as if each sequence were one segment, whatever the kernel computes.
    """
    marks = problem.marks()
    lines, length = shape(kind, marks)
    a, dtype = problem.architecture, compute_dtype()
    keys, heads = jax.random.split(jax.random.key(0), 4), (a.num_heads, a.num_kv_heads, a.num_kv_heads, a.num_heads)
    inputs = [jax.random.normal(k, (lines, length, n, a.head_dim), dtype) for k, n in zip(keys, heads)]
    program = jax.jit(partial(both_passes, KERNELS[kind])).lower(marks, *inputs).compile()
    seconds = timed(lambda: jax.block_until_ready(program(marks, *inputs)), 2 * MOST)
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "steps": seconds,
        "tflops": 6 * problem.lines * problem.length**2 * a.num_heads * a.head_dim / median / 1e12,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "difference": None if kind == ROWS_WITH_LENGTHS else difference(program(marks, *inputs), marks, inputs),
    }


def both_passes(kernel: Kernel, marks: Marks, query: jax.Array, key: jax.Array, value: jax.Array, slope: jax.Array):
    """Return the output, and the gradients of query, key and value given that of the output."""
    out, pull = jax.vjp(partial(kernel, marks), query, key, value)
    return out, *pull(slope)


def shape(kind: str, marks: Marks) -> tuple[int, int]:
    """Return (sequences, length); rows that are not packed take one sequence each, padded to the longest."""
    if kind != ROWS_WITH_LENGTHS:
        return marks["segments"].shape
    return marks["lengths"].size, -(-int(marks["lengths"].max()) // 128) * 128


def difference(results: tuple[jax.Array, ...], marks: Marks, inputs: list[jax.Array]) -> float:
    """Return the largest difference from XLA in float32 of the first sequence's output and gradients.

    Differences are relative to the largest value of each array.
    """
    first = [x[:1].astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(both_passes, masked))({"mask": marks["mask"][:1]}, *first)
    return max(float(jnp.abs(x[:1] - y).max() / jnp.abs(y).max()) for x, y in zip(results, exact))
