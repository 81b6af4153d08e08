"""The table of metrics: what each one means, which Nsight Compute counters it needs, and how it is
derived.

A call may launch several kernels. Their counters are combined first (`combine`), then every metric
is derived from the combined counters, so a ratio over a call is a ratio of sums and not a mean of
ratios.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from attn_ladder.problem import DTYPES, Problem

WARP_THREADS = 32
TILE_PAIRS = 128 * 128
"""Barriers are counted per 128 x 128 visible score tile, whatever tiles a kernel has itself."""

TIME = "gpu__time_duration.sum"
BLOCK_SIZE = "launch__block_size"
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
"""Every state in which an H100's scheduler can find a warp, `selected` included: all its time."""

MEMORY_STALLS = ("long_scoreboard", "lg_throttle", "tex_throttle", "drain")


def stall_counter(reason: str) -> str:
    return f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"


STALL_TOTAL = "smsp__average_warp_latency_per_inst_issued.ratio"

TENSOR_OPS = (
    "sm__ops_path_tensor_op_hgmma_src_bf16_dst_fp32.sum",
    "sm__ops_path_tensor_op_hgmma_src_fp16.sum",
    "sm__ops_path_tensor_op_hmma_src_bf16_dst_fp32.sum",
    "sm__ops_path_tensor_op_hmma_src_fp16.sum",
)


def tensor_counters(dtype: str) -> tuple[str, ...]:
    """The counters of tensor operations on inputs of a dtype; those of the other read 0."""
    return tuple(c for c in TENSOR_OPS if f"_src_{dtype}" in c)


class MissingCounter(ValueError):
    """A report lacks a counter that a metric needs."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction of a kernel, in program order.

    `executed` warps ran it, `threads` threads with a true predicate; `samples` counts warps found
    at it by stall reason.
    """

    sass: str
    executed: float
    threads: float
    samples: Mapping[str, float]


@dataclass(frozen=True)
class Kernel:
    """One profiled kernel launch. `instructions` is empty where the report holds no source
    counters."""

    name: str
    ranges: tuple[str, ...]
    counters: Mapping[str, float]
    instructions: tuple[Instruction, ...] = ()


@dataclass(frozen=True)
class Call:
    """All kernels of one call, their counters combined.

    `waits` is `waits_of` summed over the kernels, empty without counters of single instructions.
    `where` names the file and the ncu version in errors.
    """

    problem: Problem
    kernels: int
    counters: Mapping[str, float]
    waits: Mapping[str, float]
    where: str

    def __getitem__(self, counter: str) -> float:
        if counter not in self.counters:
            raise MissingCounter(
                f"{self.where}: counter {counter} is missing; profile again with"
                " `metrics.ncu_metrics()` and an ncu that knows it"
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

    `derive` maps a combined call to the value, in `unit`, or to None where the metric does not
    apply to this call. `witness` is the constraint it bears on, or None. `source` metrics need
    per-instruction counters, which ncu's section SourceCounters collects.
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


def _by_counter(call: Call) -> float:
    return _sum_over(call, tensor_counters(call.problem.dtype))


def _masked_work(call: Call) -> float | None:
    executed = _by_counter(call) or call.waits.get("executed.tensor_ops")
    return 100 * (1 - call.problem.flops / executed) if executed else None


def _counted_twice(call: Call) -> float | None:
    by_instruction = call.waits["executed.tensor_ops"]
    return _by_counter(call) / by_instruction if by_instruction else None


def _opcode(instruction: Instruction) -> str:
    """The opcode with its modifiers, without a guard such as `@!P0`."""
    words = instruction.sass.split()
    return next((word.rstrip(";") for word in words if not word.startswith("@")), "")


LOOK_BACK = 16
_COUNT = re.compile(r",\s*(0x[0-9a-f]+|\d+)\s*;?\s*$", re.I)
_WARPGROUP_PRODUCT = re.compile(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)")
_WARP_PRODUCTS = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}


def barrier_kind(instruction: Instruction, block_size: float = math.inf) -> str | None:
    """`cta`, `named` or `mbarrier` for an instruction that waits at a barrier, else None.

    `BAR.SYNC id` without a thread count takes every thread of the CTA; `BAR.SYNC id, count` takes
    `count` of them (a named barrier, unless that is all `block_size` of them).
    `SYNCS.PHASECHK…TRYWAIT` is a wait on an mbarrier.
    """
    opcode = _opcode(instruction)
    if opcode.startswith(("BAR.SYNC", "BAR.RED")):
        operands = instruction.sass.split(opcode, 1)[1]
        count = _COUNT.search(operands)
        whole = "," not in operands or (count and int(count[1], 0) >= block_size)
        return "cta" if whole else "named"
    if opcode.startswith("SYNCS.PHASECHK") and "TRYWAIT" in opcode:
        return "mbarrier"
    return None


