"""Frozen weights in fewer bits: bfloat16, int8 and nf4 (4-bit NormalFloat: QLoRA, Dettmers et al. 2023).

    model = load("owner/name", "nf4")              # quantized tensor by tensor, as it is read
    decoder = with_precision(decoder, "int8")      # a decoder that is in memory

A quantized kernel W `[in, out]` consists of integer codes and scales. Its layer dequantizes W inside its own program,
forward and backward, so at most one layer's W exists in float32 at a time:

    nf4     W[i, o] = NF4[code[i, o]] * scale[i // 64, o]      4.5 bits: a code of 4, and a float32 scale for 64 of them
    int8    W[i, o] = code[i, o] * scale[o]                    8 bits: one scale per output channel

These are the formats of bitsandbytes: its blocks of 64 are along the inputs of one output channel, and its int8 weights
have one scale per output channel. 8 bits need no finer scale, and one per output channel does not depend on how inputs
are sharded. Only kernels are quantized, as in QLoRA: embeddings and the head are bfloat16, norms and biases float32.

Quantized weights cannot be trained. A task LoRA that is merged into them is stored separately, as float32 factors:
quantized, most of it would be lost.

qwix (0.1.8) has both formats, but cannot insert adapters between the dequantized weight and the matrix product: it
replaces `dot_general`. The tests compare with it and with bitsandbytes.
"""

import itertools
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.sharding import LogicalAxes, num_shards

Precision = Literal["float32", "bfloat16", "int8", "nf4"]
"""Storage precision of weights."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def is_quantized(precision: Precision) -> bool:
    """Whether kernels are quantized, that is, stored as integer codes and scales."""
    return precision in ("int8", "nf4")


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The value of each nf4 code (QLoRA, appendix E)."""

BLOCK = 64
"""Inputs that share a scale in nf4."""


class QuantizedKernel(nnx.Module):
    """The int8 or nf4 kernel of a projection, of one layer or stacked over layers; it replaces the array in a `Linear`.

    codes: int8 `[in, out]`; or, of nf4, uint8 `[in / 2, out]`: in each block of inputs, the first half in the low four
    bits and the second half in the high ones. scales: float32 `[blocks, out]`. update: None, or factors `[in, r]` and
    `[r, out]`, float32, whose product is added to the weight.
    """

    def __init__(
        self,
        precision: Precision,
        codes: jax.Array,
        scales: jax.Array,
        axes: LogicalAxes,
        update: tuple[jax.Array, jax.Array] | None = None,
    ):
        self.precision = precision
        *layers, inputs, outputs = axes
        self.axes_of_kernel = axes
        # Too few scales to divide over the mesh are replicated, as they are small.
        self.codes = nnx.Param(codes, axes=(*layers, _if_divides(codes.shape[-2], inputs), outputs))
        self.scales = nnx.Param(scales, axes=(*layers, _if_divides(scales.shape[-2], inputs), outputs))
        a, b = (None, None) if update is None else update
        a_axis, b_axis = ("hidden" if axis == "embed" else axis for axis in (inputs, outputs))
        self.update_a = None if a is None else nnx.Param(a, axes=(*layers, a_axis, "rank"))
        self.update_b = None if b is None else nnx.Param(b, axes=(*layers, "rank", b_axis))

    @property
    def parameter_count(self) -> int:
        """The number of weights that the codes represent."""
        return self.codes.size * (2 if self.precision == "nf4" else 1)

    def dequantized(self) -> jax.Array:
        """W, float32, `[in, out]` or stacked."""
        weight = dequantize(self.codes[...], self.scales[...], self.precision)
        if self.update_a is not None and self.update_b is not None:
            weight = weight + self.update_a[...] @ self.update_b[...]
        return weight

    def with_update(self, a: jax.Array, b: jax.Array) -> "QuantizedKernel":
        """The kernel W + A B; A and B are kept as factors."""
        if self.update_a is not None and self.update_b is not None:
            a = jnp.concatenate([self.update_a[...], a], axis=-1)
            b = jnp.concatenate([self.update_b[...], b], axis=-2)
        return QuantizedKernel(self.precision, self.codes[...], self.scales[...], self.axes_of_kernel, (a, b))


def _if_divides(size: int, axis: str | None) -> str | None:
    return axis if size % num_shards(axis) == 0 else None


