"""Whether a subject gives the same bits elsewhere than alone on one stream: on two streams in turn,
without waiting, and replayed from a CUDA graph.

Memory that a call is to write never holds an old answer: what was compared is filled with NaN, on
the stream of its call, before the allocator hands it out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

CALLS = 10  # on each stream
REPLAYS = 5

Call = Callable[[], Sequence[Any]]  # of its results those that are None are not compared
Capture = Callable[[list[Call]], tuple[Callable[[], None], Any]]  # like Machine.capture
Synchronize = Callable[[], None]


class CannotCapture(RuntimeError):
    """Capturing a call in a CUDA graph failed. Afterwards the process may be unfit for more."""


def bits(torch: Any, x: Any) -> Any:
    """A tensor as integers, so that NaN equals itself and 0 is not -0."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _alone(call: Call) -> list[Any]:
    """Copies of what a call returns, in memory that no later call can be given."""
    found = call()
    kept = [x if x is None else x.clone() for x in found]
    _spoil(found)
    return kept


def _spoil(found: Sequence[Any]) -> None:
    for x in found:
        if x is not None:
            x.fill_(float("nan"))


def _differ(torch: Any, found: Sequence[Any], expected: Sequence[Any]) -> Any:
    """A flag on the device, for which nothing was waited; `found` is full of NaN afterwards."""
    flags = [
        (bits(torch, a) != bits(torch, b)).any()
        for a, b in zip(found, expected, strict=True)
        if b is not None
    ]
    _spoil(found)
    return torch.stack(flags).any()


def on_streams(
    torch: Any,
    call: Call,
    streams: Sequence[AbstractContextManager[Any]],
    synchronize: Synchronize,
) -> str | None:
    """What went wrong where a call is made on streams in turn without waiting, or None.

    Within each of `streams`, which are entered CALLS times, one stream is the current one.
    """
    expected = _alone(call)
    total = CALLS * len(streams)
    differs = torch.zeros(total, dtype=torch.bool, device=expected[0].device)
    synchronize()  # the streams do not wait for the one that made the inputs
    for i in range(total):
        with streams[i % len(streams)]:
            differs[i] = _differ(torch, call(), expected)
    synchronize()
    if not bool(differs.any()):
        return None
    return (
        f"call {int(differs.int().argmax()) + 1} of {total}, on {len(streams)} streams in turn,"
        " gave other bits than a call alone"
    )


def in_graph(torch: Any, call: Call, capture: Capture, synchronize: Synchronize) -> str | None:
    """What went wrong where a captured call is replayed between others, or None.

    Raises `CannotCapture`, or what says that memory ran out.
    """
    expected = _alone(call)
    try:
        replay, captured = capture([call])
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        # ending a capture that a call broke fails too: the first of the two says why
        told = [e for e in (error.__context__, error) if e is not None]
        text = ", then ".join(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}" for e in told)
        raise CannotCapture(f"a call cannot be captured in a CUDA graph: {text}") from error
    for i in range(1, REPLAYS + 1):
        _spoil(captured)
        replay()
        eager = call()
        synchronize()
        if bool(_differ(torch, captured, expected)):
            return f"replay {i} of {REPLAYS} of a CUDA graph gave other bits than a call alone"
        if bool(_differ(torch, eager, expected)):
            return f"the call after replay {i} of {REPLAYS} of a CUDA graph gave other bits"
    return None
