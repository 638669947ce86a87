"""Per-token losses over supervised tokens only, in float32 and in chunks.

The vocabulary head is the largest matrix of a small model and most tokens are prompt. So the supervised positions are
sorted to the front and the head runs over as many chunks as they fill; no more logits than `[chunk, V]` ever exist at
once. If the head is trained, the backward pass recomputes them; if it is frozen, the forward pass stores what the
backward pass needs. Losses are returned per token, and the caller sums and counts: a mean of means is never taken.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from secvec_jax.model.decoder import logits_of
from secvec_jax.sharding import AXIS_RULES, platform

CHUNK = {"cpu": 128, "gpu": 1024, "tpu": 1024}
"""Positions whose logits exist at a time."""

ChunkLoss = Callable[..., jax.Array]
"""`(table [V, D], hidden [C, D], other [C, ...], *fixed [V, D]) -> losses [C]`; no gradient for other and fixed."""


class Head(Protocol):
    """What the losses need of a model: the output embedding `[V, D]`, and the soft cap of the logits, if any."""

    @property
    def output_embedding(self) -> jax.Array: ...

    @property
    def final_softcap(self) -> float | None: ...


def token_cross_entropy(
    head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int | None = None
) -> jax.Array:
    """Cross-entropy at each supervised token, 0 elsewhere, `[B, T]`.

    hidden `[B, T, D]`, targets `[B, T]`, weights `[B, T]` (supervised where > 0; not multiplied in).
    """
    return _over_supervised(_cross_entropy, head, hidden, weights, chunk, targets)


def token_kl(
    head: Head, hidden: jax.Array, reference: jax.Array, weights: jax.Array, chunk: int | None = None
) -> jax.Array:
    """KL(p || p_ref) of the next-token distributions at each supervised token, 0 elsewhere, `[B, T]`.

    hidden and reference `[B, T, D]`: hidden states of the trained model and of the one to stay close to. No gradient
    flows into the reference.
    """
    return _over_supervised(_kl, head, hidden, weights, chunk, jax.lax.stop_gradient(reference))


def token_forward_kl(
    head: Head,
    hidden: jax.Array,
    reference_head: Head,
    reference: jax.Array,
    weights: jax.Array,
    chunk: int | None = None,
) -> jax.Array:
    """KL(p_ref || p) of the next-token distributions at each supervised token, 0 elsewhere, `[B, T]`.

    As `token_kl`, in the other direction, and with a separate head for the reference: the trained model's head may
    change.
    """
    reference, fixed = jax.lax.stop_gradient((reference, reference_head.output_embedding))
    return _over_supervised(_forward_kl, head, hidden, weights, chunk, reference, fixed)


def group_sums(losses: jax.Array, weights: jax.Array, groups: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The sum of losses and of weights in each of `count` groups, `[count]` each."""
    member = jax.nn.one_hot(groups, count, dtype=jnp.float32)
    return jnp.einsum("bt,btg->g", losses * weights, member), jnp.einsum("bt,btg->g", weights, member)


def _cross_entropy(cap: float | None, table: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits_of(table, hidden, cap), targets)


def _kl(cap: float | None, table: jax.Array, hidden: jax.Array, reference: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits_of(table, hidden, cap))
    log_ref = jax.nn.log_softmax(logits_of(jax.lax.stop_gradient(table), reference, cap))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_ref), axis=-1)


def _forward_kl(
    cap: float | None, table: jax.Array, hidden: jax.Array, reference: jax.Array, fixed: jax.Array
) -> jax.Array:
    log_p, log_ref = (jax.nn.log_softmax(logits_of(*pair, cap)) for pair in ((table, hidden), (fixed, reference)))
    return jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)


def _over_supervised(
    loss: Callable[..., jax.Array],
    head: Head,
    hidden: jax.Array,
    weights: jax.Array,
    chunk: int | None,
    other: jax.Array,
    *fixed: jax.Array,
) -> jax.Array:
    """On a mesh each shard of the batch is sorted separately; the tables are gathered along D, once.

    loss: a `ChunkLoss` that takes the soft cap of the logits first.
    """
    run = partial(_over_supervised_part, partial(loss, head.final_softcap), chunk or CHUNK[platform()])
    tables = [table.astype(hidden.dtype) for table in (head.output_embedding, *fixed)]  # before they are gathered
    if jax.sharding.get_abstract_mesh().empty:
        return run(tables, hidden, weights, other)

    def part(tables: list[jax.Array], *arrays: jax.Array) -> jax.Array:
        return run([jax.lax.all_gather(table, AXIS_RULES["embed"], axis=1, tiled=True) for table in tables], *arrays)

    sequences = P(AXIS_RULES["batch"])
    return jax.shard_map(
        part,
        in_specs=(P(None, AXIS_RULES["embed"]), sequences, sequences, sequences),
        out_specs=sequences,
        axis_names=set(jax.tree.leaves(AXIS_RULES["batch"])),
        check_vma=False,
    )(tables, hidden, weights, other)