def tensor_ops(instruction: Instruction) -> float:
    """Operations that one warp's share of a matrix instruction stands for, else 0."""
    opcode = _opcode(instruction)
    if shape := _WARPGROUP_PRODUCT.match(opcode):
        return 2 * math.prod(map(int, shape.groups())) / 4  # four warps issue it together
    return 2 * next((n for name, n in _WARP_PRODUCTS.items() if opcode.startswith(name)), 0)


def waits_of(instructions: Sequence[Instruction], block_size: float = math.inf) -> dict[str, float]:
    """What a kernel's warps did and waited for, by machine instruction.

    `executed.<kind>` counts warps at barriers (`barrier_kind`), `executed.tensor_ops` operations of
    matrix products. `samples.<kind>` counts samples of warps held by barriers, `samples.wgmma`
    those waiting for a matrix product, `samples.memory` those waiting for global memory elsewhere,
    `samples.total` all.

    A sample is found where the warp next needs the barrier to be complete, not at the barrier:
    samples with the reason `barrier` belong to `WARPGROUP.DEPBAR` where they are at one, else to
    the nearest barrier at most `LOOK_BACK` instructions before. Samples of a wait on an mbarrier
    are at the branch that follows it, or in the retry loop behind that.
    """
    found = dict.fromkeys(
        [f"executed.{k}" for k in ("cta", "named", "mbarrier", "tensor_ops")]
        + [f"samples.{k}" for k in ("cta", "named", "mbarrier", "wgmma", "memory", "total")],
        0.0,
    )
    opcodes = [_opcode(i) for i in instructions]
    kinds = [barrier_kind(i, block_size) for i in instructions]
    for n, instruction in enumerate(instructions):
        kind, samples = kinds[n], instruction.samples
        warps = instruction.threads / WARP_THREADS
        found["executed.tensor_ops"] += tensor_ops(instruction) * warps
        if kind == "mbarrier":
            found["executed.mbarrier"] += instruction.executed
        elif kind:
            found[f"executed.{kind}"] += warps
        found["samples.total"] += sum(samples.values())
        barrier = samples.get("barrier", 0.0)
        if barrier and opcodes[n].startswith("WARPGROUP.DEPBAR"):
            found["samples.wgmma"] += barrier
        elif barrier:
            before = range(n, max(n - LOOK_BACK, 0) - 1, -1)
            at = next((kinds[b] for b in before if kinds[b] in ("cta", "named")), None)
            if at:
                found[f"samples.{at}"] += barrier
        retry = opcodes[n].startswith(("SYNCS.PHASECHK", "NANOSLEEP.SYNCS"))
        if retry or (n and kinds[n - 1] == "mbarrier"):
            found["samples.mbarrier"] += sum(samples.values()) - barrier
        else:
            found["samples.memory"] += sum(samples.get(r, 0.0) for r in MEMORY_STALLS)
    return found


def _executed(kind: str) -> Derive:
    return lambda call: call.waits[f"executed.{kind}"] / call.tiles


def _sample_share(kind: str) -> Derive:
    def derive(call: Call) -> float | None:
        total = call.waits["samples.total"]
        return 100 * call.waits[f"samples.{kind}"] / total if total else None

    return derive


def _both_shares(call: Call, *kinds: str) -> float | None:
    shares = [_sample_share(kind)(call) for kind in kinds]
    return None if None in shares else math.fsum(s for s in shares if s is not None)


def _cycles_each(kind: str) -> Derive:
    """Warp cycles held at a kind of barrier over the warps that came to one."""

    def derive(call: Call) -> float | None:
        executed, total = call.waits[f"executed.{kind}"], call.waits["samples.total"]
        if not executed or not total:
            return None
        resident = _sum_over(call, _ALL_STALLS) * call[ISSUE_ACTIVE]
        return resident * call.waits[f"samples.{kind}"] / total / executed

    return derive


_ALL_STALLS = tuple(stall_counter(r) for r in STALLS)
_INSTRUCTIONS = "smsp__inst_executed.sum"
_THREADS = (_INSTRUCTIONS, "smsp__thread_inst_executed.sum")
_PREDICATED = (_INSTRUCTIONS, "smsp__thread_inst_executed_pred_on.sum")
_CYCLES = "smsp__cycles_active.sum"
_MUFU = "sm__inst_executed_pipe_xu.sum"
_REGISTERS = "launch__registers_per_thread"
_WAVES = "launch__waves_per_multiprocessor"
_DRAM_BYTES, _L2_BYTES = "dram__bytes.sum", "lts__t_bytes.sum"
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


