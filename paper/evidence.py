"""The derived tables of one run, as the paper's scripts look things up in them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attn_ladder import stage
from attn_ladder.problem import Problem, read_problems
from attn_profiling import device, metrics, model, predict, verdict
from attn_profiling.host_pairs import HOST_PAIRS
from attn_profiling.tidy import (
    BEST,
    MEDIAN,
    MINIMUM,
    NO_REGIME,
    REFERENCE_PEER,
    SHORTEST,
    agree,
)

__all__ = [
    "BEST",
    "MEDIAN",
    "MINIMUM",
    "NO_REGIME",
    "REFERENCE_PEER",
    "SHORTEST",
    "Evidence",
    "Value",
    "interval",
    "known_of",
    "label",
    "load",
    "number",
    "plain",
]

PROFILE = "profile"
"""The suite whose counters stand in where a run has none of the grid or of the gate."""
REPLACED = {
    "interrupted": ", which was interrupted",
    "kernel changed": ", of a kernel that has changed since",
    "without fp32 logits": ", whose ties were not compared with fp32 logits",
    "problem changed": ", of a problem that has changed since",
    "A/A off": ", whose A/A pairs were off",
}
"""What is said of a record that another takes the place of, by `addenda.fault`."""
SHARES = ("launch_share", "launch_share_graph")
"""Percents that are differences of two times, whose noise can lie outside 0 to 100."""
SHORT = {"fa3": "FA3", "fa4": "FA4", "fa2": "FA2", "cudnn": "cuDNN"}


@dataclass(frozen=True)
class Value:
    """A number with its interval, where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


def within(metric: str, value: float) -> float:
    """A value as it is printed: a share is cut at 0 and 100."""
    return min(100.0, max(0.0, value)) if metric in SHARES else value


def known_of(*kinds: str) -> list[str]:
    """The subjects of some kinds, measured or not, in the order of the ladder."""
    return [name for name, subject in stage.subjects().items() if subject.kind in kinds]


@dataclass(frozen=True)
class Predicted:
    """What was said of a stage on a problem before it was measured."""

    us: float
    limit: str
    busy_percent: float
    clock_mhz: float


