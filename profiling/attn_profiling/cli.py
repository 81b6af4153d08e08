"""`attn-profiling`: what the workflow's rules call, one file each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure attention kernels and derive what the paper says of them.",
)
console = Console(stderr=True)
P = ParamSpec("P")

ConfigOption = Annotated[
    Path, typer.Option("--config", help="Merged configuration, as in runs/<id>/config.json.")
]
RunOption = Annotated[Path, typer.Option("--run", help="Folder of the run: runs/<id>.")]
SuiteOption = Annotated[str, typer.Option("--suite", help="Set of problems.")]
OutOption = Annotated[Path, typer.Option("--out", help="File to write.")]
CloseOption = Annotated[
    bool, typer.Option("--close", help="Measure nothing: record what is whole of a broken-off run.")
]


def _fail(error: BaseException) -> NoReturn:
    console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1) from None


def _expected() -> tuple[type[BaseException], ...]:
    """Errors that explain themselves; any other is a fault of the program and shows its trace."""
    from attn_profiling.activity import ActivityError
    from attn_profiling.device import NoGpu
    from attn_profiling.guard import Patched
    from attn_profiling.launches import MeasureError
    from attn_profiling.ncu import NcuError

    return (ValueError, NoGpu, MeasureError, NcuError, ActivityError, Patched)


def _explained(function: Callable[P, None]) -> Callable[P, None]:
    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except _expected() as error:
            _fail(error)

    return command


@app.command("device")
@_explained
def device_command(config: ConfigOption, run: RunOption, out: OutOption) -> None:
    """Record what is measured on: the GPU, its software, and the ceilings it reaches."""
    import torch

    from attn_profiling import device, record, settings
    from attn_profiling.session import Session

    chosen = settings.load(config, run)
    session = Session(chosen, chosen.subjects)
    if not torch.cuda.is_available():
        raise device.NoGpu(
            f"NVML sees {session.gpu.name}, but torch {torch.__version__} cannot use it; install a"
            " CUDA build of torch (requirements/cuda.txt) and a driver that is new enough"
        )
    found = device.properties(torch, session.gpu)
    ceilings = device.ceilings(torch, session.gpu)
    data = {
        **session.header("device", None),
        "device": device.slug_of(session.gpu.name),
        "properties": found,
        "ceilings": ceilings,
    }
    record.write(out, data, "device")
    for name, ceiling in ceilings.items():
        console.print(f"{name}: {ceiling['value']:.4g} {ceiling['unit']}", highlight=False)


@app.command("check")
@_explained
def check_command(config: ConfigOption, run: RunOption, suite: SuiteOption, out: OutOption) -> None:
    """Decide which subject is right on which problem of a suite."""
    from attn_profiling import check, settings

    data = check.run(settings.load(config, run), suite, out)
    counts: dict[str, dict[str, int]] = {}
    for row in data["results"]:
        found = counts.setdefault(row["subject"], {})
        found[row["status"]] = found.get(row["status"], 0) + 1
        if row["status"] in ("failed", "error"):
            _say(f"{row['subject']} {row['problem']['id']}: {row['status']}: {row['message']}")
    for subject, found in counts.items():
        _say(f"{subject}: {', '.join(f'{n} {status}' for status, n in found.items())}")


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@app.command("time")
@_explained
def time_command(
    config: ConfigOption,
    run: RunOption,
    suite: SuiteOption,
    out: OutOption,
    regime: Annotated[str, typer.Option("--regime", help="spaced or sustained.")] = "spaced",
    close: CloseOption = False,
) -> None:
    """Time a suite: per-launch samples of every subject that passed its check."""
    import statistics

    from attn_profiling import settings, timing
    from attn_profiling.stats import burst_means

    make = timing.close if close else timing.run
    data = make(settings.load(config, run), suite, regime, out)
    for row in data["problems"]:
        last = row["attempts"][-1]
        shown_of = burst_means if regime == "sustained" else dict
        medians = {
            name: statistics.median(us for times in shown_of(sample)["gpu_us"] for us in times)
            for name, sample in last["samples"].items()
        }
        base = medians.get(str(last["aa_subject"]).split("#")[0])
        shown = ", ".join(
            f"{name} {us:.1f} µs" + (f" ({base / us:.3f})" if base else "")
            for name, us in medians.items()
        )
        _say(f"{row['problem']['id']}: {row['status']}, A/A {last['aa_ratio']}: {shown}")


@app.command("host")
@_explained
def host_command(
    config: ConfigOption,
    run: RunOption,
    suite: SuiteOption,
    out: OutOption,
    close: CloseOption = False,
) -> None:
    """Measure what a call costs the host, and its latency eager and in a CUDA graph."""
    from attn_profiling import host, settings

    make = host.close if close else host.run
    make(settings.load(config, run), suite, out)


@app.command("profile")
@_explained
def profile_command(
    config: ConfigOption,
    run: RunOption,
    suite: SuiteOption,
    out: OutOption,
    sections: Annotated[
        str | None,
        typer.Option(help="full or listed; by default full for the suite profile."),
    ] = None,
    close: CloseOption = False,
) -> None:
    """Read hardware counters of a suite with Nsight Compute."""
    from attn_profiling import ncu, settings

    make = ncu.close if close else ncu.run
    make(settings.load(config, run), suite, sections, out)


@app.command("serving")
@_explained
def serving_command(
    config: ConfigOption,
    run: RunOption,
    out: OutOption,
    part: Annotated[
        str, typer.Option("--part", help="A suite of decoding, or `model`: tokens of a model.")
    ],
) -> None:
    """Check and time decoding beside FA3, or record the tokens, memory and speed of a model."""
    from attn_profiling import serving, settings
    from attn_profiling.config import MODEL

    chosen = settings.load(config, run)
    is_model = part == MODEL
    data = serving.run_model(chosen, out) if is_model else serving.run(chosen, part, out)
    for line in serving.summary(data):
        _say(line)


@app.command("tidy")
@_explained
def tidy_command(
    raw: Annotated[Path, typer.Option("--raw", help="runs/<id> or measurements/<device>.")],
    tier: Annotated[str, typer.Option("--tier", help="replay or measure; stamped on all output.")],
    out_metrics: Annotated[Path, typer.Option("--out-metrics")],
    out_speedups: Annotated[Path, typer.Option("--out-speedups")],
    out_provenance: Annotated[Path, typer.Option("--out-provenance")],
    problems: Annotated[Path, typer.Option("--problems")] = Path("config/problems.tsv"),
) -> None:
    """Turn the raw files of a run into metrics.csv, speedups.csv and their provenance."""
    from attn_profiling import tidy

    tables = tidy.tidy(raw, tier, problems)
    tidy.write(tables, out_metrics, out_speedups, out_provenance)
    for left_out in tables.provenance["stale"]:
        _say(f"stale: {left_out['file']}: {left_out['reason']}")
    for note in tables.provenance["notes"]:
        _say(f"note: {note}")


@app.command("verdict")
@_explained
def verdict_command(
    metrics: Annotated[Path, typer.Option("--metrics")],
    speedups: Annotated[Path, typer.Option("--speedups")],
    provenance: Annotated[Path, typer.Option("--provenance")],
    constraints: Annotated[Path, typer.Option("--constraints")],
    out: OutOption,
) -> None:
    """Decide the claims of constraints.yaml from the tidy tables."""
    from attn_profiling import record, verdict

    record.write_text(out, verdict.verdicts(metrics, speedups, provenance, constraints))


@app.command("predict")
@_explained
def predict_command(
    write: Annotated[bool, typer.Option("--write", help="Write the file of predictions.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail where it is out of date.")] = False,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Say how far pilot times are off.")
    ] = False,
    problems: Annotated[Path, typer.Option("--problems")] = Path("config/problems.tsv"),
    out: OutOption = Path("config/predictions.csv"),
) -> None:
    """Predict the time and the limit of every stage; commit the file before measuring."""
    from attn_profiling import predict, record

    if write + check + pilot != 1:
        raise ValueError("name one of --write, --check and --pilot")
    if pilot:
        for (source, subject), errors in predict.pilot_errors(problems).items():
            worst = max(errors, key=abs)
            _say(f"{source} {subject}: {predict.off(errors):.1%} off in the median, {worst:+.1%}")
        return
    current = predict.text(problems)
    if write:
        record.write_text(out, current)
    elif not out.is_file() or out.read_text() != current:
        raise ValueError(
            f"{out} is not what the model says now; run `attn-profiling predict --write` and commit"
            " it before the next run is measured"
        )


@app.command("promote")
@_explained
def promote_command(
    run: RunOption,
    to: Annotated[
        Path | None, typer.Option(help="Default: measurements/<device of the run>.")
    ] = None,
    add: Annotated[
        bool,
        typer.Option(
            "--add", help="Beside the recorded run: what it lacks of timings, host costs, serving."
        ),
    ] = False,
) -> None:
    """Make a complete run the recorded one of its device, replacing what was there, or with --add
    an addendum of it."""
    from attn_profiling import addenda, promote

    for line in promote.failed_checks(run):
        _say(f"warning: {line}; it is recorded, and tables and criteria count it")
    if add:
        _say(f"{run} is recorded in {addenda.add(run, to)}")
        return
    target, total = promote.promote(run, to, tell=lambda name: _say(f"packed {name}"))
    _say(f"{run} is recorded in {target}: {total / 1e6:.1f} MB")


@app.command("verify")
@_explained
def verify_command(
    run: RunOption,
    against: Annotated[
        Path | None, typer.Option(help="Default: measurements/<device of the run>.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative change of a ratio that passes.")
    ] = None,
) -> None:
    """Compare a run with the recorded one; exit status 0 PASS, 1 FAIL, 3 AMBIGUOUS."""
    from attn_profiling import verify
    from attn_profiling.record import read

    if against is None:
        against = Path("measurements") / read(run / "device.json", "device")["device"]
    claims = verify.verify(run, against, verify.TOLERANCE if tolerance is None else tolerance)
    table = Table(title=f"{run} against {against}")
    for column in ("claim", "recorded", "measured", "change", "95 % interval", "verdict", "note"):
        table.add_column(column)
    for claim in claims:
        table.add_row(
            claim.claim,
            claim.recorded,
            claim.fresh,
            "" if claim.change is None else f"{claim.change:+.2%}",
            "" if claim.low is None or claim.high is None
            else f"{claim.low:+.2%} … {claim.high:+.2%}",
            claim.verdict,
            claim.note or "",
        )  # fmt: skip
    Console(width=None if console.is_terminal else 160).print(table)
    verdict = verify.overall(claims)
    _say(f"verdict: {verdict}")
    raise typer.Exit(verify.EXIT_STATUS[verdict])


@app.command("keep")
@_explained
def keep_command(run: RunOption) -> None:
    """Keep a run's checks and times beside the recorded run, as a replication of it."""
    from attn_profiling import replication

    _say(f"{run} is kept in {replication.keep(run)}")


@app.command("replications")
@_explained
def replications_command(
    raw: Annotated[Path, typer.Option(help="The run that they are compared with.")],
    device: Annotated[str, typer.Option(help="The replications of which device.")],
    out: OutOption,
) -> None:
    """Compare the kept replications with a run: a table of ratios."""
    from attn_profiling import replication
    from attn_profiling.record import write_text
    from attn_profiling.tidy import csv_text

    rows = replication.compare(raw, replication.home(device))
    write_text(out, csv_text(replication.COLUMNS, rows))


@app.command("worker", hidden=True)
def worker_command(kind: str, subjects: Annotated[str | None, typer.Argument()] = None) -> None:
    """A child process of check, time, host or serving."""
    from attn_profiling import check, host, serving, timing

    names = subjects.split(",") if subjects else []
    works: dict[str, Callable[[], Any]] = {
        "check": check.work,
        "time": lambda: timing.work(names),
        "host": lambda: host.work(names),
        "serving": lambda: serving.work(names[0]),
    }
    works[kind]()


@app.command("profile-worker", hidden=True)
def profile_worker_command(request: Path) -> None:
    """The program that ncu profiles."""
    from attn_profiling import ncu

    ncu.work(request)


if __name__ == "__main__":
    app()
