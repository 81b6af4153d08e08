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

COLORS = {
    "fa3": "#222222",
    "cudnn": "#7a7a7a",
    "fa2": "#b5b5b5",
    "fa4": "#a06a2c",
    "stage1": "#b8d4e8",
    "stage2": "#86b6d9",
    "stage3": "#5496c4",
    "stage4": "#2a74a8",
    "stage5": "#c0392b",
}
MARKERS = {"fa3": "s", "cudnn": "D", "fa2": "v", "fa4": "^"}
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


def _line(axes: Any, name: str, x: Sequence[float], values: Sequence[Value | None]) -> None:
    kept = [(a, v) for a, v in zip(x, values, strict=True) if v is not None]
    if not kept:
        return
    color = COLORS.get(name, "#555555")
    xs, ys = [a for a, _ in kept], [v.value for _, v in kept]
    axes.plot(xs, ys, color=color, marker=MARKERS.get(name, "o"), label=label(name))
    bars = [(a, v.low, v.high) for a, v in kept if v.low is not None and v.high is not None]
    if bars:
        axes.vlines([b[0] for b in bars], [b[1] for b in bars], [b[2] for b in bars], color=color)


def _seqlen_axis(axes: Any) -> None:
    ticks = [512, 1024, 2048, 4096, 8192, 16384]
    axes.set_xscale("log", base=2)
    axes.set_xlim(400, 21000)
    axes.set_xticks(ticks, ["512", "1k", "2k", "4k", "8k", "16k"])
    axes.minorticks_off()


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
        axes.set_xlabel("seqlen")
        _seqlen_axis(axes)
        _say_if_empty(axes)
    all_axes[0].set_ylabel(ylabel)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
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


def _profile(evidence: Evidence, metric: str, ylabel: str, axes: Any) -> None:
    """One metric on the profiled problems, one group of bars for each."""
    names, problems = _shown(evidence), evidence.suite("profile")
    width = 0.8 / max(len(names), 1)
    for n, name in enumerate(names):
        found = [evidence.metric("profile", p.id, name, metric) for p in problems]
        kept = [(i + (n - (len(names) - 1) / 2) * width, v.value) for i, v in enumerate(found) if v]
        if kept:
            axes.bar(
                [x for x, _ in kept],
                [y for _, y in kept],
                width,
                color=COLORS.get(name, "#555555"),
                label=label(name),
            )
    words = [
        f"{'gate' if p.id.startswith('gate') else f'd{p.headdim}'}"
        f"\n{'causal' if p.causal else 'full'}\n{p.seqlen_q}"
        for p in problems
    ]
    axes.set_xticks(range(len(problems)), words, fontsize=6)
    axes.set_ylabel(ylabel)
    axes.grid(axis="x", visible=False)
    _say_if_empty(axes)


def _threshold(evidence: Evidence, constraint: str, axes: Any) -> None:
    primary = next(
        h
        for h in evidence.constraints.hypotheses
        if (h.constraint, h.role) == (constraint, "primary")
    )
    axes.axhline(primary.threshold, color="#c0392b", linestyle=":", linewidth=1)
    axes.annotate(
        f"claimed for FA3: {primary.threshold:g}",
        (1.0, primary.threshold),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=6.5,
        color="#c0392b",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
    )


def _two_profiles(
    evidence: Evidence, constraint: str, metrics: Sequence[tuple[str, str]], claimed: int = 0
) -> Any:
    figure, all_axes = plt.subplots(2, 1, figsize=(7.2, 3.6), layout="constrained")
    for n, (axes, (metric, ylabel)) in enumerate(zip(all_axes, metrics, strict=True)):
        _profile(evidence, metric, ylabel, axes)
        if n == claimed and axes.patches:
            _threshold(evidence, constraint, axes)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def branching(evidence: Evidence) -> Any:
    """Inactive threads, and predicated-off ones, on the profiled problems."""
    return _two_profiles(
        evidence,
        "branching",
        (
            ("inactive_threads", "threads inactive (%)"),
            ("predicated_off", "inactive or pred. off (%)"),
        ),
    )


def sync(evidence: Evidence) -> Any:
    """Warp samples at CTA-wide barriers, and at named ones."""
    return _two_profiles(
        evidence,
        "sync",
        (
            ("samples_cta_barrier", "held by CTA barriers (%)"),
            ("samples_named_barrier", "held by named barriers (%)"),
        ),
    )


def memory(evidence: Evidence) -> Any:
    """Warp time waiting for global memory, and the tensor pipe."""
    return _two_profiles(
        evidence,
        "memory",
        (("stall_memory", "waiting for memory (%)"), ("tensor_pipe", "tensor pipe active (%)")),
    )


def launch(evidence: Evidence) -> Any:
    """Latency that is not GPU time, and time per sequence, against batch."""
    problems = evidence.suite("gate")
    batches = [p.batch for p in problems]
    figure, all_axes = plt.subplots(1, 3, figsize=(7.2, 2.3), layout="constrained")
    for name in _shown(evidence):

        def found(metric: str, regime: str = "-", subject: str = name) -> list[Value | None]:
            return [evidence.metric("gate", p.id, subject, metric, regime) for p in problems]

        _line(all_axes[0], name, batches, found("launch_share"))
        _line(all_axes[1], name, batches, found("launch_share_graph"))
        gpu = [
            None if v is None else Value(v.value / p.batch)
            for v, p in zip(found("gpu_us", "spaced"), problems, strict=True)
        ]
        _line(all_axes[2], name, batches, gpu)
    for axes in all_axes:
        _say_if_empty(axes)
    if all_axes[0].lines:
        _threshold(evidence, "launch", all_axes[0])
    words = (
        "eager, not GPU time (%)",
        "graph, not GPU time (%)",
        "GPU µs per sequence",
    )
    for axes, word in zip(all_axes, words, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.set_xlabel("batch")
        axes.set_ylabel(word)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
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
