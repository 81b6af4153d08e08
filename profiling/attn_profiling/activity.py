"""What ran on the GPU, call by call, from activity records.

The stream of a measured round looks like this; F empties the L2, S spins long enough for the host
to enqueue the whole call behind it, so that the call's kernels run with no host in between:

    F S call  F S call  …  F          (the last F closes the round)

Kernels after a closing F and before the next F S belong to nobody (inputs being prepared).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_KERNEL_TYPES = ("kernel", "concurrent_kernel", "gpu_memcpy", "gpu_memset")
_SYNCHRONISATION = re.compile(r"(?:event|stream|context|device) (?:sync|wait|record)", re.I)


class ActivityError(RuntimeError):
    """The records do not show the calls that were made."""


@dataclass(frozen=True)
class Activity:
    """A kernel, memset or memcpy."""

    name: str
    start_ns: int
    duration_ns: int

    @property
    def end_ns(self) -> int:
        """When it ended."""
        return self.start_ns + self.duration_ns


@dataclass(frozen=True)
class Call:
    """One call of a subject. `gap_us`: from the end of the spin to the first kernel."""

    gpu_us: float
    gap_us: float
    spin_us: float
    kernels: tuple[str, ...]
    activities: tuple[Activity, ...]


def from_kineto(events: Iterable[Any], cuda: Any) -> list[Activity]:
    """Kernels, memsets and memcpys among kineto's events, in order of their start.

    `cuda` is the device type of GPU activity. Host calls, annotations and synchronisation records
    are left out.
    """
    found = []
    for event in events:
        if event.device_type() != cuda:
            continue
        kind = getattr(event, "activity_type", None)
        if kind is not None and kind() and kind() not in _KERNEL_TYPES:
            continue
        annotation = getattr(event, "is_user_annotation", None)
        if annotation is not None and annotation():
            continue
        name = event.name()
        if _SYNCHRONISATION.match(name):
            continue
        found.append(Activity(name, event.start_ns(), event.duration_ns()))
    return sorted(found, key=lambda activity: activity.start_ns)


def split(activities: list[Activity], flush: str, spin: str) -> list[Call]:
    """The calls among `activities`, which `flush` and `spin` delimit by kernel name.

    Raises `ActivityError` where a call has no kernel, or a kernel runs beside the spin (the call
    uses a stream of its own, and what it costs cannot be told).
    """
    calls: list[Call] = []
    flushed = False
    spun: Activity | None = None
    kernels: list[Activity] = []

    def close() -> None:
        if spun is None:
            return
        if not kernels:
            raise ActivityError(f"call {len(calls)} launched no kernel")
        calls.append(
            Call(
                gpu_us=sum(k.duration_ns for k in kernels) / 1000,
                gap_us=(kernels[0].start_ns - spun.end_ns) / 1000,
                spin_us=spun.duration_ns / 1000,
                kernels=tuple(k.name for k in kernels),
                activities=tuple(kernels),
            )
        )

    for activity in activities:
        if activity.name == flush:
            close()
            flushed, spun, kernels = True, None, []
        elif activity.name == spin:
            if spun is not None:
                raise ActivityError("two spins without a flush between them; records were lost")
            spun = activity if flushed else None
            if not flushed:
                raise ActivityError("a spin without a flush before it; records were lost")
        elif spun is not None:
            if activity.start_ns < spun.end_ns:
                raise ActivityError(
                    f"kernel {activity.name[:120]} ran beside the spin before its call: it is not"
                    " ordered by the current stream"
                )
            kernels.append(activity)
        else:
            flushed = False
    close()
    return calls
