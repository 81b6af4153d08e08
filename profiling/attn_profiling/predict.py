"""What each stage should take, and what should limit it, said before it is measured.

- *Counts* come from the algorithm and from a stage's tiles (`Tiles`), rates from the device table.
- A *step* is one block of keys for every warpgroup of a CTA. How long it takes follows from what
  the stage lets overlap (`step_cycles`).
- A *tile* is its steps, one product and one softmax that nothing hides, and a fixed overhead.
- The *schedule* hands tiles to SMs as the stage does (`finish`), so waves and imbalance count.
- The *clock* is the one measured before a launch, lowered by the load (`loaded_mhz`).

What is empirical is a `Fitted` constant. All were fitted to `config/pilot.csv`, times of earlier
runs, and to counters of single kernels. `attn-profiling predict --write` puts the predictions into
a file that is committed before the run that it is compared with; `predates` checks that it was.
"""

from __future__ import annotations

import csv
import heapq
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import median

from attn_ladder.problem import DTYPE_BYTES, Problem, read_problems
from attn_profiling.device import Device, Peak, device
from attn_profiling.record import predictions_sha256
from attn_profiling.tidy import csv_text

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5")
SUITES = ("grid", "gate")
DEVICE = "h100-sxm-80gb"
PILOT = Path("config/pilot.csv")
TARGET = {"stage4": 0.15, "stage5": 0.15}
"""Largest error that the model may have in the median of the grid."""
ROWS = 64
"""Query rows of a warpgroup."""


class Fitted(Peak):
    """A constant that follows from no specification; `source` says what it was fitted to."""


_STEP = "pilot times, seqlen 4096 and more"
_TILE = "pilot times, seqlen 512 and 1024; for stage 5 also clock stamps (CONTRIBUTING)"
STEP_LATENCY = {
    "stage1": Fitted(280, "cycles", _STEP),
    "stage2": Fitted(760, "cycles", _STEP),
    "stage3": Fitted(760, "cycles", _STEP),
    "stage4": Fitted(310, "cycles", _STEP),
    "stage5": Fitted(130, "cycles", f"{_STEP}; handing a turn on took 140 to 190 in clock stamps"),
}
"""What a step waits for beside its resources: barriers, the reductions of the maximum, turns."""
TILE_OVERHEAD = {
    "stage1": Fitted(8000, "cycles", _TILE),
    "stage2": Fitted(5500, "cycles", _TILE),
    "stage3": Fitted(5500, "cycles", _TILE),
    "stage4": Fitted(3000, "cycles", _TILE),
    "stage5": Fitted(2500, "cycles", _TILE),
}
"""Per tile beside its steps and one exposed product and softmax: loads of Q, epilogue, launch."""
START_US = Fitted(4.0, "us", "an empty kernel takes 2.5 in the record; the rest, pilot times, b1")
COPY_BYTES_PER_S = Fitted(3.0e12, "byte/s", "device to device copy, device.json of pilot run r1")
IDLE_MHZ = Fitted(1980, "MHz", "clock of the spin kernel before each launch, pilot run r1")
CLOCK_UNDER_LOAD = Fitted(0.934, "1", "cycles over time of 20 kernels in Nsight Compute")
CLOCK_PER_TENSOR = Fitted(0.157, "1", "the same; tensor pipe 3 % to 48 %, and its pilot times")


@dataclass(frozen=True)
class Tiles:
    """The part of a stage's configuration that costs time.

    A CTA computes `warpgroups` × 64 query rows against `keys` keys a step; `instructions` is what a
    warp issues for 64 rows in a step, read from the machine code. `overlap`:

    - `step`: the warpgroups move in step, products and softmax in turn; another CTA may fill in.
    - `free`: each warpgroup runs products and softmax in turn; warpgroups meet by chance.
    - `own`: warpgroups take turns to issue products; the softmax runs under them.
    - `others`: a turn lasts until the products are complete; the softmax runs under the others'.

    `order`: `launched` one CTA a tile; `snake` fixed lists, back and forth; `strided` fixed lists;
    `pairs` fixed lists of a long and a short tile; `counter` asked for one tile ahead. The last
    three orders but `strided` take heads in groups whose K and V fit in `l2_bytes`.
    """

    keys: int
    instructions: int
    overlap: str
    order: str
    ctas: int = 1
    warpgroups: int = 2
    half_diagonal: bool = False
    l2_bytes: int = 32 << 20

    @property
    def rows(self) -> int:
        """Query rows of a CTA."""
        return ROWS * self.warpgroups


