"""From the raw files of one run to `metrics.csv`, `speedups.csv` and the provenance that every
table is stamped with.

Reads exactly one run; ratios never cross runs. The same raw files give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from attn_ladder import stage
from attn_ladder.problem import Problem, read_problems
from attn_profiling import addenda, host_pairs, metrics, ncu_rep, record, stats, tidy_serving
from attn_profiling.config import MODEL
from attn_profiling.host_pairs import HOST_PAIRS, HOST_TOLERANCE
from attn_profiling.stats import Interval

METRICS_COLUMNS = (
    "run",
    "device",
    "suite",
    "problem",
    "dtype",
    "subject",
    "regime",
    "metric",
    "unit",
    "statistic",
    "value",
)
SPEEDUPS_COLUMNS = (
    "run",
    "device",
    "suite",
    "problem",
    "dtype",
    "regime",
    "subject",
    "peer",
    "ratio",
    "ci_low",
    "ci_high",
    "n_processes",
    "n",
)

NO_REGIME = "-"
MEDIAN, MINIMUM, SHORTEST = "(median)", "(min)", "(min, seqlen <= 1024)"
"""Stand in the column `problem` for a reduction over the conclusive problems of a suite."""
BEST = "best"
"""Stands in the column `peer` for the fastest peer of each problem."""
REFERENCE_PEER = "fa3"
READERS = min(2, os.cpu_count() or 1)
"""Reports that are read side by side; each takes about 2 GB."""

Row = dict[str, Any]
Open = Callable[[bytes, str, Sequence[str]], list[metrics.Kernel]]

_SAMPLED = {
    "event_us": "us",
    "clock_mhz": "MHz",
    "spin_clock_mhz": "MHz",
    "power_w": "W",
    "energy_mj": "mJ",
}


@dataclass
class Tables:
    """What `tidy` writes: rows of both tables, and provenance with everything that was left out and
    why."""

    metrics: list[Row] = field(default_factory=list)
    speedups: list[Row] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def text(value: Any) -> str:
    """One cell: floats with nine significant digits, so that the same numbers give the same
    bytes."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        if not np.isfinite(value):
            raise ValueError(f"{value=} must be finite; a missing value is a missing row")
        return f"{value:.9g}"
    return str(value)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], sort: bool = True) -> str:
    """Comma-separated text of rows, sorted unless their order means something."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    cells = [[text(row[c]) for c in columns] for row in rows]
    writer.writerows(sorted(cells) if sort else cells)
    return out.getvalue()


def present(samples: Sequence[Sequence[float | None]] | None) -> list[list[float]]:
    """Samples without readings that the machine did not give; empty where it gave none to a
    process."""
    kept = [[value for value in process if value is not None] for process in samples or []]
    return kept if all(kept) else []


def base_name(subject: str) -> str:
    """The subject behind an A/A twin: `fa3#2` is `fa3`."""
    return subject.split("#")[0]


def zero_doses() -> dict[str, str]:
    """For each file of a control, the subject with its smallest dose: nothing is planted there."""
    smallest: dict[str, stage.Subject] = {}
    for name, found in stage.subjects().items():
        if found.dose is not None:
            file = name.rpartition(".")[0]
            smallest[file] = min(smallest.get(file, found), found, key=lambda s: s.dose or 0)
    return {file: found.name for file, found in smallest.items()}


def stage_before(subject: str) -> str:
    """The stage whose next one a subject is; empty for the first, and for what is no stage."""
    stages = [s for s, found in stage.subjects().items() if found.kind == "stage"]
    return dict(pairwise(stages[::-1])).get(subject, "")


def every_problem(problems: Mapping[str, Problem]) -> dict[str, dict[str, list[str]]]:
    """For each suite, and its causal and full part, the problems that a reduction over every one of
    them needs."""
    found: dict[str, dict[str, list[str]]] = {}
    for problem in problems.values():
        part = "causal" if problem.causal else "full"
        for suite in (name for s in problem.suites for name in (s, f"{s}/{part}")):
            of_suite = found.setdefault(suite, {MINIMUM: [], SHORTEST: []})
            of_suite[MINIMUM].append(problem.id)
            if is_short(problem):
                of_suite[SHORTEST].append(problem.id)
    return found


def is_short(problem: Problem) -> bool:
    """Whether a problem is one of those that `SHORTEST` reduces over."""
    return problem.seqlen_q <= 1024


def agree(pairs: Mapping[str, float], metric: str) -> bool:
    """Whether the A/A pairs of all host times that a metric is made of agree; `pairs` maps
    `aa_<kind>` to a ratio, and a pair that was not measured agrees with nothing."""
    return all(
        abs(pairs.get(f"aa_{kind}", np.inf) - 1) <= HOST_TOLERANCE for kind in HOST_PAIRS[metric]
    )


class Run:
    """The raw files of one run, each checked against its schema when it is read."""

    def __init__(self, raw: Path) -> None:
        self.raw = raw
        if not (raw / "device.json").is_file():
            raise FileNotFoundError(
                f"{raw}: no device.json; name a run's folder (runs/<id>, measurements/<device>)"
            )
        self.device = record.read(raw / "device.json", "device")
        self.addenda = [
            (run / "device.json", record.read(run / "device.json", "device"))
            for run in addenda.runs(raw)
        ]
        self.checks = self._all("check")
        late = [
            (path, record.read(path, "check"))
            for run in addenda.runs(raw)
            for path in sorted((run / "check").glob("*.json"))
        ]
        self.checked_again: list[tuple[Path, record.Record]] = []
        for path, data in late:
            held = path.name in {p.name for p, _ in self.checks}
            (self.checked_again if held else self.checks).append((path, data))
        self.timings = self._all("timing")
        self.hosts = self._all("host")
        self.profiles = self._all("ncu")
        served = addenda.files(raw, "serving")
        self.models = [(p, record.read(p, "model")) for p in served if p.name == "model.json"]
        self.decodes = [(p, record.read(p, "decode")) for p in served if p.name != "model.json"]
        machines = {path.parent: data for path, data in self.machines()}
        for path, data in (*self.records(), *self.checked_again):
            folder = path.parent if path.name == "device.json" else path.parent.parent
            if data["run"] != machines[folder]["run"]:
                raise ValueError(
                    f"{path}: belongs to run {data['run']!r}, device.json to"
                    f" {machines[folder]['run']!r}; a folder holds one run, ratios never cross runs"
                )
        self._run_of = {(data["suite"], data["regime"]): data["run"] for _, data in self.timings}
        self._run_of |= {(data["suite"], None): data["run"] for _, data in self.decodes}
        self._run_of |= {(data["suite"] or MODEL, None): data["run"] for _, data in self.models}

    def _all(self, kind: str) -> list[tuple[Path, dict[str, Any]]]:
        return [(path, record.read(path, kind)) for path in addenda.files(self.raw, kind)]

    def name_of(self, suite: str, regime: str) -> str:
        """The id of the run that a suite was timed or served in, or its counters read: this one's,
        or that of an addendum."""
        found = self._run_of.get((suite, regime)) or self._run_of.get((suite, None))
        return str(found or self.device["run"])

    def machines(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """What was measured on: this run and its addenda."""
        yield self.raw / "device.json", self.device
        yield from self.addenda

    def records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Everything that tables are made of."""
        yield from self.machines()
        for group in (self.checks, self.timings, self.hosts, self.profiles):
            yield from group
        for group in (self.decodes, self.models):
            yield from group