class Evidence:
    """metrics.csv, speedups.csv, verdicts.csv, replications.csv and provenance.json of one run,
    the problems, and the predictions beside the constraints."""

    def __init__(self, results: Path, problems: Path, constraints: Path) -> None:
        self.provenance: dict[str, Any] = json.loads((results / "provenance.json").read_text())
        self.problems = read_problems(problems)
        self.constraints = verdict.read_constraints(constraints)
        self.verdicts = verdict.read_rows(results / "verdicts.csv")
        self._metrics: dict[tuple[str, ...], dict[str, float]] = {}
        for row in verdict.read_rows(results / "metrics.csv"):
            key = tuple(row[c] for c in ("suite", "problem", "subject", "metric", "regime"))
            self._metrics.setdefault(key, {})[row["statistic"]] = float(row["value"])
        self._speedups = {
            tuple(row[c] for c in ("suite", "problem", "subject", "peer", "regime")): row
            for row in verdict.read_rows(results / "speedups.csv")
        }
        self._predictions = constraints.with_name("predictions.csv")
        self._pilot = constraints.with_name("pilot.csv")
        self._predicted = {
            (row["problem"], row["subject"]): Predicted(
                float(row["predicted_us"]),
                row["limit"],
                float(row["busy_percent"]),
                float(row["clock_mhz"]),
            )
            for row in (verdict.read_rows(self._predictions) if self._predictions.is_file() else ())
            if row["device"] == self.provenance["device"]
        }
        kept = results / "replications.csv"
        self.replications = verdict.read_rows(kept) if kept.is_file() else []
        measured = {key[2] for key in self._metrics}
        self.subjects = [name for name in stage.subjects() if name in measured]

    # -- lookups; None where a thing was not measured

    def metric(
        self, suite: str, problem: str, subject: str, metric: str, regime: str = NO_REGIME
    ) -> Value | None:
        """A metric with its interval."""
        found = self._metrics.get((suite, problem, subject, metric, regime))
        if found is None:
            return None
        value = found.get("median", found.get("value"))
        if value is None:
            return None
        low, high = (
            None if end is None else within(metric, end)
            for end in (found.get("ci_low"), found.get("ci_high"))
        )
        return Value(within(metric, value), low, high)

    def all_of(
        self, suite: str, metric: str, only: str | None = None
    ) -> dict[tuple[str, str], Value]:
        """A metric of everything in a suite that has it, by problem and subject; in one regime
        only, where one is named."""
        found = {}
        for s, problem, subject, name, regime in self._metrics:
            if (s, name) == (suite, metric) and only in (None, regime):
                value = self.metric(suite, problem, subject, metric, regime)
                if value is not None:
                    found[problem, subject] = value
        return found

    def speedup(
        self, suite: str, problem: str, subject: str, peer: str, regime: str = "spaced"
    ) -> Value | None:
        """GPU time of the peer over that of the subject."""
        row = self._speedups.get((suite, problem, subject, peer, regime))
        if row is None:
            return None
        return Value(float(row["ratio"]), float(row["ci_low"]), float(row["ci_high"]))

    def conclusive(self, suite: str, problem: str, regime: str = "spaced") -> bool:
        """Whether the A/A pair of a problem agreed."""
        found = [
            values["value"]
            for (s, p, _, metric, r), values in self._metrics.items()
            if (s, p, metric, r) == (suite, problem, "conclusive", regime)
        ]
        return all(found)

    def host_agrees(self, suite: str, problem: str, metric: str) -> bool:
        """Whether the A/A pairs of the host times that a metric is made of agreed on a problem."""
        names = [f"aa_{kind}" for kind in HOST_PAIRS[metric]]
        found = {name: self.metric(suite, problem, REFERENCE_PEER, name) for name in names}
        return agree({name: v.value for name, v in found.items() if v is not None}, metric)

    def agreed(self, suite: str, regime: str) -> tuple[int, int]:
        """On how many problems of a suite the A/A pair agreed in a regime and the top stage was
        measured, and of how many; 0 of 0 where none was measured."""
        found = {
            problem: values["value"]
            for (s, problem, _, metric, r), values in self._metrics.items()
            if (s, metric, r) == (suite, "conclusive", regime)
        }
        measured = {
            problem
            for s, problem, subject, _, r in self._speedups
            if (s, subject, r) == (suite, self.top, regime)
        }
        agreed = sum(v for p, v in found.items() if p in measured or not measured)
        return int(agreed), len(self.suite(suite)) if found else 0

    def identical_runs(self, subject: str) -> tuple[float, int] | None:
        """The fewest runs of a subject in a row that gave the same bits, and on how many problems
        that was tried."""
        runs = [
            (value.value, problem)
            for suite in ("grid", "gate", "variant")  # a problem can be in several
            for (problem, name), value in self.all_of(suite, "identical_runs").items()
            if name == subject
        ]
        return (min(runs)[0], len({problem for _, problem in runs})) if runs else None

    def views(self, subject: str, suites: Iterable[str]) -> tuple[int, int]:
        """On how many problems of suites a subject was right, and on how many it was called, where
        a call was on inputs with other strides."""
        found = [
            bool(right and right.value == 1)
            for suite in suites
            for (problem, name), value in self.all_of(suite, "strided").items()
            if name == subject and value.value == 1
            for right in [self.metric(suite, problem, subject, "correct")]
        ]
        return sum(found), len(found)

    def was_measured(self, suite: str, regime: str) -> bool:
        """Whether a suite was timed in a regime."""
        return bool(self.all_of(suite, "gpu_us", regime))

    def attempts(self, suite: str, regime: str) -> str:
        """How often the problems of a suite were measured in a regime: `1`, or `1 to 3`; empty
        where it was not."""
        made = {int(v.value) for v in self.all_of(suite, "attempts", regime).values()}
        return " to ".join(str(n) for n in sorted({min(made), max(made)})) if made else ""

    def off(self, suite: str, *regimes: str) -> str:
        """What the dagger means in tables of a suite: in how many attempts the A/A pairs were off;
        empty where all agreed."""
        made = {
            int(value.value)
            for regime in regimes
            for (problem, _), value in self.all_of(suite, "attempts", regime).items()
            if not self.conclusive(suite, problem, regime)
        }
        if not made:
            return ""
        counts = " to ".join(str(n) for n in sorted({min(made), max(made)}))
        where = "the one attempt that was made" if made == {1} else f"each of {counts} attempts"
        return f" † the A/A pair was off in {where}: inconclusive, left out of medians."

    def or_stale(self, suite: str, subject: str, text: str) -> str:
        """The text, or `stale` where it says nothing because the record of a subject is stale."""
        stale = [(s["suite"], s["what"]) for s in self.provenance["stale"]]
        return "stale" if text == "–" and (suite, subject) in stale else text

    def of_kind(self, kind: str) -> list[str]:
        """The measured subjects of a kind, in the order of the ladder."""
        known = stage.subjects()
        return [name for name in self.subjects if known[name].kind == kind]

    @property
    def top(self) -> str:
        """The highest stage of the ladder, measured or not: no other stands in for it."""
        return known_of("stage")[-1]

    def suite(self, name: str) -> list[Problem]:
        """The problems of a suite, in file order."""
        return [p for p in self.problems.values() if name in p.suites]

    @cached_property
    def _counted(self) -> set[tuple[str, str]]:
        return {
            (suite, problem)
            for suite, problem, _, metric, regime in self._metrics
            if metric in metrics.BY_ID and regime == NO_REGIME
        }

    def counted(self, suite: str) -> list[Problem]:
        """The problems of a suite that Nsight Compute's counters were read on, in file order."""
        return [p for p in self.suite(suite) if (suite, p.id) in self._counted]

    def counter_suite(self, suite: str = "grid") -> str:
        """The suite whose counters speak for the grid or the gate: itself, or `profile` in a run
        that was not profiled on it."""
        return suite if self.counted(suite) else PROFILE

    @property
    def counter_problems(self) -> str:
        """What the medians of counters are over: the problems, and how many."""
        suite = self.counter_suite()
        found, every = len(self.counted(suite)), len(self.suite(suite))
        of = f"the {found}" if found == every else f"{found} of the {every}"
        return f"{of} problems of the {'grid' if suite == 'grid' else f'suite {suite}'}"

    @property
    def counters(self) -> str:
        """Which problems of the grid and the gate have counters, as a sentence."""
        if not self._counted:
            return "No counters were read in this run."
        parts, missing = [], []
        for suite, noun in (("grid", "problems of the grid"), ("gate", "of the gate")):
            counted = {p.id for p in self.counted(self.counter_suite(suite))}
            every = self.suite(suite)
            found = sum(p.id in counted for p in every)
            whole = "all" if found == len(every) else f"{found} of the"
            parts.append(f"{whole} {len(every)} {noun}")
            missing += [] if self.counted(suite) else [f"the {suite}"]
        text = f"Counters of {' and '.join(parts)}"
        if missing:
            text += f"; this run has only those of the suite {PROFILE} for {' and '.join(missing)}"
        return text + "."

    def closed(self, file: str) -> str:
        """What is to be said of a record that was made after its measurement had been interrupted,
        such as `ncu/control.json`; empty for one that was not."""
        found = self.provenance.get("closed", {}).get(file)
        if found is None:
            return ""
        kind, suite = Path(file).with_suffix("").parts
        lost = sorted(
            {
                f"{label(item['subject'])}, {item['problem']}"
                for item in self.provenance["excluded"]
                if (item["kind"], item["suite"]) == (kind, suite)
                and item["reason"].startswith("interrupted")
            }
        )
        missing = f" Lost: {'; '.join(lost)}." if 0 < len(lost) <= 3 else ""
        dirty = " with local changes" if found["dirty"] else ""
        return (
            f" {file} was interrupted for good; the record was made from what is whole by commit"
            f" {found['commit'][:12]}{dirty}, with the machine and packages of"
            f" {found['provenance_of']}.{missing}"
        )

    def failed_checks(self) -> list[str]:
        """What failed a check, in the recorded run or in an addendum, and how."""
        return [
            f"{label(item['subject'])} on {item['problem']} ({item['reason']})"
            for item in self.provenance["excluded"]
            if item["kind"] == "check" and item["status"] == "failed"
        ]

    def added(self, file: str) -> str:
        """What is to be said of a record that is from another run than most are."""
        run = self._adding(file)
        if run is None:
            return ""
        same = run["gpu_uuid"] == self.provenance["gpu_uuid"]
        board = "the same board" if same else "another board of this model"
        said = f" {file} is from run {run['run']}, of {board} (commit {run['commit'][:12]})."
        if file in run["replaced"]:
            why = REPLACED.get(run["replaced_why"][file], "")
            said += f" It takes the place of that of run {run['replaced'][file]}{why}."
        return said

    def measuring(self, file: str) -> Mapping[str, float]:
        """How a record was measured."""
        found: Mapping[str, float] = (self._adding(file) or self.provenance["content"])["measuring"]
        return found

    def _adding(self, file: str) -> Mapping[str, Any] | None:
        """The addendum that a record is from."""
        return next((r for r in self.provenance.get("addenda", []) if file in r["files"]), None)

    def anywhere(
        self, problem: Problem, subject: str, metric: str, regime: str = NO_REGIME
    ) -> Value | None:
        """A metric from the first suite of a problem that has it."""
        found = (self.metric(s, problem.id, subject, metric, regime) for s in problem.suites)
        return next((value for value in found if value is not None), None)

    def roofline(
        self, problem: Problem, subject: str, regime: str = "spaced"
    ) -> model.Roofline | None:
        """The model's times at the clock of a subject under load.

        That is the one under the profiler, back to back the one of the bursts; where neither was
        read, the clock before a launch, lowered as `predict` lowers it for the tensor pipe's share
        of the least time. None on a device whose peaks are not known (`device.DEVICES`).
        """
        known = device.DEVICES.get(self.provenance["device"])
        if known is None:
            return None
        copy = self.provenance["ceilings"]["copy_bytes_per_s"]["value"]
        bursts = self.anywhere(problem, subject, "clock_mhz", regime)
        loaded = bursts if regime == "sustained" else None
        loaded = loaded or self.anywhere(problem, subject, "profiled_clock")
        if loaded is not None:
            return model.roofline(problem, known, loaded.value, copy)
        spin = self.anywhere(problem, subject, "spin_clock_mhz", "spaced")
        before = spin.value if spin else float(known.boost_clock_mhz)
        least = model.roofline(problem, known, before, copy)
        share = least.tensor_us / least.overlapped_us
        lower = predict.CLOCK_UNDER_LOAD.value - predict.CLOCK_PER_TENSOR.value * share
        return model.roofline(problem, known, before * lower, copy)

    def predicted(self, problem: str, subject: str) -> Predicted | None:
        """The committed prediction, which is for the spaced regime."""
        return self._predicted.get((problem, subject))

    def measured_over_predicted(self, suite: str, problem: str, subject: str) -> Value | None:
        """The measured time over the committed prediction; None where either is missing."""
        found = self.predicted(problem, subject)
        us = self.metric(suite, problem, subject, "gpu_us", "spaced")
        if found is None or us is None or not self.conclusive(suite, problem):
            return None
        low, high = (None if v is None else v / found.us for v in (us.low, us.high))
        return Value(us.value / found.us, low, high)

    def repetition_errors(self, suite: str, subject: str) -> list[float]:
        """Pilot over measured time less 1: what repeating the times that the model was fitted to
        would have predicted, of each measured problem that the pilot has in fp16."""
        rows = verdict.read_rows(self._pilot) if self._pilot.is_file() else ()
        known = {
            row["problem"].removeprefix("fp16-"): float(row["us"])
            for row in rows
            if (row["subject"], row["source"]) == (subject, "fp16")
        }
        errors = []
        for problem in self.suite(suite):
            pilot = known.get(problem.id.partition("-")[2])
            measured = self.metric(suite, problem.id, subject, "gpu_us", "spaced")
            if pilot is not None and measured is not None:
                errors.append(pilot / measured.value - 1)
        return errors

    def prediction_errors(
        self, suite: str, subject: str, at_measured_clock: bool = False
    ) -> list[float]:
        """Predicted over measured time less 1, of each measured problem of a suite.

        As committed, or by the model of this source at the clock measured before the launches.
        """
        errors = []
        for problem in self.suite(suite):
            ratio = self.measured_over_predicted(suite, problem.id, subject)
            clock = self.metric(suite, problem.id, subject, "spin_clock_mhz", "spaced")
            if ratio is None:
                continue
            scale = 1.0
            if at_measured_clock and clock is not None:
                here = predict.predict(problem, subject, self.provenance["device"], clock.value)
                committed = self.predicted(problem.id, subject)
                assert committed is not None
                scale = here.us / committed.us
            errors.append(scale / ratio.value - 1)
        return errors

    @property
    def prediction_status(self) -> str:
        """Whether the predictions were there before the run: `confirmatory`, else `post hoc`."""
        before = predict.predates(
            self.provenance["commits"],
            self.provenance["predictions_sha256"],
            self._predictions,
        )
        return "confirmatory" if before else "post hoc"

    @property
    def stamp(self) -> str:
        """Where the numbers are from, on everything derived."""
        p = self.provenance
        dirty = " with local changes" if p["dirty"] else ""
        image = p["image_digest"] or "none (native)"
        made = [p, *p.get("addenda", [])]
        runs = " + ".join(run["run"] for run in made)
        commits = " + ".join(dict.fromkeys(run["commit"][:12] for run in made))
        return (
            f"tier {p['tier']}, device {p['device']}, run {runs}, commit {commits}"
            f"{dirty}, image {image}"
        )


def load(results: Path, problems: Path, constraints: Path) -> Evidence:
    """The evidence in a folder of results."""
    return Evidence(results, problems, constraints)


def label(subject: str) -> str:
    """What a subject is called in tables."""
    if subject in SHORT:
        return SHORT[subject]
    return f"stage {subject[5:]}" if subject.startswith("stage") else subject.replace("_", " ")


def plain(value: float, digits: int) -> str:
    """A number with so many decimals; what rounds to zero has no sign."""
    return f"{value:.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def interval(value: Value | None, digits: int = 3) -> str:
    """A value with its interval as text, `–` where it was not measured."""
    if value is None:
        return "–"
    shown = plain(value.value, digits)
    if value.low is None or value.high is None:
        return shown
    return f"{shown} [{plain(value.low, digits)}, {plain(value.high, digits)}]"


def number(value: Value | None, digits: int = 0) -> str:
    """A value as text, `–` where it was not measured."""
    return "–" if value is None else plain(value.value, digits)
