"""What the Snakefile asks before it lists a rule.

Is the configuration valid, which tier is it, which files are there, what precedes a tool.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from attn_ladder.problem import Problem
from attn_profiling import addenda, container, device, environment, record
from attn_profiling.config import Config, ConfigError, raw_files, validate

TARGETS = ("all", "results", "measure", "verify", "container")


def pick_tier(config: Config, *, remote: bool = False) -> str:
    """`measure` or `replay`: what `tier: auto` means on this machine.

    With `remote` the jobs run elsewhere, so a missing GPU here is no error.
    """
    if config["tier"] == "auto":
        return "measure" if environment.has_gpu() else "replay"
    if config["tier"] == "measure" and not remote and not environment.has_gpu():
        raise ConfigError(
            "config: tier='measure' needs an NVIDIA GPU, and nvidia-smi shows none; "
            "use tier=replay to render the recorded run"
        )
    return str(config["tier"])


def asked_for(words: Sequence[str]) -> set[str]:
    """The targets among the words of a command line; Snakemake knows them only later."""
    return {word for word in words if word in TARGETS or word.startswith(("results/", "runs/"))}


@dataclass(frozen=True)
class Plan:
    """One invocation of the workflow. `raw` is the folder of raw files, from the checkout."""

    config: Config
    tier: str
    run: str
    raw: Path
    engine: str
    subjects: tuple[str, ...]
    problems: dict[str, tuple[Problem, ...]]
    commit: str
    dirty: bool

    @property
    def raw_files(self) -> list[str]:
        """The files of a complete run, with their folder, and those of its addenda."""
        files = [str(self.raw / name) for name in raw_files(self.config)]
        added = (path for run in addenda.runs(self.raw) for path in sorted(run.rglob("*.json")))
        return files + [str(path) for path in added]

    @property
    def digest_file(self) -> Path:
        """Where the digest of the image of this tier is kept."""
        return Path(f"results/image/{self.tier}.digest")

    @property
    def image(self) -> list[str]:
        """An input of every rule that runs a tool: the image's digest, nothing when native."""
        return [] if self.engine == "none" else [str(self.digest_file)]

    def cmd(self, tool: str, *, gpu: bool = False, counters: bool = False) -> str:
        """The words that start `tool` in a shell command, inside the container if there is one."""
        before = container.prefix(self.engine, self.digest_file, gpu=gpu, counters=counters)
        if before or tool != "attn-profiling" or shutil.which(tool):
            return before + tool
        return f"{sys.executable} -m attn_profiling.cli"

    @cached_property
    def build(self) -> str:
        """The shell command that builds the image of this tier, up to its --out."""
        engine = self.config["container"]["engine"]
        words = [sys.executable, "-m", "attn_profiling.container", "build", "--target", self.tier]
        words += ["--engine", "auto" if engine == "none" else engine]
        for key in ("base", "ca"):
            if self.config["container"][key]:
                words += [f"--{key}", self.config["container"][key]]
        return " ".join(words)

    def start(self) -> None:
        """Write what a measuring run was asked to do, before its first job."""
        path = self.raw / "config.json"
        settings = {**self.config["container"], "engine": self.engine}
        text = json.dumps({**self.config, "container": settings}, indent=1, sort_keys=True) + "\n"
        if self.tier == "measure" and not (path.is_file() and path.read_text() == text):
            record.write_text(path, text)

    def advise(self) -> None:
        """Say how to go on after a measuring run that stopped."""
        if self.tier == "measure":
            print(f"what was measured is kept; to go on: --config run={self.run}", file=sys.stderr)

    def banner(self) -> str:
        """Tier, device, commit and image, as printed first and stamped on what is rendered."""
        if self.engine == "none":
            image = "none, native"
        elif self.digest_file.is_file():
            image = f"{self.digest_file.read_text().strip()} ({self.engine})"
        else:
            image = f"to be built ({self.engine})"
        where = self.config["device"] if self.tier == "replay" else "this machine's GPU"
        dirty = " with local changes" if self.dirty else ""
        return (
            f"tier: {self.tier}   device: {where}   run: {self.raw}/\n"
            f"commit: {self.commit}{dirty}   image: {image}"
        )


def _run_id(config: Config) -> str:
    """The run's id; a new one is made once and inherited by the processes that Snakemake starts."""
    if config["run"]:
        return str(config["run"])
    return os.environ.setdefault("ATTN_LADDER_RUN", time.strftime("%Y%m%d-%H%M%S"))


_HELD: list[int] = []
_DERIVED = ("results/", "paper/generated/")


