"""Other runs beside the recorded one, such as on another board: kept, and compared with it.

`measurements/replications/<device>/<run>/` holds a run's records of checks and times as they were
measured (no reports of counters: those of the recorded run are enough to look at). Every replay
compares their times with the recorded ones anew, as `verify` does.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from attn_profiling import addenda
from attn_profiling.promote import KIND_OF, copied
from attn_profiling.record import Record, RecordError, read, stale
from attn_profiling.stats import ratio_replicates
from attn_profiling.verify import TOLERANCE, compare_timing, conclusive, peer

KEPT = ("check", "timing")
COLUMNS = (
    "run", "gpu_uuid", "recorded_run", "recorded_gpu_uuid", "suite", "regime", "subject",
    "recorded", "fresh", "change", "low", "high", "most_problem", "most_change", "tolerance",
    "verdict", "note",
)  # fmt: skip


class NotKept(ValueError):
    """A run that cannot be kept as a replication; the text says why."""


def home(device: str) -> Path:
    """Where the replications of a device's recorded run are."""
    return Path("measurements") / "replications" / device


def runs(folder: Path) -> list[Path]:
    """The replications in a folder, by name."""
    return sorted(path.parent for path in folder.glob("*/device.json"))


def keep(run_dir: Path, target: Path | None = None) -> Path:
    """Copy a run's records of checks and times to `target`, replacing what is there.

    `target` defaults to measurements/replications/<device>/<run>. Raises `NotKept` if the run has
    no times, a record is invalid, or records are of several boards.
    """
    names = ["device.json"]
    names += sorted(str(p.relative_to(run_dir)) for k in KEPT for p in run_dir.glob(f"{k}/*.json"))
    if not any(name.startswith("timing/") for name in names):
        raise NotKept(f"{run_dir}: no times were measured; name a run that has some (runs/<id>)")
    try:
        records = {name: read(run_dir / name, KIND_OF[name.split("/")[0]]) for name in names}
    except RecordError as error:
        raise NotKept(str(error)) from None
    boards = {record["provenance"]["gpu_uuid"] for record in records.values()}
    if len(boards) > 1:
        raise NotKept(f"{run_dir}: records of {len(boards)} boards; keep a run of one")
    if target is None:
        target = home(records["device.json"]["device"]) / run_dir.resolve().name
    copied(run_dir, names, target)
    return target


def compare(recorded: Path, folder: Path, tolerance: float = TOLERANCE) -> list[dict[str, Any]]:
    """Rows of COLUMNS: each ratio to a peer that the recorded run and a replication on the same
    model of GPU have, with the problem whose ratio moved most. A run does not repeat itself.

    AMBIGUOUS, with the reason, where one of the two was measured in another way, or the kernel is
    no longer the one that was measured.
    """
    rows: list[dict[str, Any]] = []
    for fresh in runs(folder):
        for path in addenda.files(recorded, "timing"):
            if (fresh / "timing" / path.name).is_file():
                now, then = read(fresh / "timing" / path.name, "timing"), read(path, "timing")
                if now["run"] != then["run"] and now["content"]["gpu"] == then["content"]["gpu"]:
                    rows += _rows(now, then, tolerance)
    return rows


def _most(now: Record, then: Record, subject: str) -> tuple[str, float] | None:
    """The problem on which a subject's ratio to its peer changed most, and by how much."""
    ours, theirs = conclusive(now), conclusive(then)
    changes: dict[str, float] = {}
    for problem, samples in theirs.items():
        name = peer(samples)
        both = (ours.get(problem, {}), samples)
        if name is not None and all(n in s for s in both for n in (subject, name)):
            new, old = (ratio_replicates(s[subject]["gpu_us"], s[name]["gpu_us"]) for s in both)
            changes[problem] = new.value / old.value - 1
    if not changes:
        return None
    return max(changes.items(), key=lambda item: abs(item[1]))


def _rows(now: Record, then: Record, tolerance: float) -> list[dict[str, Any]]:
    common = {
        "run": now["run"],
        "gpu_uuid": now["provenance"]["gpu_uuid"] or "",
        "recorded_run": then["run"],
        "recorded_gpu_uuid": then["provenance"]["gpu_uuid"] or "",
        "suite": then["suite"],
        "regime": then["regime"],
        "tolerance": tolerance,
    }
    rows = []
    for claim in compare_timing(now, then, tolerance):
        row = {name: "" if value is None else value for name, value in asdict(claim).items()}
        subject = row.pop("claim").split()[0]
        most = _most(now, then, subject)
        if any(stale(record, subject) for record in (now, then)):
            why = "its kernel has changed since"
            row |= {"verdict": "AMBIGUOUS", "note": f"{why}; {row['note']}"}
        row |= {"most_problem": "", "most_change": ""}
        if most is not None:
            row |= {"most_problem": most[0], "most_change": most[1]}
        rows.append({**common, **row, "subject": subject})
    return rows
