"""What is known of a GPU, what is found on this machine, and what rides along with a measurement.

Known facts are literals with units and sources; everything found is read through NVML and package
metadata, without importing torch. Only the measured ceilings need torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from attn_ladder.stage import subject
from attn_profiling import environment
from attn_profiling.sources import SERVING, source_hash

NVIDIA_H100 = "NVIDIA H100 Tensor Core GPU Architecture whitepaper (2022), table 2"
NVIDIA_A100 = "NVIDIA A100 Tensor Core GPU Architecture whitepaper (2020)"
CUDA_GUIDE = "CUDA C++ Programming Guide, table of arithmetic throughput, compute capability"


@dataclass(frozen=True)
class Peak:
    """A limit of the hardware, with the place it was read."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Device:
    """A GPU model. `peaks` hold at `boost_clock_mhz` where they depend on a clock.

    `bf16_flops_per_s` dense tensor throughput, `mufu_per_clk_per_sm` exp2 results,
    `issue_per_clk_per_sm` instructions of a warp, `shared_bytes_per_clk_per_sm` and
    `l2_bytes_per_clk` (of the whole GPU) reads, `dram_bytes_per_s` device memory bandwidth.
    """

    slug: str
    gpu: str
    capability: tuple[int, int]
    sms: int
    boost_clock_mhz: int
    l2_bytes: int
    peaks: dict[str, Peak]


def _peaks(
    bf16: float, bf16_source: str, dram: float, dram_source: str, capability: str
) -> dict[str, Peak]:
    return {
        "bf16_flops_per_s": Peak(bf16, "FLOP/s", bf16_source),
        "mufu_per_clk_per_sm": Peak(16, "results/clk/SM", f"{CUDA_GUIDE} {capability}"),
        "issue_per_clk_per_sm": Peak(4, "warp instructions/clk/SM", f"{CUDA_GUIDE} {capability}"),
        "shared_bytes_per_clk_per_sm": Peak(
            128, "byte/clk/SM", f"CUDA C++ Programming Guide, compute capability {capability}"
        ),
        "l2_bytes_per_clk": Peak(
            5120, "byte/clk", f"{NVIDIA_A100}; none is published for later GPUs"
        ),
        "dram_bytes_per_s": Peak(dram, "byte/s", dram_source),
    }


DEVICES = {
    device.slug: device
    for device in (
        Device(
            slug="h100-sxm-80gb",
            gpu="NVIDIA H100 80GB HBM3",
            capability=(9, 0),
            sms=132,
            boost_clock_mhz=1830,
            l2_bytes=50 * 2**20,
            peaks=_peaks(989.4e12, NVIDIA_H100, 3352e9, NVIDIA_H100, "9.0"),
        ),
        Device(
            slug="h200-sxm-141gb",
            gpu="NVIDIA H200",
            capability=(9, 0),
            sms=132,
            boost_clock_mhz=1830,
            l2_bytes=50 * 2**20,
            peaks=_peaks(
                989.4e12,
                "NVIDIA H200 Tensor Core GPU datasheet (2024)",
                4.8e12,
                "NVIDIA H200 Tensor Core GPU datasheet (2024)",
                "9.0",
            ),
        ),
        Device(
            slug="a100-sxm-80gb",
            gpu="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            sms=108,
            boost_clock_mhz=1410,
            l2_bytes=40 * 2**20,
            peaks=_peaks(
                312e12,
                f"{NVIDIA_A100}, table 1",
                2039e9,
                "NVIDIA A100 80GB datasheet (2021)",
                "8.0",
            ),
        ),
    )
}


def device(slug: str) -> Device:
    """The known device of that name. Raises `ValueError` listing the known ones."""
    if slug not in DEVICES:
        raise ValueError(
            f"device {slug!r} is unknown; known devices: {', '.join(DEVICES)}; add an entry with"
            " its peaks and their sources to device.py"
        )
    return DEVICES[slug]


def slug_of(gpu: str) -> str:
    """The folder name of a GPU model as NVML calls it; made from its name where it is unknown."""
    for known in DEVICES.values():
        if known.gpu == gpu:
            return known.slug
    return "-".join(re.findall(r"[a-z0-9]+", gpu.lower().replace("nvidia", "")))


class NoGpu(RuntimeError):
    """There is no usable NVIDIA GPU; the text says what was found and what to do."""


