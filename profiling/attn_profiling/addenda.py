"""Runs that complete a recorded one: timings and serving that it lacks, measured later.

`measurements/<device>/addenda/<run>/` is a whole run of one board, with its own checks, of which
the timings and the parts of serving are rendered beside those of the recorded run. Each file is
rendered from one run, so a ratio never crosses two; every row says which run it is from. A check
that failed there counts as a failure of the recorded run's; suites that were not checked there are
rendered, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attn_profiling.promote import LIMIT_BYTES, NotPromoted, complete, copied
from attn_profiling.record import Record, read, stale

FOLDER = "addenda"
KINDS = ("timing", "serving")


def runs(raw: Path) -> list[Path]:
    """The addenda of a recorded run, by name."""
    return sorted(path.parent for path in (raw / FOLDER).glob("*/device.json"))


def files(raw: Path, kind: str) -> list[Path]:
    """The records of a kind, by name: those of the run in `raw` and of its addenda, which take the
    place of one that was interrupted there, or whose kernel has changed since."""
    found = {path.name: path for path in (raw / kind).glob("*.json")}
    for run in runs(raw) if kind in KINDS else ():
        found |= {path.name: path for path in (run / kind).glob("*.json")}
    return [found[name] for name in sorted(found)]


def added(raw: Path) -> dict[str, Path]:
    """{name of a record, such as timing/smoke.spaced.json: where it is} of all addenda."""
    return {name: path for name, path in _held(raw).items() if path.parent.parent != raw}


def added_by(raw: Path, run: Path) -> list[str]:
    """The names of the records that one addendum adds."""
    return sorted(name for name, path in added(raw).items() if path.parent.parent == run)


def add(run_dir: Path, recorded: Path | None = None) -> Path:
    """Copy a complete run to the addenda of the recorded run of its device.

    Raises `NotPromoted` and changes nothing if the run is incomplete, has other steps than checks,
    timings and serving, repeats what was recorded whole and still stands, or is of another machine
    or configuration (but for how bursts are made) than the recorded run.
    """
    records = complete(run_dir)
    device = records["device.json"]
    recorded = recorded or Path("measurements") / device["device"]
    if not (recorded / "device.json").is_file():
        raise NotPromoted(f"{recorded}: no recorded run that {run_dir} could complete; promote one")
    wrong = [
        f"{name}: only checks, timings and serving can be added"
        for name in records
        if name.split("/")[0] not in ("device.json", "check", *KINDS)
    ]
    target = recorded / FOLDER / run_dir.resolve().name
    wrong += [
        f"{name}: {path.parent.parent} has it whole; name only suites that are lacking"
        for name, path in _held(recorded).items()
        if name in records
        and not path.is_relative_to(target)
        and _stands(json.loads(path.read_text()))
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


def _stands(record: Record) -> bool:
    """Whether a record is whole, of kernels that are still the ones that are here."""
    return "closed" not in record["provenance"] and not any(
        stale(record, subject) for subject in record["subjects"]
    )


def _held(recorded: Path) -> dict[str, Path]:
    return {f"{kind}/{path.name}": path for kind in KINDS for path in files(recorded, kind)}


def _machine(record: Record) -> dict[str, Any]:
    content = dict(record["content"])
    measuring = content.pop("measuring")
    return content | {k: v for k, v in measuring.items() if not k.startswith("sustained")}
