"""Nsight Compute over a suite: one process of ncu for a few problems, with all their subjects.

A subject is called once to warm up and once inside an NVTX push/pop range of the domain
`attn_ladder`, named `<problem>.<subject>`; only what runs in such a range is profiled. The number
of kernels in each range is asserted from the report. Durations under the profiler are never used.

A process of ncu writes one report, so problems that were profiled together share a file; the index
says for each problem which one. A problem that fails leaves those before and after it as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from attn_ladder.problem import Problem
from attn_ladder.stage import kernel_hash
from attn_profiling.check import explain as explain_exception
from attn_profiling.check import gate, poisons_process
from attn_profiling.device import find_ncu, ncu_version
from attn_profiling.metrics import ncu_metrics
from attn_profiling.ncu_rep import DOMAIN, BadReport, kernel_ranges
from attn_profiling.partial import Partial
from attn_profiling.record import (
    Record,
    content_key,
    problem_fields,
    problem_of,
    write,
    write_text,
)
from attn_profiling.session import Session, closed_header, timed_beside
from attn_profiling.settings import Settings
from attn_profiling.timing import known_choices, spaced_rows

TIMEOUT_S = 900.0
# the suite that gets every section; the others get the listed counters
FULL = ("profile",)
# Most problems of one process of ncu: what an interruption costs is about two minutes.
MOST = {"full": 5, "listed": 16}

_UNKNOWN_COUNTER = re.compile(
    r"(?:Failed to find metric|unknown metrics?:?)\s+(?:regex:)?([^\s,]+)", re.I
)
_NO_PERMISSION = "ERR_NVGPUCTRPERM"

Item = TypeVar("Item")


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


@dataclass(frozen=True)
class Ask:
    """What is to be profiled of a problem. `expected`: how many kernels a subject launches when it
    is timed, where that is known."""

    problem: Problem
    subjects: list[str]
    chosen: Mapping[str, Any]
    expected: Mapping[str, int]

    @property
    def ranges(self) -> dict[str, str]:
        """The subject of each NVTX range."""
        return {range_name(self.problem.id, subject): subject for subject in self.subjects}


@dataclass(frozen=True)
class Taken:
    """What one process of ncu left behind.

    `counts`: kernels of each subject of the problems that are whole in the report `file`. `failed`:
    why others are not. `left`: those that it did not come to.
    """

    file: str
    sha256: str
    counts: dict[str, dict[str, int]]
    failed: dict[str, str]
    left: list[Ask]


def even(items: Sequence[Item], most: int) -> list[list[Item]]:
    """`items` in as few parts of at most `most` as there can be, of about the same size."""
    parts = -(-len(items) // most)
    edges = [len(items) * i // parts for i in range(parts + 1)] if parts else [0]
    return [list(items[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def command(
    ncu: str,
    report: Path,
    sections: str,
    ranges: Iterable[str],
    dtypes: Iterable[str],
    program: list[str],
) -> list[str]:
    """The command line of ncu. Clocks stay as they are; ncu's own advice is not asked for."""
    words = [ncu, "--export", str(report), "--force-overwrite", "--clock-control", "none"]
    words += ["--target-processes", "application-only", "--import-source", "no"]
    words += ["--apply-rules", "no"]
    words += ["--set", "full"] if sections == "full" else ["--section", "SourceCounters"]
    words += ["--metrics", ",".join(ncu_metrics(dtypes)), "--nvtx"]
    for name in ranges:
        words += ["--nvtx-include", f"{DOMAIN}@{name}/"]
    return [*words, *program]


