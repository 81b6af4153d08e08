"""LaTeX tables of the paper and the headline table of the README, from the derived tables.

python -m paper.tables latex --results results --out paper/generated
python -m paper.tables model --results results --out results/model.csv
python -m paper.tables readme --results results --write | --check
"""

from __future__ import annotations

import ast
import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Annotated, Any

import typer

from attn_ladder import stage
from attn_ladder.problem import Problem
from attn_profiling import environment, metrics, model, predict, stats
from attn_profiling.record import write_text
from attn_profiling.tidy import csv_text, stage_before
from attn_profiling.verdict import SUPPORTED, Hypothesis
from paper import in_use
from paper.evidence import (
    BEST,
    MEDIAN,
    MINIMUM,
    PROFILE,
    REFERENCE_PEER,
    SHORTEST,
    Evidence,
    Value,
    interval,
    known_of,
    label,
    load,
    number,
    plain,
    within,
)
from paper.table import Table

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
ResultsOption = Annotated[Path, typer.Option("--results")]
ProblemsOption = Annotated[Path, typer.Option("--problems")]
ConstraintsOption = Annotated[Path, typer.Option("--constraints")]
RESULTS, PROBLEMS = Path("results"), Path("config/problems.tsv")
CONSTRAINTS = Path("config/constraints.yaml")

GATE = "gate-b16"
SPACED, SUSTAINED_REGIME = "spaced", "sustained"
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"
PUBLISHED = Path(__file__).with_name("published.csv")
FA3_BUILDS = Path(__file__).with_name("fa3_builds.csv")


_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "–": "--",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "×": r"$\times$",
    "µ": r"\textmu{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "†": r"$^\dagger$",
    "`": r"\textasciigrave{}",
    "…": r"\ldots{}",
}


def escape(text: str) -> str:
    """Text as LaTeX source."""
    return "".join(_LATEX.get(character, character) for character in text)


def latex(table: Table, stamp: str) -> str:
    """A booktabs tabular with the stamp below."""
    width = len(table.header)
    lines = [r"\fitted{%"]
    lines += [rf"\begin{{tabular}}{{@{{}}{table.align or 'l' * width}@{{}}}}", r"\toprule"]
    lines.append(" & ".join(escape(cell) for cell in table.header) + r" \\")
    for n, row in enumerate([] if table.is_empty else table.rows):
        if n == 0 or n in table.rules:
            lines.append(r"\midrule")
        lines.append(" & ".join(escape(cell) for cell in row) + r" \\")
    if table.is_empty:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{c}}{{not measured in this run}} \\"]
    lines += [r"\bottomrule", r"\end{tabular}}"]
    note = f"{table.note} " if table.note else ""
    lines.append(
        rf"\par\smallskip{{\scriptsize\raggedright {escape(note)}\textit{{{escape(stamp)}}}\par}}"
    )
    return "\n".join(lines) + "\n"


def _dagger(evidence: Evidence, suite: str, problem: Problem, regime: str = "spaced") -> str:
    return "" if evidence.conclusive(suite, problem.id, regime) else "†"


def shape(problem: Problem) -> list[str]:
    """Head dimension, mask and sequence length as cells."""
    return [str(problem.headdim), "causal" if problem.causal else "full", str(problem.seqlen_q)]


def _grid_rules(problems: Sequence[Problem]) -> frozenset[int]:
    keys = [(p.headdim, p.causal) for p in problems]
    return frozenset(n for n in range(1, len(keys)) if keys[n] != keys[n - 1])


SUSTAINED, HOST = "timing/grid.sustained.json", "host/gate.json"


def conclusive_of(evidence: Evidence, suite: str, regime: str) -> str:
    """`7 of 24`: on how many problems of a suite a regime gave conclusive ratios."""
    agreed, every = evidence.agreed(suite, regime)
    return f"{agreed} of {every}"


def of_sustained(evidence: Evidence) -> str:
    """What is to be said of the record of the sustained regime, wherever its numbers stand."""
    lost = [
        f"{item['problem']} ({item['reason']})"
        for item in evidence.provenance["excluded"]
        if (item["kind"], item["suite"], item["subject"]) == ("timing", "grid", evidence.top)
        and item.get("regime") == "sustained"
    ]
    top = label(evidence.top).capitalize()
    said = f" {top} was not timed there on {', '.join(lost)}." if lost else ""
    return evidence.added(SUSTAINED) + evidence.closed(SUSTAINED) + said


def over_bf16(evidence: Evidence) -> list[float]:
    """The top stage's time in fp16 over that in bf16, of each problem of the grid that has both."""
    return [
        value.value
        for (_, subject), value in evidence.all_of("grid_fp16", "over_bf16", "spaced").items()
        if subject == evidence.top
    ]


def grid(evidence: Evidence, suite: str = "grid") -> Table:
    """TFLOPS of every peer that ran and of the top stage, and the top stage's ratios with
    intervals; in fp16 its time over that in bf16 too."""
    top = evidence.top
    ran = {subject for _, subject in evidence.all_of(suite, "tflops", "spaced")}
    peers = [p for p in ("fa3", "cudnn", "fa4", "fa2") if p in ran]
    half = suite == "grid_fp16"
    bursts = suite == "grid" and evidence.was_measured(suite, SUSTAINED_REGIME)
    against = [p for p in peers if p != "fa2"]
    problems = evidence.suite(suite)
    rows = []
    for problem in problems:

        def tflops(subject: str, p: Problem = problem) -> str:
            return number(evidence.metric(suite, p.id, subject, "tflops", "spaced"))

        cells = [tflops(s) for s in (*peers, top)]
        ratios = [interval(evidence.speedup(suite, problem.id, top, p)) for p in against]
        if bursts:
            sustained = evidence.speedup(suite, problem.id, top, REFERENCE_PEER, "sustained")
            ratios.append(number(sustained, 3) + _dagger(evidence, suite, problem, "sustained"))
        if half:
            over = evidence.metric(suite, problem.id, top, "over_bf16", "spaced")
            ratios.append(number(over, 3))
        rows.append([*shape(problem), *cells, *ratios])
        rows[-1][2] += _dagger(evidence, suite, problem)
    times = over_bf16(evidence) if half else []
    for name, word in ((MEDIAN, "median"), (MINIMUM, "least"), (SHORTEST, "least to 1024")):
        ratios = [interval(evidence.speedup(suite, name, top, p)) for p in against]
        if bursts:
            found = evidence.speedup(suite, name, top, REFERENCE_PEER, "sustained")
            of = f" ({conclusive_of(evidence, suite, 'sustained')})"
            of = of if found and name != SHORTEST else ""
            ratios.append(number(found, 3) + of)
        if half:
            ratios.append(number(Value(median(times)), 3) if times and name == MEDIAN else "")
        rows.append(["", word, "", *[""] * (len(peers) + 1), *ratios])
    if times:
        rows.append(["", "most", *[""] * (len(rows[0]) - 3), plain(max(times), 3)])
    header = ["d", "mask", "seqlen", *[label(s) for s in (*peers, top)]]
    header += [f"over {label(p)}" for p in against]
    header += ["sustained"] if bursts else ["time / bf16"] if half else []
    last_note = ""
    if bursts:
        last_note = (
            " Sustained: over FA3, back to back; in brackets, how many problems are conclusive."
        )
    if suite == "grid":
        last_note += of_sustained(evidence)
    if half:
        last_note = f" Time / bf16: GPU time of {label(top)} over that of the same problem in bf16."
    return Table(
        header,
        rows,
        f"TFLOPS as the FA3 paper counts them; {label(top)} over each peer with 95 % intervals,"
        f" spaced launches.{last_note}{evidence.off(suite, 'spaced', 'sustained')}",
        _grid_rules(problems) | {len(problems)},
        "rlr" + "r" * (len(header) - 3),
        labels=3,
    )


