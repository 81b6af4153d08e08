"""A complete run with invented numbers of known truth, for the tests. Never a measurement.

`make(folder)` writes every raw file of a run through `record.write`, so each passes its schema. In
place of Nsight Compute reports it writes JSON, which `open_report` reads as `ncu_rep.open_report`
would read the real thing.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from attn_ladder import stage
from attn_ladder.problem import Problem, read_problems, select
from attn_profiling import metrics, record, replication, sources, tidy, tidy_serving, verdict
from attn_profiling.metrics import Instruction, Kernel

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = ROOT / "config" / "problems.tsv"
CONSTRAINTS = ROOT / "config" / "constraints.yaml"
PREDICTIONS = ROOT / "config" / "predictions.csv"
COMMIT = "5" * 40

SPEED = {  # time of FA3 over time of the subject: the truth that the tables must find
    "fa3": 1.0,
    "cudnn": 0.92,
    "fa2": 0.6,
    "fa4": 1.02,
    "reference": 0.05,
    "stage1": 0.45,
    "stage2": 0.62,
    "stage3": 0.80,
    "stage4": 0.99,
    "stage5": 1.16,
}
HOST_US = {"fa3": 95.0, "cudnn": 60.0, "fa2": 50.0, "fa4": 80.0, "reference": 150.0}
FIRST_CALL_MS = [180.5, 210.25, 190.0]
"""Of each process on its first problem: a kernel is loaded."""
LATER_CALL_MS = 1.5
INACTIVE = {"fa3": 1.75}
MEASURING = {
    "processes": 3,
    "rounds": 30,
    "gap_us": 400,
    "sustained_ms": 250,
    "sustained_bursts": 2,
    "sustained_preheat_ms": 1000,
    "warmup_rounds": 3,
    "max_attempts": 3,
    "aa_tolerance": 0.01,
    "seed": 0,
    "flush_l2_factor": 2,
    "host_calls": 300,
}


def speed(subject: str) -> float:
    """The true ratio to FA3."""
    name = subject.split("#")[0]
    if name in SPEED:
        return SPEED[name]
    of = stage.subject(name).of
    return 0.95 * SPEED.get(of or "stage5", 1.0)


def fa3_us(problem: Problem, regime: str = "spaced") -> float:
    """The true GPU time of FA3: a roofline with a fixed cost."""
    flops_per_us = (650e6 if problem.headdim == 128 else 520e6) * (
        0.95 if regime == "sustained" else 1.0
    )
    return 8.0 + 1.15 * problem.flops / flops_per_us


def true_us(problem: Problem, subject: str, regime: str = "spaced") -> float:
    """The true GPU time of a subject: FA3's over its speed, a tenth more for each dose."""
    return (1 + 0.1 * dose(subject)) * fa3_us(problem, regime) / speed(subject)


def dose(subject: str, of: str = "") -> int:
    """The planted dose of a constraint in a subject, counted from the smallest of its file."""
    known = stage.subjects().get(subject)
    if known is None or known.dose is None or (of and known.constraint != of):
        return 0
    smallest = tidy.zero_doses()[subject.rpartition(".")[0]]
    return known.dose - (stage.subject(smallest).dose or 0)


def names(problem: Problem, suite: str) -> list[str]:
    """The subjects that run a problem in a suite; FA3 and FA4 only in bf16."""
    known = [s for s in stage.subjects() if stage.in_suite(s, suite)]
    return [s for s in known if problem.dtype == "bf16" or s not in ("fa3", "fa4")]


