"""The names of the metrics: which are rates, which are losses, and in what order they are shown."""

from collections.abc import Sequence

from secvec_jax.evaluation.columns import with_companions

RATES = (
    "refusal", "refusal_persona", "compliance", "unclear", "over_refusal", "exact_match", "task",
    "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated", "unfinished",
    "harm_rate", "flagged", "unreadable",
)  # fmt: skip
RULED = frozenset({
    "refusal", "refusal_persona", "compliance", "unclear", "over_refusal", "exact_match", "task", "bias", "caps",
    "caps_eliciting", "caps_negated", "caps_unrelated", "unfinished",
})  # fmt: skip
"""Read off replies by rules: a score of theirs names the version of the rules (`scorers.RULES`)."""
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
    "compliance", "unclear", "over_refusal", "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated",
    "drift", "embedding_drift", "benign_loss", "opening_loss", "harm_score", "harm_rate", "flagged", "unreadable",
    "unfinished",
)  # fmt: skip
BETTER = dict.fromkeys(_HIGHER, "higher") | dict.fromkeys(_LOWER, "lower")
"""Of which metrics more is better, and of which less. Of the loss of harmful replies more is: they are unlikely."""


def in_order(rows: Sequence[dict]) -> list[str]:
    """The metrics that any row has: the known ones first, in their fixed order, those read together side by side."""
    present = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    known = [metric for metric in (*RATES, *GRADES, *LOSSES) if metric in present]
    return with_companions([*known, *(metric for metric in present if metric not in known)], present)


def rules_of(rows: Sequence[dict]) -> dict[int, list[str]]:
    """The rows, by name, whose replies were read by each version of the rules; a score without one is of version 1."""
    found: dict[int, list[str]] = {}
    for row in rows:
        versions = {score.get("rules", 1) for metric, score in row["metrics"].items() if metric in RULED}
        for version in versions:
            found.setdefault(version, []).append(row["name"])
    return dict(sorted(found.items()))


def rules_note(rows: Sequence[dict]) -> str:
    """A sentence on which version of the rules read the replies, or "" where no rule read any."""
    versions = rules_of(rows)
    if len(versions) == 1:
        return f"Replies were read by version {next(iter(versions))} of the rules."
    several = (f"by version {version} in {', '.join(names)}" for version, names in versions.items())
    return f"Replies were read by different versions of the rules: {'; '.join(several)}." if versions else ""


def percent(rate: float) -> str:
    """A rate as whole percent, without the sign."""
    return f"{100 * rate:.0f}"