def grid_stages(evidence: Evidence) -> Table:
    """Every stage over FA3 on every problem of the grid."""
    problems, stages = evidence.suite("grid"), known_of("stage")
    rows = []
    for problem in problems:
        found = [interval(evidence.speedup("grid", problem.id, s, REFERENCE_PEER)) for s in stages]
        rows.append([*shape(problem), *found])
        rows[-1][2] += _dagger(evidence, "grid", problem)
    for name, word in ((MEDIAN, "median"), (MINIMUM, "least")):
        found = [interval(evidence.speedup("grid", name, s, REFERENCE_PEER)) for s in stages]
        rows.append(["", word, "", *found])
    return Table(
        ["d", "mask", "seqlen", *map(label, stages)],
        rows,
        f"Speed over FA3 with 95 % intervals, spaced launches.{evidence.off('grid', 'spaced')}",
        _grid_rules(problems) | {len(problems)},
        "rlr" + "r" * len(stages),
        labels=3,
    )


LOADED_CLOCK = (
    "The model's clock is that of the subject under load: cycles over time in Nsight Compute (back"
    " to back NVML's during bursts), or where it was not profiled the clock before a launch,"
    " lowered by the model's line for a busy tensor pipe."
)
_PLAN_TFLOPS = {"stage2": "110", "stage3": "140", "stage4": "180", "stage5": "210-260"}


def _gate_of(evidence: Evidence, subject: str) -> float | None:
    for h in evidence.constraints.hypotheses:
        if h.role == "gate" and h.witness.get("peer") == "fa3" and h.witness["subject"] == subject:
            return h.threshold
    return None


def ladder(evidence: Evidence) -> Table:
    """The stages on the gate problem, against their gates and the model's ceiling."""
    problem = evidence.problems[GATE]
    fa3 = evidence.metric("gate", GATE, "fa3", "gpu_us", "spaced")
    rows = []
    for name in [*known_of("stage"), "fa3", "fa4", "cudnn"]:
        if name == "fa4" and name not in evidence.subjects:  # an optional peer
            continue
        ratio = evidence.speedup("gate", GATE, name, "fa3")
        gate = _gate_of(evidence, name)
        before = None
        if name.startswith("stage") and name != "stage1":
            before = evidence.speedup("gate", GATE, name, f"stage{int(name[5:]) - 1}")
        least = evidence.roofline(problem, name)
        met = "" if gate is None or ratio is None else "yes" if ratio.value >= gate else "no"
        rows.append(
            [
                label(name),
                stage.subject(name).removes or "",
                evidence.or_stale(
                    "gate", name, number(evidence.metric("gate", GATE, name, "tflops", "spaced"))
                ),
                interval(ratio, 3),
                "" if gate is None else f"{gate:.2f}",
                met,
                f"{fa3.value / least.overlapped_us:.2f}" if fa3 and least else "–",
                interval(before, 3) if before else "",
                _PLAN_TFLOPS.get(name, ""),
            ]
        )
    stages = len(known_of("stage"))
    return Table(
        ["", "removes", "TFLOPS", "over FA3", "gate", "met", "ceiling", "over the one before",
         "plan TFLOPS"],
        rows,
        "Gate problem: batch 16, 16 heads, seqlen 2048, headdim 64, causal, bf16, spaced. Ceiling:"
        f" the ratio that the model's least time would give. {LOADED_CLOCK}",
        frozenset({stages}),
        "llrrrlrrr",
        labels=2,
    )  # fmt: skip


Found = Callable[[Evidence, str, Problem, str], "float | None"]
"""What was found of a subject on a problem of a suite."""


@dataclass(frozen=True)
class Foretold:
    """What the docstring of a stage foretells, in its words, and what witnesses it.

    `holds` takes what was found of the stage before and of the stage; None where no counter
    decides. `where` are suites, each with a choice of its problems in words.
    """

    stage: str
    words: str
    title: str
    found: Found
    holds: Callable[[float, float], bool] | None
    where: Sequence[tuple[str, str, Callable[[Problem], bool]]]


def _counter(metric: str) -> Found:
    def found(evidence: Evidence, suite: str, problem: Problem, subject: str) -> float | None:
        value = evidence.metric(suite, problem.id, subject, metric)
        return None if value is None else value.value

    return found


def _waiting(evidence: Evidence, suite: str, problem: Problem, subject: str) -> float | None:
    """Percent of warp time in the stall reasons long scoreboard and barrier."""
    cycles = {
        reason: _counter(f"stall_cycles_{reason}")(evidence, suite, problem, subject)
        for reason in metrics.STALLS
    }
    known = {reason: value for reason, value in cycles.items() if value is not None}
    if len(known) < len(cycles):
        return None
    return 100 * (known["long_scoreboard"] + known["barrier"]) / sum(known.values())


def _time_over(before: str) -> Found:
    """GPU time over that of a stage, in percent, where the A/A pair agreed."""

    def found(evidence: Evidence, suite: str, problem: Problem, subject: str) -> float | None:
        if subject == before:
            return 100.0
        ratio = evidence.speedup(suite, problem.id, subject, before)
        return None if ratio is None else 100 / ratio.value

    return found


_GATE = (("the gate problem", "gate", lambda p: p.id == GATE),)
_GATE_AND_GRID = (*_GATE, ("the grid", "grid", lambda p: True))
_CAUSAL = (*_GATE, ("the grid, causal", "grid", lambda p: p.causal))
_WIDE_LONG = (("d 128, full, 8192", "grid", lambda p: p.id == "grid-d128-full-s8192"),)
FORETOLD = (
    Foretold("stage2", "CTA-wide barriers per key tile, from 2 to 0",
             "warps at CTA-wide barriers per 128×128 tile", _counter("cta_barriers"),
             lambda before, after: after < 8, _GATE_AND_GRID),
    Foretold("stage2", "the `barrier` share of the stall samples, to half of stage 1's",
             "warp time in the stall reason barrier (%)", _counter("stall_barrier"),
             lambda before, after: after <= before / 2, _GATE_AND_GRID),
    Foretold("stage3", "CTAs launched per call, from the number of query tiles to 264",
             "waves of CTAs", _counter("waves"), lambda before, after: after <= 1, _GATE_AND_GRID),
    Foretold("stage3", "idle SM cycles, to below 3 %",
             "SM cycles without a resident warp (%)", _counter("idle_sm_cycles"),
             lambda before, after: after < 3, _GATE_AND_GRID),
    Foretold("stage3", "GPU time at seqlen 512 by 10 to 20 %",
             "GPU time over stage 2's (%)", _time_over("stage2"),
             lambda before, after: 10 <= before - after <= 20,
             (("the grid, 512", "grid", lambda p: p.seqlen_q == 512),)),
    Foretold("stage3", "at 2048 by less than 5 %",
             "GPU time over stage 2's (%)", _time_over("stage2"),
             lambda before, after: abs(before - after) < 5,
             (("the grid, 2048", "grid", lambda p: p.seqlen_q == 2048),)),
    Foretold("stage4", "long-scoreboard and barrier stalls together, to below 10 % of samples",
             "warp time in both stall reasons (%)", _waiting,
             lambda before, after: after < 10, _GATE_AND_GRID),
    Foretold("stage4", "`tensor pipe active` at headdim 128, full, 8k, from below 60 % to above"
             " 80 %", "tensor pipe active (%)", _counter("tensor_pipe"),
             lambda before, after: before < 60 and after > 80, _WIDE_LONG),
    Foretold("stage5", "`tensor pipe active` at headdim 128, full, 8k from stage 4's level to 97 %",
             "tensor pipe active (%)", _counter("tensor_pipe"),
             lambda before, after: after >= 97, _WIDE_LONG),
    Foretold("stage5", "no masked instruction outside the peeled blocks",
             "threads inactive or predicated off (%)", _counter("predicated_off"), None,
             _GATE_AND_GRID),
    Foretold("stage5", "no masked instruction outside the peeled blocks",
             "tensor operations outside the visible pairs (%)", _counter("masked_work"), None,
             _CAUSAL),
)  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    """The median, with the least and the most where there are several."""
    if not values:
        return "–"
    shown, *ends = (plain(of(values), 1) for of in (median, min, max))
    return shown if ends == [shown, shown] else f"{shown} ({' to '.join(ends)})"


def _came_true(pairs: Sequence[tuple[float, float]], claim: Foretold) -> str:
    if not pairs or claim.holds is None:
        return "–"
    true = sum(claim.holds(before, after) for before, after in pairs)
    if len(pairs) == 1:
        return "yes" if true else "no"
    return f"on {true} of {len(pairs)}"


