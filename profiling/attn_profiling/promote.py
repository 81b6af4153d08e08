"""A finished run becomes the recorded one of its device: checked, packed, swapped in whole."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attn_profiling.config import raw_files
from attn_profiling.record import Record, RecordError, read

LIMIT_BYTES = 20 * 10**6
KIND_OF = {
    "device.json": "device",
    "check": "check",
    "timing": "timing",
    "host": "host",
    "ncu": "ncu",
    "serving": "decode",
}


class NotPromoted(ValueError):
    """A run that cannot become the recorded one; the text lists why."""


def kind_of(name: str) -> str:
    """The kind of a raw file from its place in the run."""
    return "model" if name == "serving/model.json" else KIND_OF[name.split("/")[0]]


def complete(run_dir: Path) -> dict[str, Record]:
    """All records of a run, each read and checked.

    Raises `NotPromoted` listing everything that is missing, invalid or of another measurement.
    """
    config_file = run_dir / "config.json"
    if not config_file.is_file():
        raise NotPromoted(f"{run_dir}: no config.json, so this is no run; name runs/<id>")
    config: dict[str, Any] = json.loads(config_file.read_text())
    wrong: list[str] = []
    records: dict[str, Record] = {}
    for name in raw_files(config):
        try:
            records[name] = read(run_dir / name, kind_of(name))
        except RecordError as error:
            wrong.append(str(error))
    for name, record in records.items():
        if kind_of(name) == "ncu":
            wrong += _wrong_reports(run_dir, record)
    contents = {name: _machine(record) for name, record in records.items()}
    if len({json.dumps(c, sort_keys=True) for c in contents.values()}) > 1:
        first = next(iter(contents))
        for name, found in contents.items():
            for key, value in found.items():
                if value != contents[first][key]:
                    wrong.append(
                        f"{name}: {key}={value!r}, but {first} has {contents[first][key]!r}; one"
                        " run must be of one machine and one measuring config"
                    )
    hashes: dict[str, tuple[str, str]] = {}
    for name, record in records.items():
        for subject, entry in record["subjects"].items():
            known = hashes.setdefault(subject, (entry["kernel_hash"], name))
            if known[0] != entry["kernel_hash"]:
                wrong.append(
                    f"{name}: {subject} has kernel hash {entry['kernel_hash']}, but {known[1]} has"
                    f" {known[0]}; its kernel changed within the run"
                )
    if wrong:
        raise NotPromoted(
            f"{run_dir} is not complete; go on with `--config run={run_dir.name}`:\n  "
            + "\n  ".join(wrong)
        )
    return records


def failed_checks(run_dir: Path) -> list[str]:
    """What failed a check of a run: a kernel that is wrong, or gives other bits."""
    found = []
    for path in sorted((run_dir / "check").glob("*.json")):
        for row in read(path, "check")["results"]:
            if row["status"] == "failed":
                what = f"{row['subject']} on {row['problem']['id']}: {row['message']}"
                found.append(f"check/{path.name}: {what}")
    return found


def _machine(record: Record) -> dict[str, Any]:
    return {**record["content"], "gpu_uuid": record["provenance"]["gpu_uuid"]}


def _wrong_reports(run_dir: Path, record: Record) -> list[str]:
    wrong = []
    for entry in record["reports"]:
        path = run_dir / entry["file"]
        if not path.is_file():
            wrong.append(f"{path}: no such report; profile again")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            wrong.append(f"{path}: its sha256 is not the recorded one; profile again")
    return wrong


def pack(data: bytes) -> bytes:
    """The strongest xz."""
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def promote(
    run_dir: Path,
    target: Path | None = None,
    limit_bytes: int = LIMIT_BYTES,
    tell: Callable[[str], None] = lambda name: None,
) -> tuple[Path, int]:
    """Copy a complete run to `target`, replacing what is there: (target, bytes).

    `target` defaults to measurements/<device>. Raises `NotPromoted` and changes nothing if the run
    is incomplete or too large.
    """
    records = complete(run_dir)
    if target is None:
        target = Path("measurements") / records["device.json"]["device"]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name in ("config.json", *records):
            _copy(run_dir / name, temporary / name)
            tell(name)
        entries = [e for record in records.values() for e in record.get("reports", ())]
        reports = list(dict.fromkeys(e["file"] for e in entries))  # problems can share one
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            packing = threads.map(lambda name: pack((run_dir / name).read_bytes()), reports)
            for name, data in zip(reports, packing, strict=True):
                packed = temporary / f"{name}.xz"
                packed.parent.mkdir(parents=True, exist_ok=True)
                packed.write_bytes(data)
                tell(name)
        sizes = {p: p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
        total = sum(sizes.values())
        if total > limit_bytes:
            largest = sorted(sizes, key=lambda p: -sizes[p])[:5]
            raise NotPromoted(
                f"{run_dir} takes {total / 1e6:.1f} MB, more than {limit_bytes / 1e6:.1f} MB;"
                " profile fewer problems with all sections. Largest: "
                + ", ".join(f"{p.relative_to(temporary)} {sizes[p] / 1e6:.1f} MB" for p in largest)
            )
        temporary.chmod(0o755)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target, total


def copied(run_dir: Path, names: Iterable[str], target: Path) -> None:
    """Copy files of a run to `target`, which appears whole; what was there is removed last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name in names:
            _copy(run_dir / name, temporary / name)
        temporary.chmod(0o755)
        _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _swap(new: Path, target: Path) -> None:
    """Put `new` in the place of `target`; what was there is removed last."""
    if not target.exists():
        os.rename(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / "was")
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old / "was", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