def quantize(kernel: jax.Array, precision: Precision) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a kernel `[..., in, out]`, as `QuantizedKernel` has them; rounded to the nearest code."""
    *layers, inputs, outputs = kernel.shape
    rows = inputs if precision == "int8" else block_size(inputs)
    blocks = kernel.astype(jnp.float32).reshape(*layers, inputs // rows, rows, outputs)
    largest = jnp.max(jnp.abs(blocks), axis=-2)
    # A block of zeros has the scale 0.
    unit = blocks / jnp.where(largest > 0, largest, 1.0)[..., None, :]
    if precision == "int8":
        codes = jnp.round(unit * 127).astype(jnp.int8)
        return codes.reshape(kernel.shape), largest / 127
    codes = _nearest_nf4(unit)
    low, high = codes[..., : rows // 2, :], codes[..., rows // 2 :, :]
    return (low | high << 4).reshape(*layers, inputs // 2, outputs), largest


def dequantize(codes: jax.Array, scales: jax.Array, precision: Precision) -> jax.Array:
    """The kernel `[..., in, out]`, float32, of its codes and scales."""
    *layers, blocks, outputs = scales.shape
    if precision == "int8":
        return codes.astype(jnp.float32) * scales
    packed = codes.reshape(*layers, blocks, -1, outputs)
    unit = jnp.concatenate([_nf4_value(packed & 15), _nf4_value(packed >> 4)], axis=-2)
    return (unit * scales[..., None, :]).reshape(*layers, -1, outputs)


def _nearest_nf4(unit: jax.Array) -> jax.Array:
    """The codes, uint8, of numbers in [-1, 1]: how many of the midpoints between neighboring values are below."""
    codes = jnp.zeros(unit.shape, jnp.uint8)
    for lower, upper in itertools.pairwise(NF4):
        codes += (unit > (lower + upper) / 2).astype(jnp.uint8)
    return codes


def _nf4_value(codes: jax.Array) -> jax.Array:
    """The values of codes, by halving the table once for each bit: vectorized everywhere, which a lookup is not."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, upper, lower) for lower, upper in zip(values[::2], values[1::2])]
    return values[0]


def block_size(inputs: int) -> int:
    """Inputs that share a scale in nf4: 64, or the largest even divisor below it where 64 does not divide."""
    return next(size for size in range(BLOCK, 0, -2) if inputs % size == 0)


def check_precision(architecture: Architecture, precision: Precision) -> None:
    """Raises UserError if the model's kernels cannot be stored in this precision."""
    if precision != "nf4":
        return
    for projection in architecture.projections:
        inputs, _ = architecture.kernel_shape(projection)
        if inputs % 2:
            raise UserError(f"{projection} has {inputs} inputs, and nf4 stores two in a byte: use int8 or bfloat16")


def with_precision(decoder: Any, precision: Precision) -> Any:
    """The decoder with its weights in this precision; norms and biases stay in float32.

    Can be traced, so that `jax.eval_shape` gives the shapes of a quantized decoder without its weights.
    """
    check_precision(decoder.architecture, precision)
    if precision == "float32":
        return decoder
    quantized = is_quantized(precision)

    def converted(path: tuple, leaf: jax.Array) -> jax.Array:
        kernel = any(getattr(key, "name", None) == "kernel" for key in path)
        return leaf.astype(jnp.bfloat16) if is_matrix(path) and not (quantized and kernel) else leaf

    decoder = jax.tree_util.tree_map_with_path(converted, decoder)
    if not quantized:
        return decoder
    kernels = {}
    for projection in decoder.architecture.projections:
        kernel = linear_of(decoder, projection).kernel
        codes, scales = _quantize(kernel[...], precision)
        kernels[projection] = QuantizedKernel(precision, codes, scales, kernel.get_metadata("axes"))
    return with_kernels(decoder, kernels)


_quantize = partial(jax.jit, static_argnums=1)(quantize)


def is_matrix(path: tuple) -> bool:
    """Whether the array of a decoder at this pytree path is a kernel, an embedding or the head."""
    names = [getattr(key, "name", "") for key in path]
    return "kernel" in names or names[0] in ("embed", "position_embed", "head")


def with_kernels(decoder: Any, kernels: dict[str, QuantizedKernel]) -> Any:
    """The decoder with these kernels, by projection, in place of its own."""
    leaves, structure = jax.tree.flatten(decoder)
    changed = jax.tree.unflatten(structure, leaves)  # a copy of the modules
    for projection, kernel in kernels.items():
        linear_of(changed, projection).kernel = kernel
    return changed


def linear_of(decoder: Any, projection: str) -> Any:
    """The stacked `Linear` of a projection."""
    block = decoder.layers
    return getattr(block.mlp if projection in ("gate_proj", "up_proj", "down_proj") else block.attention, projection)


def precision_of(decoder: Any) -> Precision:
    """The precision of the decoder's kernels."""
    kernel = decoder.layers.attention.q_proj.kernel
    if isinstance(kernel, QuantizedKernel):
        return kernel.precision
    return "bfloat16" if kernel[...].dtype == jnp.bfloat16 else "float32"


def weight_of(kernel: Any) -> jax.Array:
    """The weight of a `Linear`, whose kernel is an array or quantized."""
    return kernel.dequantized() if isinstance(kernel, QuantizedKernel) else kernel


def is_finite_bfloat16(array: np.ndarray) -> bool:
    """Whether all numbers are finite, by their bits: NumPy has no fast arithmetic for bfloat16."""
    return not bool(((array.view(np.uint16) & 0x7F80) == 0x7F80).any())
