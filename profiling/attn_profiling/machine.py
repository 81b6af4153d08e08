"""The GPU as the harness drives it: flush, spin, record; the one place that touches CUDA timing.

Timing functions are bound here when the harness starts, before a subject is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attn_profiling.activity import Activity, ActivityError, from_kineto

GAP_ALLOWANCE_US = 10.0  # over the gap that two queued kernels have on this machine
CALIBRATIONS = 4


class Machine:
    """Drives the current CUDA stream."""

    def __init__(self, torch: Any, flush_factor: float, clean: bool = False) -> None:
        self._torch = torch
        self._profile = torch.autograd.profiler.profile
        self._cuda = torch.autograd.DeviceType.CUDA
        self._sleep = torch.cuda._sleep
        self._elapsed = torch.cuda.Event.elapsed_time
        self.synchronize: Callable[[], None] = torch.cuda.synchronize
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        words = int(flush_factor * l2_bytes) // 4
        self._flushed = torch.ones(words, dtype=torch.int32, device="cuda")
        self._reader: Callable[[], Any] | None = None
        if clean:
            from attn_profiling.clean_flush import reader

            programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count
            out = torch.empty(programs, dtype=torch.int32, device="cuda")
            self._reader = reader(self._flushed, out)
        self._cycles_per_us = 1000.0
        self.flush_kernel = ""
        self.spin_kernel = ""
        self.gap_limit_us = float("inf")

    def event(self) -> Any:
        """A CUDA event recorded at this point of the stream."""
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: Any, end: Any) -> float:
        """Microseconds between two events that have passed."""
        return float(self._elapsed(start, end)) * 1000

    def flush(self) -> None:
        """Push everything out of the L2, by writing a larger buffer; or, clean, by reading it, so
        that nothing is left in L2 that must go back to memory."""
        if self._reader is not None:
            self._reader()
        else:
            self._flushed.bitwise_not_()

    def spin(self, us: float) -> None:
        """Keep the stream busy for about `us` microseconds, idle otherwise."""
        self._sleep(max(1, int(us * self._cycles_per_us)))

    @contextmanager
    def recorded(self) -> Iterator[list[Activity]]:
        """Collects the activity of its body; the list is filled when the body has ended."""
        activities: list[Activity] = []
        profile = self._profile(use_device="cuda", use_cpu=False, use_kineto=True)
        self.synchronize()
        with profile:
            time.sleep(0.001)  # records stamped before the start would be dropped
            yield activities
            self.synchronize()
        activities += from_kineto(profile.kineto_results.events(), self._cuda)

    def calibrate(self) -> None:
        """Learn the names of the flush and the spin, the spin's clock and the usual gap."""
        cycles, repeats = 400_000, 12
        for _ in range(CALIBRATIONS):  # the first session sets CUPTI up and may lose records
            with self.recorded() as activities:
                for _ in range(repeats):
                    self._sleep(cycles)
                    self.event()
                    self.flush()
            names = [activity.name for activity in activities]
            spins, flushes = set(names[::2]), set(names[1::2])
            if len(names) == 2 * repeats and len(spins) == 1 and len(flushes) == 1:
                break
        else:
            raise ActivityError(
                f"expected {repeats} spins and flushes in turn, the profiler recorded {names}: it"
                " loses records on this machine, so GPU time cannot be measured (CUPTI of"
                " another program may be active)"
            )
        self.spin_kernel, self.flush_kernel = names[0], names[1]
        if self.spin_kernel == self.flush_kernel:
            raise ActivityError(f"spin and flush are one kernel, {names[0]}")
        durations = sorted(activity.duration_ns for activity in activities[::2])
        self._cycles_per_us = cycles / (durations[repeats // 2] / 1000)
        gaps = sorted(
            (flush.start_ns - spin.end_ns) / 1000
            for spin, flush in zip(activities[::2], activities[1::2], strict=True)
        )
        self.gap_limit_us = max(0.0, gaps[repeats // 2]) + GAP_ALLOWANCE_US

    def cycles_of(self, us: float) -> int:
        """Clock cycles that `spin(us)` waits for."""
        return max(1, int(us * self._cycles_per_us))

    def capture(self, calls: list[Callable[[], Any]]) -> tuple[Callable[[], None], Any]:
        """(function that replays the calls as one CUDA graph, result of the last call)."""
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        self.synchronize()
        # torch.cuda.graph would also collect garbage and empty the cache, which costs 0.1 s a graph
        result = None
        with torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                for call in calls:
                    result = call()
            finally:
                graph.capture_end()
        self.synchronize()
        return graph.replay, result
