"""Metrics: real counter names, kernels of a call combined, waits told apart by instruction."""

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic

from attn_ladder.problem import read_problems
from attn_profiling import metrics
from attn_profiling.metrics import Kernel

PROBLEM = read_problems(synthetic.PROBLEMS)["gate-b16"]
WHERE = "some.ncu-rep (gate-b16.fa3, ncu 2025.3.1)"


def call_of(subject="fa3", problem=PROBLEM):
    return metrics.combine(synthetic.kernels_of(problem, subject), problem, WHERE)


class Evaluator:
    """NVIDIA's own table of an H100's counters, from the library inside the ncu-report package."""

    def __init__(self, chip=b"GH100"):
        import ncu_report

        self.lib = ctypes.CDLL(str(Path(ncu_report.__file__).with_name("libnvperf_host.so")))
        self.call("NVPW_InitializeHost", ctypes.c_size_t(16), ctypes.c_void_p())
        size = self.call("NVPW_CUDA_MetricsEvaluator_CalculateScratchBufferSize", 40, 0, chip, 0, 0)
        self.scratch = ctypes.create_string_buffer(size)
        self.handle = self.call(
            "NVPW_CUDA_MetricsEvaluator_Initialize",
            72, 0, ctypes.addressof(self.scratch), size, chip, 0, 0, 0, 0,
        )  # fmt: skip

    def call(self, name, *words):
        """Call with a struct of words; the last is what comes back."""
        kept = [ctypes.c_char_p(w) if isinstance(w, bytes) else w for w in words]
        values = [
            ctypes.cast(w, ctypes.c_void_p).value if isinstance(w, ctypes.c_char_p)
            else (w.value or 0) if isinstance(w, ctypes._SimpleCData) else w
            for w in kept
        ]  # fmt: skip
        struct = (ctypes.c_uint64 * len(values))(*values)
        status = getattr(self.lib, name)(struct)
        assert status == 0, f"{name}: {status}"
        return struct[len(values) - 1]

    def knows(self, counter):
        request = ctypes.create_string_buffer(64)
        name = ctypes.c_char_p(counter.encode())
        struct = (ctypes.c_uint64 * 6)(
            48, 0, self.handle, ctypes.cast(name, ctypes.c_void_p).value,
            ctypes.addressof(request), 14,
        )  # fmt: skip
        convert = self.lib.NVPW_MetricsEvaluator_ConvertMetricNameToMetricEvalRequest
        return convert(struct) == 0

    def raw(self, counter):
        """The hardware counters behind a counter."""
        request = ctypes.create_string_buffer(64)
        name = ctypes.c_char_p(counter.encode())
        self.call(
            "NVPW_MetricsEvaluator_ConvertMetricNameToMetricEvalRequest",
            48, 0, self.handle, ctypes.cast(name, ctypes.c_void_p).value,
            ctypes.addressof(request), 14,
        )  # fmt: skip
        words = [0, self.handle, ctypes.addressof(request), 1, 14, 16]
        asked = "NVPW_MetricsEvaluator_GetMetricRawDependencies"
        struct = (ctypes.c_uint64 * 11)(88, *words, 0, 0, 0, 0)
        assert getattr(self.lib, asked)(struct) == 0
        needed, optional = (ctypes.c_char_p * max(struct[i], 1) for i in (8, 10))
        kept = needed(), optional()
        struct = (ctypes.c_uint64 * 11)(
            88, *words, ctypes.addressof(kept[0]), struct[8], ctypes.addressof(kept[1]), struct[10]
        )
        assert getattr(self.lib, asked)(struct) == 0
        return set(kept[0][: struct[8]])

    def passes(self, counters):
        """Passes over a kernel that hardware counters take together."""

        class Request(ctypes.Structure):
            _fields_ = [
                ("size", ctypes.c_size_t), ("private", ctypes.c_void_p), ("name", ctypes.c_char_p),
                ("isolated", ctypes.c_uint8), ("keep_instances", ctypes.c_uint8),
            ]  # fmt: skip

        config = self.call("NVPW_CUDA_RawMetricsConfig_Create_V2", 48, 0, 1, b"GH100", 0, 0)
        struct = (ctypes.c_uint64 * 4)(32, 0, config, 0)
        assert self.lib.NVPW_RawMetricsConfig_BeginPassGroup(struct) == 0
        for name in sorted(set().union(*(self.raw(counter) for counter in counters))):
            request = Request(26, None, name, 1, 1)
            struct = (ctypes.c_uint64 * 5)(40, 0, config, ctypes.addressof(request), 1)
            assert self.lib.NVPW_RawMetricsConfig_AddMetrics(struct) == 0
        struct = (ctypes.c_uint64 * 3)(24, 0, config)
        assert self.lib.NVPW_RawMetricsConfig_EndPassGroup(struct) == 0
        return self.call("NVPW_RawMetricsConfig_GetNumPasses_V2", 32, 0, config, 0)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator()


