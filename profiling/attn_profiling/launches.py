"""Timed calls in one process: rounds of single calls, bursts of calls back to back.

What is primary and what is cross-check, and why, stands in `timing`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from attn_profiling.activity import ActivityError, Call, split
from attn_profiling.check import explain
from attn_profiling.device import Gpu
from attn_profiling.machine import Machine
from attn_profiling.settings import Measuring

SESSIONS = 4  # at most so many profiler sessions for one problem in one process
CANDIDATE_ROUNDS = 7
CANDIDATE_MARGIN = 0.99  # another configuration than the default must be this much faster
LEAD_IN = 0.25  # part of a burst that warms up and does not count
GRAPH_US = 10_000.0  # length of one graph replay in a burst
POLL_S = 0.004

T = TypeVar("T")
Subject = Callable[[int], Any]  # called with a running number that selects the inputs


class MeasureError(RuntimeError):
    """A measurement that could not be made; the text says of what and why."""


@dataclass
class Launch:
    """One timed call."""

    gpu_us: float
    event_us: float
    spin_clock_mhz: float
    dry: bool  # the queue ran dry between the spin and the call
    kernels: tuple[str, ...]


@dataclass
class Round:
    """One timed call of each subject, with NVML's readings in between."""

    launches: dict[str, Launch]
    clock_mhz: float | None
    power_w: float | None


@dataclass
class Samples:
    """What one process measured of one subject on one problem."""

    gpu_us: list[float] = field(default_factory=list)
    event_us: list[float] = field(default_factory=list)
    clock_mhz: list[float | None] = field(default_factory=list)
    power_w: list[float | None] = field(default_factory=list)
    energy_mj: list[float | None] = field(default_factory=list)
    energy_note: str | None = None
    spin_clock_mhz: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    launch: str | None = None
    retaken: int = 0
    kernels: dict[str, int] = field(default_factory=dict)


def take(
    machine: Machine,
    gpu: Gpu,
    subjects: Mapping[str, Subject],
    plan: list[list[str]],
    gap_us: float,
    first_index: int,
    before_round: Callable[[int], None] = lambda r: None,
    keep: Callable[[int, str, Any], None] = lambda r, name, out: None,
) -> list[Round]:
    """Run a plan (the order of subjects in each round) in one profiler session.

    Raises `ActivityError` where the records do not match the calls.
    """
    marks: list[tuple[int, str, Any, Any]] = []
    readings: list[tuple[float | None, float | None]] = []
    with machine.recorded() as activities:
        for r, order in enumerate(plan):
            before_round(r)
            for name in order:
                call = subjects[name]
                machine.flush()
                machine.spin(gap_us)
                start = machine.event()
                out = call(first_index + r)
                end = machine.event()
                marks.append((r, name, start, end))
                keep(r, name, out)
            machine.flush()
            readings.append((gpu.sm_clock_mhz(), gpu.power_w()))
            machine.synchronize()
    calls = split(activities, machine.flush_kernel, machine.spin_kernel)
    if len(calls) != len(marks):
        raise ActivityError(f"{len(marks)} calls were made, the records show {len(calls)}")
    cycles = machine.cycles_of(gap_us)
    rounds = [Round({}, clock, power) for clock, power in readings]
    for (r, name, start, end), call_record in zip(marks, calls, strict=True):
        rounds[r].launches[name] = _launch(machine, call_record, start, end, cycles)
    return rounds


def _launch(machine: Machine, call: Call, start: Any, end: Any, cycles: int) -> Launch:
    return Launch(
        gpu_us=round(call.gpu_us, 3),
        event_us=round(machine.elapsed_us(start, end), 3),
        spin_clock_mhz=round(cycles / call.spin_us),
        dry=call.gap_us > machine.gap_limit_us,
        kernels=call.kernels,
    )


def insist(session: Callable[[], T]) -> T:
    """Repeat a profiler session whose records do not match the calls; they can get lost."""
    for _ in range(SESSIONS - 1):
        try:
            return session()
        except ActivityError:
            continue
    return session()


def shuffled(names: list[str], rounds: int, rng: random.Random) -> list[list[str]]:
    """An order of the subjects for each round."""
    return [rng.sample(names, len(names)) for _ in range(rounds)]


