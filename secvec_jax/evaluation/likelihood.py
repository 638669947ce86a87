"""How likely a model holds given replies: the mean loss on their tokens."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.data.chat import Example
from secvec_jax.data.pipeline import shared_head
from secvec_jax.inference import compute_dtype
from secvec_jax.mesh import place
from secvec_jax.model.decoder import Guest, as_guests
from secvec_jax.model.generate import head_cache, rounded_up
from secvec_jax.model.hub import Model

_BATCH, _BUCKET = 8, 16


def mean_losses(
    model: Model, examples: Sequence[Example], vectors: Guest | tuple[Guest, ...] | None = None
) -> list[float]:
    """Each example's cross-entropy per token that the assistant says, in nats."""
    return [float(losses.mean()) if len(losses) else 0.0 for losses in token_losses(model, examples, vectors)]


def token_losses(
    model: Model, examples: Sequence[Example], vectors: Guest | tuple[Guest, ...] | None = None
) -> list[np.ndarray]:
    """Each example's cross-entropy at the tokens that the assistant says, one after the other, in nats; a row's first
    token, which nothing precedes, is not among them."""
    if not examples:
        return []
    head = shared_head(examples)  # read once for all rows
    said = rounded_up(max(int(e.supervised.sum()) for e in examples), _BUCKET)
    found: dict[int, np.ndarray] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(examples), _BATCH):
        batch = order[start : start + _BATCH]
        width = rounded_up(len(examples[batch[-1]].tokens) - len(head), _BUCKET)
        tokens, marks = np.zeros((_BATCH, width), np.int32), np.zeros((2, _BATCH, width), np.int32)
        marks[0, :, 0] = 1  # no row is empty
        for row, index in enumerate(batch):
            tail = examples[index].tokens[len(head) :]
            tokens[row, : len(tail)], marks[0, row, : len(tail)] = tail, 1
            marks[1, row, : len(tail)] = examples[index].supervised[len(head) :]
        marks[1, :, 0] = 0  # nothing precedes it
        guests = as_guests(vectors)
        losses = _row_losses(model.backbone, guests, head[None], tokens, *marks, said=said, dtype=compute_dtype())
        for index, row, mark in zip(batch, np.asarray(losses), marks[1]):
            found[index] = row[: mark.sum()]
    return [found[index] for index in range(len(examples))]


@partial(jax.jit, static_argnames=("said", "dtype"))
def _row_losses(decoder, guests, head, tokens, segments, supervised, *, said, dtype):
    """`[B, said]`, each row's supervised tokens first; said: at least as many as any row has."""
    forward = partial(decoder, guests=guests, dtype=dtype)
    cache = head_cache(forward, head, len(tokens))
    positions = head.shape[1] + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(tokens, segments, positions, cache=cache)

    def row(hidden, tokens, supervised):
        (targets,) = jnp.nonzero(supervised, size=said, fill_value=1)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[targets - 1]))
        return -jnp.take_along_axis(log_p, tokens[targets, None], axis=-1)[:, 0]

    # Row by row: the logits of a whole batch would be the largest array of the program.
    return place(jax.lax.map(lambda row_of: row(*row_of), (hidden, tokens, supervised)), None)
