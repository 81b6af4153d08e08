"""Bursts of calls back to back, for the regime in which clock and power settle.

The bursts of a process on a problem follow each other after a while of load that does not count.
At the power limit the clock swings by some percent, with a period of about 0.9 s, in phase with the
beginning of the load, whoever runs then (CONTRIBUTING, "Measuring"). So each subject has each place
in the order once, and its bursts in a process count as one, their mean.

A burst replays a CUDA graph of calls at different addresses; where a subject cannot be captured, or
the profiler loses the kernels of its graph, it makes plain calls, and the record says so.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from attn_profiling.activity import Activity, ActivityError, split
from attn_profiling.device import Gpu
from attn_profiling.launches import (
    SESSIONS,
    Samples,
    Subject,
    Unsteady,
    by_name,
    insist,
    one_kind,
    shuffled,
    take,
)
from attn_profiling.machine import Machine
from attn_profiling.settings import Measuring

LEAD_IN = 0.1  # part of a burst that settles on its subject and does not count
GRAPH_US = 10_000.0  # length of one graph replay
SPIN_US = 500.0  # before a burst, while the host enqueues its first replays
POLL_S = 0.004


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


class Repeater:
    """Replays `calls` calls of a subject; `result` is the output of the last of them."""

    def __init__(self, machine: Machine, subject: Subject, gpu_us: float, distinct: int) -> None:
        self.calls = max(1, min(distinct, round(GRAPH_US / gpu_us)))
        self.result: Any = None
        self._subject = subject
        self.launch = "graph"
        self.replay: Callable[[], None]
        try:
            self.replay, self.result = machine.capture(
                [lambda i=i: subject(i) for i in range(self.calls)]  # type: ignore[misc]
            )
        except Exception:
            machine.synchronize()
            self.go_eager()

    def go_eager(self) -> None:
        """Make plain calls from here on."""
        self.launch = "eager"
        self.replay = self._call_all

    def _call_all(self) -> None:
        for i in range(self.calls):
            self.result = self._subject(i)

    def poison(self) -> None:
        """Fill the memory of the last output, which a graph writes again, with NaN."""
        for tensor in self.result or ():
            if tensor is not None:
                tensor.fill_(float("nan"))


@dataclass
class Burst:
    """One burst under way: what was enqueued, and what NVML said while it ran."""

    replays: int
    lead: int
    start: Any = None
    end: Any = None
    clocks: list[float] = field(default_factory=list)
    powers: list[float] = field(default_factory=list)
    energies: list[tuple[float, float]] = field(default_factory=list)

    def run(self, machine: Machine, gpu: Gpu, repeat: Repeater) -> None:
        """Enqueue, and read clock, power and energy while the counted part runs."""
        machine.flush()
        machine.spin(SPIN_US)
        for _ in range(self.lead):
            repeat.replay()
        self.start = machine.event()
        for _ in range(self.replays):
            repeat.replay()
        self.end = machine.event()
        while not self.end.query():
            if self.start.query():
                self._read(gpu)
            time.sleep(POLL_S)
        machine.flush()

    def _read(self, gpu: Gpu) -> None:
        energy = gpu.energy_mj()
        if energy is not None:
            self.energies.append((time.perf_counter(), energy))
        clock, power = gpu.sm_clock_mhz(), gpu.power_w()
        if clock is not None:
            self.clocks.append(clock)
        if power is not None:
            self.powers.append(power)


class LostKernels(ActivityError):
    """The records of some subjects' bursts do not hold all of their kernels."""

    def __init__(self, counts: Mapping[str, tuple[int, int]]) -> None:
        shown = (f"{name} launched {a} kernels, {b} recorded" for name, (a, b) in counts.items())
        super().__init__(f"bursts lost records: {'; '.join(shown)}")
        self.subjects = list(counts)


