"""The public entry point: checks inputs, chooses the kernel, copies what it cannot read in place.

What depends only on shapes, strides, dtypes and devices is decided once (`route`) and remembered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from attn_ladder.problem import Problem

_hashing = None  # Triton hashes its own library before it looks into its cache, once, for 0.3 s
with suppress(ImportError):
    from triton.runtime.cache import triton_key

    _hashing = threading.Thread(target=triton_key, daemon=True)
    _hashing.start()  # while stage 5 is imported, and until the first call
with suppress(ImportError):  # here, and not in the first call; `route` says why it cannot be used
    import attn_ladder.stage5_everything  # noqa: F401

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEADDIM = 256
LEAST_SCALE = 2.0**-100


class Operand(NamedTuple):
    """What is known of an input tensor before its address."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Route:
    """How a call is computed: the subject that runs, its configuration, and the inputs that are
    copied to contiguous memory first, each with the reason."""

    subject: str
    why: str
    config: Any
    copies: dict[str, str]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    alignment: int  # bytes; a pointer that is no multiple of it is copied as well

    def __str__(self) -> str:
        lines = [f"kernel: {self.subject} ({self.why})", f"config: {self.config}"]
        lines += [f"copied: {name}, {reason}" for name, reason in self.copies.items()]
        return "\n".join(lines if self.copies else [*lines, "copied: nothing"])


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device. Raises `ValueError` for any other device."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"q.device={device} must be a CUDA device")
    return torch.cuda.get_device_capability(device)


def num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check(q: Operand, k: Operand, v: Operand, softmax_scale: float | None) -> None:
    """Raise `ValueError` for wrong inputs and `NotImplementedError` for valid, unsupported ones."""
    operands = {"q": q, "k": k, "v": v}
    for name, x in operands.items():
        if len(x.shape) != 4:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must be (batch, seqlen, nheads, headdim)"
            )
        if x.dtype not in DTYPES:
            error = NotImplementedError if x.dtype.is_floating_point else ValueError
            raise error(f"{name}.dtype={x.dtype} must be torch.bfloat16 or torch.float16")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype} must be that of q, {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}.device={x.device} must be that of q, {q.device}")
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1], k.shape[2]
    if k.shape != v.shape:
        raise ValueError(f"v.shape={tuple(v.shape)} must be that of k, {tuple(k.shape)}")
    for name, size in (
        ("batch", batch), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k), ("nheads", nheads),
        ("nheads_k", nheads_k), ("headdim", headdim),
    ):  # fmt: skip
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if k.shape[0] != batch:
        raise ValueError(f"k.shape[0]={k.shape[0]} must be the batch of q, {batch}")
    if k.shape[3] != headdim:
        raise ValueError(f"k.shape[3]={k.shape[3]} must be the headdim of q, {headdim}")
    if nheads % nheads_k:
        raise ValueError(f"{nheads=} must be a multiple of {nheads_k=}")
    if headdim > MAX_HEADDIM:
        raise NotImplementedError(f"{headdim=} is not supported; at most {MAX_HEADDIM} is")
    if batch * nheads * (seqlen_q // 64 + 1) >= 2**31 or max(seqlen_q, seqlen_k) >= 2**30:
        raise NotImplementedError(f"{batch=} {nheads=} {seqlen_q=} {seqlen_k=} is too large")
    check_scale(softmax_scale)


def check_scale(softmax_scale: Any) -> None:
    """Raise `ValueError` or `NotImplementedError` for a scale that the kernels cannot use."""
    if softmax_scale is None:
        return
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, float | int):
        raise ValueError(f"{softmax_scale=} must be a number or None")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"{softmax_scale=} must be finite")
    if softmax_scale <= 0:
        raise NotImplementedError(f"{softmax_scale=} is not supported; it must be positive")
    if not LEAST_SCALE <= softmax_scale <= 1 / LEAST_SCALE:
        raise ValueError(
            f"{softmax_scale=} must be between {LEAST_SCALE:g} and {1 / LEAST_SCALE:g}: the"
            " kernels multiply by it in fp32"
        )


def must_copy(x: Operand, tma: bool) -> str | None:
    """Why a kernel cannot read an operand in place, or None."""
    steps = [(size, step) for size, step in zip(x.shape, x.strides, strict=True) if size > 1]
    if x.shape[3] > 1 and x.strides[3] != 1:
        return f"its last dimension has stride {x.strides[3]}, not 1"
    if tma and any(step * x.dtype.itemsize % 16 for _, step in steps[:-1]):
        return f"its strides {x.strides} are not all multiples of 16 bytes"
    if tma and any(step == 0 for _, step in steps):
        return f"its strides {x.strides} repeat elements"
    return None


