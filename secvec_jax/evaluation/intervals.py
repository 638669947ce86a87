"""Means over prompts with 95% confidence intervals: rates, other scores and paired differences.

A rate over 64 prompts is an estimate, so `bootstrap` and `paired_difference` return a `Score`: the mean, the number of
prompts and a 95% interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy  # loads scipy.stats on first use: it takes a second, which `--help` does not need

from secvec_jax.errors import UserError

Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution
_MAX_DRAWS = 2**20  # prompts drawn at a time: 8 MB of indices, however many prompts there are


@dataclass(frozen=True)
class Score:
    """A mean over `n` prompts with its 95% interval, in the unit of the values (rates: 0 to 1).

    rules: version of the rules that turned replies into values; None where no rules are involved, as for a loss.
    """

    value: float
    n: int
    ci95: tuple[float, float]
    rules: int | None = field(default=None, kw_only=True)

    def as_dict(self) -> dict:
        """Return the entry for results.json: `{"value", "n", "ci95": [low, high]}`, plus `"rules"` if not None."""
        plain = {"value": self.value, "n": self.n, "ci95": list(self.ci95)}
        return plain if self.rules is None else plain | {"rules": self.rules}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Score":
        """Return the score of an entry of results.json that has an interval."""
        low, high = entry["ci95"]
        return cls(entry["value"], entry["n"], (low, high), rules=entry.get("rules"))


def bootstrap(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000, *, is_rate: bool = True
) -> Score:
    """Return the mean of `values` with its percentile bootstrap 95% interval.

    If all values are 0, or all are 1, every resample is the same and the percentile interval has no width: 0 of 64
    would read as proof of "never". Wilson's interval (1927) is used instead: [0, 0.057] for 0 of 64. Other constant
    values keep an interval of zero width, because nothing in them indicates how far they could vary. is_rate: whether 0
    and 1 are the limits of the values, as in a rate, and not two of many, as in a loss or in grades from 1 to 5.

    Raises:
        UserError: no values, a value that is not finite, or fewer than one resample.
    """
    sample = _sample(values)
    return _score(sample, seed, resamples, limits=(0.0, 1.0) if is_rate and _is_binary(sample) else None)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = 2000,
    *,
    is_rate: bool = True,
) -> Score:
    """Return the mean of `a - b`, both scored on the same prompts in the same order, with its 95% interval.

    Prompts are resampled in pairs, so what makes a prompt hard for both cancels out. The claim "within 5 points" holds
    if the whole interval is inside [-0.05, 0.05]. If 0/1 scores differ by the same amount on every prompt, the interval
    extends by Wilson's width to each side, within [-1, 1], unless they are no rates (see `bootstrap`).

    Raises:
        UserError: the two differ in length, or as in `bootstrap`.
    """
    first, second = _sample(a), _sample(b)
    if len(first) != len(second):
        raise UserError(
            f"paired scores differ in length ({len(first)} and {len(second)}): score both models on the same prompts"
        )
    binary = is_rate and _is_binary(first) and _is_binary(second)
    return _score(first - second, seed, resamples, limits=(-1.0, 1.0) if binary else None)


def _sample(values: Sequence[float] | np.ndarray) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise UserError("no values to average: pass a flat list with one score per prompt")
    if not np.isfinite(sample).all():
        raise UserError("a score is NaN or infinite: drop or repair that prompt before averaging")
    return sample


def _is_binary(sample: np.ndarray) -> bool:
    return bool(np.isin(sample, (0.0, 1.0)).all())


def _score(sample: np.ndarray, seed: int, resamples: int, limits: tuple[float, float] | None) -> Score:
    """limits: the smallest and largest possible mean; only given for 0/1 scores."""
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: use at least 1 (2000 is usual)")
    n, mean = len(sample), float(sample.mean())
    if np.ptp(sample) > 0:
        interval = scipy.stats.bootstrap(
            (sample,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, _MAX_DRAWS // n),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return Score(mean, n, (min(float(interval.low), mean), max(float(interval.high), mean)))
    if limits is None:
        return Score(mean, n, (mean, mean))
    width = float(scipy.stats.binomtest(0, n).proportion_ci(method="wilson").high)
    return Score(mean, n, (max(limits[0], mean - width), min(limits[1], mean + width)))
