"""The workflow as a user meets it: what it says first, what it refuses, what it lists."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from attn_profiling import workflow
from attn_profiling.config import raw_files

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("Snakefile", "config", "docker", "kernels", "notebooks", "paper", "profiling")
DEFAULT = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources without a recorded run, results or repository."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    skipped = shutil.ignore_patterns("__pycache__", "generated")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("Snakefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    (folder / ".commit").write_text("c" * 40 + "\n")
    return folder


@pytest.fixture
def recorded(checkout):
    """The same with placeholders where a recorded run has its files; enough for a dry run."""
    for name in raw_files(DEFAULT):
        path = checkout / "measurements" / DEFAULT["device"] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    return checkout


def start(folder, *words, path=None, **variables):
    """Start Snakemake in a folder without a GPU, in a process group of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}/kernels:{folder}/profiling",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"],
        **variables,
    }
    environment.pop("ATTN_LADDER_RUN", None)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nocolor", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def snakemake(folder, *words, path=None, **variables):
    """Run Snakemake like that; returns the ended process with stderr in stdout."""
    process = start(folder, *words, path=path, **variables)
    out, _ = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def left_behind(folder):
    """What a run made beside the sources."""
    made = [name for name in ("results", "runs") if (folder / name).exists()]
    return made + [p.name for p in (folder / "paper").glob("generated")]


def test_a_replay_says_first_what_it_is(recorded):
    run = snakemake(recorded, "-n", "results")
    assert run.returncode == 0, run.stdout
    first = run.stdout.splitlines()
    assert first[0].startswith("tier: replay   device: h100-sxm-80gb")
    assert first[1].startswith(f"commit: {'c' * 40}") and "image: none, native" in first[1]
    assert left_behind(recorded) == []


def test_without_a_recorded_run_it_says_how_to_get_one(checkout):
    run = snakemake(checkout, "-n", "results")
    assert run.returncode != 0
    assert "there is no recorded run in measurements/h100-sxm-80gb/; recorded: none" in run.stdout
    assert "make promote RUN=<id>" in run.stdout
    assert "Missing input files" not in run.stdout


def test_a_missing_recorded_file_is_named(recorded):
    (recorded / "measurements" / "h100-sxm-80gb" / "timing" / "gate.spaced.json").unlink()
    run = snakemake(recorded, "-n", "results")
    assert run.returncode != 0
    assert "lacks timing/gate.spaced.json, which its config.json names" in run.stdout
    assert "Missing input files" not in run.stdout


def test_what_was_not_recorded_is_announced_and_the_rest_is_rendered(recorded):
    folder = recorded / "measurements" / "h100-sxm-80gb"
    held = json.loads(json.dumps(DEFAULT))
    (folder / "config.json").write_text(json.dumps(held))
    assert "not in the recorded run" not in snakemake(recorded, "-n", "results").stdout
    held["suites"]["time"]["sustained"] = []
    (folder / "config.json").write_text(json.dumps(held))
    run = snakemake(recorded, "-n", "results")
    assert run.returncode == 0, run.stdout
    assert "not in the recorded run, so not rendered: timing/" in run.stdout
    assert "recorded with measuring" not in run.stdout
    held["measuring"]["gap_us"] = 7
    (folder / "config.json").write_text(json.dumps(held))
    told = "recorded with measuring.gap_us=7; the configuration has 1000"
    assert told in snakemake(recorded, "-n", "results").stdout


def test_another_device_is_named(recorded):
    run = snakemake(recorded, "-n", "results", "--config", "device=a100-sxm-80gb")
    assert "there is no recorded run in measurements/a100-sxm-80gb/" in run.stdout
    assert "recorded: h100-sxm-80gb" in run.stdout


def test_a_bad_key_stops_before_any_work(recorded):
    run = snakemake(recorded, "results", "--config", "teir=replay")
    assert run.returncode != 0
    assert "'teir' is not a key; did you mean 'tier'?" in run.stdout
    assert left_behind(recorded) == []


def test_measuring_needs_a_gpu(recorded):
    run = snakemake(recorded, "-n", "measure", "--config", "tier=measure")
    assert run.returncode != 0
    assert "tier='measure' needs an NVIDIA GPU" in run.stdout
    assert left_behind(recorded) == []


