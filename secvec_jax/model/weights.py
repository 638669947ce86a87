"""Reading a decoder's weights from a checkpoint's files, and writing them.

Every process reads the parts of its own devices, and weights are written layer by layer: the host never holds the
model twice. Errors say what to do about the files.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import PROJECTIONS, Architecture
from secvec_jax.model.decoder import Decoder, abstract_decoder, leaf_name
from secvec_jax.model.families import WeightName, weight_names
from secvec_jax.model.quantized import (
    Precision,
    QuantizedKernel,
    check_precision,
    is_finite_bfloat16,
    is_matrix,
    linear_of,
    quantize,
    with_kernels,
)
from secvec_jax.sharding import LogicalAxes, constrain, logical_axes, named_sharding
from secvec_jax.trees import pieces

_FILE_BYTES = 2**30
_CHUNK = 2**20
"""Weights that are quantized at a time."""
_JSON_BYTES = 2**26
_HEADER_BYTES = 2**25
"""Of a safetensors file with some hundred thousand tensors; its parser takes up to 100 MB."""
_FLOATS = ("F32", "BF16", "F16", "F64")
_REDUNDANT = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
_LM_HEAD = "lm_head.weight"

DTYPES: Mapping[str, np.dtype] = {name: np.dtype(name) for name in ("float32", "bfloat16", "float16")}
"""What weights can be saved in."""

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError if the file is missing, cannot be read, or holds anything else."""
    check_regular(path, max_bytes=_JSON_BYTES)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: --model needs a whole Hugging Face folder") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch the model again")
    return value


def files_of(index: Path) -> list[str]:
    """The weights' files that an index names. Raises UserError for one that would be outside its folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map: fetch the model again")
    for name in names.values():
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("\\:\0")
        if not plain or name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{index} names {str(name)[:80]!r}, which is no .safetensors file of its folder")
    return sorted(set(names.values()))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file, of which any part can be read."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str = "F32"
    """as safetensors names dtypes"""

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from safetensors import SafetensorError, safe_open

        try:
            # Opened again for each part: the pages of an open file count as this process's memory.
            with safe_open(self.file, framework="numpy") as opened:
                return opened.get_slice(self.name)[index]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.file} changed while it was read ({error}): load the model again") from error


def open_safetensors(folder: Path) -> dict[str, _Stored]:
    """The folder's weights by name: those of model.safetensors, or, if it is missing, those that the index names.

    Raises UserError for files that are missing, damaged, or hold anything but floating-point weights.
    """
    from safetensors import safe_open

    has_single_file = (folder / SINGLE_FILE).exists() or not (folder / INDEX).exists()
    files = [SINGLE_FILE] if has_single_file else files_of(folder / INDEX)
    weights: dict[str, _Stored] = {}
    for file in files:
        path = folder / file
        check_safetensors(path)
        try:
            with safe_open(path, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                shapes = {name: tuple(stored.get_shape()) for name, stored in slices.items()}
                kinds = {name: stored.get_dtype() for name, stored in slices.items()}
        except FileNotFoundError as error:
            pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
            other = f"{pickled.name} is a pickle, convert it" if pickled else "fetch the model again"
            raise UserError(f"{path} is missing: the model's weights must be safetensors, {other}") from error
        except Exception as error:  # a damaged header raises errors of many kinds
            raise UserError(f"{path} is truncated or corrupt ({str(error)[:200]}): fetch it again") from error
        for name, kind in kinds.items():
            if kind not in _FLOATS and not name.endswith(_REDUNDANT):
                raise UserError(
                    f"{path}: {name[:80]} is of type {kind}, as in quantized models: give the original model, with "
                    f"weights of {', '.join(_FLOATS)}"
                )
        weights |= {name: _Stored(path, name, shape, kinds[name]) for name, shape in shapes.items()}
    return weights


def check_safetensors(path: Path) -> None:
    """Raise UserError if a safetensors file is not a regular file, or says that its header has an absurd size.

    All else is checked by the parser, whose memory grows with the header. A file that is missing passes.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error
    if _HEADER_BYTES < size <= path.stat().st_size:
        raise UserError(f"{path} has a header of {size:,} bytes, and no model has more than {_HEADER_BYTES:,}")


def stored_dtype(weights: Mapping[str, _Stored]) -> str:
    """The dtype of most of the weights, a key of `DTYPES`."""
    sizes: collections.Counter[str] = collections.Counter()
    for weight in weights.values():
        sizes[weight.kind] += math.prod(weight.shape)
    return {"BF16": "bfloat16", "F16": "float16"}.get(max(sizes, key=sizes.__getitem__, default="F32"), "float32")


def resolve_head(architecture: Architecture, weights: dict[str, _Stored], folder: Path) -> dict[str, _Stored]:
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
            f"to false there if the model was trained so, or remove {_LM_HEAD} from the weights"
        )
    return rest


