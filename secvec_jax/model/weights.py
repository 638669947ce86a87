"""A decoder's weights out of a checkpoint's files, and back into them.

Every process reads the parts of its own devices, and weights leave layer by layer: the host never holds the model
twice. Errors say what to do about the files.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from secvec_jax.errors import UserError
from secvec_jax.mesh import Axes, axes_of, sharding
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.decoder import Decoder, abstract_decoder, leaf_name
from secvec_jax.model.families import WeightName, weight_names
from secvec_jax.trees import pieces

_FILE_BYTES = 2**30
_FLOATS = ("F32", "BF16", "F16", "F64")
_REDUNDANT = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: --model needs a whole Hugging Face folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the model again") from error


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file, of which any part can be read."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        from safetensors import safe_open

        # Opened anew for each part: the pages of an open file count as this process's memory.
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_slice(self.name)[index]


def open_safetensors(folder: Path) -> dict[str, _Stored]:
    """The folder's weights by name."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not files:
            raise UserError(f"{index} has no weight_map: fetch the model again")
    weights: dict[str, _Stored] = {}
    for file in files:
        path = folder / file
        try:
            with safe_open(path, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}
                shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
                kinds = {name: found.get_dtype() for name, found in slices.items()}
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: the model's weights must be safetensors") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is truncated or corrupt ({error}): fetch it again") from error
        for name, kind in kinds.items():
            if kind not in _FLOATS and not name.endswith(_REDUNDANT):
                raise UserError(f"{path}: {name} is of type {kind}: give a model with weights of {', '.join(_FLOATS)}")
        weights |= {name: _Stored(path, name, shape) for name, shape in shapes.items()}
    return weights


def assemble(
    architecture: Architecture, weight: Callable[[str], np.ndarray | _Stored], present: set[str], source: Path
) -> Decoder:
    """The decoder filled from a checkpoint, each process reading what its own devices hold.

    Raises UserError for missing, unused or misshapen weights.
    """
    names = weight_names(architecture)
    needed = {hf for name in names.values() for hf in _members(name, architecture)}
    redundant = {n for n in present if n.endswith(_REDUNDANT) or (n == "lm_head.weight" and architecture.tied_head)}
    missing, unused = sorted(needed - present), sorted(present - needed - redundant)
    if missing or unused:
        problem = f"lacks {missing[0]}" if missing else f"has {unused[0]}, which the model has no place for"
        count = len(missing) + len(unused)
        raise UserError(f"{source}: the checkpoint {problem} ({count} such names): config.json and weights differ")

    def fill(path: tuple, leaf: jax.ShapeDtypeStruct, axes: Axes) -> jax.Array:
        name, where = names[leaf_name(path)], sharding(*axes)
        parts = {index: np.empty([stop - start for start, stop in index], np.float32) for index in _parts(leaf, where)}
        shape = leaf.shape[1:] if name.layered else leaf.shape
        for slot, hf in enumerate(_members(name, architecture)):
            found = weight(hf)
            asked = shape[::-1] if name.transpose else shape
            first, _, rows = name.rows or (0, None, asked[0])
            if found.shape != (rows, *asked[1:]):
                raise UserError(f"{source}: {hf} has shape {found.shape}, config.json asks for {(rows, *asked[1:])}")
            for index, part in parts.items():
                bounds, part = (index[1:], part[slot]) if name.layered else (index, part)
                (start, stop), *others = reversed(bounds) if name.transpose else bounds
                read = found[(slice(first + start, first + stop), *(slice(*other) for other in others))]
                if name.transpose:
                    _transpose(read, part)
                else:
                    part[...] = read
        if where is None:
            (part,) = parts.values()
            placed = jnp.asarray(part)
        else:
            placed = jax.make_array_from_callback(leaf.shape, where, lambda index: parts[_bounds(index, leaf.shape)])
        # The host holds one leaf's parts at a time.
        return placed.block_until_ready()

    empty = abstract_decoder(architecture)
    leaves, structure = jax.tree_util.tree_flatten_with_path(empty)
    return jax.tree.unflatten(structure, [fill(*leaf, axes) for leaf, axes in zip(leaves, axes_of(empty))])


def _parts(leaf: jax.ShapeDtypeStruct, where: NamedSharding | None) -> set[tuple[tuple[int, int], ...]]:
    """The parts of a leaf that this process's devices hold, each once."""
    if where is None:
        return {tuple((0, size) for size in leaf.shape)}
    return {_bounds(index, leaf.shape) for index in where.addressable_devices_indices_map(leaf.shape).values()}


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    # In blocks that stay in the processor's cache: four times as fast as at once.
    for start in range(0, len(source), 256):
        target[:, start : start + 256] = source[start : start + 256].T


def _members(name: WeightName, architecture: Architecture) -> list[str]:
    return [name.hf.format(layer) for layer in range(architecture.num_layers)] if name.layered else [name.hf]


def _leaves(backbone: Decoder) -> Iterator[tuple[WeightName, list[jax.Array]]]:
    """The decoder's leaves, those together that a checkpoint keeps in one weight, in its order."""
    names = weight_names(backbone.architecture)
    found: dict[str, list[tuple[WeightName, jax.Array]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(backbone):
        name = names[leaf_name(path)]
        found.setdefault(name.hf, []).append((name, leaf))
    for parts in found.values():
        parts.sort(key=lambda part: part[0].rows or ())
        yield parts[0][0], [leaf for _, leaf in parts]


def weight_sizes(backbone: Decoder) -> dict[str, int]:
    """The bytes of every weight, by Hugging Face name, in the order of the decoder's leaves."""
    sizes: dict[str, int] = {}
    for name, leaves in _leaves(backbone):
        members = _members(name, backbone.architecture)
        sizes |= dict.fromkeys(members, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // len(members))
    return sizes


def gathered(backbone: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight on the host as a checkpoint keeps it, in the order of `weight_sizes`, one layer's at a time."""
    for name, leaves in _leaves(backbone):
        for hf, *parts in zip(_members(name, backbone.architecture), *(_whole(name, leaf) for leaf in leaves)):
            stored = [part.T if name.transpose else part for part in parts]
            yield hf, np.ascontiguousarray(stored[0] if len(stored) == 1 else np.concatenate(stored))


def _whole(name: WeightName, leaf: jax.Array) -> Iterable[np.ndarray]:
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
        (folder / file).chmod(0o644)  # it writes for its owner only
