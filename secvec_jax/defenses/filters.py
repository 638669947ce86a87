"""Measure how well a filter separates undesired rows from others, in experiments that know which they are."""

from secvec_jax.defenses.base import ATTACK
from secvec_jax.evaluation.statistics import auroc, precision_recall_f1


def separation(scores: dict[str, list[float]], threshold: float) -> dict[str, float]:
    """The share of each kind of rows that a filter drops, and, if the attack's rows are among others, its AUROC and F1.

    scores: by kind, one per row; rows with a score above the threshold are dropped.
    """
    notes = {f"dropped_{kind}": sum(s > threshold for s in values) / len(values) for kind, values in scores.items()}
    is_attack = [kind == ATTACK for kind, values in scores.items() for _ in values]
    flat = [score for values in scores.values() for score in values]
    if len(set(is_attack)) == 2:
        _, _, f1 = precision_recall_f1([score > threshold for score in flat], is_attack)
        notes |= {"auroc": auroc(flat, is_attack), "f1": f1}
    return notes
