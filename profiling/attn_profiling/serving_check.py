"""Decoding and ragged prefill on a GPU: are they right, and how fast beside FA3.

    python -m attn_profiling.serving_check --out FILE [--seconds 60] [--parts check,time,tune]
        [--checks kvcache,varlen,invariance,counters,graph,streams,repeats]

One process. `check` compares `attention_with_kvcache` and `attention_varlen` with the fp32
reference; `time` measures the decode shapes, GPU time from activity records behind a spin, in
random order with FA3's best of several `num_splits`, on caches in turn with a cold L2; `tune` times
other tiles and split policies, beside the configuration of FA3 that `time` found best. A case that
fails is recorded with its error, and the next one runs. The file is written after every case; at
the limit of seconds the rest is left out.

With `--device cpu` (TRITON_INTERPRET=1) small cases of `check` run under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GAPS_US = (700.0, 2000.0)  # of the spin before a timed call; the second where the queue ran dry
ROUNDS = 15
CANDIDATE_ROUNDS = 5
TUNE_ROUNDS = 5
COPY_BYTES = 2**30
SESSIONS = 3  # of the profiler, which may lose records
WORKERS = 12  # threads that compile
POISONED = ("kvcache", "varlen")  # checks during which what a kernel leaves unwritten is NaN


@dataclass(frozen=True)
class Shape:
    """One query token for each of `batch` sequences of `length` keys."""

    batch: int
    nheads: int
    nheads_k: int
    headdim: int
    length: int

    @property
    def id(self) -> str:
        """Its name in the tables."""
        return f"b{self.batch}-h{self.nheads}-k{self.nheads_k}-d{self.headdim}-" + (
            f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V in two-byte numbers."""
        return 4 * self.batch * self.length * self.nheads_k * self.headdim


def _shapes(batch: int, nheads: int, nheads_k: int, headdim: int, *lengths: int) -> list[Shape]:
    return [Shape(batch, nheads, nheads_k, headdim, length) for length in lengths]


DECODE = [
    *_shapes(1, 32, 8, 128, 512, 2048, 8192, 32768, 65536),
    *_shapes(4, 32, 8, 128, 2048, 16384),
    *_shapes(16, 32, 8, 128, 1024, 4096, 16384),
    *_shapes(64, 32, 8, 128, 512, 2048, 8192),
    *_shapes(128, 32, 8, 128, 1024),
    *_shapes(8, 32, 32, 128, 1024, 4096),
    *_shapes(32, 32, 32, 128, 2048),
    *_shapes(1, 9, 3, 64, 512, 2048),
    *_shapes(16, 9, 3, 64, 2048),
    *_shapes(128, 16, 1, 64, 1024, 4096),
    *_shapes(1, 16, 16, 64, 8192),
]


@dataclass(frozen=True)
class Cached:
    """A check of `attention_with_kvcache`; `lens` are the keys stored before the call."""

    dtype: str
    lens: tuple[int, ...]
    capacity: int
    nheads: int
    nheads_k: int
    headdim: int
    page: int = 0
    seqlen_q: int = 1
    new: int = 0
    causal: bool = True
    rows: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def id(self) -> str:
        """Its name in the report."""
        parts = [
            self.dtype, f"h{self.nheads}/{self.nheads_k}", f"d{self.headdim}",
            f"page{self.page}" if self.page else "contiguous", f"q{self.seqlen_q}",
            f"new{self.new}", "causal" if self.causal else "full",
            *(["rows"] if self.rows else []), *(["transposed"] if self.transposed else []),
        ]  # fmt: skip
        return "kvcache " + " ".join(parts)


@dataclass(frozen=True)
class Ragged:
    """A check of `attention_varlen`."""

    dtype: str
    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    nheads: int
    nheads_k: int
    headdim: int
    causal: bool

    @property
    def id(self) -> str:
        """Its name in the report."""
        kind = "causal" if self.causal else "full"
        return f"varlen {self.dtype} h{self.nheads}/{self.nheads_k} d{self.headdim} {kind}"


def cached_cases(tiny: bool) -> list[Cached]:
    """Every dtype, headdim and page size, the heads in turn, and what else a call may ask for."""
    lens, capacity = ((0, 37, 130), 256) if tiny else ((0, 1, 333, 2500, 4090), 4096)
    heads: tuple[tuple[int, int], ...] = ((4, 2),) if tiny else ((32, 8), (8, 8), (16, 1), (9, 3))
    cases: list[Cached] = []
    changes: list[dict[str, Any]] = [
        dict(seqlen_q=5, new=5),
        dict(seqlen_q=4, causal=False),
        dict(rows=(4, 0, 2, 6, 3)[: len(lens)], new=1),
    ]
    if not tiny:
        changes += [
            dict(seqlen_q=3, new=200, headdim=128, lens=lens[:2]),
            dict(seqlen_q=9, new=1, page=16),
            dict(transposed=True, new=1, headdim=128),
            dict(seqlen_q=100, new=100, lens=(0, 60)),
        ]
    for dtype in ("fp16",) if tiny else ("bf16", "fp16"):
        for headdim in (64,) if tiny else (64, 128):
            for page in (0, 16, 64, 256):
                h, hk = heads[len(cases) % len(heads)]
                new = 2 if len(cases) % 2 else 0
                cases.append(Cached(dtype, lens, capacity, h, hk, headdim, page, new=new))
        heads = heads[1:] + heads[:1]
    dtype = "fp16" if tiny else "bf16"
    h, hk = heads[0]
    more = dict(dtype=dtype, lens=lens, capacity=capacity, nheads=h, nheads_k=hk, headdim=64)
    for change in changes:
        cases.append(Cached(**{**more, **change}))
    return cases


def ragged_cases(tiny: bool) -> list[Ragged]:
    """Prefill, unequal lengths, empty sequences."""
    if tiny:
        return [Ragged("fp16", (5, 0, 40), (70, 3, 0), 2, 1, 64, True)]
    prefill = (1, 700, 130, 2049)
    return [
        Ragged(dtype, lens_q, lens_k, h, hk, headdim, causal)
        for dtype in ("bf16", "fp16")
        for lens_q, lens_k, h, hk, headdim, causal in (
            (prefill, prefill, 8, 2, 128, True),
            (prefill, prefill, 9, 3, 64, True),
            ((5, 1, 0, 300), (1000, 0, 7, 20), 4, 4, 64, True),
            ((33, 2, 513), (7, 3000, 1025), 16, 1, 128, False),
            ((1, 3), (8192, 129), 32, 8, 128, True),  # lengths that a cache would split
        )
    ]


class Failed(AssertionError):
    """A check whose result is wrong; the text says how."""


def _dtype(torch: Any, name: str) -> Any:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[name]