def burst_session(
    machine: Machine,
    gpu: Gpu,
    repeaters: Mapping[str, Repeater],
    rounds: list[list[str]],
    usual_us: Mapping[str, float],
    kernels: Mapping[str, int],
    measuring: Measuring,
) -> list[tuple[str, Burst, tuple[Activity, ...]]]:
    """A burst of each subject in each round, preheated, in one profiler session.

    Of each in turn: the subject, what NVML said, and the counted kernels. The memory of a result is
    poisoned before the last burst that writes it.
    """
    heat = rounds[0]
    plan = [(name, measuring.sustained_preheat_ms / len(heat)) for name in heat]
    plan += [(name, measuring.sustained_ms) for order in rounds for name in order]
    bursts: list[Burst] = []
    with machine.recorded() as activities:
        for place, (name, length) in enumerate(plan):
            repeat = repeaters[name]
            if place >= len(plan) - len(rounds[-1]):
                repeat.poison()
            whole = max(4, math.ceil(length * 1000 / (usual_us[name] * repeat.calls)))
            lead = max(1, round(LEAD_IN * whole))
            bursts.append(Burst(replays=whole - lead, lead=lead))
            bursts[-1].run(machine, gpu, repeat)
    calls = split(activities, machine.flush_kernel, machine.spin_kernel)
    if len(calls) != len(plan):
        raise ActivityError(f"{len(plan)} bursts were made, the records show {len(calls)}")
    counted, lost = [], {}
    for (name, _), burst, call in list(zip(plan, bursts, calls, strict=True))[len(heat) :]:
        one_replay = repeaters[name].calls * kernels[name]
        made = (burst.lead + burst.replays) * one_replay
        if len(call.activities) != made:
            lost[name] = (made, len(call.activities))
        counted.append((name, burst, call.activities[burst.lead * one_replay :]))
    if lost:
        raise LostKernels(lost)
    return counted


def rotated(rng: random.Random, names: list[str], rounds: int) -> list[list[str]]:
    """The order of the bursts in each round: random in the first, then each round begins one later.

    With as many rounds as names, every name has every place once. The clock swings with a period of
    a few bursts, in phase with the beginning of the load: the mean of a name's bursts is of all.
    """
    order = rng.sample(names, len(names))
    return [order[r % len(order) :] + order[: r % len(order)] for r in range(rounds)]


def sustained(
    machine: Machine,
    gpu: Gpu,
    subjects: Mapping[str, Subject],
    measuring: Measuring,
    rng: random.Random,
    distinct: int,
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """All bursts of one process on one problem.

    `distinct`: how many sets of inputs there are. Returns the samples, and of each subject the
    output of the last burst, whose memory was poisoned before it, with its inputs' number.
    """
    names = list(subjects)
    plan = shuffled(names, 3, rng)
    first = insist(lambda: take(machine, gpu, subjects, plan, measuring.gap_us, 0))
    usual = {n: statistics.median(row.launches[n].gpu_us for row in first) for n in names}
    kinds = {n: one_kind(n, [row.launches[n].kernels for row in first]) for n in names}
    kernels = {n: sum(kinds[n].values()) for n in names}
    repeaters = {n: Repeater(machine, subjects[n], usual[n], distinct) for n in names}
    samples = {n: Samples(kernels=kinds[n]) for n in names}
    rounds = rotated(rng, names, measuring.sustained_bursts)
    lost = Counter[str]()
    for session in range(SESSIONS):
        try:
            found = burst_session(machine, gpu, repeaters, rounds, usual, kernels, measuring)
            break
        except ActivityError as error:
            if session == SESSIONS - 1:
                raise
            for name in error.subjects if isinstance(error, LostKernels) else ():
                lost[name] += 1
                if lost[name] == 2:
                    repeaters[name].go_eager()
    for place, (n, burst, counted) in enumerate(found):
        if by_name(a.name for a in counted[: kernels[n]]) != kinds[n]:
            raise Unsteady(n, "it launched other kernels in a burst than in single calls")
        _add(samples[n], machine, burst, repeaters[n].calls, counted)
        samples[n].place.append(place)
    for n, sample in samples.items():
        sample.launch = repeaters[n].launch
        if None in sample.energy_mj:
            sample.energy_note = (
                "NVML gives no energy counter here"
                if gpu.energy_mj() is None
                else "the energy counter changed less than twice in a burst; raise"
                " measuring.sustained_ms"
            )
    return samples, {n: (repeaters[n].calls - 1, repeaters[n].result) for n in names}


def _add(
    sample: Samples, machine: Machine, burst: Burst, calls: int, counted: tuple[Activity, ...]
) -> None:
    """Put a burst into the samples, per call."""
    number = burst.replays * calls
    elapsed_us = machine.elapsed_us(burst.start, burst.end) / number
    power_w = edge_power_w(burst.energies)
    sample.gpu_us.append(round(sum(a.duration_ns for a in counted) / 1000 / number, 3))
    sample.event_us.append(round(elapsed_us, 3))
    sample.calls.append(number)
    sample.clock_mhz.append(round(statistics.fmean(burst.clocks), 1) if burst.clocks else None)
    sample.power_w.append(round(statistics.fmean(burst.powers), 2) if burst.powers else None)
    sample.energy_mj.append(None if power_w is None else round(power_w * elapsed_us / 1000, 4))