def test_every_counter_exists_on_an_h100(evaluator):
    names = [c for c in metrics.ncu_metrics() if not c.startswith("launch__")]  # ncu's own
    assert len(names) > 40
    assert [c for c in names if not evaluator.knows(c)] == []


@pytest.mark.parametrize(
    "wrong", ["smsp__inst_exekuted.sum", "smsp__inst_executed.average", "tensor_pipe"]
)
def test_a_counter_that_does_not_exist_is_unknown(evaluator, wrong):
    assert not evaluator.knows(wrong)


def test_the_listed_counters_take_few_passes(evaluator):
    """What a profiled kernel costs on the GPU: ncu counts the same 38 to 41 passes for all
    sections. Counters of single instructions (`sass`) are ncu's own and come on top."""

    def hardware(names):
        return [c for c in names if not c.startswith("launch__") and "__sass_" not in c]

    assert evaluator.passes(hardware(metrics.ncu_metrics(["bf16"]))) <= 9
    both = hardware(metrics.ncu_metrics())
    assert 9 < evaluator.passes(both) <= 12
    assert evaluator.passes([metrics.TIME]) == 1


def test_tensor_operations_of_another_dtype_are_not_counted():
    kernel = synthetic.kernels_of(PROBLEM, "fa3")[-1]
    others = {c: 1e30 for c in metrics.TENSOR_OPS if c not in metrics.tensor_counters("bf16")}
    assert len(others) == 2
    more = replace(kernel, counters={**kernel.counters, **others})
    fewer = replace(kernel, counters={c: v for c, v in kernel.counters.items() if c not in others})
    first, second, third = (
        metrics.derive_all(metrics.combine([k], PROBLEM, WHERE)) for k in (kernel, more, fewer)
    )
    assert first == second == third
    wrong = {c: v for c, v in kernel.counters.items() if c not in metrics.TENSOR_OPS}
    with pytest.raises(metrics.MissingCounter, match="src_bf16"):
        metrics.derive_all(metrics.combine([replace(kernel, counters=wrong)], PROBLEM, WHERE))


def test_every_constraint_has_witnesses():
    for name in ("branching", "launch", "sync", "memory"):
        assert len(metrics.witnesses(name)) >= 3
    with pytest.raises(ValueError, match="constraint='luck' has no witness; known"):
        metrics.witnesses("luck")


def test_counters_of_all_kernels_count():
    one = metrics.combine(synthetic.kernels_of(PROBLEM, "fa3")[1:], PROBLEM, WHERE)
    both = call_of()
    assert (one.kernels, both.kernels) == (1, 2)
    assert both[metrics.TIME] == one[metrics.TIME] + 2300
    dram = "dram__bytes.sum"
    assert both[dram] == pytest.approx(2 * one[dram])
    # a ratio of the call is a ratio of sums, not a mean of ratios
    inactive = metrics.derive_all(both)["inactive_threads"]
    assert 0 < inactive < metrics.derive_all(one)["inactive_threads"]
    # time-weighted: the short memset hardly moves the tensor pipe
    pipes = [metrics.derive_all(c)["tensor_pipe"] for c in (one, both)]
    assert 0.98 * pipes[0] < pipes[1] < pipes[0]
    assert metrics.derive_all(both)["registers"] == 168


def test_values_of_known_truth():
    found = metrics.derive_all(
        metrics.combine(synthetic.kernels_of(PROBLEM, "stage1"), PROBLEM, "")
    )
    assert found["inactive_threads"] == pytest.approx(0.4)
    assert found["predicated_off"] == pytest.approx(0.8)
    assert found["branch_uniformity"] == pytest.approx(99.6)
    assert found["masked_work"] == pytest.approx(100 * (1 - 1 / 1.1))
    assert found["idle_sm_cycles"] == pytest.approx(4.0)
    assert found["cta_barriers"] == pytest.approx(24)
    assert found["named_barriers"] == pytest.approx(16)
    assert found["mbarrier_waits"] == pytest.approx(24)
    assert found["profiled_clock"] == pytest.approx(1700)


