"""Timed calls in one process: rounds of single calls behind a spin.

What is primary and what is cross-check, and why, stands in `timing`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
NAME_LENGTH = 200

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
    place: list[int] = field(default_factory=list)
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
            raise Unsteady(
                left[0],
                "the queue ran dry before its calls however often they were taken again: the host"
                f" needs longer than gap_us={measuring.gap_us:g} to enqueue it; raise"
                " measuring.gap_us",
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
    """A subject that cannot be timed as it behaves: it is left out, with the reason."""

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
    return by_name(calls[0])


def by_name(kernels: Iterable[str]) -> dict[str, int]:
    """Launches by kernel name; template names are cut, as they run to thousands of letters."""
    return dict(Counter(name[:NAME_LENGTH] for name in kernels))


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
