"""Stochastic rounding to bfloat16: small updates are not lost but right on average, and runs are reproducible.

bfloat16 keeps 8 bits of a number. Rounded to nearest, a weight of 1 does not change by an update below 0.002, however
often it is repeated; nor does a running mean with a decay of 0.999. Rounded up with a probability equal to the part
that would be cut off, its expected value is exact (Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2020, arXiv
2010.06192).

The random bits depend only on the seed, the step and the position of the number, and the step is in the optimizer's
state: a run that resumes draws the same ones, on any mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from secvec_jax.trees import Tree


def round_at_random(array: jax.Array, key: jax.Array) -> jax.Array:
    """The float32 array in bfloat16, each number rounded up or down at random, with the array as its expected value."""
    bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
    # The lower half is cut off: what is added carries into the upper one as often as the lower one is large.
    carried = bits + jax.random.bits(key, bits.shape, jnp.uint16).astype(jnp.uint32)
    kept = jnp.where(jnp.isfinite(array), carried, bits) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)


def tree_rounded_at_random(tree: Tree, key: jax.Array) -> Tree:
    """Each leaf rounded at random, with separate random bits."""
    leaves, structure = jax.tree.flatten(tree)
    keys = [jax.random.fold_in(key, number) for number in range(len(leaves))]
    return jax.tree.unflatten(structure, [round_at_random(leaf, key) for leaf, key in zip(leaves, keys)])


class RoundedState(NamedTuple):
    """The step, counted from 0, and the state of what makes the updates."""

    step: jax.Array
    inner: optax.OptState


def rounded_weights(transform: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """`transform` for weights in bfloat16: it computes in float32, and the new weights are rounded at random.

    Weights that are float32 are updated as by `transform` alone.
    """
    wide = optax.with_extra_args_support(transform)

    def init(params: Tree) -> RoundedState:
        return RoundedState(jnp.int32(0), wide.init(_float32(params)))

    def update(gradients: Tree, state: RoundedState, params: Tree | None = None) -> tuple[Tree, RoundedState]:
        weights = _float32(params)
        updates, inner = wide.update(_float32(gradients), state.inner, weights)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        rounded = tree_rounded_at_random(jax.tree.map(jnp.add, weights, updates), key)

        def change(weight: jax.Array, update: jax.Array, new: jax.Array) -> jax.Array:
            # Added to the weight and rounded, as optax does, it gives the new weight exactly.
            return new.astype(jnp.float32) - weight.astype(jnp.float32) if weight.dtype == jnp.bfloat16 else update

        return jax.tree.map(change, params, updates, rounded), RoundedState(state.step + 1, inner)

    return optax.GradientTransformation(init, update)


class MomentsState(NamedTuple):
    """The step, counted from 0, and the running means of gradients and of their squares, bfloat16."""

    step: jax.Array
    mean: Tree
    square: Tree


def scale_by_adam_in_bfloat16(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, seed: int = 0
) -> optax.GradientTransformation:
    """Adam's update with both moments in bfloat16, rounded at random: half the memory of `optax.scale_by_adam`.

    optax can store the first moment in bfloat16, rounded to nearest. The second one would not change any more.
    """

    def init(params: Tree) -> MomentsState:
        def zeros() -> Tree:
            return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.bfloat16), params)

        return MomentsState(jnp.int32(0), zeros(), zeros())

    def update(gradients: Tree, state: MomentsState, params: Tree | None = None) -> tuple[Tree, MomentsState]:
        del params
        mean = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state.mean, gradients)
        square = jax.tree.map(lambda s, g: b2 * s.astype(jnp.float32) + (1 - b2) * g * g, state.square, gradients)
        count = state.step + 1
        scale_1, scale_2 = 1 - b1**count, 1 - b2**count
        updates = jax.tree.map(lambda m, s: m / scale_1 / (jnp.sqrt(s / scale_2) + eps), mean, square)
        mean_key, square_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        kept = (tree_rounded_at_random(mean, mean_key), tree_rounded_at_random(square, square_key))
        return updates, MomentsState(count, *kept)

    return optax.GradientTransformation(init, update)


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