def compare(sequences: list[tuple[Any, ...]], causal: bool) -> str:
    """Sequences (out, lse, q, k, v), without a batch, against the reference. Raises `Failed`.

    The bound is that of FA3's tests over the whole call; lse within 2e-3.
    """
    import torch

    from attn_ladder.reference import attention_reference, error_bound

    outs, references, lows, worst_lse = [], [], [], 0.0
    for i, (out, lse, q, k, v) in enumerate(sequences):
        if q.shape[0] == 0:
            continue
        if k.shape[0] == 0:
            if not bool((out == 0).all()) or not bool((lse == -torch.inf).all()):
                raise Failed(f"sequence {i} has no key: out must be 0 and lse -inf")
            continue
        ref, ref_lse = attention_reference(q[None], k[None], v[None], causal=causal)
        low, _ = attention_reference(q[None], k[None], v[None], causal=causal, upcast=False)
        finite = torch.isfinite(ref_lse[0])
        if not torch.equal(torch.isfinite(lse), finite):
            raise Failed(f"sequence {i}: lse is finite in other places than the reference's")
        if bool(finite.any()):
            worst_lse = max(worst_lse, (lse - ref_lse[0])[finite].abs().max().item())
        outs.append(out.float().flatten())
        references.append(ref.flatten())
        lows.append(low.flatten())
    if not outs:
        return "no keys"
    out, ref, low = torch.cat(outs), torch.cat(references), torch.cat(lows)
    if not bool(out.isfinite().all()):
        raise Failed("out holds NaN or infinity")
    bound, own = error_bound(ref, low)
    error = (out - ref).abs().max().item()
    text = f"error {error:.2e}, bound {bound:.2e}, PyTorch's {own:.2e}, lse {worst_lse:.1e}"
    if not error <= bound or not worst_lse <= 2e-3:
        raise Failed(text)
    return text


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what a kernel leaves unwritten shows."""
    import torch

    empty = torch.empty

    def nan(*args: Any, **kwargs: Any) -> Any:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = nan
    try:
        yield
    finally:
        torch.empty = empty


def no_errors(device: Any) -> None:
    """Raises `Failed` where the error flag is set."""
    from attn_ladder.decode import clear_errors

    if texts := clear_errors(device):
        raise Failed(f"the error flag says {texts}")


def _ints(values: Any, device: Any) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.int32, device=device)


class Cache:
    """A KV cache of a case, NaN where nothing is stored, and the keys of each sequence."""

    def __init__(self, case: Cached, device: Any, seed: int = 0) -> None:
        import torch

        self.case = case
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = _dtype(torch, case.dtype)

        def draw(*shape: int) -> Any:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        batch, hk, d = len(case.lens), case.nheads_k, case.headdim
        self.q = draw(batch, case.seqlen_q, case.nheads, d)
        self.keys = [draw(batch, case.capacity, hk, d) for _ in range(2)]
        self.new: Any = [draw(batch, case.new, hk, d) if case.new else None for _ in range(2)]
        self.lens = _ints(case.lens, device)
        self.arguments: dict[str, Any] = {}
        size = case.page or case.capacity
        if case.page:
            count = batch * case.capacity // case.page
            order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(seed))
            table = order[:count].view(batch, -1)
            self.arguments["block_table"] = table.to(torch.int32).to(device)
            rows = count + 3
        else:
            table = torch.tensor(case.rows or range(batch))[:, None]
            rows = max(case.rows) + 1 if case.rows else batch
            if case.rows:
                self.arguments["cache_batch_idx"] = _ints(case.rows, device)
        shape = (rows, hk, size, d) if case.transposed else (rows, size, hk, d)
        self.stores = []
        for _ in range(2):
            store = torch.full(shape, float("nan"), dtype=dtype, device=device)
            self.stores.append(store.transpose(1, 2) if case.transposed else store)
        self.table, self.size = table.tolist(), size
        for store, keys in zip(self.stores, self.keys, strict=True):
            for b, n in enumerate(case.lens):
                self.write(store, b, 0, keys[b, :n])

    def write(self, store: Any, b: int, start: int, keys: Any) -> None:
        """Put keys of sequence `b` at position `start` and on."""
        done = 0
        while done < keys.shape[0]:
            page, slot = divmod(start + done, self.size)
            count = min(self.size - slot, keys.shape[0] - done)
            store[self.table[b][page], slot : slot + count] = keys[done : done + count]
            done += count

    def call(self, **changes: Any) -> Any:
        """(out, lse) of `attention_with_kvcache`, which appends in place."""
        from attn_ladder import attention_with_kvcache

        arguments = {
            "k": self.new[0], "v": self.new[1], "causal": self.case.causal, "return_lse": True,
            "cache_seqlens": self.lens, **self.arguments, **changes,
        }  # fmt: skip
        return attention_with_kvcache(self.q, *self.stores, **arguments)


def check_cached(case: Cached, device: Any) -> str:
    """Result, log-sum-exp and cache of one call against the reference."""
    import torch

    cache = Cache(case, device)
    wanted = [store.clone() for store in cache.stores]
    if case.new:
        for store, keys, new in zip(wanted, cache.keys, cache.new, strict=True):
            for b, n in enumerate(case.lens):
                cache.write(store, b, n, new[b])
                keys[b, n : n + case.new] = new[b]
    out, lse = cache.call()
    k, v = cache.keys
    text = compare(
        [
            (out[b], lse[b], cache.q[b], k[b, : n + case.new], v[b, : n + case.new])
            for b, n in enumerate(case.lens)
        ],
        case.causal,
    )
    for name, store, want in zip("kv", cache.stores, wanted, strict=True):
        if not torch.equal(store.nan_to_num(9.0), want.nan_to_num(9.0)):
            raise Failed(f"{name}_cache does not hold what it should after the call")
    no_errors(device)
    return text


def check_ragged(case: Ragged, device: Any) -> str:
    """Result and log-sum-exp of one call against the reference."""
    import torch

    from attn_ladder import attention_varlen

    generator = torch.Generator(device=device).manual_seed(0)
    dtype = _dtype(torch, case.dtype)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q = draw(sum(case.lens_q), case.nheads, case.headdim)
    k, v = (draw(sum(case.lens_k), case.nheads_k, case.headdim) for _ in range(2))
    ends = [[0], [0]]
    for row, lens in zip(ends, (case.lens_q, case.lens_k), strict=True):
        for n in lens:
            row.append(row[-1] + n)
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q=_ints(ends[0], device), cu_seqlens_k=_ints(ends[1], device),
        max_seqlen_q=max(case.lens_q), max_seqlen_k=max(case.lens_k), causal=case.causal,
        return_lse=True,
    )  # fmt: skip
    sequences = []
    for i in range(len(case.lens_q)):
        qs, ks = slice(*ends[0][i : i + 2]), slice(*ends[1][i : i + 2])
        sequences.append((out[qs], lse[:, qs], q[qs], k[ks], v[ks]))
    text = compare(sequences, case.causal)
    no_errors(device)
    return text


def _same(a: Any, b: Any, what: str) -> None:
    import torch

    for name, x, y in zip(("out", "lse"), a, b, strict=True):
        if not torch.equal(x, y):
            gap = (x.float() - y.float()).abs().nan_to_num(0.0).max().item()
            raise Failed(f"{name} differs {what}, by up to {gap:.1e}")


def check_invariance(case: Cached, device: Any) -> str:
    """A sequence alone, with its own capacity, and in a batch: the same bits; and paged."""
    cache = Cache(case, device)
    together = cache.call()
    k, v = cache.keys
    from attn_ladder import attention_with_kvcache

    for b, n in enumerate(case.lens):
        one, size = slice(b, b + 1), max(n, 1)
        alone = attention_with_kvcache(
            cache.q[one], k[one, :size], v[one, :size], cache_seqlens=_ints([n], device),
            causal=case.causal, return_lse=True,
        )  # fmt: skip
        _same(alone, [x[one] for x in together], f"between sequence {b} alone and in the batch")
    for page in (16, 64, 256):
        paged = Cache(dataclasses.replace(case, page=page), device)
        paged.q.copy_(cache.q)
        for store, keys in zip(paged.stores, cache.keys, strict=True):
            for b, n in enumerate(case.lens):
                paged.write(store, b, 0, keys[b, :n])
        _same(paged.call(), together, f"between pages of {page} and a contiguous cache")
    _same(cache.call(), together, "between two calls")
    return "bitwise equal: alone, pages of 16, 64, 256, called twice"


def check_policy_differs(case: Cached, device: Any) -> str:
    """The comparison of bits sees another order of sums: a control of `check_invariance`."""
    import torch

    from attn_ladder import serving
    from attn_ladder.decode import CACHE, launch, plan

    cache = Cache(case, device)
    call = dict(mode=CACHE, bounds=_ints(case.lens, device))
    config: Any = plan(case.seqlen_q, case.nheads, case.nheads_k, case.headdim)
    run: Any = launch
    change = {"max_splits": 1}
    if serving.runs_hopper(cache.q, *cache.stores, **call):
        from attn_ladder import decode_launch

        config, run = decode_launch.choose_config(case.headdim, 0), decode_launch.run
        change = {"min_split": config.min_split // 2}
    results = [
        run(cache.q, *cache.stores, config=tried, **call)
        for tried in (config, dataclasses.replace(config, **change))
    ]
    if all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise Failed("another split policy gave the same bits, so equal bits show nothing")
    return "another split policy gives other bits"


def check_range(case: Cached, device: Any) -> str:
    """Sequences that begin anywhere in their row: as the reference, and the bits of the same keys
    in a cache of their own."""
    import torch

    from attn_ladder import attention_with_kvcache

    cache = Cache(dataclasses.replace(case, lens=(case.capacity,) * len(case.lens)), device)
    starts = [min(37 * b, case.capacity - n) for b, n in enumerate(case.lens)]
    ranges = [(first, first + n) for first, n in zip(starts, case.lens, strict=True)]
    bounds = _ints([[first, end, end - case.seqlen_q] for first, end in ranges], device)
    out, lse = torch.ops.attn_ladder.ranged(cache.q, *cache.stores, bounds, None)
    k, v = cache.keys
    for b, (first, end) in enumerate(ranges):
        one, keys = slice(b, b + 1), slice(first, max(end, first + 1))
        alone = attention_with_kvcache(
            cache.q[one], k[one, keys], v[one, keys], cache_seqlens=_ints([end - first], device),
            return_lse=True,
        )  # fmt: skip
        _same(alone, (out[one], lse[one]), f"between the keys of sequence {b} alone and a range")
    return compare(
        [(out[b], lse[b], cache.q[b], k[b, i:j], v[b, i:j]) for b, (i, j) in enumerate(ranges)],
        True,
    )


def check_crowd(case: Cached, device: Any) -> str:
    """A sequence alone and among very many: the same bits."""
    from attn_ladder import attention_with_kvcache

    cache = Cache(case, device)
    together = cache.call()
    k, v = cache.keys
    for b in range(0, len(case.lens), max(1, len(case.lens) // 64)):
        one, size = slice(b, b + 1), max(case.lens[b], 1)
        alone = attention_with_kvcache(
            cache.q[one], k[one, :size], v[one, :size], cache_seqlens=cache.lens[one].clone(),
            return_lse=True,
        )  # fmt: skip
        _same(alone, [x[one] for x in together], f"between sequence {b} alone and in the batch")
    no_errors(device)
    return f"bitwise equal alone and among {len(case.lens)}"


def check_flag(device: Any) -> str:
    """Bad values on the device: NaN for their sequence, the flag, nothing around it touched."""
    import torch

    from attn_ladder.decode import CACHE, clear_errors, launch

    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float16)

    around = torch.full((2, 12, 16, 1, 64), float("nan"), dtype=torch.float16, device=device)
    around[:, 4:8] = draw(2, 4, 16, 1, 64)
    k, v = around[0, 4:8], around[1, 4:8]
    q, new = draw(2, 1, 2, 64), draw(2, 1, 1, 64)
    rows, table = _ints([1, 2], device), _ints([[0, 1], [2, 3]], device)
    trials: dict[str, tuple[dict[str, Any], str | None]] = {
        "nothing": (dict(bounds=[5, 9], index=rows), None),
        "negative length": (dict(bounds=[5, -1], index=rows), "cache_seqlens"),
        "length": (dict(bounds=[5, 16], index=rows), "cache_seqlens"),
        "huge": (dict(bounds=[5, 2**31 - 1], index=rows), "cache_seqlens"),
        "row": (dict(bounds=[5, 9], index=[1, 4]), "cache_batch_idx"),
        "negative row": (dict(bounds=[5, 9], index=[1, -1]), "cache_batch_idx"),
        "pages": (dict(bounds=[20, 20], block_table=table), None),
        "page": (dict(bounds=[20, 20], block_table=[[0, 1], [2, 4]]), "block_table"),
        "huge page": (
            dict(bounds=[20, 20], block_table=[[0, 1], [2**30, 3]]),
            "block_table",
        ),
    }
    clear_errors(device)
    for name, (values, wanted) in trials.items():
        before = around.clone()
        arguments = {
            key: value if isinstance(value, torch.Tensor) else _ints(value, device)
            for key, value in values.items()
        }
        out, _ = launch(q, k, v, mode=CACHE, k_new=new, v_new=new, **arguments)
        texts = clear_errors(device)
        if bool(out[0].isnan().any()):
            raise Failed(f"{name}: the good sequence gives NaN")
        if bool(out[1].isnan().all()) is not (wanted is not None):
            raise Failed(f"{name}: NaN of the second sequence is not as expected")
        if [text.split(":")[0] for text in texts] != ([wanted] if wanted else []):
            raise Failed(f"{name}: the flag says {texts}")
        if not bool(torch.cat([around[:, :4], around[:, 8:]], 1).isnan().all()):
            raise Failed(f"{name}: memory around the cache was written")
        around.copy_(before)
    return f"{len(trials)} trials"


def check_refusals(device: Any) -> str:
    """`validate=True` raises for the same values, and during a capture; a CPU tensor at once."""
    import torch

    from attn_ladder import attention_with_kvcache

    q = torch.ones(1, 1, 2, 64, dtype=torch.float16, device=device)
    cache = torch.ones(1, 16, 1, 64, dtype=torch.float16, device=device)
    for lens, validate in (([17], True), ([-1], True), ([17], False)):
        tensor = _ints(lens, device if validate else "cpu")
        try:
            attention_with_kvcache(q, cache, cache, cache_seqlens=tensor, validate=validate)
        except ValueError as error:
            if "cache_seqlens" not in str(error):
                raise Failed(f"the error does not name cache_seqlens: {error}") from error
        else:
            raise Failed(f"cache_seqlens={lens} was accepted with {validate=}")
    if torch.device(device).type == "cuda":
        lens = _ints([3], device)
        attention_with_kvcache(q, cache, cache, cache_seqlens=lens)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                attention_with_kvcache(q, cache, cache, cache_seqlens=lens, validate=True)
        except ValueError as error:
            if "validate=True" not in str(error):
                raise Failed(f"the error does not name validate: {error}") from error
        else:
            raise Failed("validate=True was accepted during a capture")
    return "named"


def check_graph(case: Cached, device: Any) -> str:
    """A captured append and decode, replayed with other lengths, equals the eager call."""
    import torch

    eager, captured = Cache(case, device), Cache(case, device)
    lens = _ints(case.lens, device)
    captured.call(cache_seqlens=lens)  # compile
    captured = Cache(case, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured.call(cache_seqlens=lens)
    for step in range(4):
        lens.copy_(_ints([n + step * case.new for n in case.lens], device))
        for source, target in ((eager, captured),):
            for new in source.new:
                new.add_(1)
            for old, fresh in zip(target.new, source.new, strict=True):
                old.copy_(fresh)
        graph.replay()
        want = eager.call(cache_seqlens=lens.clone())
        _same(result, want, f"between graph and eager call, step {step}")
    for a, b in zip(eager.stores, captured.stores, strict=True):
        if not torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)):
            raise Failed("the caches differ after the replays")
    no_errors(device)
    return "4 replays with growing lengths, bitwise equal"


def check_streams(case: Cached, device: Any) -> str:
    """Two streams at once give what the current stream gives."""
    import torch

    caches = [Cache(dataclasses.replace(case, new=0), device, seed) for seed in (0, 1)]
    wanted = [cache.call() for cache in caches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in caches]
    results: list[list[Any]] = [[], []]
    for _ in range(20):
        for cache, stream, kept in zip(caches, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(cache.call())
    torch.cuda.synchronize()
    for i, kept in enumerate(results):
        for result in kept:
            _same(result, wanted[i], f"between stream {i} and the current one")
    no_errors(device)
    return "20 calls on each of 2 streams, bitwise equal"


def check_repeats(case: Cached, device: Any) -> str:
    """Two inputs in turn, whose partial results lie at the same addresses: the same bits."""
    import torch

    caches = [Cache(case, device, seed) for seed in (0, 1)]
    wanted = [cache.call() for cache in caches]
    for i in range(100):
        _same(caches[i % 2].call(), wanted[i % 2], f"in call {i} of two inputs in turn")
    torch.cuda.synchronize()
    no_errors(device)
    return "100 calls of two inputs in turn, bitwise equal"


def check_graphs_at_once(case: Cached, device: Any) -> str:
    """Two graphs captured on one stream, replayed on two at once, give what eager calls give."""
    import torch

    caches = [Cache(dataclasses.replace(case, new=0), device, seed) for seed in (0, 1)]
    wanted = [cache.call() for cache in caches]
    graphs, results = [], []
    for cache in caches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([cache.call() for _ in range(8)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in caches]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for i, kept in enumerate(results):
        for result in kept:
            _same(result, wanted[i], f"between graph {i} and the eager call")
    no_errors(device)
    return "2 graphs of 8 calls, 20 replays on 2 streams at once, bitwise equal"


def check_counter_control(case: Cached, device: Any) -> str:
    """A count that is never reached is seen; and calls leave the counters zeroed."""
    import torch

    from attn_ladder import decode

    cache = Cache(case, device)
    wanted = cache.call()
    held = decode.counters(cache.q.device, 1)
    if bool(held.any()):
        raise Failed("a call left counters that are not zero")
    held.fill_(2**20)
    with poisoned():
        wrong = cache.call()
    held.zero_()
    if all(torch.equal(a, b) for a, b in zip(wrong, wanted, strict=True)):
        raise Failed("a wrong count gave the same bits, so equal bits show nothing")
    _same(cache.call(), wanted, "after the counters were zeroed")
    return "a wrong count gives another result, a call leaves zeros"


def check_operators(device: Any) -> str:
    """`opcheck` of the operators, and a compiled append without graph breaks."""
    import torch

    import attn_ladder

    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float16)

    getattr(attn_ladder, "attention_varlen")  # noqa: B009 the first use registers the operators
    ops = torch.ops.attn_ladder
    q, k, v, new = draw(2, 1, 2, 64), draw(2, 20, 1, 64), draw(2, 20, 1, 64), draw(2, 1, 1, 64)
    bounds = _ints([[0, 20, 19], [3, 17, 16]], device)
    lens, packed = _ints([5, 19], device), _ints([0, 1, 2], device)
    for name, arguments in {
        "dense": (draw(2, 70, 2, 64), draw(2, 70, 1, 64), draw(2, 70, 1, 64), True, None),
        "ranged": (q, k, v, bounds, None),
        "decode": (q, k, v, new, new, lens, None, None, True, None),
        "varlen": (q[:, 0], k[0], v[0], packed, _ints([0, 5, 20], device), 1, True, None),
    }.items():
        result = torch.library.opcheck(getattr(ops, name), arguments)
        if set(result.values()) != {"SUCCESS"}:
            raise Failed(f"{name}: {result}")

    def step(*tensors: Any) -> Any:
        return attn_ladder.attention_with_kvcache(*tensors, k=new, v=new, cache_seqlens=lens)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    left, right = [(k.clone(), v.clone()) for _ in range(2)]
    pairs = [(compiled(q, *left), step(q, *right)), *zip(left, right, strict=True)]
    if not all(torch.equal(a, b) for a, b in pairs):
        raise Failed("the compiled call gives other bits")
    return "opcheck of 4 operators, compiled append"


def spanning_cases(tiny: bool) -> list[Cached]:
    """Lengths that span splits, for the comparison of bits."""
    if tiny:
        return [Cached("fp16", (300, 64, 0), 512, 4, 2, 64)]
    lens = (6000, 64, 0, 1333, 8192)
    spans = [
        Cached("bf16", lens, 8192, h, hk, d) for h, hk, d in ((32, 8, 128), (9, 3, 64), (16, 1, 64))
    ]
    return [*spans, dataclasses.replace(spans[0], seqlen_q=3)]


def crowds() -> list[Cached]:
    """Batches so large that one CTA has many splits of a sequence, or that take two launches."""
    draw = random.Random(0)
    many = tuple(draw.randrange(6000) for _ in range(96))
    return [
        Cached("bf16", many, 6016, 16, 4, 128),
        Cached("bf16", tuple(n % 700 for n in many * 7), 704, 8, 2, 64),
    ]


APPEND = Cached("bf16", (5, 700, 2000), 4096, 32, 8, 128, new=1)


def checks(device: Any, tiny: bool) -> dict[str, Callable[[], str]]:
    """Every check by name."""
    named: dict[str, Callable[[], str]] = {}
    for case in cached_cases(tiny):
        named[case.id] = lambda case=case: check_cached(case, device)  # type: ignore[misc]
    for ragged in ragged_cases(tiny):
        named[ragged.id] = lambda case=ragged: check_ragged(case, device)  # type: ignore[misc]
    spans = spanning_cases(tiny)
    for case in spans:
        named[f"invariance {case.id}"] = lambda case=case: check_invariance(  # type: ignore[misc]
            case, device
        )
    named["ranges"] = lambda: check_range(spans[0], device)
    if not tiny:
        for case in crowds():
            name = f"invariance, {len(case.lens)} sequences"
            named[name] = lambda case=case: check_crowd(case, device)  # type: ignore[misc]
    named["invariance, control"] = lambda: check_policy_differs(spans[0], device)
    named["error flag"] = lambda: check_flag(device)
    control = dataclasses.replace(spans[0], lens=spans[0].lens[:1])
    named["counters, control"] = lambda: check_counter_control(control, device)
    named["refusals"] = lambda: check_refusals(device)
    if not tiny:
        paged = dataclasses.replace(APPEND, page=64)
        named["graph"] = lambda: check_graph(APPEND, device)
        named["graph, pages of 64"] = lambda: check_graph(paged, device)
        named["streams"] = lambda: check_streams(APPEND, device)
        named["streams, graphs"] = lambda: check_graphs_at_once(APPEND, device)
        named["repeats"] = lambda: check_repeats(dataclasses.replace(APPEND, new=0), device)
        named["operators"] = lambda: check_operators(device)
    return named


class Report:
    """What is found, in a file that is complete after every entry."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.start, self.seconds = path, time.monotonic(), seconds
        self.data: dict[str, Any] = {"stopped": None, "checks": [], "decode": [], "tune": []}

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def over(self, share: float = 1.0) -> bool:
        """Whether that share of the time is used up; noted if it is all of it."""
        if self.elapsed() < share * self.seconds:
            return False
        self.data["stopped"] = (
            f"{'the rest' if share == 1 else 'the checks'} at {share * self.seconds:g} s of "
            f"{self.seconds:g} s"
        )
        return True

    def add(self, part: str, row: dict[str, Any]) -> None:
        """An entry of `checks`, `decode` or `tune`."""
        self.data[part].append(row)
        self.write()

    def write(self) -> None:
        """The file as of now."""
        self.data["elapsed_s"] = round(self.elapsed(), 2)
        if self.path is None:
            return
        scratch = self.path.with_name(self.path.name + ".part")
        scratch.write_text(json.dumps(self.data, indent=1))
        os.replace(scratch, self.path)


