"""Verdicts on the claims of `config/constraints.yaml`, computed from the tidy tables alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from attn_ladder import stage
from attn_profiling import record, stats
from attn_profiling.host_pairs import HOST_PAIRS
from attn_profiling.stats import Interval
from attn_profiling.tidy import (
    MEDIAN,
    MINIMUM,
    NO_REGIME,
    SHORTEST,
    agree,
    csv_text,
    zero_doses,
)

COLUMNS = (
    "run",
    "device",
    "constraint",
    "suite",
    "regime",
    "subject",
    "metric",
    "effect",
    "ci_low",
    "ci_high",
    "threshold",
    "control",
    "verdict",
)
SUPPORTED, REFUTED = "SUPPORTED", "REFUTED"
PARTLY, INCONCLUSIVE = "PARTLY", "INCONCLUSIVE"
POST_HOC = " (post hoc)"
PREDICTIONS = "predictions.csv"
LEAST = 3
"""Fewer processes, or problems for a counter, decide nothing."""
LEFT_OUT = 0.1
"""A median over a suite decides nothing where a larger share of its A/A pairs was off."""
ALL_SUITES = "(all)"
PASSED = "passed"
BORROWED = "borrowed: "
"""Before a control that plants what the primary witness of a constraint sees, not this one."""
PREDICTION_ERROR = "prediction_error"
AA = "A/A"
"""Control of a ratio of times: a kernel against itself; its departure from 1 widens intervals."""

Row = Mapping[str, Any]


class ConstraintsError(ValueError):
    """constraints.yaml is wrong; the text names the place."""


@dataclass(frozen=True)
class Hypothesis:
    """One claim, with what witnesses it and what would refute it."""

    id: str
    role: str
    claim: str
    witness: dict[str, Any]
    suites: tuple[str, ...]
    constraint: str = ""
    falsifier: str = ""
    at_least: float | None = None
    at_most: float | None = None
    smallest_effect: float = 0.0

    @property
    def threshold(self) -> float:
        """The claimed number."""
        chosen = self.at_least if self.at_least is not None else self.at_most
        assert chosen is not None
        return chosen

    @property
    def by_point(self) -> bool:
        """Gates and criteria on counters of one problem, or on the least or the largest of them,
        are decided by the value: it has no interval. So are predictions, which are made for these
        problems and no others."""
        return self.role in ("gate", "criterion") and (
            self.witness["kind"] == "counter"
            and ("problem" in self.witness or self.witness.get("reduce", "median") != "median")
            or self.predicts
        )

    @property
    def every(self) -> str | None:
        """The reduction over every problem of a suite that this speaks of, None if it does not."""
        if self.witness["kind"] == "counter":
            return None if self.witness.get("reduce", "median") == "median" else MINIMUM
        return self.witness["problem"] if self.witness["problem"] in (MINIMUM, SHORTEST) else None

    @property
    def predicts(self) -> bool:
        """Whether it speaks of the committed predictions."""
        return bool(self.witness.get("metric") == PREDICTION_ERROR)

    @property
    def regime(self) -> str:
        """The regime it is judged in; counters and host times have none."""
        default = "spaced" if self.witness["kind"] == "speedup" else NO_REGIME
        return str(self.witness.get("regime", default))

    @property
    def metric(self) -> str:
        """What stands in the column `metric`."""
        witness = self.witness
        if witness["kind"] == "speedup":
            return f"speedup over {witness['peer']}, {witness['problem']}"
        if witness["kind"] == "measured":
            return f"{witness['metric']}, {witness['problem']}"
        reduce = witness.get("problem") or witness.get("reduce", "median")
        but = f" but {witness['all_but']}" if "all_but" in witness else ""
        return str(witness["metric"]) + ("" if reduce == "median" else f" ({reduce}{but})")

    @property
    def controlled(self) -> bool:
        """Whether its constraint's control must have passed: what a counter or a share witnesses
        may not be the constraint. A ratio of two kernels' times has an A/A pair for a control."""
        return self.role in ("primary", "witness", "ablation") and (
            self.witness["kind"] != "speedup"
        )