class Maker:
    """Writes the raw files. `noise` is the spread between rounds, `between` that between
    processes."""

    def __init__(
        self,
        folder: Path,
        seed: int = 1,
        noise: float = 0.003,
        between: float = 0.001,
        processes: int = 3,
    ) -> None:
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.noise, self.between, self.processes = noise, between, processes
        self.problems = read_problems(PROBLEMS)

    def header(self, kind: str, suite: str | None) -> dict[str, Any]:
        state = {
            "sm_clock_mhz": 1755.0,
            "memory_clock_mhz": 2619.0,
            "power_w": 310.0,
            "power_limit_w": 700.0,
            "temperature_c": 41.0,
            "throttle_reasons": [],
        }
        return record.header(
            kind,
            run="synthetic",
            suite=suite,
            content={
                "gpu": "NVIDIA H100 80GB HBM3",
                "capability": [9, 0],
                "driver": "580.0",
                "cuda": "13.0",
                "torch": "2.11.0",
                "triton": "3.6.0",
                "ncu": "2025.3.1.0",
                "measuring": MEASURING,
            },
            provenance={
                "gpu_uuid": "GPU-synthetic",
                "before": state,
                "after": state,
                "packages": {"fa3-fwd": "0.0.3"},
                "image_digest": None,
                "engine": "none",
                "commit": COMMIT,
                "dirty": False,
                "seed": 0,
                "input_distribution": "standard normal",
                "started": "2026-01-01T00:00:00Z",
                "seconds": 1.0,
                "constraints_sha256": record.constraints_sha256(CONSTRAINTS),
                "predictions_sha256": record.predictions_sha256(PREDICTIONS),
            },
            subjects={
                name: {
                    "kernel_hash": sources.source_hash(name),
                    "wheel_sha256": "ab" * 32 if name == "fa3" else None,
                    "version": "0.0.3" if name == "fa3" else None,
                    "compiler": "nvcc release 12.8, V12.8.93" if name == "fa3" else None,
                }
                for name in (*stage.subjects(), *sources.SERVING)
            },
        )

    def write(self, name: str, kind: str, data: Mapping[str, Any]) -> Path:
        path = self.folder / name
        record.write(path, dict(data), kind)
        return path

    def samples(self, truth: float, count: int = 30) -> list[list[float]]:
        """`processes` x `count` samples whose median is `truth` but for noise."""
        drift = np.exp(self.between * self.rng.standard_normal(self.processes))
        rounds = np.exp(self.noise * self.rng.standard_normal((self.processes, count)))
        return [[round(float(v), 4) for v in row] for row in truth * drift[:, None] * rounds]

    def device(self) -> None:
        ceiling = {"unit": "byte/s", "how": "invented", "clock_mhz": 1755.0}
        self.write(
            "device.json",
            "device",
            {
                **self.header("device", None),
                "device": "h100-sxm-80gb",
                "properties": {
                    "sms": 132,
                    "l2_bytes": 50 * 2**20,
                    "memory_bytes": 80 * 2**30,
                    "max_sm_clock_mhz": 1980.0,
                },
                "ceilings": {
                    "copy_bytes_per_s": {"value": 3.03e12, **ceiling},
                    "bf16_matmul_flops_per_s": {"value": 750e12, **ceiling},
                },
            },
        )

    def check(self, suite: str) -> None:
        results = []
        for problem in select(self.problems, suite):
            for name in (s for s in stage.subjects() if stage.in_suite(s, suite)):
                runs = name in names(problem, suite)
                repeated = runs and "variant" in problem.suites
                results.append(
                    {
                        "problem": record.problem_fields(problem),
                        "subject": name,
                        "ok": runs,
                        "status": "ok" if runs else "unsupported",
                        "message": None if runs else f"no {problem.dtype} kernels",
                        "heads": None,
                        "strided": name.startswith("stage") if runs else None,
                        "seconds": 0.1,
                        "max_error": 0.002 if runs else None,
                        "reference_error": 0.0021 if runs else None,
                        "bound": 0.0043 if runs else None,
                        "lse_error": None,
                        "unit_error": 0.002 if runs else None,
                        "unit_reference_error": 0.0021 if runs else None,
                        "unit_bound": 0.0043 if runs else None,
                        "unit_share": 0.45 if runs else None,
                        "allclose": True if runs and problem.dtype == "fp16" else None,
                        "identical_runs": 1000 if repeated else None,
                        "streams": True if repeated else None,
                        "graph": True if repeated else None,
                    }
                )
        self.write(
            f"check/{suite}.json", "check", {**self.header("check", suite), "results": results}
        )

    def attempt(self, problem: Problem, suite: str, regime: str, aa: float = 1.0) -> dict[str, Any]:
        taken: dict[str, Any] = {}
        present = names(problem, suite)
        twin = next((s for s in ("fa3", "cudnn") if s in present), present[0]) + "#2"
        shared = self.samples(
            1.0
        )  # what all subjects of a round have in common cancels in paired ratios
        for name in [*names(problem, suite), twin]:
            truth = true_us(problem, name, regime) / (aa if "#" in name else 1.0)
            own = self.samples(truth)
            gpu = [
                [round(a * b, 4) for a, b in zip(x, y, strict=True)]
                for x, y in zip(shared, own, strict=True)
            ]
            kernels = {f"{name}_kernel": 1}
            if name.startswith("fa3") and problem.causal:
                kernels["elementwise_kernel"] = 1
            taken[name] = {
                "gpu_us": gpu,
                "event_us": [[round(v + 1.2, 4) for v in p] for p in gpu],
                "clock_mhz": [[1750.0] * 30 for _ in gpu],
                "power_w": [[None, 520.0] * 15 for _ in gpu],
                "kernels": kernels,
            }
            if regime == "sustained":
                taken[name]["energy_mj"] = [[round(0.65 * v, 4) for v in p[:2]] for p in gpu]
                taken[name]["calls"] = [[40.0, 40.0] for _ in gpu]
        return {
            "attempt": 1,
            "aa_subject": twin,
            "aa_ratio": aa,
            "ok": abs(aa - 1) <= 0.01,
            "message": None,
            "samples": taken,
        }

    def timing(self, suite: str, regime: str, noisy: Sequence[str] = ()) -> None:
        """`noisy` problems have an A/A pair that is off by 4 % in every attempt."""
        problems = []
        for problem in select(self.problems, suite):
            off = problem.id in noisy
            attempts = [
                {
                    **self.attempt(problem, suite, regime, 1.04),
                    "attempt": n,
                    "message": "A/A is off",
                }
                for n in (1, 2, 3)
            ]
            problems.append(
                {
                    "problem": record.problem_fields(problem),
                    "attempts": attempts if off else [self.attempt(problem, suite, regime)],
                    "status": "inconclusive" if off else "ok",
                    "chosen": {
                        name: {} if name == "fa3" else None for name in names(problem, suite)
                    },
                    "tried": {
                        "fa3": [{"config": {"num_splits": 2}, "gpu_us": 999.0, "message": None}]
                    },
                    "left_out": {}
                    if problem.dtype == "bf16"
                    else {"fa3": "this FA3 build has no fp16 kernels"},
                }
            )
        data = {**self.header("timing", suite), "regime": regime, "problems": problems}
        self.write(f"timing/{suite}.{regime}.json", "timing", data)

    def host(self, suite: str) -> None:
        problems = []
        for number, problem in enumerate(select(self.problems, suite)):
            taken = {}
            present = names(problem, suite)
            for name in [*present, *(f"{p}#2" for p in present if p == "fa3")]:
                base = tidy.base_name(name)
                cost = HOST_US.get(base, 25.0) + 20.0 * dose(name, "launch")
                latency = max(cost, 4.0) + true_us(problem, name) + 6.0
                taken[name] = {
                    "first_call_ms": [LATER_CALL_MS] * self.processes if number else FIRST_CALL_MS,
                    "eager_host_us": self.samples(cost, 10),
                    "fresh_pointer_host_us": self.samples(1.4 * cost, 10),
                    "eager_latency_us": self.samples(latency, 30),
                    "graph_latency_us": self.samples(true_us(problem, name) + 5.0, 30),
                    "graph_gpu_us": self.samples(true_us(problem, name), 30),
                    "graph_note": None,
                }
            problems.append(
                {"problem": record.problem_fields(problem), "samples": taken, "left_out": {}}
            )
        data = {**self.header("host", suite), "problems": problems}
        data["subjects"]["stage5"]["entry_hash"] = sources.entry_hash("stage5")
        self.write(f"host/{suite}.json", "host", data)

    def ncu(self, suite: str) -> None:
        """Reports of the problems of a suite that `profile` does not hold."""
        reports = []
        for problem in select(self.problems, suite):
            if suite != "profile" and "profile" in problem.suites:
                continue
            kernels = [k for name in names(problem, suite) for k in kernels_of(problem, name)]
            file = f"ncu/{suite}/{problem.id}.ncu-rep"
            path = self.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pack(kernels))
            reports.append(
                {
                    "problem": record.problem_fields(problem),
                    "file": file,
                    "sections": "full",
                    "chosen": {},
                    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "left_out": {},
                    "subjects": {
                        name: len(kernels_of(problem, name)) for name in names(problem, suite)
                    },
                }
            )
        self.write(f"ncu/{suite}.json", "ncu", {**self.header("ncu", suite), "reports": reports})

    def decode(self, suite: str = "decode", noisy: Sequence[str] = ()) -> None:
        """Decoding: 1.25 of FA3 where K and V are small, 1.1 else, pages 2 % slower; behind a flush
        that reads, FA3 takes 5 % longer than that."""
        problems = []
        for problem in select(self.problems, suite):
            size = tidy_serving.kv_bytes(problem)
            fa3 = 6.0 + size / 2.4e6
            small = size < tidy_serving.SMALL_BYTES
            truth = fa3 / (1.25 if small else 1.1) * (1.02 if problem.page_size else 1.0)
            us = {"decode": truth}
            if not problem.page_size:
                us |= {"decode#2": truth, "fa3": fa3, "fa3#2": fa3}
            off = problem.id in noisy
            samples = {}
            for name, each in us.items():
                gpu = self.samples(each * (1.05 if off and "#" in name else 1.0))
                samples[name] = {
                    "gpu_us": gpu,
                    "sum_us": gpu,
                    "event_us": [[round(v + 1.2, 4) for v in p] for p in gpu],
                    "clock_mhz": [[1750.0], [None], [1750.0]],
                    "dry": [0, 1, 0],
                    "kernels": {"decode_kernel": 1, "combine": 1},
                }
            clean = {
                name: {**taken, "gpu_us": self.samples(us[name] * (1.05 if "fa3" in name else 1))}
                for name, taken in samples.items()
                if not problem.page_size
            }
            attempt = {
                "attempt": 1,
                "clean": clean,
                "clean_ok": True,
                "clean_aa_ratios": {} if problem.page_size else {"decode": 1.0, "fa3": 1.0},
                "aa_ratios": {} if problem.page_size else {"decode": 1.05 if off else 1.0},
                "ok": not off,
                "message": "A/A is off" if off else None,
                "copy_bytes_per_s": [3.0e12, 3.01e12, 2.99e12],
                "samples": samples,
            }
            tried = [{"config": {"num_splits": 4}, "gpu_us": fa3, "message": None}]
            problems.append(
                {
                    "problem": record.problem_fields(problem),
                    "status": "inconclusive" if off else "ok",
                    "chosen": {} if problem.page_size else {"fa3": {"num_splits": 4}},
                    "clean_chosen": {} if problem.page_size else {"fa3": {"num_splits": 2}},
                    "tried": {} if problem.page_size else {"fa3": tried},
                    "clean_tried": {} if problem.page_size else {"fa3": tried},
                    "left_out": {},
                    "attempts": [attempt],
                }
            )
        checks = [{"name": f"kvcache {i}", "ok": True, "detail": "right"} for i in range(12)]
        data = {"checks": checks, "checks_stopped": None, "problems": problems}
        self.write(f"serving/{suite}.json", "decode", {**self.header("decode", suite), **data})

    def model(self, reason: str | None = None) -> None:
        """A model whose tokens are those of the references but for a tie; with a reason, none."""
        empty = {"model": None, "software": {}, "dtype": None, "token_agreement": [],
                 "memory": None, "speed": [], "errors": {}}  # fmt: skip
        data = {**self.header("model", None), **empty, "reason": reason}
        if reason is None:
            tokens = []
            for against in ("sdpa", "eager"):
                for cache in ("dynamic", "static"):
                    for prompt in (1, 55, 2048):
                        row = {"case": "alone", "cache": cache, "against": against,
                               "prompt_tokens": prompt, "new_tokens": 64,
                               "implementation": "attn_ladder",
                               "dtype": "torch.bfloat16", "same": True, "agree": 64}  # fmt: skip
                        tokens.append(row)
            tie = {"margin": 0.25, "rounding": 0.125, "ulp": 0.125, "exact_margin": -0.03,
                   "logit_error": 0.1, "reference_error": 0.2, "tie": True}  # fmt: skip
            tokens[1] |= {"same": False, "agree": 31, **tie}
            half = {"dtype": "torch.float16"}
            tokens += [{**row, **half} for row in tokens if row["same"]]
            control = {"implementation": "sdpa", "against": "eager"}
            tokens += [{**row, **control} for row in tokens if row["against"] == "sdpa"]
            speed = []
            for kind, batch, before, count in (
                ("prefill", 1, 0, 2048), ("prefill", 8, 0, 2048), ("decode, graph", 1, 1024, 64),
            ):  # fmt: skip
                for name, seconds in (("attn_ladder", 0.02), ("sdpa", 0.025)):
                    taken = [[seconds, 1.01 * seconds, 0.99 * seconds]]
                    speed.append({"kind": kind, "implementation": name, "batch": batch,
                                  "before": before, "tokens": count, "dtype": "torch.bfloat16",
                                  "in_turn": True, "seconds": taken})  # fmt: skip
            speed.append({"kind": "prefill", "implementation": "attn_ladder_fa3", "batch": 8,
                          "before": 0, "error": "RuntimeError: no"})  # fmt: skip
            data |= {
                "model": {"file": "small.gguf", "sha256": "c" * 64, "bytes": 98},
                "software": {"transformers": "5.23.0", "gguf": "0.17.1"},
                "dtype": "bfloat16",
                "token_agreement": tokens,
                "memory": {"batch": 8, "tokens": 2048, "group": 3, "cache_bytes": 377487360,
                           "expanded_bytes": 1132462080, "allocated_bytes": 377487360,
                           "allocated_expanded_bytes": 1132462080},
                "speed": speed,
            }  # fmt: skip
        self.write("serving/model.json", "model", data)

    def all(self, noisy: Sequence[str] = ("grid-d64-causal-s16384",)) -> Path:
        self.device()
        for suite in ("grid", "grid_fp16", "grid256", "gate", "variant", "smoke", "control"):
            self.check(suite)
        for suite in ("grid", "grid_fp16", "grid256", "gate", "variant", "control"):
            self.timing(suite, "spaced", noisy)
        self.timing("grid", "sustained")
        for suite in ("gate", "control"):
            self.host(suite)
        for suite in ("profile", "control", "grid", "gate"):
            self.ncu(suite)
        self.decode()
        self.model()
        return self.folder


