"""What a call costs the host, and how long one call takes from start to finish.

The top stage is called as its users call it, through `attn_ladder.attention`; a peer whose backend
is selected by a context (`session` of its module) is called inside that context.

Per subject and process: host time of unsynchronised calls, on the same inputs and on inputs at
fresh addresses; latency of a call followed by a synchronisation; latency of the same call replayed
from a CUDA graph. None of these is GPU time: `timing` measures that.

And the wall time of its first call on each problem, with the wait for it. A process measures the
problems in the order of the table, so in the suite `gate` its first is gate-b1: there a compiled
kernel is loaded; imports, the CUDA context, the inputs and what the subjects before it brought
(Triton's driver) are already there. On the later ones it tells whether anything is compiled again
for another batch.

A problem whose A/A pair is off, as a disturbed process leaves it, is measured again in new
processes, at most `measuring.max_attempts` times in all; every attempt is kept.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_ladder.stage import kernel_hash
from attn_profiling import host_pairs
from attn_profiling.check import explain, gate, poisons_process
from attn_profiling.compile_cache import forget_hashes
from attn_profiling.guard import Guard
from attn_profiling.inputs import Rotation, bound
from attn_profiling.launches import MeasureError
from attn_profiling.machine import Machine
from attn_profiling.partial import Partial
from attn_profiling.record import (
    Record,
    content_key,
    problem_fields,
    problem_of,
    write,
)
from attn_profiling.session import Session, closed_header, timed_beside
from attn_profiling.settings import Measuring, Settings
from attn_profiling.sources import ENTRIES, entry_hash
from attn_profiling.timing import Choices, known_choices, with_twin
from attn_profiling.workers import Reporter, Worker, WorkerDied

WARM_CALLS = 20
FEWEST_CALLS = 50
BUDGET_US = 60_000.0  # GPU time of one kind of sample, beyond which fewer calls are made
PORTION = 100
SILENCE_S = 180.0
PORTIONS = 5  # the subjects take turns in so many rounds
KINDS = ("eager_host_us", "fresh_pointer_host_us", "eager_latency_us")
GRAPH_KINDS = ("graph_latency_us", "graph_gpu_us")


def clocked(call: Callable[[int], Any], count: int, after: Callable[[], None]) -> list[float]:
    """Microseconds of each of `count` calls; `after` belongs to what is timed."""
    now = time.perf_counter_ns
    times = []
    for i in range(count):
        start = now()
        call(i)
        after()
        times.append(now() - start)
    return [round(t / 1000, 2) for t in times]


def unsynchronised(machine: Machine, call: Callable[[int], Any], count: int) -> list[float]:
    """Host time of calls that nobody waits for, in portions that do not fill the launch queue."""
    times: list[float] = []
    while len(times) < count:
        done = len(times)
        times += clocked(
            lambda i, done=done: call(done + i),  # type: ignore[misc]
            min(PORTION, count - done),
            lambda: None,
        )
        machine.synchronize()
    return times


class HostCost:
    """Host samples of one subject on one problem, taken in portions that alternate with others'.

    `graph_gpu_us` is the GPU time of a graph replay between two events, at the pace, the addresses
    and the cache state of the latencies: what a latency holds beyond it is not GPU time.
    """

    def __init__(
        self,
        machine: Machine,
        call: Callable[[int], Any],
        count: int,
        session: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._machine, self._call, self._session = machine, call, session
        with session():
            self._warm(count)

    def _warm(self, count: int) -> None:
        """Find how many calls fit the budget, and capture one."""
        machine, call = self._machine, self._call
        machine.synchronize()  # the inputs are no part of the first call
        warm = clocked(lambda i: call(i % 2), WARM_CALLS, machine.synchronize)
        self._first_call_ms = round(warm[0] / 1000, 3)
        self.count = min(count, max(FEWEST_CALLS, int(BUDGET_US / statistics.median(warm))))
        self.samples: dict[str, Any] = {kind: [] for kind in KINDS}
        self._replay: Callable[[], None] | None = None
        self._note: str | None = None
        try:
            self._replay, _ = machine.capture([lambda: call(0)])
        except Exception as error:
            if poisons_process(error):
                machine.synchronize()
            self._note = explain(error)
            return
        self.samples |= {kind: [] for kind in GRAPH_KINDS}
        clocked(lambda i: self._replay(), WARM_CALLS, machine.synchronize)  # type: ignore[misc]

    def take(self, first: int, count: int) -> None:
        """`count` samples of each kind, at inputs from number `first` on."""
        with self._session():
            self._take(first, count)

    def _take(self, first: int, count: int) -> None:
        machine, call, replay = self._machine, self._call, self._replay
        gc.collect()  # quick, as the worker has frozen what its imports brought
        gc.disable()
        try:
            found = {
                "eager_host_us": unsynchronised(machine, lambda i: call(0), count),
                "fresh_pointer_host_us": unsynchronised(
                    machine, lambda i: call(2 + first + i), count
                ),
                "eager_latency_us": clocked(lambda i: call(0), count, machine.synchronize),
            }
            if replay is not None:
                found["graph_latency_us"] = clocked(lambda i: replay(), count, machine.synchronize)
                found["graph_gpu_us"] = [self._replay_us(replay) for _ in range(count)]
        finally:
            gc.enable()
        for kind, times in found.items():
            self.samples[kind] += times

    def _replay_us(self, replay: Callable[[], None]) -> float:
        machine = self._machine
        start = machine.event()
        replay()
        end = machine.event()
        machine.synchronize()
        return round(machine.elapsed_us(start, end), 2)

    def result(self) -> dict[str, Any]:
        """The samples by kind; those of a graph are None where the call cannot be captured."""
        graphs = {kind: self.samples.get(kind) for kind in GRAPH_KINDS}
        return {
            "first_call_ms": self._first_call_ms,
            **self.samples,
            **graphs,
            "graph_note": self._note,
        }


def portions(count: int) -> list[tuple[int, int]]:
    """`count` samples in at most PORTIONS parts: (number of the first, how many)."""
    edges = [count * i // PORTIONS for i in range(PORTIONS + 1)]
    return [(a, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]


def entry_of(module: Any) -> Callable[..., Any]:
    """What a user calls: a subject's `forward`, or the public function that runs the top stage."""
    forward: Callable[..., Any] = module.forward
    if getattr(module, "__name__", None) == "attn_ladder.stage5_everything":
        from attn_ladder import attention

        def forward(q: Any, k: Any, v: Any, *, causal: bool, config: None = None) -> Any:
            return attention(q, k, v, causal=causal)

    return forward


