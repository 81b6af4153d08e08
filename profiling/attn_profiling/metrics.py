"""The table of metrics: what each one means, which Nsight Compute counters it needs, and how it is derived.

A call may launch several kernels. Their counters are combined first (`combine`), then every metric is derived from
the combined counters, so a ratio over a call is a ratio of sums and not a mean of ratios.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from attn_ladder.problem import Problem

WARP_THREADS = 32
TILE_PAIRS = 128 * 128
"""Barriers and waits are counted per 128 x 128 visible score tile, a unit that no kernel's own tile size changes."""

TIME = "gpu__time_duration.sum"
ISSUE_ACTIVE = "smsp__issue_active.sum"

STALLS = {
    "barrier": "waiting at a barrier (CTA-wide or named)",
    "branch_resolving": "waiting for a branch target",
    "dispatch_stall": "dispatcher held back",
    "drain": "waiting for stores after exit",
    "gmma": "waiting for the warpgroup matrix unit",
    "imc_miss": "constant cache miss",
    "lg_throttle": "local/global queue full",
    "long_scoreboard": "waiting for a load through L1TEX",
    "math_pipe_throttle": "math pipe busy",
    "membar": "memory barrier",
    "mio_throttle": "memory input/output queue full",
    "misc": "miscellaneous",
    "no_instruction": "instruction fetch",
    "not_selected": "eligible, another warp was chosen",
    "selected": "issuing",
    "short_scoreboard": "waiting for shared memory or MUFU",
    "sleeping": "asleep or yielded",
    "tex_throttle": "texture queue full",
    "wait": "fixed-latency dependency",
}
"""Every reason in which an H100's warp scheduler can find a warp, `selected` included: together they are all its time."""

MEMORY_STALLS = ("long_scoreboard", "lg_throttle", "tex_throttle", "drain")


