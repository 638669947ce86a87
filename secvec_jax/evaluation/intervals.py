"""A mean over prompts, and how far it can be trusted: 95% intervals of rates, means and paired differences.

A rate from 64 prompts is an estimate, so `bootstrap` and `paired_difference` return a `Score`: the mean, the number
of prompts and a 95% interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from secvec_jax.errors import UserError

Z95 = 1.959963984540054  # the normal distribution's 97.5% point


@dataclass(frozen=True)
class Score:
    """A mean over `n` prompts with its 95% interval, in the unit of the values (rates: 0 to 1).

    rules: the version of the rules that read the values off replies; None for what no rule reads, such as a loss.
    """

    value: float
    n: int
    ci95: tuple[float, float]
    rules: int | None = field(default=None, kw_only=True)

    def as_dict(self) -> dict:
        """Return the form that results.json holds: `{"value", "n", "ci95": [low, high]}`, and `"rules"` if any."""
        plain = {"value": self.value, "n": self.n, "ci95": list(self.ci95)}
        return plain if self.rules is None else plain | {"rules": self.rules}


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000) -> Score:
    """Return the mean of `values` with its percentile bootstrap 95% interval.

    When every value is 0, or every value is 1, each resample is the same and the percentile interval has
    no width: 0 of 64 would read as proof of "never". The far end is then Wilson's (1927): for 0 of n it is
    `z^2 / (n + z^2)`, which gives [0, 0.057] for n = 64. Other constant values keep the interval of zero
    width: nothing in them says how far they could vary.

    Raises:
        UserError: no values, a value that is not finite, or fewer than one resample.
    """
    sample = _sample(values)
    return _interval(sample, seed, resamples, bounds=(0.0, 1.0) if _binary(sample) else None)


def paired_difference(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000
) -> Score:
    """Return the mean of `a - b`, both scored on the same prompts in the same order, with its 95% interval.

    Prompts are resampled in pairs, so what makes a prompt hard for both cancels out; "within 5 points"
    holds when the whole interval lies in [-0.05, 0.05]. When 0/1 scores differ by the same amount on every
    prompt, Wilson's width is used on each side that can be reached, as in `bootstrap`.

    Raises:
        UserError: the two differ in length, or as in `bootstrap`.
    """
    first, second = _sample(a), _sample(b)
    if len(first) != len(second):
        raise UserError(
            f"paired scores differ in length ({len(first)} and {len(second)}): score both models on the same prompts"
        )
    binary = _binary(first) and _binary(second)
    return _interval(first - second, seed, resamples, bounds=(-1.0, 1.0) if binary else None)


def _sample(values: Sequence[float] | np.ndarray) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise UserError("no values to average: pass a flat list with one score a prompt")
    if not np.isfinite(sample).all():
        raise UserError("a score is NaN or infinite: drop or repair that prompt before averaging")
    return sample


def _binary(sample: np.ndarray) -> bool:
    return bool(np.isin(sample, (0.0, 1.0)).all())


def _interval(sample: np.ndarray, seed: int, resamples: int, bounds: tuple[float, float] | None) -> Score:
    """`bounds` is given for 0/1 scores: the least and greatest mean that they can have."""
    if resamples < 1:
        raise UserError(f"resamples is {resamples}: use at least 1 (2000 is usual)")
    n, mean = len(sample), float(sample.mean())
    if bounds is not None and np.ptp(sample) == 0:
        reach = Z95**2 / (n + Z95**2)
        return Score(mean, n, (max(bounds[0], mean - reach), min(bounds[1], mean + reach)))
    rng = np.random.default_rng(seed)
    # One resample at a time: an index table for 10,000 prompts would take 160 MB.
    means = [sample[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Score(mean, n, (min(float(low), mean), max(float(high), mean)))
