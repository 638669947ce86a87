"""What the seeds of a grid come to together, which differences between two defenses are real, how well a filter sorts.

A cell of a grid is run with several seeds, and every seed deals out its own prompts, so a score varies twice: from
seed to seed (another draw and order of rows) and from prompt to prompt. The two-level bootstrap resamples both: seeds
with replacement, then the prompts of each drawn seed (the hierarchical bootstrap of Saravanan et al. 2020,
arXiv:2007.07797). With one seed, only prompts are left to resample.

Few seeds say little about how seeds vary, and no resampling changes that: see `seeded_bootstrap`. Where a seed has a
single number (the drift of a model), resampling three of them would never leave their range, and would call every
fourth difference real where there is none; so these intervals are Student's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from secvec_jax.errors import UserError
from secvec_jax.evaluation.intervals import Score, bootstrap, paired_difference

_TABLE = 2**20  # prompts drawn at a time: 8 MB of indices, however many prompts there are


@dataclass(frozen=True)
class SeededScore(Score):
    """A mean over the `n` prompts of `seeds` seeds with its 95% interval, in the unit of the values."""

    seeds: int

    def as_dict(self) -> dict:
        """Return the form that results.json holds, and the number of seeds: `{"value", "n", "ci95", "seeds"}`."""
        return super().as_dict() | {"seeds": self.seeds}


@dataclass(frozen=True)
class Difference(SeededScore):
    """The mean of `a - b` over prompts on which both were scored.

    by_seed: Student's 95% interval of the seeds' own differences, which takes prompts as given. None for one seed, and
    where all seeds agree. Of a few seeds it is wide, and nearer the truth than the bootstrap where seeds differ by more
    than prompts do.
    """

    by_seed: tuple[float, float] | None = None

    @property
    def real(self) -> bool:
        """Whether 0 is outside the interval. A single pair has an interval of no width and is never real."""
        low, high = self.ci95
        return self.n > 1 and not low <= 0 <= high


# ---------------------------------------------------------------------------------------- means and differences


def seeded_bootstrap(samples: Sequence[Sequence[float]], seed: int = 0, resamples: int = 2000) -> SeededScore:
    """Return the mean over seeds and prompts with its two-level percentile bootstrap 95% interval.

    `samples` holds one list a seed, with one score a prompt; the lists may differ in length. Every seed weighs the
    same: the value is the mean of the seeds' means. The interval does not depend on the order of prompts or seeds.
    When every score is the same, `scorers.bootstrap` decides on the scores of all seeds taken together: Wilson's far
    end for 0/1 scores, no width for others.

    When each of several seeds has one number, other than 0/1, the interval is Student's t (normal numbers assumed).

    Simulated with normal scores, a 95% interval of three seeds holds the true mean 98 times in 100 when only prompts
    vary, 93 times when seeds add as much to the variance of a seed's mean as prompts do, and 77 times when they add
    nine times as much. For five seeds it is 98, 96 and 86, for two 96, 88 and 70.

    Raises:
        UserError: no seeds, a seed without scores, a score that is not finite, or fewer than one resample.
    """
    checked = _checked(samples)
    pooled = np.concatenate(checked)
    if np.ptp(pooled) == 0:
        score = bootstrap(pooled, seed, resamples)
        return SeededScore(score.value, score.n, score.ci95, len(checked))
    value, ci95 = _interval(checked, seed, resamples)
    return SeededScore(value, pooled.size, ci95, len(checked))


def paired(
    samples_a: Sequence[Sequence[float]],
    samples_b: Sequence[Sequence[float]],
    seed: int = 0,
    resamples: int = 2000,
) -> Difference:
    """Return the mean of `a - b`, seed by seed and prompt by prompt, with its two-level bootstrap 95% interval.

    Both hold the same seeds in the same order, and within a seed the same prompts in the same order, so what makes a
    seed or a prompt hard for both cancels out. `paired(b, a)` has exactly the mirrored interval (the mean of
    both ways round), so no close call depends on which defense is named first. Constant differences are treated as in
    `scorers.paired_difference`; for the rest, see `seeded_bootstrap`.

    Raises:
        UserError: the two differ in seeds or in the number of prompts of a seed, or as in `seeded_bootstrap`.
    """
    first, second = _checked(samples_a), _checked(samples_b)
    sizes = [[len(sample) for sample in side] for side in (first, second)]
    if sizes[0] != sizes[1]:
        raise UserError(f"prompts a seed differ ({sizes[0]} and {sizes[1]}): score both on the same seeds and prompts")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    pooled = np.concatenate(differences)
    if np.ptp(pooled) == 0:
        score = paired_difference(np.concatenate(first), np.concatenate(second), seed, resamples)
        return Difference(score.value, score.n, score.ci95, len(differences), _by_seed(differences))
    value, (low, high) = _interval(differences, seed, resamples)
    mirrored, (below, above) = _interval([-difference for difference in differences], seed, resamples)
    ci95 = ((low - above) / 2, (high - below) / 2)
    return Difference((value - mirrored) / 2, pooled.size, ci95, len(differences), _by_seed(differences))


def _checked(samples: Sequence[Sequence[float]]) -> list[np.ndarray]:
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or not all(array.ndim == 1 and array.size for array in arrays):
        raise UserError("no scores to average: pass one flat list a seed, with one score a prompt")
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
    low, high = np.percentile(_means(ordered, np.random.default_rng(seed), resamples), (2.5, 97.5))
    return mean, (min(float(low), mean), max(float(high), mean))


def _by_seed(samples: list[np.ndarray]) -> tuple[float, float] | None:
    means = np.array([math.fsum(sample) / sample.size for sample in samples])
    return _student(means) if np.ptp(means) > 0 else None  # seeds that agree exactly say nothing of how seeds vary


def _student(values: np.ndarray) -> tuple[float, float]:
    mean = math.fsum(values) / values.size  # exact sums: the same in any order of prompts and seeds
    deviation = math.sqrt(math.fsum((values - mean) ** 2) / (values.size - 1))
    reach = float(stdtrit(values.size - 1, 0.975)) * deviation / math.sqrt(values.size)
    return mean - reach, mean + reach


def _means(samples: list[np.ndarray], rng: np.random.Generator, resamples: int) -> np.ndarray:
    """`[resamples]`: each the mean over seeds drawn with replacement, of prompts drawn with replacement."""
    drawn = rng.integers(len(samples), size=(resamples, len(samples)))
    means = np.empty(drawn.shape)
    for index, sample in enumerate(samples):
        places = np.flatnonzero(drawn == index)
        for some in np.array_split(places, 1 + places.size * sample.size // _TABLE):
            means.flat[some] = sample[rng.integers(sample.size, size=(some.size, sample.size))].mean(axis=1)
    return means.mean(axis=1)


# ---------------------------------------------------------------------------------------------------- filters


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the chance that a row labeled true outscores one labeled false, ties counting half: 0.5 is guessing.

    This is the area under the ROC curve, and the Mann-Whitney U over the number of pairs. It needs rows of both
    labels; where one is missing it is undefined, and NaN.

    Raises:
        UserError: the two differ in length, a score is NaN, or a label is not true or false (1 or 0).
    """
    values, positive = _filter(scores, labels, "scores")
    hits, others = values[positive], np.sort(values[~positive])
    if not hits.size or not others.size:
        return float("nan")
    below, not_above = (np.searchsorted(others, hits, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * hits.size * others.size))