def counters_of(problem: Problem, subject: str, memset: bool = False) -> dict[str, float]:
    """Counters of one kernel, consistent with each other. A memset has no branches, products or
    loads."""
    us = 2.3 if memset else true_us(problem, subject)
    clock_ghz, sms = 1.7, 132
    cycles = us * 1e3 * clock_ghz
    issued = 0.02 * cycles * 4 * sms if memset else 0.5 * cycles * 4 * sms
    inactive = 0.0 if memset else INACTIVE.get(subject, 0.4) + 3.0 * dose(subject, "branching")
    barrier = {"fa3": 0.7, "stage1": 0.9}.get(subject, 0.3)
    stalls = dict.fromkeys(metrics.STALLS, 0.02)
    stalls |= {
        "selected": 1.0,
        "wait": 1.7,
        "dispatch_stall": 0.8,
        "barrier": barrier,
        "long_scoreboard": 0.2 + 0.3 * dose(subject, "memory"),
    }
    values = {metrics.stall_counter(r): v for r, v in stalls.items()}
    ops = 0.0 if memset else problem.flops * (1.1 if problem.causal else 1.0)
    tensor = 0.0 if memset else 80 * speed(subject) / 1.16
    values |= {
        metrics.TIME: us * 1e3,
        metrics.ISSUE_ACTIVE: issued,
        metrics.STALL_TOTAL: sum(stalls.values()),
        "smsp__cycles_active.sum": cycles * 4 * sms,
        "smsp__inst_executed.sum": issued,
        "smsp__thread_inst_executed.sum": issued * 32 * (1 - inactive / 100),
        "smsp__thread_inst_executed_pred_on.sum": issued * 32 * (1 - 2 * inactive / 100),
        "smsp__sass_branch_targets.sum": 0.0 if memset else 1e6,
        "smsp__sass_branch_targets_threads_uniform.sum": 0.0 if memset else 0.996e6,
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": tensor,
        "sm__cycles_active.avg": 0.96 * cycles,
        "sm__cycles_elapsed.max": cycles,
        "dram__bytes.sum": 1.2 * problem.min_bytes,
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": 10.0,
        "lts__t_bytes.sum": 6.0 * problem.min_bytes,
        "lts__t_sector_hit_rate.pct": float("nan") if memset else 88.0,
        "l1tex__m_xbar2l1tex_read_bytes_mem_global_op_tma_ld.sum": 5.0 * problem.min_bytes,
        "launch__registers_per_thread": 16.0 if memset else 168.0,
        "launch__waves_per_multiprocessor": 1.0,
        "sm__warps_active.avg.pct_of_peak_sustained_active": 18.75,
        "sm__inst_executed_pipe_xu.sum": 0.05 * issued,
    }
    values |= {
        f"sm__inst_executed_pipe_{p}.avg.pct_of_peak_sustained_active": 40.0
        for p in ("xu", "fma", "alu")
    }
    values |= dict.fromkeys(metrics.TENSOR_OPS, 0.0)
    values[metrics.TENSOR_OPS[0]] = ops
    values |= {f"smsp__sass_inst_executed_op_local_{op}.sum": 0.0 for op in ("ld", "st")}
    return values


