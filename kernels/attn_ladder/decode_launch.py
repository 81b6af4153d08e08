"""The host side of `decode_hopper`: which calls it takes, and how one is launched.

Everything that depends on shapes, strides and types only is found once and remembered.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver

from attn_ladder import decode, launch
from attn_ladder.decode_hopper import (
    BATCHES,
    PAGE_SIZES,
    REGISTERS,
    ROWS,
    Build,
    Call,
    Config,
    source,
)

MAX_HEADS_K = 128
EVICT_FIRST_BYTES = 384 * 2**20
"""Room for K and V up to which L2 gives up keys first; above, the bytes of others wait in it and go
back to memory while keys are read, which then costs more than it saves. Full caches were measured.
"""
POLICY = "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
TMA_LOAD = re.compile(r"((?:@%p\d+ )?cp\.async\.bulk\.tensor\.\dd\.shared::\S+) (\[.*\]);")


def with_policy(ptx: str, policy: str = POLICY) -> str:
    """The same code, but each TMA load tells L2 what to do with what it brings: by `POLICY`, to
    evict it before anything else.

    Each key is read once a call. Without this it drives out what was there before, and where that
    is modified it has to be written first. Gluon has no word for it.
    """
    found, loads = TMA_LOAD.subn(
        rf"{{ .reg .b64 policy; {policy} \1.L2::cache_hint \2, policy; }}", ptx
    )
    if not loads:
        raise ValueError("no TMA load in the PTX of the decode kernel; is this another Triton?")
    return found


_INSTALL = threading.Lock()
_THREAD = threading.local()


@contextmanager
def edited(edit: Callable[[str], str]) -> Iterator[None]:
    """The PTX of what this thread compiles in the body, once, goes through `edit`.

    Triton's hook for it belongs to all threads. It is installed for good, behind one that was
    there, and does nothing unless the thread that compiles has asked for it.
    """
    with _INSTALL:
        before = knobs.runtime.add_stages_inspection_hook
        if not getattr(before, "edits_ptx", False):
            knobs.runtime.add_stages_inspection_hook = _hook_behind(before)
    _THREAD.edit = edit
    try:
        yield
    finally:
        _THREAD.edit = None


def _hook_behind(before: Callable[..., Any] | None) -> Any:
    def hook(backend: Any, stages: dict[str, Any], *more: Any) -> None:
        if before is not None:
            before(backend, stages, *more)
        edit = getattr(_THREAD, "edit", None)
        if edit is not None:
            _THREAD.edit, make = None, stages["ptx"]
            stages["ptx"] = lambda source, metadata: edit(make(source, metadata))

    hook.edits_ptx = True  # type: ignore[attr-defined]
    return hook


def compile_kernel(source: Mapping[str, Any], target: Any, maxnreg: int = REGISTERS) -> Any:
    """Triton's compiled kernel of what `decode_hopper.source` returns."""
    kernel, constexprs = source["kernel"], source["constexprs"]
    names = kernel.arg_names
    types = {**source["signature"], **dict.fromkeys(constexprs, "constexpr")}
    values = {(names.index(name),): value for name, value in constexprs.items()}
    policy = constexprs["cfg"].policy
    edit = edited(lambda ptx: with_policy(ptx, policy)) if policy else nullcontext()
    with edit:
        return triton.compile(
            GluonASTSource(kernel, {name: types[name] for name in names}, values, {}),
            target=target,
            options={"num_warps": 4, "maxnreg": maxnreg},
        )


