"""Intervals over seeds and prompts, differences in pairs, and filters: known values and properties of any scores."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secvec_jax.errors import UserError
from secvec_jax.evaluation import intervals, statistics

values = st.floats(-1e6, 1e6)
samples = st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4)
rates = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12), min_size=1, max_size=4)
pairs = st.lists(st.lists(st.tuples(values, values), min_size=1, max_size=12), min_size=1, max_size=4)


def interval_of(score):
    return (score.value, *score.ci95)


class TestSeededBootstrap:
    @given(samples, st.integers(0, 2**32 - 1))
    @settings(max_examples=60)
    def test_interval_holds_the_mean_of_the_seeds_means(self, scores, seed):
        score = statistics.seeded_bootstrap(scores, seed, resamples=50)
        assert score.ci95[0] <= score.value <= score.ci95[1]
        assert score.value == pytest.approx(np.mean([np.mean(sample) for sample in scores]), abs=1e-6)
        assert (score.n, score.seeds) == (sum(map(len, scores)), len(scores))

    @given(rates)
    @settings(max_examples=60)
    def test_a_rate_never_leaves_0_to_1_nor_claims_certainty(self, scores):
        low, high = statistics.seeded_bootstrap(scores, resamples=200).ci95
        assert 0 <= low < high <= 1 or (low == high and len({np.mean(s) for s in scores}) > 1)

    @given(samples, st.randoms())
    @settings(max_examples=60)
    def test_the_order_of_prompts_and_of_seeds_does_not_matter(self, scores, random):
        shuffled = [random.sample(sample, len(sample)) for sample in random.sample(scores, len(scores))]
        first, second = (statistics.seeded_bootstrap(s, resamples=50) for s in (scores, shuffled))
        assert first == second

    @pytest.mark.parametrize("seeds, prompts", [(1, 64), (2, 32), (4, 16)])
    def test_constant_rates_get_wilsons_far_end_of_all_prompts(self, seeds, prompts):
        never = statistics.seeded_bootstrap([[0.0] * prompts] * seeds)
        assert never.ci95 == pytest.approx((0, 0.056624), abs=1e-5)
        assert never.ci95 == intervals.bootstrap([0] * 64).ci95
        assert statistics.seeded_bootstrap([[1] * prompts] * seeds).ci95 == pytest.approx((0.943376, 1), abs=1e-5)

    def test_other_constants_have_no_width(self):
        assert statistics.seeded_bootstrap([[2.5, 2.5], [2.5]]).ci95 == (2.5, 2.5)
        assert statistics.seeded_bootstrap([[0.3]]).ci95 == (0.3, 0.3)

    def test_one_seed_agrees_with_the_bootstrap_of_prompts(self):
        scores = np.random.default_rng(0).normal(3, 2, 500)
        assert statistics.seeded_bootstrap([scores]).ci95 == pytest.approx(intervals.bootstrap(scores).ci95, abs=0.02)

    def test_seeds_that_differ_widen_the_interval(self):
        alike, apart = [[0, 1] * 50] * 4, [[0] * 80 + [1] * 20, [0] * 20 + [1] * 80] * 2
        widths = [np.ptp(statistics.seeded_bootstrap(scores).ci95) for scores in (alike, apart)]
        pooled = np.ptp(intervals.bootstrap(np.concatenate(apart)).ci95)
        assert widths[1] > 2 * widths[0]
        assert widths[1] > 2 * pooled

    def test_every_seed_weighs_the_same(self):
        assert statistics.seeded_bootstrap([[0.0] * 90, [1.0] * 10]).value == 0.5

    def test_one_number_a_seed_gets_students_interval_by_hand(self):
        score = statistics.seeded_bootstrap([[1.0], [2.0], [6.0]])
        reach = 4.302653 * math.sqrt(7) / math.sqrt(3)  # t of 2 degrees, variance ((-2)^2 + (-1)^2 + 3^2) / 2
        assert interval_of(score) == pytest.approx((3, 3 - reach, 3 + reach), abs=1e-4)

    def test_many_prompts_are_drawn_in_parts_and_agree_with_the_normal_interval(self):
        scores = np.random.default_rng(1).normal(3, 2, 4000)
        assert 600 * scores.size > statistics._MAX_DRAWS
        error = 1.96 * scores.std() / np.sqrt(scores.size)
        score = statistics.seeded_bootstrap([scores], resamples=600)
        assert score.ci95 == pytest.approx((scores.mean() - error, scores.mean() + error), abs=0.01)

    def test_the_generator_decides_the_interval(self):
        scores = np.random.default_rng(2).random((3, 30))
        intervals = [statistics.seeded_bootstrap(scores, seed).ci95 for seed in (3, 3, 4)]
        assert intervals[0] == intervals[1] != intervals[2]

    def test_as_dict_extends_the_form_of_results_json(self):
        score = statistics.SeededScore(0.5, 4, (0.25, 0.75), 2)
        assert score.as_dict() == {"value": 0.5, "n": 4, "ci95": [0.25, 0.75], "seeds": 2}

    @pytest.mark.parametrize(
        "scores", [[], [[]], [[1.0], []], [1.0, 0.0], [[[1.0]]], [[float("nan")]], [[1.0], [float("inf")]]]
    )
    def test_refuses_what_has_no_mean(self, scores):
        with pytest.raises(UserError, match="score"):
            statistics.seeded_bootstrap(scores)

    @pytest.mark.parametrize("scores", [[[0, 1]], [[1, 1]]])
    def test_refuses_no_resamples(self, scores):
        with pytest.raises(UserError, match="resamples"):
            statistics.seeded_bootstrap(scores, resamples=0)


class TestPaired:
    @given(pairs)
    @settings(max_examples=80)
    def test_is_exactly_antisymmetric(self, both):
        a, b = ([[pair[side] for pair in sample] for sample in both] for side in (0, 1))
        forth, back = statistics.paired(a, b, resamples=50), statistics.paired(b, a, resamples=50)
        assert back.value == -forth.value
        assert back.ci95 == (-forth.ci95[1], -forth.ci95[0])
        assert back.is_significant == forth.is_significant
        assert forth.ci95[0] <= forth.value <= forth.ci95[1]

    @given(pairs, st.randoms())
    @settings(max_examples=40)
    def test_the_order_of_prompts_does_not_matter_if_both_have_it(self, both, random):
        shuffled = [random.sample(sample, len(sample)) for sample in both]
        first, second = (
            statistics.paired(*([[pair[side] for pair in sample] for sample in s] for side in (0, 1)), resamples=50)
            for s in (both, shuffled)
        )
        assert first == second

    def test_pairing_removes_what_prompts_and_seeds_share(self):
        hardness = np.random.default_rng(0).normal([[-50], [0], [50]], 10, (3, 50))
        noise = np.random.default_rng(1).normal(0, 0.1, (3, 50))
        difference = statistics.paired(hardness + 1 + noise, hardness)
        assert difference.ci95 == pytest.approx((1, 1), abs=0.1)
        assert difference.is_significant

    def test_unpaired_prompts_tell_nothing(self):
        hardness = np.random.default_rng(0).normal(0, 10, (3, 50))
        assert not statistics.paired(
            hardness + 1, np.random.default_rng(1).permutation(hardness, axis=1)
        ).is_significant

    def test_by_hand(self):
        difference = statistics.paired([[1, 1, 1, 0] * 16] * 2, [[1, 0, 1, 0] * 16] * 2)
        assert (difference.value, difference.n, difference.seeds) == (0.25, 128, 2)
        assert 0.15 < difference.ci95[0] < 0.25 < difference.ci95[1] < 0.35
        assert difference.is_significant

    def test_equal_rates_keep_an_uncertainty_and_are_not_real(self):
        difference = statistics.paired([[1, 0] * 16] * 2, [[1, 0] * 16] * 2)
        assert difference.ci95 == pytest.approx((-0.056624, 0.056624), abs=1e-5)
        assert not difference.is_significant

    def test_opposite_rates_are_real_unless_there_are_few(self):
        assert statistics.paired([[1] * 32] * 2, [[0] * 32] * 2).ci95 == pytest.approx((0.943376, 1), abs=1e-5)
        assert statistics.paired([[0] * 32], [[1] * 32]).is_significant
        assert not statistics.paired([[1]], [[0]]).is_significant

    def test_seeds_that_disagree_are_not_real(self):
        up, down = [1] * 60 + [0] * 40, [0] * 60 + [1] * 40
        assert not statistics.paired([up, down], [[0] * 100, [1] * 100]).is_significant
        assert statistics.paired([up, up], [[0] * 100, [0] * 100]).is_significant

    def test_one_number_is_never_real(self):
        assert not statistics.paired([[0.3]], [[0.1]]).is_significant
        assert statistics.paired([[0.30], [0.31], [0.32]], [[0.1], [0.1], [0.1]]).is_significant

    def test_three_numbers_of_noise_are_real_in_about_a_twentieth_of_cases(self):
        rng = np.random.default_rng(0)
        real = [statistics.paired(*rng.normal(size=(2, 3, 1))).is_significant for _ in range(1000)]
        assert 0.03 < np.mean(real) < 0.07

    def test_noise_of_prompts_is_real_in_at_most_a_twentieth_of_cases(self):
        rng = np.random.default_rng(0)
        both = rng.random((1000, 2, 3, 60)) < 0.5
        real = [statistics.paired(*pair, seed, resamples=200).is_significant for seed, pair in enumerate(both)]
        assert 0.01 < np.mean(real) < 0.05

    @pytest.mark.parametrize("b", [[[1, 0]], [[1, 0], [1]], [[1, 0], [1, 0], [1, 0]]])
    def test_seeds_and_prompts_must_agree(self, b):
        with pytest.raises(UserError, match="same seeds and prompts"):
            statistics.paired([[1, 0], [1, 0]], b)


labeled = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)


class TestAuroc:
    @given(labeled)
    @settings(max_examples=200)
    def test_equals_all_pairs_counted(self, rows):
        hits, others = ([score for score, label in rows if label is wanted] for wanted in (True, False))
        wins = [1.0 if hit > other else 0.5 if hit == other else 0.0 for hit, other in itertools.product(hits, others)]
        area = statistics.auroc(*zip(*rows, strict=True))
        assert area == pytest.approx(np.mean(wins)) if wins else math.isnan(area)

    @given(labeled)
    @settings(max_examples=50)
    def test_only_the_order_matters_and_labels_mirror_it(self, rows):
        scores, labels = map(np.array, zip(*rows, strict=True))
        area = statistics.auroc(scores, labels)
        assert statistics.auroc(np.exp(scores), labels) == pytest.approx(area, nan_ok=True)
        assert statistics.auroc(scores, ~labels) == pytest.approx(1 - area, nan_ok=True)

    def test_by_hand(self):
        assert statistics.auroc([0.9, 0.8, 0.4, 0.4, 0.1], [1, 0, 1, 0, 0]) == pytest.approx(4.5 / 6)
        assert statistics.auroc([-np.inf, np.inf], [0, 1]) == 1

    @pytest.mark.parametrize("labels", [[0, 0], [1, 1]])
    def test_one_class_is_undefined(self, labels):
        assert math.isnan(statistics.auroc([0.1, 0.2], labels))

    @pytest.mark.parametrize(
        "scores, labels", [([1], [1, 0]), ([1, math.nan], [1, 0]), ([1, 2], [1, 2]), ([[1]], [[1]])]
    )
    def test_malformed_rows_are_refused(self, scores, labels):
        with pytest.raises(UserError, match="labels"):
            statistics.auroc(scores, labels)


class TestPrecisionRecallF1:
    def test_by_hand(self):
        measures = statistics.precision_recall_f1([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0])
        assert measures == pytest.approx((2 / 3, 1 / 2, 4 / 7))
        assert statistics.precision_recall_f1([True, False], [True, False]) == (1, 1, 1)

    @pytest.mark.parametrize(
        "flagged, labels, expected",
        [
            ([0, 0], [1, 0], (math.nan, 0, 0)),
            ([1, 0], [0, 0], (0, math.nan, 0)),
            ([0, 0], [0, 0], (math.nan, math.nan, math.nan)),
            ([], [], (math.nan, math.nan, math.nan)),
        ],
    )
    def test_what_has_no_denominator_is_nan(self, flagged, labels, expected):
        assert statistics.precision_recall_f1(flagged, labels) == pytest.approx(expected, nan_ok=True)

    @given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
    @settings(max_examples=100)
    def test_f1_is_the_harmonic_mean(self, rows):
        precision, recall, f1 = statistics.precision_recall_f1(*zip(*rows, strict=True))
        if precision * recall > 0:
            assert f1 == pytest.approx(2 / (1 / precision + 1 / recall))

    @pytest.mark.parametrize("flagged, labels", [([0.5, 1], [1, 0]), ([1], [1, 0]), ([1, 0], [1, 0.5])])
    def test_malformed_rows_are_refused(self, flagged, labels):
        with pytest.raises(UserError):
            statistics.precision_recall_f1(flagged, labels)
