"""Figures of the paper (PDF) and of the report (SVG), from the derived tables.

python -m paper.figures --results results --out paper/generated --format pdf
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("agg")

import matplotlib.pyplot as plt  # noqa: E402

from attn_ladder import stage  # noqa: E402
from attn_profiling import predict  # noqa: E402
from paper.evidence import Evidence, Value, label, load  # noqa: E402

# Okabe and Ito's palette, which the colour-blind can tell apart, and greys for the older peers;
# markers and dashes say the same a second time.
COLORS = {
    "fa3": "#000000",
    "cudnn": "#777777",
    "fa2": "#b0b0b0",
    "fa4": "#cc79a7",
    "stage1": "#56b4e9",
    "stage2": "#009e73",
    "stage3": "#0072b2",
    "stage4": "#e69f00",
    "stage5": "#d55e00",
}
MARKERS = {
    "fa3": "s",
    "cudnn": "D",
    "fa2": "v",
    "fa4": "^",
    "stage1": "o",
    "stage2": "<",
    "stage3": ">",
    "stage4": "p",
    "stage5": "*",
}
DASHED = ("cudnn", "fa2", "fa4")
CLAIM = "claimed"
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
PANELS = ((64, False), (64, True), (128, False), (128, True))

plt.rcParams.update(
    {
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.1,
        "lines.markersize": 3.5,
        "legend.frameon": False,
        "legend.fontsize": 7,
        "svg.hashsalt": "attn-ladder",
        "pdf.fonttype": 42,
    }
)


def _shown(evidence: Evidence) -> list[str]:
    return [s for s in evidence.subjects if stage.subject(s).kind in ("stage", "peer")]


def _say_if_empty(axes: Any) -> None:
    """Write into a panel that holds no data that there is none."""
    if axes.lines or axes.patches:
        return
    axes.tick_params(left=False, labelleft=False)
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=7)


def _line(
    axes: Any,
    name: str,
    x: Sequence[float],
    values: Sequence[Value | None],
    joined: bool = True,
) -> None:
    kept = [(a, v) for a, v in zip(x, values, strict=True) if v is not None]
    if not kept:
        return
    color = COLORS.get(name, "#555555")
    xs, ys = [a for a, _ in kept], [v.value for _, v in kept]
    marker = MARKERS.get(name, "o")
    axes.plot(
        xs,
        ys,
        color=color,
        marker=marker,
        markersize=5 if marker == "*" else None,
        linestyle="" if not joined else "--" if name in DASHED else "-",
        label=label(name),
        zorder=3 if name == "fa3" else 2,
    )
    bars = [(a, v.low, v.high) for a, v in kept if v.low is not None and v.high is not None]
    if bars:
        axes.vlines([b[0] for b in bars], [b[1] for b in bars], [b[2] for b in bars], color=color)


def _log_axis(axes: Any, ticks: Sequence[int], word: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
    axes.set_xticks(ticks, [str(t) if t < 1024 else f"{t // 1024}k" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(word)


def _panels(figure: Any) -> list[Any]:
    """The panels of a figure, and of the figures inside it."""
    return [*figure.axes, *(axes for part in figure.subfigs for axes in part.axes)]


def _legend(figure: Any) -> None:
    """One legend for all panels: an entry for each label, in the order of first appearance."""
    found: dict[str, Any] = {}
    for axes in _panels(figure):
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(text, handle)
    if CLAIM in found:
        found[CLAIM] = found.pop(CLAIM)  # last
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=len(found),
            columnspacing=1.3,
            handlelength=2.2,
            handletextpad=0.5,
        )


def _over_grid(
    evidence: Evidence,
    names: Sequence[str],
    find: Callable[[str, str], Value | None],
    ylabel: str,
    suites: str = "grid",
) -> Any:
    """Four panels (head dimension, mask) of something against seqlen."""
    figure, all_axes = plt.subplots(1, 4, figsize=(7.2, 2.1), sharey=True, layout="constrained")
    for axes, (headdim, causal) in zip(all_axes, PANELS, strict=True):
        problems = [p for p in evidence.suite(suites) if (p.headdim, p.causal) == (headdim, causal)]
        for name in names:
            _line(axes, name, [p.seqlen_q for p in problems], [find(p.id, name) for p in problems])
        axes.set_title(f"headdim {headdim}, {'causal' if causal else 'full'}", fontsize=8)
        _log_axis(axes, SEQLENS, "seqlen")
        _say_if_empty(axes)
    all_axes[0].set_ylabel(ylabel)
    _legend(figure)
    return figure


def grid(evidence: Evidence) -> Any:
    """TFLOPS over the grid, spaced."""
    return _over_grid(
        evidence,
        _shown(evidence),
        lambda p, s: evidence.metric("grid", p, s, "tflops", "spaced"),
        "TFLOPS",
    )


def ratio(evidence: Evidence) -> Any:
    """Every stage against FA3 over the grid, with intervals."""
    names = [s for s in _shown(evidence) if s != "fa3"]
    figure = _over_grid(
        evidence, names, lambda p, s: evidence.speedup("grid", p, s, "fa3"), "speed over FA3"
    )
    for axes in figure.axes:
        if axes.lines:
            axes.axhline(1.0, color=COLORS["fa3"], linewidth=0.8)
    return figure


def two_clocks(evidence: Evidence) -> Any:
    """Two ways of timing a call: events over activity records, which agree on long kernels."""

    def excess(problem: str, subject: str) -> Value | None:
        event = evidence.metric("grid", problem, subject, "event_us", "spaced")
        activity = evidence.metric("grid", problem, subject, "gpu_us", "spaced")
        if event is None or activity is None:
            return None
        return Value(event.value - activity.value)

    figure = _over_grid(evidence, _shown(evidence), excess, "events − activity (µs)")
    for axes in figure.axes:
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.axes[0].set_ylim(0, 1.08 * figure.axes[0].get_ylim()[1])
    return figure


def prediction(evidence: Evidence) -> Any:
    """Measured over predicted time of every stage over the grid, and the band of the target."""
    figure = _over_grid(
        evidence,
        list(predict.STAGES),
        lambda p, s: evidence.measured_over_predicted("grid", p, s),
        "measured / predicted",
    )
    target = max(predict.TARGET.values())
    for axes in figure.axes:
        if axes.lines:
            axes.axhspan(1 - target, 1 + target, color="#eeeeee", zorder=0)
            axes.axhline(1.0, color=COLORS["fa3"], linewidth=0.8)
    return figure


def _compared(evidence: Evidence) -> list[str]:
    """Who is shown beside a claim: FA3, cuDNN and the stages."""
    return [s for s in ("fa3", "cudnn") if s in evidence.subjects] + evidence.of_kind("stage")


def _claim(
    evidence: Evidence, constraint: str, metric: str, panel: str, axes: Any, told: bool = True
) -> None:
    """Draw what is claimed of a metric into a panel of a suite that it is judged in, and the number
    beside it."""
    for h in evidence.constraints.hypotheses:
        if (h.constraint, h.witness.get("metric")) != (constraint, metric):
            continue
        if not {panel, panel.partition("/")[0]} & {*h.suites}:
            continue
        axes.axhline(
            h.threshold, color="#444444", linestyle=(0, (1.5, 1.2)), linewidth=1.1, label=CLAIM
        )
        if told:
            sign = "≥" if h.at_least is not None else "≤"
            axes.annotate(
                f"{sign} {h.threshold:g}",
                (1.0, h.threshold),
                xycoords=("axes fraction", "data"),
                xytext=(2, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                color="#444444",
                annotation_clip=False,
            )


def _from_zero(row: Sequence[Any]) -> None:
    """One scale for the panels of a row, from zero, with what is claimed inside."""
    tops = [
        float(max(line.get_ydata())) for axes in row for line in axes.lines if len(line.get_ydata())
    ]
    top = 1.18 * max(tops, default=1.0)
    for axes in row:
        axes.set_ylim(-0.03 * top, top)


def _counter_row(
    evidence: Evidence, constraint: str, metric: str, ylabel: str, row: Sequence[Any]
) -> None:
    """A counter against seqlen in the four panels of the grid, and against batch of the gate.

    Points are joined where the run has the counters of the whole suite.
    """
    panels = [
        (
            "grid/causal" if causal else "grid/full",
            f"d {headdim}, {'causal' if causal else 'full'}",
            [p for p in evidence.suite("grid") if (p.headdim, p.causal) == (headdim, causal)],
        )
        for headdim, causal in PANELS
    ]
    panels.append(("gate", "gate problem", evidence.suite("gate")))
    for axes, (panel, title, problems) in zip(row, panels, strict=True):
        suite = panel.partition("/")[0]
        source = evidence.counter_suite(suite)
        x = [p.batch if suite == "gate" else p.seqlen_q for p in problems]
        for name in _compared(evidence):
            found = [evidence.metric(source, p.id, name, metric) for p in problems]
            _line(axes, name, x, found, joined=source == suite)
        axes.set_title(title, fontsize=7.5)
        if suite == "gate":
            _log_axis(axes, [p.batch for p in problems], "batch")
        else:
            _log_axis(axes, SEQLENS, "seqlen")
        axes.tick_params(labelsize=6, pad=1.5)
        _say_if_empty(axes)
        if axes.lines:
            _claim(evidence, constraint, metric, panel, axes, told=axes is row[-1])
        if axes is not row[0]:
            axes.tick_params(labelleft=False)
    row[0].set_ylabel(ylabel, fontsize=7.5)
    _from_zero(row)


def _counters(evidence: Evidence, constraint: str, *rows: tuple[str, str]) -> Any:
    """Counters of a constraint, a row each: five panels, four of the grid and one of the gate."""
    figure, all_axes = plt.subplots(
        len(rows), 5, figsize=(6.6, 1.55 * len(rows) + 0.45), layout="constrained", squeeze=False
    )
    for n, (row, (metric, ylabel)) in enumerate(zip(all_axes, rows, strict=True)):
        _counter_row(evidence, constraint, metric, ylabel, row)
        for axes in row:
            if n:
                axes.set_title("")
            if n < len(rows) - 1:
                axes.set_xlabel("")
    _legend(figure)
    return figure


def branching(evidence: Evidence) -> Any:
    """Inactive threads, and predicated-off ones."""
    return _counters(
        evidence,
        "branching",
        ("inactive_threads", "threads inactive (%)"),
        ("predicated_off", "inactive or pred. off (%)"),
    )


def sync(evidence: Evidence) -> Any:
    """Warp samples at CTA-wide barriers, and at named ones."""
    return _counters(
        evidence,
        "sync",
        ("samples_cta_barrier", "at CTA barriers (%)"),
        ("samples_named_barrier", "at named barriers (%)"),
    )


def memory(evidence: Evidence) -> Any:
    """Warp time waiting for global memory, and the tensor pipe."""
    return _counters(
        evidence,
        "memory",
        ("stall_memory", "waiting for memory (%)"),
        ("tensor_pipe", "tensor pipe active (%)"),
    )


def launch(evidence: Evidence) -> Any:
    """Latency that is not GPU time, gain over the stage before, and GPU time per sequence against
    batch; idle SM cycles over the grid and the gate."""
    problems = evidence.suite("gate")
    batches = [p.batch for p in problems]
    figure = plt.figure(figsize=(6.6, 3.8), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=(1, 1))
    above = parts[0].subplots(1, 4)
    below = parts[1].subplots(1, 5)
    for name in _compared(evidence):

        def found(metric: str, regime: str = "-", subject: str = name) -> list[Value | None]:
            return [evidence.metric("gate", p.id, subject, metric, regime) for p in problems]

        gpu = [
            None if v is None else Value(v.value / p.batch)
            for v, p in zip(found("gpu_us", "spaced"), problems, strict=True)
        ]
        of = [found(m) for m in ("launch_share", "launch_share_graph", "eager_gain")]
        for axes, values in zip(above, (*of, gpu), strict=True):
            _line(axes, name, batches, values)
    words = (
        "eager: not GPU time (%)",
        "graph: not GPU time (%)",
        "eager: gain of a stage",
        "GPU µs per sequence",
    )
    for axes, word in zip(above, words, strict=True):
        _log_axis(axes, batches, "batch")
        axes.tick_params(labelsize=6, pad=1.5)
        axes.set_title(word, fontsize=7)
        _say_if_empty(axes)
    for axes, metric in zip(
        above, ("launch_share", "launch_share_graph", "eager_gain"), strict=False
    ):
        if axes.lines:
            _claim(evidence, "launch", metric, "gate", axes)
    _counter_row(evidence, "launch", "idle_sm_cycles", "idle SM cycles (%)", below)
    _legend(figure)
    return figure


def controls(evidence: Evidence) -> Any:
    """The witness of each constraint against the planted dose."""
    known = evidence.constraints.constraints
    figure, all_axes = plt.subplots(1, len(known), figsize=(7.2, 2.0), layout="constrained")
    for axes, (name, constraint) in zip(all_axes, known.items(), strict=True):
        control = constraint["control"] or {}
        doses = [
            s for s in evidence.subjects if s.rpartition(".")[0] == control.get("subject", "-")
        ]
        points = []
        for subject in doses:
            values = [
                evidence.metric(control["suite"], p.id, subject, control["metric"])
                for p in evidence.suite(control["suite"])
            ]
            points += [(stage.subject(subject).dose or 0, v.value) for v in values if v]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", color="#2a74a8")
        else:
            axes.set_xticks([])
            _say_if_empty(axes)
        axes.set_title(name, fontsize=8)
        axes.set_xlabel("planted dose")
        axes.set_ylabel(control.get("metric", "").replace("_", " "), fontsize=7)
    return figure


COUNTED = ("branching", "launch", "sync", "memory")
"""The figures that show counters."""


def note(evidence: Evidence, name: str) -> str:
    """What is to be said under a figure: which problems its counters are of."""
    return evidence.counters if name in COUNTED else ""


FIGURES: dict[str, Callable[[Evidence], Any]] = {
    "grid": grid,
    "ratio": ratio,
    "two_clocks": two_clocks,
    "prediction": prediction,
    "branching": branching,
    "launch": launch,
    "sync": sync,
    "memory": memory,
    "controls": controls,
}


def save(figure: Any, path: Path) -> None:
    """Write a figure so that the same numbers give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dates: dict[str, None] = {"CreationDate": None} if path.suffix == ".pdf" else {"Date": None}
    figure.savefig(path, metadata=dates)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option("--out")],
    format: Annotated[str, typer.Option("--format", help="pdf or svg")] = "pdf",
    results: Annotated[Path, typer.Option("--results")] = Path("results"),
    problems: Annotated[Path, typer.Option("--problems")] = Path("config/problems.tsv"),
    constraints: Annotated[Path, typer.Option("--constraints")] = Path("config/constraints.yaml"),
) -> None:
    """Draw every figure into a folder."""
    evidence = load(results, problems, constraints)
    for name, draw in FIGURES.items():
        save(draw(evidence), out / f"{name}.{format}")


if __name__ == "__main__":
    typer.run(main)