def stall_counter(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


STALL_TOTAL = "smsp__average_warps_active_per_issue_active.ratio"

TENSOR_OPS = (
    "sm__ops_path_tensor_op_hgmma_src_bf16_dst_fp32.sum",
    "sm__ops_path_tensor_op_hgmma_src_fp16.sum",
    "sm__ops_path_tensor_op_hmma_src_bf16_dst_fp32.sum",
    "sm__ops_path_tensor_op_hmma_src_fp16.sum",
)


class MissingCounter(ValueError):
    """A report lacks a counter that a metric needs."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction of a kernel: how many warps executed it, and where warps were found waiting at it."""

    sass: str
    executed: float
    samples: Mapping[str, float]


@dataclass(frozen=True)
class Kernel:
    """One profiled kernel launch. `instructions` is empty where the report holds no source counters."""

    name: str
    ranges: tuple[str, ...]
    counters: Mapping[str, float]
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class Call:
    """All kernels of one call, their counters combined. `where` names the file and the ncu version in errors."""

    problem: Problem
    kernels: int
    counters: Mapping[str, float]
    instructions: tuple[Instruction, ...]
    where: str

    def __getitem__(self, counter: str) -> float:
        if counter not in self.counters:
            raise MissingCounter(
                f"{self.where}: counter {counter} is missing; profile again with `metrics.ncu_metrics()` and an ncu "
                "that knows it"
            )
        return self.counters[counter]

    @property
    def tiles(self) -> float:
        """Visible 128 x 128 score tiles of the whole problem."""
        return self.problem.visible_pairs * self.problem.batch * self.problem.nheads / TILE_PAIRS


Derive = Callable[[Call], "float | None"]


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    `derive` maps a combined call to the value, in `unit`, or to None where the metric does not apply to this call.
    `witness` is the constraint it bears on, or None. `source` metrics need per-instruction counters, which only
    reports with all sections hold.
    """

    id: str
    title: str
    unit: str
    counters: tuple[str, ...]
    derive: Derive = field(repr=False)
    witness: str | None = None
    source: bool = False


def _sum_over(call: Call, counters: Sequence[str]) -> float:
    return sum(call[c] for c in counters)


def _share(part: str, whole: str, per: float = 1.0) -> Derive:
    return lambda call: 100 * call[part] / (per * call[whole]) if call[whole] else None


def _inactive(counter: str) -> Derive:
    def derive(call: Call) -> float:
        return 100 * (1 - call[counter] / (WARP_THREADS * call["smsp__inst_executed.sum"]))

    return derive


def _stall_share(reasons: Sequence[str]) -> Derive:
    def derive(call: Call) -> float:
        total = _sum_over(call, [stall_counter(r) for r in STALLS])
        return 100 * _sum_over(call, [stall_counter(r) for r in reasons]) / total

    return derive


def _value(counter: str) -> Derive:
    return lambda call: call[counter]


def _masked_work(call: Call) -> float | None:
    executed = _sum_over(call, TENSOR_OPS)
    if not executed:
        return None
    return 100 * (1 - call.problem.flops / executed)


def _opcode(instruction: Instruction) -> str:
    """The opcode with its modifiers, without a guard such as `@!P0`."""
    text = re.sub(r"^\s*@!?U?P\w+\s+", "", instruction.sass)
    return text.split(None, 1)[0].rstrip(";") if text.strip() else ""


def barrier_kind(instruction: Instruction) -> str | None:
    """`cta`, `named` or `mbarrier` for an instruction that waits at a barrier, else None.

    `BAR.SYNC id` without a thread count takes every thread of the CTA; `BAR.SYNC id, count` takes `count` of them
    (a named barrier). `SYNCS.PHASECHK…TRYWAIT` is a wait on an mbarrier.
    """
    opcode = _opcode(instruction)
    if opcode.startswith(("BAR.SYNC", "BAR.RED")):
        operands = instruction.sass.split(opcode, 1)[1].strip(" ;").split(",")
        return "named" if len(operands) > 1 else "cta"
    if opcode.startswith("SYNCS") and "TRYWAIT" in opcode:
        return "mbarrier"
    return None


def _executed(kind: str) -> Derive:
    def derive(call: Call) -> float:
        return sum(i.executed for i in call.instructions if barrier_kind(i) == kind) / call.tiles

    return derive


def _samples(call: Call) -> float:
    return sum(sum(i.samples.values()) for i in call.instructions)


def _sample_share(kind: str) -> Derive:
    def derive(call: Call) -> float | None:
        total = _samples(call)
        if not total:
            return None
        at = [i for i in call.instructions if barrier_kind(i) == kind]
        return 100 * sum(sum(i.samples.values()) for i in at) / total

    return derive


def _cycles_each(call: Call) -> float | None:
    """Warp cycles spent in barrier stalls over warps that executed a `BAR` that waits."""
    executed = sum(i.executed for i in call.instructions if barrier_kind(i) in ("cta", "named"))
    return call[stall_counter("barrier")] * call[ISSUE_ACTIVE] / executed if executed else None


_ALL_STALLS = tuple(stall_counter(r) for r in STALLS)
_THREADS = ("smsp__inst_executed.sum", "smsp__thread_inst_executed.sum")
_BRANCHES = ("smsp__sass_branch_targets.sum", "smsp__sass_branch_targets_threads_uniform.sum")
_L2_HIT = "lts__t_sector_hit_rate.pct"
_TMA = "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld.sum"
_TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
_DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
_ACTIVE, _ELAPSED = "sm__cycles_active.avg", "sm__cycles_elapsed.max"
_OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
_SPILLS = ("smsp__sass_inst_executed_op_local_ld.sum", "smsp__sass_inst_executed_op_local_st.sum")


def _pipe(name: str) -> str:
    return f"sm__inst_executed_pipe_{name}.avg.pct_of_peak_sustained_active"


METRICS: tuple[Metric, ...] = (
    # branching
    Metric("inactive_threads", "threads inactive in an executed instruction", "%", _THREADS,
           _inactive("smsp__thread_inst_executed.sum"), "branching"),
    Metric("predicated_off", "threads inactive or predicated off", "%",
           ("smsp__inst_executed.sum", "smsp__thread_inst_executed_pred_on.sum"),
           _inactive("smsp__thread_inst_executed_pred_on.sum"), "branching"),
    Metric("branch_uniformity", "branch targets taken by whole warps", "%", _BRANCHES,
           _share(_BRANCHES[1], _BRANCHES[0]), "branching"),
    Metric("stall_branch", "warp time resolving branches", "%", _ALL_STALLS,
           _stall_share(["branch_resolving"]), "branching"),
    Metric("masked_work", "tensor operations outside the visible pairs", "%", TENSOR_OPS, _masked_work, "branching"),
    # launch
    Metric("kernels_per_call", "kernels of a call", "1", (), lambda call: float(call.kernels), "launch"),
    Metric("idle_sm_cycles", "SM cycles without a resident warp (waves and tail)", "%", (_ACTIVE, _ELAPSED),
           lambda call: 100 * (1 - call[_ACTIVE] / call[_ELAPSED]), "launch"),
    Metric("waves", "waves of the longest kernel", "1", ("launch__waves_per_multiprocessor",),
           _value("launch__waves_per_multiprocessor"), "launch"),
    # sync
    Metric("stall_barrier", "warp time at barriers, CTA-wide and named", "%", _ALL_STALLS,
           _stall_share(["barrier"]), "sync"),
    Metric("stall_membar", "warp time at memory barriers", "%", _ALL_STALLS, _stall_share(["membar"]), "sync"),
    Metric("cta_barriers", "warps at a CTA-wide barrier per 128x128 tile", "1", (), _executed("cta"), "sync", True),
    Metric("named_barriers", "warps at a named barrier per 128x128 tile", "1", (), _executed("named"), "sync", True),
    Metric("mbarrier_waits", "warps at an mbarrier wait per 128x128 tile", "1", (), _executed("mbarrier"), "sync",
           True),
    Metric("samples_cta_barrier", "warp samples at CTA-wide barriers", "%", (), _sample_share("cta"), "sync", True),
    Metric("samples_named_barrier", "warp samples at named barriers", "%", (), _sample_share("named"), "sync", True),
    Metric("samples_mbarrier", "warp samples at mbarrier waits", "%", (), _sample_share("mbarrier"), "sync", True),
    Metric("barrier_cycles", "warp cycles of one barrier wait", "cycle", (stall_counter("barrier"), ISSUE_ACTIVE),
           _cycles_each, "sync", True),
    # memory
    Metric("stall_memory", "warp time waiting for global memory", "%", _ALL_STALLS, _stall_share(MEMORY_STALLS),
           "memory"),
    Metric("stall_shared", "warp time waiting for shared memory or MUFU", "%", _ALL_STALLS,
           _stall_share(["short_scoreboard", "mio_throttle"]), "memory"),
    Metric("tensor_pipe", "tensor pipe active", "%", (_TENSOR,), _value(_TENSOR), "memory"),
    Metric("dram_throughput", "DRAM throughput of peak", "%", (_DRAM,), _value(_DRAM), "memory"),
    Metric("dram_bytes", "DRAM traffic", "B", ("dram__bytes.sum",), _value("dram__bytes.sum"), "memory"),
    Metric("dram_excess", "DRAM traffic over the algorithm's minimum", "1", ("dram__bytes.sum",),
           lambda call: call["dram__bytes.sum"] / call.problem.min_bytes, "memory"),
    Metric("l2_bytes", "L2 traffic", "B", ("lts__t_bytes.sum",), _value("lts__t_bytes.sum"), "memory"),
    Metric("l2_hit_rate", "L2 sector hit rate", "%", (_L2_HIT,), _value(_L2_HIT), "memory"),
    Metric("tma_bytes", "bytes loaded by TMA", "B", (_TMA,), _value(_TMA), "memory"),
    # the whole stall breakdown: with `selected` it is all of a warp's resident time
    *(
        Metric(f"stall_cycles_{reason}", f"warp cycles per issue: {text}", "cycle", (stall_counter(reason),),
               _value(stall_counter(reason)))
        for reason, text in STALLS.items()
    ),
    Metric("stall_cycles_total", "warp cycles per issue, as ncu sums them", "cycle", (STALL_TOTAL,),
           _value(STALL_TOTAL)),
    # pipes, issue and resources
    *(
        Metric(f"{name}_pipe", f"{title} pipe active", "%", (_pipe(name),), _value(_pipe(name)))
        for name, title in (("xu", "MUFU"), ("fma", "FMA"), ("alu", "ALU"))
    ),
    Metric("issue_slots", "issue slots used", "%", (ISSUE_ACTIVE, "smsp__cycles_active.sum"),
           _share(ISSUE_ACTIVE, "smsp__cycles_active.sum")),
    Metric("instructions", "warp instructions executed", "1", ("smsp__inst_executed.sum",),
           _value("smsp__inst_executed.sum")),
    Metric("mufu_instructions", "warp instructions on the MUFU pipe", "1", ("sm__inst_executed_pipe_xu.sum",),
           _value("sm__inst_executed_pipe_xu.sum")),
    Metric("registers", "registers per thread at launch", "1", ("launch__registers_per_thread",),
           _value("launch__registers_per_thread")),
    Metric("spill_instructions", "local loads and stores executed", "1", _SPILLS,
           lambda call: _sum_over(call, _SPILLS)),
    Metric("occupancy", "resident warps of the maximum", "%", (_OCCUPANCY,), _value(_OCCUPANCY)),
    Metric("profiled_clock", "SM clock under the profiler", "MHz", (_ELAPSED, TIME),
           lambda call: 1e3 * call[_ELAPSED] / call[TIME]),
)  # fmt: skip

BY_ID = {m.id: m for m in METRICS}
if len(BY_ID) != len(METRICS):
    raise ValueError("two metrics share an id")


def ncu_metrics() -> list[str]:
    """Counters to name to ncu (`--metrics`), sorted and without repeats."""
    return sorted({TIME, ISSUE_ACTIVE} | {c for m in METRICS for c in m.counters})


def witnesses(constraint: str) -> list[Metric]:
    """The metrics that bear on a constraint. Raises `ValueError` for an unknown constraint."""
    found = [m for m in METRICS if m.witness == constraint]
    if not found:
        known = sorted({m.witness for m in METRICS if m.witness})
        raise ValueError(f"{constraint=} has no witness; known constraints: {', '.join(known)}")
    return found


def _is_summed(counter: str) -> bool:
    return counter.endswith(".sum") or counter in (_ACTIVE, _ELAPSED)


def combine(kernels: Sequence[Kernel], problem: Problem, where: str) -> Call:
    """One call from its kernels.

    Sums and cycle counts add up; warp cycles per issue are weighted by issued instructions; launch properties are
    those of the longest kernel; all other ratios are weighted by time. A ratio that is not a number for one kernel
    (nothing to divide by) leaves that kernel out, and is missing where no kernel has it.
    """
    if not kernels:
        raise ValueError(f"{where}: no kernels in this call")
    for needed in (TIME, ISSUE_ACTIVE):
        for kernel in kernels:
            if needed not in kernel.counters:
                raise MissingCounter(
                    f"{where}: counter {needed} is missing for kernel {kernel.name}"
                )
    longest = max(kernels, key=lambda k: k.counters[TIME])
    combined: dict[str, float] = {}
    for counter in sorted(set().union(*(k.counters for k in kernels))):
        having = [
            k for k in kernels if counter in k.counters and not math.isnan(k.counters[counter])
        ]
        if counter.startswith("launch__"):
            having = [k for k in having if k is longest]
            if having:
                combined[counter] = longest.counters[counter]
        elif _is_summed(counter):
            if len(having) == len(kernels):
                combined[counter] = sum(k.counters[counter] for k in having)
        elif having:
            by = (
                ISSUE_ACTIVE
                if counter.endswith(("_per_issue_active.ratio", "_per_inst_issued.ratio"))
                else TIME
            )
            weight = sum(k.counters[by] for k in having)
            if weight:
                combined[counter] = (
                    sum(k.counters[counter] * k.counters[by] for k in having) / weight
                )
    instructions = tuple(i for k in kernels for i in k.instructions)
    return Call(problem, len(kernels), combined, instructions, where)


def derive_all(call: Call) -> dict[str, float]:
    """Every metric that applies to a call, by id. Raises `MissingCounter` for a counter that is not there."""
    values: dict[str, float] = {}
    for metric in METRICS:
        if metric.source and not call.instructions:
            continue
        value = metric.derive(call)
        if value is None:
            continue
        if not math.isfinite(value):
            raise MissingCounter(
                f"{call.where}: {metric.id} is {value}; needed: {', '.join(metric.counters)}"
            )
        values[metric.id] = value
    return values