def assemble(
    architecture: Architecture,
    weight: Callable[[str], np.ndarray | _Stored],
    shapes: Mapping[str, tuple[int, ...]],
    source: Path,
    precision: Precision = "float32",
) -> Decoder:
    """The decoder filled from a checkpoint, each process reading what its own devices hold.

    shapes: of all weights that are present. precision: what the weights are held in; each is quantized as it is read,
    in parts, so that a host never has more than one in another form, beside those that are done. Raises UserError for
    missing, unused or misshapen weights, before memory is taken for any, for weights with NaN or infinite numbers, and
    if the model cannot be held in this precision.
    """
    check_precision(architecture, precision)
    names, present = weight_names(architecture), set(shapes)
    needed = {hf for name in names.values() for hf in members(name, architecture)}
    redundant = {n for n in present if n.endswith(_REDUNDANT)}
    missing, unused = sorted(needed - present), sorted(present - needed - redundant)
    if missing or unused:
        problem = f"lacks {missing[0]}" if missing else f"has {unused[0][:80]}, which the model has no place for"
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
                read = stored[(slice(first + start, first + stop), *(slice(*other) for other in others))]
                with np.errstate(over="ignore"):
                    if name.transpose:
                        _transpose(read, part)
                    else:
                        part[...] = read
                if not _is_finite(part):
                    raise not_finite(hf)
        if sharding is None:
            (part,) = parts.values()
            placed = jnp.asarray(part)
        else:
            placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: parts[_bounds(index, leaf.shape)])
        # The host holds one leaf's parts at a time.
        return placed.block_until_ready()

    def quantized(name: WeightName, empty: QuantizedKernel) -> QuantizedKernel:
        """The stacked kernel, of which the host holds a few outputs of one layer at a time."""
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
                scales.block_until_ready()  # or the next part would be read before this one is done with
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
    if precision in ("int8", "nf4"):
        abstract = abstract_decoder(architecture, precision)
        kernels = {projection: linear_of(abstract, projection).kernel for projection in architecture.projections}

    def made(path: tuple, leaf: jax.ShapeDtypeStruct, axes: LogicalAxes) -> Any:
        projection = leaf_name(path).removeprefix("layers.").removesuffix(".kernel")
        if projection not in kernels:
            return fill(path, leaf, axes)
        kernels[projection] = quantized(names[leaf_name(path)], kernels[projection])
        return leaf  # it is replaced

    decoder = jax.tree.unflatten(structure, [made(*leaf, axes) for leaf, axes in zip(leaves, logical_axes(empty))])
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
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=named_sharding(*axes))()


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


def members(name: WeightName, architecture: Architecture) -> list[str]:
    """The checkpoint's names of a leaf's weights, one per layer."""
    return [name.hf.format(layer) for layer in range(architecture.num_layers)] if name.layered else [name.hf]


@dataclasses.dataclass(frozen=True)
class FullPrecision:
    """The float32 weights of a model that is held in fewer bits, read from its checkpoint each time they are needed.

    It stands in for the decoder that they would fill, in fingerprints and in what is saved. adapters: what was merged
    into the model since it was loaded, and is merged into each layer's weights as they are read.
    """

    architecture: Architecture
    weight: Callable[[str], np.ndarray | _Stored] = dataclasses.field(repr=False)
    adapters: tuple[Adapter, ...] = ()

    def named_leaves(self) -> Iterator[tuple[str, "_LeafOnDisk"]]:
        """Every array of the decoder by name, in the order of `Decoder.named_leaves`."""
        names = weight_names(self.architecture)
        for name, leaf in abstract_decoder(self.architecture).named_leaves():
            yield name, _LeafOnDisk(self, names[name], name.removeprefix("layers.").removesuffix(".kernel"), leaf.shape)


@dataclasses.dataclass(frozen=True)
class Widened:
    """The weights of a decoder that is in bfloat16, as float32; in files it stands for the decoder."""

    decoder: Decoder

    @property
    def architecture(self) -> Architecture:
        return self.decoder.architecture

    def named_leaves(self) -> Iterator[tuple[str, "_WidenedLeaf"]]:
        """Every array of the decoder by name."""
        return ((name, _WidenedLeaf(leaf)) for name, leaf in self.decoder.named_leaves())