def _over_supervised_part(
    loss: ChunkLoss, chunk: int, tables: list[jax.Array], hidden: jax.Array, weights: jax.Array, other: jax.Array
) -> jax.Array:
    table, *fixed = tables
    size = weights.size
    live = jnp.asarray(weights).reshape(size) > 0
    order = jnp.pad(jnp.argsort(~live, stable=True), (0, -size % chunk))
    count = live.sum()

    def to_front(array: jax.Array) -> jax.Array:
        return array.reshape(size, *array.shape[2:])[order]

    losses = _chunked(loss, chunk, table, to_front(hidden), to_front(other), fixed, count)
    losses = jnp.where(jnp.arange(len(order)) < count, losses, 0.0)
    return jnp.zeros(size, jnp.float32).at[order].add(losses).reshape(weights.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(
    loss: ChunkLoss,
    chunk: int,
    table: jax.Array,
    hidden: jax.Array,
    other: jax.Array,
    fixed: list[jax.Array],
    count: jax.Array,
) -> jax.Array:
    """The losses of the first `count` of N positions `[N]`; the others are arbitrary within the last chunk, then 0."""

    def run(index: jax.Array, losses: jax.Array) -> jax.Array:
        part = loss(table, _at(hidden, index, chunk), _at(other, index, chunk), *fixed)
        return _put(losses, part, index, chunk)

    return jax.lax.fori_loop(0, _chunks(count, chunk), run, jnp.zeros(len(hidden), jnp.float32))


def _forward(loss, chunk, table, hidden, other, fixed, count):
    arguments = table.value, hidden.value, other.value, [array.value for array in fixed], count.value
    if table.perturbed:
        return _chunked(loss, chunk, *arguments), (None, arguments)
    # With a frozen head each position's gradient is computed right away: the backward pass scales it, without logits.
    losses, slopes = _with_slopes(loss, chunk, *arguments)
    return losses, (slopes, None)


def _with_slopes(loss, chunk, table, hidden, other, fixed, count):
    """As `_chunked`, with the gradient `[N, D]` of each loss by its hidden state."""

    def run(index, carry):
        losses, slopes = carry
        rest = _at(other, index, chunk)
        part, pull = jax.vjp(lambda rows: loss(table, rows, rest, *fixed), _at(hidden, index, chunk))
        (slope,) = pull(jnp.ones_like(part))
        return _put(losses, part, index, chunk), _put(slopes, slope, index, chunk)

    start = (jnp.zeros(len(hidden), jnp.float32), jnp.zeros_like(hidden))
    return jax.lax.fori_loop(0, _chunks(count, chunk), run, start)


def _backward(loss, chunk, residuals, cotangents):
    slopes, arguments = residuals
    if slopes is not None:
        return None, (slopes * cotangents[:, None]).astype(slopes.dtype), None, None, None
    table, hidden, other, fixed, count = arguments

    def part(index):
        rows, rest, cotangent = (_at(array, index, chunk) for array in (hidden, other, cotangents))
        _, pull = jax.vjp(lambda table, rows: loss(table, rows, rest, *fixed), table, rows)
        table_gradient, row_gradient = pull(cotangent)
        return table_gradient.astype(jnp.float32), row_gradient

    def run(index, gradients):
        table_gradient, hidden_gradient = gradients
        more, row_gradient = part(index)
        return table_gradient + more, _put(hidden_gradient, row_gradient, index, chunk)

    # The first chunk is often the only one: its gradient is the sum, and a table of zeros is neither made nor added to.
    table_gradient, row_gradient = part(0)
    start = (table_gradient, _put(jnp.zeros_like(hidden), row_gradient, 0, chunk))
    table_gradient, hidden_gradient = jax.lax.fori_loop(1, _chunks(count, chunk), run, start)
    return table_gradient.astype(table.dtype), hidden_gradient, None, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(count: jax.Array, chunk: int) -> jax.Array:
    return -(-count // chunk)


def _at(array: jax.Array, index: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk)


def _put(array: jax.Array, part: jax.Array, index: jax.Array, chunk: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, part, index * chunk, 0)