def spaced(
    machine: Machine,
    gpu: Gpu,
    subjects: Mapping[str, Subject],
    measuring: Measuring,
    rng: random.Random,
    poison: Callable[[], None],
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """All rounds of one process on one problem.

    A call before which the queue ran dry is taken again. Returns the samples, and of each subject
    the output of one timed round, chosen at random, which began with poisoned memory; with its
    inputs' number.
    """
    names = list(subjects)
    lead = measuring.warmup_rounds
    total = lead + measuring.rounds
    watched = lead + rng.randrange(measuring.rounds)
    outputs: dict[str, Any] = {}

    def before_round(r: int) -> None:
        if r == watched:
            poison()

    def keep(r: int, name: str, out: Any) -> None:
        if r == watched:
            outputs[name] = (r, out)

    def session() -> list[Round]:
        plan = shuffled(names, total, rng)
        return take(machine, gpu, subjects, plan, measuring.gap_us, 0, before_round, keep)[lead:]

    taken = insist(session)
    retaken = Counter[str]()
    for tries in range(1, SESSIONS):
        dry = [(r, n) for r, row in enumerate(taken) for n in names if row.launches[n].dry]
        if not dry:
            break
        plan = [[n] for _, n in dry]
        again = insist(partial(take, machine, gpu, subjects, plan, measuring.gap_us, tries * total))
        for (r, n), row in zip(dry, again, strict=True):
            taken[r].launches[n] = row.launches[n]
            retaken[n] += 1
    else:
        left = sorted({n for row in taken for n in names if row.launches[n].dry})
        if left:
            raise MeasureError(
                f"the queue ran dry before calls of {', '.join(left)} however often they were"
                f" taken again: the host needs longer than gap_us={measuring.gap_us:g} to enqueue"
                " a call; raise measuring.gap_us"
            )
    samples = {}
    for n in names:
        rows = [row.launches[n] for row in taken]
        samples[n] = Samples(
            gpu_us=[row.gpu_us for row in rows],
            event_us=[row.event_us for row in rows],
            clock_mhz=[row.clock_mhz for row in taken],
            power_w=[row.power_w for row in taken],
            spin_clock_mhz=[row.spin_clock_mhz for row in rows],
            retaken=retaken[n],
            kernels=one_kind(n, [row.kernels for row in rows]),
        )
    return samples, outputs


class Unsteady(RuntimeError):
    """A subject launched other kernels in one call than in another."""

    def __init__(self, subject: str, message: str) -> None:
        super().__init__(message)
        self.subject = subject


def one_kind(subject: str, calls: list[tuple[str, ...]]) -> dict[str, int]:
    """Kernels of one call and how often each is launched in it. Raises `Unsteady`."""
    kinds = Counter(calls)
    if len(kinds) != 1:
        shown = "; ".join(
            f"{count} calls with {len(kernels)}: {', '.join(k[:60] for k in kernels)}"
            for kernels, count in kinds.most_common(2)
        )
        raise Unsteady(subject, f"it launched different kernels in different calls ({shown})")
    return dict(Counter(calls[0]))


def edge_power_w(readings: list[tuple[float, float]]) -> float | None:
    """Mean power between the first and the last change of an energy counter, in watts.

    `readings`: (seconds, millijoules). The counter stands still for a while and then jumps, so only
    its jumps carry time. None where it jumped less than twice.
    """
    edges = [
        now for last, now in zip(readings[:-1], readings[1:], strict=True) if now[1] != last[1]
    ]
    if len(edges) < 2 or edges[-1][0] <= edges[0][0]:
        return None
    return (edges[-1][1] - edges[0][1]) / 1000 / (edges[-1][0] - edges[0][0])


@dataclass
class Repeater:
    """Replays `calls` calls of a subject; `result` is the output of the last of them."""

    replay: Callable[[], Any]
    calls: int
    result: Callable[[], Any]
    launch: str


def repeater(machine: Machine, subject: Subject, gpu_us: float, distinct: int) -> Repeater:
    """A CUDA graph of some calls at different addresses; plain calls where capture fails."""
    count = max(1, min(distinct, round(GRAPH_US / gpu_us)))
    last: list[Any] = [None]
    try:
        replay, last[0] = machine.capture([lambda i=i: subject(i) for i in range(count)])  # type: ignore[misc]
        return Repeater(replay, count, lambda: last[0], "graph")
    except Exception:
        machine.synchronize()

    def eager() -> None:
        for i in range(count):
            last[0] = subject(i)

    return Repeater(eager, count, lambda: last[0], "eager")


def burst(
    machine: Machine, gpu: Gpu, repeat: Repeater, gpu_us: float, kernels: int, ms: float
) -> tuple[float, float, int, float | None, float | None, float | None, tuple[str, ...]]:
    """One burst. Returns (activity-summed µs per call, elapsed µs per call, calls, mean clock, mean
    power, mJ per call, kernels of one call)."""
    replays = max(2, math.ceil(ms * 1000 / (gpu_us * repeat.calls)))
    lead = max(1, math.ceil(LEAD_IN * replays))
    clocks, powers, energies = [], [], []
    with machine.recorded() as activities:
        machine.flush()
        machine.spin(GRAPH_US / 20)
        for _ in range(lead):
            repeat.replay()
        start = machine.event()
        for _ in range(replays):
            repeat.replay()
        end = machine.event()
        while not end.query():
            if start.query():
                energy = gpu.energy_mj()
                if energy is not None:
                    energies.append((time.perf_counter(), energy))
                clock, power = gpu.sm_clock_mhz(), gpu.power_w()
                if clock is not None:
                    clocks.append(clock)
                if power is not None:
                    powers.append(power)
            time.sleep(POLL_S)
        machine.flush()
    calls = split(activities, machine.flush_kernel, machine.spin_kernel)
    made = (lead + replays) * repeat.calls
    if len(calls) != 1 or len(calls[0].activities) != made * kernels:
        raise ActivityError(
            f"a burst of {made} calls of {kernels} kernels shows"
            f" {[len(call.activities) for call in calls]} kernels in the records"
        )
    counted = calls[0].activities[lead * repeat.calls * kernels :]
    number = replays * repeat.calls
    elapsed_us = machine.elapsed_us(start, end) / number
    power_w = edge_power_w(energies)
    return (
        round(sum(a.duration_ns for a in counted) / 1000 / number, 3),
        round(elapsed_us, 3),
        number,
        round(statistics.fmean(clocks), 1) if clocks else None,
        round(statistics.fmean(powers), 2) if powers else None,
        round(power_w * elapsed_us / 1000, 4) if power_w is not None else None,
        tuple(a.name for a in counted[:kernels]),
    )


def sustained(
    machine: Machine,
    gpu: Gpu,
    subjects: Mapping[str, Subject],
    measuring: Measuring,
    rng: random.Random,
    distinct: int,
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """All bursts of one process on one problem. Returns the samples, and each subject's output of
    the last burst, whose memory was poisoned before it."""
    names = list(subjects)
    plan = shuffled(names, 3, rng)
    first = insist(lambda: take(machine, gpu, subjects, plan, measuring.gap_us, 0))
    usual = {n: statistics.median(row.launches[n].gpu_us for row in first) for n in names}
    kernels = {n: one_kind(n, [row.launches[n].kernels for row in first]) for n in names}
    repeaters = {n: repeater(machine, subjects[n], usual[n], distinct) for n in names}
    samples = {n: Samples(kernels=kernels[n], launch=repeaters[n].launch) for n in names}
    for round_number in range(measuring.sustained_bursts):
        for n in rng.sample(names, len(names)):
            out = repeaters[n].result()
            if round_number == measuring.sustained_bursts - 1 and out is not None:
                for tensor in out:
                    if tensor is not None:
                        tensor.fill_(float("nan"))
            found = insist(
                partial(
                    burst,
                    machine,
                    gpu,
                    repeaters[n],
                    usual[n],
                    sum(kernels[n].values()),
                    measuring.sustained_ms,
                )
            )
            gpu_us, elapsed, number, clock, power, energy, seen = found
            if Counter(seen) != Counter(kernels[n]):
                raise Unsteady(n, f"it launched {', '.join(seen)} in a burst, {kernels[n]} before")
            row = samples[n]
            row.gpu_us.append(gpu_us)
            row.event_us.append(elapsed)
            row.calls.append(number)
            row.clock_mhz.append(clock)
            row.power_w.append(power)
            row.energy_mj.append(energy)
            if energy is None:
                row.energy_note = (
                    "NVML gives no energy counter here"
                    if gpu.energy_mj() is None
                    else "the energy counter changed less than twice in a burst; raise"
                    " measuring.sustained_ms"
                )
    outputs = {n: (repeaters[n].calls - 1, repeaters[n].result()) for n in names}
    return samples, outputs


def disagreement(regime: str, name: str, samples: Samples) -> str | None:
    """Where events and activity records do not tell the same time, a sentence; else None."""
    gpu, event = statistics.median(samples.gpu_us), statistics.median(samples.event_us)
    kernels = sum(samples.kernels.values())
    upper = gpu * 1.05 + 10.0 * kernels
    if regime == "sustained" and samples.launch == "eager":
        upper = math.inf  # back to back from the host: elapsed time may hold the host's
    if 0.97 * gpu <= event <= upper:
        return None
    return (
        f"{name}: events say {event:.1f} µs where its kernels sum to {gpu:.1f} µs; the queue ran"
        " dry, a kernel escaped the records, or a timer is not what it should be"
    )


def choose(
    machine: Machine,
    gpu: Gpu,
    make: Callable[[dict[str, Any] | None], Subject],
    candidates: list[dict[str, Any]],
    measuring: Measuring,
    rng: random.Random,
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The fastest of a peer's configurations, and what all of them took.

    The first, which is the default, is kept unless another is at least 1 % faster.
    """
    runnable: dict[str, Subject] = {}
    tried: list[dict[str, Any]] = []
    for i, config in enumerate(candidates):
        row: dict[str, Any] = {"config": config, "gpu_us": None, "message": None}
        tried.append(row)
        try:
            call = make(config)
            call(0)
            machine.synchronize()
            runnable[str(i)] = call
        except Exception as error:
            row["message"] = explain(error)
    if not runnable:
        return None, tried
    plan = shuffled(list(runnable), 1 + CANDIDATE_ROUNDS, rng)
    rounds = insist(lambda: take(machine, gpu, runnable, plan, measuring.gap_us, 0))[1:]
    times = {i: statistics.median(row.launches[i].gpu_us for row in rounds) for i in runnable}
    for key, us in times.items():
        tried[int(key)]["gpu_us"] = us
    default = next(iter(runnable))
    best = min(times, key=lambda key: times[key])
    kept = best if times[best] < CANDIDATE_MARGIN * times[default] else default
    return candidates[int(kept)], tried