def precision_recall_f1(flagged: Sequence[bool], labels: Sequence[bool]) -> tuple[float, float, float]:
    """Return precision, recall and F1, each from 0 to 1, of a filter that `flagged` rows `labels` calls harmful.

    What has no denominator is NaN: precision when nothing is flagged, recall when nothing is harmful, and F1, which
    is 2 TP / (2 TP + FP + FN), when neither is. So a filter that flags nothing has F1 = 0 where there was something
    to find.

    Raises:
        UserError: the two differ in length, or a value is not true or false (1 or 0).
    """
    values, positive = _filter(flagged, labels, "flags")
    if not np.isin(values, (0, 1)).all():
        raise UserError("a flag is neither true nor false: compare the filter's scores with its threshold first")
    found = float((values * positive).sum())
    claimed, harmful = float(values.sum()), float(positive.sum())
    return _ratio(found, claimed), _ratio(found, harmful), _ratio(2 * found, claimed + harmful)


def _filter(values: Sequence[float], labels: Sequence[bool], what: str) -> tuple[np.ndarray, np.ndarray]:
    numbers, truth = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if numbers.ndim != 1 or numbers.shape != truth.shape:
        raise UserError(f"{numbers.shape} {what} for {truth.shape} labels: pass one of each a row, in the same order")
    if np.isnan(numbers).any() or not np.isin(truth, (0, 1)).all():
        raise UserError(f"{what} must be numbers and labels true or false (1 or 0): drop or repair rows without them")
    return numbers, truth == 1


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
