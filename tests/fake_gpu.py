"""Stand-ins for a GPU: a stream whose clock is a number, NVML, and subjects that run on the CPU."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from attn_ladder.problem import Problem
from attn_ladder.reference import attention_reference
from attn_profiling.activity import Activity
from attn_profiling.device import Gpu

torch.set_num_threads(1)  # the tensors here are tiny

SMALL = Problem(
    id="small", suites=("tiny",), dtype="fp16", batch=2, seqlen_q=32, seqlen_k=48, nheads=4,
    nheads_k=2, headdim=16, causal=True,
)  # fmt: skip


class FakeEvent:
    def __init__(self, ns, patience):
        self.ns = ns
        self._patience = patience

    def query(self):
        """Passes when asked often enough."""
        self._patience -= 1
        return self._patience < 0


class FakeMachine:
    """Runs what it is given at once, and keeps the time it would have taken on a stream."""

    flush_kernel = "flush"
    spin_kernel = "spin"
    gap_limit_us = 7.0

    def __init__(self, timer_scale=1.0):
        self.now = 1_000
        self.activities = None
        self.timer_scale = timer_scale
        self.delay_us = 0.0
        self.drop = 0
        self.captures = True
        self.graph_records = True
        self.sessions = 0
        self.events = 0
        self.emitted = None

    def synchronize(self):
        return None

    def kernel(self, name, us):
        """What a subject calls in place of a launch."""
        if self.emitted is not None:
            self.emitted.append((name, us))
            return
        self.now += 1_000 + int(self.delay_us * 1000)
        self.delay_us = 0.0
        if self.activities is not None:
            self.activities.append(Activity(name, self.now, int(us * 1000)))
        self.now += int(us * 1000)

    def flush(self):
        self.kernel(self.flush_kernel, 60.0)

    def spin(self, us):
        self.kernel(self.spin_kernel, us)

    def cycles_of(self, us):
        return int(us * 1755)

    def event(self):
        self.events += 1
        # of a start and an end the second keeps whoever polls waiting
        return FakeEvent(self.now, 0 if self.events % 2 else 8)

    def elapsed_us(self, start, end):
        return self.timer_scale * (end.ns - start.ns) / 1000

    @contextmanager
    def recorded(self):
        self.sessions += 1
        self.activities = []
        kept = []
        yield kept
        kept += self.activities[: -self.drop] if self.drop else self.activities
        self.drop = 0
        self.activities = None

    def capture(self, calls):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.emitted = []
        for call in calls:
            result = call()
        launches, self.emitted = self.emitted, None

        def replay():
            for name, us in launches[: None if self.graph_records else 1]:
                self.kernel(name, us)
            self.emitted = []
            for kept, fresh in zip(result, calls[-1](), strict=True):
                kept.copy_(fresh)
            self.emitted = None

        return replay, result


class FakeNvmlError(Exception):
    pass


def fake_nvml(**answers):
    """A module like pynvml. An answer of None means that the machine does not support it."""
    known = {
        "nvmlInit": None,
        "nvmlSystemGetDriverVersion": "580.0",
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetUUID": "GPU-1",
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetClockInfo": 1755,
        "nvmlDeviceGetMaxClockInfo": 1980,
        "nvmlDeviceGetPowerUsage": 310_000,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetTotalEnergyConsumption": 5_000,
        "nvmlDeviceGetTemperature": 41,
        "nvmlDeviceGetCurrentClocksEventReasons": 5,
        **answers,
    }

    def function(name):
        def call(*args):
            answer = known[name]
            if isinstance(answer, Exception):
                raise answer
            if answer is None and name != "nvmlInit":
                raise FakeNvmlError("Not Supported")
            return answer(*args) if callable(answer) else answer

        return call

    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksEventReasonGpuIdle=1,
        nvmlClocksEventReasonSwPowerCap=4,
        **{name: function(name) for name in known},
    )


def fake_gpu(**answers):
    return Gpu(fake_nvml(**answers), "handle")


def right(q, k, v, *, softmax_scale=None, causal=False, config=None):
    """A subject that is right: low-precision PyTorch with an fp32 log-sum-exp, in memory of its
    own."""
    out, _ = attention_reference(q, k, v, causal=causal, upcast=False)
    _, lse = attention_reference(q, k, v, causal=causal)
    kept, kept_lse = torch.empty_like(q), torch.empty(lse.shape)
    kept.copy_(out)
    kept_lse.copy_(lse)
    return kept, kept_lse


def timed(machine, us, forward=right, kernels=("attention",)):
    """A module of a subject whose kernels take `us` microseconds in all."""

    def launch(q, k, v, *, softmax_scale=None, causal=False, config=None):
        for kernel in kernels:
            machine.kernel(kernel, us / len(kernels))
        return forward(q, k, v, causal=causal, config=config)

    return SimpleNamespace(forward=launch, unsupported=lambda problem, capability: None)
