"""The A/A pairs of host times: a subject of each problem is measured twice in the same processes,
as itself and as its twin (`fa3#2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

HOST_TOLERANCE = 0.1
"""How far from 1 the host's A/A pair may be: host times repeat less well than GPU times."""
HOST_PAIRS = {
    "launch_share": ("eager_latency_us", "graph_gpu_us"),
    "launch_share_graph": ("graph_latency_us", "graph_gpu_us"),
    "per_sequence_eager": ("eager_latency_us",),
    "eager_gain": ("eager_latency_us",),
    "host_over_fa3": ("eager_host_us",),
}
"""The kinds of host time that a metric is made of: their A/A pairs have to agree."""
KINDS = (
    "eager_host_us",
    "eager_latency_us",
    "graph_latency_us",
    "graph_gpu_us",
    "fresh_pointer_host_us",
)


def twin_of(samples: Mapping[str, Any]) -> str | None:
    """The A/A twin among the subjects of a problem whose original is there, too."""
    return next((s for s in samples if "#" in s and s.split("#")[0] in samples), None)


def ratios(samples: Mapping[str, Any]) -> dict[str, float]:
    """Median time of the twin over that of its original, for each kind that both have; empty
    without a twin."""
    twin = twin_of(samples)
    if twin is None:
        return {}
    pair = samples[twin], samples[twin.split("#")[0]]
    found: dict[str, float] = {}
    for kind in KINDS:
        times = [each[kind] for each in pair if each.get(kind)]
        if len(times) == 2:
            again, first = (float(np.median(np.concatenate(taken))) for taken in times)
            found[kind] = again / first
    return found


def off(samples: Mapping[str, Any]) -> dict[str, float]:
    """The ratios that do not agree, of the kinds that a metric is made of."""
    needed = {kind for kinds in HOST_PAIRS.values() for kind in kinds}
    return {
        kind: ratio
        for kind, ratio in ratios(samples).items()
        if kind in needed and abs(ratio - 1) > HOST_TOLERANCE
    }
