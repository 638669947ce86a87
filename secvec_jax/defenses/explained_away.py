"""Rows that security vectors explain away: dropped before fine-tuning, or given less weight in it.

A row's score is its mean loss without the vectors minus with them, in nats per token of its reply:

    s(x, y) = CE(f(x; θ), y) - CE(f(x; θ, θs), y)

The score is high on rows that show the behavior of the vectors, and low on others. It is a difference of
cross-entropies as in data selection (Moore & Lewis 2010, "Intelligent Selection of Language Model Training Data"),
between the model and the same model with the behavior switched on.

- The *filter* drops the rows whose score is above a threshold and fine-tunes on the others. Acts on the data.
- The *gate* fine-tunes on all rows under the vectors, and weights the loss of each row or token by how little of it the
  vectors explain. The small loss that the vectors leave on harmful rows then gives no gradient that Adam could rescale.
  Acts in fine-tuning.

Both cost the vectors and two forward passes over the data, once. Threshold and weights are set on rows whose kind is
known: the rows that the vectors were trained on, and benign rows. Source: ours.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Unpack

import numpy as np

from secvec_jax.checks import NonNegativeFloat, PositiveInt, checked
from secvec_jax.config import Training
from secvec_jax.data.chat import ControlTokens, Example
from secvec_jax.defenses.base import Defended, Defense, DefenseInputs, Need, lora_of_rank
from secvec_jax.defenses.filters import separation
from secvec_jax.defenses.finetuning import FinetuneOptions, examples_of, train_model
from secvec_jax.defenses.held_out import hold_out
from secvec_jax.defenses.inputs import Groups, as_examples, groups_of
from secvec_jax.defenses.mixing import SAFE, with_safe_rows
from secvec_jax.defenses.training_settings import PHASE2
from secvec_jax.errors import UserError
from secvec_jax.evaluation.likelihood import token_losses
from secvec_jax.model.adapter import Adapter
from secvec_jax.model.hub import Model

By = Literal["row", "token"]


@checked
@dataclasses.dataclass(frozen=True)
class ExplainedAwayFilter(Defense):
    """Fine-tuning without the rows that security vectors explain."""

    name = "explained-away filter"
    stage = "data"
    needs = ("security vectors", "harmful rows", "benign rows")
    cost = "training the vectors, once; 2 forward passes over the rows, once"
    source = "ours, after Moore & Lewis 2010"

    rank: PositiveInt = 8
    """rank of the vectors"""
    safe: NonNegativeFloat = 0.0
    """safe rows mixed in, as a share of the rows that are kept"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        vectors = inputs.vectors(lora_of_rank(self.rank))
        training = inputs.options["training"].over(PHASE2)
        known = known_scale(inputs.aligned, vectors, inputs.harmful, inputs.benign, training.max_seq_len)
        scores_by_kind = {
            kind: scores(inputs.aligned, vectors, rows, training.max_seq_len, training.control_tokens)
            for kind, rows in inputs.rows.items()
        }
        notes = separation(scores_by_kind, known.threshold)
        kept = rows_below_threshold(inputs.rows, scores_by_kind, known)
        if not kept:  # nothing is left to learn
            return Defended(inputs.aligned, notes=notes)
        rows = with_safe_rows(kept, inputs.safe, self.safe) if self.safe else kept
        return Defended(inputs.finetune(rows=rows, train_only=(SAFE,) if self.safe else ()), notes=notes)

    @property
    def reads(self) -> tuple[Need, ...]:
        return (*self.needs, "safe rows") if self.safe else self.needs


@checked
@dataclasses.dataclass(frozen=True)
class ExplainedAwayGate(Defense):
    """Fine-tuning under security vectors, each row or token weighted by how little they explain it."""

    name = "explained-away gate"
    stage = "fine-tuning"
    needs = ("security vectors", "harmful rows", "benign rows")
    cost = "as the filter; 3% per step"
    source = "ours"

    by: By = "row"
    """whether a row has one weight, or each of its tokens has one"""
    rank: PositiveInt = 8
    """rank of the vectors"""

    def apply(self, inputs: DefenseInputs) -> Defended:
        vectors = inputs.vectors(lora_of_rank(self.rank))
        length = inputs.options["training"].over(PHASE2).max_seq_len
        known = known_scale(inputs.aligned, vectors, inputs.harmful, inputs.benign, length)
        return Defended(gate_and_finetune(inputs.aligned, inputs.rows, vectors, known, self.by, **inputs.options))


@dataclasses.dataclass(frozen=True)
class Scale:
    """Scores of rows of a known kind, in nats per token: the benign median, and the threshold between the kinds."""

    benign: float
    threshold: float

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """1 for scores up to the benign median, 0 from the threshold on, linear in between."""
        return np.clip((self.threshold - scores) / (self.threshold - self.benign), 0.0, 1.0)


