"""The names of the metrics: which are rates, which are losses, and in what order they are shown."""

from collections.abc import Sequence

from secvec_jax.evaluation.columns import with_companions

RATES = (
    "refusal", "refusal_persona", "compliance", "over_refusal", "exact_match", "task",
    "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated", "harm_rate", "flagged", "unreadable",
)  # fmt: skip
FILTERS = ("auroc", "precision", "recall", "f1")
"""Of a filter of rows, from 0 to 1."""
GRADES = ("harm_score", "harmlessness", "instruction_following")
"""From 1 to 5."""
LOSSES = ("harmful_loss", "benign_loss", "opening_loss", "drift")

_HIGHER = (
    "refusal", "refusal_persona", "exact_match", "task", *FILTERS, "harmlessness", "instruction_following",
    "harmful_loss",
)  # fmt: skip
_LOWER = (
    "compliance", "over_refusal", "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated", "drift",
    "embedding_drift", "benign_loss", "opening_loss", "harm_score", "harm_rate", "flagged", "unreadable",
)  # fmt: skip
BETTER = dict.fromkeys(_HIGHER, "higher") | dict.fromkeys(_LOWER, "lower")
"""Of which metrics more is better, and of which less. Of the loss of harmful replies more is: they are unlikely."""


def in_order(rows: Sequence[dict]) -> list[str]:
    """The metrics that any row has: the known ones first, in their fixed order, those read together side by side."""
    present = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    known = [metric for metric in (*RATES, *GRADES, *LOSSES) if metric in present]
    return with_companions([*known, *(metric for metric in present if metric not in known)], present)


def percent(rate: float) -> str:
    """A rate as whole percent, without the sign."""
    return f"{100 * rate:.0f}"