def _error(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:1500]}{place}"


def _broken(error: BaseException) -> bool:
    """Whether the process can use the GPU no longer."""
    text = str(error)
    return "illegal memory access" in text or "unspecified launch failure" in text


def run_checks(
    report: Report, device: Any, tiny: bool, share: float = 1.0, wanted: tuple[str, ...] = ()
) -> bool:
    """The checks whose name begins with one of `wanted`; all of them where it is empty.

    False where the GPU cannot be used any longer.
    """
    for name, check in checks(device, tiny).items():
        if wanted and not name.startswith(wanted):
            continue
        if report.over(share):
            return True
        began = time.monotonic()
        row: dict[str, Any] = {"name": name, "ok": True}
        try:
            with poisoned() if name.startswith(POISONED) else nullcontext():
                row["detail"] = check()
        except Exception as error:
            row |= {"ok": False, "detail": _error(error)}
            report.add("checks", row)
            if _broken(error):
                report.data["stopped"] = f"the GPU is lost since the check {name!r}"
                return False
            continue
        row["seconds"] = round(time.monotonic() - began, 3)
        report.add("checks", row)
    return True


class Pool:
    """Random K and V of which every call of every shape reads another window."""

    def __init__(self, shapes: list[Shape], dtype_name: str = "bf16", device: str = "cuda") -> None:
        import torch

        self.device, self.dtype = device, _dtype(torch, dtype_name)
        self.elements = max(shape.kv_bytes for shape in shapes) // 4 + 2**20
        generator = torch.Generator(device=device).manual_seed(0)
        self._buffers = [
            torch.randn(self.elements, generator=generator, device=device, dtype=self.dtype)
            for _ in range(2)
        ]
        self._q = torch.randn(2**20, generator=generator, device=device, dtype=self.dtype)

    def inputs(self, shape: Shape, i: int) -> tuple[Any, Any, Any]:
        """Q, K and V of call `i`: windows that overlap as little as the pool allows."""
        size = shape.kv_bytes // 4
        token = shape.nheads_k * shape.headdim
        room = self.elements - size
        step = size if room >= 4 * size else token * 16
        start = i % (room // step + 1) * step
        k, v = (
            buffer[start : start + size].view(
                shape.batch, shape.length, shape.nheads_k, shape.headdim
            )
            for buffer in self._buffers
        )
        q_size = shape.batch * shape.nheads * shape.headdim
        offset = i % 8 * shape.headdim * shape.nheads
        q = self._q[offset : offset + q_size].view(shape.batch, 1, shape.nheads, shape.headdim)
        return q, k, v


def covered_us(activities: Any) -> float:
    """Microseconds in which at least one of the activities ran.

    A kernel that is launched programmatically early (as FA3's are) overlaps the one it waits for,
    so the sum of durations would count that time twice.
    """
    total, reached = 0, 0
    for activity in sorted(activities, key=lambda activity: activity.start_ns):
        total += max(0, activity.end_ns - max(reached, activity.start_ns))
        reached = max(reached, activity.end_ns)
    return total / 1000


class Timer:
    """GPU time of calls in random order, each behind a spin, with a cold L2: full of modified
    lines, which go back to memory while the call runs, or of clean ones."""

    def __init__(self, clean: bool = False) -> None:
        import torch

        from attn_profiling.device import open_gpu
        from attn_profiling.machine import Machine

        self.machine = Machine(torch, 2.0, clean)
        self.machine.calibrate()
        self._calls = 0
        try:
            self._clock: Callable[[], float | None] = open_gpu().sm_clock_mhz
        except Exception:
            self._clock = lambda: None

    def _session(
        self, subjects: dict[str, Callable[[int], Any]], plan: list[list[str]], gap_us: float
    ) -> dict[str, list[dict[str, Any]]]:
        """One profiler session. Raises `ActivityError` where records and calls do not match."""
        from attn_profiling.activity import ActivityError, split

        machine, marks = self.machine, []
        with machine.recorded() as activities:
            for order in plan:
                for name in order:
                    machine.flush()
                    machine.spin(gap_us)
                    start = machine.event()
                    subjects[name](self._calls)
                    marks.append((name, start, machine.event()))
                self._calls += 1
                machine.flush()
                machine.synchronize()
        calls = split(activities, machine.flush_kernel, machine.spin_kernel)
        if len(calls) != len(marks):
            raise ActivityError(f"{len(marks)} calls were made, the records show {len(calls)}")
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
        for (name, start, end), call in zip(marks, calls, strict=True):
            last = max(activity.end_ns for activity in call.activities)
            found[name].append(
                {
                    "gpu_us": round(covered_us(call.activities), 3),
                    "sum_us": round(call.gpu_us, 3),
                    "span_us": round((last - call.activities[0].start_ns) / 1000, 3),
                    "event_us": round(machine.elapsed_us(start, end), 3),
                    "dry": call.gap_us > machine.gap_limit_us,
                    "kernels": [
                        [activity.name[:80], round(activity.duration_ns / 1000, 3)]
                        for activity in call.activities
                    ],
                }
            )
        return found

    def measure(
        self, subjects: dict[str, Callable[[int], Any]], rounds: int, seed: int = 0
    ) -> dict[str, Any]:
        """Samples by subject; the first round is not counted, and no call behind a dry queue.

        `gpu_us` is the time in which a kernel of the call ran, `sum_us` the sum of the kernels'
        durations, `span_us` from the first one's start to the last one's end.
        """
        from attn_profiling.activity import ActivityError

        if not subjects:
            return {}
        names, rng = list(subjects), random.Random(seed)
        found: dict[str, Any] = {}
        for gap_us in GAPS_US:
            plan = [rng.sample(names, len(names)) for _ in range(rounds + 1)]
            for attempt in range(SESSIONS):
                try:
                    taken = self._session(subjects, plan, gap_us)
                    break
                except ActivityError:
                    if attempt == SESSIONS - 1:
                        raise
            found = {}
            for name, rows in taken.items():
                rows = rows[1:]
                good = [row for row in rows if not row["dry"]] or rows
                found[name] = {
                    **{key: [row[key] for row in good]
                       for key in ("gpu_us", "sum_us", "span_us", "event_us")},
                    "median_us": statistics.median(row["gpu_us"] for row in good),
                    "dry": sum(row["dry"] for row in rows),
                    "gap_us": gap_us,
                    "clock_mhz": self._clock(),
                    "kernels": good[len(good) // 2]["kernels"],
                }  # fmt: skip
            if all(2 * row["dry"] <= rounds for row in found.values()):
                break
        return found


def copy_bytes_per_s(timer: Timer) -> float:
    """Bytes read and written a second by a large copy, the median of a few."""
    import torch

    source = torch.empty(COPY_BYTES // 4, dtype=torch.int32, device="cuda").fill_(1)
    target = torch.empty_like(source)
    found = timer.measure({"copy": lambda i: target.copy_(source)}, 7)
    return float(2 * COPY_BYTES / (found["copy"]["median_us"] * 1e-6))


def page_table(shape: Shape, page: int) -> Any:
    """(batch, pages of a sequence): all pages of a cache in random order."""
    import torch

    count = shape.batch * shape.length // page
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order.view(shape.batch, -1).to(torch.int32)


def ours(pool: Pool, shape: Shape, page: int = 0) -> Callable[[int], Any]:
    """The public function on a shape; with `page` the keys lie in pages in random order."""
    from attn_ladder import attention_with_kvcache

    lens = _ints([shape.length] * shape.batch, pool.device)
    if not page:

        def contiguous(i: int) -> Any:
            q, k, v = pool.inputs(shape, i)
            return attention_with_kvcache(q, k, v, cache_seqlens=lens)

        return contiguous
    table = page_table(shape, page).to(pool.device)
    size = (table.numel(), page, shape.nheads_k, shape.headdim)

    def paged(i: int) -> Any:
        q, k, v = pool.inputs(shape, i)
        return attention_with_kvcache(
            q, k.view(size), v.view(size), cache_seqlens=lens, block_table=table
        )

    return paged


def with_config(pool: Pool, shape: Shape, config: Any) -> Callable[[int], Any]:
    """Our kernels with a tile and split policy of choice."""
    from attn_ladder.decode import CACHE, launch

    lens = _ints([shape.length] * shape.batch, "cuda")

    def call(i: int) -> Any:
        q, k, v = pool.inputs(shape, i)
        return launch(q, k, v, mode=CACHE, bounds=lens, config=config)

    return call


def fa3_function(module: str) -> Any:
    """FA3's `flash_attn_with_kvcache`, or the error that its import gives."""
    import importlib

    try:
        return importlib.import_module(module)
    except Exception as error:
        return error


def fa3(module: Any, pool: Pool, shape: Shape, config: dict[str, Any]) -> Callable[[int], Any]:
    """FA3 on a shape; `metadata` in the config: its schedule is computed beforehand."""
    lens = _ints([shape.length] * shape.batch, pool.device)
    arguments = {name: value for name, value in config.items() if name != "metadata"}
    if config.get("metadata"):
        arguments["scheduler_metadata"] = module.get_scheduler_metadata(
            shape.batch, 1, shape.length, shape.nheads, shape.nheads_k, shape.headdim, lens,
            qkv_dtype=pool.dtype, causal=True, **arguments,
        )  # fmt: skip

    def call(i: int) -> Any:
        q, k, v = pool.inputs(shape, i)
        return module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True, **arguments)

    return call


def fa3_configs(shape: Shape) -> dict[str, dict[str, Any]]:
    """What is tried of FA3: its own choice first."""
    tiles = shape.batch * shape.nheads_k
    configs: dict[str, dict[str, Any]] = {"auto": {}, "auto, metadata": {"metadata": True}}
    for splits in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128):
        if splits == 1 or (tiles * splits <= 132 * 8 and shape.length >= splits * 64):
            configs[f"splits {splits}"] = {"num_splits": splits}
    if shape.nheads != shape.nheads_k:
        configs["auto, packed"] = {"pack_gqa": True}
    return configs


def runnable(calls: dict[str, Callable[[int], Any]], errors: dict[str, str]) -> dict[str, Any]:
    """Those calls that run once; the errors of the others. Raises where the GPU is lost."""
    import torch

    kept = {}
    for name, call in calls.items():
        try:
            call(0)
            torch.cuda.synchronize()
            kept[name] = call
        except Exception as error:
            if _broken(error):
                raise
            errors[name] = _error(error)
    return kept


def time_shape(timer: Timer, pool: Pool, module: Any, shape: Shape, copy: float) -> dict[str, Any]:
    """Samples of one shape, and the ratio of FA3's time to ours."""
    from attn_ladder.decode import plan

    errors: dict[str, str] = {}
    config = plan(1, shape.nheads, shape.nheads_k, shape.headdim)
    row: dict[str, Any] = {
        "shape": shape.id, **dataclasses.asdict(shape), "kv_bytes": shape.kv_bytes,
        "config": dataclasses.asdict(config), "errors": errors,
    }  # fmt: skip
    calls = {"ours": ours(pool, shape), "ours again": ours(pool, shape)}
    for page in (256, 64, 16) if shape.length == 2048 else (256,):
        calls[f"pages of {page}"] = ours(pool, shape, page)
    best = None
    if not isinstance(module, Exception):
        candidates = {}
        for name, knobs in fa3_configs(shape).items():
            try:
                candidates[name] = fa3(module, pool, shape, knobs)
            except Exception as error:
                errors[f"fa3 {name}"] = _error(error)
        candidates = runnable(candidates, errors)
        tried = timer.measure(candidates, CANDIDATE_ROUNDS)
        row["fa3_tried_us"] = {name: found["median_us"] for name, found in tried.items()}
        best = min(row["fa3_tried_us"], key=row["fa3_tried_us"].__getitem__, default=None)
        row["fa3_best"] = best
        if best is not None:
            calls["fa3"], calls["fa3 again"] = candidates[best], candidates[best]
            if "auto" in candidates:
                calls["fa3 auto"] = candidates["auto"]
    calls = runnable(calls, errors)
    samples = timer.measure(calls, ROUNDS)
    row["samples"] = samples
    us = {name: found["median_us"] for name, found in samples.items()}
    if "ours" in us:
        row["bytes_per_s"] = shape.kv_bytes / (us["ours"] * 1e-6)
        row["of_copy"] = row["bytes_per_s"] / copy
        if "ours again" in us:
            row["aa_ours"] = us["ours again"] / us["ours"]
        if "pages of 256" in us:
            row["paged_256"] = us["pages of 256"] / us["ours"]
        if "fa3" in us:
            row["ratio"] = us["fa3"] / us["ours"]
            row["aa_fa3"] = us["fa3 again"] / us["fa3"]
    return row


def tune_configs(shape: Shape) -> dict[str, Any]:
    """Tiles and split policies to try, named alike for all lengths; the first is the one in use."""
    from attn_ladder.decode import plan

    base = plan(1, shape.nheads, shape.nheads_k, shape.headdim)
    tiles = [(base.BLOCK_N, base.num_warps, base.num_stages, base.lanes)]
    for block_n, warps, stages, lanes in (
        (64, 4, 3, 1), (64, 4, 4, 1), (64, 4, 5, 1), (64, 4, 3, 4), (64, 4, 4, 4), (128, 4, 3, 1),
        (128, 8, 3, 1), (128, 8, 3, 8), (32, 4, 5, 1),
    ):  # fmt: skip
        if (stages - 1) * block_n * shape.headdim * 4 <= 200 * 1024:
            tiles.append((block_n, warps, stages, lanes))
    most = base.max_splits
    policies = [
        (most, base.min_split), (most, 256), (most, 512), (most // 2, 256), (most // 2, 512),
        (most // 4, 512), (most // 4, 1024), (2 * most, 128),
    ]  # fmt: skip
    configs: dict[str, Any] = {}
    for block_n, warps, stages, lanes in dict.fromkeys(tiles):
        for max_splits, min_split in dict.fromkeys(policies):
            if max_splits and min_split % block_n == 0:
                name = f"n{block_n}-w{warps}-s{stages}-l{lanes} {max_splits}x{min_split}"
                configs[name] = dataclasses.replace(
                    base, BLOCK_N=block_n, num_warps=warps, num_stages=stages, lanes=lanes,
                    max_splits=max_splits, min_split=min_split,
                )  # fmt: skip
    return configs


def same_splits(shape: Shape, config: Any) -> tuple[int, ...]:
    """Equal for configurations that a shape does not tell apart."""
    keys = -(-shape.length // config.max_splits)
    keys = max(config.min_split, -(-keys // config.BLOCK_N) * config.BLOCK_N)
    return (config.BLOCK_N, config.num_warps, config.num_stages, config.lanes,
            min(keys, shape.length))  # fmt: skip


def in_parallel(tasks: list[Callable[[], Any]]) -> list[str]:
    """Run tasks in threads, which compile at the same time; the errors of those that failed."""

    def attempt(task: Callable[[], Any]) -> str | None:
        try:
            task()
            return None
        except Exception as error:
            return _error(error)

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        return [text for text in pool.map(attempt, tasks) if text is not None]


def tune_shape(
    timer: Timer, pool: Pool, module: Any, shape: Shape, best: str | None = None
) -> dict[str, Any]:
    """Median time of every candidate, and of FA3's `best` configuration in the same rounds."""
    errors: dict[str, str] = {}
    configs = tune_configs(shape)
    measured: dict[tuple[int, ...], str] = {}
    for name, config in configs.items():
        measured.setdefault(same_splits(shape, config), name)
    calls = {name: with_config(pool, shape, configs[name]) for name in measured.values()}
    if not isinstance(module, Exception):
        calls["fa3"] = fa3(module, pool, shape, fa3_configs(shape).get(best or "auto", {}))
    found = timer.measure(runnable(calls, errors), TUNE_ROUNDS)
    us = {
        name: found[measured[same_splits(shape, config)]]["median_us"]
        for name, config in configs.items()
        if measured[same_splits(shape, config)] in found
    }
    return {
        "shape": shape.id, **dataclasses.asdict(shape), "in_use": next(iter(configs)),
        "errors": errors, "fa3_config": best or "auto",
        "fa3_us": found["fa3"]["median_us"] if "fa3" in found else None,
        "measured": [name for name in measured.values() if name in found],
        "us": dict(sorted(us.items(), key=lambda item: item[1])),
    }  # fmt: skip


def tune_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Of each shape the best candidates and the one in use, in µs and FA3's time over theirs; of
    each kind of heads the candidates of the best mean ratio, with the least one."""
    lines: list[str] = []
    kinds: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        if "us" not in row:
            lines.append(f"tune {row['shape']}: {row.get('error')}")
            continue
        us, peer = row["us"], row["fa3_us"]

        def told(name: str, us: Any = us, peer: Any = peer) -> str:
            if name not in us:
                return f"{name} -"
            return f"{name} {us[name]:.1f}" + (f" ({peer / us[name]:.3f})" if peer else "")

        best = [name for name in us if name in row["measured"]][:6]
        lines.append(
            f"tune {row['shape']}: FA3 {row['fa3_config']} {peer}, in use {told(row['in_use'])}; "
            f"{'; '.join(map(told, best))}" + (f"; errors {row['errors']}" if row["errors"] else "")
        )
        kinds.setdefault((row["nheads"], row["nheads_k"], row["headdim"]), []).append(row)
    for (nheads, nheads_k, headdim), group in kinds.items():
        group = [row for row in group if row["fa3_us"]]
        names = (
            [name for name in group[0]["us"] if all(name in row["us"] for row in group)]
            if group
            else []
        )
        scores = {}
        for name in names:
            ratios = [row["fa3_us"] / row["us"][name] for row in group]
            scores[name] = (statistics.geometric_mean(ratios), min(ratios))
        ranked = sorted(scores, key=lambda name: -scores[name][0])
        shown = dict.fromkeys(ranked[:8] + [row["in_use"] for row in group[:1]])
        for name in shown:
            if name in scores:
                mean, least = scores[name]
                lines.append(
                    f"tune h{nheads}-k{nheads_k}-d{headdim} {name}: mean {mean:.3f}, "
                    f"least {least:.3f}"
                )
    return lines


def build_of(shape: Shape) -> tuple[int, bool]:
    """What else a shape compiles for: room for sequences, and the policy of L2."""
    from attn_ladder.decode_hopper import BATCHES
    from attn_ladder.decode_launch import choose_config

    room = next(size for size in BATCHES if shape.batch <= size)
    return room, choose_config(shape.headdim, shape.kv_bytes).evict_first


def warm(pool: Pool, shapes: list[Shape], pages: bool, tune: bool) -> list[str]:
    """Compile what the shapes need, several kernels at a time."""
    tasks: dict[Any, Callable[[], Any]] = {}
    for shape in shapes:
        kind = (
            shape.nheads // shape.nheads_k, shape.headdim, shape.nheads_k == 1,
            *build_of(shape),
        )  # fmt: skip
        for page in (0, 256, *((64, 16) if shape.length == 2048 else ())) if pages else ():
            task = ours(pool, shape, page)
            tasks[kind, page] = lambda task=task: task(0)  # type: ignore[misc]
        for config in tune_configs(shape).values() if tune else ():
            key = (config.BLOCK_N, config.num_warps, config.num_stages, config.lanes)
            split = same_splits(shape, config)[-1] < shape.length
            task = with_config(pool, shape, config)
            tasks[kind, key, split] = lambda task=task: task(0)  # type: ignore[misc]
    return in_parallel(list(tasks.values()))


def run_timing(report: Report, module_name: str, parts: list[str], shapes: list[Shape]) -> None:
    """`time` and `tune`, shape by shape."""
    import torch

    timer = Timer()
    pool = Pool(shapes)
    module = fa3_function(module_name)
    if isinstance(module, Exception):
        report.data["fa3"] = _error(module)
    began = time.monotonic()
    report.data["compile_errors"] = warm(pool, shapes, "time" in parts, "tune" in parts)
    report.data["compile_s"] = round(time.monotonic() - began, 2)
    copy = copy_bytes_per_s(timer)
    report.data["copy_bytes_per_s"] = copy

    def best_of(shape: Shape) -> str | None:
        rows = [row for row in report.data["decode"] if row["shape"] == shape.id]
        return rows[0].get("fa3_best") if rows else None

    steps: list[tuple[str, Callable[[Shape], dict[str, Any]]]] = []
    if "time" in parts:
        steps.append(("decode", lambda shape: time_shape(timer, pool, module, shape, copy)))
    if "tune" in parts:
        steps.append(("tune", lambda shape: tune_shape(timer, pool, module, shape, best_of(shape))))
    for part, step in steps:
        for shape in shapes:
            if report.over():
                return
            began = time.monotonic()
            try:
                row = step(shape)
            except Exception as error:
                row = {"shape": shape.id, "error": _error(error)}
                if _broken(error):
                    report.add(part, row)
                    report.data["stopped"] = f"the GPU is lost since {part} {shape.id}"
                    return
            row["seconds"] = round(time.monotonic() - began, 3)
            report.add(part, row)
            torch.cuda.synchronize()


def table(data: dict[str, Any]) -> str:
    """The short report."""
    failed = [row for row in data["checks"] if not row["ok"]]
    lines = [f"checks: {len(data['checks']) - len(failed)} right, {len(failed)} wrong"]
    lines += [f"  WRONG {row['name']}: {row['detail'][:300]}" for row in failed]
    if "copy_bytes_per_s" in data:
        lines.append(f"copy: {data['copy_bytes_per_s'] / 1e12:.3f} TB/s")
    if data["decode"]:
        lines.append(
            f"{'shape':24} {'MB':>6} {'ours us':>8} {'FA3 us':>8} {'ratio':>6} {'of copy':>7} "
            f"{'paged':>6} {'A/A':>6} {'A/A FA3':>7}  FA3's best"
        )
    for row in data["decode"]:
        if "samples" not in row or "ours" not in row["samples"]:
            lines.append(f"{row['shape']:24} {row.get('error') or row.get('errors')}")
            continue
        us = {name: found["median_us"] for name, found in row["samples"].items()}

        def number(value: float | None, width: int, places: int) -> str:
            return " " * (width - 1) + "-" if value is None else f"{value:{width}.{places}f}"

        lines.append(
            f"{row['shape']:24} {row['kv_bytes'] / 1e6:6.0f} {us['ours']:8.2f} "
            f"{number(us.get('fa3'), 8, 2)} {number(row.get('ratio'), 6, 3)} "
            f"{number(row.get('of_copy'), 7, 3)} {number(row.get('paged_256'), 6, 3)} "
            f"{number(row.get('aa_ours'), 6, 3)} {number(row.get('aa_fa3'), 7, 3)}  "
            f"{row.get('fa3_best')}" + (f"  errors: {row['errors']}" if row["errors"] else "")
        )
    ratios = [(row["kv_bytes"] < 64 * 2**20, row["ratio"]) for row in data["decode"]
              if "ratio" in row]  # fmt: skip
    for small, name in ((True, "K and V under 64 MB"), (False, "larger")):
        if group := [ratio for is_small, ratio in ratios if is_small is small]:
            lines.append(f"{name}: median {statistics.median(group):.3f}, least {min(group):.3f}")
    lines += tune_lines(data["tune"])
    for key in ("fa3", "compile_errors", "error", "stopped"):
        if data.get(key):
            lines.append(f"{key}: {data[key]}")
    return "\n".join([*lines, f"{data['elapsed_s']:.1f} s"])


def facts() -> dict[str, Any]:
    """The GPU and the versions."""
    import torch
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 where a check is wrong."""
    parser = argparse.ArgumentParser(prog="python -m attn_profiling.serving_check")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--parts", default="check,time", help="of check, time, tune")
    parser.add_argument("--shapes", default="", help="only shapes whose id contains one of these")
    parser.add_argument(
        "--checks", default="", help="only checks whose name begins with one of these"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--fa3", default=os.environ.get("ATTN_LADDER_FA3_MODULE", "fa3_fwd_interface")
    )
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - {"check", "time", "tune"}:
        parser.error(f"--parts={options.parts}: {sorted(unknown)} is none of check, time, tune")
    wanted = [text for text in options.shapes.split(",") if text]
    shapes = [s for s in DECODE if not wanted or any(text in s.id for text in wanted)]
    if not shapes:
        parser.error(f"--shapes={options.shapes} leaves none of {[s.id for s in DECODE]}")
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)
    report = Report(options.out, options.seconds)
    report.data |= {"facts": facts(), "parts": parts}
    report.write()
    tiny = options.device == "cpu"
    usable = True
    try:
        if "check" in parts:
            if not tiny:
                compile_checks(options.device)
                report.data["compile_checks_s"] = round(report.elapsed(), 2)
            share = 0.6 if {"time", "tune"} & set(parts) else 1.0
            chosen = tuple(text for text in options.checks.split(",") if text)
            usable = run_checks(report, options.device, tiny, share, chosen)
        if usable and not tiny and {"time", "tune"} & set(parts):
            run_timing(report, options.fa3, parts, shapes)
    except Exception as error:
        report.data["error"] = _error(error)
    report.write()
    print(table(report.data))
    faulthandler.cancel_dump_traceback_later()
    bad = not all(row["ok"] for row in report.data["checks"]) or "error" in report.data
    return int(bad)


def compile_checks(device: Any) -> None:
    """Compile the checks' kernels, several at a time; what fails will be told by its check."""
    import torch

    from attn_ladder import attention_varlen, attention_with_kvcache  # noqa: F401 before threads
    from attn_ladder.decode import clear_errors, error_flag

    error_flag(device)
    cases = [*cached_cases(False), APPEND, dataclasses.replace(APPEND, page=64)]
    for case in spanning_cases(False):
        cases += [dataclasses.replace(case, page=page) for page in (0, 16, 64, 256)]
        cases.append(dataclasses.replace(case, lens=(1,), capacity=1))
    cases += [dataclasses.replace(case, lens=case.lens[:1]) for case in crowds()]
    cases += crowds()
    tasks: list[Callable[[], Any]] = [lambda: check_range(spanning_cases(False)[0], device)]
    for case in cases:
        tasks.append(lambda case=case: Cache(case, device).call())  # type: ignore[misc]
    for ragged in ragged_cases(False):
        tasks.append(lambda case=ragged: check_ragged(case, device))  # type: ignore[misc]
    in_parallel(tasks)
    torch.cuda.synchronize()
    clear_errors(device)


if __name__ == "__main__":
    sys.exit(main())
