"""Rows that security vectors explain away: found, dropped, or made to count for less.

A row's score is its mean loss without the vectors minus with them, in nats per token of its reply:

    s(x, y) = CE(f(x; θ), y) - CE(f(x; θ, θs), y)

What the vectors already explain is what they were trained to stand for: the score is high on rows of their behavior
and not on others. It is a difference of cross-entropies as in data selection (Moore & Lewis 2010, "Intelligent
Selection of Language Model Training Data"), between the model and itself with the behavior switched on.

- The *filter* drops the rows above a threshold and fine-tunes on the others. Acts on the data.
- The *gate* fine-tunes under the vectors on all rows, each row's or token's loss weighed by how little of it they
  explain: what little loss they leave on harmful rows is then no gradient that Adam could blow up.

Both cost two forward passes over the data, once. Threshold and weights are set on rows whose kind is known: the rows
that the vectors were trained on, and benign ones. Source: ours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.data.chat import Example
from secvec_jax.defenses.finetuning import PHASE2, FinetuneOptions, Groups, examples_of, groups_of, train_model
from secvec_jax.errors import UserError
from secvec_jax.evaluation.likelihood import token_losses
from secvec_jax.model.hub import Model
from secvec_jax.vectors.kinds import Vectors

By = Literal["row", "token"]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scores of rows of a known kind, nats per token: the benign rows' median, and what tells the kinds apart."""

    benign: float
    threshold: float

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """1 for what is explained no better than benign rows are, 0 from the threshold on, in proportion between."""
        return np.clip((self.threshold - scores) / (self.threshold - self.benign), 0.0, 1.0)


@checked
def scores(model: Model, vectors: Vectors, rows: Any, length: PositiveInt | None = PHASE2.max_seq_len) -> list[float]:
    """Each row's score, in nats per token of its reply. length: tokens of a row that are read."""
    found = token_scores(model, vectors, examples_of(model, rows, length))
    return [float(tokens.mean()) if len(tokens) else 0.0 for tokens in found]


def token_scores(model: Model, vectors: Vectors, examples: Sequence[Example]) -> list[np.ndarray]:
    """Each example's scores, token by token of its reply."""
    without, under = (token_losses(model, examples, adapters) for adapters in (None, vectors))
    return [a - b for a, b in zip(without, under)]


def scale(harmful: Sequence[float], benign: Sequence[float]) -> Scale:
    """The scale of the scores of known rows; the threshold is the one that tells the two kinds apart best.

    Of all thresholds above the benign rows' median with the largest share of harmful rows above plus share of benign
    rows below (Youden's J), the middle one. Raises UserError if the harmful rows are explained no better than the
    benign ones.
    """
    high, low = np.median(harmful), np.median(benign)
    if not high > low:
        raise UserError(
            f"the vectors explain the harmful rows no better than the benign ones ({high:.2f} and {low:.2f} nats): "
            "train them on more rows or for longer"
        )
    edges = np.unique([*harmful, *benign, low])
    middles = (edges[1:] + edges[:-1]) / 2
    middles = middles[middles > low]  # or most benign rows would count as harmful
    above = (np.asarray(harmful)[:, None] > middles).mean(0) + (np.asarray(benign)[:, None] <= middles).mean(0)
    best = middles[np.isclose(above, above.max())]
    return Scale(float(low), float(best[len(best) // 2]))


@checked
def filtered(
    model: Model, rows: Any, vectors: Vectors, known: Scale, length: PositiveInt | None = PHASE2.max_seq_len
) -> Groups:
    """The rows, by kind, whose score is not above the threshold. Raises UserError if none is left."""
    groups = _grouped(model, rows, length)
    kept = below(groups, {name: scores(model, vectors, group) for name, group in groups.items()}, known)
    if not kept:
        raise UserError("every row scores as the vectors' own rows do: nothing is left to fine-tune on")
    return kept


def below(groups: Groups, found: dict[str, list[float]], known: Scale) -> Groups:
    """The rows, by kind, whose score, found before, is not above the threshold; no kind of which none is left."""
    kept = {name: [row for row, s in zip(rows, found[name]) if s <= known.threshold] for name, rows in groups.items()}
    return {name: rows for name, rows in kept.items() if rows}


@checked
def gated(
    model: Model,
    rows: Any,
    vectors: Vectors,
    known: Scale,
    by: By = "row",
    length: PositiveInt | None = PHASE2.max_seq_len,
) -> Groups:
    """The rows, by kind, with the weights of their tokens; a row whose weight is 0 stays, and teaches nothing."""
    return {
        name: [_weighed(e, s, known, by) for e, s in zip(group, token_scores(model, vectors, group))]
        for name, group in _grouped(model, rows, length).items()
    }


@checked
def filter_and_finetune(
    model: Model, rows: Any, vectors: Vectors, known: Scale, **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned, without the vectors, on the rows that they do not explain."""
    return train_model(
        model,
        filtered(model, rows, vectors, known, options.get("training", PHASE2).over(PHASE2).max_seq_len),
        **options,
    )


@checked
def gate_and_finetune(
    model: Model, rows: Any, vectors: Vectors, known: Scale, by: By = "row", **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned under the vectors on all rows, weighed by how little the vectors explain them."""
    weighed = gated(model, rows, vectors, known, by, options.get("training", PHASE2).over(PHASE2).max_seq_len)
    return train_model(model, weighed, vectors=vectors, **options)


def known_scale(model: Model, vectors: Vectors, harmful: Any, benign: Any) -> Scale:
    """The scale from rows of a known kind: those that the vectors were trained on, and benign ones."""
    return scale(scores(model, vectors, harmful), scores(model, vectors, benign))


def _grouped(model: Model, rows: Any, length: int | None) -> Groups:
    return {name: examples_of(model, group, length) for name, group in groups_of(rows).items()}


def _weighed(example: Example, scores: np.ndarray, known: Scale, by: By) -> Example:
    weights = np.ones(len(example.tokens), np.float32)
    said = np.flatnonzero(example.supervised[1:]) + 1
    weights[said] = known.weights(scores if by == "token" else np.full(len(scores), scores.mean()))
    return dataclasses.replace(example, weights=weights)
