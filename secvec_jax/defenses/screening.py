"""Screen rows before anything is trained on them: which of them resemble the vectors' behavior?

    screening = screen(model, vectors, rows, harmful=known_harmful, benign=known_benign)
    suspects = [rows[index] for index in screening.suspects]

A row's score is the loss reduction from the vectors, in nats per token of its reply (see `explained_away`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from secvec_jax.checks import PositiveInt, checked
from secvec_jax.defenses import explained_away
from secvec_jax.errors import UserError
from secvec_jax.inference import as_model, as_vectors


@dataclasses.dataclass(frozen=True)
class Screening:
    """Scores of rows, in nats per token; the higher, the more a row resembles the vectors' behavior.

    scores: one per row, in order. harmful, benign: the scores of rows of known kind, if any. threshold: the score that
    separates these two kinds best; None without them.
    """

    scores: list[float]
    harmful: list[float] | None = None
    benign: list[float] | None = None
    threshold: float | None = None

    def with_known(self, harmful: list[float], benign: list[float]) -> "Screening":
        """The screening with the scores of rows of known kind, and the threshold that these give.

        Raises UserError if the harmful rows are explained no better than the benign ones.
        """
        threshold = explained_away.scale(harmful, benign).threshold
        return dataclasses.replace(self, harmful=harmful, benign=benign, threshold=threshold)

    @property
    def suspects(self) -> list[int]:
        """Indices of the rows above the threshold, the highest score first.

        Raises UserError without a threshold.
        """
        if self.threshold is None:
            raise UserError("there is no threshold: pass harmful= and benign= rows to screen()")
        above = [index for index, score in enumerate(self.scores) if score > self.threshold]
        return sorted(above, key=lambda index: -self.scores[index])

    def __repr__(self) -> str:
        if self.threshold is None:
            return f"Screening({len(self.scores)} rows, no threshold)"
        above = len(self.suspects)
        return f"Screening({above} of {len(self.scores)} rows above {self.threshold:+.2f} nats per token)"


@checked
def screen(
    model: Any,
    vectors: Any,
    rows: Any,
    *,
    harmful: Any = None,
    benign: Any = None,
    max_seq_len: PositiveInt = 1024,
    progress: Callable[[str], None] | None = None,
) -> Screening:
    """Score rows by the loss reduction from the vectors; nothing is trained.

    rows: dicts, a DataFrame, a `datasets.Dataset` or a path. harmful, benign: rows of known kind, which give the
    threshold; the rows that the vectors were trained on are a good choice for `harmful`. max_seq_len: tokens of a row
    that are read. progress: called with the name of the rows that are scored next.
    Raises UserError for rows that cannot be read, for only one of harmful and benign, and if the vectors explain the
    harmful rows no better than the benign ones.
    """
    if (harmful is None) != (benign is None):
        raise UserError("a threshold requires both harmful and benign rows: pass both, or neither for a ranking only")
    model = as_model(model)
    adapters = as_vectors(vectors, model)
    if len(adapters) != 1:
        given = f"{len(adapters)} vectors are given" if adapters else "vectors is None"
        raise UserError(f"{given}: pass the security vectors that rows are scored with")
    security_vectors = adapters[0]
    limit = min(max_seq_len, model.architecture.max_length)

    def scores(name: str, of: Any) -> list[float]:
        if progress is not None:
            progress(name)
        return explained_away.scores(model, security_vectors, of, limit)

    unlabeled = Screening(scores("data", rows))
    if harmful is None:
        return unlabeled
    return unlabeled.with_known(scores("harmful", harmful), scores("benign", benign))
