"""GPU time of a call, free of host time.

Several processes one after another; in each, rounds in which every subject is called once, in
random order, on inputs at fresh addresses with a cold L2, behind a spin that gives the host time to
enqueue. Primary is the sum over the call's kernels, memsets and memcpys from activity records;
CUDA events around the call are the cross-check. One subject is measured twice under two names (the
A/A pair): how far the two differ is the noise that no difference between subjects may be below.

`spaced` measures single calls after a stated gap. `sustained` measures bursts of calls back to
back, replayed from a CUDA graph where the subject can be captured, with clock, power and energy.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_ladder.stage import kernel_hash
from attn_profiling.bursts import sustained
from attn_profiling.check import Oracle, explain, gate, poisons_process, sampled_heads
from attn_profiling.compile_cache import forget_hashes
from attn_profiling.device import Gpu, open_gpu
from attn_profiling.guard import Guard, poison_recycled
from attn_profiling.inputs import Rotation, bound
from attn_profiling.launches import (
    MeasureError,
    Subject,
    Unsteady,
    choose,
    disagreement,
    spaced,
)
from attn_profiling.machine import Machine
from attn_profiling.partial import Partial
from attn_profiling.record import (
    Record,
    content_key,
    problem_fields,
    problem_of,
    read,
    write,
)
from attn_profiling.session import Session, closed_header, timed_beside
from attn_profiling.settings import Measuring, Settings
from attn_profiling.workers import Reporter, Worker, WorkerDied

REGIMES = ("spaced", "sustained")
AA_PREFERRED = ("fa3", "cudnn")
SILENCE_S = 300.0


Choices = dict[str, dict[str, Any] | None]


@dataclass
class Entry:
    """A problem on its way into the record."""

    problem: Problem
    subjects: list[str]
    chosen: Choices
    left_out: dict[str, str]
    tried: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)


def with_twin(subjects: list[str]) -> tuple[list[str], str | None]:
    """The subjects with the A/A twin of one of them added, and which one that is."""
    for name in (*AA_PREFERRED, *subjects):
        if name in subjects:
            return [*subjects, f"{name}#2"], name
    return subjects, None


def verify_outputs(
    torch: Any, problem: Problem, rotation: Rotation, outputs: Mapping[str, Any], seed: int
) -> dict[str, str]:
    """{subject: what is wrong with the output of its timed call}, judged like the gate does."""
    wrong: dict[str, str] = {}
    oracles: dict[int, Oracle] = {}
    heads = sampled_heads(problem, seed)
    if heads is not None:
        heads = heads[:1] + heads[-2:]
    for name, (index, result) in outputs.items():
        if index % rotation.count not in oracles:
            oracles[index % rotation.count] = Oracle(torch, problem, rotation[index], heads)
        verdict = oracles[index % rotation.count].judge(*result)
        if verdict.message is not None:
            wrong[name] = f"its output in a timed call is wrong: {verdict.message}"
    return wrong


def measure_problem(
    torch: Any,
    machine: Machine,
    gpu: Gpu,
    guard: Guard,
    problem: Problem,
    modules: Mapping[str, Any],
    chosen: Mapping[str, dict[str, Any] | None],
    regime: str,
    measuring: Measuring,
    seed: int,
    device: str = "cuda",
) -> dict[str, Any]:
    """Everything one process measures of one problem, as it stands in a partial file.

    `modules`: those of the subjects that may be measured. A subject that misbehaves is left out,
    with the reason, and the others are measured without it.
    """
    rng = random.Random(f"{seed} {problem.id}")
    rotation = Rotation(
        torch, problem, measuring.warmup_rounds + measuring.rounds, rng.getrandbits(31), device
    )
    left_out: dict[str, str] = {}
    kept: dict[str, dict[str, Any] | None] = {}
    tried: dict[str, list[dict[str, Any]]] = {}
    causal = problem.causal

    def maker(name: str) -> Callable[[dict[str, Any] | None], Subject]:
        return lambda config: bound(modules[name].forward, rotation, causal, config)

    calls: dict[str, Subject] = {}
    for name, module in modules.items():
        forget_hashes()
        try:
            candidates = getattr(module, "candidates", None)
            if name in chosen:
                kept[name] = chosen[name]
            elif candidates is not None:
                kept[name], tried[name] = choose(
                    machine, gpu, maker(name), candidates(problem), measuring, rng
                )
            else:
                kept[name] = None
            call = maker(name)(kept[name])
            for i in range(2):
                call(i)
            machine.synchronize()
            calls[name] = call
        except Exception as error:
            if poisons_process(error):
                raise
            left_out[name] = f"error: {explain(error)}"
    guard.verify()

    def poison() -> None:
        q = rotation[0][0]
        lse = torch.empty(problem.batch, problem.nheads, problem.seqlen_q, device=q.device)
        poison_recycled(torch, [q, lse], copies=len(calls) + 3)

    while True:
        names, twin_of = with_twin(list(calls))
        if not names:
            raise MeasureError(f"problem {problem.id}: no subject is left to measure: {left_out}")
        table = {name: calls[name.split("#")[0]] for name in names}
        try:
            if regime == "spaced":
                samples, outputs = spaced(machine, gpu, table, measuring, rng, poison)
            else:
                samples, outputs = sustained(machine, gpu, table, measuring, rng, rotation.count)
        except Unsteady as error:
            name = error.subject.split("#")[0]
            left_out[name] = f"failed: {error}"
            del calls[name]
            continue
        guard.verify()
        wrong = verify_outputs(torch, problem, rotation, outputs, seed)
        del outputs
        for name, message in wrong.items():
            left_out[name.split("#")[0]] = f"failed: {message}"
        if twin_of in left_out:
            calls = {name: call for name, call in calls.items() if name not in left_out}
            continue
        break
    samples = {n: s for n, s in samples.items() if n.split("#")[0] not in left_out}
    messages = [disagreement(regime, name, s) for name, s in samples.items()]
    return {
        "problem": problem.id,
        "aa_subject": twin_of,
        "samples": {name: vars(s) for name, s in samples.items()},
        "message": "; ".join(m for m in messages if m) or None,
        "chosen": kept,
        "tried": tried,
        "left_out": left_out,
    }


def work(subjects: list[str]) -> None:
    """The worker: imports first, measures when the request comes."""
    reporter = Reporter()
    import torch

    guard = Guard(torch)
    from attn_ladder.stage import load

    modules, broken = {}, {}
    for name in subjects:
        try:
            modules[name] = load(name)
        except Exception as error:
            broken[name] = explain(error)
    request = reporter.request()
    measuring = Measuring(**request["measuring"])
    gpu = open_gpu()
    guard.verify()
    machine = Machine(torch, measuring.flush_l2_factor)
    machine.calibrate()
    for entry in request["problems"]:
        problem = problem_of(entry["problem"])
        reporter.send(begin=problem.id)
        needed = entry["subjects"]
        missing = [name for name in needed if name in broken]
        if missing:
            raise MeasureError(f"{missing[0]} cannot be imported: {broken[missing[0]]}")
        with torch.inference_mode():
            result = measure_problem(
                torch,
                machine,
                gpu,
                guard,
                problem,
                {name: modules[name] for name in needed},
                entry["chosen"],
                request["regime"],
                measuring,
                request["seed"],
            )
        torch.cuda.empty_cache()
        reporter.send(result=result)


def aa_ratio(results: list[dict[str, Any]]) -> float | None:
    """Median over the processes' rounds of twin / original, paired by round; of bursts, over the
    processes, as their times are compared (see `stats.burst_means`)."""
    ratios = []
    for result in results:
        name = result["aa_subject"]
        if name is None or name not in result["samples"]:
            return None
        pair = [result["samples"][n]["gpu_us"] for n in (f"{name}#2", name)]
        if result["samples"][name]["launch"] is not None:  # bursts
            pair = [[statistics.fmean(times)] for times in pair]
        ratios += [twin / original for twin, original in zip(*pair, strict=True)]
    return statistics.median(ratios) if ratios else None


_OPTIONAL = ("energy_mj", "spin_clock_mhz", "calls", "place")


def merge(attempt: int, results: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """One attempt of a record from what its processes measured.

    A subject stays only if every process measured it.
    """
    names = [n for n in results[0]["samples"] if all(n in r["samples"] for r in results)]
    samples: dict[str, Any] = {}
    for name in names:
        rows = [result["samples"][name] for result in results]
        merged: dict[str, Any] = {
            key: [row[key] for row in rows]
            for key in ("gpu_us", "event_us", "clock_mhz", "power_w", *_OPTIONAL)
            if key not in _OPTIONAL or any(row.get(key) for row in rows)
        }
        merged["retaken"] = [row["retaken"] for row in rows]
        merged["kernels"] = rows[0]["kernels"]
        if rows[0]["launch"] is not None:
            merged["launch"] = [row["launch"] for row in rows]
            merged["energy_note"] = next(
                (row["energy_note"] for row in rows if row["energy_note"]), None
            )
        samples[name] = merged
    ratio = aa_ratio(results)
    twin_of = results[0]["aa_subject"]
    messages = [r["message"] for r in results if r["message"]]
    for name in names:
        if any(r["samples"][name]["kernels"] != samples[name]["kernels"] for r in results):
            messages.append(f"{name} launched different kernels in different processes")
    if ratio is None:
        messages.append("no A/A pair was measured in every process")
    elif abs(ratio - 1) > tolerance:
        messages.append(f"the A/A pair differs by {abs(ratio - 1):.2%}, more than {tolerance:.2%}")
    return {
        "attempt": attempt,
        "aa_subject": None if twin_of is None else f"{twin_of}#2",
        "aa_ratio": None if ratio is None else round(ratio, 5),
        "ok": not messages,
        "message": "; ".join(messages) or None,
        "samples": samples,
    }


def spaced_rows(run_dir: Path, suite: str) -> list[dict[str, Any]]:
    """The problems of this run's spaced timings, those of the suite itself last."""
    paths = sorted((run_dir / "timing").glob("*.spaced.json"))
    paths.sort(key=lambda path: path.name == f"{suite}.spaced.json")
    return [row for path in paths for row in read(path, "timing")["problems"]]


