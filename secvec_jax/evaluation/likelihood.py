"""Loss and log-likelihood of given replies under a model, and how far two models' distributions are apart on them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

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


def kl_divergences(
    reference: Model, model: Model, examples: Sequence[Example], progress: Callable[[int], None] = lambda done: None
) -> list[float]:
    """Return each example's mean KL(reference || model) over the assistant's tokens, in nats per token.

    Exactly 0 for a model with the same parameters. The examples are token ids of both models. progress: called with
    the number of examples done.
    """
    means: dict[int, float] = {}
    for batch in _batches(reference, examples):
        # One program, run for each model: what is equal in both is computed in the same order, and cancels out.
        log_p, log_q = (_row_log_probs(each.backbone, *batch.arrays, **batch.options) for each in (reference, model))
        divergences = np.asarray(_kl(log_p, log_q))
        for row, index in enumerate(batch.indices):
            count = int(batch.supervised[row].sum())
            means[index] = float(divergences[row, :count].mean()) if count else 0.0
        progress(len(means))
    return [means[index] for index in range(len(examples))]


def _scored(
    model: Model,
    examples: Sequence[Example],
    vectors: Adapter | tuple[Adapter, ...] | None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return each example's losses at its supervised tokens, and whether each token was the most likely one."""
    scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    adapters = as_adapters(vectors)
    for batch in _batches(model, examples):
        losses, likeliest = map(np.asarray, _row_losses(model.backbone, adapters, *batch.arrays, **batch.options))
        for row, index in enumerate(batch.indices):
            count = batch.supervised[row].sum()
            scored[index] = losses[row, :count], likeliest[row, :count]
        progress(len(scored))
    return [scored[index] for index in range(len(examples))]


class _Batch(NamedTuple):
    """Examples of similar lengths, padded to one shape.

    indices: which examples, row by row; further rows are padding. prefix `[P]`: the tokens with which all begin.
    tokens, segments, supervised: `[B, T]`, of what follows.
    """

    indices: list[int]
    prefix: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray
    supervised: np.ndarray
    options: dict

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.prefix[None], self.tokens, self.segments, self.supervised


def _batches(model: Model, examples: Sequence[Example]) -> Iterator[_Batch]:
    """Batches of all examples, by length. Raises UserError for a token id that the model has no embedding for."""
    if not examples:
        return
    for number, example in enumerate(examples, 1):
        check_token_ids(example.tokens, model.architecture.vocab_size, f"row {number}")
    prefix = shared_prefix(examples)  # computed once for all rows
    max_targets = rounded_up(max(int(e.supervised.sum()) for e in examples), _BUCKET)
    options = {"max_targets": max_targets, "dtype": compute_dtype()}
    rows = rounded_up(_BATCH, num_shards("batch"))
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(examples), rows):
        indices = order[start : start + rows]
        width = rounded_up(len(examples[indices[-1]].tokens) - len(prefix), _BUCKET)
        tokens, segments, supervised = (np.zeros((rows, width), np.int32) for _ in range(3))
        segments[:, 0] = 1  # padding rows must not be empty
        for row, index in enumerate(indices):
            tail = examples[index].tokens[len(prefix) :]
            tokens[row, : len(tail)], segments[row, : len(tail)] = tail, 1
            supervised[row, : len(tail)] = examples[index].supervised[len(prefix) :]
        supervised[:, 0] = 0  # nothing precedes the first token
        yield _Batch(indices, prefix, tokens, segments, supervised, options)


@partial(jax.jit, static_argnames=("max_targets", "dtype"))
def _row_losses(decoder, adapters, prefix, tokens, segments, supervised, *, max_targets, dtype):
    """Return the losses `[B, max_targets]` and whether each token was the most likely one.

    Each row's supervised tokens come first; `max_targets` is at least as large as their number in any row.
    """

    def row(hidden, tokens, supervised):
        log_p, targets = _target_log_probs(decoder, hidden, supervised, max_targets)
        target_log_p = jnp.take_along_axis(log_p, tokens[targets, None], axis=-1)[:, 0]
        return -target_log_p, target_log_p >= log_p.max(-1)

    hidden = _hidden(decoder, adapters, prefix, tokens, segments, dtype)
    # Row by row: the logits of a whole batch would be the largest array of the program.
    results = jax.lax.map(lambda arguments: row(*arguments), (hidden, tokens, supervised))
    return jax.tree.map(lambda array: constrain(array, None), results)


@partial(jax.jit, static_argnames=("max_targets", "dtype"))
def _row_log_probs(decoder, prefix, tokens, segments, supervised, *, max_targets, dtype):
    """Return the log-probabilities `[B, max_targets, V]` of all tokens at each row's supervised ones."""
    hidden = _hidden(decoder, (), prefix, tokens, segments, dtype)
    rows = (hidden, supervised)
    return jax.lax.map(lambda row: _target_log_probs(decoder, *row, max_targets)[0], rows)


@jax.jit
def _kl(log_p, log_q):
    """Return `[B, max_targets]`."""
    return constrain(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), None)


def _hidden(decoder, adapters, prefix, tokens, segments, dtype):
    """Return the hidden states `[B, T, D]` of rows that follow the prefix."""
    cache = prefix_cache(decoder, adapters, prefix, len(tokens), dtype)
    positions = prefix.shape[1] + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.prefill(tokens, segments, positions, adapters, cache, dtype)
    return hidden


def _target_log_probs(decoder, hidden, supervised, max_targets):
    """Return the log-probabilities `[max_targets, V]` at a row's supervised tokens, and where these are."""
    (targets,) = jnp.nonzero(supervised, size=max_targets, fill_value=1)
    return jax.nn.log_softmax(decoder.logits(hidden[targets - 1])), targets