_THROTTLE_REASONS = {
    "GpuIdle": "gpu_idle",
    "ApplicationsClocksSetting": "applications_clocks_setting",
    "SwPowerCap": "sw_power_cap",
    "HwSlowdown": "hw_slowdown",
    "SyncBoost": "sync_boost",
    "SwThermalSlowdown": "sw_thermal_slowdown",
    "HwThermalSlowdown": "hw_thermal_slowdown",
    "HwPowerBrakeSlowdown": "hw_power_brake_slowdown",
    "DisplayClockSetting": "display_clock_setting",
}


class Gpu:
    """One GPU seen through NVML. A reading the machine does not give is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        self._instant_power = True

    def _try(self, name: str, *args: Any) -> Any:
        function = getattr(self._nvml, name, None)
        if function is None:
            return None
        try:
            return function(self._handle, *args)
        except self._nvml.NVMLError:
            return None

    def _text(self, name: str) -> str | None:
        value = self._try(name)
        return value.decode() if isinstance(value, bytes) else value

    @property
    def name(self) -> str:
        """The model as NVML calls it."""
        return self._text("nvmlDeviceGetName") or "unknown"

    @property
    def uuid(self) -> str | None:
        """The identity of this very board."""
        return self._text("nvmlDeviceGetUUID")

    @property
    def driver(self) -> str:
        """Version of the kernel driver."""
        value = self._nvml.nvmlSystemGetDriverVersion()
        return value.decode() if isinstance(value, bytes) else str(value)

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability (major, minor)."""
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        return int(major), int(minor)

    def sm_clock_mhz(self) -> float | None:
        """Clock of the SMs."""
        value = self._try("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        return None if value is None else float(value)

    def max_sm_clock_mhz(self) -> float | None:
        """Highest clock of the SMs."""
        value = self._try("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM)
        return None if value is None else float(value)

    def power_w(self) -> float | None:
        """Power of the board: the instant reading where there is one, else NVML's average."""
        if self._instant_power:
            fields = self._try(
                "nvmlDeviceGetFieldValues", [getattr(self._nvml, "NVML_FI_DEV_POWER_INSTANT", 186)]
            )
            if fields and fields[0].nvmlReturn == 0 and fields[0].value.uiVal:
                return float(round(fields[0].value.uiVal / 1000, 3))
            self._instant_power = False
        value = self._try("nvmlDeviceGetPowerUsage")
        return None if value is None else float(round(value / 1000, 3))

    def energy_mj(self) -> float | None:
        """Millijoules since the driver was loaded."""
        value = self._try("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else float(value)

    def throttle_reasons(self) -> list[str] | None:
        """What holds the clock down at this moment."""
        bits = self._try("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._try("nvmlDeviceGetCurrentClocksThrottleReasons")
        if bits is None:
            return None
        found = []
        for suffix, word in _THROTTLE_REASONS.items():
            for prefix in ("nvmlClocksEventReason", "nvmlClocksThrottleReason"):
                bit = getattr(self._nvml, prefix + suffix, 0)
                if bits & bit and word not in found:
                    found.append(word)
        return found

    def state(self) -> dict[str, Any]:
        """Clocks, power, temperature and throttle reasons at this moment."""
        memory = self._try("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM)
        limit = self._try("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "sm_clock_mhz": self.sm_clock_mhz(),
            "memory_clock_mhz": memory,
            "power_w": self.power_w(),
            "power_limit_w": None if limit is None else limit / 1000,
            "temperature_c": self._try("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": self.throttle_reasons(),
        }


def open_gpu(nvml: Any = None) -> Gpu:
    """The first GPU that CUDA would use. Raises `NoGpu` saying why there is none."""
    if nvml is None:
        try:
            import pynvml as nvml  # type: ignore[no-redef]
        except ImportError:
            raise NoGpu("the package nvidia-ml-py is missing; `pip install nvidia-ml-py`") from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        raise NoGpu(f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it to measure")
    try:
        nvml.nvmlInit()
        first = (visible or "0").split(",")[0].strip()
        if first.isdigit():
            return Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(int(first)))
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(first))
    except nvml.NVMLError as error:
        raise NoGpu(
            f"no NVIDIA GPU can be used here (NVML: {error}); to measure, run on a machine where"
            " `nvidia-smi` lists a GPU; to render the recorded run, use `--config tier=replay`"
        ) from None


def present() -> bool:
    """Whether there is a GPU to measure on."""
    try:
        open_gpu()
    except NoGpu:
        return False
    return True


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cuda_version() -> str | None:
    """The CUDA that torch was built with, read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    for node in ast.parse(version.read_text()).body if version.is_file() else []:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Name) and target.id == "cuda":
                value = getattr(node, "value", None)
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    return value.value
    return None


def find_ncu() -> str | None:
    """The Nsight Compute command line: `ATTN_LADDER_NCU`, the path, then its usual folders."""
    named = os.environ.get("ATTN_LADDER_NCU")
    if named:
        return shutil.which(named)
    found = shutil.which("ncu")
    if found:
        return found
    for pattern in ("usr/local/cuda*/bin/ncu", "opt/nvidia/nsight-compute/*/ncu"):
        for path in sorted(Path("/").glob(pattern), reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    return None


@cache
def ncu_version() -> str | None:
    """Version of Nsight Compute, or None where it is absent."""
    ncu = find_ncu()
    if ncu is None:
        return None
    try:
        said = subprocess.run([ncu, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"Version (\d+(?:\.\d+)*)", said.stdout)
    return match.group(1) if match else None


def content(gpu: Gpu, measuring: dict[str, float]) -> dict[str, Any]:
    """What identifies a measurement: when any of it differs, it is another one."""
    return {
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "driver": gpu.driver,
        "cuda": cuda_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "ncu": ncu_version(),
        "measuring": measuring,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_COMPILER = re.compile(rb"Cuda compilation tools, (release [0-9.]+, V[0-9.]+)")


def _compiler(binaries: Iterable[Path]) -> str | None:
    """What built a CUDA library, as its embedded device code says."""
    import mmap

    for path in binaries:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) as data:
            match = _COMPILER.search(data)
            if match:
                return f"nvcc {match.group(1).decode()}"
    return None


def _locked_wheel(distribution: str, version: str) -> str | None:
    """Hash of a wheel that `attn_profiling.environment` installed from the locks."""
    noted = Path(sys.prefix) / environment.WHEELS
    wheels = json.loads(noted.read_text()) if noted.is_file() else {}
    known, sha256 = wheels.get(distribution, (None, None))
    return sha256 if known == version else None


def distribution_identity(distribution: str, own_binaries: bool = True) -> dict[str, Any]:
    """Which build of a package is installed: version, hash of its wheel where pip kept it, hash of
    its list of files, hashes of its shared objects, and the CUDA compiler they name."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return {"version": None, "wheel_sha256": None, "compiler": None}
    identity: dict[str, Any] = {
        "version": found.version,
        "wheel_sha256": None,
        "compiler": None,
    }
    direct = found.read_text("direct_url.json")
    if direct:
        match = re.search(r'"sha256[=":\s]+([0-9a-f]{64})', direct)
        identity["wheel_sha256"] = match.group(1) if match else None
    else:
        identity["wheel_sha256"] = _locked_wheel(distribution, found.version)
    record = found.read_text("RECORD")
    if record:
        # pip's own files differ between two installations of one wheel
        packed = [
            line
            for line in sorted(record.splitlines())
            if ".dist-info/" not in line and "__pycache__" not in line
        ]
        identity["record_sha256"] = hashlib.sha256("\n".join(packed).encode()).hexdigest()
    if own_binaries:
        paths = [Path(str(found.locate_file(f))) for f in found.files or [] if f.suffix == ".so"]
        paths = [path for path in paths if path.is_file()]
        identity["binaries"] = {path.name: _sha256(path) for path in paths}
        identity["compiler"] = _compiler(paths)
    return identity


FA3_MODULE = "fa3_fwd_interface"  # of the wheel; another build is named in the configuration


def module_identity(module: str) -> dict[str, Any]:
    """Which build an importable module is: its distribution's identity where it has one, else the
    hashes of its file and of the shared objects beside it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return {"version": None, "wheel_sha256": None, "compiler": None}
    owners = metadata.packages_distributions().get(module.split(".")[0], [])
    if owners:
        return distribution_identity(owners[0])
    origin = Path(spec.origin)
    binaries = sorted(origin.parent.glob("*.so"))
    return {
        "version": None,
        "wheel_sha256": None,
        "compiler": _compiler(binaries),
        "binaries": {path.name: _sha256(path) for path in [origin, *binaries]},
    }


def subject_identity(name: str, fa3_module: str = FA3_MODULE) -> dict[str, Any]:
    """The `subjects` entry of a record: kernel hash, and for a peer which build was measured."""
    entry: dict[str, Any] = {"kernel_hash": source_hash(name)}
    if name in SERVING:
        return {**entry, "version": None, "wheel_sha256": None, "compiler": None}
    found = subject(name)
    if name == "fa3" and fa3_module != FA3_MODULE:
        return {**entry, **module_identity(fa3_module)}
    if found.distribution is None:
        return {**entry, "version": None, "wheel_sha256": None, "compiler": None}
    # torch and the libraries of NVIDIA are told by their version; hashing gigabytes adds nothing
    small = not found.distribution.startswith(("torch", "nvidia-"))
    return {**entry, **distribution_identity(found.distribution, own_binaries=small)}


_PEERS_BRING = (
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "apache-tvm-ffi",
    "attn-ladder",
)
"""Packages that no lock names."""


def packages() -> dict[str, str]:
    """Versions of Python, of what the lock of measuring names as far as it is here, and of what
    optional peers bring."""
    found = {name: _version(name) for name in (*environment.pins("cuda"), *_PEERS_BRING)}
    here = {name: version for name, version in sorted(found.items()) if version is not None}
    return {"python": platform.python_version(), **here}


def commit(root: Path) -> tuple[str, bool]:
    """(commit id, whether the tree differs from it).

    From git; where git knows no commit, from the file `.commit` ("<id>" or "<id> dirty") that
    whoever copied the tree wrote; else ("unknown", True).
    """
    git = ["git", "-c", f"safe.directory={root.resolve()}", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        if head.returncode == 0:
            status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
            return head.stdout.strip(), bool(status.stdout.strip())
    except OSError:
        pass
    generated = root / ".commit"
    if generated.is_file():
        words = generated.read_text().split()
        if words:
            return words[0], "dirty" in words[1:]
    return "unknown", True


def properties(torch: Any, gpu: Gpu) -> dict[str, Any]:
    """Sizes of the GPU that CUDA reports."""
    found = torch.cuda.get_device_properties(0)
    return {
        "sms": int(found.multi_processor_count),
        "l2_bytes": int(found.L2_cache_size),
        "memory_bytes": int(found.total_memory),
        "max_sm_clock_mhz": gpu.max_sm_clock_mhz(),
    }


def _rate(torch: Any, gpu: Gpu, call: Any, amount: float, batch: int, batches: int) -> Any:
    """(median of amount/second over `batches` batches of `batch` calls, clock at the end)."""
    for _ in range(batch):
        call()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(batches + 1)]
    events[0].record()
    for event in events[1:]:
        for _ in range(batch):
            call()
        event.record()
    clock = gpu.sm_clock_mhz()
    torch.cuda.synchronize()
    seconds = sorted(a.elapsed_time(b) / 1000 for a, b in zip(events[:-1], events[1:], strict=True))
    return batch * amount / seconds[len(seconds) // 2], clock


def _copy_rate(torch: Any, gpu: Gpu) -> Any:
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * source.element_size()
    return _rate(torch, gpu, lambda: target.copy_(source), moved, batch=5, batches=11)


def _product_rate(torch: Any, gpu: Gpu, n: int = 8192) -> Any:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(torch, gpu, lambda: torch.matmul(a, b, out=out), 2.0 * n**3, batch=20, batches=21)


def ceilings(torch: Any, gpu: Gpu) -> dict[str, Any]:
    """What this machine reaches: device-to-device copy, and cuBLAS on random bf16 data."""
    torch.manual_seed(0)
    copied, copy_clock = _copy_rate(torch, gpu)
    product, clock = _product_rate(torch, gpu)
    return {
        "copy_bytes_per_s": {
            "value": copied,
            "unit": "byte/s",
            "how": "1 GiB device to device, bytes read and written, median of 11 batches of 5",
            "clock_mhz": copy_clock,
        },
        "bf16_matmul_flops_per_s": {
            "value": product,
            "unit": "FLOP/s",
            "how": "cuBLAS bf16 8192³ on random data, back to back, median of 21 batches of 20",
            "clock_mhz": clock,
        },
    }