def known_choices(run_dir: Path, suite: str) -> dict[str, Choices]:
    """{problem id: configurations chosen when it was timed spaced, earlier in this run}."""
    known: dict[str, Choices] = {}
    for row in spaced_rows(run_dir, suite):
        known.setdefault(row["problem"]["id"], {}).update(row["chosen"])
    return known


@dataclass
class Plan:
    """What a suite takes: its problems, and results that wait for the rest of the suite."""

    problems: list[Problem]
    fields: dict[str, dict[str, Any]]
    entries: dict[str, Entry]
    store: Partial

    def rows(self) -> list[dict[str, Any]]:
        """The problems of the record."""
        return [
            {
                "problem": self.fields[p.id],
                "status": "ok" if self.entries[p.id].attempts[-1]["ok"] else "inconclusive",
                "chosen": self.entries[p.id].chosen,
                "tried": self.entries[p.id].tried,
                "left_out": self.entries[p.id].left_out,
                "attempts": self.entries[p.id].attempts,
            }
            for p in self.problems
        ]


def plan_of(
    settings: Settings,
    suite: str,
    regime: str,
    out: Path,
    content: dict[str, Any],
    hashes: Mapping[str, str],
) -> Plan:
    """Who is timed on what, by the checks of this run; `hashes` are the subjects' kernel hashes."""
    if regime not in REGIMES:
        raise ValueError(f"{regime=} must be one of {', '.join(REGIMES)}")
    problems = settings.suite(suite)
    allowed = gate(settings.run_dir, problems, list(hashes))
    fields = {p.id: problem_fields(p) for p in problems}
    known = known_choices(settings.run_dir, suite) if regime == "sustained" else {}
    entries = {
        p.id: Entry(
            problem=p,
            subjects=[n for n, reason in allowed[p.id].items() if reason is None],
            chosen=known.get(p.id, {}),
            left_out={n: reason for n, reason in allowed[p.id].items() if reason is not None},
        )
        for p in problems
    }
    for name, entry in entries.items():
        if not entry.subjects:
            raise MeasureError(
                f"problem {name}: no subject passed the check, so there is nothing to time:"
                f" {entry.left_out}"
            )
    store = Partial(
        out.parent / ".partial" / f"{suite}.{regime}",
        lambda p: content_key(
            content,
            fields[p.id],
            {**hashes, "regime": regime, "with": ",".join(entries[p.id].subjects)},
        ),
    )
    return Plan(problems, fields, entries, store)


