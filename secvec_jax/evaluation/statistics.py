"""Statistics over the seeds of a grid: means, differences between two defenses, and the quality of row filters.

Each cell of a grid is run with several seeds, and each seed draws its own prompts, so a score varies from seed to seed
(another draw and order of the training rows) and from prompt to prompt. The two-level bootstrap resamples both: seeds
with replacement, then the prompts of each drawn seed (the hierarchical bootstrap of Saravanan et al. 2020,
arXiv:2007.07797). With one seed, only prompts are resampled.

A few seeds say little about how seeds vary, and no resampling changes that: see `seeded_bootstrap`. Where a seed has a
single number (such as the drift of a model), resampling three numbers would never leave their range and would call
every fourth difference significant where there is none; these intervals are Student's t.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import Score, bootstrap, paired_difference

_MAX_DRAWS = 2**20  # prompts drawn at a time: 8 MB of indices, however many prompts there are


@dataclass(frozen=True)
class SeededScore(Score):
    """A mean over the `n` prompts of `seeds` seeds with its 95% interval, in the unit of the values."""

    seeds: int

    def as_dict(self) -> dict:
        """Return the entry for results.json, with the number of seeds: `{"value", "n", "ci95", "seeds"}`."""
        return super().as_dict() | {"seeds": self.seeds}


@dataclass(frozen=True)
class Difference(SeededScore):
    """The mean of `a - b` over prompts on which both were scored.

    by_seed: Student's t 95% interval of the seeds' mean differences, which treats prompts as fixed. None for one seed,
    and where all seeds agree. With few seeds it is wide, and more accurate than the bootstrap where seeds vary more
    than prompts do.
    """

    by_seed: tuple[float, float] | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0. A single pair has an interval of zero width and is never significant."""
        low, high = self.ci95
        return self.n > 1 and not low <= 0 <= high


# ---------------------------------------------------------------------------------------- means and differences


def seeded_bootstrap(
    samples: Sequence[Sequence[float]], seed: int = 0, resamples: int = 2000, *, is_rate: bool = True
) -> SeededScore:
    """Return the mean over seeds and prompts with its two-level percentile bootstrap 95% interval.

    `samples` holds one list per seed, with one score per prompt; the lists may differ in length. Every seed has the
    same weight: the value is the mean of the seeds' means. The interval does not depend on the order of prompts or
    seeds. If all scores are equal, the interval is that of `intervals.bootstrap` for the scores of all seeds together:
    Wilson's for 0/1 scores that are rates, zero width for others.

    If there are several seeds with one number each, other than 0/1, the interval is Student's t (which assumes a
    normal distribution).

    In simulations with normal scores, a 95% interval of three seeds contains the true mean 98 times in 100 if only
    prompts vary, 93 times if seeds add as much to the variance of a seed's mean as prompts do, and 77 times if they
    add nine times as much. For five seeds it is 98, 96 and 86, for two 96, 88 and 70.

    Raises:
        UserError: no seeds, a seed without scores, a score that is not finite, or fewer than one resample.
    """
    checked = _checked(samples)
    pooled = np.concatenate(checked)
    if np.ptp(pooled) == 0:
        score = bootstrap(pooled, seed, resamples, is_rate=is_rate)
        return SeededScore(score.value, score.n, score.ci95, len(checked))
    value, ci95 = _interval(checked, seed, resamples)
    return SeededScore(value, pooled.size, ci95, len(checked))