@dataclass(frozen=True)
class Constraints:
    """constraints.yaml, checked."""

    constraints: dict[str, dict[str, Any]]
    hypotheses: tuple[Hypothesis, ...]
    sha256: str
    predictions_sha256: str | None = None


def read_constraints(path: Path) -> Constraints:
    """Read and check the claims. Raises `ConstraintsError` naming the file and the place."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    schema = json.loads(path.with_name("constraints.schema.json").read_text())
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConstraintsError(f"{path}: not valid YAML: {error}") from None
    wrong = best_match(Draft202012Validator(schema).iter_errors(data))
    if wrong is not None:
        place = "/".join(str(part) for part in wrong.absolute_path) or "(top level)"
        raise ConstraintsError(f"{path}: at {place}: {wrong.message[:500]}")
    hypotheses = tuple(
        Hypothesis(**{**h, "suites": tuple(h["suites"])}) for h in data["hypotheses"]
    )
    seen: set[str] = set()
    for hypothesis in hypotheses:
        if hypothesis.id in seen:
            raise ConstraintsError(
                f"{path}: id={hypothesis.id!r} is used twice; ids must be unique"
            )
        seen.add(hypothesis.id)
        if hypothesis.witness["kind"] != "counter" and any("/" in s for s in hypothesis.suites):
            raise ConstraintsError(
                f"{path}: {hypothesis.id}: suites={list(hypothesis.suites)}: only counters are told"
                " apart by parts of a suite; name whole suites"
            )
        if hypothesis.constraint and hypothesis.constraint not in data["constraints"]:
            raise ConstraintsError(
                f"{path}: {hypothesis.id}: constraint={hypothesis.constraint!r} is unknown; known:"
                f" {', '.join(data['constraints'])}"
            )
    for name in data["constraints"]:
        primary = [h for h in hypotheses if h.constraint == name and h.role == "primary"]
        if len(primary) != 1:
            raise ConstraintsError(
                f"{path}: constraint {name} has {len(primary)} primary hypotheses; it needs one"
            )
    sha256 = record.constraints_sha256(path)
    assert sha256 is not None
    predictions = record.predictions_sha256(path.with_name(PREDICTIONS))
    return Constraints(data["constraints"], hypotheses, sha256, predictions)


def decide(found: Interval | None, hypothesis: Hypothesis, noise_floor: float = 0.0) -> str:
    """The verdict that an interval gives on its own. `noise_floor` is relative."""
    if found is None:
        return INCONCLUSIVE
    at_least, threshold = hypothesis.at_least is not None, hypothesis.threshold
    if hypothesis.by_point:
        exact = found.df == float("inf")  # then the ends are what missing problems may make of it
        ends = (found.low, found.high) if exact else (found.value,)
        met = {end >= threshold if at_least else end <= threshold for end in ends}
        return INCONCLUSIVE if len(met) > 1 else SUPPORTED if met.pop() else REFUTED
    if min(found.n_processes, found.n) < LEAST:
        return INCONCLUSIVE
    slack = abs(found.value) * noise_floor
    low, high = found.low - slack, found.high + slack
    margin = hypothesis.smallest_effect
    if low >= threshold if at_least else high <= threshold:
        return SUPPORTED
    if high < threshold - margin if at_least else low > threshold + margin:
        return REFUTED
    return INCONCLUSIVE


def p_value(found: Interval | None, hypothesis: Hypothesis) -> float:
    """Two-sided p-value of the side on which an interval lies."""
    if found is None or min(found.n_processes, found.n) < LEAST:
        return 1.0
    above = found.p_at_least(hypothesis.threshold)
    margin = hypothesis.smallest_effect * (1 if hypothesis.at_least is not None else -1)
    below = found.p_at_most(hypothesis.threshold - margin)
    if hypothesis.at_least is None:
        above = found.p_at_least(hypothesis.threshold - margin)
        below = found.p_at_most(hypothesis.threshold)
    return min(1.0, 2 * min(above, below))


class Evidence:
    """The tidy tables, looked up by hypothesis.

    Of `provenance`, `every_problem` holds, for each suite and reduction, the problems that the
    reduction needs.
    """

    def __init__(
        self,
        metrics: Sequence[Row],
        speedups: Sequence[Row],
        provenance: Mapping[str, Any],
    ) -> None:
        self.run, self.device = provenance["run"], provenance["device"]
        self.every_problem: Mapping[str, Mapping[str, Sequence[str]]] = provenance["every_problem"]
        self._run_of: dict[tuple[str, ...], str] = {}
        self.metrics: dict[tuple[str, ...], dict[str, float]] = {}
        for row in metrics:
            key = tuple(row[c] for c in ("suite", "regime", "subject", "metric", "problem"))
            self.metrics.setdefault(key, {})[row["statistic"]] = float(row["value"])
            for known in (key[:4], key[:2]):
                self._run_of[known] = row.get("run", self.run)
        self.by_metric: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
        for (suite, regime, subject, metric, problem), values in self.metrics.items():
            by_problem = self.by_metric.setdefault((suite, regime, subject, metric), {})
            by_problem[problem] = values
        keys = ("suite", "regime", "subject", "peer", "problem")
        self.speedups = {tuple(row[c] for c in keys): row for row in speedups}
        self.host_pairs: dict[tuple[str, str], dict[str, float]] = {}
        for (suite, regime, _, metric, problem), values in self.metrics.items():
            if metric.startswith("aa_") and regime == NO_REGIME:
                self.host_pairs.setdefault((suite, problem), {})[metric] = values["value"]
        self.conclusive = {
            (suite, regime, problem)
            for (suite, regime, _, metric, problem), values in self.metrics.items()
            if metric == "conclusive" and values["value"]
        }

    def run_of(self, hypothesis: Hypothesis, suite: str) -> str:
        """The run that what a hypothesis speaks of was measured in."""
        place = (suite.partition("/")[0], hypothesis.regime)
        what = (hypothesis.witness["subject"], str(hypothesis.witness.get("metric")))
        return self._run_of.get(place + what) or self._run_of.get(place) or self.run

    def values(
        self, suite: str, regime: str, subject: str, metric: str, only: str | None = None
    ) -> list[float]:
        """A metric of every problem of a suite or a part of it (`suite/part`), or of one."""
        whole, _, part = suite.partition("/")
        by_problem = self.by_metric.get((whole, regime, subject, metric), {})
        wanted = {only} if only else set(by_problem)
        if part:
            wanted &= set(self.every_problem.get(suite, {}).get(MINIMUM, ()))
        kept = [v for problem, v in by_problem.items() if problem in wanted]
        return [v["value"] if "value" in v else v["median"] for v in kept]

    def noise_floor(self, suite: str, regime: str) -> float:
        """How far the A/A pairs of the conclusive problems of a suite depart from 1."""
        ratios = [
            values["median"]
            for (s, r, subject, metric), by_problem in self.by_metric.items()
            if (s, r, metric) == (suite, regime, "aa_ratio")
            for problem, values in by_problem.items()
            if (suite, regime, problem) in self.conclusive
        ]
        return stats.noise_floor(ratios) if ratios else 0.0

    def floor(self, hypothesis: Hypothesis, suite: str) -> float:
        """How far, relatively, an A/A pair is from 1 where a hypothesis is on times: of GPU times
        the worst of the suite, of host times the worst that the metric is made of."""
        witness = hypothesis.witness
        if witness["kind"] == "speedup":
            return self.noise_floor(suite, hypothesis.regime)
        if witness.get("metric") not in HOST_PAIRS:
            return 0.0
        pairs = self.host_pairs.get((suite, witness["problem"]), {})
        kinds = HOST_PAIRS[witness["metric"]]
        return stats.noise_floor([pairs.get(f"aa_{kind}", 1.0) for kind in kinds])

    def stands(self, hypothesis: Hypothesis, suite: str) -> bool:
        """Whether what a hypothesis speaks of was measured on every problem that it names, with an
        A/A pair that agreed; a median leaves out problems whose pair did not, at most a tenth, but
        no others, and where some problems may be off these may be missing."""
        witness, regime = hypothesis.witness, hypothesis.regime
        if hypothesis.every is not None:
            needed = self.every_problem.get(suite, {}).get(hypothesis.every, ())
            return bool(needed) and self.missing(hypothesis, suite) <= witness.get("all_but", 0)
        if witness.get("problem", MEDIAN) == MEDIAN:
            needed = self.every_problem.get(suite, {}).get(MINIMUM, ())
            off = [p for p in needed if (suite, regime, p) not in self.conclusive]
            of_times = witness["kind"] == "speedup" or hypothesis.predicts
            if of_times and len(off) > LEFT_OUT * len(needed):
                return False
            return bool(needed) and all(self._tried(hypothesis, suite, p) for p in needed)
        if witness["kind"] == "counter":
            return True
        if witness.get("metric") in HOST_PAIRS:
            return agree(self.host_pairs.get((suite, witness["problem"]), {}), witness["metric"])
        return (suite, regime, witness["problem"]) in self.conclusive

    def missing(self, hypothesis: Hypothesis, suite: str) -> int:
        """Of how many problems that it names a hypothesis over all of them knows nothing."""
        needed = self.every_problem.get(suite, {}).get(str(hypothesis.every), ())
        had = (self._has(hypothesis.witness, suite, hypothesis.regime, p) for p in needed)
        return sum(not has for has in had)

    def _tried(self, hypothesis: Hypothesis, suite: str, problem: str) -> bool:
        """Whether a problem was measured, with whatever A/A pair."""
        witness, regime = hypothesis.witness, hypothesis.regime
        whole = suite.partition("/")[0]
        if witness["kind"] == "speedup":
            return (whole, regime, witness["subject"], witness["peer"], problem) in self.speedups
        metric = "gpu_us" if hypothesis.predicts else witness["metric"]
        return (whole, regime, witness["subject"], metric, problem) in self.metrics

    def _has(self, witness: Mapping[str, Any], suite: str, regime: str, problem: str) -> bool:
        if witness["kind"] == "counter":
            return (suite, regime, witness["subject"], witness["metric"], problem) in self.metrics
        key = (suite, regime, witness["subject"], witness["peer"], problem)
        return key in self.speedups and (suite, regime, problem) in self.conclusive

    def interval(self, hypothesis: Hypothesis, suite: str) -> Interval | None:
        """The effect that a hypothesis speaks of, in one suite; None where it was not measured."""
        witness, regime = hypothesis.witness, hypothesis.regime
        subject = witness["subject"]
        if witness["kind"] == "speedup":
            row = self.speedups.get((suite, regime, subject, witness["peer"], witness["problem"]))
            if row is None:
                return None
            low, high = float(row["ci_low"]), float(row["ci_high"])
            processes = int(row["n_processes"])
            n = int(row["n"])
            return Interval(float(row["ratio"]), low, high, max(processes - 1, 1), processes, n)
        if witness["kind"] == "measured":
            key = (suite, regime, subject, witness["metric"], witness["problem"])
            values = self.metrics.get(key)
            if values is None:
                return None
            processes = int(values["n_processes"])
            return Interval(
                values["median"],
                values["ci_low"],
                values["ci_high"],
                max(processes - 1, 1),
                processes,
                int(values["n"]),
            )
        found = self.values(suite, regime, subject, witness["metric"], witness.get("problem"))
        if not found:
            return None
        reduce = witness.get("reduce", "median")
        if reduce == "median":
            return stats.over_values(found)
        ranked = sorted(found, reverse=reduce == "max")
        most = witness.get("all_but", 0)
        least = max(0, most - self.missing(hypothesis, suite))  # as if all that are missing are off
        if_off, if_fine = (ranked[min(n, len(ranked) - 1)] for n in (least, most))
        low, high = sorted((if_off, if_fine))
        return Interval(if_off, low, high, float("inf"), len(found), len(found))

    def control(self, control: Mapping[str, str] | None) -> str:
        """`passed`, `failed`, `not measured`, or `none` where no control is named; `passed` says
        how many doses were measured where they are not all.

        The witness must rise from each dose to the next by more than it differs among kernels
        without a dose. Those are one and the same kernel in every control's file: they are the A/A
        arm, and without two of them nothing is known.
        """
        if control is None:
            return "none"
        doses: dict[int, float] = {}
        without: list[float] = []
        undosed = set(zero_doses().values())
        for suite, regime, subject, metric in self.by_metric:
            if (suite, metric) != (control["suite"], control["metric"]):
                continue
            value = float(np.median(self.values(suite, regime, subject, metric)))
            name, _, dose = subject.rpartition(".")
            if name == control["subject"]:
                doses[int(dose)] = value
            if subject in undosed:
                without.append(value)
        if len(doses) < LEAST or len(without) < 2:
            return "not measured"
        spread = max(without) - min(without)
        rises = [after - before for before, after in pairwise(doses[d] for d in sorted(doses))]
        if not all(rise > spread for rise in rises):
            return "failed"
        planned = sum(name.startswith(f"{control['subject']}.") for name in stage.subjects())
        some = f" ({len(doses)} of {planned} doses)" if len(doses) < planned else ""
        return PASSED + some


def read_rows(path: Path) -> list[Row]:
    """The rows of a tidy table."""
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def prediction_errors(metrics: Sequence[Row], predictions: Sequence[Row]) -> list[Row]:
    """Rows of metrics.csv: by how many percent a predicted time departs from the measured one, on
    every problem whose A/A pair agreed."""
    predicted = {
        (row["device"], row["problem"], row["subject"]): float(row["predicted_us"])
        for row in predictions
    }
    conclusive = {
        (row["suite"], row["regime"], row["problem"])
        for row in metrics
        if row["metric"] == "conclusive" and float(row["value"])
    }
    found: list[Row] = []
    for row in metrics:
        us = predicted.get((row["device"], row["problem"], row["subject"]))
        wanted = (row["metric"], row["statistic"], row["regime"]) == ("gpu_us", "median", "spaced")
        if us and wanted and (row["suite"], row["regime"], row["problem"]) in conclusive:
            error = 100 * abs(us / float(row["value"]) - 1)
            changed = {"metric": PREDICTION_ERROR, "unit": "%", "statistic": "value"}
            found.append({**row, **changed, "value": str(error)})
    return found


def judge(
    constraints: Constraints,
    metrics: Sequence[Row],
    speedups: Sequence[Row],
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row for each hypothesis and suite, and one for each constraint over its suites.

    Rows follow the order of constraints.yaml. An effect that was not measured is left blank.
    """
    evidence = Evidence(metrics, speedups, provenance)
    fixed = provenance["constraints_sha256"] == [constraints.sha256]
    predicted = provenance.get("predictions_sha256") == [constraints.predictions_sha256]
    controls = {
        name: evidence.control(constraint["control"])
        for name, constraint in constraints.constraints.items()
    }
    found: dict[tuple[str, str], Interval | None] = {}
    primary: dict[str, float] = {}
    for hypothesis in constraints.hypotheses:
        for suite in hypothesis.suites:
            interval = evidence.interval(hypothesis, suite)
            found[(hypothesis.id, suite)] = interval
            if hypothesis.role == "primary":
                known = interval if evidence.stands(hypothesis, suite) else None
                primary[f"{hypothesis.id} {suite}"] = p_value(known, hypothesis)
    adjusted = stats.holm(primary)

    rows: list[dict[str, Any]] = []
    by_constraint: dict[str, dict[str, str]] = {}
    for hypothesis in constraints.hypotheses:
        is_ratio = hypothesis.witness["kind"] == "speedup"
        control = "-"
        if hypothesis.controlled:
            control = controls[hypothesis.constraint]
        elif is_ratio:
            control = AA
        for suite in hypothesis.suites:
            interval = found[(hypothesis.id, suite)]
            floor = evidence.floor(hypothesis, suite)
            known = interval if evidence.stands(hypothesis, suite) else None
            verdict = decide(known, hypothesis, floor)
            name = f"{hypothesis.id} {suite}"
            if name in adjusted and adjusted[name] >= 1 - stats.LEVEL:
                verdict = INCONCLUSIVE
            if hypothesis.controlled and not control.startswith(PASSED):
                verdict = INCONCLUSIVE
            told = control
            if hypothesis.controlled and hypothesis.role != "primary":
                told = f"{BORROWED}{control}"
            post_hoc = "" if fixed and (predicted or not hypothesis.predicts) else POST_HOC
            if hypothesis.role == "primary":
                by_constraint.setdefault(hypothesis.constraint, {})[suite] = verdict
            rows.append(_row(evidence, hypothesis, suite, interval, told, verdict + post_hoc))
    for name, verdicts in by_constraint.items():
        hypothesis = next(
            h for h in constraints.hypotheses if (h.constraint, h.role) == (name, "primary")
        )
        distinct = sorted(set(verdicts.values()))
        overall = distinct[0]
        if len(distinct) > 1:
            overall = f"{PARTLY}: " + ", ".join(f"{v} in {s}" for s, v in verdicts.items())
        wholes = {suite.partition("/")[0] for suite in hypothesis.suites}
        whole = wholes.pop() if len(wholes) == 1 else None
        interval = evidence.interval(hypothesis, whole) if whole else None
        overall += "" if fixed else POST_HOC
        row = _row(evidence, hypothesis, ALL_SUITES, interval, controls[name], overall)
        rows.append(row)
    return rows