def work(subjects: list[str]) -> None:
    """The worker: all problems of a suite, all their subjects, in random order."""
    reporter = Reporter()
    import torch

    guard = Guard(torch)
    from attn_ladder.stage import load

    modules = {name: load(name) for name in subjects}
    request = reporter.request()
    measuring = Measuring(**request["measuring"])
    guard.verify()
    machine = Machine(torch, measuring.flush_l2_factor)
    gc.collect()
    gc.freeze()
    for entry in request["problems"]:
        problem = problem_of(entry["problem"])
        reporter.send(begin=problem.id)
        rng = random.Random(f"{request['seed']} {problem.id}")
        count = measuring.host_calls
        rotation = Rotation(torch, problem, count + 2, rng.getrandbits(31), "cuda")
        names, _ = with_twin(entry["subjects"])
        with torch.inference_mode():
            costs = {}
            for name in names:
                original = name.split("#")[0]
                config = entry["chosen"].get(original)
                call = bound(entry_of(modules[original]), rotation, problem.causal, config)
                forget_hashes()
                session = getattr(modules[original], "session", nullcontext)
                costs[name] = HostCost(machine, call, count, session)
            gc.collect()
            gc.freeze()  # what the first calls imported and compiled
            rounds = [
                (name, *portion)
                for i in range(PORTIONS)
                for name in rng.sample(names, len(names))
                for portion in portions(costs[name].count)[i : i + 1]
            ]
            for name, first, calls in rounds:
                costs[name].take(first, calls)
                guard.verify()
        samples = {name: costs[name].result() for name in names}
        torch.cuda.empty_cache()
        reporter.send(result={"problem": problem.id, "samples": samples})


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples of a problem, a list per process; of the first call one number per process, where
    all of them have it (results that an older version kept do not)."""
    merged: dict[str, Any] = {}
    for name in results[0]["samples"]:
        rows = [result["samples"][name] for result in results]
        graphs = {kind: [row[kind] for row in rows] for kind in GRAPH_KINDS}
        merged[name] = {
            **{kind: [row[kind] for row in rows] for kind in KINDS},
            **{kind: None if None in taken else taken for kind, taken in graphs.items()},
            "graph_note": next((row["graph_note"] for row in rows if row["graph_note"]), None),
        }
        first_calls = [row.get("first_call_ms") for row in rows]
        if None not in first_calls and "#" not in name:  # a twin's is no first call
            merged[name]["first_call_ms"] = first_calls
    return merged


def with_first_calls(again: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The samples of a later attempt with the first calls of the first one: those of its own were
    made in processes that had not measured the problems before."""
    mixed = {}
    for name, samples in again.items():
        mixed[name] = {kind: times for kind, times in samples.items() if kind != "first_call_ms"}
        if "first_call_ms" in first.get(name, {}):
            mixed[name]["first_call_ms"] = first[name]["first_call_ms"]
    return mixed


