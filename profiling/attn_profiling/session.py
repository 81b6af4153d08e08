"""One measuring command on one GPU: what it is measured on, and what rides along."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attn_profiling import device
from attn_profiling.record import Record, constraints_sha256, header, predictions_sha256, read
from attn_profiling.settings import INPUT_DISTRIBUTION, Settings


def timed_beside(run_dir: Path, suite: str) -> tuple[str, Record]:
    """(name, record) of the spaced timings of a suite, which stand for the machine of a suite that
    was interrupted for good. Raises `RecordError` if there are none."""
    name = f"timing/{suite}.spaced.json"
    return name, read(run_dir / name, "timing")


def closed_header(
    kind: str, beside: tuple[str, Record], names: Iterable[str], files: Iterable[Path]
) -> Record:
    """The header of a record of `names` that is made without a GPU from `files` of an interrupted
    measurement.

    Commit, packages and GPU are those of the record `beside`, which `provenance.closed` says; the
    GPU's state before and after is not known, and times are those of the files.
    """
    name, known = beside
    commit, dirty = device.commit(Path.cwd())
    times = [path.stat().st_mtime for path in files]
    unknown = dict.fromkeys(known["provenance"]["before"])
    provenance = {
        **known["provenance"],
        "before": unknown,
        "after": unknown,
        "closed": {
            "commit": commit,
            "dirty": dirty,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance_of": name,
        },
        "started": datetime.fromtimestamp(min(times), UTC).isoformat(timespec="seconds"),
        "seconds": round(max(times) - min(times), 1),
    }
    return header(
        kind,
        run=known["run"],
        suite=known["suite"],
        content=known["content"],
        provenance=provenance,
        subjects={n: known["subjects"][n] for n in names},
    )


class Session:
    """Opened before measuring; `header` closes it with the state after."""

    def __init__(
        self, settings: Settings, subjects: Iterable[str], gpu: device.Gpu | None = None
    ) -> None:
        self.settings = settings
        self.gpu = gpu or device.open_gpu()
        self.content = device.content(self.gpu, settings.measuring_fields)
        if settings.fa3_module != device.FA3_MODULE:
            self.content["fa3_module"] = settings.fa3_module
        self.environment = {"ATTN_LADDER_FA3_MODULE": settings.fa3_module}
        self.subjects = {
            name: device.subject_identity(name, settings.fa3_module) for name in subjects
        }
        self._before = self.gpu.state()
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()

    def header(self, kind: str, suite: str | None) -> Record:
        """The header of a record, with provenance up to this moment."""
        commit, dirty = device.commit(Path.cwd())
        provenance: dict[str, Any] = {
            "gpu_uuid": self.gpu.uuid,
            "before": self._before,
            "after": self.gpu.state(),
            "packages": device.packages(),
            "image_digest": os.environ.get("ATTN_LADDER_IMAGE_DIGEST") or None,
            "engine": os.environ.get("ATTN_LADDER_ENGINE") or "none",
            "commit": commit,
            "dirty": dirty,
            "seed": self.settings.measuring.seed,
            "input_distribution": INPUT_DISTRIBUTION,
            "constraints_sha256": constraints_sha256(self.settings.constraints),
            "predictions_sha256": predictions_sha256(),
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),
        }
        return header(
            kind,
            run=self.settings.run,
            suite=suite,
            content=self.content,
            provenance=provenance,
            subjects=self.subjects,
        )