def run(settings: Settings, suite: str, regime: str, out: Path) -> Record:
    """Time a suite in a regime and write the record. Goes on where an earlier try was stopped."""
    from attn_profiling.progress import console, progress

    measuring = settings.measuring
    session = Session(settings, settings.subjects_of(suite, regime))
    hashes = {name: found["kernel_hash"] for name, found in session.subjects.items()}
    planned = plan_of(settings, suite, regime, out, session.content, hashes)
    problems, plan, store = planned.problems, planned.entries, planned.store
    log = out.parent / ".partial" / f"{suite}.{regime}.log"
    everyone = sorted({n for entry in plan.values() for n in entry.subjects})
    pending = problems
    for attempt in range(1, measuring.max_attempts + 1):
        results: dict[str, list[dict[str, Any]]] = {p.id: [] for p in pending}
        title = f"time {suite} {regime}" + (f", attempt {attempt}" if attempt > 1 else "")
        with (
            progress(title, len(pending) * measuring.processes) as tell,
            ExitStack() as workers,
        ):

            def start() -> Worker:
                worker = Worker("time", [",".join(everyone)], log, session.environment)  # noqa: B023
                workers.callback(worker.close)  # noqa: B023
                return worker

            ready: Worker | None = None
            for process in range(measuring.processes):
                todo = []
                for p in pending:
                    found = store.get(attempt, process, p)
                    if found is None:
                        todo.append(p)
                    else:
                        _note(plan[p.id], found)
                        results[p.id].append(found)
                        tell(p.id)
                if not todo:
                    continue
                worker = ready or start()
                ready = start() if process + 1 < measuring.processes else None
                _measure(
                    worker, todo, planned, regime, settings, attempt, process, results, tell
                )  # fmt: skip
        for p in pending:
            plan[p.id].attempts.append(merge(attempt, results[p.id], measuring.aa_tolerance))
        pending = [p for p in pending if not plan[p.id].attempts[-1]["ok"]]
        for p in pending:
            message = plan[p.id].attempts[-1]["message"]
            console.print(f"{p.id}, attempt {attempt}: {message}", highlight=False, soft_wrap=True)
        if not pending:
            break
    data = {**session.header("timing", suite), "regime": regime, "problems": planned.rows()}
    write(out, data, "timing")
    store.clear()
    return data


