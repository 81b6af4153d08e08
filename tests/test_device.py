"""What is found on a machine, with NVML answering whatever the test wants."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_gpu import FakeNvmlError, fake_gpu, fake_nvml

from attn_ladder.problem import Problem
from attn_ladder.stage import load, subjects
from attn_profiling import device, environment


def test_the_recorded_device_is_known():
    h100 = device.device("h100-sxm-80gb")
    assert device.slug_of("NVIDIA H100 80GB HBM3") == h100.slug
    # 4096 dense bf16 operations per clock and SM
    assert h100.peaks["bf16_flops_per_s"].value == pytest.approx(
        h100.sms * 4096 * h100.boost_clock_mhz * 1e6, rel=0.001
    )
    for known in device.DEVICES.values():
        assert all(peak.unit and peak.source for peak in known.peaks.values())


def test_an_unknown_device_is_named_and_gets_a_folder():
    with pytest.raises(ValueError, match="'b200' is unknown; known devices: h100-sxm-80gb"):
        device.device("b200")
    assert device.slug_of("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_the_state_of_a_gpu():
    state = fake_gpu().state()
    assert state["power_w"] == 310 and state["power_limit_w"] == 700
    assert state["throttle_reasons"] == ["gpu_idle", "sw_power_cap"]


def test_a_reading_that_the_machine_does_not_give_is_null():
    gpu = fake_gpu(nvmlDeviceGetTotalEnergyConsumption=None, nvmlDeviceGetPowerUsage=None)
    assert gpu.energy_mj() is None and gpu.power_w() is None
    assert fake_gpu().energy_mj() == 5000


def test_the_instant_power_is_preferred():
    field = SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=650_000))
    assert fake_gpu(nvmlDeviceGetFieldValues=lambda handle, ids: [field]).power_w() == 650


def test_no_gpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    broken = fake_nvml(nvmlInit=FakeNvmlError("NVML Shared Library Not Found"))
    with pytest.raises(device.NoGpu, match=r"Not Found\); .*tier=replay"):
        device.open_gpu(broken)
    assert device.open_gpu(fake_nvml()).name == "NVIDIA H100 80GB HBM3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(device.NoGpu, match="hides every GPU"):
        device.open_gpu(fake_nvml())


def test_the_gpu_of_cuda_visible_devices_is_opened(monkeypatch):
    asked = []
    nvml = fake_nvml(
        nvmlDeviceGetHandleByIndex=lambda i: asked.append(i),
        nvmlDeviceGetHandleByUUID=lambda u: asked.append(u),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    device.open_gpu(nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc")
    device.open_gpu(nvml)
    assert asked == [3, "GPU-abc"]


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


NCU_VERSION = """#!/bin/sh
echo "NVIDIA (R) Nsight Compute Command Line Profiler"
echo "Copyright (c) 2018-2025 NVIDIA Corporation"
echo "Version 2025.3.1.0 (build 36398880) (public-release)"
"""


def test_the_version_of_ncu(monkeypatch, tmp_path):
    ncu = script(tmp_path / "ncu", NCU_VERSION)
    monkeypatch.setenv("ATTN_LADDER_NCU", str(ncu))
    device.ncu_version.cache_clear()
    assert device.ncu_version() == "2025.3.1.0"
    monkeypatch.setenv("ATTN_LADDER_NCU", str(tmp_path / "absent"))
    device.ncu_version.cache_clear()
    assert device.ncu_version() is None
    device.ncu_version.cache_clear()


def test_cuda_is_read_without_importing_torch():
    code = (
        "import sys; from attn_profiling import device; device.cuda_version(); device.packages();"
        "assert 'torch' not in sys.modules and 'pynvml' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def git(folder, *words):
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


def test_the_commit_comes_from_git_then_from_a_file(tmp_path):
    assert device.commit(tmp_path) == ("unknown", True)
    (tmp_path / ".commit").write_text("abc123\n")
    assert device.commit(tmp_path) == ("abc123", False)
    (tmp_path / ".commit").write_text("abc123 dirty\n")
    assert device.commit(tmp_path) == ("abc123", True)
    git(tmp_path, "init")
    assert device.commit(tmp_path)[0] == "abc123"  # a repository without commits knows none
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    found, dirty = device.commit(tmp_path)
    assert len(found) == 40 and not dirty
    (tmp_path / "new").touch()
    assert device.commit(tmp_path) == (found, True)


def install(folder: Path, name: str, binary: bytes, direct: str | None = None) -> None:
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (folder / name).mkdir()
    (folder / name / "_C.so").write_bytes(binary)
    (info / "RECORD").write_text(f"{name}/_C.so,sha256=x,3\n{name}-1.2.dist-info/METADATA,,\n")
    if direct:
        (info / "direct_url.json").write_text(direct)


def test_which_build_of_a_peer_is_installed(monkeypatch, tmp_path):
    binary = b"\x7fELF..Cuda compilation tools, release 13.0, V13.0.88\x00.."
    direct = '{"archive_info": {"hash": "sha256=' + "a" * 64 + '"}}'
    install(tmp_path, "peerkernel", binary, direct)
    install(tmp_path, "plainpeer", b"nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = device.distribution_identity("peerkernel")
    assert found["version"] == "1.2" and found["wheel_sha256"] == "a" * 64
    assert found["compiler"] == "nvcc release 13.0, V13.0.88"
    assert len(found["binaries"]["_C.so"]) == 64
    plain = device.distribution_identity("plainpeer")
    assert plain["wheel_sha256"] is None and plain["compiler"] is None
    assert plain["record_sha256"] != found["record_sha256"]
    assert device.distribution_identity("no-such-package")["version"] is None


def test_the_wheel_of_an_index_is_known_from_the_locks(monkeypatch, tmp_path):
    install(tmp_path, "plainpeer", b"nothing")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(device.sys, "prefix", str(tmp_path))
    noted = tmp_path / environment.WHEELS
    noted.write_text(json.dumps({"plainpeer": ["1.1", "b" * 64]}))
    assert device.distribution_identity("plainpeer")["wheel_sha256"] is None
    noted.write_text(json.dumps({"plainpeer": ["1.2", "b" * 64]}))
    assert device.distribution_identity("plainpeer")["wheel_sha256"] == "b" * 64


def test_python_and_what_the_locks_name_ride_along():
    found = device.packages()
    assert found["python"].split(".")[0] == "3"
    assert {"numpy", "nvidia-ml-py", "ncu-report", "snakemake"} <= found.keys()
    assert not [name for name, version in found.items() if not version]


def test_on_another_gpu_what_cannot_run_says_so_and_the_others_run():
    """Of every subject, on an A100: a reason that names the compute capability, or None."""
    problem = Problem("p", ("smoke",), "bf16", 2, 512, 512, 4, 4, 64, False)
    reasons = {
        name: load(name).unsupported(problem, (8, 0)) for name in subjects() if name != "fa4"
    }
    run = {name for name, reason in reasons.items() if reason is None}
    controls = {name for name, found in subjects().items() if found.kind == "control"}
    assert run - controls == {"stage1", "cudnn", "fa2"}
    assert all("8.0" in reason for reason in reasons.values() if reason is not None)
    if importlib.util.find_spec("flash_attn") is None:
        assert "is not installed" in load("fa4").unsupported(problem, (9, 0))


def test_another_build_of_fa3_is_not_taken_for_the_wheel(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_fa3.py").write_text("def flash_attn_func(): ...\n")
    found = device.subject_identity("fa3", "own_fa3")
    assert found["version"] is None and found["wheel_sha256"] is None
    assert len(found["binaries"]["own_fa3.py"]) == 64
    (tmp_path / "own_fa3.py").write_text("def flash_attn_func(): return 1\n")
    assert device.subject_identity("fa3", "own_fa3") != found
    assert "binaries" not in device.module_identity("no_such_module")