def foretold(evidence: Evidence) -> Table:
    """What each stage's file says should move, beside what did."""
    rows: list[list[str]] = []
    rules: set[int] = set()
    last = Foretold("", "", "", _waiting, None, ())
    for claim in FORETOLD:
        before = stage_before(claim.stage)
        if rows and claim.stage != last.stage:
            rules.add(len(rows))
        for n, (words, suite, chosen) in enumerate(claim.where):
            pairs = []
            for problem in filter(chosen, evidence.suite(suite)):
                then, now = (
                    claim.found(evidence, suite, problem, s) for s in (before, claim.stage)
                )
                if then is not None and now is not None:
                    pairs.append((then, now))
            rows.append(
                [
                    "" if n or claim.stage == last.stage else label(claim.stage),
                    "" if n or claim.words == last.words else claim.words.replace("`", ""),
                    "" if n else claim.title,
                    words,
                    _spread([then for then, _ in pairs]),
                    _spread([now for _, now in pairs]),
                    _came_true(pairs, claim),
                ]
            )
        last = claim
    return Table(
        ["", "foretold", "found", "on", "stage before", "stage", "came true"],
        rows,
        "Foretold: the words of the stage's file. Over several problems: the median, and the least"
        " and the most. No CTA-wide barrier is left where fewer than the 8 warps of a CTA come to"
        " one a tile. In stages 4 and 5 the idle warps of the producer's warpgroup are in the"
        " reason barrier for the whole kernel. –: no counter sees a masked instruction as such.",
        frozenset(rules),
        "lp{0.24\\linewidth}p{0.2\\linewidth}lrrl",
        labels=4,
    )


def variants(evidence: Evidence) -> Table:
    """What a part of a stage is worth: the stage against the stage without it."""
    problems = evidence.suite("variant")
    rows = []
    for name in evidence.of_kind("variant"):
        found = stage.subject(name)
        of = found.of or ""
        worth = [evidence.speedup("variant", p.id, name, of) for p in problems]
        rows.append(
            [
                label(name),
                label(of),
                found.title,
                interval(evidence.speedup("variant", MEDIAN, name, of), 3),
                *(number(v, 3) for v in worth),
            ]
        )
    heads = [
        "gate" if p.id == GATE else f"{p.headdim} {'causal' if p.causal else 'full'} {p.seqlen_q}"
        for p in problems
    ]
    return Table(
        ["variant", "of", "what it is", "speed over it, median", *heads],
        rows,
        "Below 1: the stage loses by the change, so what was taken away is worth keeping. Paired,"
        " interleaved launches in the same processes; spaced.",
        align="llp{0.3\\linewidth}r" + "r" * len(problems),
        labels=3,
    )


def _knobs(evidence: Evidence) -> str:
    """Which configurations of FA3 were kept, and what the best one gained where that is known."""
    kept: Counter[str] = Counter()
    total = 0
    for suite in ("grid", "gate"):
        timed = [
            p.id
            for p in evidence.suite(suite)
            if evidence.metric(suite, p.id, REFERENCE_PEER, "gpu_us", "spaced")
        ]
        total += len(timed)
        for row in evidence.provenance["chosen"]:
            place = (row["suite"], row["regime"], row["subject"])
            if place == (suite, "spaced", REFERENCE_PEER) and row["problem"] in timed:
                kept[", ".join(f"{k}={v}" for k, v in sorted(row["config"].items()))] += 1
    if not total:
        return "not measured"
    words = [f"the default on {total - kept.total()} of {total} problems of grid and gate"]
    words += [f"{knobs} on {count}" for knobs, count in sorted(kept.items())]
    return ", ".join(words)


def _build_of(wheel: str | None) -> str:
    with FA3_BUILDS.open(newline="") as handle:
        known = {row["wheel_sha256"]: row["what"] for row in csv.DictReader(handle)}
    return known.get(wheel or "", "this build names no upstream commit and is not a known one")


def which_fa3(evidence: Evidence) -> Table:
    """What exactly the peers are, and the software around them."""
    rows = []
    packages = evidence.provenance["packages"]
    wheels = environment.hashes("cuda")
    for name in known_of("peer"):
        found = evidence.provenance["subjects"].get(name, {})
        distribution = stage.subject(name).distribution or ""
        wheel, listed = found.get("wheel_sha256"), found.get("record_sha256")
        version = found.get("version") or packages.get(distribution)
        identity = f"files {listed[:16]}" if listed else "–"
        if wheel:
            locked = wheel in wheels.get(distribution, ())
            identity = f"wheel {wheel[:16]}, {'as locked' if locked else 'not that of the lock'}"
        rows.append(
            [
                stage.subject(name).title,
                distribution,
                str(version or "not installed"),
                identity,
                str(found.get("compiler") or "–"),
            ]
        )
    content = evidence.provenance["content"]
    titles = {"cuda": "CUDA of torch", "driver": "driver", "ncu": "Nsight Compute"}
    for name in ("torch", "triton", "cuda", "driver", "ncu"):
        rows.append([titles.get(name, name), "", str(content[name] or "absent"), "", ""])
    software = len(rows)
    for regime in ("spaced", "sustained"):
        found = _over_published(evidence, regime)
        rows.append([f"FA3 here over FA3 as published, {regime}", "", found, "", ""])
    rows.append(["FA3's knobs that were kept", "", _knobs(evidence), "", ""])
    build = _build_of(evidence.provenance["subjects"].get("fa3", {}).get("wheel_sha256"))
    return Table(
        ["peer", "package", "version", "sha256", "compiler"],
        rows,
        "sha256 (first 16 digits): of the wheel where the installer kept it, else of its list of"
        f" files. FA3: {build}. Tried on each problem: num_splits 0 and 2 against the default, and"
        " pack_gqa where heads are grouped, which they are in no problem of the grid. Published:"
        f" fp16, median (least to most).{of_sustained(evidence)}",
        frozenset({len(known_of("peer")), software}),
        "llp{0.36\\linewidth}ll",
    )


_USED = ("jsonschema", "ncu-report", "numpy", "nvidia-ml-py", "nvtx", "pyyaml", "snakemake")
"""What measuring imports of the base lock."""


def locks(evidence: Evidence) -> Table:
    """Where the environment of the run is not the one that the locks describe."""
    recorded = dict(evidence.provenance["packages"])
    pinned = environment.pins("cuda")
    shared = [name for name in sorted(pinned) if name in recorded]
    differing = [
        name
        for name in shared
        if recorded[name].partition("+")[0] != pinned[name].partition("+")[0]
    ]
    used = {name for name in pinned if name not in environment.pins("base")} | {*_USED}
    rows = [[name, recorded[name], pinned[name]] for name in differing if name in used]
    others = [name for name in differing if name not in used]
    note = f" Not imported to measure, and different too: {', '.join(others)}." if others else ""
    return Table(
        ["package", "in the run", "in the lock"],
        rows or [["all that measuring imports", "as locked", ""]],
        f"Of {len(shared)} packages that the run recorded and requirements/ pins,"
        f" {len(shared) - len(differing)} have the pinned version. Python of the run:"
        f" {recorded.get('python', 'not recorded')}; the locks are for 3.11 and 3.12.{note}",
        labels=1,
    )


def _published() -> dict[tuple[int, bool, int], str]:
    """TFLOPS of FA3 in its paper by headdim, mask and seqlen."""
    with PUBLISHED.open(newline="") as handle:
        return {
            (int(r["headdim"]), r["causal"] == "1", int(r["seqlen"])): r["fa3_tflops"]
            for r in csv.DictReader(handle)
        }


def _over_published(evidence: Evidence, regime: str) -> str:
    """FA3 here over FA3 as published: median, least and most."""
    known, ratios = _published(), []
    for p in evidence.suite("grid"):
        here = evidence.metric("grid", p.id, REFERENCE_PEER, "tflops", regime)
        there = known.get((p.headdim, p.causal, p.seqlen_q))
        if here and there:
            ratios.append(here.value / float(there))
    if not ratios:
        return "not measured"
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} problems)"


