"""A flush of L2 that reads: it leaves nothing there that must go back to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def read_all(x_ptr, out_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program adds up its share of `x` and stores the sum, so that no load is left out."""
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + place, mask=place < n, other=0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def reader(buffer: Any, out: Any) -> Callable[[], Any]:
    """A call that reads all of an int32 buffer; `out` holds a sum for each program."""
    programs = out.numel()
    return lambda: read_all[(programs,)](buffer, out, buffer.numel(), BLOCK=4096)