def tiles(subject: str, problem: Problem) -> Tiles:
    """What a stage makes of a problem: `CONFIGS` of stages 1 to 4, `choose_config` of stage 5.

    Raises `ValueError` where the model has no say.
    """
    if subject not in STAGES:
        raise ValueError(f"{subject=} is not predicted; known: {', '.join(STAGES)}")
    size = (problem.seqlen_q, problem.seqlen_k)
    if problem.headdim not in (64, 128) or size[0] != size[1] or size[0] % 128:
        raise ValueError(
            f"problem {problem.id}: headdim={problem.headdim}, seqlen_q={size[0]},"
            f" seqlen_k={size[1]}: the model covers headdim 64 and 128 and equal lengths that are"
            " multiples of 128"
        )
    wide, causal, seqlen = problem.headdim == 128, problem.causal, problem.seqlen_k
    ctas = 1 if wide else 2
    if subject == "stage1":
        return Tiles(64, 407 if wide else 330, "step", "launched", ctas)
    if subject == "stage2":
        return Tiles(128 if wide else 64, 546 if wide else 312, "free", "launched", ctas)
    if subject == "stage3":
        return Tiles(128 if wide else 64, 550 if wide else 308, "free", "snake", ctas)
    if subject == "stage4":
        return Tiles(128, 572 if wide else 528, "own" if wide else "others", "snake")
    order = "counter" if causal else "strided"
    if wide and causal and seqlen <= 2048:
        return Tiles(128, 310, "own", "pairs", half_diagonal=True, l2_bytes=16 << 20)
    if wide:
        return Tiles(128, 310, "own", order, half_diagonal=causal)
    if causal and seqlen <= 4096:
        l2_bytes = (8 if seqlen <= 512 else 16) << 20
        return Tiles(128, 294, "others", order, half_diagonal=True, l2_bytes=l2_bytes)
    return Tiles(128, 296, "others", order, warpgroups=2 if seqlen <= 1024 else 3)


@dataclass(frozen=True)
class Demand:
    """Cycles that one warpgroup's step takes of each resource of an SM, if it had it alone."""

    tensor: float
    mufu: float
    issue: float
    shared: float
    l2: float

    @property
    def products(self) -> float:
        """The two matrix products."""
        return max(self.tensor, self.shared)

    @property
    def softmax(self) -> float:
        """Everything between them."""
        return max(self.mufu, self.issue)


def demand(t: Tiles, problem: Problem, gpu: Device) -> Demand:
    """What 64 query rows × `t.keys` keys need."""
    peak = {name: found.value for name, found in gpu.peaks.items()}
    size, headdim = DTYPE_BYTES[problem.dtype], problem.headdim
    pairs = ROWS * t.keys
    flops_per_clk = peak["bf16_flops_per_s"] / (gpu.boost_clock_mhz * 1e6 * gpu.sms)
    # K and V pass once for each warpgroup through shared memory, once for each CTA through L2
    shared_bytes = size * headdim * (2 * t.keys + ROWS)
    l2_bytes = size * headdim * 2 * t.keys / t.warpgroups
    return Demand(
        tensor=4 * pairs * headdim / flops_per_clk,
        mufu=pairs / peak["mufu_per_clk_per_sm"],
        issue=t.instructions * 4 / peak["issue_per_clk_per_sm"],  # four warps
        shared=shared_bytes / peak["shared_bytes_per_clk_per_sm"],
        l2=l2_bytes / (peak["l2_bytes_per_clk"] / gpu.sms),
    )


def meeting_by_chance(demands: Sequence[float], streams: int, latency: float) -> float:
    """Cycles of a round of `streams` that queue for the same resources, each then idle `latency`.

    Mean value analysis of a closed queueing network (Reiser and Lavenberg, 1980).
    """
    queues = [0.0] * len(demands)
    cycles = latency + sum(demands)
    for n in range(1, streams + 1):
        waits = [d * (1 + q) for d, q in zip(demands, queues, strict=True)]
        cycles = latency + sum(waits)
        queues = [n * w / cycles for w in waits]
    return cycles


