"""Launching a compiled Gluon kernel with little host time.

Triton's own launch binds and specializes every argument and encodes every tensor map again. Here
a kernel is compiled once for a fixed signature (so no shape can make it recompile), its tensor maps
are encoded once for what they describe, and a launch passes cached arguments to the C function
that Triton generated. Nothing synchronizes and nothing is allocated.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver

if not triton.__version__.startswith("3.6."):
    raise ImportError(
        f"triton {triton.__version__} has another Gluon and another launcher; triton 3.6 is needed"
    )

COUNTER_SLOTS = 16384
COUNTER_INTS = 8  # 32 bytes a slot: the next tile, and how many CTAs are done


class Layout(NamedTuple):
    """What the descriptor of a tensor covers: the number of the tensor, its shape and strides."""

    tensor: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Kernel:
    """A kernel compiled for the current device, from the fields of an `offline.Source`."""

    def __init__(
        self,
        kernel: Any,
        signature: Mapping[str, Any],
        constexprs: Mapping[str, Any],
        num_warps: int = 4,
    ) -> None:
        names = kernel.arg_names
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        values = {(names.index(name),): value for name, value in constexprs.items()}
        make = GluonASTSource if kernel.is_gluon() else ASTSource
        source = make(kernel, {name: types[name] for name in names}, values, {})
        self.compiled = triton.compile(
            source, target=driver.active.get_current_target(), options={"num_warps": num_warps}
        )
        metadata = self.compiled.metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise ValueError(
                f"{kernel.fn.__name__} needs scratch memory, which a launch does not pass"
            )
        run = self.compiled.run  # loads the kernel on the current device
        wrapped = inspect.getclosurevars(run.launch).nonlocals
        self._launch = wrapped.get("launcher", run.launch)
        self._head = (self.compiled.function, run.launch_cooperative_grid, run.launch_pdl)
        self._middle = (None, None, self.compiled.packed_metadata, None, None, None)
        self._maps = metadata.tensordesc_meta or []

    def tensor_map(
        self, position: int, pointer: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> tuple[Any, ...]:
        """What the launch wants for the descriptor at `position`: the encoded map, and its shape
        and strides, which kernels that only copy with TMA do not read."""
        meta = self._maps[position]
        # where a dimension has one element its stride is arbitrary, but TMA wants 16 bytes
        steps = [
            step if size > 1 else 16 for size, step in zip(shape[:-1], strides[:-1], strict=True)
        ]
        encoded = driver.active.utils.fill_tma_descriptor(
            pointer,
            meta["swizzle"],
            meta["elem_size"],
            TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
            meta["block_size"],
            shape,
            [*steps, 1],
            0,
        )
        return (encoded, *shape, *steps, 1)

    def tensor_maps(self, *tensors: Layout) -> Callable[..., tuple[Any, ...]]:
        """A function from the tensors' addresses to the launch arguments of their descriptors.

        It remembers the last 64 results. A map encodes the address and what is fixed here: the
        shape, the strides, and of this kernel the element type and the block.
        """

        @lru_cache(maxsize=64)
        def encode(*pointers: int) -> tuple[Any, ...]:
            maps = [
                self.tensor_map(position, pointers[layout.tensor], layout.shape, layout.strides)
                for position, layout in enumerate(tensors)
            ]
            return tuple(itertools.chain.from_iterable(maps))

        return encode

    def launch(self, grid: int, stream: int, arguments: tuple[Any, ...]) -> None:
        """Launch `grid` CTAs. Pointers are integers; the device must be current."""
        self._launch(grid, 1, 1, stream, *self._head, *self._middle, *arguments)


_counters: dict[int, tuple[torch.Tensor, dict[int, int], Any]] = {}
_counters_lock = threading.Lock()


def tile_counter(device: int, stream: int) -> int:
    """Address of two zeroed integers that only launches ordered after each other use, or 0.

    A kernel leaves them zeroed, so launches of one stream share a slot. A launch that is captured
    into a CUDA graph gets a slot of its own for good, since the graph may be replayed on any
    stream; replays write the same outputs, so whoever replays orders them. 0, and so a static
    schedule, if the pool is used up or would have to be allocated under capture.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and device in _counters:
        pool, by_stream, _ = _counters[device]
        if (slot := by_stream.get(stream)) is not None:
            return pool.data_ptr() + slot * COUNTER_INTS * 4
    with _counters_lock:
        return new_counter(device, stream, capturing)


def new_counter(device: int, stream: int, capturing: bool) -> int:
    """A slot that no launch has used yet; the caller holds the lock."""
    if device not in _counters:
        if capturing:
            return 0
        where = torch.device("cuda", device)
        pool = torch.zeros((COUNTER_SLOTS, COUNTER_INTS), dtype=torch.int32, device=where)
        torch.cuda.current_stream(device).synchronize()  # once: any stream may use it from here on
        _counters[device] = (pool, {}, itertools.count())
    pool, by_stream, free = _counters[device]
    slot = None if capturing else by_stream.get(stream)
    if slot is None:
        slot = next(free)
        if slot >= COUNTER_SLOTS:
            return 0
        if not capturing:
            by_stream[stream] = slot
    return pool.data_ptr() + slot * COUNTER_INTS * 4
