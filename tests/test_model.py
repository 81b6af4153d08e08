"""The roofline: counts by hand, limits where they must be, and bounds that bracket."""

import pytest
import synthetic

from attn_ladder.problem import Problem, read_problems
from attn_profiling import device, model

H100 = device.device("h100-sxm-80gb")
PROBLEMS = read_problems(synthetic.PROBLEMS)


def problem(**changes):
    values = {
        "id": "x", "suites": ("s",), "dtype": "bf16", "batch": 2, "seqlen_q": 512, "seqlen_k": 512,
        "nheads": 4, "nheads_k": 4, "headdim": 64, "causal": False,
    }  # fmt: skip
    return Problem(**{**values, **changes})


def test_pairs_in_tiles_that_touch_the_mask():
    assert model.computed_pairs(problem()) == 512 * 512
    tiles = 4 * 5 // 2  # of 4 x 4
    assert model.computed_pairs(problem(causal=True)) == tiles * 128 * 128
    assert model.computed_pairs(problem(causal=True)) > problem(causal=True).visible_pairs
    longer = problem(causal=True, seqlen_q=128)  # the last rows of 512 keys see all tiles
    assert model.computed_pairs(longer) == 128 * 512
    blind = problem(causal=True, seqlen_q=512, seqlen_k=128)  # three of four tiles see no key
    assert model.computed_pairs(blind) == 128 * 128


def test_the_tensor_time_is_flops_over_peak_at_boost():
    found = model.roofline(problem(), H100, H100.boost_clock_mhz)
    assert found.tensor_us == pytest.approx(problem().flops / 989.4e12 * 1e6)
    half = model.roofline(problem(), H100, H100.boost_clock_mhz / 2)
    assert half.tensor_us == pytest.approx(2 * found.tensor_us)
    assert half.dram_us == found.dram_us  # another clock


@pytest.mark.parametrize("name", [p for p in PROBLEMS if p.startswith(("grid-", "gate-"))])
def test_bounds_bracket(name):
    found = model.roofline(PROBLEMS[name], H100, 1755.0)
    assert max(found.resources.values()) < found.overlapped_us <= found.serial_us
    assert found.limit in found.resources


def test_short_sequences_are_limited_by_memory_and_long_ones_are_not():
    assert model.roofline(PROBLEMS["grid-d128-full-s512"], H100, 1755.0).limit == "DRAM"
    assert model.roofline(PROBLEMS["grid-d128-full-s16384"], H100, 1755.0).limit == "tensor"


def test_a_measured_bandwidth_is_used():
    p = PROBLEMS["grid-d128-full-s512"]
    peak, measured = (model.roofline(p, H100, 1755.0, rate) for rate in (None, 3.0e12))
    assert measured.dram_us == pytest.approx(p.min_bytes / 3.0e6)
    assert measured.dram_us > peak.dram_us


def test_rows_hold_every_column():
    (row,) = model.rows([(problem(), model.roofline(problem(), H100, 1755.0))])
    assert tuple(row) == model.COLUMNS