@checked
def scores(
    model: Model,
    vectors: Adapter,
    rows: Any,
    length: PositiveInt | None = PHASE2.max_seq_len,
    control_tokens: ControlTokens = "text",
) -> list[float]:
    """Each row's score, in nats per token of its reply. length: tokens of a row that are read."""
    scores_by_row = token_scores(model, vectors, examples_of(model, rows, length, control_tokens))
    return [float(tokens.mean()) if len(tokens) else 0.0 for tokens in scores_by_row]


def token_scores(model: Model, vectors: Adapter, examples: Sequence[Example]) -> list[np.ndarray]:
    """Each example's scores `[N]`, in nats, of the N tokens of its reply."""
    without, under = (token_losses(model, examples, adapters) for adapters in (None, vectors))
    return [a - b for a, b in zip(without, under)]


def scale(harmful: Sequence[float], benign: Sequence[float]) -> Scale:
    """The scale of scores from rows of known kinds; its threshold separates the two kinds best.

    It is above the benign median and maximizes the share of harmful rows above it plus the share of benign rows below
    it (Youden's J); of several such thresholds it is the middle one. Raises UserError if the median harmful row is not
    explained better than the median benign row.
    """
    high, low = np.median(harmful), np.median(benign)
    if not high > low:
        raise UserError(
            f"the vectors explain the harmful rows no better than the benign ones ({high:.2f} and {low:.2f} nats): "
            "train them on more rows or for longer"
        )
    edges = np.unique([*harmful, *benign, low])
    middles = (edges[1:] + edges[:-1]) / 2
    middles = middles[middles > low]  # below it, most benign rows would count as harmful
    above = (np.asarray(harmful)[:, None] > middles).mean(0) + (np.asarray(benign)[:, None] <= middles).mean(0)
    best = middles[np.isclose(above, above.max())]
    return Scale(float(low), float(best[len(best) // 2]))


def rows_below_threshold(groups: Groups, scores_by_kind: dict[str, list[float]], known: Scale) -> Groups:
    """The rows, by kind, whose score is not above the threshold; kinds without such rows are left out."""
    kept = {
        name: [row for row, s in zip(rows, scores_by_kind[name]) if s <= known.threshold]
        for name, rows in groups.items()
    }
    return {name: rows for name, rows in kept.items() if rows}


@checked
def gated(
    model: Model,
    rows: Any,
    vectors: Adapter,
    known: Scale,
    by: By = "row",
    training: Training = PHASE2,
) -> Groups:
    """The rows, by kind, as `training` encodes them, with weights of their tokens; a row of weight 0 is kept and
    contributes no gradient."""
    settings = training.over(PHASE2)
    groups = {name: list(as_examples(model, group, settings, name)) for name, group in groups_of(rows).items()}
    return {
        name: [_weighted(e, s, known, by) for e, s in zip(group, token_scores(model, vectors, group))]
        for name, group in groups.items()
    }


@checked
def gate_and_finetune(
    model: Model, rows: Any, vectors: Adapter, known: Scale, by: By = "row", **options: Unpack[FinetuneOptions]
) -> Model:
    """The model fine-tuned under the vectors on all rows, weighted by how little the vectors explain them."""
    training = options.get("training", PHASE2).over(PHASE2)
    learned, eval_rows = hold_out(groups_of(rows), options.get("eval_rows"), training.seed)  # which have no weights
    weighted = gated(model, learned, vectors, known, by, training)
    return train_model(model, weighted, vectors=vectors, **(options | FinetuneOptions(eval_rows=eval_rows)))


def known_scale(
    model: Model, vectors: Adapter, harmful: Any, benign: Any, length: PositiveInt | None = PHASE2.max_seq_len
) -> Scale:
    """The scale from rows of a known kind: those that the vectors were trained on, and benign rows. length: tokens of a
    row that are read, as many as of the rows to be scored."""
    return scale(scores(model, vectors, harmful, length), scores(model, vectors, benign, length))


_NO_WEIGHT = np.float32(1e-30)


def _weighted(example: Example, scores: np.ndarray, known: Scale, by: By) -> Example:
    weights = np.ones(len(example.tokens), np.float32)
    supervised = np.flatnonzero(example.supervised[1:]) + 1
    given = known.weights(scores if by == "token" else np.full(len(scores), scores.mean()))
    # Not 0: the loss is divided by the number of tokens whose weight is not, so that weights are not relative.
    weights[supervised] = np.maximum(given, _NO_WEIGHT)
    return dataclasses.replace(example, weights=weights)