def test_the_stall_breakdown_is_whole():
    found = metrics.derive_all(call_of("stage1"))
    parts = [found[f"stall_cycles_{reason}"] for reason in metrics.STALLS]
    assert sum(parts) == pytest.approx(found["stall_cycles_total"])
    assert "selected" in metrics.STALLS
    assert found["stall_unaccounted"] == pytest.approx(0)
    kernel = synthetic.kernels_of(PROBLEM, "stage1")[0]
    less = {**kernel.counters, metrics.stall_counter("barrier"): 0.0}
    broken = metrics.derive_all(metrics.combine([replace(kernel, counters=less)], PROBLEM, WHERE))
    assert broken["stall_unaccounted"] > 10


@pytest.mark.parametrize("counter", ["dram__bytes.sum", metrics.stall_counter("barrier"),
                                     metrics.TIME])  # fmt: skip
def test_a_missing_counter_is_an_error_that_names_it(counter):
    kernels = [
        replace(k, counters={c: v for c, v in k.counters.items() if c != counter})
        for k in synthetic.kernels_of(PROBLEM, "fa3")
    ]
    with pytest.raises(metrics.MissingCounter) as error:
        metrics.derive_all(metrics.combine(kernels, PROBLEM, WHERE))
    assert counter in str(error.value) and "some.ncu-rep" in str(error.value)
    assert "ncu 2025.3.1" in str(error.value)


def test_a_sum_that_one_kernel_lacks_is_missing():
    memset, main = synthetic.kernels_of(PROBLEM, "fa3")
    less = {c: v for c, v in memset.counters.items() if c != "dram__bytes.sum"}
    call = metrics.combine([replace(memset, counters=less), main], PROBLEM, WHERE)
    with pytest.raises(metrics.MissingCounter, match="dram__bytes.sum"):
        metrics.derive_all(call)


def test_a_ratio_that_is_not_a_number_leaves_its_kernel_out():
    hit = "lts__t_sector_hit_rate.pct"
    memset = synthetic.kernels_of(PROBLEM, "fa3")[0]
    assert memset.counters[hit] != memset.counters[hit]  # nan
    assert call_of()[hit] == pytest.approx(88)
    with pytest.raises(metrics.MissingCounter, match=hit):
        metrics.combine([memset], PROBLEM, WHERE)[hit]


def test_without_kernels_there_is_no_call():
    with pytest.raises(ValueError, match="no kernels"):
        metrics.combine([], PROBLEM, WHERE)


def test_tensor_counters_that_read_zero_give_no_value():
    kernel = synthetic.kernels_of(PROBLEM, "stage1")[0]
    zero = {**kernel.counters, **dict.fromkeys(metrics.TENSOR_OPS, 0.0)}
    call = metrics.combine([replace(kernel, counters=zero, instructions=())], PROBLEM, WHERE)
    assert "masked_work" not in metrics.derive_all(call)


def test_tensor_operations_are_counted_in_two_ways():
    """The counter of the synthetic kernel holds a tenth more than its instructions do."""
    kernel = synthetic.kernels_of(PROBLEM, "stage1")[0]
    found = metrics.derive_all(metrics.combine([kernel], PROBLEM, WHERE))
    assert found["tensor_ops_agreement"] == pytest.approx(1.1)
    zero = {**kernel.counters, **dict.fromkeys(metrics.TENSOR_OPS, 0.0)}
    call = metrics.combine([replace(kernel, counters=zero)], PROBLEM, WHERE)
    assert metrics.derive_all(call)["masked_work"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("sass", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 2 * 64 * 128 * 16 / 4),
        ("@P0 HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24", 2 * 64 * 64 * 16 / 4),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", 2 * 16 * 8 * 16),
        ("HADD2 R1, R2, R3", 0),
    ],
)
def test_operations_of_a_matrix_instruction(sass, flops):
    assert metrics.tensor_ops(synthetic.instruction(sass, 1)) == flops


def test_traffic_is_set_against_the_least():
    found = metrics.derive_all(call_of("stage1"))
    excess = [found[f"{name}_excess"] for name in ("dram", "l2", "tma")]
    assert excess == pytest.approx([1.2, 6.0, 5.0])


