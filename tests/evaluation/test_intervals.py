"""Intervals of means, rates and paired differences against known values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.evaluation import intervals


class TestBootstrap:
    @given(
        st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
        st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=40)
    def test_interval_holds_the_mean_and_stays_among_the_values(self, values, seed):
        score = intervals.bootstrap(values, seed, resamples=50)
        low, high = score.ci95
        slack = 1e-9 * max(1.0, *map(abs, values))
        if not set(values) <= {0.0, 1.0}:
            assert min(values) - slack <= low and high <= max(values) + slack
        assert low <= score.value <= high
        assert score.n == len(values)
        assert score.value == pytest.approx(np.mean(values))

    @given(st.integers(0, 60), st.integers(1, 60))
    @settings(max_examples=30)
    def test_a_rate_never_leaves_0_to_1_nor_claims_certainty(self, hits, misses):
        low, high = intervals.bootstrap([1] * hits + [0] * misses, resamples=200).ci95
        assert 0 <= low <= high <= 1
        assert high > 0

    @pytest.mark.parametrize("n, end", [(64, 0.056624), (10, 0.277533), (1, 0.793451)])
    def test_constant_rates_get_wilsons_far_end(self, n, end):
        assert intervals.bootstrap([0] * n).ci95 == pytest.approx((0, end), abs=1e-5)
        assert intervals.bootstrap([True] * n).ci95 == pytest.approx((1 - end, 1), abs=1e-5)

    def test_other_constants_have_no_width(self):
        assert intervals.bootstrap([2.5] * 8).ci95 == (2.5, 2.5)

    def test_agrees_with_the_normal_interval_on_many_values(self):
        values = np.random.default_rng(1).normal(3, 2, 2000)
        error = 1.96 * values.std() / np.sqrt(2000)
        assert intervals.bootstrap(values).ci95 == pytest.approx(
            (values.mean() - error, values.mean() + error), abs=0.02
        )

    def test_seed_decides_the_interval(self):
        values = np.random.default_rng(2).random(30)
        assert intervals.bootstrap(values, seed=3) == intervals.bootstrap(values, seed=3)
        assert intervals.bootstrap(values, seed=3).ci95 != intervals.bootstrap(values, seed=4).ci95

    def test_as_dict_is_the_form_of_results_json(self):
        assert intervals.Score(0.5, 4, (0.25, 0.75)).as_dict() == {"value": 0.5, "n": 4, "ci95": [0.25, 0.75]}

    @pytest.mark.parametrize("values", [[], [float("nan")], [float("inf"), 1], [[1, 0]]])
    def test_refuses_what_has_no_mean(self, values):
        with pytest.raises(UserError):
            intervals.bootstrap(values)

    def test_refuses_no_resamples(self):
        with pytest.raises(UserError, match="resamples"):
            intervals.bootstrap([0, 1], resamples=0)


class TestPairedDifference:
    def test_pairing_removes_what_prompts_share(self):
        hardness = np.random.default_rng(0).normal(0, 10, 50)
        low, high = intervals.paired_difference(hardness + 1, hardness).ci95
        assert (low, high) == pytest.approx((1, 1))

    def test_counts_only_prompts_that_differ(self):
        score = intervals.paired_difference([1, 1, 1, 0] * 16, [1, 0, 1, 0] * 16)
        assert score.value == 0.25
        assert score.n == 64
        assert 0.1 < score.ci95[0] < 0.25 < score.ci95[1] < 0.4

    def test_equal_rates_keep_an_uncertainty_on_both_sides(self):
        score = intervals.paired_difference([1, 0] * 32, [1, 0] * 32)
        assert score.value == 0
        assert score.ci95 == pytest.approx((-0.056624, 0.056624), abs=1e-5)

    def test_opposite_rates_reach_the_bound(self):
        assert intervals.paired_difference([0] * 64, [1] * 64).ci95 == pytest.approx((-1, -0.943376), abs=1e-5)

    def test_is_antisymmetric_in_its_mean(self):
        a, b = [1, 0, 0, 1], [0, 0, 1, 0]
        assert intervals.paired_difference(a, b).value == -intervals.paired_difference(b, a).value

    def test_lengths_must_agree(self):
        with pytest.raises(UserError, match="same prompts"):
            intervals.paired_difference([1, 0], [1])
