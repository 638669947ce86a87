"""Fill a decoder with a checkpoint's weights. Every process reads the parts for its devices."""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from secvec_jax.errors import UserError
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.checkpoint_files import DTYPES, REDUNDANT, StoredTensor
from secvec_jax.model.decoder import Decoder, abstract_decoder, leaf_name
from secvec_jax.model.families import WeightName, members, weight_names
from secvec_jax.model.quantized import (
    Precision,
    QuantizedKernel,
    check_precision,
    is_finite_bfloat16,
    is_matrix,
    is_quantized,
    linear_of,
    quantize,
    with_kernels,
)
from secvec_jax.sharding import LogicalAxes, constrain, logical_axes, named_sharding

_CHUNK = 2**20
"""Weights that are quantized at a time."""
_BLOCK = 2**24
"""Weights that are read at a time: the table of a large vocabulary is not in memory twice."""
_LM_HEAD = "lm_head.weight"


def resolve_head(architecture: Architecture, weights: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The weights without the second copy of a tied embedding, which may be stored under either name.

    Raises UserError if the two differ: transformers would use both, other programs one of them.
    """
    table = weight_names(architecture)["embed"].hf
    if not architecture.tied_head or _LM_HEAD not in weights:
        return weights
    head = weights[_LM_HEAD]
    rest = {name: weight for name, weight in weights.items() if name != _LM_HEAD}
    if table not in rest:
        return {**rest, table: head}
    embed, step = rest[table], 4096
    blocks = [slice(start, min(start + step, embed.shape[0])) for start in range(0, embed.shape[0], step)]
    same = embed.shape == head.shape and all(np.array_equal(embed[(rows,)], head[(rows,)]) for rows in blocks)
    if not same:
        raise UserError(
            f"{folder} has {_LM_HEAD} that differs from {table}, though config.json ties them: set tie_word_embeddings "
            f"to false there if the model was trained that way, or remove {_LM_HEAD} from the weights"
        )
    return rest


def assemble(
    architecture: Architecture,
    weight: Callable[[str], np.ndarray | StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    source: Path,
    precision: Precision = "float32",
) -> Decoder:
    """The decoder filled from a checkpoint; each process reads the parts for its devices.

    shapes: of all weights that are present. precision: the precision of the weights; each is quantized as it is read,
    in parts, so that a host has at most one weight in another form in memory. Raises UserError for missing, unused or
    misshapen weights, before memory is allocated for any, for weights with NaN or infinite numbers, and if the model
    cannot be stored in this precision.
    """
    check_precision(architecture, precision)
    names, present = weight_names(architecture), set(shapes)
    needed = {hf for name in names.values() for hf in members(name, architecture)}
    redundant = {n for n in present if n.endswith(REDUNDANT)}
    missing, unused = sorted(needed - present), sorted(present - needed - redundant)
    if missing or unused:
        problem = f"lacks {missing[0]}" if missing else f"has {unused[0][:80]}, which matches no parameter of the model"
        count = len(missing) + len(unused)
        raise UserError(f"{source}: the checkpoint {problem} ({count} such names): config.json and weights differ")

    def stored_shape(name: WeightName, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        """The shape of each of the weights that the leaf is read from."""
        shape = leaf.shape[1:] if name.layered else leaf.shape
        rows, *others = shape[::-1] if name.transpose else shape
        return (name.rows[2] if name.rows else rows, *others)

    def not_finite(hf: str) -> UserError:
        return UserError(f"{source}: {hf} has NaN or infinite numbers, so its training went wrong: use another")

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct, axes: LogicalAxes) -> jax.Array:
        name, sharding = names[leaf_name(path)], named_sharding(*axes)
        dtype = np.float32 if precision == "float32" or not is_matrix(path) else DTYPES["bfloat16"]
        parts = {index: np.empty([stop - start for start, stop in index], dtype) for index in _parts(leaf, sharding)}
        first = name.rows[0] if name.rows else 0
        for slot, hf in enumerate(members(name, architecture)):
            stored = weight(hf)
            for index, part in parts.items():
                bounds, part = (index[1:], part[slot]) if name.layered else (index, part)
                (start, stop), *others = reversed(bounds) if name.transpose else bounds
                step = max(1, _BLOCK // math.prod(to - begin for begin, to in others))
                for row in range(start, stop, step):
                    rows = slice(first + row, first + min(row + step, stop))
                    read = stored[(rows, *(slice(*other) for other in others))]
                    with np.errstate(over="ignore"):
                        if name.transpose:
                            _transpose(read, part[:, row - start : row - start + step])
                        else:
                            part[row - start : row - start + step] = read
                if not _is_finite(part):
                    raise not_finite(hf)
        if sharding is None:
            (part,) = parts.values()
            placed = jax.device_put(part)
        else:
            placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: parts[_bounds(index, leaf.shape)])
        # The host holds one leaf's parts at a time.
        return placed.block_until_ready()

    def quantized(name: WeightName, empty: QuantizedKernel) -> QuantizedKernel:
        """The stacked kernel; the host has only a few outputs of one layer in memory at a time."""
        shapes_and_axes = [(leaf.get_value(), leaf.get_metadata("axes")) for leaf in (empty.codes, empty.scales)]
        codes, scales = (_zeros(leaf.shape, leaf.dtype, axes) for leaf, axes in shapes_and_axes)
        places = tuple(axes for _, axes in shapes_and_axes)
        inputs, outputs = empty.parameter_count // (codes.shape[0] * codes.shape[2]), codes.shape[2]
        step = max(1, _CHUNK // inputs)
        first = name.rows[0] if name.rows else 0
        for layer, hf in enumerate(members(name, architecture)):
            stored = weight(hf)
            for start in range(0, outputs, step):
                stop = min(start + step, outputs)
                read = stored[(slice(first + start, first + stop), slice(0, inputs))].astype(np.float32, copy=False)
                if not _is_finite(read):
                    raise not_finite(hf)
                codes, scales = _with_quantized(codes, scales, read, layer, start, empty.precision, places)
                scales.block_until_ready()  # or the next part would be read before this one is freed
        return QuantizedKernel(empty.precision, codes, scales, empty.axes_of_kernel)

    empty = abstract_decoder(architecture)
    leaves, structure = jax.tree_util.tree_flatten_with_path(empty)
    for path, leaf in leaves:
        name = names[leaf_name(path)]
        for hf in members(name, architecture):
            if shapes[hf] != stored_shape(name, leaf):
                raise UserError(
                    f"{source}: {hf} has shape {shapes[hf]}, config.json asks for {stored_shape(name, leaf)}"
                )
    kernels = {}
    if is_quantized(precision):
        abstract = abstract_decoder(architecture, precision)
        kernels = {projection: linear_of(abstract, projection).kernel for projection in architecture.projections}

    def filled(path: tuple, leaf: jax.ShapeDtypeStruct, axes: LogicalAxes) -> Any:
        projection = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        if projection not in kernels:
            return fill(path, leaf, axes)
        kernels[projection] = quantized(names[leaf_name(path)], kernels[projection])
        return leaf  # replaced below

    decoder = jax.tree.unflatten(structure, [filled(*leaf, axes) for leaf, axes in zip(leaves, logical_axes(empty))])
    return with_kernels(decoder, kernels) if kernels else decoder


@functools.partial(jax.jit, static_argnames=("precision", "places"), donate_argnums=(0, 1))
def _with_quantized(
    codes: jax.Array,
    scales: jax.Array,
    read: jax.Array,
    layer: int,
    start: int,
    precision: Precision,
    places: tuple[LogicalAxes, LogicalAxes],
) -> tuple[jax.Array, jax.Array]:
    """The stacks, with the weights `read` `[outputs, inputs]` from the output `start` on written into a layer."""
    new = quantize(read.T, precision)

    def written(stack: jax.Array, part: jax.Array, axes: LogicalAxes) -> jax.Array:
        return constrain(jax.lax.dynamic_update_slice(stack, part[None], (layer, 0, start)), *axes)

    return written(codes, new[0], places[0]), written(scales, new[1], places[1])


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, axes: LogicalAxes) -> jax.Array:
    return jnp.zeros(shape, dtype, device=named_sharding(*axes))


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype == DTYPES["bfloat16"]:
        return is_finite_bfloat16(array)
    # A sum is finite only if all of its terms are, and several times as fast; a finite one may overflow, though.
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(array.sum()) or bool(np.isfinite(array).all())


def _parts(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> set[tuple[tuple[int, int], ...]]:
    """The parts of a leaf that this process's devices hold, each once."""
    if sharding is None:
        return {tuple((0, size) for size in leaf.shape)}
    return {_bounds(index, leaf.shape) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    # In blocks that stay in the processor's cache: four times as fast as at once.
    for start in range(0, len(source), 256):
        target[:, start : start + 256] = source[start : start + 256].T