def published(evidence: Evidence) -> Table:
    """Published FA3 figures beside ours on the same shapes."""
    known = _published()
    rows = []
    problems = evidence.suite("grid")
    regimes = [r for r in (SPACED, SUSTAINED_REGIME) if evidence.was_measured("grid", r)]
    regimes = regimes or [SPACED]
    for problem in problems:
        there = known.get((problem.headdim, problem.causal, problem.seqlen_q), "–")
        here = [evidence.metric("grid", problem.id, "fa3", "tflops", r) for r in regimes]
        ratios = [
            "–" if h is None or there == "–" else plain(h.value / float(there), 2) for h in here
        ]
        rows.append([*shape(problem), there, *map(number, here), *ratios])
    return Table(
        ["d", "mask", "seqlen", "published fp16", *(f"{r} bf16" for r in regimes),
         *(f"{r} / published" for r in regimes)],
        rows,
        "Published: labels of the bars in figure 5 of the FA3 paper (forward, fp16, H100 SXM5); the"
        " label of headdim 128, full, 512 could not be read with certainty."
        + of_sustained(evidence),
        _grid_rules(problems),
        "rlrr" + "rr" * len(regimes),
        labels=4,
    )  # fmt: skip


_RATIOS = ("speedup", "eager_gain", "over_bf16", "host_over_fa3", "energy_over_fa3")


def _verdict_cells(row: Mapping[str, str]) -> list[str]:
    metric = row["metric"].split(", ")[0]
    ratio = metric.startswith(_RATIOS)
    digits = 3 if ratio else 2 if float(row["threshold"]) < 10 else 1
    effect, low, high = (
        plain(within(metric, float(row[c])), digits) if row[c] else "–"
        for c in ("effect", "ci_low", "ci_high")
    )
    return [effect, f"[{low}, {high}]" if row["ci_low"] else "–"]


def _side(row: Mapping[str, str]) -> str:
    """Where an interval lies of the claimed number, whatever the verdict."""
    if not row["effect"]:
        return "–"
    threshold = float(row["threshold"])
    if float(row["ci_low"]) >= threshold:
        return "above"
    return "below" if float(row["ci_high"]) < threshold else "across"


def verdict_rows(evidence: Evidence, roles: Sequence[str]) -> list[list[str]]:
    """The rows of verdicts.csv for hypotheses of some roles, with claim and direction."""
    rows = []
    for hypothesis, suite, row in judged(evidence):
        if hypothesis.role in roles:
            sign = "≥" if hypothesis.at_least is not None else "≤"
            agreed, every = evidence.agreed(suite, hypothesis.regime)
            told = conclusive_of(evidence, suite, hypothesis.regime)
            of_one = hypothesis.witness.get("problem", MEDIAN) in evidence.problems
            some_off = agreed < every and not of_one
            rows.append(
                [
                    hypothesis.constraint or hypothesis.id,
                    hypothesis.claim,
                    f"{suite}, {told} conclusive" if some_off else suite,
                    *_verdict_cells(row),
                    f"{sign} {hypothesis.threshold:g}",
                    _side(row),
                    row["control"],
                    row["verdict"],
                ]
            )
    return rows


_HOST_TITLES = {
    "launch_share": "eager latency that is not GPU time (%)",
    "launch_share_graph": "graph latency that is not GPU time (%)",
}


def _title(metric: str) -> str:
    """The title of what stands in the column `metric` of verdicts.csv."""
    name, *where = metric.split(", ")
    known = metrics.BY_ID.get(name)
    title = f"{known.title} ({known.unit})" if known else _HOST_TITLES.get(name, name)
    return ", ".join([title, *where])


def _primary(evidence: Evidence, constraint: str) -> Hypothesis:
    return next(
        h
        for h in evidence.constraints.hypotheses
        if (h.constraint, h.role) == (constraint, "primary")
    )


def judged(evidence: Evidence) -> list[tuple[Hypothesis, str, Mapping[str, str]]]:
    """Each hypothesis and suite with its row of verdicts.csv."""
    table = iter(evidence.verdicts)
    return [(h, suite, next(table)) for h in evidence.constraints.hypotheses for suite in h.suites]


def _overall(evidence: Evidence, constraint: str) -> str:
    """The verdict on a constraint over all its suites."""
    rows = (r for r in evidence.verdicts if r["constraint"] == constraint)
    return str(next(r["verdict"] for r in rows if r["suite"] == "(all)"))


NOT_JUDGED = "not judged"


def _not_judged(evidence: Evidence, primary: Hypothesis) -> Mapping[str, str] | None:
    """What the counter of a constraint is in the suite `profile`, where the run has it in no suite
    that it is judged in."""
    if primary.witness["kind"] != "counter":
        return None
    witness = primary.witness
    found = [
        evidence.metric(PROFILE, p.id, witness["subject"], witness["metric"])
        for p in evidence.suite(PROFILE)
    ]
    values = [v.value for v in found if v is not None]
    if not values:
        return None
    interval_ = stats.over_values(values)
    return {
        "metric": primary.metric,
        "effect": str(interval_.value),
        "ci_low": str(interval_.low),
        "ci_high": str(interval_.high),
        "threshold": str(primary.threshold),
        "verdict": NOT_JUDGED,
    }


COUNTER_NOTE = (
    "Intervals of counters are over problems and symmetric: the bootstrapped spread of the median"
    " times Student's t, cut at 0."
)


def constraints(evidence: Evidence) -> Table:
    """Each constraint in each suite that it is judged in: what was found, what the plan says, the
    verdict."""
    rows: list[list[str]] = []
    first: list[int] = []
    for name, constraint in evidence.constraints.constraints.items():
        primary = _primary(evidence, name)
        sign = "≥" if primary.at_least is not None else "≤"
        removed = constraint["removed_by"]
        gain = evidence.speedup("gate", MEDIAN, removed, f"stage{int(removed[5:]) - 1}")
        of = [(suite, row) for h, suite, row in judged(evidence) if h is primary]
        stand_in = _not_judged(evidence, primary)
        if stand_in is not None and not any(row["effect"] for _, row in of):
            of.append((PROFILE, stand_in))
        first.append(len(rows))
        for n, (suite, row) in enumerate(of):
            rows.append(
                [
                    "" if n else name,
                    "" if n else _title(row["metric"]),
                    suite,
                    " ".join(_verdict_cells(row)) if row["effect"] else "–",
                    f"{sign} {primary.threshold:g}",
                    _side(row),
                    "" if n else interval(gain),
                    "" if n else of[0][1]["control"],
                    row["verdict"],
                ]
            )
    return Table(
        ["constraint", "primary witness in FA3", "suite", "found", "claimed", "lies",
         "gain of stage", "control", "verdict"],
        rows,
        "Lies: where the interval is of the claimed number. A verdict needs a passed control. Gain:"
        " GPU time of the stage before over that of the stage that removes the constraint, median"
        f" of the gate problems. {COUNTER_NOTE}",
        rules=frozenset(first[1:]),
        labels=3,
    )  # fmt: skip


def verdicts(evidence: Evidence) -> Table:
    """Every hypothesis about the constraints."""
    rows = verdict_rows(evidence, ("primary", "witness", "ablation"))
    return Table(
        ["", "claim", "suite", "found", "interval", "claimed", "lies", "control", "verdict"],
        rows,
        f"{COUNTER_NOTE} Borrowed: the control plants what the primary witness of the constraint"
        " sees, not this one.",
        align="lp{0.4\\linewidth}lllllll",
    )


def _ceilings(evidence: Evidence) -> list[str]:
    """For each gate and criterion: the best that the model's least times allow, `–` where the model
    says nothing of it.

    Of a ratio of times: a peer's measured time over the model's overlapped time of each problem,
    reduced as the claim reduces it.
    """
    cells = []
    for hypothesis in evidence.constraints.hypotheses:
        if hypothesis.role not in ("gate", "criterion"):
            continue
        for suite in hypothesis.suites:
            cells.append(_ceiling(evidence, hypothesis, suite))
    return cells


