"""Fingerprints, checksums, sizes and distances of parameter trees."""

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any
"""A pytree of arrays."""

_PIECE_BYTES = 2**26


def fingerprint(tree: Tree) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all leaves: equal if and only if the trees are.

    Sharding does not affect it. If arrays are sharded over several processes, all of them must call this function.
    """
    digest = hashlib.sha256()
    for name, leaf in _named_leaves(tree):
        array = leaf if isinstance(leaf, jax.Array | InPieces) else np.asarray(leaf)
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        for piece in pieces(array):
            digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
    return digest.hexdigest()


def checksums(tree: Tree) -> dict[str, int]:
    """A 32-bit checksum of each leaf, by its path: computed on the devices, and the same for any sharding.

    One flipped bit always changes it. It detects accidents, not forgeries, as `fingerprint` does.
    """
    return {name: int(value) for name, value in jax.device_get(_checksums(_by_path(tree))).items()}


def first_not_finite(tree: Tree) -> str | None:
    """The path of the first leaf with NaN or infinite numbers; None if all are finite."""
    finite = jax.device_get(_all_finite(_by_path(tree)))
    return next((name for name, is_finite in finite.items() if not is_finite), None)


def _by_path(tree: Tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(leaf: jax.Array) -> jax.Array:
    """The sum, modulo 2**32, of all elements' bits, each mixed with its index by a bijection (MurmurHash3's)."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, unsigned)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mix(bits.astype(jnp.uint32) ^ _mix(index))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _named_leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Every leaf with its path. A node with a method `named_leaves()` names and orders its own leaves.

    So a decoder's modules can change without changing its fingerprint, which files of vectors contain.
    """
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "named_leaves"))
    for path, node in nodes:
        prefix = jax.tree_util.keystr(path)
        if hasattr(node, "named_leaves"):
            for name, leaf in node.named_leaves():
                yield f"{prefix}.{name}.value", leaf
        else:
            yield prefix, node


@runtime_checkable
class InPieces(Protocol):
    """An array that is never in memory as a whole, such as one read from a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def pieces(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """As `pieces` below."""
        ...


def pieces(array: jax.Array | np.ndarray | InPieces, rows: int | None = None) -> Iterator[np.ndarray]:
    """Yield the array in blocks `[rows, ...]` on the host of every process.

    Without `rows`, it is yielded whole if that needs no copy, else in blocks of at most 64 MiB, or of one row. If the
    array is sharded over several processes, all of them must consume all blocks.
    """
    if isinstance(array, InPieces):
        yield from array.pieces(rows)
        return
    if not isinstance(array, jax.Array) or array.is_fully_replicated:
        host = np.asarray(array)
        if rows is None:
            yield host
        else:
            yield from (host[start : start + rows] for start in range(0, len(host), rows))
        return
    array = _with_replicated_rows(array)
    replicated = NamedSharding(cast(NamedSharding, array.sharding).mesh, P())
    step = rows or max(1, _PIECE_BYTES * len(array) // array.nbytes)
    for start in range(0, len(array), step):
        yield np.asarray(_slice(array, start, min(step, len(array) - start), replicated))


def _with_replicated_rows(array: jax.Array) -> jax.Array:
    """Return the array with its first axis replicated, so that a block of rows is gathered without the others."""
    sharding = cast(NamedSharding, array.sharding)
    axes: list[Any] = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    mesh, first, others = sharding.mesh, axes[0], axes[1:]
    if first is None:
        return array
    if others:
        last = tuple(jax.tree.leaves((others[-1], first)))
        if array.shape[-1] % math.prod(mesh.shape[name] for name in last) == 0:
            others[-1] = last
    return jax.device_put(array, NamedSharding(mesh, P(None, *others)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _slice(array: jax.Array, start: int, size: int, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_slice_in_dim(array, start, size), sharding)


@jax.jit
def distance(a: Tree, b: Tree) -> jax.Array:
    """Return the L2 norm of `a - b` over all leaves, in float32: the drift of one set of parameters from another."""
    squares = jax.tree.map(lambda x, y: jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))), a, b)
    return jnp.sqrt(jax.tree.reduce(jnp.add, squares))


def num_parameters(tree: Tree) -> int:
    """Return the number of array elements in a tree; leaves that are not arrays count as 0.

    A node with a `parameter_count`, such as a quantized weight, counts as that many.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "parameter_count"))
    return sum(getattr(node, "parameter_count", getattr(node, "size", 0)) for node in nodes)


def unstacked(tree: Tree, count: int) -> list[Tree]:
    """Return the `count` trees that are stacked along the leading axis of `tree`'s leaves."""

    def part(index: int) -> Tree:
        return jax.tree.map(lambda leaf: leaf[index], tree)

    return [part(index) for index in range(count)]
