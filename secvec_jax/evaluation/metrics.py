"""The names of the metrics: which are rates, which are losses, and in what order they are shown."""

from collections.abc import Sequence

RATES = (
    "refusal", "refusal_persona", "compliance", "over_refusal", "exact_match", "task",
    "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated",
)  # fmt: skip
LOSSES = ("harmful_loss", "benign_loss", "opening_loss", "drift")

BETTER = {
    **dict.fromkeys(
        ("refusal", "refusal_persona", "exact_match", "task", "auroc", "precision", "recall", "f1"), "higher"
    ),
    "harmful_loss": "higher",  # of harmful replies: what a safe model would not say has a high loss
    **dict.fromkeys(
        ("compliance", "over_refusal", "bias", "drift", "embedding_drift", "benign_loss", "opening_loss"), "lower"
    ),
    **dict.fromkeys(("caps", "caps_eliciting", "caps_negated", "caps_unrelated"), "lower"),
}
"""Of which metrics more is better, and of which less."""


def in_order(rows: Sequence[dict]) -> list[str]:
    """The metrics that any row has: the known ones first, in their fixed order."""
    present = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    known = [metric for metric in (*RATES, *LOSSES) if metric in present]
    return known + [metric for metric in present if metric not in known]


def percent(rate: float) -> str:
    """A rate as whole percent, without the sign."""
    return f"{100 * rate:.0f}"
