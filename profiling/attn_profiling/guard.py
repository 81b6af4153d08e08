"""Controls against being fooled: the functions that time must be the real ones, and memory that a
kernel is to write must not hold an old answer.

Where each trick is caught, and the negative control that shows it:

- outputs cached between calls: new values in the same buffers, other addresses (`check`); fresh
  inputs in every timed call, one of them judged (`timing.verify_outputs`)
- skipped work, unwritten outputs: NaN in the memory that is handed out (`poisoned`,
  `poison_recycled`), an error bound of twice that of PyTorch (`check.Oracle`)
- reused inputs: no two sets share an address (`inputs.Rotation`)
- a kernel that behaves differently when timed: the output of a timed call chosen at random is
  judged; the kernels of every call, of all processes and under ncu must be the same ones
  (`launches.one_kind`, `timing.merge`, `ncu.check_report`)
- a patched timer: the functions of `Guard`, and two clocks that must agree
  (`launches.disagreement`)

The controls are in tests/test_check.py, tests/test_timing.py and tests/test_ncu.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_WATCHED = (
    "cuda.Event.record",
    "cuda.Event.elapsed_time",
    "cuda.Event.query",
    "cuda.Event.synchronize",
    "cuda.synchronize",
    "cuda._sleep",
    "cuda.CUDAGraph.replay",
    "autograd.profiler.profile.__enter__",
    "autograd.profiler.profile.__exit__",
    "isfinite",
    "logsumexp",
    "softmax",
    "einsum",
)


class Patched(RuntimeError):
    """Code under test replaced a function that measures or judges it."""


class Guard:
    """Remembers the functions that measure, as they were before any subject was imported."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._known = self._look()

    def _look(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "time.perf_counter_ns": time.perf_counter_ns,
            "time.perf_counter": time.perf_counter,
        }
        for path in _WATCHED:
            value: Any = self._torch
            for part in path.split("."):
                value = getattr(value, part, None)
            found[f"torch.{path}"] = value
        return found

    def verify(self) -> None:
        """Raises `Patched` naming what is not what it was."""
        now = self._look()
        changed = [name for name, value in self._known.items() if now[name] is not value]
        if changed:
            raise Patched(
                f"{', '.join(changed)} was replaced after the harness started; a subject must not"
                " touch the functions that measure it"
            )


@contextmanager
def poisoned(torch: Any) -> Iterator[None]:
    """Within it, memory that torch hands out uninitialised is full of NaN.

    Python's `torch.empty` and its kin are wrapped. Extensions that allocate from C++ get recycled
    blocks: `poison_recycled` sees to those.
    """
    names = ("empty", "empty_like", "empty_strided", "empty_permuted")
    methods = ("new_empty", "new_empty_strided")
    kept: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch, name, getattr(torch, name)) for name in names
    ] + [(torch.Tensor, name, getattr(torch.Tensor, name)) for name in methods]

    def filling(function: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            tensor = function(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.dtype.is_floating_point else tensor

        return allocate

    for owner, name, function in kept:
        setattr(owner, name, filling(function))
    try:
        yield
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


def poison_recycled(torch: Any, like: list[Any], copies: int) -> None:
    """Fill the blocks that the caching allocator will hand out next with NaN.

    `like`: tensors of the sizes that are about to be allocated, `copies` blocks of each.
    """
    if not like or like[0].device.type != "cuda":
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = [torch.full_like(t, float("nan")) for t in like for _ in range(copies)]
    torch.cuda.synchronize()
    del blocks