def _row(
    evidence: Evidence,
    hypothesis: Hypothesis,
    suite: str,
    found: Interval | None,
    control: str,
    verdict: str,
) -> dict[str, Any]:
    low = found.low if found else 0.0
    if found and hypothesis.witness["kind"] == "counter":
        low = max(
            low, min(0.0, found.value)
        )  # no counter is negative; the symmetric interval may be
    return {
        "run": evidence.run_of(hypothesis, suite),
        "device": evidence.device,
        "constraint": hypothesis.constraint or hypothesis.role,
        "suite": suite,
        "regime": hypothesis.regime,
        "subject": hypothesis.witness["subject"],
        "metric": hypothesis.metric,
        "effect": "" if found is None else found.value,
        "ci_low": "" if found is None else low,
        "ci_high": "" if found is None else found.high,
        "threshold": hypothesis.threshold,
        "control": control,
        "verdict": verdict,
    }


def judge_tables(
    constraints: Path,
    metrics: Sequence[Row],
    speedups: Sequence[Row],
    provenance: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """`judge` by the claims in a file, with the error of the predictions beside it."""
    path = constraints.with_name(PREDICTIONS)
    predicted = prediction_errors(metrics, read_rows(path) if path.is_file() else [])
    return judge(read_constraints(constraints), [*metrics, *predicted], speedups, provenance)


def verdicts(metrics: Path, speedups: Path, provenance: Path, constraints: Path) -> str:
    """The text of verdicts.csv from the tidy tables and the claims."""
    tables = read_rows(metrics), read_rows(speedups), json.loads(provenance.read_text())
    return csv_text(COLUMNS, judge_tables(constraints, *tables), sort=False)