class Tidier:
    """Turns one run into tables. `open_report` reads Nsight Compute reports (replaced in tests)."""

    def __init__(
        self,
        run: Run,
        tier: str,
        problems: Mapping[str, Problem],
        open_report: Open = ncu_rep.open_apart,
    ) -> None:
        self.run, self.tier, self.known = run, tier, problems
        self.device = run.device["device"]
        self.open_report = open_report
        self.tables = Tables()
        self.stale: list[dict[str, Any]] = []
        self.excluded: list[dict[str, Any]] = []
        self.inconclusive: list[dict[str, Any]] = []
        self.chosen: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._stale_seen: dict[tuple[str, str], bool] = {}
        self.gpu_us: dict[tuple[str, str, str, str], tuple[Problem, stats.Replicates]] = {}

    # -- rows

    def metric(
        self,
        suite: str,
        problem: Problem,
        subject: str,
        regime: str,
        name: str,
        unit: str,
        run: str | None = None,
        **values: float,
    ) -> None:
        self.row(suite, problem.id, problem.dtype, subject, regime, name, unit, run, **values)

    def row(
        self,
        suite: str,
        problem: str,
        dtype: str,
        subject: str,
        regime: str,
        name: str,
        unit: str,
        run: str | None = None,
        **values: float,
    ) -> None:
        """A metric of what need not be a problem of the table; `run` is named where suite and
        regime do not tell it."""
        for statistic, value in values.items():
            self.tables.metrics.append(
                {
                    "run": run or self.run.name_of(suite, regime),
                    "device": self.device,
                    "suite": suite,
                    "problem": problem,
                    "dtype": dtype,
                    "subject": subject,
                    "regime": regime,
                    "metric": name,
                    "unit": unit,
                    "statistic": statistic,
                    "value": float(value),
                }
            )

    def interval(
        self,
        suite: str,
        problem: Problem,
        subject: str,
        regime: str,
        name: str,
        unit: str,
        found: Interval,
        run: str | None = None,
    ) -> None:
        self.metric(
            suite,
            problem,
            subject,
            regime,
            name,
            unit,
            run,
            median=found.value,
            ci_low=found.low,
            ci_high=found.high,
            n_processes=found.n_processes,
            n=found.n,
        )

    def speedup(
        self,
        suite: str,
        problem: str,
        dtype: str,
        regime: str,
        subject: str,
        peer: str,
        found: Interval,
    ) -> None:
        self.tables.speedups.append(
            {
                "run": self.run.name_of(suite, regime),
                "device": self.device,
                "suite": suite,
                "problem": problem,
                "dtype": dtype,
                "regime": regime,
                "subject": subject,
                "peer": peer,
                "ratio": found.value,
                "ci_low": found.low,
                "ci_high": found.high,
                "n_processes": found.n_processes,
                "n": found.n,
            }
        )

    # -- what is left out, and why

    def is_stale(self, path: Path, data: record.Record, subject: str) -> bool:
        """Whether a subject's results are left out; the reason goes into the provenance once a
        file."""
        return self._is_stale(path, data, subject, lambda: record.stale(data, subject))

    def is_stale_problem(self, path: Path, data: record.Record, raw: Mapping[str, Any]) -> bool:
        """Whether a problem's results are left out, since the table of problems changed."""
        why = lambda: record.stale_problem(data, raw, self.known)
        return self._is_stale(path, data, raw["id"], why)

    def _is_stale(
        self, path: Path, data: record.Record, what: str, why: Callable[[], str | None]
    ) -> bool:
        key = (str(path), base_name(what))
        if key not in self._stale_seen:
            sentence = why()
            self._stale_seen[key] = bool(sentence)
            if sentence:
                self.stale.append(
                    {
                        "file": path.relative_to(self.run.raw).as_posix(),
                        "suite": data["suite"],
                        "what": base_name(what),
                        "commit": data["provenance"]["commit"],
                        "reason": sentence,
                    }
                )
        return self._stale_seen[key]

    def entries(
        self, path: Path, data: record.Record, key: str = "problems"
    ) -> Iterator[tuple[dict[str, Any], Problem]]:
        """The entries of a record whose problem still stands, with the reasons for subjects left
        out noted."""
        for entry in data[key]:
            if self.is_stale_problem(path, data, entry["problem"]):
                continue
            problem = record.problem_of(entry["problem"])
            for subject, reason in sorted((entry.get("left_out") or {}).items()):
                self.left_out(data, problem, subject, "left out", reason)
            yield entry, problem

    def left_out(
        self,
        data: record.Record,
        problem: Problem | str,
        subject: str,
        status: str,
        reason: str | None,
    ) -> None:
        kind = data["schema"].split("/")[1]
        self.excluded.append(
            {
                "kind": kind,
                "suite": data["suite"] or kind,
                "regime": data.get("regime"),
                "problem": problem if isinstance(problem, str) else problem.id,
                "subject": subject,
                "status": status,
                "reason": reason,
            }
        )

    # -- the kinds of raw files

    def checked_again(self) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
        """By problem and subject, (run, result) of the checks that were made with an addendum, of
        what is still here; where one failed, that one."""
        found: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
        for path, data in self.run.checked_again:
            for result in data["results"]:
                problem, subject = record.problem_of(result["problem"]), result["subject"]
                failed = result["status"] == "failed"
                if failed and self._is_outdated(path, data, result):
                    continue
                if failed:
                    reason = f"run {data['run']}: {result['message']}"
                    self.left_out(data, problem, subject, "failed", reason)
                elif self._outdated(data, result):
                    continue
                _, held = found.get((problem.id, subject), ("", None))
                if held is None or (held["status"] != "failed" and not result["ok"]):
                    found[problem.id, subject] = (data["run"], result)
        return found

    def _outdated(self, data: record.Record, result: Mapping[str, Any]) -> bool:
        """Whether a result of a check is stale; nothing is noted."""
        changed = record.stale_problem(data, result["problem"], self.known)
        return bool(changed or record.stale(data, result["subject"]))

    def _is_outdated(self, path: Path, data: record.Record, result: Mapping[str, Any]) -> bool:
        """The same, and the reason is noted."""
        changed = self.is_stale_problem(path, data, result["problem"])
        return changed or self.is_stale(path, data, result["subject"])

    def checks(self) -> None:
        """Results of the recorded run; one that failed in an addendum counts as it was there, and
        one that is stale gives way to that of an addendum. Strided views may be an addendum's."""
        again = self.checked_again()
        for path, data in self.run.checks:
            for result in data["results"]:
                key = (result["problem"]["id"], result["subject"])
                run, later = again.get(key, ("", {}))
                failed = later if later.get("status") == "failed" else {}
                if later and self._outdated(data, result):
                    self._checked(data, run, later, failed)
                    self._views(data, (run, later))
                elif not self._is_outdated(path, data, result):
                    self._checked(data, data["run"], result, failed)
                    self._views(data, (data["run"], result), (run, later))

    def _checked(
        self, data: record.Record, run: str, result: dict[str, Any], failed: Mapping[str, Any]
    ) -> None:
        """The rows of a result of `run` in the suite of `data`. `failed` is the result of a check
        that failed in an addendum, else empty."""
        problem = record.problem_of(result["problem"])
        subject, suite = result["subject"], data["suite"]
        if result["status"] != "ok" and result is not failed:
            told = result["message"] if run == data["run"] else f"run {run}: {result['message']}"
            self.left_out(data, problem, subject, result["status"], told)
        if result["status"] != "unsupported":
            wrong = failed and failed["identical_runs"] is None  # not only other bits
            right = result["ok"] and not wrong
            self.metric(suite, problem, subject, NO_REGIME, "correct", "1", run, value=right)
        for name in (
            "max_error", "reference_error", "bound", "lse_error", "unit_error",
            "unit_reference_error", "unit_bound", "unit_share", "allclose",
            "identical_runs", "streams", "graph",
        ):  # fmt: skip
            value = result.get(name)
            if value is not None and name in ("identical_runs", "streams", "graph"):
                there = failed.get(name)
                value = value if there is None else min(value, there)
            if value is not None:
                self.metric(suite, problem, subject, NO_REGIME, name, "1", run, value=value)

    def _views(self, data: record.Record, *results: tuple[str, dict[str, Any]]) -> None:
        """The row that says whether one of (run, result), the first that has it, was on inputs with
        other strides."""
        known = [(run, result) for run, result in results if result.get("strided") is not None]
        if known:
            run, result = next((k for k in known if k[1]["strided"]), known[0])
            problem = record.problem_of(result["problem"])
            self.metric(
                data["suite"], problem, result["subject"], NO_REGIME, "strided", "1", run,
                value=result["strided"],
            )  # fmt: skip

    def timings(self) -> None:
        for path, data in self.run.timings:
            suite, regime = data["suite"], data["regime"]
            ratios: dict[tuple[str, str], list[tuple[Problem, stats.Replicates]]] = {}
            for entry, problem in self.entries(path, data):
                attempts = entry["attempts"]
                attempt = next((a for a in attempts if a["ok"]), attempts[-1])
                conclusive = entry["status"] == "ok"
                samples = {
                    subject: stats.burst_means(s) if regime == "sustained" else s
                    for subject, s in attempt["samples"].items()
                    if not self.is_stale(path, data, subject)
                }
                self._timed_problem(suite, problem, regime, samples, conclusive)
                if conclusive:
                    self._energies(suite, problem, regime, samples)
                self._attempts(suite, problem, regime, entry, samples, conclusive)
                for pair, ratio in self._ratios(samples).items():
                    found = ratio.interval()
                    self.speedup(suite, problem.id, problem.dtype, regime, *pair, found)
                    if conclusive:
                        ratios.setdefault(pair, []).append((problem, ratio))
            for pair, of in ratios.items():
                dtype = "/".join(sorted({problem.dtype for problem, _ in of}))
                every = [ratio for _, ratio in of]
                short = [ratio for problem, ratio in of if is_short(problem)]
                for name, ratios_of, reduce in (
                    (MEDIAN, every, np.median),
                    (MINIMUM, every, np.min),
                    (SHORTEST, short, np.min),
                ):
                    if ratios_of:
                        found = stats.over_problems(ratios_of, reduce).interval()
                        self.speedup(suite, name, dtype, regime, *pair, found)

    def _timed_problem(
        self,
        suite: str,
        problem: Problem,
        regime: str,
        samples: Mapping[str, Any],
        conclusive: bool,
    ) -> None:
        for subject, taken in samples.items():
            gpu = stats.replicates(taken["gpu_us"])
            if conclusive:
                self.gpu_us[(suite, problem.id, subject, regime)] = (problem, gpu)
            found = gpu.interval()
            self.interval(suite, problem, subject, regime, "gpu_us", "us", found)
            flat = np.concatenate([np.asarray(p, dtype=np.float64) for p in taken["gpu_us"]])
            p5, p95 = np.percentile(flat, [5, 95])
            self.metric(suite, problem, subject, regime, "gpu_us", "us", p5=p5, p95=p95)
            for name, flops in (
                ("tflops", problem.convention_flops),
                ("tflops_exact", problem.flops),
            ):
                rate = replace(
                    found,
                    value=flops / found.value / 1e6,
                    low=flops / found.high / 1e6,
                    high=flops / found.low / 1e6,
                )
                self.interval(suite, problem, subject, regime, name, "TFLOPS", rate)
            for name, unit in _SAMPLED.items():
                values = present(taken.get(name))
                if values:
                    median = float(np.median(np.concatenate([np.asarray(p) for p in values])))
                    self.metric(suite, problem, subject, regime, name, unit, median=median)
            kernels = float(sum(taken["kernels"].values()))
            self.metric(suite, problem, subject, regime, "timed_kernels", "1", value=kernels)

    def _attempts(
        self,
        suite: str,
        problem: Problem,
        regime: str,
        entry: Mapping[str, Any],
        samples: Mapping[str, Any],
        conclusive: bool,
    ) -> None:
        twins = [s for s in samples if "#" in s and base_name(s) in samples]
        for twin in twins:
            found = stats.ratio_interval(
                samples[twin]["gpu_us"], samples[base_name(twin)]["gpu_us"]
            )
            self.interval(suite, problem, base_name(twin), regime, "aa_ratio", "1", found)
        subject = base_name(twins[0]) if twins else "-"
        self.metric(suite, problem, subject, regime, "conclusive", "1", value=conclusive)
        self.metric(suite, problem, subject, regime, "attempts", "1", value=len(entry["attempts"]))
        if not conclusive:
            self.inconclusive.append(
                {
                    "suite": suite,
                    "problem": problem.id,
                    "regime": regime,
                    "aa_ratios": [a["aa_ratio"] for a in entry["attempts"]],
                    "reason": entry["attempts"][-1]["message"],
                }
            )
        for name, config in sorted(entry["chosen"].items()):
            if config:
                self.chosen.append(
                    {
                        "suite": suite,
                        "problem": problem.id,
                        "regime": regime,
                        "subject": name,
                        "config": config,
                    }
                )

    def _ratios(self, samples: Mapping[str, Any]) -> dict[tuple[str, str], stats.Replicates]:
        """Which subject is compared with which: stages and variants with every peer, a stage with
        the one before, a variant with what it varies, a dose with the smallest of its file, an A/A
        twin with itself.
        """
        known = stage.subjects()
        names = [s for s in samples if "#" not in s]
        peers = [s for s in names if known[s].kind == "peer"]
        undosed = zero_doses()
        ratios: dict[tuple[str, str], stats.Replicates] = {}

        def add(subject: str, peer: str, label: str | None = None) -> None:
            if subject != peer and subject in samples and peer in samples:
                ratios[(subject, label or peer)] = stats.ratio_replicates(
                    samples[subject]["gpu_us"], samples[peer]["gpu_us"]
                )

        best = min(
            peers,
            key=lambda s: float(np.median(np.concatenate(samples[s]["gpu_us"]))),
            default=None,
        )
        for name in names:
            subject = known[name]
            if subject.kind == "control":
                add(name, undosed[name.rpartition(".")[0]])
                continue
            for peer in peers if subject.kind == "stage" else [REFERENCE_PEER]:
                add(name, peer)
            if best and subject.kind == "stage":
                add(name, best, BEST)
            if stage_before(name):
                add(name, stage_before(name))
            if subject.of:
                add(name, subject.of)
        for name in samples:
            if "#" in name:
                add(name, base_name(name))
        return ratios

    def hosts(self) -> None:
        """Each record is of one run, and so is every row: what is compared is of one record."""
        for path, data in self.run.hosts:
            suite, run = data["suite"], data["run"]
            latencies: dict[str, dict[int, tuple[Problem, stats.Replicates]]] = {}
            for entry, problem in self.entries(path, data):
                pairs = self._host_pair(path, data, problem, entry)
                fa3 = entry["samples"].get(REFERENCE_PEER)
                if fa3 and self.is_stale(path, data, REFERENCE_PEER):
                    fa3 = None
                for subject, taken in entry["samples"].items():
                    if self.is_stale(path, data, subject):
                        continue
                    drawn = {
                        n: stats.replicates(taken[n]) for n in host_pairs.KINDS if taken.get(n)
                    }
                    if fa3 and subject != REFERENCE_PEER:
                        base = stats.replicates(fa3["eager_host_us"])
                        cost = drawn["eager_host_us"].map(lambda us, fa3_us: us / fa3_us, base)
                        found = cost.interval()
                        self.interval(
                            suite, problem, subject, NO_REGIME, "host_over_fa3", "1", found, run
                        )
                    for name, sampled in drawn.items():
                        found = sampled.interval()
                        self.interval(suite, problem, subject, NO_REGIME, name, "us", found, run)
                    if "first_call_ms" in taken:
                        place = (suite, problem, subject, NO_REGIME, "first_call_ms", "ms", run)
                        self.metric(*place, value=max(taken["first_call_ms"]))
                    self._launch_share(data, problem, subject, drawn)
                    before = entry["samples"].get(stage_before(subject))
                    if before and not self.is_stale(path, data, stage_before(subject)):
                        base = stats.replicates(before["eager_latency_us"])
                        gain = base.map(lambda us, own: us / own, drawn["eager_latency_us"])
                        found = gain.interval()
                        self.interval(
                            suite, problem, subject, NO_REGIME, "eager_gain", "1", found, run
                        )
                    if agree(pairs, "per_sequence_eager"):
                        by_batch = latencies.setdefault(subject, {})
                        by_batch[problem.batch] = (problem, drawn["eager_latency_us"])
            for subject, by_batch in latencies.items():
                self._per_sequence(suite, subject, NO_REGIME, "per_sequence_eager", by_batch, run)

    def _host_pair(
        self, path: Path, data: record.Record, problem: Problem, entry: Mapping[str, Any]
    ) -> dict[str, float]:
        """The A/A pair's ratio of each kind of host time, by the name of its metric. Without a pair
        nothing is known, and there is no row."""
        suite, run, samples = data["suite"], data["run"], entry["samples"]
        twin = host_pairs.twin_of(samples)
        if twin is None or self.is_stale(path, data, twin):
            return {}
        subject = base_name(twin)
        ratios = {f"aa_{kind}": ratio for kind, ratio in host_pairs.ratios(samples).items()}
        for name, ratio in ratios.items():
            self.metric(suite, problem, subject, NO_REGIME, name, "1", run, value=ratio)
        if "earlier" in entry:
            made = 1 + len(entry["earlier"])
            self.metric(suite, problem, subject, NO_REGIME, "attempts", "1", run, value=made)
        off = {name: r for name, r in ratios.items() if abs(r - 1) > HOST_TOLERANCE}
        if off:
            told = ", ".join(f"{n.removeprefix('aa_')} {ratio:.3f}" for n, ratio in off.items())
            self.inconclusive.append(
                {
                    "suite": suite,
                    "problem": problem.id,
                    "regime": "host",
                    "aa_ratios": list(off.values()),
                    "reason": f"host A/A pair {twin} off by more than"
                    f" {100 * HOST_TOLERANCE:.0f} %: {told}",
                }
            )
        return ratios

    def _launch_share(
        self,
        data: record.Record,
        problem: Problem,
        subject: str,
        taken: Mapping[str, stats.Replicates],
    ) -> None:
        """The part of a call's latency in which its kernels do not run, eager and in a graph.

        GPU time and latency come from one loop: the GPU time of spaced launches is that of another
        clock and another cache. A record without it has no such rows.
        """
        if "graph_gpu_us" not in taken:
            return
        for latency, name in (
            ("eager_latency_us", "launch_share"),
            ("graph_latency_us", "launch_share_graph"),
        ):
            if latency not in taken:
                continue
            gpu = taken[latency].map(lambda us, gpu: gpu / us, taken["graph_gpu_us"]).interval()
            share = replace(
                gpu,
                value=100 * (1 - gpu.value),
                low=100 * (1 - gpu.high),
                high=100 * (1 - gpu.low),
            )
            place = (data["suite"], problem, subject, NO_REGIME, name, "%")
            self.interval(*place, share, data["run"])

    def _energies(
        self, suite: str, problem: Problem, regime: str, samples: Mapping[str, Any]
    ) -> None:
        """Energy of a call over that of FA3, by process, where both were read; of FA3's A/A twin,
        how well such ratios repeat."""
        read = {name: present(taken.get("energy_mj")) for name, taken in samples.items()}
        base = [float(np.median(process)) for process in read.get(REFERENCE_PEER, [])]
        for name, found in read.items():
            if not base or not found or name == REFERENCE_PEER:
                continue
            own = [float(np.median(process)) for process in found]
            over = float(np.median(np.divide(own, base)))
            subject, metric = name, "energy_over_fa3"
            if "#" in name:
                if base_name(name) != REFERENCE_PEER:
                    continue
                subject, metric = REFERENCE_PEER, "energy_aa"
            self.metric(suite, problem, subject, regime, metric, "1", value=over)

    def over_bf16(self) -> None:
        """GPU time in fp16 over that of the same problem in bf16, where both agreed with their A/A
        pair and are of one run."""

        def shape(problem: Problem) -> Problem:
            return replace(problem, id="any", suites=("any",), dtype="bf16")

        in_bf16 = {
            (shape(problem), subject, regime): gpu
            for (suite, _, subject, regime), (problem, gpu) in self.gpu_us.items()
            if suite == "grid"
        }
        for (suite, _, subject, regime), (problem, gpu) in self.gpu_us.items():
            base = in_bf16.get((shape(problem), subject, regime))
            if self.run.name_of(suite, regime) != self.run.name_of("grid", regime):
                base = None
            if base is not None and problem.dtype == "fp16" and "#" not in subject:
                self.metric(
                    suite, problem, subject, regime, "over_bf16", "1", value=gpu.value / base.value
                )

    def per_sequence_gpu(self) -> None:
        """GPU time per sequence at batch 1 over larger batches, where a suite varies the batch."""
        groups: dict[tuple[str, str, str], dict[int, tuple[Problem, stats.Replicates]]] = {}
        for (suite, _, subject, regime), (problem, gpu) in self.gpu_us.items():
            if suite == "gate" and "#" not in subject:
                groups.setdefault((suite, subject, regime), {})[problem.batch] = (problem, gpu)
        for (suite, subject, regime), by_batch in groups.items():
            self._per_sequence(suite, subject, regime, "per_sequence_gpu", by_batch)

    def _per_sequence(
        self,
        suite: str,
        subject: str,
        regime: str,
        name: str,
        by_batch: Mapping[int, tuple[Problem, stats.Replicates]],
        run: str | None = None,
    ) -> None:
        if 1 not in by_batch:
            return
        for batch, (problem, many) in sorted(by_batch.items()):
            if batch > 1:
                gain = by_batch[1][1].map(lambda one, us, n=batch: n * one / us, many)
                self.interval(suite, problem, subject, regime, name, "1", gain.interval(), run)

    def profiles(self) -> None:
        """Counters count for every suite that holds a problem and was profiled, though a problem
        is profiled once."""
        counters = metrics.ncu_metrics()
        profiled = {data["suite"] for _, data in self.run.profiles}
        entries = [
            (path, data, *entry)
            for path, data in self.run.profiles
            for entry in self.entries(path, data, "reports")
        ]

        def read(report: Mapping[str, Any]) -> list[metrics.Kernel]:
            file = self.run.raw / report["file"]
            content = ncu_rep.check_sha256(file, report["sha256"])
            return self.open_report(content, str(file), counters)

        with ThreadPoolExecutor(READERS) as readers:
            reading: dict[str, Future[list[metrics.Kernel]]] = {}  # problems can share a report
            for _, _, report, _ in entries:
                if report["sha256"] not in reading:
                    reading[report["sha256"]] = readers.submit(read, report)
            for path, data, report, problem in entries:
                version = data["content"]["ncu"]
                file = self.run.raw / report["file"]
                kernels = reading[report["sha256"]].result()
                for subject, expected in report["subjects"].items():
                    if self.is_stale(path, data, subject):
                        continue
                    name = f"{problem.id}.{subject}"
                    found = [k for k in kernels if name in k.ranges]
                    if len(found) != expected:
                        raise ncu_rep.BadReport(
                            f"{file}: {len(found)} kernels in NVTX range {name}, the record says"
                            f" {expected}; the report is truncated or from another run: profile"
                            " again"
                        )
                    where = f"{file} ({name}, ncu {version})"
                    call = metrics.combine(found, problem, where)
                    for metric, value in metrics.derive_all(call).items():
                        unit = metrics.BY_ID[metric].unit
                        for suite in sorted(profiled & {data["suite"], *problem.suites}):
                            self.metric(
                                suite, problem, subject, NO_REGIME, metric, unit, value=value
                            )
                    if report["sections"] == "full" and not call.waits:
                        self.notes.append(f"{where}: no counters for single instructions in it")
                    if not any(call.counters.get(c) for c in metrics.TENSOR_OPS):
                        self.notes.append(
                            f"{where}: counters of tensor operations read 0, so instructions count"
                        )

    # -- provenance

    def provenance(self) -> dict[str, Any]:
        device = self.run.device
        records = [data for _, data in self.run.records()]
        subjects: dict[str, Any] = {}
        for data in records:
            subjects.update(data["subjects"])

        def all_of(key: str) -> list[Any]:
            return sorted({data["provenance"].get(key) for data in records}, key=str)

        return {
            "tier": self.tier,
            "run": device["run"],
            "device": self.device,
            "content": device["content"],
            "commit": device["provenance"]["commit"],
            "commits": all_of("commit"),
            "dirty": any(data["provenance"]["dirty"] for data in records),
            "image_digest": device["provenance"]["image_digest"],
            "engine": device["provenance"]["engine"],
            "constraints_sha256": all_of("constraints_sha256"),
            "predictions_sha256": all_of("predictions_sha256"),
            "seed": all_of("seed"),
            "input_distribution": all_of("input_distribution"),
            "started": min(data["provenance"]["started"] for data in records),
            "packages": device["provenance"]["packages"],
            "gpu_uuid": device["provenance"]["gpu_uuid"],
            "addenda": [self._addendum(path.parent, data) for path, data in self.run.addenda],
            "states": {
                path.relative_to(self.run.raw).as_posix(): {
                    when: data["provenance"][when] for when in ("before", "after")
                }
                for path, data in self.run.records()
            },
            "closed": {
                path.relative_to(self.run.raw).as_posix(): data["provenance"]["closed"]
                for path, data in self.run.records()
                if "closed" in data["provenance"]
            },
            "properties": device["properties"],
            "ceilings": device["ceilings"],
            "subjects": dict(sorted(subjects.items())),
            "suites": sorted(
                {(data["schema"].split("/")[1], data["suite"] or "") for data in records}
            ),
            "every_problem": every_problem(self.known),
            "stale": self.stale,
            "excluded": self.excluded,
            "inconclusive": self.inconclusive,
            "chosen": self.chosen,
            "notes": sorted(set(self.notes)),
        }

    def _addendum(self, folder: Path, data: record.Record) -> dict[str, Any]:
        files = addenda.added_by(self.run.raw, folder)
        replaced = addenda.replaced(self.run.raw, files, self.known)
        return {
            "run": data["run"],
            "gpu_uuid": data["provenance"]["gpu_uuid"],
            "commit": data["provenance"]["commit"],
            "started": data["provenance"]["started"],
            "measuring": data["content"]["measuring"],
            "files": files,
            "replaced": {name: run for name, (run, _) in replaced.items()},
            "replaced_why": {name: why for name, (_, why) in replaced.items()},
        }

    def tables_of_run(self) -> Tables:
        self.checks()
        self.timings()
        self.per_sequence_gpu()
        self.over_bf16()
        self.hosts()
        self.profiles()
        tidy_serving.decodes(self)
        tidy_serving.models(self)
        self.tables.provenance = self.provenance()
        return self.tables


def tidy(raw: Path, tier: str, problems: Path, open_report: Open = ncu_rep.open_apart) -> Tables:
    """All tables of the run in `raw`, against the table of problems as it is.

    `tier` is `replay` or `measure`, stamped on everything derived.
    """
    return Tidier(Run(raw), tier, read_problems(problems), open_report).tables_of_run()


def write(tables: Tables, out_metrics: Path, out_speedups: Path, out_provenance: Path) -> None:
    """Write the three files, byte-identical for the same tables."""
    record.write_text(out_metrics, csv_text(METRICS_COLUMNS, tables.metrics))
    record.write_text(out_speedups, csv_text(SPEEDUPS_COLUMNS, tables.speedups))
    record.write_text(
        out_provenance, json.dumps(tables.provenance, indent=1, sort_keys=True) + "\n"
    )