_CTA_BARRIER = "CTA-wide barriers"
_NAMED_BARRIER = "named barriers"

METRICS: tuple[Metric, ...] = (
    # branching
    Metric("inactive_threads", "threads inactive in an executed instruction", "%", _THREADS,
           _inactive(_THREADS[1]), "branching"),
    Metric("predicated_off", "threads inactive or predicated off", "%", _PREDICATED,
           _inactive(_PREDICATED[1]), "branching"),
    Metric("branch_uniformity", "branch targets taken by whole warps", "%", _BRANCHES,
           _share(_BRANCHES[1], _BRANCHES[0]), "branching"),
    Metric("stall_branch", "warp time resolving branches", "%", _ALL_STALLS,
           _stall_share(["branch_resolving"]), "branching"),
    Metric("masked_work", "tensor operations outside the visible pairs", "%", TENSOR_OPS,
           _masked_work, "branching"),
    Metric("tensor_ops_agreement", "tensor operations by counter over those by instruction", "1",
           TENSOR_OPS, _counted_twice, None, True),
    # launch
    Metric("kernels_per_call", "kernels of a call", "1", (),
           lambda call: float(call.kernels), "launch"),
    Metric("idle_sm_cycles", "SM cycles without a resident warp (waves, tail)", "%",
           (_ACTIVE, _ELAPSED), lambda call: 100 * (1 - call[_ACTIVE] / call[_ELAPSED]), "launch"),
    Metric("waves", "waves of the longest kernel", "1", (_WAVES,), _value(_WAVES), "launch"),
    # sync
    Metric("stall_barrier", "warp time in the stall reason barrier", "%", _ALL_STALLS,
           _stall_share(["barrier"]), "sync"),
    Metric("stall_membar", "warp time at memory barriers", "%", _ALL_STALLS,
           _stall_share(["membar"]), "sync"),
    Metric("cta_barriers", f"warps at {_CTA_BARRIER} per 128x128 tile", "1", (),
           _executed("cta"), "sync", True),
    Metric("named_barriers", f"warps at {_NAMED_BARRIER} per 128x128 tile", "1", (),
           _executed("named"), "sync", True),
    Metric("mbarrier_waits", "warps at mbarrier waits per 128x128 tile", "1", (),
           _executed("mbarrier"), "sync", True),
    Metric("samples_cta_barrier", f"warp samples held by {_CTA_BARRIER}", "%", (),
           _sample_share("cta"), "sync", True),
    Metric("samples_named_barrier", f"warp samples held by {_NAMED_BARRIER}", "%", (),
           _sample_share("named"), "sync", True),
    Metric("samples_wgmma", "warp samples at the wait for a matrix product", "%", (),
           _sample_share("wgmma"), "sync", True),
    Metric("samples_mbarrier", "warp samples at mbarrier waits", "%", (),
           _sample_share("mbarrier"), "sync", True),
    Metric("cta_barrier_cycles", "cycles that a CTA-wide barrier holds a warp", "cycle",
           (*_ALL_STALLS, ISSUE_ACTIVE), _cycles_each("cta"), "sync", True),
    Metric("named_barrier_cycles", "cycles that a named barrier holds a warp", "cycle",
           (*_ALL_STALLS, ISSUE_ACTIVE), _cycles_each("named"), "sync", True),
    # memory
    Metric("stall_memory", "warp time waiting for global memory", "%", _ALL_STALLS,
           _stall_share(MEMORY_STALLS), "memory"),
    Metric("samples_memory", "warp samples waiting for global memory, mbarriers apart", "%", (),
           _sample_share("memory"), "memory", True),
    Metric("samples_memory_bound", "warp samples waiting for global memory or at an mbarrier", "%",
           (), lambda call: _both_shares(call, "memory", "mbarrier"), "memory", True),
    Metric("stall_shared", "warp time waiting for shared memory or MUFU", "%", _ALL_STALLS,
           _stall_share(["short_scoreboard", "mio_throttle"]), "memory"),
    Metric("tensor_pipe", "tensor pipe active", "%", (_TENSOR,), _value(_TENSOR), "memory"),
    Metric("dram_throughput", "DRAM throughput of peak", "%", (_DRAM,), _value(_DRAM), "memory"),
    Metric("dram_bytes", "DRAM traffic", "B", (_DRAM_BYTES,), _value(_DRAM_BYTES), "memory"),
    Metric("dram_excess", "DRAM traffic over the algorithm's minimum", "1", (_DRAM_BYTES,),
           lambda call: call[_DRAM_BYTES] / call.problem.min_bytes, "memory"),
    Metric("l2_bytes", "L2 traffic", "B", (_L2_BYTES,), _value(_L2_BYTES), "memory"),
    Metric("l2_hit_rate", "L2 sector hit rate", "%", (_L2_HIT,), _value(_L2_HIT), "memory"),
    Metric("l2_excess", "L2 traffic over the algorithm's minimum", "1", (_L2_BYTES,),
           lambda call: call[_L2_BYTES] / call.problem.min_bytes, "memory"),
    Metric("tma_bytes", "bytes loaded by TMA", "B", (_TMA,), _value(_TMA), "memory"),
    Metric("tma_excess", "bytes loaded by TMA over the algorithm's minimum", "1", (_TMA,),
           lambda call: call[_TMA] / call.problem.min_bytes, "memory"),
    # the whole stall breakdown: with `selected` it is all of a warp's resident time
    *(
        Metric(f"stall_cycles_{reason}", f"warp cycles per issue: {text}", "cycle",
               (stall_counter(reason),), _value(stall_counter(reason)))
        for reason, text in STALLS.items()
    ),
    Metric("stall_cycles_total", "warp cycles per issue, as ncu sums them", "cycle",
           (STALL_TOTAL,), _value(STALL_TOTAL)),
    Metric("stall_unaccounted", "warp cycles of ncu's total that no stall reason holds", "%",
           (*_ALL_STALLS, STALL_TOTAL),
           lambda call: 100 * (1 - _sum_over(call, _ALL_STALLS) / call[STALL_TOTAL])),
    # pipes, issue and resources
    *(
        Metric(f"{name}_pipe", f"{title} pipe active", "%", (_pipe(name),), _value(_pipe(name)))
        for name, title in (("xu", "MUFU"), ("fma", "FMA"), ("alu", "ALU"))
    ),
    Metric("issue_slots", "issue slots used", "%", (ISSUE_ACTIVE, _CYCLES),
           _share(ISSUE_ACTIVE, _CYCLES)),
    Metric("instructions", "warp instructions executed", "1", (_INSTRUCTIONS,),
           _value(_INSTRUCTIONS)),
    Metric("mufu_instructions", "warp instructions on the MUFU pipe", "1", (_MUFU,),
           _value(_MUFU)),
    Metric("registers", "registers per thread at launch", "1", (_REGISTERS,), _value(_REGISTERS)),
    Metric("spill_instructions", "local loads and stores executed", "1", _SPILLS,
           lambda call: _sum_over(call, _SPILLS)),
    Metric("occupancy", "resident warps of the maximum", "%", (_OCCUPANCY,), _value(_OCCUPANCY)),
    Metric("profiled_clock", "SM clock under the profiler", "MHz", (_ELAPSED, TIME),
           lambda call: 1e3 * call[_ELAPSED] / call[TIME]),
)  # fmt: skip