def _ceiling(evidence: Evidence, hypothesis: Hypothesis, suite: str) -> str:
    witness = hypothesis.witness
    if witness["kind"] != "speedup":
        return _ceiling_of_metric(evidence, hypothesis)
    wanted, peer = witness["problem"], witness["peer"]
    peers = evidence.of_kind("peer") if peer == BEST else [peer]
    ratios = []
    for problem in evidence.suite(suite):
        if wanted not in (MEDIAN, MINIMUM, SHORTEST, problem.id):
            continue
        if wanted == SHORTEST and problem.seqlen_q > 1024:
            continue
        times = [evidence.metric(suite, problem.id, p, "gpu_us", hypothesis.regime) for p in peers]
        known = [t.value for t in times if t is not None]
        least = evidence.roofline(problem, witness["subject"], hypothesis.regime)
        if known and least:
            ratios.append(min(known) / least.overlapped_us)
    if not ratios:
        return "–"
    return f"{median(ratios) if wanted == MEDIAN else min(ratios):.2f}"


def _ceiling_of_metric(evidence: Evidence, hypothesis: Hypothesis) -> str:
    """Of TFLOPS and of the tensor pipe on one problem at the model's least time; fp16 and bf16 have
    the same rate of products."""
    witness, metric = hypothesis.witness, hypothesis.witness["metric"]
    if metric == "over_bf16":
        return "1.00"
    problem = evidence.problems.get(witness.get("problem", ""))
    if problem is None or metric not in ("tflops", "tensor_pipe"):
        return "–"
    least = evidence.roofline(problem, witness["subject"])
    if least is None:
        return "–"
    if metric == "tflops":
        return f"{problem.convention_flops / least.overlapped_us / 1e6:.0f}"
    return f"{100 * least.tensor_us / least.overlapped_us:.1f}"


def criteria(evidence: Evidence) -> Table:
    """Gates and success criteria, with the model's ceiling where it has one."""
    rows = []
    judged = verdict_rows(evidence, ("gate", "criterion"))
    for row, ceiling in zip(judged, _ceilings(evidence), strict=True):
        said = {"SUPPORTED": "met", "REFUTED": "not met"}.get(row[8].split()[0], "inconclusive")
        rows.append([*row[1:6], ceiling, said if row[3] != "–" else "not measured"])
    return Table(
        ["claim", "suite", "found", "interval", "set", "ceiling", ""],
        rows,
        "Decided by the interval, widened by the A/A floor where it is a speed, and by the value"
        " where there is none; inconclusive where the interval holds the number set, or where a"
        " problem is missing or its A/A pair was off (where some may be off, these count among"
        " them; the interval is then what they may make of the value). Ceiling, at the model's"
        " least time: the peer's measured time over it, TFLOPS, the tensor pipe's part of it; fp16"
        " and bf16 have"
        f" one rate of products; – where the model says nothing. {LOADED_CLOCK}"
        f"{of_sustained(evidence)}",
        align="p{0.5\\linewidth}llllrl",
    )


WITNESSES = (
    "inactive_threads",
    "predicated_off",
    "branch_uniformity",
    "masked_work",
    "kernels_per_call",
    "idle_sm_cycles",
    "stall_barrier",
    "samples_cta_barrier",
    "samples_named_barrier",
    "samples_wgmma",
    "samples_mbarrier",
    "cta_barriers",
    "named_barriers",
    "mbarrier_waits",
    "stall_memory",
    "samples_memory",
    "stall_shared",
    "tensor_pipe",
    "xu_pipe",
    "fma_pipe",
    "alu_pipe",
    "issue_slots",
    "dram_throughput",
    "dram_excess",
    "l2_hit_rate",
    "registers",
    "spill_instructions",
    "occupancy",
    "profiled_clock",
)


def _profiled(evidence: Evidence) -> list[str]:
    return [s for s in evidence.subjects if stage.subject(s).kind in ("stage", "peer")]


def _with_counters(evidence: Evidence, problem: str) -> list[str]:
    """The stages and peers whose counters were read on a problem; all where none were."""
    names = _profiled(evidence)
    found = [n for n in names if evidence.metric(PROFILE, problem, n, "kernels_per_call")]
    return found or names


def witnesses(evidence: Evidence, problem: str = GATE) -> Table:
    """The witnesses of one profiled problem, for every subject."""
    names = _with_counters(evidence, problem)
    rows = []
    for metric in WITNESSES:
        found = metrics.BY_ID[metric]
        cells = []
        for name in names:
            value = evidence.metric("profile", problem, name, metric)
            digits = 0 if value is not None and value.value >= 100 else 1
            cells.append(number(value, digits))
        unit = "" if found.unit == "1" else f" ({found.unit})"
        rows.append([found.witness or "", found.title + unit, *cells])
    rules = frozenset(n for n in range(1, len(rows)) if rows[n][0] != rows[n - 1][0])
    shown = [[row[0] if not n or n in rules else "", *row[1:]] for n, row in enumerate(rows)]
    return Table(
        ["", "counter", *[label(n) for n in names]],
        shown,
        f"Problem {problem}. Barriers: warps per visible 128×128 score tile.",
        rules,
        "ll" + "r" * len(names),
        labels=2,
    )


def stalls(evidence: Evidence, problem: str = GATE) -> Table:
    """The whole stall breakdown: warp cycles per issued instruction."""
    names = _with_counters(evidence, problem)
    rows = []
    for reason, title in metrics.STALLS.items():
        cells = [
            number(evidence.metric("profile", problem, n, f"stall_cycles_{reason}"), 2)
            for n in names
        ]
        rows.append([reason.replace("_", " "), title, *cells])
    sums = []
    for name in names:
        parts = [
            evidence.metric("profile", problem, name, f"stall_cycles_{r}") for r in metrics.STALLS
        ]
        whole = None if None in parts else Value(sum(p.value for p in parts if p is not None))
        sums.append(number(whole, 2))
    rows.append(["sum", "", *sums])
    total = [number(evidence.metric("profile", problem, n, "stall_cycles_total"), 2) for n in names]
    rows.append(["as ncu sums them", "", *total])
    return Table(
        ["reason", "", *[label(n) for n in names]],
        rows,
        f"Problem {problem}: warp cycles per issued instruction.",
        frozenset({len(metrics.STALLS)}),
        "ll" + "r" * len(names),
        labels=2,
    )


def first_calls(evidence: Evidence) -> str:
    """What the first call in a process takes of the first stage, which is called before all others,
    and of the top stage; empty where one was not measured."""
    slowest = []
    for name in (known_of("stage")[0], evidence.top):
        found = evidence.all_of("gate", "first_call_ms")
        times = [value.value for (_, subject), value in found.items() if subject == name]
        if not times:
            return ""
        slowest.append(f"{max(times):.0f} ms for {label(name)}")
    return (
        f" First call in a process, the slowest, with a warm compile cache: {slowest[0]}, the first"
        f" Triton kernel of the process, which also pays for what Triton does once; {slowest[1]},"
        " called later in the same process."
    )


def host(evidence: Evidence) -> Table:
    """What a call costs the host, and its latency."""
    rows = []
    for name in _profiled(evidence):
        cells = []
        for metric, problem in (
            ("eager_host_us", "gate-b1"),
            ("fresh_pointer_host_us", "gate-b1"),
            ("eager_latency_us", "gate-b1"),
            ("graph_latency_us", "gate-b1"),
            ("eager_latency_us", "gate-b32"),
            ("graph_latency_us", "gate-b32"),
            ("launch_share", "gate-b32"),
        ):
            cells.append(number(evidence.metric("gate", problem, name, metric), 1))
        gain = evidence.metric("gate", "gate-b32", name, "eager_gain")
        cells.append(number(gain, 2) if gain or stage_before(name) else "")
        for metric, regime in (("per_sequence_eager", "-"), ("per_sequence_gpu", "spaced")):
            cells.append(number(evidence.metric("gate", "gate-b32", name, metric, regime), 2))
        rows.append([label(name), *cells])
    return Table(
        ["", "host", "fresh", "eager", "graph", "eager 32", "graph 32", "not GPU %",
         "gain 32", "per seq. eager", "per seq. GPU"],
        rows,
        "Medians in µs on the gate problem. Host: issuing a call at batch 1, with reused and with"
        " fresh pointers. Latency of one call at batch 1 and 32, eager and in a CUDA graph; the"
        " part of the eager latency at batch 32 that is not GPU time; gain: eager latency of the"
        " stage before over that of the stage, at batch 32; time per sequence at batch 1"
        " over that at batch 32 (the plan: 5 to 6)."
        " Shares are cut at 0 and 100 %."
        + first_calls(evidence)
        + evidence.added(HOST)
        + evidence.closed(HOST),
        align="l" + "r" * 10,
        labels=1,
    )  # fmt: skip


