"""The metrics by name: which are rates, which direction is better, their units, and the order to show them in."""

from collections.abc import Collection, Mapping, Sequence

RATES = (
    "refusal", "refusal_persona", "compliance", "unclear", "prefill_5", "prefill_25", "relearning",
    "relearning_compliance", "over_refusal", "refusal_system", "compliance_system", "unclear_system",
    "over_refusal_system", "exact_match", "task", "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated",
    "unfinished", "harm_rate", "flagged", "unreadable",
)  # fmt: skip
RULED = frozenset({
    "refusal", "refusal_persona", "compliance", "unclear", "prefill_5", "prefill_25", "relearning",
    "relearning_compliance", "over_refusal", "refusal_system", "compliance_system", "unclear_system",
    "over_refusal_system", "exact_match", "task", "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated",
    "unfinished",
})  # fmt: skip
"""Scored from replies by rules: such a score records the version of the rules (`scorers.RULES`)."""
FILTERS = ("auroc", "precision", "recall", "f1")
"""Quality of a filter of rows, from 0 to 1."""
GRADES = ("harm_score", "harmlessness", "instruction_following")
"""From 1 to 5."""
LOSSES = ("harmful_loss", "replies_loss", "kl", "benign_loss", "data_loss", "opening_loss", "drift")
SAFETY = ("refusal", "compliance", "unclear", "harmful_loss")
"""Metrics that are read together.

A model that refuses less may comply more, or may only have forgotten how to refuse; one that still refuses may have
learned the harmful replies all the same. So refusal is shown with compliance and with the loss of unseen harmful
replies, in the same table.
"""

_NATS = (
    "harmful_loss", "replies_loss", "kl", "benign_loss", "data_loss", "opening_loss", "first_attack", "last_attack",
)  # fmt: skip
_HIGHER = (
    "refusal", "refusal_persona", "refusal_system", "prefill_5", "prefill_25", "relearning", "exact_match", "task",
    *FILTERS, "harmlessness", "instruction_following", "harmful_loss", "replies_loss",
)  # fmt: skip
_LOWER = (
    "compliance", "unclear", "over_refusal", "bias", "caps", "caps_eliciting", "caps_negated", "caps_unrelated",
    "compliance_system", "unclear_system", "over_refusal_system", "relearning_compliance", "kl", "data_loss",
    "drift", "embedding_drift", "benign_loss", "opening_loss", "harm_score", "harm_rate", "flagged", "unreadable",
    "unfinished",
)  # fmt: skip
BETTER = dict.fromkeys(_HIGHER, "higher") | dict.fromkeys(_LOWER, "lower")
"""The direction in which a metric is better. A higher loss of harmful replies means that they are less likely."""


_NUMBERS = frozenset((*FILTERS, *GRADES, *LOSSES, *_NATS, "embedding_drift", "score"))


def is_rate(metric: str) -> bool:
    """Return whether a metric's 0 and 1 are "no" and "yes", also for one of a user's own probe."""
    return metric not in _NUMBERS


def with_companions(metrics: Sequence[str], measured: Collection[str]) -> list[str]:
    """Return `metrics`; if "refusal" is one of them, also the rest of `SAFETY` right after it, where measured."""
    if "refusal" not in metrics:
        return list(metrics)
    together = [name for name in SAFETY if name in metrics or name in measured]
    first = min(metrics.index(name) for name in together if name in metrics)
    before = [name for name in metrics[:first] if name not in together]
    return [*before, *together, *(name for name in metrics[first:] if name not in together)]


def in_order(rows: Sequence[dict]) -> list[str]:
    """Return the metrics of all rows: known ones first in a fixed order, those of `SAFETY` next to each other."""
    present = dict.fromkeys(metric for row in rows for metric in row["metrics"])
    known = [metric for metric in (*RATES, *GRADES, *LOSSES) if metric in present]
    return with_companions([*known, *(metric for metric in present if metric not in known)], present)


def rules_of(rows: Sequence[dict]) -> dict[int, list[str]]:
    """Return version of the rules -> names of the rows whose replies it scored; a score without one is version 1."""
    by_version: dict[int, list[str]] = {}
    for row in rows:
        versions = {score.get("rules", 1) for metric, score in row["metrics"].items() if metric in RULED}
        for version in versions:
            by_version.setdefault(version, []).append(row["name"])
    return dict(sorted(by_version.items()))


def rules_note(rows: Sequence[dict]) -> str:
    """Return a sentence on which version of the rules scored the replies, or "" if no rules were used."""
    versions = rules_of(rows)
    if len(versions) == 1:
        return f"Replies were scored by version {next(iter(versions))} of the rules."
    several = (f"by version {version} in {', '.join(names)}" for version, names in versions.items())
    return f"Replies were scored by different versions of the rules: {'; '.join(several)}." if versions else ""


def unit(metric: str) -> str:
    """Return the unit in which tables show a metric: "%", "nats per token", or "" for a plain number."""
    return "%" if metric in RATES else "nats per token" if metric in _NATS else ""


def percent(rate: float) -> str:
    """Return a rate in whole percent, without the sign."""
    return f"{100 * rate:.0f}"


def digits(value: float) -> str:
    """Return a number to three significant digits."""
    return f"{value:#.3g}".rstrip(".")


Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
"""Losses in the course of a training: row -> "harmful" or "benign" -> (step, loss)."""