def step_cycles(t: Tiles, need: Demand, latency: float, ctas: int) -> float:
    """Cycles of a step of a CTA while `ctas` of them share the SM."""
    n, products, softmax = t.warpgroups, need.products, need.softmax
    if t.overlap == "step":
        step = meeting_by_chance([n * products, n * softmax], ctas, latency)
    elif t.overlap == "free":
        step = meeting_by_chance([products, softmax], n * ctas, latency)
    elif t.overlap == "own":
        step = max(n * products, products + n * softmax) + latency
    else:
        step = max(n * (products + latency), products + latency + softmax, n * softmax)
    return max(step, n * ctas * need.l2)


def key_blocks(t: Tiles, problem: Problem, m: int) -> int:
    """Steps of the `m`th tile of a head; blocks that touch the diagonal are computed whole."""
    end = min(problem.seqlen_k, (m + 1) * t.rows) if problem.causal else problem.seqlen_k
    return math.ceil(end / t.keys)


def work(t: Tiles, problem: Problem, slots: int) -> list[tuple[int, int]]:
    """(steps, tiles) of each piece of work in the order in which a stage hands it out."""
    num_m, heads = math.ceil(problem.seqlen_q / t.rows), problem.batch * problem.nheads
    steps = [key_blocks(t, problem, m) for m in reversed(range(num_m))]  # the longest first
    if t.order == "pairs":
        pairs = zip(islice(steps, num_m // 2), reversed(steps), strict=False)
        return [(a + b, 2) for a, b in pairs] * heads
    if t.order in ("launched", "strided"):
        return [(n, 1) for n in steps] * heads
    head_bytes = 2 * problem.seqlen_k * problem.headdim * DTYPE_BYTES[problem.dtype]
    fitting = t.l2_bytes * problem.nheads / (head_bytes * problem.nheads_k)
    if t.order == "snake":
        group = next((n for n in range(slots, 0, -1) if slots % n == 0 and n <= fitting), 1)
    else:
        group = min(heads, max(1, int(fitting)))
        group = math.ceil(heads / math.ceil(heads / group))
    found = []
    for first in range(0, heads, group):
        found += [(n, 1) for n in steps for _ in range(min(group, heads - first))]
    return found


def finish(costs: Sequence[float], order: str, slots: int) -> float:
    """When the last of `slots` is done."""
    if order in ("launched", "counter"):
        # a CTA asks the counter for its next tile when it begins one, not when it has ended it
        ahead = order == "counter"
        running = [(0.0 if ahead else c, i, c) for i, c in enumerate(costs[:slots])]
        heapq.heapify(running)
        for cost in costs[slots:]:
            _, i, end = running[0]
            heapq.heapreplace(running, (end if ahead else end + cost, i, end + cost))
        return max(end for _, _, end in running)
    loads = [0.0] * slots
    for i, cost in enumerate(costs):
        round_, place = divmod(i, slots)
        loads[slots - 1 - place if order == "snake" and round_ % 2 else place] += cost
    return max(loads)


@dataclass(frozen=True)
class Prediction:
    """Microseconds of a kernel, and of each resource if it alone had to be waited for."""

    us: float
    resources: dict[str, float]
    tail_us: float
    clock_mhz: float
    loaded_mhz: float

    @property
    def limit(self) -> str:
        """The resource that is busiest; all of them where several are within 2 %."""
        most = max(self.resources.values())
        return "+".join(name for name, us in self.resources.items() if us >= 0.98 * most)

    @property
    def busy(self) -> float:
        """The share of the time in which the limiting resource is busy."""
        return max(self.resources.values()) / self.us


@cache
def predict(
    problem: Problem, subject: str, slug: str = DEVICE, clock_mhz: float = IDLE_MHZ.value
) -> Prediction:
    """What a stage takes on a problem; `clock_mhz` is the clock before the launch.

    Raises `ValueError` for a subject or a problem that the model does not cover.
    """
    gpu = device(slug)
    t = tiles(subject, problem)
    need = demand(t, problem, gpu)
    num_tiles = math.ceil(problem.seqlen_q / t.rows) * problem.batch * problem.nheads
    resident = min(t.ctas, math.ceil(num_tiles / gpu.sms))
    slots = gpu.sms * t.ctas
    step = step_cycles(t, need, STEP_LATENCY[subject].value, resident)
    overhead = need.products + need.softmax + TILE_OVERHEAD[subject].value
    pieces = work(t, problem, slots)
    costs = [steps * step + count * overhead for steps, count in pieces]
    cycles = finish(costs, t.order, slots)

    computed = sum(steps for steps, _ in pieces) * t.warpgroups  # warpgroups' steps
    products = computed - (num_tiles / 2 if t.half_diagonal else 0)
    tensor = products * need.tensor / gpu.sms
    loaded = clock_mhz * (CLOCK_UNDER_LOAD.value - CLOCK_PER_TENSOR.value * tensor / cycles)
    each = computed / gpu.sms / loaded
    dram_us = problem.min_bytes / COPY_BYTES_PER_S.value * 1e6
    return Prediction(
        us=max(cycles / loaded, dram_us) + START_US.value,
        resources={
            "tensor": tensor / loaded,
            "MUFU": products * need.mufu / gpu.sms / loaded,
            "issue": each * need.issue,
            "shared memory": each * need.shared,
            "L2": each * need.l2,
            "DRAM": dram_us,
        },
        tail_us=(cycles - sum(costs) / slots) / loaded,
        clock_mhz=clock_mhz,
        loaded_mhz=loaded,
    )


# -- the committed file

COLUMNS = (
    "device",
    "problem",
    "subject",
    "predicted_us",
    "limit",
    "busy_percent",
    "tail_us",
    "clock_mhz",
    "loaded_mhz",
)


def rows(problems: Mapping[str, Problem]) -> list[dict[str, object]]:
    """The rows of predictions.csv: every stage on every problem of the grid and the gate."""
    found: list[dict[str, object]] = []
    for problem in problems.values():
        if not set(SUITES) & set(problem.suites):
            continue
        for subject in STAGES:
            prediction = predict(problem, subject)
            found.append(
                {
                    "device": DEVICE,
                    "problem": problem.id,
                    "subject": subject,
                    "predicted_us": f"{prediction.us:.1f}",
                    "limit": prediction.limit,
                    "busy_percent": f"{100 * prediction.busy:.0f}",
                    "tail_us": f"{prediction.tail_us:.1f}",
                    "clock_mhz": f"{prediction.clock_mhz:.0f}",
                    "loaded_mhz": f"{prediction.loaded_mhz:.0f}",
                }
            )
    return found


def text(problems: Path) -> str:
    """The text of predictions.csv for a table of problems."""
    return csv_text(COLUMNS, rows(read_problems(problems)), sort=False)


def pilot_errors(problems: Path, path: Path = PILOT) -> dict[tuple[str, str], list[float]]:
    """Predicted over pilot time less 1, by source of the pilot times and stage."""
    known = read_problems(problems)
    errors: dict[tuple[str, str], list[float]] = {}
    with path.open(newline="") as handle:
        for row in csv.DictReader(handle):
            us = predict(known[row["problem"]], row["subject"]).us
            key = (row["source"], row["subject"])
            errors.setdefault(key, []).append(us / float(row["us"]) - 1)
    return errors


def off(errors: Sequence[float]) -> float:
    """The size of an error in the median."""
    return median(abs(e) for e in errors)


def predates(commits: Sequence[str], recorded: Sequence[str | None], path: Path) -> bool:
    """Whether the predictions in a file were there before a run was measured.

    They were if at every commit the run was measured at the file was committed as it is here. Where
    git does not know a commit, the hashes that the run recorded of the file have to be this one's.
    """
    here = predictions_sha256(path)
    if here is None or not commits:
        return False
    then = [_committed(commit, path) for commit in commits]
    if None in then:
        return list(recorded) == [here]
    return set(then) == {here}


def _committed(commit: str, path: Path) -> str | None:
    """Hash of a file at a commit, empty if it is not there; None where git cannot say."""
    root = path.resolve().parent
    git = ["git", "-c", "safe.directory=*", "-C", str(root)]
    try:
        known = subprocess.run(
            [*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True
        )
        if known.returncode:
            return None
        shown = subprocess.run([*git, "show", f"{commit}:./{path.name}"], capture_output=True)
    except OSError:
        return None
    return "" if shown.returncode else sha256(shown.stdout).hexdigest()