class Kernel(launch.Kernel):
    """`launch.Kernel` with a limit of registers, so that two CTAs fit on an SM."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        self.compiled = compile_kernel(source, driver.active.get_current_target())
        metadata = self.compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise ValueError("the kernel needs scratch memory, which a launch does not pass")
        run = self.compiled.run  # loads the kernel on the current device
        self._launch = inspect.getclosurevars(run.launch).nonlocals.get("launcher", run.launch)
        self._head = (self.compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        self._middle = (None, None, self.compiled.packed_metadata, None, None, None)
        self._maps = metadata.tensordesc_meta or []


@lru_cache(maxsize=64)
def compiled(cfg: Build, dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(source(cfg, launch.DTYPES[dtype]))


def choose_config(headdim: int, kv_bytes: int) -> Config:
    """Blocks of 32 KB, two rings on an SM: one CTA merges and combines while the other computes.

    `kv_bytes`: of K and V, as many as the cache has room for in the sequences of the call.
    """
    return Config(BLOCK_N=8192 // headdim, evict_first=kv_bytes <= EVICT_FIRST_BYTES)


def kv_bytes(batch: int, k_size: tuple[int, ...], pages: int | None) -> int:
    """Bytes of K and V that a launch for `batch` sequences reads where each fills its row of a
    cache of this size, or all its pages."""
    _, size, nheads_k, headdim = k_size
    return 4 * min(batch, BATCHES[-1]) * size * (pages or 1) * nheads_k * headdim


def build(
    config: Config, headdim: int, page_size: int, ranged: bool, indexed: bool, batch: int, rows: int
) -> Build:
    """What is compiled for a call. Raises `ValueError` where that is not possible."""
    if config.BLOCK_N * headdim > 8192:
        raise ValueError(f"{config} needs more registers than there are at {headdim=}")
    if batch > BATCHES[-1]:
        raise ValueError(f"{batch=} sequences are more than {BATCHES[-1]}, the most of a launch")
    size = next(size for size in BATCHES if batch <= size)
    return Build(
        headdim, page_size, ranged, indexed, size, 4 if rows <= 4 else ROWS.value, config.BLOCK_N,
        config.num_buffers, POLICY if config.evict_first else "",
    )  # fmt: skip


def split_policy(nheads_k: int, capacity: int, config: Config) -> tuple[int, int]:
    """(most splits of a sequence, splits of one as long as the capacity at most)."""
    max_splits = 1
    while 2 * max_splits * nheads_k <= decode.TARGET_CTAS:
        max_splits *= 2
    return max_splits, max(1, min(max_splits, triton.cdiv(capacity, config.min_split)))


@lru_cache(maxsize=1024)
def plan(
    config: Config | None, dtype: torch.dtype, device: int, ranged: bool, causal: bool,
    seqlen_new: int, indexed: bool, table: tuple[int, int] | None, q_size: tuple[int, ...],
    k_size: tuple[int, ...],
    q_strides: tuple[int, ...], k_strides: tuple[int, ...], v_strides: tuple[int, ...],
) -> tuple[Kernel, Callable[..., tuple[Any, ...]], Call, int, int]:  # fmt: skip
    """What calls that differ in addresses only share: the kernel, its tensor maps as a function of
    the addresses of k and v, the call, the number of CTAs, rows of partial results.

    `table`: pages of a sequence and the stride of the block table.
    """
    batch, seqlen_q, nheads, headdim = q_size
    num_rows, size, nheads_k, _ = k_size
    group = nheads // nheads_k
    total = kv_bytes(batch, k_size, None if table is None else table[0])
    config = config or choose_config(headdim, total)
    page_size, capacity = (0, size) if table is None else (size, size * table[0])
    max_splits, num_splits = split_policy(nheads_k, capacity, config)
    call = Call(
        batch, seqlen_q, group, nheads_k, -(-(2**16) // group), -(-(2**16) // nheads_k), seqlen_new,
        capacity, num_rows, num_splits, max_splits.bit_length() - 1,
        config.min_split.bit_length() - 1, int(causal), *(step // 8 for step in q_strides[:3]),
        0 if table is None else table[1],
    )  # fmt: skip
    kernel = compiled(
        build(config, headdim, page_size, ranged, indexed, batch, seqlen_q * group), dtype, device
    )
    maps = kernel.tensor_maps(
        launch.Layout(0, k_size, k_strides), launch.Layout(1, k_size, v_strides)
    )
    grid = min(
        config.ctas_per_sm * launch.multiprocessors(device), batch * nheads_k * num_splits
    )  # fmt: skip
    rows = batch * num_splits * seqlen_q * nheads if num_splits > 1 else 0
    return kernel, maps, call, grid, rows


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mode: int,
    bounds: torch.Tensor,
    index: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode.launch` where `refusal` gives None; the device of q must be current.

    New keys are appended by a kernel that runs before.
    """
    seqlen_new = 0
    if k_new is not None and v_new is not None:
        decode.append(k, v, k_new, v_new, bounds=bounds, index=index, block_table=block_table)
        seqlen_new = k_new.shape[1]
    if copy_reason(q) is not None:
        q = q.clone(memory_format=torch.contiguous_format)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, seqlen_q, nheads, _ = q.shape
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    scale = launch.LOG2_E * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    options = (config, mode == decode.RANGE, causal, seqlen_new, scale)
    if batch <= BATCHES[-1]:
        _launch(out, lse, q, k, v, bounds, index, block_table, options)
        return out, lse
    if index is None and block_table is None:  # so that a part of the batch has its rows
        index = torch.arange(batch, dtype=torch.int32, device=q.device)
    for start in range(0, batch, BATCHES[-1]):
        part = slice(start, start + BATCHES[-1])
        _launch(
            out[part], lse[part], q[part], k, v, bounds[part],
            None if index is None else index[part],
            None if block_table is None else block_table[part], options,
        )  # fmt: skip
    return out, lse


