"""Attention over a KV cache and over ragged sequences: checks, operators, and what a call runs.

The kernels are in `decode.py`, and for few query tokens on sm_90 in `decode_hopper.py`; which of
them a call runs depends on shapes and strides, never on the batch. The operators are torch library
operators with fake implementations (`torch.ops.attn_ladder.*`), so `torch.compile` traces through
them:

    dense     `attn_ladder.attention` with its log-sum-exp
    ranged    each sequence attends to a range of the keys (what transformers' masks become)
    decode    `attention_with_kvcache`
    varlen    `attention_varlen`

They check neither shapes nor values; the functions below do. CPU tensors run under Triton's
interpreter only (TRITON_INTERPRET=1), there in fp16 and fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from attn_ladder import decode as kernels
from attn_ladder.dispatch import DTYPES, Route, attention, capability, check_scale

HEADDIMS = (64, 128)
PAGE_SIZES = (16, 64, 256)
WHY = "split-KV over a cache or ragged sequences"

# whether Triton interprets kernels on the CPU; decided when a kernel is defined
INTERPRETED = bool(triton.knobs.runtime.interpret)

_LIBRARY = torch.library.Library("attn_ladder", "FRAGMENT")


def _register(schema: str, run: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"attn_ladder::{name}", fake, lib=_LIBRARY)


def runs_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any) -> bool:
    """Whether a call as `decode.launch` takes it runs `decode_hopper`."""
    return q.device.type == "cuda" and _why_not_hopper(q, k, v, **call) is None


def _why_not_hopper(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any) -> str | None:
    if capability(q.device) != (9, 0):
        return f"compute capability {capability(q.device)}, not (9, 0)"
    from attn_ladder import decode_launch

    return decode_launch.refusal(q, k, v, mode=call["mode"], block_table=call.get("block_table"))


def _on_device(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if q.device.type == "cuda":
        with torch.cuda.device_of(q):
            if runs_hopper(q, k, v, **call):
                from attn_ladder import decode_launch

                return decode_launch.run(q, k, v, **call)
            return kernels.launch(q, k, v, **call)
    if not INTERPRETED:
        raise ValueError(f"q.device={q.device} must be a CUDA device, or TRITON_INTERPRET=1 set")
    return kernels.launch(q, k, v, **call)


def _dense(q, k, v, causal, softmax_scale):
    if q.device.type == "cuda":
        return attention(q, k, v, causal=causal, softmax_scale=softmax_scale, return_lse=True)
    if not INTERPRETED:
        raise ValueError(f"q.device={q.device} must be a CUDA device, or TRITON_INTERPRET=1 set")
    from attn_ladder.stage1_fused import forward

    return forward(q, k, v, causal=causal, softmax_scale=softmax_scale)


def _ranged(q, k, v, key_range, softmax_scale):
    return _on_device(q, k, v, mode=kernels.RANGE, bounds=key_range, softmax_scale=softmax_scale)


def _decode(q, k_cache, v_cache, k, v, lens, cache_batch_idx, block_table, causal, softmax_scale):
    return _on_device(
        q, k_cache, v_cache, mode=kernels.CACHE, bounds=lens, index=cache_batch_idx,
        block_table=block_table, k_new=k, v_new=v, causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale):
    return _on_device(
        q, k, v, mode=kernels.VARLEN, bounds=cu_seqlens_k, index=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q, causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip


def _fake(q, *args):
    batch, seqlen_q, nheads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, nheads, seqlen_q), dtype=torch.float32)


def _fake_varlen(q, *args):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


_register(
    "dense(Tensor q, Tensor k, Tensor v, bool causal, float? softmax_scale) -> (Tensor, Tensor)",
    _dense,
    _fake,
)
_register(
    "ranged(Tensor q, Tensor k, Tensor v, Tensor key_range, float? softmax_scale)"
    " -> (Tensor, Tensor)",
    _ranged,
    _fake,
)
_register(
    "decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v,"
    " Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? block_table, bool causal,"
    " float? softmax_scale) -> (Tensor, Tensor)",
    _decode,
    _fake,
)
_register(
    "varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, bool causal, float? softmax_scale) -> (Tensor, Tensor)",
    _varlen,
    _fake_varlen,
)


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}={x!r} must be a torch.Tensor")


def check_tensors(q: Any, others: dict[str, Any], dims: int) -> None:
    """Types, dimensions, dtypes, devices and gradients of q and what goes with it."""
    tensors = {"q": q, **others}
    for name, x in tensors.items():
        _tensor(name, x)
        if x.layout != torch.strided:
            raise NotImplementedError(f"{name}.layout={x.layout} is not supported; only strided is")
        if x.dim() != dims:
            wanted = "(batch, seqlen, nheads, headdim)" if dims == 4 else "(total, nheads, headdim)"
            raise ValueError(f"{name}.shape={tuple(x.shape)} must be {wanted}")
        if x.dtype not in DTYPES and not (x.dtype == torch.float32 and INTERPRETED):
            error = NotImplementedError if x.dtype.is_floating_point else ValueError
            raise error(f"{name}.dtype={x.dtype} must be torch.bfloat16 or torch.float16")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype} must be that of q, {q.dtype}")
        if x.dtype == torch.bfloat16 and INTERPRETED and x.device.type == "cpu":
            raise NotImplementedError(
                f"{name}.dtype={x.dtype}: Triton's interpreter computes with the bits of bf16 as "
                "integers; use torch.float16 or torch.float32 on a CPU"
            )
        if x.device != q.device:
            raise ValueError(f"{name}.device={x.device} must be that of q, {q.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name}.requires_grad=True: attention has no backward pass; "
                "call it under torch.no_grad() or detach its inputs"
            )
    if not INTERPRETED and not torch.compiler.is_compiling():
        gpu = capability(q.device)
        if gpu < (8, 0):
            raise NotImplementedError(
                f"compute capability 8.0 is needed; q is on {gpu[0]}.{gpu[1]}"
            )
    if q.shape[-1] not in HEADDIMS:
        raise NotImplementedError(f"headdim={q.shape[-1]} is not supported; {HEADDIMS} are")
    for name, x in tensors.items():
        if 0 in x.shape:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have no dimension of 0")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name}.shape={tuple(x.shape)} must have the headdim of q, "
                             f"{q.shape[-1]}")  # fmt: skip


def _check_size(longest: int, nheads: int, nheads_k: int, longest_k: int) -> None:
    """What the kernels' 32-bit positions and their grid can hold."""
    if torch.compiler.is_compiling():  # sizes may be symbols; a grid too large fails at its launch
        return
    config = kernels.plan(longest, nheads, nheads_k, HEADDIMS[0])
    tiles = triton.cdiv(longest * (nheads // nheads_k), config.BLOCK_M)
    if tiles > 65535 or longest_k >= kernels.EVERY_KEY:
        raise NotImplementedError(
            f"{longest} query tokens of {nheads // nheads_k} heads each, or {longest_k} keys, are "
            f"too many; at most {65535 * config.BLOCK_M} packed rows and {kernels.EVERY_KEY - 1} "
            "keys are supported"
        )


def _check_heads(q: torch.Tensor, name: str, x: torch.Tensor) -> None:
    nheads, nheads_k = q.shape[-2], x.shape[-2]
    if nheads % nheads_k:
        raise ValueError(f"{nheads=} of q must be a multiple of {nheads_k=} of {name}")


def _check_options(causal: Any, softmax_scale: Any) -> None:
    if not isinstance(causal, bool):
        raise ValueError(f"{causal=} must be True or False")
    check_scale(softmax_scale)


def _integers(name: str, x: Any, shape: tuple[int | None, ...], device: torch.device) -> None:
    _tensor(name, x)
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    if x.dim() != len(shape) or any(
        size not in (None, have) for size, have in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be ({wanted})")
    if x.dtype != torch.int32:
        raise ValueError(f"{name}.dtype={x.dtype} must be torch.int32")
    if x.device != device and x.device.type != "cpu":
        raise ValueError(f"{name}.device={x.device} must be that of q, {device}, or cpu")


def _readable(validate: bool, x: torch.Tensor | None) -> bool:
    """Whether the values of a tensor are to be checked on the host."""
    if x is None or torch.compiler.is_compiling():
        return False
    return validate or x.device.type == "cpu"


def _check_capture(validate: bool) -> None:
    if not isinstance(validate, bool):
        raise ValueError(f"{validate=} must be True or False")
    if validate and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{validate=} synchronises, so it is refused while a graph is captured")


def _here(name: str, x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Lengths or indices on the device, contiguous. Raises `ValueError` where that would be a copy
    from the CPU into a graph that is captured."""
    if x is None:
        return None
    if x.device != device:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{name}.device={x.device} must be {device} while a graph is captured: a replay "
                "would not read the CPU's values"
            )
        x = x.to(device)  # not asynchronous: pinned lengths may change right after the call
    return x if x.is_contiguous() else x.contiguous()


def _row_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_ACCEPTED: set[tuple] = set()  # signatures of calls that passed their checks


def _signature(*arguments: Any) -> tuple | None:
    """What the checks of a call depend on besides values in memory; None where it is not to be
    remembered."""
    if torch.compiler.is_compiling():
        return None
    parts: list[Any] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            if x.layout is not torch.strided or x.requires_grad:
                return None
            parts += (x.shape, x.stride(), x.dtype, x.device)
        elif x is None or isinstance(x, bool | float | int):
            parts += (type(x), x)
        else:
            return None
    return tuple(parts)


def _remember(signature: tuple | None) -> None:
    if signature is not None:
        if len(_ACCEPTED) >= 4096:
            _ACCEPTED.clear()
        _ACCEPTED.add(signature)


def _check_kvcache(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, causal, softmax_scale
) -> None:
    """What a call must hold whatever the values in memory are."""
    caches = {"k_cache": k_cache, "v_cache": v_cache}
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing}=None but {given} is given; give both or neither")
    new = {} if k is None else {"k": k, "v": v}
    check_tensors(q, {**caches, **new}, 4)
    _check_options(causal, softmax_scale)
    _check_heads(q, "k_cache", k_cache)
    batch = q.shape[0]
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"v_cache.shape={tuple(v_cache.shape)} must be that of k_cache, {tuple(k_cache.shape)}"
        )
    for name, x in caches.items():
        if x.stride(-1) != 1:
            raise ValueError(f"{name}.stride(-1)={x.stride(-1)} must be 1; a cache is never copied")
    for name, x in new.items():
        if 0 in caches[f"{name}_cache"].stride():
            raise ValueError(
                f"{name}_cache.stride()={caches[f'{name}_cache'].stride()} repeats elements, so "
                "nothing can be appended"
            )
        if x.shape[0] != batch or x.shape[2] != k_cache.shape[2]:
            raise ValueError(
                f"{name}.shape={tuple(x.shape)} must be ({batch}, any, {k_cache.shape[2]}, "
                f"{q.shape[3]})"
            )
    if k is not None and k.shape != v.shape:
        raise ValueError(f"v.shape={tuple(v.shape)} must be that of k, {tuple(k.shape)}")
    capacity = k_cache.shape[1]
    if block_table is not None:
        if capacity not in PAGE_SIZES:
            raise NotImplementedError(
                f"k_cache.shape={tuple(k_cache.shape)}: page size {capacity} is not supported; "
                f"{PAGE_SIZES} are"
            )
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx must be None where block_table is given")
        _integers("block_table", block_table, (batch, None), q.device)
        capacity *= block_table.shape[1]
    elif cache_batch_idx is not None:
        _integers("cache_batch_idx", cache_batch_idx, (batch,), q.device)
    elif k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache.shape[0]={k_cache.shape[0]} must be the batch of q, {batch}; "
            "give cache_batch_idx to choose rows"
        )
    seqlen_new = 0 if k is None else k.shape[1]
    if seqlen_new > capacity:
        raise ValueError(f"k.shape={tuple(k.shape)}: a cache of {capacity} keys holds fewer")
    _check_size(q.shape[1], q.shape[2], k_cache.shape[2], capacity)
    if not isinstance(cache_seqlens, int) or isinstance(cache_seqlens, bool):
        _integers("cache_seqlens", cache_seqlens, (batch,), q.device)


def _prepare_kvcache(
    q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, causal, softmax_scale,
    validate,
):  # fmt: skip
    """Check a call; returns `cache_seqlens` as a tensor."""
    _check_capture(validate)
    call = (
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, causal,
        softmax_scale,
    )  # fmt: skip
    signature = _signature(*call)
    if signature is None or signature not in _ACCEPTED:
        _check_kvcache(*call)
        _remember(signature)
    batch = q.shape[0]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    seqlen_new = 0 if k is None else k.shape[1]
    lengths = None
    if isinstance(cache_seqlens, int):
        lengths = [cache_seqlens] * batch
    elif _readable(validate, cache_seqlens):
        lengths = cache_seqlens.tolist()
    if lengths is not None and not all(0 <= n <= capacity - seqlen_new for n in lengths):
        raise ValueError(
            f"cache_seqlens={lengths} must be in 0..{capacity - seqlen_new}: the cache holds "
            f"{capacity} keys and {seqlen_new} are appended"
        )
    if _readable(validate, cache_batch_idx):
        rows = cache_batch_idx.tolist()
        if not all(0 <= row < k_cache.shape[0] for row in rows):
            raise ValueError(f"cache_batch_idx={rows} must be in 0..{k_cache.shape[0] - 1}")
        if k is not None and len(set(rows)) < batch:
            raise ValueError(f"cache_batch_idx={rows} must differ where k and v are appended")
    if lengths is not None and _readable(validate, block_table):
        written: dict[int, int] = {}
        for i, (n, pages) in enumerate(zip(lengths, block_table.tolist(), strict=True)):
            used = pages[: triton.cdiv(n + seqlen_new, k_cache.shape[1])]
            if not all(0 <= page < k_cache.shape[0] for page in used):
                raise ValueError(
                    f"block_table[{i}]={used} must be in 0..{k_cache.shape[0] - 1} for the "
                    f"{n + seqlen_new} keys of the sequence"
                )
            for page in used[n // k_cache.shape[1] :] if seqlen_new else ():
                if written.setdefault(page, i) != i:
                    raise ValueError(
                        f"block_table: sequences {written[page]} and {i} both append to page {page}"
                    )
    if isinstance(cache_seqlens, int):
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    return cache_seqlens


def attention_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int,
    cache_batch_idx: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few query tokens over a cache of keys and values, appending in place.

    Semantics of FlashAttention-3's `flash_attn_with_kvcache` (Shah et al., 2024) without rotation.

    Args:
        q: (batch, seqlen_q, nheads, headdim), fp16 or bf16, headdim 64 or 128.
        k_cache, v_cache: (rows, capacity, nheads_k, headdim), rows == batch unless
            `cache_batch_idx` is given; with `block_table` (num_pages, page_size, nheads_k,
            headdim), page_size 16, 64 or 256. Any strides, the last dimension contiguous; read and
            written in place.
        k, v: (batch, seqlen_new, nheads_k, headdim), appended at position `cache_seqlens` of each
            sequence before the queries attend, or both None.
        cache_seqlens: keys stored before the call, int32 (batch,), or one int for all.
        cache_batch_idx: row of the cache of each sequence, int32 (batch,). Rows must differ where
            `k` is given.
        block_table: pages of each sequence in order, int32 (batch, max_pages). Sequences may share
            pages that nothing is appended to.
        causal: query i sees key j if j <= i + length - seqlen_q, with length = cache_seqlens +
            seqlen_new. A query that sees no key gives 0.
        softmax_scale: positive; 1 / sqrt(headdim) if None.
        return_lse: also return the log-sum-exp of the scaled scores.
        validate: check the values of lengths, pages and rows, which synchronises. Values in CPU
            tensors are always checked. Otherwise a bad value never leads to an access out of
            bounds: the sequence gives NaN, appends nothing where its length or row is bad, and sets
            `attn_ladder.decode.error_flag(device)`.

    Returns: out like q, contiguous; with `return_lse` also lse (batch, nheads, seqlen_q), fp32,
        natural logarithm, -inf where no key is seen. A sequence's result does not depend on the
        batch, bit for bit (the split policy of the kernel that runs).

    Raises: `ValueError` for wrong input, `NotImplementedError` for valid, unsupported input.
    """
    lens = _prepare_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, causal,
        softmax_scale, validate,
    )  # fmt: skip
    if k is not None and v is not None:
        k, v = _row_contiguous(k), _row_contiguous(v)
    out, lse = torch.ops.attn_ladder.decode(
        _row_contiguous(q), k_cache, v_cache, k, v, _here("cache_seqlens", lens, q.device),
        _here("cache_batch_idx", cache_batch_idx, q.device),
        _here("block_table", block_table, q.device), causal, softmax_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _prepare_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, validate
) -> None:
    _check_capture(validate)
    check_tensors(q, {"k": k, "v": v}, 3)
    _check_options(causal, softmax_scale)
    _check_heads(q, "k", k)
    if k.shape != v.shape:
        raise ValueError(f"v.shape={tuple(v.shape)} must be that of k, {tuple(k.shape)}")
    _integers("cu_seqlens_q", cu_seqlens_q, (None,), q.device)
    _integers("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],), q.device)
    if cu_seqlens_q.shape[0] < 2:
        raise ValueError(f"cu_seqlens_q.shape={tuple(cu_seqlens_q.shape)} must be (batch + 1,)")
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise ValueError(f"{name}={longest!r} must be an int of at least 1")
    _check_size(max_seqlen_q, q.shape[1], k.shape[1], k.shape[0])
    for name, cu, x, longest in (
        ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
        ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
    ):
        if not _readable(validate, cu):
            continue
        ends = cu.tolist()
        steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
        if ends[0] != 0 or ends[-1] != x.shape[0] or min(steps) < 0:
            raise ValueError(f"{name}={ends} must rise from 0 to {x.shape[0]}")
        if max(steps) > longest:
            raise ValueError(
                f"max_{name[3:-3]}_{name[-1]}={longest} is less than {max(steps)}, the longest in "
                f"{name}"
            )


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    validate: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of sequences of different lengths, packed one after the other without padding.

    Args:
        q: (total_q, nheads, headdim), fp16 or bf16, headdim 64 or 128.
        k, v: (total_k, nheads_k, headdim); nheads % nheads_k == 0.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), 0 first, the total last; sequence b is rows
            cu_seqlens[b] to cu_seqlens[b + 1].
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.
        causal: aligned bottom-right in each sequence. A query that sees no key gives 0.
        softmax_scale: positive; 1 / sqrt(headdim) if None.
        return_lse: also return the log-sum-exp.
        validate: as in `attention_with_kvcache`. Otherwise a sequence with bad bounds gives NaN
            where its rows exist and sets the error flag; rows of no sequence are not written.

    Returns: out like q; with `return_lse` also lse (nheads, total_q), fp32, natural logarithm.

    Raises: `ValueError` for wrong input, `NotImplementedError` for valid, unsupported input.
    """
    _prepare_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
        validate,
    )  # fmt: skip
    out, lse = torch.ops.attn_ladder.varlen(
        _row_contiguous(q), _row_contiguous(k), _row_contiguous(v),
        _here("cu_seqlens_q", cu_seqlens_q, q.device),
        _here("cu_seqlens_k", cu_seqlens_k, q.device), max_seqlen_q, causal, softmax_scale,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _route(q, k, v, longest, mode, integers, run, new=(), block_table=None) -> Route:
    """What a checked call runs; `integers` are the lengths and indices that the device needs, `new`
    the keys and values that are appended."""
    copies = {}
    for name, x in {"q": q, **dict(new)}.items():
        if x is not None and x.stride(-1) != 1:
            copies[name] = f"its last dimension has stride {x.stride(-1)}, not 1"
    for name, x in integers.items():
        if x is not None and x.device != q.device:
            copies[name] = f"it is on {x.device}, the kernel reads it on {q.device}"
        elif x is not None and not x.is_contiguous():
            copies[name] = f"its strides are {x.stride()}"
    subject, why = "decode", WHY
    config: Any = kernels.plan(longest, q.shape[-2], k.shape[-2], q.shape[-1])
    if q.device.type == "cuda":
        table = None if block_table is None else block_table.contiguous()  # as the call does
        refusal = _why_not_hopper(q, k, v, mode=mode, block_table=table)
        if refusal is not None:
            why = f"{WHY}; not decode_hopper: {refusal}"
        else:
            from attn_ladder import decode_launch

            pages = None if table is None else table.shape[1]
            total = decode_launch.kv_bytes(q.shape[0], k.shape, pages)
            subject, config = "decode_hopper", decode_launch.choose_config(q.shape[-1], total)
            why = "a persistent kernel for few query tokens on sm_90"
            if any(x is not None for _, x in new):
                why += ", behind one that appends"
            if "q" not in copies and (reason := decode_launch.copy_reason(q)) is not None:
                copies["q"] = reason
    return Route(subject, why, config, copies, run, 1)


def explain_kvcache(
    q, k_cache, v_cache, *, k=None, v=None, cache_seqlens, cache_batch_idx=None, block_table=None,
    causal=True, softmax_scale=None, return_lse=False, validate=False,
) -> Route:  # fmt: skip
    """What `attention_with_kvcache` would do with these arguments; raises what it would."""
    lens = _prepare_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens, cache_batch_idx, block_table, causal,
        softmax_scale, validate,
    )  # fmt: skip
    integers = {
        "cache_seqlens": lens, "cache_batch_idx": cache_batch_idx, "block_table": block_table
    }  # fmt: skip
    return _route(
        q, k_cache, v_cache, q.shape[1], kernels.CACHE, integers, attention_with_kvcache,
        (("k", k), ("v", v)), block_table,
    )  # fmt: skip


def explain_varlen(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False,
    softmax_scale=None, return_lse=False, validate=False,
) -> Route:  # fmt: skip
    """What `attention_varlen` would do with these arguments; raises what it would."""
    _prepare_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale,
        validate,
    )  # fmt: skip
    integers = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return _route(
        q, k, v, max_seqlen_q, kernels.VARLEN, integers, attention_varlen, (("k", k), ("v", v))
    )
