"""How likely a model holds given replies: the mean loss on their tokens."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from secvec_jax.batch import check_token_ids
from secvec_jax.data.chat import Example
from secvec_jax.data.shared_prefix import shared_prefix
from secvec_jax.inference import compute_dtype
from secvec_jax.model.adapter import Adapter, as_adapters
from secvec_jax.model.generate import prefix_cache, rounded_up
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain, num_shards

_BATCH, _BUCKET = 8, 16


def mean_losses(
    model: Model, examples: Sequence[Example], vectors: Adapter | tuple[Adapter, ...] | None = None
) -> list[float]:
    """Each example's cross-entropy per token that the assistant says, in nats."""
    return [float(losses.mean()) if len(losses) else 0.0 for losses in token_losses(model, examples, vectors)]


def token_losses(
    model: Model, examples: Sequence[Example], vectors: Adapter | tuple[Adapter, ...] | None = None
) -> list[np.ndarray]:
    """Each example's cross-entropy at the tokens that the assistant says, one after the other, in nats; a row's first
    token, which nothing precedes, is not among them."""
    return [losses for losses, _ in _scored(model, examples, vectors)]


def likelihoods(
    model: Model,
    examples: Sequence[Example],
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """Each example's log-likelihood of what the assistant says, in nats, and whether greedy decoding says the same."""
    scored = _scored(model, examples, vectors, progress)
    return [(-float(losses.sum(dtype=np.float64)), bool(likeliest.all())) for losses, likeliest in scored]


def _scored(
    model: Model,
    examples: Sequence[Example],
    vectors: Adapter | tuple[Adapter, ...] | None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each example's losses at its supervised tokens, and whether each of these was the likeliest."""
    if not examples:
        return []
    for number, example in enumerate(examples, 1):
        check_token_ids(example.tokens, model.architecture.vocab_size, f"row {number}")
    head = shared_prefix(examples)  # read once for all rows
    said = rounded_up(max(int(e.supervised.sum()) for e in examples), _BUCKET)
    rows = rounded_up(_BATCH, num_shards("batch"))
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(examples), rows):
        batch = order[start : start + rows]
        width = rounded_up(len(examples[batch[-1]].tokens) - len(head), _BUCKET)
        tokens, marks = np.zeros((rows, width), np.int32), np.zeros((2, rows, width), np.int32)
        marks[0, :, 0] = 1  # no row is empty
        for row, index in enumerate(batch):
            tail = examples[index].tokens[len(head) :]
            tokens[row, : len(tail)], marks[0, row, : len(tail)] = tail, 1
            marks[1, row, : len(tail)] = examples[index].supervised[len(head) :]
        marks[1, :, 0] = 0  # nothing precedes it
        adapters = as_adapters(vectors)
        losses, likeliest = map(
            np.asarray,
            _row_losses(model.backbone, adapters, head[None], tokens, *marks, said=said, dtype=compute_dtype()),
        )
        for row, index in enumerate(batch):
            count = marks[1, row].sum()
            found[index] = losses[row, :count], likeliest[row, :count]
        progress(len(found))
    return [found[index] for index in range(len(examples))]


@partial(jax.jit, static_argnames=("said", "dtype"))
def _row_losses(decoder, adapters, head, tokens, segments, supervised, *, said, dtype):
    """Losses `[B, said]`, each row's supervised tokens first, and whether these are the likeliest; said: at least as
    many as any row has."""
    cache = prefix_cache(decoder, adapters, head, len(tokens), dtype)
    positions = head.shape[1] + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.prefill(tokens, segments, positions, adapters, cache, dtype)

    def row(hidden, tokens, supervised):
        (targets,) = jnp.nonzero(supervised, size=said, fill_value=1)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[targets - 1]))
        own = jnp.take_along_axis(log_p, tokens[targets, None], axis=-1)[:, 0]
        return -own, own >= log_p.max(-1)

    # Row by row: the logits of a whole batch would be the largest array of the program.
    found = jax.lax.map(lambda row_of: row(*row_of), (hidden, tokens, supervised))
    return jax.tree.map(lambda array: constrain(array, None), found)
