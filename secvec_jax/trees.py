"""Measures of parameter trees: who they are, how large, how far apart."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
"""A pytree of arrays."""


def fingerprint(tree: Tree) -> str:
    """sha256 over the paths, shapes, dtypes and bytes of all leaves: equal if and only if the trees are."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


@jax.jit
def distance(a: Tree, b: Tree) -> jax.Array:
    """The L2 norm of `a - b` over all leaves, float32: the drift of one set of parameters from another."""
    squares = jax.tree.map(lambda x, y: jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))), a, b)
    return jnp.sqrt(jax.tree.reduce(jnp.add, squares))


def num_parameters(tree: Tree) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