@lru_cache(maxsize=1024)
def route(causal: bool, softmax_scale: float | None, *described: Any) -> Route:
    """Check a call and choose its kernel. `described` has the fields of `Operand` of q, k and v.

    Raises as `check` does.
    """
    q, k, v = (Operand(*described[i : i + 4]) for i in (0, 4, 8))
    check(q, k, v, softmax_scale)
    if _hashing is not None:
        _hashing.join()  # or the call would hash as well
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1], k.shape[2]
    gpu = capability(q.device)
    problem = Problem(
        id="call",
        suites=("call",),
        dtype=DTYPES[q.dtype],
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        nheads=nheads,
        nheads_k=nheads_k,
        headdim=headdim,
        causal=causal,
    )
    why = "compute capability 9.0"
    try:
        from attn_ladder import stage5_everything as top

        refused = top.unsupported(problem, gpu)
    except ImportError as error:  # another Triton: Gluon is still changing
        refused = f"stage5 cannot be imported: {error}"
    operands = {"q": q, "k": k, "v": v}
    if refused is None:
        config = top.schedule(None, q.shape, k.shape, causal, num_sms(q.device))[0]
        copies = {name: reason for name, x in operands.items() if (reason := must_copy(x, True))}
        return Route("stage5", why, config, copies, top.forward, 16)
    from attn_ladder import stage1_fused as base

    if reason := base.unsupported(problem, gpu):
        raise NotImplementedError(reason)
    if batch * nheads > 65535:
        raise NotImplementedError(f"{batch=} * {nheads=} must be at most 65535 where stage1 runs")
    copies = {name: reason for name, x in operands.items() if (reason := must_copy(x, False))}
    return Route("stage1", refused, None, copies, on_its_device(base.forward), 1)


def on_its_device(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(q):
            return forward(q, *args, **kwargs)

    return run


def prepare(q: Any, k: Any, v: Any, causal: bool, softmax_scale: float | None) -> Route:
    """The route of a call. Raises as `check` does, and for inputs that require grad."""
    if causal is not True and causal is not False:  # 1 would be taken for True by the cache
        raise ValueError(f"{causal=} must be True or False")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}={x!r} must be a torch.Tensor")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name}.requires_grad=True: attention has no backward pass; "
                "call it under torch.no_grad() or detach its inputs"
            )
    if q.layout != torch.strided or k.layout != torch.strided or v.layout != torch.strided:
        raise NotImplementedError(
            f"{q.layout=} {k.layout=} {v.layout=} is not supported; only torch.strided is"
        )
    return route(
        causal, softmax_scale,
        q.shape, q.stride(), q.dtype, q.device,
        k.shape, k.stride(), k.dtype, k.device,
        v.shape, v.stride(), v.dtype, v.device,
    )  # fmt: skip


def unaligned(x: torch.Tensor, alignment: int) -> bool:
    return x.data_ptr() % alignment != 0


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · softmax_scale) v, per head, without the score matrix in memory.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16 or bf16, on a CUDA device.
        k, v: (batch, seqlen_k, nheads_k, headdim) of the same dtype and device;
            nheads % nheads_k == 0, each key head serves nheads / nheads_k query heads.
        causal: a query sees the keys up to its own position, aligned bottom-right: query i sees
            key j if j <= i + seqlen_k - seqlen_q. A query that sees no key gives 0.
        softmax_scale: positive; 1 / sqrt(headdim) if None.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns: out (batch, seqlen_q, nheads, headdim) in the dtype of q, contiguous; with `return_lse`
        also lse (batch, nheads, seqlen_q), fp32, natural logarithm, -inf where no key is seen.

    The kernel reads q, k and v in place if their last dimension is contiguous and their strides and
    addresses are multiples of 16 bytes (transposed storage and slices included); others are copied
    first, which `explain` shows. The forward pass only.

    Raises: `ValueError` for wrong input, `NotImplementedError` for valid input that no kernel
        supports, among it inputs that require grad outside `torch.no_grad()`.
    """
    chosen = prepare(q, k, v, causal, softmax_scale)
    if chosen.copies or chosen.alignment > 1 and (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        tensors = {"q": q, "k": k, "v": v}
        q, k, v = (
            x.clone(memory_format=torch.contiguous_format)
            if name in chosen.copies or unaligned(x, chosen.alignment)
            else x
            for name, x in tensors.items()
        )
    out, lse = chosen.forward(q, k, v, softmax_scale=softmax_scale, causal=causal)
    return (out, lse) if return_lse else out


def explain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Route:
    """What `attention` would do with the same arguments. Raises what it would raise."""
    chosen = prepare(q, k, v, causal, softmax_scale)
    copies = {
        name: chosen.copies.get(name, f"its address is no multiple of {chosen.alignment} bytes")
        for name, x in (("q", q), ("k", k), ("v", v))
        if name in chosen.copies or unaligned(x, chosen.alignment)
    }
    return Route(
        chosen.subject, chosen.why, chosen.config, copies, chosen.forward, chosen.alignment
    )


def explain(*args: Any, **arguments: Any) -> Route:
    """What `attention` would do with the same arguments; print it. Raises what it would raise.

    With `cache_seqlens` among the arguments it speaks of `attention_with_kvcache`, with
    `cu_seqlens_q` of `attention_varlen`.
    """
    if "cache_seqlens" in arguments or "cu_seqlens_q" in arguments:
        from attn_ladder import serving

        if "cache_seqlens" in arguments:
            return serving.explain_kvcache(*args, **arguments)
        return serving.explain_varlen(*args, **arguments)
    return explain_attention(*args, **arguments)
