"""Intervals and tests on data of known truth: they cover, and rarely claim what is not so."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from attn_profiling import stats

RNG = np.random.default_rng
TRIALS = 300


def measured(rng, truth=100.0, between=0.0, within=0.003, processes=3, rounds=30, skewed=False):
    """Processes that differ by `between`, rounds that differ by `within` (relative)."""
    made = []
    for _ in range(processes):
        noise = rng.standard_normal(rounds)
        if skewed:  # median 0, a long tail to the slow side
            noise = np.exp(rng.standard_normal(rounds)) - 1
        made.append(list(truth * math.exp(between * rng.standard_normal()) * (1 + within * noise)))
    return made


@pytest.mark.parametrize("df", [1, 2, 5, math.inf])
def test_students_t(df):
    right = reference.norm if math.isinf(df) else reference.t(df)
    assert stats.t_quantile(0.975, df) == pytest.approx(right.ppf(0.975))
    assert stats.t_upper_tail(1.7, df) == pytest.approx(right.sf(1.7))


@pytest.mark.parametrize(
    ("between", "within", "skewed"),
    [(0.0, 0.003, False), (0.003, 0.003, False), (0.01, 0.003, False), (0.002, 0.004, True)],
)
def test_intervals_of_medians_cover_the_truth(between, within, skewed):
    rng = RNG(5)
    hits = 0
    for _ in range(TRIALS):
        found = stats.median_interval(measured(rng, 100, between, within, skewed=skewed))
        hits += found.low <= 100 <= found.high
    assert hits / TRIALS >= 0.93


def test_a_bare_percentile_interval_would_not_cover():
    """Why Student's t is there: the control of the test above."""
    rng = RNG(6)
    hits = 0
    for _ in range(TRIALS):
        found = stats.replicates(measured(rng, 100, 0.01, 0.003))
        low, high = np.percentile(found.drawn, [2.5, 97.5])
        hits += low <= 100 <= high
    assert hits / TRIALS < 0.9


def test_intervals_of_times_and_ratios_stay_positive():
    far = [[20.0] * 30, [100.0] * 30, [110.0] * 30]
    times, ratios = stats.median_interval(far), stats.ratio_interval([[100.0] * 30] * 3, far)
    for found in (times, ratios):
        assert 0 < found.low < found.value < found.high
        assert found.value / found.low == pytest.approx(found.high / found.value)
    assert stats.replicates(far).linear_interval().low < 0  # what a symmetric one would say


def test_a_quantity_that_can_be_zero_has_no_interval_of_factors():
    with pytest.raises(ValueError, match="must be positive"):
        stats.median_interval([[0.0, 1.0, 0.0]])
    assert stats.over_values([0.0, 0.0, 1.0]).value == 0


def test_paired_ratios_cancel_what_rounds_share():
    rng = RNG(7)
    shared = measured(rng, 1.0, 0.02, 0.05)
    ours = [[s * 100 for s in p] for p in shared]
    peer = [[s * 110 for s in p] for p in shared]
    found = stats.ratio_interval(ours, peer)
    assert found.value == pytest.approx(1.1) and found.high - found.low < 1e-9
    unpaired = stats.median_interval(peer)
    assert unpaired.high - unpaired.low > 1


@pytest.mark.parametrize("between", [0.0, 0.004])
def test_false_verdicts_on_ratios_are_rare(between):
    """The truth is exactly the threshold's wrong side by nothing: any claim is a false one."""
    rng = RNG(8)
    false = 0
    for _ in range(TRIALS):
        ours = measured(rng, 100, between)
        found = stats.ratio_interval(ours, measured(rng, 105, between))
        false += found.low > 1.05 or found.high < 1.05
    assert false / TRIALS <= 0.05


def test_a_real_difference_is_found():
    rng = RNG(9)
    found = stats.ratio_interval(measured(rng, 100), measured(rng, 105))
    assert found.low > 1.03 and found.p_at_least(1.03) < 0.01 < found.p_at_least(1.05)
    assert found.p_at_most(1.07) < 0.01


def test_one_process_speaks_of_itself_only():
    found = stats.median_interval(measured(RNG(10), processes=1))
    assert found.n_processes == 1 and math.isinf(found.df)
    with pytest.raises(ValueError, match="3 processes of one subject against 2"):
        stats.ratio_interval(measured(RNG(1)), measured(RNG(1), processes=2))


def test_unequal_rounds_give_a_ratio_of_medians():
    rng = RNG(11)
    found = stats.ratio_interval(measured(rng, 100, rounds=40), measured(rng, 120, rounds=25))
    assert found.low < 1.2 < found.high


def test_over_problems():
    rng = RNG(12)
    truths = [1.1, 1.2, 1.3, 1.4, 1.5]
    drawn = [stats.ratio_replicates(measured(rng, 100), measured(rng, 100 * t)) for t in truths]
    median, least = (stats.over_problems(drawn, r).interval() for r in (np.median, np.min))
    assert median.low < 1.3 < median.high and least.low < 1.1 < least.high
    with pytest.raises(ValueError, match="problems is empty"):
        stats.over_problems([])


def test_values_over_problems():
    found = stats.over_values([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3 and found.low < 3 < found.high and found.df == 4


def test_the_same_samples_give_the_same_interval():
    samples = measured(RNG(13))
    assert stats.median_interval(samples) == stats.median_interval([list(p) for p in samples])


@pytest.mark.parametrize("bad", [[], [[]], [[1.0], []]])
def test_empty_samples_are_an_error(bad):
    with pytest.raises(ValueError, match="at least one"):
        stats.replicates(bad)


def test_wrong_samples_are_an_error():
    with pytest.raises(ValueError, match="finite"):
        stats.replicates([[1.0, math.nan]])
    with pytest.raises(ValueError, match="positive"):
        stats.ratio_interval([[1.0]], [[0.0]])


def test_noise_floor():
    assert stats.noise_floor([1.0, 1.004, 0.993]) == pytest.approx(0.007)
    with pytest.raises(ValueError, match="at least one"):
        stats.noise_floor([])


def test_holm():
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert stats.holm({}) == {}


def test_holm_keeps_the_family_wise_rate():
    rng = RNG(14)
    plain = corrected = 0
    for _ in range(2000):
        p = dict(zip("abcd", rng.random(4), strict=True))
        plain += min(p.values()) < 0.05
        corrected += min(stats.holm(p).values()) < 0.05
    assert plain / 2000 > 0.15 and corrected / 2000 <= 0.06


def test_bursts_of_a_process_are_averaged_without_what_was_not_read():
    sample = {
        "gpu_us": [[1.0, 3.0], [4.0]],
        "energy_mj": [[None, 2.0], [None]],
        "launch": ["graph"],
    }
    found = stats.burst_means(sample)
    assert found == {"gpu_us": [[2.0], [4.0]], "energy_mj": [[2.0], [None]], "launch": ["graph"]}
    assert sample["gpu_us"] == [[1.0, 3.0], [4.0]]