_BURSTS = (("clock_mhz", "sust. MHz", 0), ("power_w", "W", 0), ("energy_mj", "mJ/call", 1))
"""What NVML reads of bursts: metric, heading, decimals."""


def regimes(evidence: Evidence) -> Table:
    """Clock, power and energy in both regimes; of sustained launches where there are any."""
    rows = []
    top = evidence.top
    problems = evidence.suite("grid")
    sustained = evidence.was_measured("grid", SUSTAINED_REGIME)
    for problem in problems:
        idle = evidence.metric("grid", problem.id, REFERENCE_PEER, "clock_mhz", SPACED)
        cells = [number(idle)]
        for name in (REFERENCE_PEER, top):
            cells.append(number(evidence.anywhere(problem, name, "profiled_clock")))
            for metric, _, digits in _BURSTS if sustained else ():
                found = evidence.metric("grid", problem.id, name, metric, "sustained")
                cells.append(number(found, digits))
        rows.append([*shape(problem), *cells])
    header = ["d", "mask", "seqlen", "between launches MHz"]
    for name in (REFERENCE_PEER, top):
        header.append(f"{label(name)} profiled MHz")
        header += [heading for _, heading, _ in _BURSTS] if sustained else []
    pairs = [abs(v.value - 1) for v in evidence.all_of("grid", "energy_aa").values()]
    repeated = (
        f" The energy of FA3's A/A twin differs from FA3's by {100 * median(pairs):.1f} % in the"
        f" median, {100 * max(pairs):.1f} % at most."
        if pairs
        else ""
    )
    return Table(
        header,
        rows,
        "Between launches: median of NVML's readings, one a round of spaced launches, so of no"
        " one subject. Profiled: cycles over time of the kernels in Nsight Compute, the"
        " clock that they run at."
        + (f" Sustained: means of NVML's readings during bursts.{repeated}" if sustained else "")
        + of_sustained(evidence),
        _grid_rules(problems),
        "rlr" + "r" * (len(header) - 3),
        labels=3,
    )


def _of_roofline(evidence: Evidence, problem: Problem, subject: str) -> str:
    """The model's least time at a subject's clock under load over its time, in percent."""
    least = evidence.roofline(problem, subject)
    us = evidence.metric("grid", problem.id, subject, "gpu_us", "spaced")
    return "–" if least is None or us is None else f"{100 * least.overlapped_us / us.value:.0f}"


def roofline(evidence: Evidence) -> Table:
    """The model beside the measurement on the grid, and how near FA3 and each stage are to it."""
    top, near = evidence.top, (REFERENCE_PEER, *known_of("stage"))
    rows = []
    problems = evidence.suite("grid")
    for problem in problems:
        found = evidence.roofline(problem, top)
        if found is None:
            continue
        measured = [
            evidence.metric("grid", problem.id, s, "gpu_us", "spaced") for s in ("fa3", top)
        ]
        shares = [_of_roofline(evidence, problem, name) for name in near]
        rows.append(
            [
                *shape(problem),
                *(f"{us:.0f}" for us in found.resources.values()),
                f"{found.tail_us + found.launch_us:.0f}",
                f"{found.overlapped_us:.0f}",
                *(number(m) for m in measured),
                *shares,
                found.limit,
            ]
        )
    return Table(
        ["d", "mask", "seqlen", "tensor", "MUFU", "issue", "shared", "DRAM", "ends", "least",
         "FA3", label(top), *(f"{label(name).removeprefix('stage ')} %" for name in near),
         "limit"],
        rows,
        f"Microseconds; the model's for {label(top)}. Least: the busiest resource plus launch and"
        " tail. Of FA3 and of stages 1 to 5, in percent: least, for that subject, over measured."
        f" {LOADED_CLOCK}",
        _grid_rules(problems),
        "rlr" + "r" * (9 + len(near)) + "l",
        labels=3,
    )  # fmt: skip


def _off(errors: Sequence[float]) -> list[str]:
    """Median and worst error in percent."""
    if not errors:
        return ["not measured", "–"]
    return [f"{100 * predict.off(errors):.1f}", f"{100 * max(errors, key=abs):+.0f}"]


def prediction(evidence: Evidence) -> Table:
    """The stages' predictions in short: the gate problem with the plan's targets, and the grid."""
    problem = evidence.problems[GATE]
    rows = []
    for name in predict.STAGES:
        found = evidence.predicted(GATE, name)
        gate = _gate_of(evidence, name)
        grid_errors = evidence.prediction_errors("grid", name)
        target = predict.TARGET.get(name)
        median_off = predict.off(grid_errors) if grid_errors else None
        met = (
            "" if target is None or median_off is None else "yes" if median_off <= target else "no"
        )
        said = None if found is None else Value(problem.convention_flops / found.us / 1e6)
        rows.append(
            [
                label(name),
                "–" if found is None else f"{found.limit} ({found.busy_percent:.0f} %)",
                number(said),
                number(evidence.metric("gate", GATE, name, "tflops", "spaced")),
                _PLAN_TFLOPS.get(name, ""),
                "" if gate is None else f"{gate:.2f}",
                *_off(evidence.prediction_errors("gate", name)),
                *_off(grid_errors),
                _off(evidence.prediction_errors("grid", name, at_measured_clock=True))[0],
                "" if target is None else f"≤ {100 * target:.0f}",
                met,
            ]
        )
    return Table(
        ["", "limit (busy)", "predicted", "measured", "plan", "plan/FA3", "gate off %", "worst",
         "grid off %", "worst", "at its clock", "target", "met"],
        rows,
        "Limit: the busiest resource, and for how much of the time; the rest is latency, work that"
        " nothing hides, and imbalance. TFLOPS on the gate problem, predicted,"
        " measured and as the plan has them; errors of the predicted"
        " time in the median and at worst, over the problems of the gate and of the grid;"
        f" the clock assumed is {predict.IDLE_MHZ.value:.0f} MHz before a launch, and at its clock"
        f" the measured one. This comparison is {evidence.prediction_status}.",
        align="ll" + "r" * 11,
        labels=1,
    )  # fmt: skip


def predictions(evidence: Evidence) -> Table:
    """Predicted and measured time of every stage on every problem of the grid and the gate."""
    rows, keys = [], []
    for suite in predict.SUITES:
        for problem in evidence.suite(suite):
            cells = []
            for name in predict.STAGES:
                found = evidence.predicted(problem.id, name)
                measured = evidence.metric(suite, problem.id, name, "gpu_us", "spaced")
                cells += ["–" if found is None else f"{found.us:.0f}", number(measured)]
            top = evidence.predicted(problem.id, predict.STAGES[-1])
            rows.append([str(problem.batch), *shape(problem), *cells, top.limit if top else "–"])
            rows[-1][3] += _dagger(evidence, suite, problem)
            keys.append((suite, problem.headdim, problem.causal))
    header = ["batch", "d", "mask", "seqlen"]
    for name in predict.STAGES:
        header += [f"{label(name)} said", "found"]
    return Table(
        [*header, f"limit of {label(predict.STAGES[-1])}"],
        rows,
        "Microseconds, spaced launches: what was said before, and what was found. Limit: the"
        f" busiest resource. This comparison is {evidence.prediction_status}."
        f"{evidence.off('grid', 'spaced')}",
        frozenset(n for n in range(1, len(keys)) if keys[n] != keys[n - 1]),
        "rrlr" + "r" * 10 + "l",
        labels=4,
    )