def explain(output: str, version: str | None, where: str) -> str:
    """What ncu's messages mean and what to do about them."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("==ERROR==")]
    if _NO_PERMISSION in output:
        return (
            f"{where}: no permission to read hardware counters (ERR_NVGPUCTRPERM). Run as root, or"
            " in a container with --cap-add=SYS_ADMIN, or let an administrator set the driver"
            " option NVreg_RestrictProfilingToAdminUsers=0 (in /etc/modprobe.d) and reload it"
        )
    match = _UNKNOWN_COUNTER.search(output)
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
    data: bytes, name: str, asks: Sequence[Ask]
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Kernels of each subject's range, and what is wrong, each by problem.

    A problem is wrong where a range is missing or holds another number of kernels than `expected`.
    Raises `NcuError` where the report cannot be read or a kernel lies in a range that was not asked
    for.
    """
    try:
        kernels = kernel_ranges(data, name)
    except BadReport as error:
        raise NcuError(str(error)) from None
    wanted = {each: (ask.problem.id, s) for ask in asks for each, s in ask.ranges.items()}
    found: Counter[tuple[str, str]] = Counter()
    for kernel, ranges in kernels:
        ours = [wanted[r] for r in ranges if r in wanted]
        if len(ours) != 1:
            raise NcuError(
                f"{name}: kernel {kernel} lies in the ranges {list(ranges)}, expected one of"
                f" {sorted(wanted)}; the report is of another problem"
            )
        found[ours[0]] += 1
    counts: dict[str, dict[str, int]] = {}
    wrong: dict[str, str] = {}
    for ask in asks:
        here = {subject: found[ask.problem.id, subject] for subject in ask.subjects}
        message = _wrong_counts(name, ask, here)
        if message is None:
            counts[ask.problem.id] = here
        else:
            wrong[ask.problem.id] = message
    return counts, wrong


def _wrong_counts(name: str, ask: Ask, counts: Mapping[str, int]) -> str | None:
    for subject, count in counts.items():
        if not count:
            return (
                f"{name}: no kernel was profiled in the range"
                f" {range_name(ask.problem.id, subject)}; profile again"
            )
        if count != ask.expected.get(subject, count):
            return (
                f"{name}: {count} kernels of {subject} were profiled, but it launches"
                f" {ask.expected[subject]} when it is timed: it behaves differently under the"
                " profiler, or kernels escaped the range"
            )
    return None


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


