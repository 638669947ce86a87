"""How well a filter of rows separates undesired rows from the others, where an experiment knows which they are."""

from secvec_jax.defenses.base import ATTACK
from secvec_jax.evaluation.statistics import auroc, precision_recall_f1


def separation(scores: dict[str, list[float]], threshold: float) -> dict[str, float]:
    """The share of each kind of rows that a filter drops, and, if some of them are the attack's, its AUROC and F1.

    scores: by kind, one per row; rows with a score above the threshold are dropped.
    """
    notes = {f"dropped_{kind}": sum(s > threshold for s in some) / len(some) for kind, some in scores.items()}
    is_attack = [kind == ATTACK for kind, some in scores.items() for _ in some]
    flat = [score for some in scores.values() for score in some]
    if len(set(is_attack)) == 2:
        _, _, f1 = precision_recall_f1([score > threshold for score in flat], is_attack)
        notes |= {"auroc": auroc(flat, is_attack), "f1": f1}
    return notes
