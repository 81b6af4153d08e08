"""An analytic roofline of attention forward on one GPU: what each resource needs at least.

Counts come from the algorithm, rates from the device table, the clock from the run. Two times
bracket a kernel: `overlapped`, where the busiest resource hides all others, and `serial`, where
products and softmax take turns. Neither is fitted to a measurement; `predict` says what each stage
should take between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from attn_ladder.problem import DTYPE_BYTES, Problem
from attn_profiling.device import Device, Peak

BLOCK = 128
"""Rows and columns of the model's tile: one that touches the mask is computed whole."""

INSTRUCTIONS_PER_SCORE = Peak(
    4.5,
    "instructions/score",
    "scale and subtract, exp2, maximum, sum, half a conversion",
)
KERNEL_US = Peak(2.5, "us", "GPU time of a kernel that does nothing: FA3's memset in the record")


@dataclass(frozen=True)
class Roofline:
    """Microseconds that each resource needs at least, for one problem at one clock."""

    clock_mhz: float
    tensor_us: float
    mufu_us: float
    issue_us: float
    shared_us: float
    dram_us: float
    tail_us: float
    launch_us: float

    @property
    def resources(self) -> dict[str, float]:
        """The resources that can hide each other."""
        return {
            "tensor": self.tensor_us,
            "MUFU": self.mufu_us,
            "issue": self.issue_us,
            "shared memory": self.shared_us,
            "DRAM": self.dram_us,
        }

    @property
    def limit(self) -> str:
        """The resource that needs longest."""
        return max(self.resources, key=lambda name: self.resources[name])

    @property
    def overlapped_us(self) -> float:
        """The least time: everything hidden behind the busiest resource, plus launch and tail."""
        return max(self.resources.values()) + self.tail_us + self.launch_us

    @property
    def serial_us(self) -> float:
        """Products and softmax in turns, memory hidden, plus launch and tail."""
        softmax = max(self.mufu_us, self.issue_us)
        products = max(self.tensor_us, self.shared_us)
        return max(products + softmax, self.dram_us) + self.tail_us + self.launch_us


def computed_pairs(problem: Problem) -> int:
    """Query-key pairs of one head in tiles that hold a visible pair."""
    offset = problem.seqlen_k - problem.seqlen_q
    pairs = 0
    for start in range(0, problem.seqlen_q, BLOCK):
        rows = min(BLOCK, problem.seqlen_q - start)
        last_key = problem.seqlen_k if not problem.causal else start + rows + offset
        columns = min(problem.seqlen_k, BLOCK * math.ceil(max(last_key, 0) / BLOCK))
        pairs += rows * columns
    return pairs


def roofline(
    problem: Problem, device: Device, clock_mhz: float, dram_bytes_per_s: float | None = None
) -> Roofline:
    """The roofline of a problem at a measured clock; `dram_bytes_per_s` is a measured bandwidth."""
    cycles_per_us = clock_mhz * device.sms
    boost_cycles_per_s = device.boost_clock_mhz * 1e6 * device.sms
    tensor_rate = device.peaks["bf16_flops_per_s"].value / boost_cycles_per_s  # FLOP/clk/SM
    dram = dram_bytes_per_s or device.peaks["dram_bytes_per_s"].value
    heads = problem.batch * problem.nheads
    pairs = heads * computed_pairs(problem)
    size = DTYPE_BYTES[problem.dtype]
    # K and V pass through shared memory once for each 64-row warpgroup, Q once for each key tile
    shared_bytes = pairs * problem.headdim * size * (2 / 64 + 1 / BLOCK)
    tensor_us = 4 * problem.headdim * pairs / tensor_rate / cycles_per_us
    mufu_us = pairs / device.peaks["mufu_per_clk_per_sm"].value / cycles_per_us
    issue = pairs * INSTRUCTIONS_PER_SCORE.value / 32
    row_tiles = heads * math.ceil(problem.seqlen_q / BLOCK)
    waves = row_tiles / device.sms
    # whole tiles only: some SM has at least the next integer number of average tiles
    busiest = max(tensor_us, mufu_us)
    uneven = 0.0 if problem.causal and waves > 1 else busiest * (math.ceil(waves) / waves - 1)
    return Roofline(
        clock_mhz=clock_mhz,
        tensor_us=tensor_us,
        mufu_us=mufu_us,
        issue_us=issue / device.peaks["issue_per_clk_per_sm"].value / cycles_per_us,
        shared_us=shared_bytes / device.peaks["shared_bytes_per_clk_per_sm"].value / cycles_per_us,
        dram_us=problem.min_bytes / dram * 1e6,
        tail_us=uneven,
        launch_us=KERNEL_US.value,
    )


COLUMNS = ("problem", *(f.name for f in fields(Roofline)), "overlapped_us", "serial_us", "limit")


def rows(rooflines: Sequence[tuple[Problem, Roofline]]) -> list[dict[str, object]]:
    """One row for each problem, in the given order."""
    return [
        {
            "problem": problem.id,
            **{f.name: getattr(found, f.name) for f in fields(Roofline)},
            "overlapped_us": found.overlapped_us,
            "serial_us": found.serial_us,
            "limit": found.limit,
        }
        for problem, found in rooflines
    ]
