"""The rules that measure: which file comes from which, in what order, on a machine that says it has
a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--cores", "1", "measure",
         "--config", "tier=measure", "run=rules-test"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path),
             "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = {}
    for block in (done.stdout + done.stderr).split("\nrule ")[1:]:
        parts = [line.strip().partition(":") for line in block.splitlines()]
        lines = {key: value.strip() for key, _, value in parts}
        if "output" in lines:
            jobs[lines["output"]] = lines.get("input", "").split(", ")
    return jobs


def needs(plan, output):
    return [name.removeprefix("runs/rules-test/") for name in plan[f"runs/rules-test/{output}"]]


def test_nothing_is_measured_before_the_device_and_the_check(plan):
    assert needs(plan, "device.json") == [""]
    assert needs(plan, "check/grid.json") == ["device.json"]
    assert "check/grid.json" in needs(plan, "timing/grid.spaced.json")
    assert "check/gate.json" in needs(plan, "host/gate.json")


def test_suites_of_others_problems_need_their_checks(plan):
    needed = needs(plan, "ncu/profile.json")
    assert {"check/grid.json", "check/gate.json"} <= set(needed)
    assert not any("fp16" in name or "control" in name for name in needed)
    assert "timing/control.spaced.json" in needs(plan, "ncu/control.json")


def test_counters_of_the_grid_need_its_own_check_and_timing(plan):
    needed = needs(plan, "ncu/grid.json")
    assert {"check/grid.json", "timing/grid.spaced.json"} <= set(needed)
    assert "check/control.json" not in needed


def test_configurations_are_chosen_before_they_are_used(plan):
    for output in ("timing/grid.sustained.json", "ncu/profile.json"):
        assert "timing/grid.spaced.json" in needs(plan, output)
    assert "timing/gate.spaced.json" in needs(plan, "host/gate.json")


def test_each_step_has_its_file(plan):
    import yaml

    from attn_profiling.config import raw_files

    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    assert {f"runs/rules-test/{name}" for name in raw_files(config)} == set(plan)