def profile(
    ncu: str,
    asks: list[Ask],
    sections: str,
    folder: Path,
    seed: int,
    environment: Mapping[str, str],
    program: list[str] | None = None,
) -> Taken:
    """Profile all subjects of some problems in one process of ncu, with a report in `folder`.

    The report is renamed into place when it has been read and its kernels counted. Raises
    `NcuError` where nothing can be said of single problems: no permission, an unknown counter, a
    foreign report.
    """
    first = asks[0].problem.id
    partial = folder / f".{first}.{os.getpid()}.ncu-rep"
    asked = folder / ".partial" / f"{first}.request.json"
    log = folder / ".partial" / f"{first}.log"
    request = {
        "problems": [
            {
                "problem": problem_fields(ask.problem),
                "subjects": ask.subjects,
                "chosen": {name: ask.chosen.get(name) for name in ask.subjects},
            }
            for ask in asks
        ],
        "seed": seed,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(asked, json.dumps(request))
    _diary(asked).unlink(missing_ok=True)
    worker = program or [sys.executable, "-m", "attn_profiling.cli", "profile-worker"]
    words = command(
        ncu,
        partial,
        sections,
        [name for ask in asks for name in ask.ranges],
        {ask.problem.dtype for ask in asks},
        [*worker, str(asked)],
    )
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
            began = _read_diary(asked)[0] or first
            raise NcuError(f"{began}: ncu did not finish in {TIMEOUT_S:.0f} s") from None
        write_text(log, done.stdout)
        return _sorted_out(asks, partial, done.stdout, done.returncode, asked, f"\nSee {log}")
    finally:
        partial.unlink(missing_ok=True)


def _sorted_out(
    asks: list[Ask], partial: Path, output: str, status: int, asked: Path, see: str
) -> Taken:
    """Which problems are whole in a report, from it, from what ncu said and from the worker's
    diary."""
    began, failed = _read_diary(asked)
    ids = [ask.problem.id for ask in asks]
    broken = bool(status) or "==ERROR==" in output
    said = explain(output, ncu_version(), began or ", ".join(ids)) + see
    if _NO_PERMISSION in output or _UNKNOWN_COUNTER.search(output):
        raise NcuError(said)
    if began is not None:  # the worker died in it
        failed[began] = said
    if not failed and (broken or not partial.is_file()):
        raise NcuError(said)
    counts: dict[str, dict[str, int]] = {}
    file, sha256 = "", ""
    if partial.is_file():
        data = partial.read_bytes()
        try:
            counts, wrong = check_report(data, str(partial.with_name(f"{ids[0]}.ncu-rep")), asks)
        except NcuError:
            if not failed:
                raise
        else:
            failed = failed or wrong
        counts = {name: count for name, count in counts.items() if name not in failed}
        if counts:
            sha256 = hashlib.sha256(data).hexdigest()
            kept = ids[0] if len(asks) == 1 else f"{next(iter(counts))}-{sha256[:8]}"
            file = f"{kept}.ncu-rep"
            os.replace(partial, partial.with_name(file))
    left = [ask for ask in asks if ask.problem.id not in counts.keys() | failed.keys()]
    return Taken(file, sha256, counts, failed, left)


def _diary(request_file: Path) -> Path:
    return request_file.with_suffix(".diary")


def _read_diary(request_file: Path) -> tuple[str | None, dict[str, str]]:
    """The problem that the worker began and did not finish, and why others failed in it."""
    began, failed = None, {}
    path = _diary(request_file)
    for text in path.read_text().splitlines() if path.is_file() else []:
        line = json.loads(text)
        began = line.get("begin")
        if "failed" in line:
            failed[line["failed"]] = line["why"]
    return began, failed


def work(request_file: Path) -> None:
    """The profiled program: each subject once outside and once inside its range.

    What it began and finished stands in a diary beside the request. A problem that fails is
    skipped, unless CUDA is unusable after it.
    """
    import torch

    request = json.loads(request_file.read_text())
    with _diary(request_file).open("w", buffering=1) as diary, torch.inference_mode():
        for entry in request["problems"]:
            problem = problem_of(entry["problem"])
            diary.write(json.dumps({"begin": problem.id}) + "\n")
            line = {"done": problem.id}
            poisoned = False
            try:
                _call_each(problem, entry["subjects"], entry["chosen"], request["seed"])
            except Exception as error:
                where = ".".join([problem.id, *getattr(error, "__notes__", [])])
                line = {"failed": problem.id, "why": f"{where}: {explain_exception(error)}"}
                poisoned = poisons_process(error)
            diary.write(json.dumps(line) + "\n")
            if poisoned:
                return
            torch.cuda.empty_cache()


def _call_each(problem: Problem, subjects: list[str], chosen: Mapping[str, Any], seed: int) -> None:
    import nvtx
    import torch

    from attn_ladder.stage import load
    from attn_profiling.compile_cache import forget_hashes
    from attn_profiling.inputs import Rotation, bound

    rotation = Rotation(torch, problem, 2, seed, "cuda")
    for name in subjects:
        forget_hashes()
        try:
            call = bound(load(name).forward, rotation, problem.causal, chosen.get(name))
            call(0)
            torch.cuda.synchronize()
            nvtx.push_range(range_name(problem.id, name), domain=DOMAIN)
            try:
                out = call(1)
                torch.cuda.synchronize()
            finally:
                nvtx.pop_range(domain=DOMAIN)
            del out
        except Exception as error:
            error.add_note(name)
            raise


def run(settings: Settings, suite: str, sections: str | None, out: Path) -> Record:
    """Profile a suite and write its index. Reports that are there and valid are kept."""
    from attn_profiling.progress import progress

    sections = sections or ("full" if suite in FULL else "listed")
    if sections not in ("full", "listed"):
        raise ValueError(f"{sections=} must be full or listed")
    problems = settings.profiled(suite)
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
                "counters": ",".join(ncu_metrics((p.dtype,))),
                "chosen": repr(chosen[p.id]),
            },
        ),
    )
    folder = out.parent / suite
    entries: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with progress(f"profile {suite} ({sections})", len(problems)) as tell:
        todo = []
        for problem in problems:
            entry = store.get(1, 0, problem)
            if entry is not None and _intact(settings.run_dir / entry["file"], entry["sha256"]):
                entries[problem.id] = entry
                tell(problem.id)
            elif not runnable[problem.id]:
                reasons = allowed[problem.id]
                failed[problem.id] = f"problem {problem.id}: no subject passed the check: {reasons}"
            else:
                expected = timed.get(problem.id, {})
                todo.append(Ask(problem, runnable[problem.id], chosen[problem.id], expected))
        waiting = even(todo, MOST[sections])
        while waiting:
            taken = profile(
                ncu, waiting.pop(0), sections, folder, settings.measuring.seed, session.environment
            )
            for name, counts in taken.counts.items():
                entries[name] = {
                    "problem": fields[name],
                    "file": f"ncu/{suite}/{taken.file}",
                    "sha256": taken.sha256,
                    "sections": sections,
                    "subjects": counts,
                    "chosen": {n: chosen[name].get(n) for n in counts},
                    "left_out": {n: w for n, w in allowed[name].items() if w is not None},
                }
                store.put(1, 0, settings.problems[name], entries[name])
                tell(name)
            failed |= taken.failed
            waiting = ([taken.left] if taken.left else []) + waiting
    if failed:
        raise NcuError(
            f"{suite}: {len(entries)} of {len(problems)} problems were profiled and are kept; the"
            " same command goes on with the others:\n" + "\n".join(failed.values())
        )
    data = {**session.header("ncu", suite), "reports": [entries[p.id] for p in problems]}
    write(out, data, "ncu")
    store.clear()
    named = {Path(entry["file"]).name for entry in entries.values()}
    for path in folder.glob("*.ncu-rep"):
        if path.name not in named:
            path.unlink()
    return data