def _launch(
    out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    bounds: torch.Tensor, index: torch.Tensor | None, block_table: torch.Tensor | None,
    options: tuple[Any, ...],
) -> None:  # fmt: skip
    config, ranged, causal, seqlen_new, scale = options
    device = q.get_device()
    table = None if block_table is None else (block_table.shape[1], block_table.stride(0))
    kernel, maps, call, grid, rows = plan(
        config, q.dtype, device, ranged, causal, seqlen_new, index is not None, table, q.shape,
        k.shape, q.stride(), k.stride(), v.stride(),
    )  # fmt: skip
    headdim = q.shape[3]
    partial = torch.empty(rows * (headdim + 2), dtype=torch.float32, device=q.device)
    counter = decode.counters(q.device, q.shape[0] * call.nheads_k) if rows else lse
    sums = partial.data_ptr()
    pointers = (
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), sums, sums + 4 * rows * headdim,
        bounds.data_ptr(), (bounds if index is None else index).data_ptr(),
        (bounds if block_table is None else block_table).data_ptr(),
        decode.error_flag(q.device).data_ptr(), counter.data_ptr(),
    )  # fmt: skip
    stream = torch._C._cuda_getCurrentRawStream(device)
    descs = maps(k.data_ptr(), v.data_ptr())
    kernel.launch(grid, stream, (*descs, *pointers, call, scale, None))


def refusal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mode: int,
    block_table: torch.Tensor | None = None,
) -> str | None:
    """Why `run` cannot take a call that `decode.launch` can, or None. Never because of the batch,
    so a sequence alone is computed as inside one; but for a cache whose rows are repeated by a
    stride of 0, which no tensor map describes."""
    if mode == decode.VARLEN:
        return "queries are ragged"
    for name, x in (("k", k), ("v", v)):
        if x.data_ptr() % 16:
            return f"{name} is not aligned to 16 bytes"
    table = None if block_table is None else (block_table.shape[1], block_table.stride(1))
    return _refusal(q.dtype, q.shape[1:], k.shape[1:], k.stride(), v.stride(), table)


def copy_reason(q: torch.Tensor) -> str | None:
    """Why the queries are copied before they are read, or None."""
    if q.data_ptr() % 16:
        return "it is not aligned to 16 bytes"
    steps = q.stride()[:3]
    if any(step % 8 for step in steps):
        return f"its strides {q.stride()} are not all multiples of 16 bytes"
    span = sum((n - 1) * step for n, step in zip(q.shape[1:3], steps[1:], strict=True))
    if span >= 2**31 - 2**10 or steps[0] >= 2**31:
        return f"its strides {q.stride()} are too large"
    return None


@lru_cache(maxsize=1024)
def _refusal(
    dtype: torch.dtype, q_size: tuple[int, ...], k_size: tuple[int, ...],
    k_strides: tuple[int, ...], v_strides: tuple[int, ...], table: tuple[int, int] | None,
) -> str | None:  # fmt: skip
    seqlen_q, nheads, headdim = q_size
    size, nheads_k, _ = k_size
    rows = seqlen_q * (nheads // nheads_k)
    page_size, capacity = (0, size) if table is None else (size, size * table[0])
    for fits, text in (
        (dtype in launch.ELEMENTS, f"q.dtype={dtype}"),
        (headdim in (64, 128), f"{headdim=}"),
        (rows <= ROWS.value, f"{rows} query rows of a key head, more than {ROWS.value}"),
        (nheads_k <= MAX_HEADS_K, f"{nheads_k=}, more than {MAX_HEADS_K}"),
        (page_size in PAGE_SIZES, f"{page_size=}, none of {PAGE_SIZES[1:]}"),
        (0 < capacity < decode.EVERY_KEY, f"a capacity of {capacity} keys"),
        (table is None or table[1] == 1, "a block table whose rows are not contiguous"),
    ):
        if not fits:
            return text
    for name, steps in (("k", k_strides), ("v", v_strides)):
        if steps[3] != 1 or any(step <= 0 or step % 8 for step in steps[:3]):
            return f"the strides of {name}, {steps}, are not positive multiples of 16 bytes"
    return None