def close(settings: Settings, suite: str, regime: str, out: Path) -> Record:
    """Write the record of a suite that was interrupted for good, without a GPU.

    What counts of a problem are the attempts that every process made; of the rest see
    `closed_header`. Raises `MeasureError` if a problem has none, or if kernels or configuration are
    no longer those of the run.
    """
    beside = timed_beside(settings.run_dir, suite)
    names = settings.subjects_of(suite, regime)
    missing = [name for name in names if name not in beside[1]["subjects"]]
    if missing:
        raise MeasureError(f"{suite}: {missing[0]} was not timed in this run; measure the suite")
    hashes = {name: kernel_hash(name) for name in names}
    planned = plan_of(settings, suite, regime, out, beside[1]["content"], hashes)
    measuring = settings.measuring
    for p in planned.problems:
        entry = planned.entries[p.id]
        for attempt in range(1, measuring.max_attempts + 1):
            stored = [planned.store.get(attempt, n, p) for n in range(measuring.processes)]
            results = [result for result in stored if result is not None]
            if len(results) < measuring.processes:
                break
            for result in results:
                _note(entry, result)
            entry.attempts.append(merge(attempt, results, measuring.aa_tolerance))
        if not entry.attempts:
            raise MeasureError(
                f"{p.id}: not every process has timed it {regime} with the kernels that are here;"
                " go on measuring with the same run, or check out its commit"
            )
    header = closed_header("timing", beside, names, planned.store.files())
    data = {**header, "regime": regime, "problems": planned.rows()}
    write(out, data, "timing")
    return data


def _note(entry: Entry, result: dict[str, Any]) -> None:
    """Carry what the first process chose, and what any process left out, to the others."""
    entry.chosen = {**result["chosen"], **entry.chosen}
    entry.tried = {**result["tried"], **entry.tried}
    for name, reason in result["left_out"].items():
        entry.left_out.setdefault(name, reason)


def _measure(
    worker: Worker,
    todo: list[Problem],
    planned: Plan,
    regime: str,
    settings: Settings,
    attempt: int,
    process: int,
    results: dict[str, list[dict[str, Any]]],
    tell: Callable[[str], None],
) -> None:
    """Let one worker measure; each result is kept at once."""
    by_id = {p.id: p for p in todo}
    plan = planned.entries
    current = todo[0].id
    worker.begin(
        {
            "regime": regime,
            "measuring": settings.measuring_fields,
            "seed": settings.measuring.seed + 1000 * attempt + process,
            "problems": [
                {
                    "problem": planned.fields[p.id],
                    "subjects": [n for n in plan[p.id].subjects if n not in plan[p.id].left_out],
                    "chosen": plan[p.id].chosen,
                }
                for p in todo
            ],
        }
    )
    try:
        for message in worker.messages(SILENCE_S):
            if "begin" in message:
                current = message["begin"]
                continue
            result = message["result"]
            _note(plan[current], result)
            results[current].append(result)
            planned.store.put(attempt, process, by_id[current], result)
            tell(current)
    except WorkerDied as error:
        raise MeasureError(
            f"problem {current}, process {process + 1}: {error}\nWhat was measured before it is"
            " kept; the same command goes on from there"
        ) from None
    finally:
        worker.close()
