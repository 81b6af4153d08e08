"""Launching a compiled Gluon kernel with little host time.

Triton's own launch binds and specializes every argument and encodes every tensor map again. Here
a kernel is compiled once for a fixed signature (so no shape can make it recompile), its tensor maps
are encoded once for what they describe, and a launch passes cached arguments to the C function
that Triton generated. Nothing synchronizes, and nothing but the outputs is allocated.

At the end is what a launch through Triton itself takes.
"""

from __future__ import annotations

import inspect
import itertools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from attn_ladder.tiles import Shape

if not triton.__version__.startswith("3.6."):
    raise ImportError(
        f"triton {triton.__version__} has another Gluon and another launcher; triton 3.6 is needed"
    )

ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2_E = math.log2(math.e)
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


class Runner:
    """The host side of a stage whose kernel takes the tensor maps of q, k, v and out, those of k
    and v for a redo, the addresses of out, LSE and tile counter, a `Shape`, qk_scale and `cfg`.

    `schedule(config, q_size, k_size, causal, num_sms)` returns a configuration, a `Shape` and the
    number of CTAs; `source(configuration, dtype)` the fields of an `offline.Source`. A
    configuration is a dataclass with `schedule` ("dynamic" if tiles are counted) and `l2_bytes`,
    which the kernel does not know.
    """

    def __init__(
        self,
        schedule: Callable[..., tuple[Any, Shape, int]],
        source: Callable[[Any, str], Mapping[str, Any]],
    ) -> None:
        self.schedule = schedule
        self.source = source
        self.compiled = lru_cache(maxsize=64)(self._compiled)
        self.plan = lru_cache(maxsize=512)(self._plan)

    def _compiled(self, cfg: Any, dtype: torch.dtype, device: int) -> Kernel:
        return Kernel(**self.source(cfg, DTYPES[dtype]))

    def _plan(
        self, config: Any, dtype: torch.dtype, device: int, causal: bool, q_size: tuple[int, ...],
        k_size: tuple[int, ...], q_strides: tuple[int, ...], k_strides: tuple[int, ...],
        v_strides: tuple[int, ...],
    ) -> tuple[Kernel, Callable[..., tuple], bool, Shape, int, torch.Tensor]:  # fmt: skip
        """What calls that differ in addresses only share: the kernel, its tensor maps as a function
        of the addresses of q, k, v and out, whether it counts tiles, its shape, its number of CTAs,
        and a single number seen as an LSE: `empty_like` takes a quarter of the time of `empty`."""
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        cfg, shape, grid = self.schedule(config, q_size, k_size, causal, num_sms)
        o_strides = (math.prod(q_size[1:]), q_size[2] * q_size[3], q_size[3], 1)
        k, v = Layout(1, k_size, k_strides), Layout(2, k_size, v_strides)
        kernel = self.compiled(replace(cfg, l2_bytes=0), dtype, device)
        maps = kernel.tensor_maps(
            Layout(0, q_size, q_strides), k, v, Layout(3, q_size, o_strides), k, v
        )
        one = torch.empty((), dtype=torch.float32, device=torch.device("cuda", device))
        lse = one.expand(q_size[0], q_size[2], q_size[1])
        return kernel, maps, cfg.schedule == "dynamic", shape, grid, lse

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        config: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention forward; shapes and semantics as `attn_ladder.attention`.

        Strides of q, k, v must be multiples of 16 bytes, addresses too, the last dimension
        contiguous. `softmax_scale` must be positive. Returns out (batch, seqlen_q, nheads, headdim)
        in the dtype of q, and the natural-log log-sum-exp (batch, nheads, seqlen_q) in fp32.
        """
        device = q.get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.forward(
                    q, k, v, softmax_scale=softmax_scale, causal=causal, config=config
                )
        kernel, maps, dynamic, shape, grid, lse = self.plan(
            config, q.dtype, device, causal, q.shape, k.shape, q.stride(), k.stride(), v.stride()
        )
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty_like(lse, memory_format=torch.contiguous_format)
        descs = maps(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        stream = torch._C._cuda_getCurrentRawStream(device)
        counter = tile_counter(device, stream) if dynamic else 0
        qk_scale = LOG2_E * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
        pointers = (out.data_ptr(), lse.data_ptr(), counter)
        kernel.launch(grid, stream, (*descs, *pointers, shape, qk_scale, None))
        return out, lse


@cache
def multiprocessors(device: int) -> int:
    """How many SMs a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def group_of_heads(k: torch.Tensor, nheads: int, num_ctas: int, l2_bytes: int) -> int:
    """Largest divisor of `num_ctas` for which so many query heads' K and V fit in `l2_bytes`."""
    head_bytes = 2 * k.shape[1] * k.shape[3] * k.element_size() * k.shape[2] / nheads
    divisors = (n for n in range(num_ctas, 0, -1) if num_ctas % n == 0)
    return next((n for n in divisors if n * head_bytes <= l2_bytes), 1)


def descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of tiles [1, rows, 1, headdim] over (batch, seqlen, nheads, headdim)."""
    block = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, ELEMENTS[x.dtype])
    strides = [s if n > 1 else x.shape[3] for n, s in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], block, layout)