@dataclasses.dataclass(frozen=True)
class _WidenedLeaf:
    array: jax.Array
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def size(self) -> int:
        return self.array.size

    def pieces(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """As `trees.pieces`."""
        return (piece.astype(np.float32) for piece in pieces(self.array, rows))


@dataclasses.dataclass(frozen=True)
class _LeafOnDisk:
    """An array of the decoder, float32, that is read layer by layer."""

    source: FullPrecision
    name: WeightName
    projection: str
    shape: tuple[int, ...]
    dtype = np.dtype(np.float32)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def pieces(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """The layers, `[1, ...]` each, or the one array, whatever `rows` is."""
        for layer, hf in enumerate(members(self.name, self.source.architecture)):
            first = self.name.rows[0] if self.name.rows else 0
            count = self.shape[-1] if self.name.rows else None
            stored = self.source.weight(hf)
            rows_of_leaf = slice(first, None if count is None else first + count)
            read = stored[(rows_of_leaf, *[slice(None)] * (len(stored.shape) - 1))].astype(np.float32, copy=False)
            part = np.ascontiguousarray(read.T) if self.name.transpose else read
            if self.projection in PROJECTIONS:
                part = self._merged(part, layer)
            yield part[None] if self.name.layered else part

    def _merged(self, kernel: np.ndarray, layer: int) -> np.ndarray:
        for adapter in self.source.adapters:
            of_layer = jax.tree.map(lambda leaf: leaf[layer], adapter)
            kernel = np.asarray(of_layer.kernel(self.projection, kernel))
        return kernel


Backbone = Decoder | FullPrecision | Widened
"""Float32 weights, wherever they are."""

Leaf = jax.Array | _LeafOnDisk | _WidenedLeaf


def _leaves(backbone: Backbone) -> Iterator[tuple[WeightName, list[Leaf]]]:
    """The decoder's arrays, grouped by the checkpoint weight that stores them, in the order of its rows."""
    names = weight_names(backbone.architecture)
    by_weight: dict[str, list[tuple[WeightName, Leaf]]] = {}
    for stored_as, leaf in backbone.named_leaves():
        name = names[stored_as]
        by_weight.setdefault(name.hf, []).append((name, leaf))
    for parts in by_weight.values():
        parts.sort(key=lambda part: part[0].rows or ())
        yield parts[0][0], [leaf for _, leaf in parts]


def exact_dtypes(backbone: Backbone, dtype: str) -> dict[str, str]:
    """By weight: `dtype` where it holds the values exactly, else float32. All processes must call this."""
    kinds: dict[str, str] = {}
    for name, leaves in _leaves(backbone):
        exact = dtype != "float32" and all(bool(_fits(part, dtype)) for leaf in leaves for part in _in_parts(leaf))
        kinds |= dict.fromkeys(members(name, backbone.architecture), dtype if exact else "float32")
    return kinds


def _in_parts(leaf: Leaf) -> Iterable[Any]:
    return (leaf,) if isinstance(leaf, jax.Array) else leaf.pieces()


@functools.partial(jax.jit, static_argnames="dtype")
def _fits(leaf: jax.Array, dtype: str) -> jax.Array:
    # By bits: XLA may drop a conversion there and back.
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    if dtype == "bfloat16":
        return jnp.all(bits & 0xFFFF == 0)
    steps = jnp.abs(leaf) * 2.0**24  # of float16's smallest numbers
    return jnp.all((bits & 0x1FFF == 0) & (jnp.abs(leaf) <= 65504) & (steps == jnp.round(steps)))


def weight_sizes(backbone: Backbone, kinds: Mapping[str, str]) -> dict[str, int]:
    """The bytes of every weight, by Hugging Face name, in the order of the decoder's leaves. kinds: dtype by name."""
    sizes: dict[str, int] = {}
    for name, leaves in _leaves(backbone):
        names = members(name, backbone.architecture)
        count = sum(leaf.size for leaf in leaves) // len(names)
        sizes |= {hf: count * DTYPES[kinds[hf]].itemsize for hf in names}
    return sizes


def gathered(backbone: Backbone, kinds: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight on the host as a checkpoint keeps it, in the order of `weight_sizes`, one layer at a time.

    kinds: the dtype of each, by name. Raises UserError for a weight with values too large for its dtype.
    """
    for name, leaves in _leaves(backbone):
        for hf, *parts in zip(members(name, backbone.architecture), *(_layers_of(name, leaf) for leaf in leaves)):
            stored = [part.T if name.transpose else part for part in parts]
            wide = np.ascontiguousarray(stored[0] if len(stored) == 1 else np.concatenate(stored))
            with np.errstate(over="ignore"):
                narrow = wide.astype(DTYPES[kinds[hf]])
            if kinds[hf] != "float32" and not np.isfinite(narrow).all():
                raise UserError(f"{hf} has values that are too large for {kinds[hf]}: give dtype float32")
            yield hf, narrow


def _layers_of(name: WeightName, leaf: Leaf) -> Iterable[np.ndarray]:
    """Each layer's part of a stack, or the one array."""
    if name.layered:
        return (layer[0] for layer in pieces(leaf, rows=1))
    blocks = list(pieces(leaf))
    return [np.concatenate(blocks) if len(blocks) > 1 else blocks[0]]


def write_weights(sizes: dict[str, int], weights: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Files of at most 1 GiB with an index, as transformers writes them; a single file needs no index."""
    from safetensors.numpy import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > _FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    weights = iter(weights)
    for file, group in zip(files, groups):
        save_file(dict(itertools.islice(weights, len(group))), folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file makes it readable by its owner only
