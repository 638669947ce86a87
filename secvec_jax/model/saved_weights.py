"""A decoder's weights in the form of a checkpoint, layer by layer: the host never has the model in memory twice.

A model whose weights are in lower precision is saved, and fingerprinted, as its float32 weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.errors import UserError
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.architecture import PROJECTIONS, Architecture
from secvec_jax.model.checkpoint_files import DTYPES, StoredTensor
from secvec_jax.model.decoder import Decoder, abstract_decoder
from secvec_jax.model.families import WeightName, members, weight_names
from secvec_jax.trees import pieces


@dataclasses.dataclass(frozen=True)
class FullPrecision:
    """The float32 weights of a model in lower precision, read from its checkpoint each time they are needed.

    It takes the decoder's place when the model is saved or fingerprinted. adapters: those merged into the model since
    it was loaded, which are merged into each layer's weights as they are read.
    """

    architecture: Architecture
    weight: Callable[[str], np.ndarray | StoredTensor] = dataclasses.field(repr=False)
    adapters: tuple[Adapter, ...] = ()

    def named_leaves(self) -> Iterator[tuple[str, "_LeafOnDisk"]]:
        """Every array of the decoder by name, in the order of `Decoder.named_leaves`."""
        names = weight_names(self.architecture)
        for name, leaf in abstract_decoder(self.architecture).named_leaves():
            yield name, _LeafOnDisk(self, names[name], name.removeprefix("layers.").removesuffix(".kernel"), leaf.shape)


@dataclasses.dataclass(frozen=True)
class Widened:
    """The weights of a bfloat16 decoder as float32; takes the decoder's place when the model is saved."""

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
"""Float32 weights, in memory or in files."""

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
    """Every weight on the host in the form of a checkpoint, in the order of `weight_sizes`, one layer at a time.

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
