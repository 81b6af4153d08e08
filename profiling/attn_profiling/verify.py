"""A fresh run against the recorded one, claim by claim.

- How fast a subject is against a peer over a suite in a regime (median over problems of paired
  ratios). Compared is the relative change of that ratio, with its 95 % interval: PASS where the
  whole interval lies within the tolerance, FAIL where all of it lies outside, AMBIGUOUS otherwise.
- That a subject passes the gate on a suite, and decoding its checks.
- That a model's tokens are those of the references, but for ties.
- What counters, host times and the model say of a hypothesis of constraints.yaml. PASS where the
  verdicts are the same, FAIL where one supports what the other refutes. Where a run leaves it open,
  PASS if the effect moved by no more than the smallest effect of interest, else AMBIGUOUS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_profiling import addenda, ncu_rep, tidy, verdict
from attn_profiling.record import Record, read
from attn_profiling.stats import Replicates, burst_means, over_problems, ratio_replicates

TOLERANCE = 0.025  # relative change of a ratio; A/A pairs of one machine stay within 0.01
PEERS = ("fa3", "cudnn")
VERDICTS = ("PASS", "AMBIGUOUS", "FAIL")
EXIT_STATUS = {"PASS": 0, "FAIL": 1, "AMBIGUOUS": 3}


class NotComparable(ValueError):
    """Two runs that cannot be compared; the text says why."""


@dataclass(frozen=True)
class Claim:
    """One compared claim; `change`, `low`, `high` are relative, -0.05 is 5 % slower."""

    claim: str
    recorded: str
    fresh: str
    change: float | None
    low: float | None
    high: float | None
    verdict: str
    note: str | None = None


def judge(low: float, high: float, tolerance: float) -> str:
    """PASS, FAIL or AMBIGUOUS for an interval of relative change."""
    if -tolerance <= low and high <= tolerance:
        return "PASS"
    if low > tolerance or high < -tolerance:
        return "FAIL"
    return "AMBIGUOUS"


def conclusive(record: Record) -> dict[str, dict[str, Any]]:
    """Samples of the last attempt of each conclusive problem; of bursts, the means of processes."""
    sustained = record["regime"] == "sustained"
    return {
        row["problem"]["id"]: {
            name: burst_means(sample) if sustained else sample
            for name, sample in row["attempts"][-1]["samples"].items()
        }
        for row in record["problems"]
        if row["status"] == "ok"
    }


def peer(samples: Iterable[str]) -> str | None:
    """Whom the subjects of a problem are compared with."""
    present = set(samples)
    return next((name for name in PEERS if name in present), None)


def protocol(record: Record) -> dict[str, Any]:
    """What of the measuring configuration decides how a suite is timed in its regime."""
    measuring = record["content"]["measuring"]
    sustained = record["regime"] == "sustained"
    other = ("aa_tolerance", "max_attempts", "host_calls", "seed")
    return {
        key: value
        for key, value in measuring.items()
        if key not in other and key.startswith("sustained") == sustained
    }


def compare_timing(fresh: Record, recorded: Record, tolerance: float) -> list[Claim]:
    """A claim for each subject of a suite and regime that both records time against a peer."""
    ours, theirs = conclusive(fresh), conclusive(recorded)
    theirs = {problem: samples for problem, samples in theirs.items() if peer(samples)}
    where = f"{recorded['suite']} {recorded['regime']}"
    both = [problem for problem in theirs if problem in ours]
    lost = [problem for problem in theirs if problem not in ours]
    subjects = {
        name
        for problem in both
        for name in theirs[problem]
        if "#" not in name and name != peer(theirs[problem])
    }
    claims = []
    for subject in sorted(subjects):
        changes: list[Replicates] = []
        levels: list[tuple[float, float]] = []
        for problem in both:
            base = peer(theirs[problem])
            samples = (ours[problem], theirs[problem])
            if base is None or any(n not in s for s in samples for n in (subject, base)):
                continue
            now, then = (ratio_replicates(s[subject]["gpu_us"], s[base]["gpu_us"]) for s in samples)
            changes.append(now.map(np.divide, then))
            levels.append((now.value, then.value))
        claim = f"{subject} against its peer, {where}"
        if not changes:
            claims.append(
                Claim(
                    claim, "timed", "not timed", None, None, None, "AMBIGUOUS",
                    "no conclusive problem has it in both runs",
                )
            )  # fmt: skip
            continue
        interval = over_problems(changes).interval()
        low, high = interval.low - 1, interval.high - 1
        verdict, note = judge(low, high, tolerance), f"median of {len(changes)} problems"
        hashes = [r["subjects"].get(subject, {}).get("kernel_hash") for r in (fresh, recorded)]
        if hashes[0] != hashes[1]:
            verdict, note = "AMBIGUOUS", "the two runs are of different kernels; " + note
        elif protocol(fresh) != protocol(recorded):
            verdict, note = "AMBIGUOUS", "measured in another way; " + note
        elif lost and verdict == "PASS":
            verdict, note = "AMBIGUOUS", note + f"; not measured or inconclusive: {', '.join(lost)}"
        now_level, then_level = (float(np.median(column)) for column in zip(*levels, strict=True))
        claims.append(
            Claim(
                claim, f"{then_level:.3f}", f"{now_level:.3f}",
                interval.value - 1, low, high, verdict, note,
            )
        )  # fmt: skip
    return claims


def compare_check(fresh: Record, recorded: Record) -> list[Claim]:
    """A claim for each subject of a suite: what passed the gate passes it again."""
    rows = [
        {(row["problem"]["id"], row["subject"]): row for row in record["results"]}
        for record in (fresh, recorded)
    ]
    claims = []
    for subject in dict.fromkeys(name for _, name in rows[1]):
        passed = [key for key, row in rows[1].items() if key[1] == subject and row["ok"]]
        if not passed:
            continue
        broken = [key for key in passed if key in rows[0] and not rows[0][key]["ok"]]
        absent = [key for key in passed if key not in rows[0]]
        verdict = "FAIL" if broken else "AMBIGUOUS" if absent else "PASS"
        note = None
        if broken:
            note = f"{broken[0][0]}: {rows[0][broken[0]]['message']}"
        elif absent:
            note = f"not checked: {', '.join(key[0] for key in absent)}"
        claims.append(
            Claim(
                f"{subject} passes the gate, {recorded['suite']}",
                f"{len(passed)} problems", f"{len(passed) - len(broken) - len(absent)} problems",
                None, None, None, verdict, note,
            )
        )  # fmt: skip
    return claims


Judged = Sequence[Mapping[str, Any]]


def judged(
    run_dir: Path, config: Path, open_report: tidy.Open
) -> tuple[verdict.Constraints, Judged, Mapping[str, Any]]:
    """The hypotheses, the rows of verdicts.csv of a run, and its provenance."""
    tables = tidy.tidy(run_dir, "measure", config / "problems.tsv", open_report)
    hypotheses = config / "constraints.yaml"
    rows = verdict.judge_tables(hypotheses, tables.metrics, tables.speedups, tables.provenance)
    return verdict.read_constraints(hypotheses), rows, tables.provenance


def compare_verdicts(
    constraints: verdict.Constraints,
    fresh: Judged,
    recorded: Judged,
    measured: Iterable[tuple[str, str]],
) -> list[Claim]:
    """A claim for each hypothesis on counters, host times or the model that the record decides on.

    `measured`: (kind of record, suite) of the fresh run; it is not asked for what it has no record
    of. Ratios of times are compared as such, by `compare_timing`.
    """
    there = set(measured)
    claims = []
    pairs = iter(zip(fresh, recorded, strict=True))
    for hypothesis in constraints.hypotheses:
        for suite in hypothesis.suites:
            now, then = next(pairs)
            whole = suite.partition("/")[0]
            kinds = ("ncu", "host") if hypothesis.regime == tidy.NO_REGIME else ("timing",)
            asked = now["effect"] != "" or any((kind, whole) in there for kind in kinds)
            if hypothesis.witness["kind"] == "speedup" or then["effect"] == "" or not asked:
                continue
            said, note = _same(now, then, hypothesis.smallest_effect)
            was, is_ = ("–" if r["effect"] == "" else f"{r['effect']:.4g}" for r in (then, now))
            name = f"{hypothesis.id}, {suite}"
            claims.append(Claim(name, was, is_, None, None, None, said, note))
    return claims


def _same(
    now: Mapping[str, Any], then: Mapping[str, Any], smallest_effect: float
) -> tuple[str, str]:
    words = [row["verdict"].removesuffix(verdict.POST_HOC) for row in (then, now)]
    note = words[0] if words[0] == words[1] else f"recorded {words[0]}, here {words[1]}"
    if verdict.INCONCLUSIVE not in words:
        return ("PASS" if words[0] == words[1] else "FAIL"), note
    if now["effect"] == "":
        return "AMBIGUOUS", "not measured here; " + note
    near = abs(now["effect"] - then["effect"]) <= smallest_effect
    return ("PASS" if near else "AMBIGUOUS"), note


def compare_tokens(fresh: Record, recorded: Record) -> list[Claim]:
    """A claim where both ran the same model: the tokens are those of the references, but for
    ties."""
    if recorded["reason"] or fresh["reason"]:
        return []
    name = "tokens of the model are those of sdpa and eager, or ties"
    if recorded["model"] != fresh["model"]:
        files = [record["model"]["file"] for record in (recorded, fresh)]
        note = "another model"
        return [Claim(name, files[0], files[1], None, None, None, "AMBIGUOUS", note)]
    formats = [{r.get("dtype") for r in record["token_agreement"]} for record in (recorded, fresh)]
    told, wrong, rules, counts = [], [], [], []
    for record in (recorded, fresh):
        rows = [
            row
            for row in record["token_agreement"]
            if row.get("implementation", "attn_ladder") == "attn_ladder"
            and row.get("dtype") in formats[0] & formats[1]
        ]
        good = sum(row.get("same", False) or row.get("tie", False) for row in rows)
        told.append(f"{good} of {len(rows)}")
        wrong.append(len(rows) - good)
        counts.append(len(rows))
        rules.append({"reference_error" in row for row in rows if not row.get("same", True)})
    why: str | None = None
    if counts[1] < counts[0] or {"error", "stopped"} & set(fresh["errors"]):
        why = "the fresh run was cut short"
    elif rules[0] and rules[1] and rules[0] != rules[1]:
        why = "ties were judged by another rule"
    verdict = "FAIL" if wrong[1] > wrong[0] else "AMBIGUOUS" if why else "PASS"
    return [Claim(name, told[0], told[1], None, None, None, verdict, why)]


def _serving(fresh: Path, recorded: Iterable[Path], tolerance: float) -> list[Claim]:
    """Claims of decoding and of a model, of what both runs measured."""
    claims: list[Claim] = []
    for path in recorded:
        if not (fresh / path.name).is_file():
            continue
        kind = "model" if path.name == "model.json" else "decode"
        records = read(fresh / path.name, kind), read(path, kind)
        if kind == "model":
            claims += compare_tokens(*records)
            continue
        now, then = ({**record, "regime": "spaced"} for record in records)
        claims += compare_timing(now, then, tolerance)
        bad = [[row["name"] for row in r["checks"] if not row["ok"]] for r in records]
        more = sorted(set(bad[0]) - set(bad[1]))
        claim = f"checks of decoding, {path.stem}"
        counts = [f"{len(r['checks']) - len(b)} right" for r, b in zip(records, bad, strict=True)]
        verdict = "FAIL" if more else "PASS"
        note = "; ".join(more) or None
        claims.append(Claim(claim, counts[1], counts[0], None, None, None, verdict, note))
    return claims


def verify(
    fresh_dir: Path,
    recorded_dir: Path,
    tolerance: float = TOLERANCE,
    config: Path = Path("config"),
    open_report: tidy.Open = ncu_rep.open_apart,
) -> list[Claim]:
    """All claims of the recorded run; those on which the fresh run does not bear are AMBIGUOUS.
    `config` holds the hypotheses.

    Raises `NotComparable` where the runs are of different GPU models or have nothing in common.
    """
    now = read(fresh_dir / "device.json", "device")
    then = read(recorded_dir / "device.json", "device")
    if now["content"]["gpu"] != then["content"]["gpu"]:
        raise NotComparable(
            f"{fresh_dir} is of {now['content']['gpu']}, {recorded_dir} of"
            f" {then['content']['gpu']}; compare runs of one GPU model"
        )
    claims: list[Claim] = []
    lost: list[str] = []
    for kind in ("check", "timing"):
        for path in addenda.files(recorded_dir, kind):
            if not (fresh_dir / kind / path.name).is_file():
                lost.append(f"{kind}/{path.name}")
                continue
            records = read(fresh_dir / kind / path.name, kind), read(path, kind)
            if kind == "check":
                claims += compare_check(*records)
            else:
                claims += compare_timing(*records, tolerance)
    served = addenda.files(recorded_dir, "serving")
    claims += _serving(fresh_dir / "serving", served, tolerance)
    lost += [f"serving/{p.name}" for p in served if not (fresh_dir / "serving" / p.name).is_file()]
    constraints, here, provenance = judged(fresh_dir, config, open_report)
    _, there, _ = judged(recorded_dir, config, open_report)
    claims += compare_verdicts(constraints, here, there, provenance["suites"])
    if not claims:
        raise NotComparable(
            f"{fresh_dir} has no suite that {recorded_dir} has; measure one of its suites first"
        )
    return claims + [
        Claim(name, "recorded", "not measured", None, None, None, "AMBIGUOUS") for name in lost
    ]


def overall(claims: Iterable[Claim]) -> str:
    """The worst verdict."""
    found = {claim.verdict for claim in claims}
    return max(found, key=VERDICTS.index)