@dataclass(frozen=True)
class Plan:
    """What is measured in a suite, and where the results of single processes are kept."""

    problems: list[Problem]
    fields: dict[str, dict[str, Any]]
    allowed: dict[str, dict[str, str | None]]
    chosen: dict[str, Choices]
    store: Partial

    def runnable(self, problem: Problem) -> list[str]:
        """The subjects that passed their check."""
        return [name for name, why in self.allowed[problem.id].items() if why is None]

    def row(self, problem: Problem, attempts: list[dict[str, Any]]) -> dict[str, Any]:
        """A problem as it stands in the record, from the merged samples of its attempts: those of
        the last one count."""
        reasons = self.allowed[problem.id].items()
        taken = attempts[:1] + [with_first_calls(each, attempts[0]) for each in attempts[1:]]
        row = {
            "problem": self.fields[problem.id],
            "samples": taken[-1] if taken else {},
            "left_out": {name: why for name, why in reasons if why is not None},
        }
        return {**row, "earlier": taken[:-1]} if len(taken) > 1 else row


def plan(settings: Settings, suite: str, content: Record, hashes: Mapping[str, str]) -> Plan:
    """What to measure in a suite on what `content` describes, with kernels of these hashes."""
    problems = settings.suite(suite)
    allowed = gate(settings.run_dir, problems, settings.subjects_of(suite, "host"))
    fields = {p.id: problem_fields(p) for p in problems}
    known = known_choices(settings.run_dir, suite)
    chosen = {p.id: known.get(p.id, {}) for p in problems}
    entries = {f"{name} entry": str(entry_hash(name)) for name in hashes if name in ENTRIES}

    def key(p: Problem) -> str:
        passed = ",".join(name for name, why in allowed[p.id].items() if why is None)
        mixed = {**hashes, **entries, "with": passed, "chosen": repr(chosen[p.id])}
        return content_key(content, fields[p.id], mixed)

    return Plan(
        problems=problems,
        fields=fields,
        allowed=allowed,
        chosen=chosen,
        store=Partial(settings.run_dir / "host" / ".partial" / suite, key),
    )


def record_of(header: Record, rows: list[dict[str, Any]]) -> Record:
    """The record of a suite: its header, which also tells the entry that users call, and rows."""
    subjects = {
        name: {**entry, "entry_hash": entry_hash(name)} if name in ENTRIES else entry
        for name, entry in header["subjects"].items()
    }
    return {**header, "subjects": subjects, "problems": rows}


def run(settings: Settings, suite: str, out: Path) -> Record:
    """Measure a suite and write the record. Goes on where an earlier try was stopped."""
    from attn_profiling.progress import console

    session = Session(settings, settings.subjects_of(suite, "host"))
    hashes = {name: entry["kernel_hash"] for name, entry in session.subjects.items()}
    planned = plan(settings, suite, session.content, hashes)
    taken: dict[str, list[dict[str, Any]]] = {p.id: [] for p in planned.problems}
    pending = planned.problems
    log = out.parent / ".partial" / f"{suite}.log"
    for attempt in range(1, settings.measuring.max_attempts + 1):
        title = f"host {suite}" + (f", attempt {attempt}" if attempt > 1 else "")
        results = _attempt(title, attempt, pending, planned, settings, session.environment, log)
        for p in pending:
            taken[p.id].append(merge(results[p.id]))
        off = {p.id: host_pairs.off(taken[p.id][-1]) for p in pending}
        pending = [p for p in pending if off[p.id]]
        for p in pending:
            told = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in off[p.id].items())
            console.print(
                f"{p.id}, attempt {attempt}: the A/A pair is off: {told}",
                highlight=False,
                soft_wrap=True,
            )
        if not pending:
            break
    rows = [planned.row(p, taken[p.id]) for p in planned.problems]
    data = record_of(session.header("host", suite), rows)
    write(out, data, "host")
    planned.store.clear()
    return data