def instruction(sass: str, executed: float, **samples: float) -> Instruction:
    """A machine instruction that whole warps execute."""
    return Instruction(sass, executed, metrics.WARP_THREADS * executed, samples)


def kernels_of(problem: Problem, subject: str) -> list[Kernel]:
    """The kernels of one profiled call: FA3 causal launches a memset before the attention."""
    inside = (f"{problem.id}.{subject}",)
    tiles = problem.visible_pairs * problem.batch * problem.nheads / metrics.TILE_PAIRS
    cta = 24.0 if subject == "stage1" else 0.01 + 4.0 * dose(subject, "sync")
    instructions = (
        instruction("BAR.SYNC.DEFER_BLOCKING 0x0", cta * tiles),
        instruction("UMOV UR35, 0x40000040", tiles, barrier=30.0 * cta),
        instruction("BAR.SYNC.DEFER_BLOCKING R5, 0x100", 16 * tiles),
        instruction("UMOV UR35, 0x40000040", tiles, barrier=300.0),
        instruction("SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R6", 24 * tiles),
        instruction("@!P1 BRA 0x7f056f7ba560", 24 * tiles, long_scoreboard=500.0),
        instruction("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24", 64 * tiles),
        instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0", 64 * tiles, barrier=200.0, wait=2000.0),
    )
    main = Kernel(f"{subject}_kernel", inside, counters_of(problem, subject), instructions)
    if subject != "fa3" or not problem.causal:
        return [main]
    return [Kernel("elementwise_kernel", inside, counters_of(problem, subject, memset=True)), main]