def paired(
    samples_a: Sequence[Sequence[float]],
    samples_b: Sequence[Sequence[float]],
    seed: int = 0,
    resamples: int = 2000,
    *,
    is_rate: bool = True,
) -> Difference:
    """Return the mean of `a - b`, seed by seed and prompt by prompt, with its two-level bootstrap 95% interval.

    Both hold the same seeds in the same order, and within a seed the same prompts in the same order, so what makes a
    seed or a prompt hard for both cancels out. `paired(b, a)` has exactly the mirrored interval (the mean of both
    directions), so no close call depends on which defense is named first. Constant differences are treated as in
    `intervals.paired_difference`; for the rest, see `seeded_bootstrap`.

    Raises:
        UserError: the two differ in seeds or in the number of prompts of a seed, or as in `seeded_bootstrap`.
    """
    first, second = _checked(samples_a), _checked(samples_b)
    sizes = [[len(sample) for sample in side] for side in (first, second)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"prompts per seed differ ({sizes[0]} and {sizes[1]}): score both on the same seeds and prompts"
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    pooled = np.concatenate(differences)
    if np.ptp(pooled) == 0:
        score = paired_difference(np.concatenate(first), np.concatenate(second), seed, resamples, is_rate=is_rate)
        return Difference(score.value, score.n, score.ci95, len(differences), _by_seed(differences))
    value, (low, high) = _interval(differences, seed, resamples)
    mirrored, (mirrored_low, mirrored_high) = _interval([-sample for sample in differences], seed, resamples)
    ci95 = ((low - mirrored_high) / 2, (high - mirrored_low) / 2)
    return Difference((value - mirrored) / 2, pooled.size, ci95, len(differences), _by_seed(differences))


def _checked(samples: Sequence[Sequence[float]]) -> list[np.ndarray]:
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or not all(array.ndim == 1 and array.size for array in arrays):
        raise UserError("no scores to average: pass one flat list per seed, with one score per prompt")
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError("a score is NaN or infinite: drop or repair that prompt before averaging")
    return arrays


def _interval(samples: list[np.ndarray], seed: int, resamples: int) -> tuple[float, tuple[float, float]]:
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: use at least 1 (2000 is usual)")
    ordered = [np.array(sample) for sample in sorted(sorted(sample.tolist()) for sample in samples)]
    mean = float(np.mean([sample.mean() for sample in ordered]))
    pooled = np.concatenate(ordered)
    if pooled.size == len(ordered) > 1 and not np.isin(pooled, (-1, 0, 1)).all():
        return mean, _student(pooled)
    low, high = np.percentile(_resampled_means(ordered, np.random.default_rng(seed), resamples), (2.5, 97.5))
    return mean, (min(float(low), mean), max(float(high), mean))


def _by_seed(samples: list[np.ndarray]) -> tuple[float, float] | None:
    means = np.array([np.sort(sample).mean() for sample in samples])
    return _student(np.sort(means)) if np.ptp(means) > 0 else None


def _student(values: np.ndarray) -> tuple[float, float]:
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(values.size)
    width = scipy.stats.t.ppf(0.975, values.size - 1) * error
    return float(mean - width), float(mean + width)


def _resampled_means(samples: list[np.ndarray], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """`[resamples]`: each the mean over seeds drawn with replacement, of prompts drawn with replacement."""
    drawn = rng.integers(len(samples), size=(resamples, len(samples)))
    means = np.empty(drawn.shape)
    for index, sample in enumerate(samples):
        positions = np.flatnonzero(drawn == index)
        for batch in np.array_split(positions, 1 + positions.size * sample.size // _MAX_DRAWS):
            means.flat[batch] = sample[rng.integers(sample.size, size=(batch.size, sample.size))].mean(axis=1)
    return means.mean(axis=1)


# ---------------------------------------------------------------------------------------------------- filters


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the area under the ROC curve: the probability that a row labeled true outscores one labeled false.

    Ties count half; 0.5 is chance. If all labels are the same it is undefined, and NaN.

    Raises:
        UserError: the two differ in length, a score is NaN, or a label is not true or false (1 or 0).
    """
    values, positive = _checked_rows(scores, labels, "scores")
    pairs = int(positive.sum() * (~positive).sum())
    if not pairs:
        return float("nan")
    wins = scipy.stats.mannwhitneyu(values[positive], values[~positive], method="asymptotic").statistic
    return float(wins / pairs)


def precision_recall_f1(flagged: Sequence[bool], labels: Sequence[bool]) -> tuple[float, float, float]:
    """Return precision, recall and F1, each from 0 to 1, of a filter that `flagged` rows, against harmful `labels`.

    A ratio without a denominator is NaN: precision if nothing is flagged, recall if nothing is harmful, and F1, which
    is 2 TP / (2 TP + FP + FN), if neither is. So a filter that flags nothing has F1 = 0 if there are harmful rows.

    Raises:
        UserError: the two differ in length, or a value is not true or false (1 or 0).
    """
    values, positive = _checked_rows(flagged, labels, "flags")
    if not np.isin(values, (0, 1)).all():
        raise UserError("a flag is neither true nor false: compare the filter's scores with its threshold first")
    true_positives = float((values * positive).sum())
    claimed, harmful = float(values.sum()), float(positive.sum())
    return (
        _ratio(true_positives, claimed),
        _ratio(true_positives, harmful),
        _ratio(2 * true_positives, claimed + harmful),
    )


def _checked_rows(values: Sequence[float], labels: Sequence[bool], kind: str) -> tuple[np.ndarray, np.ndarray]:
    numbers, truth = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if numbers.ndim != 1 or numbers.shape != truth.shape:
        raise UserError(f"{numbers.shape} {kind} for {truth.shape} labels: pass one of each per row, in the same order")
    if np.isnan(numbers).any() or not np.isin(truth, (0, 1)).all():
        raise UserError(f"{kind} must be numbers and labels true or false (1 or 0): drop or repair rows without them")
    return numbers, truth == 1


def _ratio(part: float, total: float) -> float:
    return part / total if total else float("nan")