@pytest.mark.parametrize(
    ("sass", "kind"),
    [
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "cta"),
        ("@!P1  BAR.SYNC.DEFER_BLOCKING 0x4, 0x100", "named"),
        ("BAR.SYNC.DEFER_BLOCKING R7, 0x100 ;", "named"),
        ("BAR.ARV 0x4, 0x1a0", None),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8+0x16800], R7", "mbarrier"),
        ("@!P0  SYNCS.PHASECHK.TRANS64 P0, [R9+URZ], R2", None),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2], RZ", None),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", None),
        ("FADD R1, R2, R3", None),
        ("", None),
    ],
)
def test_barriers_are_told_by_their_instruction(sass, kind):
    assert metrics.barrier_kind(synthetic.instruction(sass, 1)) == kind


@pytest.mark.parametrize(
    ("sass", "kind"),
    [
        ("BAR.SYNC.DEFER_BLOCKING 0x1, 0x180", "cta"),  # all 384 threads, though they are counted
        ("BAR.SYNC.DEFER_BLOCKING R7, 0x180 ;", "cta"),
        ("BAR.SYNC.DEFER_BLOCKING 0x2, 0x100", "named"),
        ("BAR.SYNC.DEFER_BLOCKING R7, R8", "named"),
    ],
)
def test_a_named_barrier_of_all_threads_is_cta_wide(sass, kind):
    assert metrics.barrier_kind(synthetic.instruction(sass, 1), 384) == kind
    assert metrics.barrier_kind(synthetic.instruction(sass, 1)) == "named"
    kernel = synthetic.kernels_of(PROBLEM, "stage1")[0]
    barrier = (synthetic.instruction(sass, 1e6),)
    block = {**kernel.counters, metrics.BLOCK_SIZE: 384.0}
    call = metrics.combine([replace(kernel, counters=block, instructions=barrier)], PROBLEM, WHERE)
    assert call.waits[f"executed.{kind}"] == 1e6


def test_samples_go_to_the_barrier_that_holds_the_warp():
    i = synthetic.instruction
    filler = [i("FADD R1, R2, R3", 1)] * metrics.LOOK_BACK
    found = metrics.waits_of(
        [
            i("BAR.SYNC.DEFER_BLOCKING 0x0", 8),
            i("UIADD3 UR1, UR2, UR3", 8),
            i("UMOV UR8, 0x400", 8, barrier=5.0),
            i("BAR.SYNC.DEFER_BLOCKING R7, 0x100", 8, barrier=2.0),
            i("HGMMA.64x64x16.F32.BF16 R1", 8),
            i("WARPGROUP.DEPBAR.LE gsb0, 0x0", 8, barrier=7.0, wait=1.0),
            *filler,
            i("UMOV UR8, 0x400", 8, barrier=11.0),  # too far from any barrier
            i("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R7", 4),
            i("@!P0 BRA 0x10", 4, long_scoreboard=13.0),
            i("@!P0 NANOSLEEP.SYNCS 0x989680", 4, sleeping=3.0),
            i("LDG.E R1, [R2]", 4),
            i("FADD R1, R1, R2", 4, long_scoreboard=17.0),
        ]
    )
    assert found["samples.cta"] == 5 and found["samples.named"] == 2
    assert found["samples.wgmma"] == 7 and found["samples.mbarrier"] == 16
    assert found["samples.memory"] == 17 and found["samples.total"] == 59
    assert found["executed.cta"] == 8 and found["executed.mbarrier"] == 4


def test_a_barrier_under_a_false_guard_is_not_executed():
    off = metrics.Instruction("@P1 BAR.SYNC.DEFER_BLOCKING 0x5, 0x100", 8, 0.0, {})
    assert metrics.waits_of([off])["executed.named"] == 0


def test_source_metrics_need_source_counters():
    kernels = [replace(k, instructions=()) for k in synthetic.kernels_of(PROBLEM, "fa3")]
    found = metrics.derive_all(metrics.combine(kernels, PROBLEM, WHERE))
    assert "stall_barrier" in found and "samples_cta_barrier" not in found


def test_adding_a_metric_is_one_entry():
    assert all(isinstance(m, metrics.Metric) for m in metrics.METRICS)
    listed = set(metrics.ncu_metrics())
    assert all(set(m.counters) <= listed for m in metrics.METRICS)
    assert isinstance(synthetic.kernels_of(PROBLEM, "fa3")[0], Kernel)