def pack(kernels: Sequence[Kernel]) -> bytes:
    """What stands in for the bytes of a report."""
    return json.dumps(
        [
            [
                k.name,
                list(k.ranges),
                dict(k.counters),
                [[i.sass, i.executed, i.threads, dict(i.samples)] for i in k.instructions],
            ]
            for k in kernels
        ]
    ).encode()


def joined(reports: Sequence[bytes]) -> bytes:
    """One report of the kernels of several."""
    return json.dumps([kernel for data in reports for kernel in json.loads(data)]).encode()


def open_report(data: bytes, name: str, counters: Sequence[str]) -> list[Kernel]:
    """`ncu_rep.open_report` for the bytes of `pack`."""
    return [
        Kernel(
            kernel,
            tuple(ranges),
            {c: v for c, v in values.items() if c in counters},
            tuple(Instruction(*i) for i in instructions),
        )
        for kernel, ranges, values, instructions in json.loads(data)
    ]


@cache
def shared() -> Path:
    """A folder with a complete run in `measurements/` and what is derived from it in `results/`.

    Made once a process; tests that change a run make their own.
    """
    folder = Path(tempfile.mkdtemp(prefix="synthetic-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    recorded = make(folder / "measurements" / "h100-sxm-80gb")
    derive(recorded, folder / "results")
    again = Maker(folder / "replications" / "again", seed=2)
    again.device()
    again.timing("gate", "spaced")
    for path in (folder / "replications").rglob("*.json"):
        path.write_text(path.read_text().replace('"run":"synthetic"', '"run":"again"'))
    rows = replication.compare(recorded, folder / "replications")
    text = tidy.csv_text(replication.COLUMNS, rows)
    record.write_text(folder / "results" / "replications.csv", text)
    return folder


def derive(raw: Path, results: Path) -> tidy.Tables:
    """Everything between the raw files and the paper, as the workflow does it."""
    tables = tidy.tidy(raw, "replay", PROBLEMS, open_report)
    files = [results / name for name in ("metrics.csv", "speedups.csv", "provenance.json")]
    tidy.write(tables, *files)
    record.write_text(results / "verdicts.csv", verdict.verdicts(*files, CONSTRAINTS))
    return tables


def make(folder: Path, **options: Any) -> Path:
    """A complete run in `folder`."""
    return Maker(folder, **options).all()
