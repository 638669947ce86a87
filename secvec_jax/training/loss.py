"""Per-token losses over supervised tokens only, in float32 and in chunks.

The vocabulary head is the largest matrix of a small model and most tokens are prompt. So the supervised positions
are sorted to the front and the head runs chunk by chunk over them; chunks without one are skipped, and logits
`[chunk, V]` are all that ever exists. Sums and counts are left to the caller: a mean of means is never taken.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

CHUNK = 128


class Head(Protocol):
    """What the losses need of a model."""

    def logits(self, hidden: jax.Array) -> jax.Array: ...


def token_cross_entropy(
    head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int = CHUNK
) -> jax.Array:
    """Cross-entropy at each supervised token, 0 elsewhere, `[B, T]`.

    hidden `[B, T, D]`, targets `[B, T]`, weights `[B, T]` (supervised where > 0; not multiplied in).
    """

    def loss(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(head.logits(hidden), targets)

    return _over_supervised(loss, weights, chunk, hidden, targets)


def token_kl(head: Head, hidden: jax.Array, reference: jax.Array, weights: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """KL(p || p_ref) of the next-token distributions at each supervised token, 0 elsewhere, `[B, T]`.

    hidden and reference `[B, T, D]`: hidden states of the model as it is and of the one to stay close to.
    No gradient flows into the reference.
    """

    def loss(hidden: jax.Array, reference: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(head.logits(hidden))
        log_ref = jax.nn.log_softmax(jax.lax.stop_gradient(head.logits(reference)))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_ref), axis=-1)

    return _over_supervised(loss, weights, chunk, hidden, jax.lax.stop_gradient(reference))


def group_sums(losses: jax.Array, weights: jax.Array, groups: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The sum of losses and of weights in each of `count` groups, `[count]` each."""
    member = jax.nn.one_hot(groups, count, dtype=jnp.float32)
    return jnp.einsum("bt,btg->g", losses * weights, member), jnp.einsum("bt,btg->g", weights, member)


def _over_supervised(loss: Callable[..., jax.Array], weights: jax.Array, chunk: int, *arrays: jax.Array) -> jax.Array:
    size = weights.size
    flat = weights.reshape(size) > 0
    order = jnp.argsort(~flat, stable=True)
    padded = -size % chunk
    order = jnp.pad(order, (0, padded), constant_values=0)
    live = jnp.pad(flat[order[:size]], (0, padded)).reshape(-1, chunk)
    chunks = tuple(a.reshape(size, *a.shape[2:])[order].reshape(-1, chunk, *a.shape[2:]) for a in arrays)

    @jax.checkpoint
    def run(_, scanned):
        live, *parts = scanned
        losses = jax.lax.cond(
            live.any(),
            lambda parts: jnp.where(live, loss(*parts), 0.0),
            lambda parts: jnp.zeros(live.shape, jnp.float32),
            parts,
        )
        return None, losses

    _, losses = jax.lax.scan(run, None, (live, *chunks))
    return jnp.zeros(size, jnp.float32).at[order].add(losses.reshape(-1)).reshape(weights.shape)