BY_ID = {m.id: m for m in METRICS}
if len(BY_ID) != len(METRICS):
    raise ValueError("two metrics share an id")


def ncu_metrics(dtypes: Iterable[str] = DTYPES) -> list[str]:
    """Counters to name to ncu (`--metrics`) for problems of some dtypes, sorted, without repeats.

    Tensor operations of another dtype would only take passes: three of twelve.
    """
    needed = {c for dtype in dtypes for c in tensor_counters(dtype)}
    listed = {TIME, ISSUE_ACTIVE, BLOCK_SIZE} | {c for m in METRICS for c in m.counters}
    return sorted(listed - (set(TENSOR_OPS) - needed))


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

    Sums and cycle counts add up; warp cycles per issue are weighted by issued instructions; launch
    properties are those of the longest kernel; all other ratios are weighted by time. A ratio that
    is not a number for one kernel (nothing to divide by) leaves that kernel out, and is missing
    where no kernel has it.
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
    waits: dict[str, float] = {}
    for kernel in kernels:
        if not kernel.instructions:
            continue
        block_size = kernel.counters.get(BLOCK_SIZE, math.inf)
        for name, value in waits_of(kernel.instructions, block_size).items():
            waits[name] = waits.get(name, 0.0) + value
    return Call(problem, len(kernels), combined, waits, where)


def derive_all(call: Call) -> dict[str, float]:
    """Every metric that applies to a call, by id. Raises `MissingCounter` for a counter that is not
    there."""
    values: dict[str, float] = {}
    for metric in METRICS:
        if metric.source and not call.waits:
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
