"""Runs that complete a recorded one: timings, host costs and serving that it lacks, measured later.

`measurements/<device>/addenda/<run>/` is a whole run of one board, with its own checks, of which
the timings, the host costs and the parts of serving are rendered beside those of the recorded run.
Each file is rendered from one run, so a ratio never crosses two; every row says which run it is
from. A check that failed there counts as a failure of the recorded run's, and one of the kernel and
problem that are here stands for a recorded one that is stale; suites that the recorded run did not
check are rendered, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attn_ladder.problem import Problem, read_problems
from attn_profiling import host_pairs
from attn_profiling.promote import LIMIT_BYTES, NotPromoted, complete, copied, kind_of
from attn_profiling.record import Record, read, stale, stale_problem

FOLDER = "addenda"
KINDS = ("timing", "host", "serving")


def runs(raw: Path) -> list[Path]:
    """The addenda of a recorded run, by name."""
    return sorted(path.parent for path in (raw / FOLDER).glob("*/device.json"))


def files(raw: Path, kind: str) -> list[Path]:
    """The records of a kind, by name: those of the run in `raw` and of its addenda, which take the
    place of those there that do not stand (see `fault`)."""
    found = {path.name: path for path in (raw / kind).glob("*.json")}
    for run in runs(raw) if kind in KINDS else ():
        for path in (run / kind).glob("*.json"):
            held = found.get(path.name)
            if held is None or held.parent.parent == raw or _fault_of(held):
                found[path.name] = path
    return [found[name] for name in sorted(found)]


def _fault_of(path: Path) -> str | None:
    return fault(json.loads(path.read_text()), {})


def added(raw: Path) -> dict[str, Path]:
    """{name of a record, such as timing/smoke.spaced.json: where it is} of all addenda."""
    return {name: path for name, path in _held(raw).items() if path.parent.parent != raw}


def added_by(raw: Path, run: Path) -> list[str]:
    """The names of the records that one addendum adds."""
    return sorted(name for name, path in added(raw).items() if path.parent.parent == run)


def replaced(
    raw: Path, names: Iterable[str], problems: Mapping[str, Problem]
) -> dict[str, tuple[str, str | None]]:
    """{name: (run, `fault`) of the record whose place an addendum's takes} of the names of records
    that `raw` or another addendum has, too."""
    found, chosen = {}, added(raw)
    for name in names:
        others = [run / name for run in (raw, *runs(raw)) if run / name != chosen.get(name)]
        for path in others:
            if path.is_file():
                record = read(path, kind_of(name))
                found[name] = (record["run"], fault(record, problems))
    return found


def add(
    run_dir: Path,
    recorded: Path | None = None,
    problems: Path = Path("config/problems.tsv"),
) -> Path:
    """Copy a complete run to the addenda of the recorded run of its device.

    Raises `NotPromoted` and changes nothing if the run is incomplete, has other steps than checks,
    timings, host costs and serving, repeats what was recorded and still stands, or is of another
    machine or configuration (but for how bursts are made) than the recorded run. Without the table
    `problems` it is not asked whether a recorded problem is still the same.
    """
    known = read_problems(problems) if problems.is_file() else {}
    records = complete(run_dir)
    device = records["device.json"]
    recorded = recorded or Path("measurements") / device["device"]
    if not (recorded / "device.json").is_file():
        raise NotPromoted(f"{recorded}: no recorded run that {run_dir} could complete; promote one")
    wrong = [
        f"{name}: only checks, timings, host costs and serving can be added"
        for name in records
        if name.split("/")[0] not in ("device.json", "check", *KINDS)
    ]
    target = recorded / FOLDER / run_dir.resolve().name
    wrong += [
        f"{name}: {path.parent.parent} has it whole; name only suites that are lacking"
        for name, path in _held(recorded).items()
        if name in records
        and not path.is_relative_to(target)
        and fault(json.loads(path.read_text()), known) is None
    ]
    here, there = (_machine(d) for d in (device, read(recorded / "device.json", "device")))
    wrong += [
        f"{key}={here[key]!r}, but the recorded run has {there[key]!r}"
        for key in here
        if here[key] != there[key]
    ]
    if wrong:
        raise NotPromoted(f"{run_dir} does not complete {recorded}:\n  " + "\n  ".join(wrong))
    size = sum((run_dir / name).stat().st_size for name in records)
    held = sum(path.stat().st_size for path in recorded.rglob("*") if path.is_file())
    if size + held > LIMIT_BYTES:
        raise NotPromoted(
            f"{run_dir} takes {size / 1e6:.1f} MB beside {held / 1e6:.1f} MB, together more than"
            f" {LIMIT_BYTES / 1e6:.1f} MB; name fewer suites"
        )
    copied(run_dir, ["config.json", *records], target)
    return target


def fault(record: Record, problems: Mapping[str, Problem]) -> str | None:
    """Why a record may be replaced; None where it stands. `problems` is the table, or empty."""
    entries = record.get("problems", ())
    if "closed" in record["provenance"]:
        return "interrupted"
    if any(stale(record, subject) for subject in record["subjects"]):
        return "kernel changed"
    if problems and any(stale_problem(record, entry["problem"], problems) for entry in entries):
        return "problem changed"
    kind = record["schema"].split("/")[1]
    if kind == "model" and any(
        not row.get("same", True) and "reference_error" not in row
        for row in record["token_agreement"]
    ):
        return "without fp32 logits"
    if kind == "host" and any(host_pairs.off(entry["samples"]) for entry in entries):
        return "A/A off"
    return None


def _held(recorded: Path) -> dict[str, Path]:
    return {f"{kind}/{path.name}": path for kind in KINDS for path in files(recorded, kind)}


def _machine(record: Record) -> dict[str, Any]:
    content = dict(record["content"])
    measuring = content.pop("measuring")
    return content | {k: v for k, v in measuring.items() if not k.startswith("sustained")}