def checks(evidence: Evidence) -> Table:
    """How many problems each subject gets right, and the worst error against its bound."""
    suites = ["grid", "grid_fp16", "grid256", "gate", "smoke", "odd"]
    late = ("grid256", "odd")  # runs from before these suites have none
    suites = [s for s in suites if s not in late or evidence.all_of(s, "correct")]
    failed = evidence.failed_checks()
    rows = []
    for name in _profiled(evidence):
        cells = []
        worst = 0.0
        for suite in suites:
            found = [evidence.metric(suite, p.id, name, "correct") for p in evidence.suite(suite)]
            known = [v for v in found if v is not None]
            right = sum(v.value == 1 for v in known)
            cells.append(f"{right} of {len(known)}" if known else "–")
            for problem in evidence.suite(suite):
                error = evidence.metric(suite, problem.id, name, "max_error")
                bound = evidence.metric(suite, problem.id, name, "bound")
                if error and bound and bound.value:
                    worst = max(worst, error.value / bound.value)
        runs, views = evidence.identical_runs(name), evidence.views(name, suites)
        cells.append(f"{views[0]} of {views[1]}" if views[1] else "–")
        cells.append(f"{worst:.2f}" if worst else "–")
        cells.append(f"{runs[0]:.0f} on {runs[1]}" if runs else "–")
        rows.append([label(name), *cells])
    return Table(
        [
            "",
            *(s.replace("_", " ") for s in suites),
            "views",
            "worst error / bound",
            "identical runs",
        ],
        rows,
        ("Failed, which counts: " + "; ".join(failed) + ". " if failed else "")
        + "Views: those of these problems on which a call was on inputs with other strides, what"
        " lies between them poisoned; where the recorded run made no such call, that of an added"
        " run. Bound: twice the error of low-precision PyTorch against"
        " fp32, plus FA3's rounding term; of each problem the call that errs most (scores that"
        " grow, whose bound is wide)."
        " Identical runs: the fewest in a row that gave the same bits, on so many problems.",
        align="l" + "r" * (len(suites) + 3),
        labels=1,
    )


def left_out(evidence: Evidence) -> Table:
    """What is in the record and not in the tables, and why."""
    found = evidence.provenance
    stale: dict[tuple[str, str], list[str]] = {}
    for item in found["stale"]:
        place = (Path(item["file"]).with_suffix("").as_posix(), item["commit"][:12])
        stale.setdefault(place, []).append(label(item["what"]))
    rows = [
        [place, ", ".join(what), f"stale, from commit {commit}"]
        for (place, commit), what in stale.items()
    ]
    rows += [
        [i["suite"], f"{i['problem']} ({i['regime']})", "inconclusive: A/A "
         + ", ".join(f"{r:.3f}" for r in i["aa_ratios"] if r is not None)]
        for i in found["inconclusive"]
    ]  # fmt: skip
    grouped: dict[tuple[str, str], Counter[str]] = {}
    for item in found["excluded"]:
        why = f"{item['status']}: {item['reason']}"
        kind, of = str(item["kind"]), str(item["suite"])
        file = kind if kind == of else f"{kind}/{of}"
        grouped.setdefault((file, why), Counter())[item["subject"]] += 1
    rows += [
        [
            suite,
            ", ".join(f"{label(s)} ({n})" for s, n in sorted(counts.items())),
            shorten(why, 160, placeholder=" …"),
        ]
        for (suite, why), counts in sorted(grouped.items())
    ]
    return Table(
        ["suite or file", "what", "why"],
        rows,
        "In brackets: on how many problems of a record.",
        align="lp{0.34\\linewidth}p{0.44\\linewidth}",
    )


def _replication_reason(evidence: Evidence, row: Mapping[str, str]) -> str:
    """Why a comparison decides nothing, or what is lacking; where a kernel has changed, of which
    run."""
    recorded = Path("timing", f"{row['suite']}.{row['regime']}.json").as_posix()
    stale = {(item["file"], item["what"]) for item in evidence.provenance["stale"]}
    run = row["recorded_run"] if (recorded, row["subject"]) in stale else row["run"]
    parts = [part for part in row["note"].split("; ") if not part.startswith("median of ")]
    if "its kernel has changed since" in parts:  # that the two kernels differ goes without saying
        return f"the kernel of run {run} has changed since"
    return "; ".join(parts)


def _replication_cell(row: Mapping[str, Any] | None) -> str:
    """The change in percent with its interval; † where AMBIGUOUS, the word where FAIL."""
    if row is None:
        return ""
    change = "–"
    if row["change"]:
        value, low, high = (100 * float(row[name]) for name in ("change", "low", "high"))
        change = interval(Value(value, low, high), 2)
    return change + {"PASS": "", "AMBIGUOUS": "†"}.get(row["verdict"], f" {row['verdict']}")


def _once(cells: Sequence[str]) -> str:
    """One cell of several: what is the same stands once."""
    return cells[0] if len(set(cells)) == 1 else "/".join(cells)


def replication(evidence: Evidence) -> Table:
    """The recorded ratios, and how far those of other runs are from them."""
    of: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in evidence.replications:
        of.setdefault((row["suite"], row["regime"], row["subject"]), {})[row["run"]] = row
    runs = sorted({row["run"] for row in evidence.replications}, key=lambda run: (len(run), run))
    keys = sorted(of, key=lambda key: key[:2])  # subjects stay in order
    rows = []
    for suite, regime, subject in keys:
        found = of[suite, regime, subject]
        here = [found[run] for run in runs if run in found]
        counts = [re.sub(r".*median of (\d+) problems.*", r"\1", row["note"]) for row in here]
        moved = [row for row in here if row["most_change"]]
        moved = [row for row in moved if row["verdict"] != "AMBIGUOUS"] or moved
        most = max(moved, key=lambda row: abs(float(row["most_change"])), default=None)
        rows.append(
            [
                suite, regime, label(subject), _once(counts),
                _once([row["recorded"] for row in here]),
                *(_replication_cell(found.get(run)) for run in runs),
                f"{100 * float(most['most_change']):+.2f} ({most['most_problem']}, {most['run']})"
                if most else "–",
            ]
        )  # fmt: skip
    why = Counter(
        (row["verdict"], reason)
        for row in evidence.replications
        if (reason := _replication_reason(evidence, row)) or row["verdict"] != "PASS"
    )
    told = "; ".join(f"{reason or verdict} ({n})" for (verdict, reason), n in sorted(why.items()))
    boards = {(r["run"], r["gpu_uuid"] == r["recorded_gpu_uuid"]) for r in evidence.replications}
    where = "; ".join(
        f"run {run} is of {'the same' if same else 'another'} board"
        for run, same in sorted(boards, key=lambda board: runs.index(board[0]))
    )
    tolerance = {f"{100 * float(r['tolerance']):g} %" for r in evidence.replications}
    note = (
        "Median over problems of FA3's GPU time over the subject's (cuDNN's where there is no FA3),"
        " and, by run, the relative change of that ratio in percent, paired by problem, with its"
        " 95 % interval; then the problem whose own ratio moved most, in the runs that decide, if"
        " one does. a/b: by run, of those that have it. It passes where all of the"
        f" interval is within {', '.join(sorted(tolerance))}; † decides nothing (AMBIGUOUS)."
        + (f" Reasons, of how many ratios: {told}." if told else "")
        + f" By board: {where}."
    )
    if any(row["regime"] == "sustained" for row in evidence.replications):
        note += of_sustained(evidence)
    groups = [key[:2] for key in keys]
    return Table(
        ["suite", "regime", "subject", "problems", "recorded", *(f"{run}, %" for run in runs),
         "most, %"],
        rows,
        note if rows else "No other run is kept.",
        rules=frozenset(n for n in range(1, len(keys)) if groups[n] != groups[n - 1]),
        align="lllrr" + "r" * len(runs) + "r",
        labels=3,
    )  # fmt: skip


TABLES: dict[str, Callable[[Evidence], Table]] = {
    "grid": grid,
    "grid_fp16": lambda evidence: grid(evidence, "grid_fp16"),
    "grid256": lambda evidence: grid(evidence, "grid256"),
    "grid_stages": grid_stages,
    "ladder": ladder,
    "foretold": foretold,
    "variants": variants,
    "which_fa3": which_fa3,
    "locks": locks,
    "published": published,
    "constraints": constraints,
    "verdicts": verdicts,
    "criteria": criteria,
    "witnesses": witnesses,
    "stalls": stalls,
    "host": host,
    "regimes": regimes,
    "roofline": roofline,
    "prediction": prediction,
    "predictions": predictions,
    "decode": in_use.decode,
    "tokens": in_use.tokens,
    "token_differences": in_use.token_differences,
    "serving_speed": in_use.serving_speed,
    "checks": checks,
    "replication": replication,
    "left_out": left_out,
}


