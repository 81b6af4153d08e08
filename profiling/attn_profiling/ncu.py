"""Nsight Compute over a suite: one process of ncu for each problem, with all its subjects.

A subject is called once to warm up and once inside an NVTX push/pop range of the domain
`attn_ladder`, named `<problem>.<subject>`; only what runs in such a range is profiled. The number
of kernels in each range is asserted from the report. Durations under the profiler are never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem
from attn_profiling.check import gate
from attn_profiling.device import find_ncu, ncu_version
from attn_profiling.metrics import ncu_metrics
from attn_profiling.ncu_rep import DOMAIN, BadReport, open_report
from attn_profiling.partial import Partial
from attn_profiling.record import (
    Record,
    content_key,
    problem_fields,
    problem_of,
    write,
    write_text,
)
from attn_profiling.session import Session
from attn_profiling.settings import Settings
from attn_profiling.timing import known_choices, spaced_rows

TIMEOUT_S = 900.0
# suites that get every section; the others get the listed counters
FULL = ("profile", "control")


_UNKNOWN_COUNTER = re.compile(
    r"(?:Failed to find metric|unknown metrics?:?)\s+(?:regex:)?([^\s,]+)", re.I
)


class NcuError(RuntimeError):
    """Nsight Compute could not do what was asked; the text says why and what to do."""


def range_name(problem: str, subject: str) -> str:
    """The NVTX range of one call. Raises `ValueError` for characters that break ncu's filter."""
    name = f"{problem}.{subject}"
    if not re.fullmatch(r"[A-Za-z0-9._#-]+", name):
        raise ValueError(
            f"range name {name!r} has characters that ncu's --nvtx-include takes for syntax; use"
            " letters, digits, '.', '_' and '-'"
        )
    return name


def command(
    ncu: str, report: Path, sections: str, ranges: list[str], program: list[str]
) -> list[str]:
    """The command line of ncu. Clocks stay as they are."""
    words = [ncu, "--export", str(report), "--force-overwrite", "--clock-control", "none"]
    words += ["--target-processes", "application-only", "--import-source", "no"]
    words += ["--set", "full"] if sections == "full" else ["--section", "SourceCounters"]
    words += ["--metrics", ",".join(ncu_metrics()), "--nvtx"]
    for name in ranges:
        words += ["--nvtx-include", f"{DOMAIN}@{name}/"]
    return [*words, *program]


def explain(output: str, version: str | None, where: str) -> str:
    """What ncu's messages mean and what to do about them."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("==ERROR==")]
    if "ERR_NVGPUCTRPERM" in output:
        return (
            f"{where}: no permission to read hardware counters (ERR_NVGPUCTRPERM). Run as root, or"
            " in a container with --cap-add=SYS_ADMIN, or let an administrator set the driver"
            " option NVreg_RestrictProfilingToAdminUsers=0 (in /etc/modprobe.d) and reload it"
        )
    match = re.search(
        r"(?:Failed to find metric|unknown metrics?:?)\s+(?:regex:)?([^\s,]+)", output, re.I
    )
    if match:
        return (
            f"{where}: ncu {version} does not know the counter {match.group(1)}; it is named in"
            " attn_profiling/metrics.py: correct it there, or use the ncu version of the record"
        )
    if "No kernels were profiled" in output:
        return (
            f"{where}: no kernels were profiled: no range matched --nvtx-include; the worker must"
            f" push ranges in the domain {DOMAIN} (package nvtx) with the names that are asked for"
        )
    shown = "\n  ".join(lines or output.strip().splitlines()[-8:])
    return f"{where}: ncu {version} failed:\n  {shown}"


def check_report(
    data: bytes, name: str, problem: str, subjects: list[str], expected: Mapping[str, int]
) -> dict[str, int]:
    """Kernels of each subject's range.

    `expected`: how many a subject launches when it is timed, where that is known. Raises `NcuError`
    where a range is missing or foreign, or holds another number.
    """
    try:
        kernels = open_report(data, name, [])
    except BadReport as error:
        raise NcuError(str(error)) from None
    wanted = {range_name(problem, subject): subject for subject in subjects}
    counts: Counter[str] = Counter()
    for kernel in kernels:
        found = [wanted[r] for r in kernel.ranges if r in wanted]
        if len(found) != 1:
            raise NcuError(
                f"{name}: kernel {kernel.name} lies in the ranges {list(kernel.ranges)}, expected"
                f" one of {sorted(wanted)}; the report is of another problem"
            )
        counts[found[0]] += 1
    missing = [subject for subject in subjects if not counts[subject]]
    if missing:
        raise NcuError(
            f"{name}: no kernel was profiled in the range"
            f" {range_name(problem, missing[0])}; profile again"
        )
    for subject in subjects:
        if counts[subject] != expected.get(subject, counts[subject]):
            raise NcuError(
                f"{name}: {counts[subject]} kernels of {subject} were profiled, but it launches"
                f" {expected[subject]} when it is timed: it behaves differently under the profiler,"
                " or kernels escaped the range"
            )
    return {subject: counts[subject] for subject in subjects}


def timed_kernels(run_dir: Path, suite: str) -> dict[str, dict[str, int]]:
    """{problem id: {subject: kernels of a call}} from the spaced timings of this run.

    ncu profiles neither memsets nor memcpys.
    """
    known: dict[str, dict[str, int]] = {}
    for row in spaced_rows(run_dir, suite):
        counts = known.setdefault(row["problem"]["id"], {})
        for name, sample in row["attempts"][-1]["samples"].items():
            counts[name] = sum(n for kernel, n in sample["kernels"].items() if kernel[:3] != "Mem")
    return known


def profile_problem(
    ncu: str,
    problem: Problem,
    subjects: list[str],
    chosen: Mapping[str, Any],
    sections: str,
    report: Path,
    seed: int,
    environment: Mapping[str, str],
    expected: Mapping[str, int],
    program: list[str] | None = None,
) -> tuple[str, dict[str, int]]:
    """Profile all subjects of one problem into `report`: (its sha256, kernels of each subject).

    The report is renamed into place when it has been read and its kernels counted.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    partial = report.with_name(f".{problem.id}.{os.getpid()}.ncu-rep")
    request = {
        "problem": problem_fields(problem),
        "subjects": subjects,
        "chosen": {name: chosen.get(name) for name in subjects},
        "seed": seed,
    }
    asked = report.parent / ".partial" / f"{problem.id}.request.json"

    write_text(asked, json.dumps(request))
    worker = program or [sys.executable, "-m", "attn_profiling.cli", "profile-worker"]
    words = command(
        ncu,
        partial,
        sections,
        [range_name(problem.id, s) for s in subjects],
        [*worker, str(asked)],
    )
    log = report.parent / ".partial" / f"{problem.id}.log"
    try:
        try:
            done = subprocess.run(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                env={**os.environ, **environment},
            )
        except subprocess.TimeoutExpired:
            raise NcuError(f"{problem.id}: ncu did not finish in {TIMEOUT_S:.0f} s") from None
        write_text(log, done.stdout)
        version = ncu_version()
        if done.returncode or "==ERROR==" in done.stdout or not partial.is_file():
            raise NcuError(explain(done.stdout, version, problem.id) + f"\nSee {log}")
        data = partial.read_bytes()
        counts = check_report(data, str(report), problem.id, subjects, expected)
        os.replace(partial, report)
        return hashlib.sha256(data).hexdigest(), counts
    finally:
        partial.unlink(missing_ok=True)