def test_tex_is_asked_for_before_any_work(recorded, tmp_path):
    bare = tmp_path / "bare"
    for tool in ("bash", "sh", "git", "uname"):
        found = shutil.which(tool)
        if found:
            bare.mkdir(exist_ok=True)
            (bare / tool).symlink_to(found)
    run = snakemake(recorded, PATH=str(bare))
    assert run.returncode != 0
    assert "the PDF needs TeX, and this machine lacks latexmk" in run.stdout
    assert "make results" in run.stdout
    assert left_behind(recorded) == []
    assert snakemake(recorded, "-n", "results", PATH=str(bare)).returncode == 0
    run = snakemake(recorded, "-n", "--config", "paper=false", PATH=str(bare))
    assert run.returncode == 0, run.stdout


def test_a_gpu_means_measuring(checkout, tmp_path):
    if not (ROOT / "profiling" / "measure.smk").exists():
        pytest.skip("no rules that measure")
    executable(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: a stand-in'")
    words = ("-n", "measure", "--config", "run=trial")
    run = snakemake(checkout, *words, path=tmp_path / "bin", CUDA_VISIBLE_DEVICES="0")
    assert run.returncode == 0, run.stdout
    assert "tier: measure   device: this machine's GPU" in run.stdout
    assert "runs/trial/timing/gate.spaced.json" in run.stdout
    assert left_behind(checkout) == []


def test_replay_on_a_machine_with_a_gpu(recorded, tmp_path):
    executable(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: a stand-in'")
    words = ("-n", "results", "--config", "tier=replay")
    run = snakemake(recorded, *words, path=tmp_path / "bin", CUDA_VISIBLE_DEVICES="0")
    assert "tier: replay" in run.stdout


def test_verify_needs_a_run(recorded):
    run = snakemake(recorded, "-n", "verify")
    assert "run=None must name the folder of runs/" in run.stdout


def test_a_run_is_of_one_board(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    begun = Path("runs/one/device.json")
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({"provenance": {"gpu_uuid": "GPU-1"}}))
    monkeypatch.setattr(workflow.environment, "has_gpu", lambda: True)
    config = {**DEFAULT, "tier": "measure", "run": "one"}

    def prepared(uuid):
        monkeypatch.setattr(workflow.device, "open_gpu", lambda: SimpleNamespace(uuid=uuid))
        return workflow.prepare(config, checkout, {"measure"})

    assert prepared("GPU-1").raw == Path("runs/one")
    with pytest.raises(ValueError, match="run 'one' was begun on the GPU GPU-1, and this is GPU-2"):
        prepared("GPU-2")


STEP = """

rule step:
    output:
        "results/made",
    shell:
        "echo half > {output}; if [ -e killed ]; then echo whole > {output}; else sleep 60; fi"
"""


def test_a_killed_run_goes_on(recorded):
    """Neither Snakemake's lock nor what was half written stands in the way of the next one."""
    with (recorded / "Snakefile").open("a") as handle:
        handle.write(STEP)
    made = recorded / "results" / "made"
    killed = start(recorded, "results/made")
    for _ in range(300):
        if made.exists():
            break
        time.sleep(0.1)
    second = snakemake(recorded, "results/made")
    assert second.returncode != 0 and killed.poll() is None
    assert "another invocation is at work in this folder" in second.stdout
    assert made.read_text() == "half\n"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list((recorded / ".snakemake" / "locks").iterdir())
    (recorded / "killed").touch()
    run = snakemake(recorded, "results/made")
    assert run.returncode == 0, run.stdout
    assert "an earlier invocation was killed: going on from what it finished" in run.stdout
    assert made.read_text() == "whole\n"
    assert "an earlier invocation" not in snakemake(recorded, "results/made").stdout


def test_a_raw_file_that_was_being_written_is_whole_and_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marks = tmp_path / ".snakemake" / "incomplete"
    for name in ("runs/one/timing/gate.spaced.json", "results/metrics.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.touch()
        mark = marks.joinpath(base64.urlsafe_b64encode(name.encode()).decode())
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    workflow.clear_killed()
    assert (tmp_path / "runs/one/timing/gate.spaced.json").exists()
    assert not (tmp_path / "results/metrics.csv").exists()
    assert list(marks.iterdir()) == []


FAKE_DOCKER = """
echo "$@" >> {log}
while [ $# -gt 0 ]; do
    if [ "$1" = --iidfile ]; then printf 'sha256:%064d' 7 > "$2"; fi
    shift
done
"""


def test_the_image_is_built_once_and_a_second_run_does_nothing(recorded, tmp_path):
    log = tmp_path / "calls"
    executable(tmp_path / "bin" / "docker", FAKE_DOCKER.format(log=log))
    words = ("container", "--config", "container={engine: docker}")
    run = snakemake(recorded, *words, path=tmp_path / "bin")
    assert run.returncode == 0, run.stdout
    digest = recorded / "results" / "image" / "replay.digest"
    assert digest.read_text() == f"sha256:{7:064d}\n"
    assert "--target replay" in log.read_text()
    again = snakemake(recorded, *words, path=tmp_path / "bin")
    assert "Nothing to be done" in again.stdout
    assert f"image: sha256:{7:064d} (docker)" in again.stdout
    assert log.read_text().count("build") == 1


def test_with_an_engine_the_rules_wait_for_the_image(recorded, tmp_path):
    executable(tmp_path / "bin" / "docker", "exit 0")
    words = ("-n", "results", "--config", "container={engine: docker}")
    run = snakemake(recorded, *words, path=tmp_path / "bin")
    assert run.returncode == 0, run.stdout
    assert "image: to be built (docker)" in run.stdout
    assert "rule image:" in run.stdout
    assert "rule image:" not in snakemake(recorded, "-n", "results").stdout


def test_a_named_engine_that_does_not_work_is_an_error(recorded, tmp_path):
    executable(tmp_path / "bin" / "podman", "echo 'no daemon' >&2; exit 1")
    words = ("-n", "results", "--config", "container={engine: podman}")
    run = snakemake(recorded, *words, path=tmp_path / "bin")
    assert run.returncode != 0
    assert "container.engine='podman' does not work: `podman info` failed: no daemon" in run.stdout


def test_the_profile_allows_one_job_on_the_gpu(recorded):
    profile = yaml.safe_load((ROOT / "config/profiles/default/config.yaml").read_text())
    assert profile["resources"] == ["gpu=1"]
    run = snakemake(recorded, "-n", "results", "--workflow-profile", "config/profiles/default")
    assert run.returncode == 0, run.stdout


LINT_EXCEPTIONS = {
    # Snakemake drives neither docker nor podman, so the prefix of the tools replaces `container:`.
    "Specify a conda environment or container for each rule.",
    # The inputs of a measurement depend on its suite; the functions are of use to these rules only.
    "Mixed rules and functions in same snakefile.",
    # The options that all rules of a file share are one constant.
    "Shell command directly uses variable MEASURE from outside of the rule",
    "Shell command directly uses variable LOOK_UP from outside of the rule",
    # The tables that everything else reads are one list, so one command names its members.
    "Do not access input and output files individually by index in shell commands",
    "Param constraints is a prefix of input or output file but hardcoded",
}


def lints(text):
    """The titles of what `snakemake --lint` found."""
    lines = [line.strip() for line in text.splitlines()]
    return {line.removeprefix("* ").rstrip(":") for line in lines if line.startswith("* ")}


@pytest.mark.parametrize("tier", ["replay", "measure"])
def test_lint_finds_nothing_but_the_listed_exceptions(recorded, tmp_path, tier):
    executable(tmp_path / "bin" / "nvidia-smi", "echo 'GPU 0: a stand-in'")
    words = ("--lint", "--config", f"tier={tier}", "paper=False")
    run = snakemake(recorded, *words, path=tmp_path / "bin", CUDA_VISIBLE_DEVICES="0")
    assert "Lints for rule" in run.stdout
    assert lints(run.stdout) <= LINT_EXCEPTIONS, run.stdout


def test_a_rule_without_a_log_is_seen(recorded):
    rule = '\n\nrule careless:\n    output:\n        "x",\n    shell:\n        "touch {output}"\n'
    with (recorded / "Snakefile").open("a") as handle:
        handle.write(rule)
    assert "No log directive defined" in lints(snakemake(recorded, "--lint").stdout)