def _attempt(
    title: str,
    attempt: int,
    problems: list[Problem],
    planned: Plan,
    settings: Settings,
    environment: Mapping[str, str],
    log: Path,
) -> dict[str, list[dict[str, Any]]]:
    """What every process measured of the problems, in new workers; each result is kept at once."""
    from attn_profiling.progress import progress

    measuring, store = settings.measuring, planned.store
    results: dict[str, list[dict[str, Any]]] = {p.id: [] for p in problems}
    with progress(title, len(problems) * measuring.processes) as tell, ExitStack() as workers:
        begun: list[tuple[int, list[Problem], Worker]] = []
        for process in range(measuring.processes):
            todo = []
            for p in problems:
                found = store.get(attempt, process, p)
                if found is None:
                    todo.append(p)
                else:
                    results[p.id].append(found)
                    tell(p.id)
            if todo:
                everyone = sorted({name for p in todo for name in planned.runnable(p)})
                worker = Worker("host", [",".join(everyone)], log, environment)
                workers.callback(worker.close)
                begun.append((process, todo, worker))
        current = begun[0][1][0].id if begun else ""
        process = 0
        try:
            # all of them first: an import would disturb what another one measures
            for process, _, worker in begun:  # noqa: B007 (the error names it)
                worker.wait_ready(SILENCE_S)
            for process, todo, worker in begun:
                current = todo[0].id
                worker.begin(
                    {
                        "measuring": settings.measuring_fields,
                        "seed": measuring.seed + 1000 * (attempt - 1) + process,
                        "problems": [
                            {
                                "problem": planned.fields[p.id],
                                "subjects": planned.runnable(p),
                                "chosen": planned.chosen[p.id],
                            }
                            for p in todo
                        ],
                    }
                )
                for message in worker.messages(SILENCE_S):
                    if "begin" in message:
                        current = message["begin"]
                        continue
                    result = message["result"]
                    results[current].append(result)
                    store.put(attempt, process, settings.problems[current], result)
                    tell(current)
        except WorkerDied as error:
            raise MeasureError(
                f"problem {current}, process {process + 1}: {error}\nWhat was measured before"
                " it is kept; the same command goes on from there"
            ) from None
    return results


def close(settings: Settings, suite: str, out: Path) -> Record:
    """Write the record of a suite that was interrupted for good, without a GPU.

    What counts of a problem are the attempts that every process made; one without any is left out,
    with the reason. Of the rest see `closed_header`. Raises `MeasureError` if kernels or
    configuration are no longer those of the run, or no problem is whole.
    """
    beside = timed_beside(settings.run_dir, suite)
    sibling = beside[1]
    names = settings.subjects_of(suite, "host")
    missing = [name for name in names if name not in sibling["subjects"]]
    if missing:
        raise MeasureError(f"{suite}: {missing[0]} was not timed in this run; measure the suite")
    hashes = {name: kernel_hash(name) for name in names}
    planned = plan(settings, suite, sibling["content"], hashes)
    processes = settings.measuring.processes
    rows, whole = [], 0
    for p in planned.problems:
        attempts, lacking = [], 0
        for attempt in range(1, settings.measuring.max_attempts + 1):
            stored = [planned.store.get(attempt, process, p) for process in range(processes)]
            results = [result for result in stored if result is not None]
            if len(results) < processes:
                lacking = len(results)
                break
            attempts.append(merge(results))
        row = planned.row(p, attempts)
        if attempts:
            whole += 1
        else:
            why = f"interrupted: {lacking} of {processes} processes measured it"
            row["left_out"] = {**dict.fromkeys(names, why), **row["left_out"]}
        rows.append(row)
    if not whole:
        raise MeasureError(
            f"{suite}: no problem was measured by every process with the kernels that are here;"
            " go on measuring with the same run, or check out its commit"
        )
    data = record_of(closed_header("host", beside, names, planned.store.files()), rows)
    write(out, data, "host")
    return data