def close(settings: Settings, suite: str, sections: str | None, out: Path) -> Record:
    """Write the index of a suite that was interrupted for good, without a GPU.

    ncu, when it is stopped, writes what it has: subjects whose kernels are all there are recorded,
    the others are left out, with the reason; `provenance.closed` says so (see `closed_header`).
    Raises `NcuError` where nothing is whole, or kernels are no longer those of the run.
    """
    beside = timed_beside(settings.run_dir, suite)
    names = settings.subjects_of(suite, "profile")
    for name in names:
        entry = beside[1]["subjects"].get(name)
        if entry is None or entry["kernel_hash"] != kernel_hash(name):
            raise NcuError(f"{suite}: {name} is not the kernel that was timed in this run; measure")
    problems = settings.profiled(suite)
    allowed = gate(settings.run_dir, problems, names)
    timed = timed_kernels(settings.run_dir, suite)
    folder = out.parent / suite
    known = known_choices(settings.run_dir, suite)
    entries: list[dict[str, Any]] = []
    files: list[Path] = []
    for problem in problems:
        runnable = [name for name, why in allowed[problem.id].items() if why is None]
        ask = Ask(problem, runnable, {}, timed.get(problem.id, {}))
        newest = lambda path: path.stat().st_mtime
        for path in sorted(folder.glob(f".{problem.id}.*.ncu-rep"), key=newest, reverse=True):
            content = path.read_bytes()
            found = Counter(r for _, ranges in kernel_ranges(content, str(path)) for r in ranges)
            counts = {
                subject: found[name]
                for name, subject in ask.ranges.items()
                if found[name] == ask.expected.get(subject, found[name]) != 0
            }
            if not counts:
                continue
            missing = [name for name in runnable if name not in counts]
            cut = dict.fromkeys(missing, "interrupted before it was profiled")
            reasons = {n: why for n, why in allowed[problem.id].items() if why is not None}
            files.append(path)
            entries.append(
                {
                    "problem": problem_fields(problem),
                    "file": f"ncu/{suite}/{problem.id}.ncu-rep",
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "sections": sections or ("full" if suite in FULL else "listed"),
                    "subjects": counts,
                    "chosen": {n: known.get(problem.id, {}).get(n) for n in counts},
                    "left_out": {**reasons, **cut},
                }
            )
            break
    if len(entries) < len(problems):
        raise NcuError(
            f"{suite}: of {len(problems)} problems {len(entries)} are in reports of an interrupted"
            f" ncu in {folder}; profile the others with the same run"
        )
    data = {**closed_header("ncu", beside, names, files), "reports": entries}
    for path, entry in zip(files, entries, strict=True):
        os.replace(path, out.parent.parent / entry["file"])
    write(out, data, "ncu")
    return data


def _intact(report: Path, sha256: str) -> bool:
    return report.is_file() and hashlib.sha256(report.read_bytes()).hexdigest() == sha256
