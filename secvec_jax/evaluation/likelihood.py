"""Loss and log-likelihood of given replies under a model."""

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
    """Return each example's mean cross-entropy over the assistant's tokens, in nats per token (0 without any)."""
    return [float(losses.mean()) if len(losses) else 0.0 for losses in token_losses(model, examples, vectors)]


def token_losses(
    model: Model, examples: Sequence[Example], vectors: Adapter | tuple[Adapter, ...] | None = None
) -> list[np.ndarray]:
    """Return each example's cross-entropy at each of the assistant's tokens, in order, in nats.

    The first token of a row is left out because nothing precedes it.
    """
    return [losses for losses, _ in _scored(model, examples, vectors)]


def likelihoods(
    model: Model,
    examples: Sequence[Example],
    vectors: Adapter | tuple[Adapter, ...] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """Return, per example, the log-likelihood of the assistant's tokens in nats and whether greedy decoding gives them.

    progress: called with the number of examples done.
    """
    scored = _scored(model, examples, vectors, progress)
    return [(-float(losses.sum(dtype=np.float64)), bool(likeliest.all())) for losses, likeliest in scored]


def _scored(
    model: Model,
    examples: Sequence[Example],
    vectors: Adapter | tuple[Adapter, ...] | None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each example's losses at its supervised tokens, and whether each token was the most likely one."""
    if not examples:
        return []
    for number, example in enumerate(examples, 1):
        check_token_ids(example.tokens, model.architecture.vocab_size, f"row {number}")
    prefix = shared_prefix(examples)  # computed once for all rows
    max_targets = rounded_up(max(int(e.supervised.sum()) for e in examples), _BUCKET)
    rows = rounded_up(_BATCH, num_shards("batch"))
    scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(examples), rows):
        batch = order[start : start + rows]
        width = rounded_up(len(examples[batch[-1]].tokens) - len(prefix), _BUCKET)
        tokens, marks = np.zeros((rows, width), np.int32), np.zeros((2, rows, width), np.int32)
        marks[0, :, 0] = 1  # padding rows must not be empty
        for row, index in enumerate(batch):
            tail = examples[index].tokens[len(prefix) :]
            tokens[row, : len(tail)], marks[0, row, : len(tail)] = tail, 1
            marks[1, row, : len(tail)] = examples[index].supervised[len(prefix) :]
        marks[1, :, 0] = 0  # nothing precedes the first token
        adapters = as_adapters(vectors)
        losses, likeliest = map(
            np.asarray,
            _row_losses(
                model.backbone, adapters, prefix[None], tokens, *marks, max_targets=max_targets, dtype=compute_dtype()
            ),
        )
        for row, index in enumerate(batch):
            count = marks[1, row].sum()
            scored[index] = losses[row, :count], likeliest[row, :count]
        progress(len(scored))
    return [scored[index] for index in range(len(examples))]


@partial(jax.jit, static_argnames=("max_targets", "dtype"))
def _row_losses(decoder, adapters, prefix, tokens, segments, supervised, *, max_targets, dtype):
    """Return the losses `[B, max_targets]` and whether each token was the most likely one.

    Each row's supervised tokens come first; `max_targets` is at least as large as their number in any row.
    """
    cache = prefix_cache(decoder, adapters, prefix, len(tokens), dtype)
    positions = prefix.shape[1] + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.prefill(tokens, segments, positions, adapters, cache, dtype)

    def row(hidden, tokens, supervised):
        (targets,) = jnp.nonzero(supervised, size=max_targets, fill_value=1)
        log_p = jax.nn.log_softmax(decoder.logits(hidden[targets - 1]))
        target_log_p = jnp.take_along_axis(log_p, tokens[targets, None], axis=-1)[:, 0]
        return -target_log_p, target_log_p >= log_p.max(-1)

    # Row by row: the logits of a whole batch would be the largest array of the program.
    results = jax.lax.map(lambda arguments: row(*arguments), (hidden, tokens, supervised))
    return jax.tree.map(lambda array: constrain(array, None), results)