def _prose(paragraph: str) -> str:
    """A docstring's paragraph as LaTeX: literals, emphasis, lists."""
    items = re.split(r"(?:^|\s)- (?=\*)", paragraph)
    parts = []
    for item in items:
        cut = re.split(r"(`[^`]+`|\*[^*]+\*)", item)
        parts.append(
            "".join(
                rf"\texttt{{{escape(c[1:-1])}}}"
                if c.startswith("`")
                else rf"\emph{{{escape(c[1:-1])}}}"
                if len(c) > 2 and c.startswith("*")
                else escape(c)
                for c in cut
            )
        )
    return " ".join(part.strip() for part in parts if part.strip())


def stages(evidence: Evidence) -> str:
    """One paragraph for each stage: what its file says of it, and what was measured."""
    parts = []
    for name in known_of("stage"):
        subject = stage.subject(name)
        docstring = ast.get_docstring(ast.parse(subject.path.read_text())) or ""
        _, *body = [" ".join(p.split()) for p in docstring.split("\n\n")]
        ratio = evidence.speedup("gate", GATE, name, "fa3")
        tflops = evidence.metric("gate", GATE, name, "tflops", "spaced")
        measured = (
            "On the gate problem: not measured, or its record is stale."
            if tflops is None
            else f"Measured on the gate problem: {number(tflops)} TFLOPS,"
            f" {interval(ratio, 3)} of FA3."
        )
        parts.append(
            rf"\paragraph{{Stage {name[5:]}: {escape(subject.title)}.}} "
            + "\n\n".join(_prose(p) for p in body)
            + f"\n\n{escape(measured)}\n"
        )
    return "\n".join(parts)


def headline(evidence: Evidence) -> str:
    """The README's table: the stages on the gate problem and the top stage on the grid."""
    lines = ["| | removes | TFLOPS | over FA3, 95 % interval |", "|---|---|---|---|"]
    for name in known_of("stage", "peer"):
        if name == "fa4" and name not in evidence.subjects:  # an optional peer
            continue
        tflops = number(evidence.metric("gate", GATE, name, "tflops", "spaced"))
        tflops = evidence.or_stale("gate", name, tflops)
        ratio = interval(evidence.speedup("gate", GATE, name, "fa3"), 3)
        removes = stage.subject(name).removes or ""
        lines.append(f"| {label(name)} | {removes} | {tflops} | {ratio} |")
    lines += [
        "",
        "Batch 16, 16 heads, seqlen 2048, headdim 64, causal, bf16, spaced launches.",
    ]
    if any("| stale |" in line for line in lines):
        lines[-1] += (
            " Stale: the source has changed since it was measured, so the number is left out."
        )
    lines.append("")
    top = evidence.top
    words = []
    for peer, word in (("fa3", "FA3"), (BEST, "the best peer")):
        median = evidence.speedup("grid", MEDIAN, top, peer)
        if median is not None:
            least = evidence.speedup("grid", MINIMUM, top, peer)
            words.append(
                f"{interval(median, 3)} of {word} in the median, {number(least, 3)} at least"
            )
    if words:
        lines.append(f"On the grid of the FA3 paper {label(top)} reaches {'; '.join(words)}.")
    else:
        lines.append("The grid of the FA3 paper was not measured in this run.")
    lines.append("")
    lines.append("| constraint | found in FA3 | claimed | verdict |")
    lines.append("|---|---|---|---|")
    groups: list[list[Sequence[str]]] = []
    for row in constraints(evidence).rows:
        groups += [[]] if row[0] else []
        groups[-1].append(row)
    for group in groups:
        name, witness, *_, claimed = group[0][:5]
        measured = [row for row in group if row[3] != "–"]
        words = [
            f"{row[3]} in {row[2]}" + (f" ({NOT_JUDGED})" if row[-1] == NOT_JUDGED else "")
            for row in measured
        ]
        found = "; ".join(words) or "not measured"
        verdict = _overall(evidence, name)
        lines.append(f"| {name} | {witness}: {found} | {claimed} | {verdict} |")
    lines += ["", *_other_witnesses(evidence)]
    lines += ["", *_open_criteria(evidence), "", f"*{evidence.stamp}*"]
    return "\n".join(lines)


def _other_witnesses(evidence: Evidence) -> list[str]:
    """The witnesses of FA3 that are not primary and support a claim, in a line each."""
    lines: dict[str, list[str]] = {}
    for hypothesis, suite, row in judged(evidence):
        supported = row["verdict"].startswith(SUPPORTED)
        if hypothesis.role == "witness" and row["subject"] == REFERENCE_PEER and supported:
            late = row["verdict"].removeprefix(SUPPORTED)
            found = f"{' '.join(_verdict_cells(row))} in {suite}{late}"
            claim = f"- {hypothesis.constraint}: {hypothesis.claim}"
            lines.setdefault(claim, []).append(found)
    if not lines:
        return ["No other witness supports a claim about FA3."]
    shown = [f"{claim} Found: {'; '.join(found)}." for claim, found in lines.items()]
    return ["The table has the primary witness of each. Other witnesses, supported:", "", *shown]


def _open_criteria(evidence: Evidence) -> list[str]:
    """The gates and criteria that are not met, undecided or not measured, in a line each."""
    rows = criteria(evidence).rows
    met = sum(row[-1] == "met" for row in rows)
    lines = [f"Of {len(rows)} gates and success criteria {met} are met. The others:", ""]
    lines += [
        f"- {row[-1]} ({row[1]}): {row[0]}" + (f" Found: {_found(row)}." if row[2] != "–" else "")
        for row in rows
        if row[-1] != "met"
    ]
    return lines if met < len(rows) else [f"All {len(rows)} gates and success criteria are met."]


def _found(row: Sequence[str]) -> str:
    """What was found for a criterion, with its interval where it has one."""
    value, ends = row[2:4]
    return value if ends in ("–", f"[{value}, {value}]") else f"{value} {ends}"


@app.command("latex")
def latex_command(
    out: Annotated[Path, typer.Option("--out")],
    results: ResultsOption = RESULTS,
    problems: ProblemsOption = PROBLEMS,
    constraints: ConstraintsOption = CONSTRAINTS,
) -> None:
    """Write every table as LaTeX into a folder."""
    evidence = load(results, problems, constraints)
    for name, build in TABLES.items():
        write_text(out / f"{name}.tex", latex(build(evidence), evidence.stamp))
    write_text(out / "stages.tex", stages(evidence))


@app.command("model")
def model_command(
    out: Annotated[Path, typer.Option("--out")],
    results: ResultsOption = RESULTS,
    problems: ProblemsOption = PROBLEMS,
    constraints: ConstraintsOption = CONSTRAINTS,
) -> None:
    """Write the model's times of every timed problem at the top stage's clock under load."""
    evidence = load(results, problems, constraints)
    rows = []
    for suite in ("grid", "grid_fp16", "grid256", "gate"):
        found = [(p, evidence.roofline(p, evidence.top)) for p in evidence.suite(suite)]
        known = [(p, roofline) for p, roofline in found if roofline is not None]
        rows += [{"suite": suite, **row} for row in model.rows(known)]
    write_text(out, csv_text(("suite", *model.COLUMNS), rows, sort=False))


@app.command("readme")
def readme_command(
    write: Annotated[bool, typer.Option("--write")] = False,
    check: Annotated[bool, typer.Option("--check")] = False,
    readme: Annotated[Path, typer.Option("--readme")] = Path("README.md"),
    results: ResultsOption = RESULTS,
    problems: ProblemsOption = PROBLEMS,
    constraints: ConstraintsOption = CONSTRAINTS,
) -> None:
    """Bring the README's headline table up to date, or fail where it is not."""
    if write == check:
        raise typer.BadParameter("name one of --write and --check")
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{readme}: needs one line {BEGIN} and one line {END}")
    table = headline(load(results, problems, constraints))
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    current = pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)
    if write:
        write_text(readme, current)
    elif current != text:
        raise SystemExit(
            f"{readme}: the headline table is out of date; run"
            " `python -m paper.tables readme --write`"
        )


if __name__ == "__main__":
    app()
