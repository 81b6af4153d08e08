"""Nsight Compute reports, read with NVIDIA's `ncu-report` package: no GPU and no Nsight
installation needed."""

from __future__ import annotations

import hashlib
import lzma
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from attn_profiling.metrics import Instruction, Kernel

DOMAIN = "attn_ladder"
_EXECUTED, _THREADS = "inst_executed", "thread_inst_executed_true"
_SAMPLES = "smsp__pcsamp_warps_issue_stalled_"


class BadReport(ValueError):
    """A report is missing, truncated, or not one of Nsight Compute."""


def locate(path: Path) -> Path:
    """The report itself or its `.xz`. Raises `BadReport` where neither exists."""
    packed = path.with_name(path.name + ".xz")
    for candidate in (path, packed):
        if candidate.is_file():
            return candidate
    raise BadReport(
        f"{path}: no such report, and no {packed.name} beside it; profile again or fetch the whole"
        " run"
    )


def content(path: Path) -> bytes:
    """The bytes of a report, unpacked where it is stored as `.xz`."""
    found = locate(path)
    data = found.read_bytes()
    if found.suffix != ".xz":
        return data
    try:
        return lzma.decompress(data)
    except (lzma.LZMAError, EOFError) as error:
        raise BadReport(
            f"{found}: cannot be unpacked ({error}); the file is truncated or not xz"
        ) from None


def check_sha256(path: Path, expected: str) -> bytes:
    """The content of a report whose hash is the recorded one. Raises `BadReport` where it
    differs."""
    data = content(path)
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise BadReport(
            f"{path}: sha256 is {actual[:16]}…, the record says {expected[:16]}…; the report is"
            " truncated, foreign or from another run: restore it or profile again"
        )
    return data


@contextmanager
def _on_disk(data: bytes, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(name).with_suffix(".ncu-rep").name
        path.write_bytes(data)
        yield path


def _instances(action: Any, name: str) -> dict[int, float]:
    """The values of a counter by instruction address; empty where the report lacks it."""
    metric = action.metric_by_name(name)
    if metric is None or not metric.has_correlation_ids():
        return {}
    ids = metric.correlation_ids()
    count = range(metric.num_instances())
    return {int(ids.as_uint64(n)): float(metric.as_double(n)) for n in count}


class Disassembly:
    """Machine code of the kernels of a report. Asking for an instruction is what reading a report
    takes its time for, so a kernel with the name, the number of instructions and every
    EACH-th instruction of one before is taken for the same."""

    EACH = 8

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], list[list[str]]] = {}

    def of(self, action: Any, pcs: Sequence[int]) -> list[str]:
        """The text of the instructions at these addresses, in their order."""
        before = self._known.setdefault((str(action.name()), len(pcs)), [])
        some = [str(action.sass_by_pc(pc)) for pc in pcs[:: self.EACH]]
        for lines in before:
            if lines[:: self.EACH] == some:
                return lines
        before.append([str(action.sass_by_pc(pc)) for pc in pcs])
        return before[-1]


def _instructions(action: Any, names: Sequence[str], code: Disassembly) -> tuple[Instruction, ...]:
    """Machine instructions in program order; empty without counters of single instructions."""
    executed, threads = _instances(action, _EXECUTED), _instances(action, _THREADS)
    samples: dict[int, dict[str, float]] = {}
    for name in names:
        if name.startswith(_SAMPLES) and not name.endswith("_not_issued"):
            for pc, count in _instances(action, name).items():
                if count:
                    samples.setdefault(pc, {})[name.removeprefix(_SAMPLES)] = count
    pcs = sorted(executed)
    return tuple(
        Instruction(sass, executed[pc], threads.get(pc, 0.0), samples.get(pc, {}))
        for pc, sass in zip(pcs, code.of(action, pcs), strict=True)
    )


def _ranges(action: Any) -> tuple[str, ...]:
    state = action.nvtx_state()
    if state is None:
        return ()
    found: list[str] = []
    for domain_id in state.domains():
        domain = state.domain_by_id(domain_id)
        if domain.name() == DOMAIN:
            found += [str(name) for name in domain.push_pop_ranges()]
    return tuple(found)


def _kernel(action: Any, counters: Sequence[str], code: Disassembly) -> Kernel:
    names = list(action.metric_names())
    known = set(names)
    values = {c: float(action.metric_by_name(c).as_double()) for c in counters if c in known}
    return Kernel(str(action.name()), _ranges(action), values, _instructions(action, names, code))


Found = TypeVar("Found")


def _each_kernel(data: bytes, name: str, read: Callable[[Any], Found]) -> list[Found]:
    """What `read` makes of every profiled kernel of a report given as bytes, in launch order."""
    import ncu_report

    with _on_disk(data, name) as path:
        try:
            context = ncu_report.load_report(str(path))
            kernels = [
                read(context.range_by_idx(r).action_by_idx(a))
                for r in range(context.num_ranges())
                for a in range(context.range_by_idx(r).num_actions())
            ]
        except (RuntimeError, ValueError, OSError, AttributeError) as error:
            raise BadReport(
                f"{name}: ncu-report cannot read it ({error}); is it a whole .ncu-rep?"
            ) from None
    if not kernels:
        raise BadReport(
            f"{name}: holds no profiled kernel; it is truncated, foreign or empty: profile again"
        )
    return kernels


def open_report(data: bytes, name: str, counters: Sequence[str]) -> list[Kernel]:
    """The kernels of a report given as bytes, with the wanted counters that it holds, in launch
    order.

    Raises `BadReport` naming the file where it is truncated, foreign or empty.
    """
    code = Disassembly()
    return _each_kernel(data, name, lambda action: _kernel(action, counters, code))


def open_apart(data: bytes, name: str, counters: Sequence[str]) -> list[Kernel]:
    """`open_report` in a process of its own: the ncu-report package never gives back what it takes,
    about twenty times the size of every report."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        try:
            return apart.submit(open_report, data, name, counters).result()
        except BrokenProcessPool:
            raise BadReport(
                f"{name}: the process that read it died; is it a whole .ncu-rep?"
            ) from None


def kernel_ranges(data: bytes, name: str) -> list[tuple[str, tuple[str, ...]]]:
    """Each kernel of a report with the NVTX ranges that it lies in, quickly: nothing else is read.

    Raises `BadReport` like `open_report`.
    """
    return _each_kernel(data, name, lambda action: (str(action.name()), _ranges(action)))