def clear_killed(folder: Path = Path(".snakemake")) -> None:
    """Clear what a killed invocation left in Snakemake's folder, so that this one goes on.

    Its locks and its marks of unfinished files would stop every later one. Ours dies with the
    process: where it is free, theirs are stale. Derived files that were being written go; raw
    files are written whole or not at all, so they stay.
    """
    folder.mkdir(exist_ok=True)
    held = os.open(folder / "attn-ladder.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        print("another invocation is at work in this folder", file=sys.stderr)
        return
    _HELD.append(held)
    locks = sorted((folder / "locks").glob("*.lock"))
    marks = sorted(path for path in (folder / "incomplete").rglob("*") if path.is_file())
    for mark in marks:
        parts = mark.relative_to(folder / "incomplete").parts
        name = base64.urlsafe_b64decode("".join(part.lstrip("@") for part in parts)).decode()
        if name.startswith(_DERIVED):
            Path(name).unlink(missing_ok=True)
    for path in [*marks, *locks]:
        path.unlink(missing_ok=True)
    if locks:
        print("an earlier invocation was killed: going on from what it finished", file=sys.stderr)


def _check_board(plan: Plan) -> None:
    """One run is of one board: another of the same model would only be found when promoting."""
    begun = plan.raw / "device.json"
    if plan.tier != "measure" or not begun.is_file():
        return
    try:
        here = device.open_gpu().uuid
    except device.NoGpu:
        return
    there = json.loads(begun.read_text())["provenance"]["gpu_uuid"]
    if here != there:
        raise ConfigError(
            f"run {plan.run!r} was begun on the GPU {there}, and this is {here}; a run is of one"
            " GPU: go on with it there, or begin another (--config run=ID)"
        )


def _check_recorded(plan: Plan) -> None:
    if not plan.raw.is_dir():
        there = sorted(path.parent.name for path in Path("measurements").glob("*/device.json"))
        raise ConfigError(
            f"there is no recorded run in {plan.raw}/; recorded: {', '.join(there) or 'none'}. Name"
            " one that is (--config device=NAME), or make one on a machine with the GPU: make"
            " measure, then make promote RUN=<id>"
        )
    absent = [name for name in raw_files(plan.config) if not (plan.raw / name).is_file()]
    if absent:
        raise ConfigError(
            f"the recorded run in {plan.raw}/ lacks {', '.join(absent)}, which its config.json"
            " names. A replay measures nothing: restore the files, or measure on a machine with"
            " the GPU (make measure) and make that the recorded run (make promote RUN=<id>)"
        )


def _recorded(config: Config, raw: Path) -> tuple[Config, list[str]]:
    """The configuration with the suites that were recorded, and in what it differs from the
    recorded run: a replay renders what there is, and says what was measured otherwise or not."""
    path = raw / "config.json"
    if not path.is_file():
        return config, []
    recorded = json.loads(path.read_text())
    held = {**config, "suites": recorded["suites"]}
    there = {*raw_files(held), *addenda.added(raw)}
    absent = [name for name in raw_files(config) if name not in there]
    told = [f"not in the recorded run, so not rendered: {', '.join(absent)}"] if absent else []
    for key, now in config["measuring"].items():
        then = recorded.get("measuring", {}).get(key, now)
        if then != now:
            told.append(f"recorded with measuring.{key}={then}; the configuration has {now}")
    return held, told


def prepare(
    config: Config,
    root: Path,
    targets: Collection[str],
    *,
    main: bool = True,
    remote: bool = False,
) -> Plan:
    """Validate, decide and announce; in the main process also check what the run will need.

    `targets` are those of the command line; `remote` says that jobs run elsewhere. Raises
    `ValueError` before any work is done.
    """
    selection = validate(config, root)
    tier = pick_tier(config, remote=remote)
    run = _run_id(config) if tier == "measure" else str(config["device"])
    engine = container.choose(config["container"]["engine"], gpu=tier == "measure")
    head, dirty = device.commit(root)
    told: list[str] = []
    if tier == "replay":
        config, told = _recorded(config, Path("measurements", run))
    plan = Plan(
        config=config,
        tier=tier,
        run=run,
        raw=Path("runs", run) if tier == "measure" else Path("measurements", run),
        engine=engine,
        subjects=selection.subjects,
        problems=dict(selection.problems),
        commit=head,
        dirty=dirty,
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not main:
        return plan
    print(plan.banner(), file=sys.stderr, flush=True)
    if not remote:  # the jobs of a killed invocation may still run elsewhere
        clear_killed()
    measured = Path("runs", str(config["run"]), "device.json").is_file()
    if "verify" in targets and (not config["run"] or tier == "replay" and not measured):
        raise ConfigError(
            f"config: run={config['run']!r} must name the folder of runs/ to compare with the"
            " recorded run, or on a machine with the GPU to measure into first: --config run=<id>"
        )
    if tier == "replay" and not set(targets) & {"container", "verify"}:
        _check_recorded(plan)
    _check_board(plan)
    for line in told:
        print(line, file=sys.stderr, flush=True)
    wants_pdf = config["paper"] and (not targets or {"all", "results/main.pdf"} & set(targets))
    if wants_pdf and engine == "none":
        missing = environment.missing_tex()
        if missing:
            raise ConfigError(environment.tex_message(missing))
    return plan
