"""Loss and log-likelihood of given replies under a model, and how much two models' distributions differ on them."""

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
from secvec_jax.model.generate import batches_by_length, pack_prompts, prefix_cache, rounded_up
from secvec_jax.model.hub import Model
from secvec_jax.sharding import constrain

_BUCKET = 8
_MAX_ROWS, _MAX_TOKENS = 32, 8192
"""Limits of a batch, so that its sequences fill the processor and its hidden states fit into memory."""
_PACKED_TOGETHER = 1024
"""Rows that are in memory at a time: all of them may not fit."""
_ROWS_OF_LOG_PROBS = 8
"""Rows of a batch for which two models' log-probabilities of all tokens are kept."""


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

    Exactly 0 for a model with the same parameters. The examples are token ids of both models; if one has more
    embeddings, as padding, the others' ids are compared. progress: called with the number of examples done.
    """
    means: dict[int, float] = {}
    size = min(each.architecture.vocab_size for each in (reference, model))
    for batch in _batches(reference, examples, _ROWS_OF_LOG_PROBS):
        # One program, run for each model: equal parts are computed in the same order, and cancel out.
        log_p, log_q = (
            _row_log_probs(each.backbone, *batch.packed, batch.before, size=size, dtype=compute_dtype())
            for each in (reference, model)
        )
        divergences = np.asarray(_kl(log_p, log_q))
        for row, (index, count) in enumerate(zip(batch.indices, batch.counts)):
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
    for batch in _batches(model, examples, _MAX_ROWS):
        arrays = (*batch.packed, batch.before, batch.targets)
        losses, likeliest = map(np.asarray, _row_losses(model.backbone, adapters, *arrays, dtype=compute_dtype()))
        for row, (index, count) in enumerate(zip(batch.indices, batch.counts)):
            scored[index] = losses[row, :count], likeliest[row, :count]
        progress(len(scored))
    return [scored[index] for index in range(len(examples))]


class _Batch(NamedTuple):
    """Examples packed into sequences, in shapes that most batches share.

    indices: which examples, row by row; further rows are padding. counts: the supervised tokens of each.
    prefix `[P]`: the tokens with which all begin. tokens, segments, positions `[S, W]`: of what follows, packed.
    before, targets `[B, max_targets]`: of each row's supervised tokens, in order, the flat index of the token before,
    and the token itself.
    """

    indices: list[int]
    counts: list[int]
    prefix: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    before: np.ndarray
    targets: np.ndarray

    @property
    def packed(self) -> tuple[np.ndarray, ...]:
        return self.prefix[None], self.tokens, self.segments, self.positions


def _batches(model: Model, examples: Sequence[Example], max_rows: int) -> Iterator[_Batch]:
    """Batches of all examples, by length, at most `max_rows` in each.

    Raises UserError for a token id that the model has no embedding for.
    """
    if not examples:
        return
    for number, example in enumerate(examples, 1):
        check_token_ids(example.tokens, model.architecture.vocab_size, f"row {number}")
    prefix = shared_prefix(examples)  # computed once for all rows
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    for start in range(0, len(order), _PACKED_TOGETHER):
        chosen = order[start : start + _PACKED_TOGETHER]
        for batch in _packed_batches([examples[index] for index in chosen], prefix, max_rows):
            yield batch._replace(indices=[chosen[index] for index in batch.indices])


def _packed_batches(examples: Sequence[Example], prefix: np.ndarray, max_rows: int) -> Iterator[_Batch]:
    """Batches of all examples, which begin with the prefix, in as few shapes as their lengths allow."""
    tails = [np.asarray(example.tokens[len(prefix) :]) for example in examples]
    supervised = [np.flatnonzero(example.supervised[len(prefix) :]) for example in examples]
    supervised = [places[places > 0] for places in supervised]  # nothing precedes the first token
    for rows, batches in batches_by_length(tails, max_rows, _MAX_TOKENS):
        max_targets = rounded_up(max(1, *(len(supervised[index]) for batch in batches for index in batch)), _BUCKET)
        all_packed = pack_prompts([[tails[index] for index in batch] for batch in batches], rows, len(prefix))
        for batch, packed in zip(batches, all_packed):
            before, targets = (np.zeros((rows, max_targets), np.int32) for _ in range(2))
            for row, index in enumerate(batch):
                places = supervised[index]
                flat = packed.indices[row, packed.indices.shape[1] - len(tails[index]) :]
                before[row, : len(places)], targets[row, : len(places)] = flat[places - 1], tails[index][places]
            counts = [len(supervised[index]) for index in batch]
            yield _Batch(batch, counts, prefix, packed.tokens, packed.segments, packed.positions, before, targets)


@partial(jax.jit, static_argnames="dtype")
def _row_losses(decoder, adapters, prefix, tokens, segments, positions, before, targets, *, dtype):
    """Return the losses `[B, max_targets]` and whether each token was the most likely one."""
    hidden = _hidden(decoder, adapters, prefix, tokens, segments, positions, dtype)

    def row(before, targets):
        log_p = _log_probs(decoder, hidden, before)
        target_log_p = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
        return -target_log_p, target_log_p >= log_p.max(-1)

    # Row by row: the logits of a whole batch would be the largest array of the program.
    results = jax.lax.map(lambda arguments: row(*arguments), (before, targets))
    return jax.tree.map(lambda array: constrain(array, None), results)


@partial(jax.jit, static_argnames=("size", "dtype"))
def _row_log_probs(decoder, prefix, tokens, segments, positions, before, *, size, dtype):
    """Return the log-probabilities `[B, max_targets, size]` of the first `size` tokens at rows' supervised ones."""
    hidden = _hidden(decoder, (), prefix, tokens, segments, positions, dtype)
    return jax.lax.map(partial(_log_probs, decoder, hidden, size=size), before)


@jax.jit
def _kl(log_p, log_q):
    """Return `[B, max_targets]`."""
    return constrain(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), None)


def _hidden(decoder, adapters, prefix, tokens, segments, positions, dtype):
    """Return the hidden states `[S * W, D]` of packed rows that follow the prefix."""
    tokens, segments, positions = (constrain(array, "batch", "length") for array in (tokens, segments, positions))
    cache = prefix_cache(decoder, adapters, prefix, len(tokens), dtype)
    hidden, _ = decoder.prefill(tokens, segments, positions, adapters, cache, dtype)
    return hidden.reshape(-1, hidden.shape[-1])


def _log_probs(decoder, hidden, before, size=None):
    """Return the log-probabilities `[max_targets, V]` of what follows the tokens with these indices, among the first
    `size` tokens (None: all)."""
    return jax.nn.log_softmax(decoder.logits(hidden[before])[..., :size])