def work(request_file: Path) -> None:
    """The profiled program: each subject once outside and once inside its range."""

    import nvtx
    import torch

    from attn_ladder.stage import load
    from attn_profiling.inputs import Rotation, bound

    request = json.loads(request_file.read_text())
    problem = problem_of(request["problem"])
    rotation = Rotation(torch, problem, 2, request["seed"], "cuda")
    with torch.inference_mode():
        for name in request["subjects"]:
            config = request["chosen"].get(name)
            call = bound(load(name).forward, rotation, problem.causal, config)
            call(0)
            torch.cuda.synchronize()
            nvtx.push_range(range_name(problem.id, name), domain=DOMAIN)
            out = call(1)
            torch.cuda.synchronize()
            nvtx.pop_range(domain=DOMAIN)
            del out


def run(settings: Settings, suite: str, sections: str | None, out: Path) -> Record:
    """Profile a suite and write its index. Reports that are there and valid are kept."""
    from attn_profiling.progress import progress

    sections = sections or ("full" if suite in FULL else "listed")
    if sections not in ("full", "listed"):
        raise ValueError(f"{sections=} must be full or listed")
    problems = settings.suite(suite)
    subjects = settings.subjects_of(suite, "profile")
    allowed = gate(settings.run_dir, problems, subjects)
    session = Session(settings, subjects)
    ncu = find_ncu()
    if ncu is None:
        raise NcuError(
            "Nsight Compute (ncu) was not found: install the package nsight-compute of NVIDIA's"
            " CUDA repository, or put it on PATH, or name it in ATTN_LADDER_NCU; to measure"
            " without counters, empty the config key suites.profile"
        )
    fields = {p.id: problem_fields(p) for p in problems}
    hashes = {name: entry["kernel_hash"] for name, entry in session.subjects.items()}
    runnable = {p.id: [n for n, why in allowed[p.id].items() if why is None] for p in problems}
    known = known_choices(settings.run_dir, suite)
    chosen = {p.id: known.get(p.id, {}) for p in problems}
    timed = timed_kernels(settings.run_dir, suite)
    store = Partial(
        out.parent / ".partial" / suite,
        lambda p: content_key(
            session.content,
            fields[p.id],
            {
                **hashes,
                "with": ",".join(runnable[p.id]),
                "sections": sections,
                "counters": ",".join(ncu_metrics()),
                "chosen": repr(chosen[p.id]),
            },
        ),
    )
    reports = []
    with progress(f"profile {suite} ({sections})", len(problems)) as tell:
        for problem in problems:
            report = out.parent / suite / f"{problem.id}.ncu-rep"
            left_out = {n: why for n, why in allowed[problem.id].items() if why is not None}
            entry = store.get(1, 0, problem)
            if entry is None or not _intact(report, entry["sha256"]):
                if not runnable[problem.id]:
                    raise NcuError(f"problem {problem.id}: no subject passed the check: {left_out}")
                sha256, counts = profile_problem(
                    ncu,
                    problem,
                    runnable[problem.id],
                    chosen[problem.id],
                    sections,
                    report,
                    settings.measuring.seed,
                    session.environment,
                    timed.get(problem.id, {}),
                )
                entry = {
                    "problem": fields[problem.id],
                    "file": f"ncu/{suite}/{report.name}",
                    "sha256": sha256,
                    "sections": sections,
                    "subjects": counts,
                    "chosen": {n: chosen[problem.id].get(n) for n in runnable[problem.id]},
                    "left_out": left_out,
                }
                store.put(1, 0, problem, entry)
            reports.append(entry)
            tell(problem.id)
    data = {**session.header("ncu", suite), "reports": reports}
    write(out, data, "ncu")
    store.clear()
    return data


def _intact(report: Path, sha256: str) -> bool:
    return report.is_file() and hashlib.sha256(report.read_bytes()).hexdigest() == sha256
