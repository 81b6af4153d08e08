"""Attention over a KV cache and over ragged sequences: split-KV, in plain Triton (sm_80 and on).

Decoding one token reads all of K and V and computes little, so device memory bounds it: the time to
aim at is (bytes of K and V) / (copy bandwidth), and the witness is DRAM throughput. Hence:

- The query heads that share a key head, and the query tokens, are packed into the rows of one tile
  (row = token * group + head in group), so K and V are read once per key head, 128 bits a load.
- The keys of a sequence are split among CTAs (flash-decoding, Dao et al., 2023), so that one short
  batch still fills 132 SMs. Where the rows of a key head fit one tile of 16, the CTA that finishes
  last combines the partial results, so no second kernel is launched and most of that work is
  hidden; more rows have a kernel for it. A sequence of one split is written at once.
- Triton's pipeliner keeps num_stages blocks of K and V in flight (cp.async), also where the keys
  lie in pages of whole blocks: then the page of a block is one scalar, loaded a block ahead.
- New keys are appended by the CTA whose split they fall into. Everybody reads them from `k`, `v`,
  nobody from the cache, so there is no race between the append and the attention.

Split policy, fixed: a sequence of n keys is cut into splits of

    max(min_split, ceil(ceil(n / max_splits) / BLOCK_N) * BLOCK_N)   keys,

with min_split and max_splits from `plan(seqlen_q, nheads, nheads_k, headdim)`. Neither depends on
the batch, the other sequences or the capacity of the cache; splits and blocks are counted from the
first key that is attended to; the combine adds CHUNK splits at a time, in order. So the output of a
sequence is bitwise the same alone and inside any batch, padded on the left or not, paged or not.

The last CTA is the one that counts to the number of splits that the length gives. Memory order: the
CTA's stores precede, by its barrier, one thread's atomic add, which releases and acquires at the
scope of the GPU; so whoever counts last sees every partial result, and its loads bypass L1. It sets
the counter back to 0 for the next launch; `counters` says who shares one.

Error flag: no value of a length, a page or an index leads to an access outside the tensors. A
sequence with a bad value gives NaN in `out` and `lse`, appends nothing, and sets bits of
`error_flag(device)`, an int32 tensor of one element that stays set until `clear_errors`:
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
ERRORS = {
    1: "cache_seqlens: negative, or beyond the capacity of the cache with the appended tokens",
    2: "block_table: a page index outside the cache",
    4: "cache_batch_idx: an index outside the cache",
    8: "cu_seqlens: decreasing, outside the tensors, or longer than max_seqlen",
    16: "key_range: outside the keys, or a mask that no range expresses",
}
__doc__ += "\n" + "\n".join(f"    {bit:2d}  {text}" for bit, text in ERRORS.items()) + "\n"

CACHE, RANGE, VARLEN = 0, 1, 2  # where the bounds of a sequence come from
EVERY_KEY = 2**30  # position of a query that sees all keys
CHUNK = 8  # splits that the combine adds at once
COMBINED_ROWS = 4  # of a tile, at most: with CHUNK and headdim 128, 32 registers of 128 threads
SHARED_OF_AN_SM = 228 * 1024
POOL_COUNTERS = 2**20  # of a device, 4 MiB
TARGET_CTAS = 256  # per sequence, at most: two for each of 132 SMs
MIN_SPLIT = 128  # keys
APPENDED = 16  # keys that a program of `append_kernel` writes


@dataclass(frozen=True)
class Config:
    """Tile of BLOCK_M packed query rows × BLOCK_N keys, `num_warps` warps, `num_stages` blocks in
    flight; a sequence is cut into at most `max_splits` splits of at least `min_split` keys. The
    keys of a block are dealt to `lanes` groups of warps that meet at the end of the split only."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    max_splits: int
    min_split: int
    lanes: int = 1

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two and at least 16")
        if self.min_split < 1 or self.min_split % self.BLOCK_N:
            raise ValueError(
                f"min_split={self.min_split} must be a multiple of BLOCK_N={self.BLOCK_N}"
            )
        if self.lanes < 1 or self.num_warps % self.lanes or self.BLOCK_N // self.lanes < 16:
            raise ValueError(
                f"lanes={self.lanes} must divide num_warps={self.num_warps} and leave each at "
                f"least 16 of BLOCK_N={self.BLOCK_N} keys"
            )
        if self.max_splits < 1:
            raise ValueError(f"max_splits={self.max_splits} must be at least 1")


@lru_cache(maxsize=1024)
def plan(seqlen_q: int, nheads: int, nheads_k: int, headdim: int) -> Config:
    """Tile and split policy of a call whose sequences have at most `seqlen_q` query tokens each.

    Depends on nothing but its arguments, so a sequence is split alike in every batch.
    """
    rows = seqlen_q * (nheads // nheads_k)
    block_m = min(128, max(16, triton.next_power_of_2(rows)))
    block_n = 64
    tiles = triton.cdiv(rows, block_m) * nheads_k
    splits = 1
    while splits < 128 and 2 * splits * tiles <= TARGET_CTAS:
        splits *= 2
    # a partial result is 4 * headdim bytes a row, a key and its value are 4 * headdim bytes: at 16
    # keys a row the partial results are 1/16 of what is read
    min_split = max(MIN_SPLIT, triton.cdiv(16 * min(rows, block_m), block_n) * block_n)
    return Config(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3 if headdim == 128 else 4,
        max_splits=splits,
        min_split=min_split,
    )


@triton.jit
def sequence(
    batch, bounds_ptr, index_ptr, seqlen_q, max_seqlen_q, seqlen_new, capacity, num_rows,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """Bounds of one sequence, all of them harmless whatever the values in memory are.

    Returns (first query, number of queries, cache row, first key, keys already stored, keys in all,
    position of the first query among the keys, error bits).
    """
    error = 0
    first_q = 0
    num_q = seqlen_q
    row = batch
    first_k = 0
    if MODE == 0:
        if INDEXED:
            row = tl.load(index_ptr + batch)
            error = tl.where((row < 0) | (row >= num_rows), 4, 0)
        stored = tl.load(bounds_ptr + batch)
        error = error | tl.where((stored < 0) | (stored > capacity - seqlen_new), 1, 0)
        length = stored + seqlen_new
        position = length - seqlen_q
    elif MODE == 1:
        first_k = tl.load(bounds_ptr + 3 * batch)
        end = tl.load(bounds_ptr + 3 * batch + 1)
        error = tl.where((first_k < 0) | (end < first_k) | (end > capacity), 16, 0)
        length = end - first_k
        stored = length
        position = tl.load(bounds_ptr + 3 * batch + 2) - first_k
    else:
        row = 0
        first_k = tl.load(bounds_ptr + batch)
        end = tl.load(bounds_ptr + batch + 1)
        first_q = tl.load(index_ptr + batch)
        num_q = tl.load(index_ptr + batch + 1) - first_q
        error = tl.where((first_k < 0) | (end < first_k) | (end > capacity), 8, 0)
        outside = (first_q < 0) | (num_q < 0) | (first_q > seqlen_q - num_q)
        error = error | tl.where(outside | (num_q > max_seqlen_q), 8, 0)
        num_q = tl.where(outside, 0, tl.minimum(num_q, max_seqlen_q))
        first_q = tl.where(outside, 0, first_q)
        length = end - first_k
        stored = length
        position = length - num_q
    if error != 0:
        row = 0
        first_k = 0
        stored = 0
        length = 0
    if not CAUSAL:
        position = 1073741824
    return first_q, num_q, row, first_k, stored, length, position, error


@triton.jit
def split_length(length, max_splits, min_split, BLOCK_N: tl.constexpr):
    """Keys of a split of a sequence of `length` keys."""
    return tl.maximum(min_split, tl.cdiv(tl.cdiv(length, max_splits), BLOCK_N) * BLOCK_N)


@triton.jit
def page_at(
    table_ptr, start_n, needed, otherwise, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Page of the block of keys at start_n if it is needed, where a block lies in one page."""
    page = otherwise
    if PAGE_SIZE != 0 and PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(table_ptr + start_n // PAGE_SIZE, mask=needed, other=otherwise)
    return page


@triton.jit
def rows_of(
    k_ptr, v_ptr, table_ptr, page, start_n, place, inside, num_pages, k_step, v_step, k_page_step,
    v_page_step, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the keys start_n + place lie: pointers to K and V and offsets of the keys' rows from
    them, which of `inside` may be accessed, which of them have a bad page.

    Where the block lies in one page, `page`, every row may be read whatever the page is.
    """
    bad = tl.zeros_like(place)
    if PAGE_SIZE != 0 and PAGE_SIZE % BLOCK_N != 0:
        offs_n = start_n + place
        page = tl.load(table_ptr + offs_n // PAGE_SIZE, mask=inside, other=0)
        valid = (page >= 0) & (page < num_pages)
        bad = tl.where(inside & (valid == 0), 1, 0)
        inside = inside & valid
        page = page.to(tl.int64)
        slot = (offs_n % PAGE_SIZE).to(tl.int64)
        k_rows = page * k_page_step + slot * k_step
        v_rows = page * v_page_step + slot * v_step
    else:
        slot = start_n
        if PAGE_SIZE != 0:
            valid = (page >= 0) & (page < num_pages)
            bad = tl.where(inside & (valid == 0), 1, 0)
            inside = inside & valid
            page = tl.where(valid, page, 0).to(tl.int64)
            k_ptr += page * k_page_step
            v_ptr += page * v_page_step
            slot = start_n % PAGE_SIZE
        rows = (slot + place).to(tl.int64)
        k_rows = rows * k_step
        v_rows = rows * v_step
    return k_ptr, v_ptr, k_rows, v_rows, inside, bad


@triton.jit
def key_block(
    acc, m_i, l_i, bad, q, k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr, page, start_n, place,
    rows_seen, stored, length, num_pages, k_step, v_step, k_page_step, v_page_step, k_new_step,
    v_new_step, qk_scale, MASKED: tl.constexpr, APPEND: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys; row m sees the keys below rows_seen[m].

    `place` numbers the keys, [BLOCK_N] or [LANES, BLOCK_N / LANES]; with lanes all else has that
    dimension in front, too.
    """
    offs_n = start_n + place
    offs_d = tl.arange(0, HEADDIM)
    k_ptr, v_ptr, k_rows, v_rows, readable, bad_page = rows_of(
        k_ptr, v_ptr, table_ptr, page, start_n, place, offs_n < stored, num_pages,
        k_step, v_step, k_page_step, v_page_step, PAGE_SIZE, BLOCK_N,
    )  # fmt: skip
    k_ptrs = k_ptr + tl.expand_dims(k_rows, -1) + offs_d
    v_ptrs = v_ptr + tl.expand_dims(v_rows, -1) + offs_d
    readable = tl.expand_dims(readable, -1)
    MASK_LOADS: tl.constexpr = MASKED or (PAGE_SIZE != 0 and PAGE_SIZE % BLOCK_N != 0)
    if MASKED and APPEND:
        fresh = tl.expand_dims((offs_n >= stored) & (offs_n < length), -1)
        new_rows = tl.expand_dims((offs_n - stored).to(tl.int64), -1)
    bad = bad | bad_page
    if MASK_LOADS:
        k = tl.load(k_ptrs, mask=readable, other=0.0)  # [BLOCK_N, HEADDIM]
    else:
        k = tl.load(k_ptrs)
    if MASKED and APPEND:
        new_ptrs = k_new_ptr + new_rows * k_new_step + offs_d
        k = tl.where(fresh, tl.load(new_ptrs, mask=fresh, other=0.0), k)
    scores = tl.dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        seen = tl.expand_dims(offs_n, -2) < tl.expand_dims(rows_seen, -1)
        scores = tl.where(seen, scores, float("-inf"))
    m_next = tl.maximum(m_i, tl.max(scores, -1))
    m_safe = m_next
    if MASKED:
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)  # a row without a key so far
    p = tl.exp2(scores - tl.expand_dims(m_safe, -1))
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, -1)
    if MASK_LOADS:
        v = tl.load(v_ptrs, mask=readable, other=0.0)
    else:
        v = tl.load(v_ptrs)
    if MASKED and APPEND:
        new_ptrs = v_new_ptr + new_rows * v_new_step + offs_d
        v = tl.where(fresh, tl.load(new_ptrs, mask=fresh, other=0.0), v)
    acc = tl.dot(p.to(v.dtype), v, acc * tl.expand_dims(alpha, -1))
    return acc, m_next, l_i, bad


@triton.jit
def append_block(
    k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr, start_n, end, stored, num_pages,
    k_step, v_step, k_page_step, v_page_step, k_new_step, v_new_step,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr,
):  # fmt: skip
    """Copy the new ones of BLOCK_N keys and values into the cache; returns bad pages [BLOCK_N]."""
    place = tl.arange(0, BLOCK_N)
    offs_n = start_n + place
    offs_d = tl.arange(0, HEADDIM)
    page = page_at(table_ptr, start_n, start_n < end, 0, PAGE_SIZE, BLOCK_N)
    k_ptr, v_ptr, k_rows, v_rows, writable, bad = rows_of(
        k_ptr, v_ptr, table_ptr, page, start_n, place, (offs_n >= stored) & (offs_n < end),
        num_pages, k_step, v_step, k_page_step, v_page_step, PAGE_SIZE, BLOCK_N,
    )  # fmt: skip
    rows = (offs_n - stored).to(tl.int64)[:, None]
    mask = writable[:, None]
    k = tl.load(k_new_ptr + rows * k_new_step + offs_d[None, :], mask=mask, other=0.0)
    v = tl.load(v_new_ptr + rows * v_new_step + offs_d[None, :], mask=mask, other=0.0)
    tl.store(k_ptr + k_rows[:, None] + offs_d[None, :], k, mask=mask)
    tl.store(v_ptr + v_rows[:, None] + offs_d[None, :], v, mask=mask)
    return bad


@triton.jit
def combined(
    partial_ptr, partial_lse_ptr, rows, inside, step, num_splits,
    HEADDIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted mean of the partial results of `rows` of the first split, a split being
    `step` rows apart: result [ROWS, HEADDIM] and log-sum-exp, base 2, [ROWS].

    CHUNK splits at a time, whose loads are in flight together, in order. `.cg`: other CTAs wrote.
    """
    offs_d = tl.arange(0, HEADDIM)
    m_i = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    l_i = tl.zeros_like(m_i)
    acc = tl.zeros([rows.shape[0], HEADDIM], tl.float32)
    for start_s in range(0, num_splits, CHUNK):
        splits = start_s + tl.arange(0, CHUNK)
        places = rows[None, :] + splits[:, None] * step  # [CHUNK, ROWS]
        mask = (splits < num_splits)[:, None] & inside[None, :]
        lse = tl.load(
            partial_lse_ptr + places, mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        partial = tl.load(
            partial_ptr + places[:, :, None] * HEADDIM + offs_d[None, None, :],
            mask=mask[:, :, None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_next = tl.maximum(m_i, tl.max(lse, 0))
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        weight = tl.exp2(lse - m_safe[None, :])
        alpha = tl.exp2(m_i - m_safe)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * partial, 0)
        l_i = l_i * alpha + tl.sum(weight, 0)
        m_i = m_next
    empty = l_i == 0.0
    total = tl.where(empty, 1.0, l_i)
    return acc / total[:, None], tl.where(empty, float("-inf"), m_i + tl.log2(total))


@triton.jit
def store_rows(
    out_ptr, lse_ptr, acc, lse, token, head, inside, stride_om, stride_oh, stride_lh,
    HEADDIM: tl.constexpr,
):  # fmt: skip
    """Write rows of the result, and their log-sum-exp, base 2, as a natural one."""
    offs_d = tl.arange(0, HEADDIM)
    rows = token.to(tl.int64) * stride_om + head.to(tl.int64) * stride_oh
    tl.store(
        out_ptr + rows[:, None] + offs_d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(lse_ptr + head.to(tl.int64) * stride_lh + token, lse * 0.6931471805599453, mask=inside)


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "max_seqlen_q", "seqlen_new", "capacity", "num_rows", "num_splits",
        "max_splits", "min_split",
    ]
)  # fmt: skip
def split_kernel(
    q_ptr, k_ptr, v_ptr, k_new_ptr, v_new_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    bounds_ptr, index_ptr, table_ptr, error_ptr, counter_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn,
    stride_vh, stride_k_new_b, stride_k_new_n, stride_k_new_h, stride_v_new_b, stride_v_new_n,
    stride_v_new_h, stride_ob, stride_om, stride_oh, stride_lb, stride_lh, stride_tb,
    seqlen_q, max_seqlen_q, seqlen_new, capacity, num_rows, num_splits, max_splits, min_split,
    nheads_k, qk_scale,
    SPLIT: tl.constexpr, FUSED: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    CAUSAL: tl.constexpr, INDEXED: tl.constexpr, APPEND: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, HEADDIM: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head_k = tl.program_id(0) % nheads_k  # heads first: neighbours in memory are read together
    split = tl.program_id(0) // nheads_k % num_splits
    batch = tl.program_id(0) // nheads_k // num_splits
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest causal tile first
    # the first page if a full cache would be split alike: loaded together with the length
    table_ptr += batch.to(tl.int64) * stride_tb
    guess = split * split_length(capacity, max_splits, min_split, BLOCK_N)
    page = page_at(table_ptr, guess, guess < capacity, 0, PAGE_SIZE, BLOCK_N)
    first_q, num_q, row, first_k, stored, length, position, error = sequence(
        batch, bounds_ptr, index_ptr, seqlen_q, max_seqlen_q, seqlen_new, capacity, num_rows,
        MODE, CAUSAL, INDEXED,
    )  # fmt: skip
    if error != 0:
        tl.atomic_or(error_ptr, error)
    keys = split_length(length, max_splits, min_split, BLOCK_N)
    start = split * keys
    if (start >= length) & (split > 0):
        return
    if tile * BLOCK_M >= num_q * GROUP:
        return

    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEADDIM)
    token = offs_m // GROUP
    head = head_k * GROUP + offs_m % GROUP
    inside = token < num_q
    q_rows = (first_q + token).to(tl.int64) * stride_qm + head.to(tl.int64) * stride_qh
    if MODE != 2:
        q_ptr += batch.to(tl.int64) * stride_qb
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=inside[:, None], other=0.0)

    if PAGE_SIZE == 0:
        k_ptr += row.to(tl.int64) * stride_kb + first_k.to(tl.int64) * stride_kn
        v_ptr += row.to(tl.int64) * stride_vb + first_k.to(tl.int64) * stride_vn
    k_ptr += head_k.to(tl.int64) * stride_kh
    v_ptr += head_k.to(tl.int64) * stride_vh
    k_new_ptr += batch.to(tl.int64) * stride_k_new_b + head_k.to(tl.int64) * stride_k_new_h
    v_new_ptr += batch.to(tl.int64) * stride_v_new_b + head_k.to(tl.int64) * stride_v_new_h

    if LANES == 1:
        place = tl.arange(0, BLOCK_N)
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
    else:  # each warp its own keys, so that no warp waits for another one's scores
        SHARE: tl.constexpr = BLOCK_N // LANES
        place = tl.arange(0, LANES)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
        q = tl.broadcast_to(q[None, :, :], [LANES, BLOCK_M, HEADDIM])
        m_i = tl.full([LANES, BLOCK_M], float("-inf"), tl.float32)
        acc = tl.zeros([LANES, BLOCK_M, HEADDIM], tl.float32)
    l_i = tl.zeros_like(m_i)
    bad = tl.zeros_like(place)

    # keys below `interior` are stored and seen by every row of the tile
    stop = tl.minimum(start + keys, length)
    rows_seen = tl.minimum(stop, position + token + 1)
    last_token = tl.minimum(num_q - 1, (tile * BLOCK_M + BLOCK_M - 1) // GROUP)
    end = tl.minimum(stop, position + last_token + 1)
    interior = tl.minimum(tl.minimum(stop, stored), position + tile * BLOCK_M // GROUP + 1)
    interior = start + tl.maximum(0, interior - start) // BLOCK_N * BLOCK_N
    # the page of the next block is loaded an iteration ahead: the pipeliner would halve the depth
    # where the address of a load depends on a load of the same iteration
    page = page_at(
        table_ptr, start, (start != guess) & (start < interior), page, PAGE_SIZE, BLOCK_N
    )
    for start_n in range(start, interior, BLOCK_N):
        next_n = start_n + BLOCK_N
        next_page = page_at(table_ptr, next_n, next_n < interior, 0, PAGE_SIZE, BLOCK_N)
        acc, m_i, l_i, bad = key_block(
            acc, m_i, l_i, bad, q, k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr, page, start_n,
            place, rows_seen, stored, length, num_rows, stride_kn, stride_vn, stride_kb,
            stride_vb, stride_k_new_n, stride_v_new_n, qk_scale,
            False, APPEND, PAGE_SIZE, BLOCK_N, HEADDIM,
        )  # fmt: skip
        page = next_page
    # few blocks, with more loads each: less depth, so that more CTAs fit on an SM
    for start_n in tl.range(interior, end, BLOCK_N, num_stages=2):
        page = page_at(table_ptr, start_n, start_n < end, 0, PAGE_SIZE, BLOCK_N)
        acc, m_i, l_i, bad = key_block(
            acc, m_i, l_i, bad, q, k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr, page, start_n,
            place, rows_seen, stored, length, num_rows, stride_kn, stride_vn, stride_kb,
            stride_vb, stride_k_new_n, stride_v_new_n, qk_scale,
            True, APPEND, PAGE_SIZE, BLOCK_N, HEADDIM,
        )  # fmt: skip
    bad_pages = tl.max(bad)
    if APPEND:
        if tile == 0:
            first_new = start + tl.maximum(0, stored - start) // BLOCK_N * BLOCK_N
            for start_n in range(first_new, stop, BLOCK_N):
                bad_here = append_block(
                    k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr, start_n, stop, stored,
                    num_rows, stride_kn, stride_vn, stride_kb, stride_vb,
                    stride_k_new_n, stride_v_new_n, PAGE_SIZE, BLOCK_N, HEADDIM,
                )  # fmt: skip
                bad_pages = bad_pages | tl.max(bad_here)
    if PAGE_SIZE != 0:
        if bad_pages != 0:
            tl.atomic_or(error_ptr, 2)
            error = 2

    if LANES > 1:
        m_all = tl.max(m_i, 0)
        weight = tl.exp2(m_i - tl.where(m_all == float("-inf"), 0.0, m_all)[None, :])
        l_i = tl.sum(l_i * weight, 0)
        acc = tl.sum(acc * weight[:, :, None], 0)
        m_i = m_all
    empty = l_i == 0.0
    poison = tl.where(error != 0, float("nan"), 0.0)
    acc = acc / tl.where(empty, 1.0, l_i)[:, None] + poison
    lse = tl.where(empty, float("-inf"), m_i + tl.log2(tl.where(empty, 1.0, l_i))) + poison
    if MODE != 2:
        out_ptr += batch.to(tl.int64) * stride_ob
        lse_ptr += batch.to(tl.int64) * stride_lb
    parts = 1
    if SPLIT:
        parts = tl.cdiv(length, keys)
    if parts <= 1:
        store_rows(
            out_ptr, lse_ptr, acc, lse, first_q + token, head, inside, stride_om, stride_oh,
            stride_lh, HEADDIM,
        )  # fmt: skip
    else:  # partial results: (batch, num_splits, seqlen_q, nheads, HEADDIM), fp32
        nheads = nheads_k * GROUP
        step = seqlen_q * nheads
        slab = batch.to(tl.int64) * num_splits * step
        partial_lse_ptr += slab
        partial_ptr += slab * HEADDIM
        rows = split * step + token * nheads + head
        tl.store(partial_lse_ptr + rows, lse, mask=inside)
        tl.store(partial_ptr + rows[:, None] * HEADDIM + offs_d[None, :], acc, mask=inside[:, None])
        if FUSED:
            counter_ptr += (batch * nheads_k + head_k) * tl.num_programs(1) + tile
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
            if arrived == parts:
                for start_m in range(0, tl.minimum(BLOCK_M, num_q * GROUP - tile * BLOCK_M), ROWS):
                    offs_r = tile * BLOCK_M + start_m + tl.arange(0, ROWS)
                    token_r = offs_r // GROUP
                    head_r = head_k * GROUP + offs_r % GROUP
                    inside_r = token_r < num_q
                    mean, mean_lse = combined(
                        partial_ptr, partial_lse_ptr, token_r * nheads + head_r, inside_r, step,
                        parts, HEADDIM, CHUNK,
                    )  # fmt: skip
                    store_rows(
                        out_ptr, lse_ptr, mean, mean_lse, token_r, head_r, inside_r, stride_om,
                        stride_oh, stride_lh, HEADDIM,
                    )  # fmt: skip
                tl.store(counter_ptr, 0)  # for the next launch


@triton.jit(
    do_not_specialize=[
        "seqlen_q", "seqlen_new", "capacity", "num_rows", "num_slabs", "max_splits", "min_split",
        "nheads",
    ]
)  # fmt: skip
def combine_kernel(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, bounds_ptr, index_ptr,
    stride_ob, stride_om, stride_oh, stride_lb, stride_lh,
    seqlen_q, seqlen_new, capacity, num_rows, num_slabs, max_splits, min_split, nheads,
    MODE: tl.constexpr, CAUSAL: tl.constexpr, INDEXED: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADDIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of the output where a tile has many; nothing where the sequence has one split."""
    head = tl.program_id(0) % nheads + tl.arange(0, 1)
    token = tl.program_id(0) // nheads % seqlen_q + tl.arange(0, 1)
    batch = tl.program_id(0) // nheads // seqlen_q
    _, _, _, _, _, length, _, _ = sequence(
        batch, bounds_ptr, index_ptr, seqlen_q, seqlen_q, seqlen_new, capacity, num_rows,
        MODE, CAUSAL, INDEXED,
    )  # fmt: skip
    parts = tl.cdiv(length, split_length(length, max_splits, min_split, BLOCK_N))
    if parts <= 1:
        return
    acc, lse = combined(
        partial_ptr, partial_lse_ptr,
        (batch.to(tl.int64) * num_slabs * seqlen_q + token) * nheads + head, token < seqlen_q,
        (seqlen_q * nheads).to(tl.int64), parts, HEADDIM, CHUNK,
    )  # fmt: skip
    store_rows(
        out_ptr + batch.to(tl.int64) * stride_ob, lse_ptr + batch.to(tl.int64) * stride_lb, acc,
        lse, token, head, token < seqlen_q, stride_om, stride_oh, stride_lh, HEADDIM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seqlen_new", "capacity", "num_rows"])
def append_kernel(
    k_ptr, v_ptr, k_new_ptr, v_new_ptr, bounds_ptr, index_ptr, table_ptr, error_ptr,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_k_new_b,
    stride_k_new_n, stride_k_new_h, stride_v_new_b, stride_v_new_n, stride_v_new_h, stride_tb,
    seqlen_new, capacity, num_rows, nheads_k,
    INDEXED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr,
):  # fmt: skip
    """Append some keys and values of one sequence and key head."""
    head_k = tl.program_id(0) % nheads_k
    batch = tl.program_id(0) // nheads_k
    _, _, row, _, stored, length, _, error = sequence(
        batch, bounds_ptr, index_ptr, 1, 1, seqlen_new, capacity, num_rows, 0, False, INDEXED
    )
    start_n = (stored // BLOCK_N + tl.program_id(1)) * BLOCK_N
    if (error != 0) | (start_n >= length):
        return
    k_ptr += head_k.to(tl.int64) * stride_kh
    v_ptr += head_k.to(tl.int64) * stride_vh
    if PAGE_SIZE == 0:
        k_ptr += row.to(tl.int64) * stride_kb
        v_ptr += row.to(tl.int64) * stride_vb
    k_new_ptr += batch.to(tl.int64) * stride_k_new_b + head_k.to(tl.int64) * stride_k_new_h
    v_new_ptr += batch.to(tl.int64) * stride_v_new_b + head_k.to(tl.int64) * stride_v_new_h
    bad = append_block(
        k_ptr, v_ptr, k_new_ptr, v_new_ptr, table_ptr + batch.to(tl.int64) * stride_tb, start_n,
        length, stored, num_rows, stride_kn, stride_vn, stride_kb, stride_vb, stride_k_new_n,
        stride_v_new_n, PAGE_SIZE, BLOCK_N, HEADDIM,
    )  # fmt: skip
    if tl.max(bad) != 0:
        tl.atomic_or(error_ptr, 2)


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    *,
    bounds: torch.Tensor,
    index: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> None:
    """Write `k_new`, `v_new` into the cache behind the keys stored, as `launch` does on the way.

    Arguments as there, in mode CACHE. Nothing is appended to a sequence with a bad length or row,
    and the error of a bad page is flagged.
    """
    batch, seqlen_new, nheads_k, headdim = k_new.shape
    page_size = 0 if block_table is None else k.shape[1]
    capacity = k.shape[1] * (1 if block_table is None else block_table.shape[1])
    steps = [step for x in (k, v, k_new, v_new) for step in x.stride()[:3]]
    grid = (batch * nheads_k, triton.cdiv(seqlen_new, APPENDED) + 1)
    append_kernel[grid](
        k, v, k_new, v_new, bounds, bounds if index is None else index,
        bounds if block_table is None else block_table, error_flag(k.device), *steps,
        0 if block_table is None else block_table.stride(0), seqlen_new, capacity, k.shape[0],
        nheads_k, INDEXED=index is not None, PAGE_SIZE=page_size, BLOCK_N=APPENDED,
        HEADDIM=headdim, num_warps=4,
    )  # fmt: skip


_FLAGS: dict[torch.device, torch.Tensor] = {}


def error_flag(device: torch.device | str) -> torch.Tensor:
    """The error flag of a device: int32, one element, bits as in `ERRORS`.

    A CUDA device without an index is the current one. Raises `ValueError` if the flag would have to
    be created while a CUDA graph is captured: call the function once before capturing, as its
    kernels must be compiled then anyway.
    """
    if device in _FLAGS:  # tensors' devices have an index
        return _FLAGS[device]
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _FLAGS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"error_flag({device=}) does not exist; call once before capturing")
        _FLAGS[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _FLAGS[device]


_POOLS: dict[torch.device, tuple[torch.Tensor, dict[int, torch.Tensor], list[int]]] = {}
_POOLS_LOCK = threading.Lock()


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` zeroed integers that only launches ordered after each other use.

    The kernel leaves them zeroed, so launches of one stream share a slice of the device's pool. A
    launch that is captured into a CUDA graph gets a slice of its own for good, since the graph may
    be replayed on any stream; replays write the same outputs, so whoever replays orders them. Where
    the pool is used up, or would have to be created under capture, the counters are a tensor of
    this call, zeroed on its stream: part of the graph, if it is captured. So the combine, and with
    it the bits of a result, never depends on how many counters a call needs.
    """
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    with _POOLS_LOCK:
        held = take_counters(device, count, stream, capturing)
    return torch.zeros(count, dtype=torch.int32, device=device) if held is None else held


def take_counters(
    device: torch.device, count: int, stream: int, capturing: bool
) -> torch.Tensor | None:
    """A slice of the pool, or None; the caller holds the lock."""
    if device not in _POOLS:
        if capturing:
            return None
        pool = torch.zeros(POOL_COUNTERS, dtype=torch.int32, device=device)
        if device.type == "cuda":  # once: any stream may use it from here on
            torch.cuda.current_stream(device).synchronize()
        _POOLS[device] = (pool, {}, [0])
    pool, by_stream, used = _POOLS[device]
    held = None if capturing else by_stream.get(stream)
    if held is not None and held.numel() >= count:
        return held
    # whole lines, so that the address is as aligned as that of a tensor: no kernel is compiled anew
    size = triton.cdiv(count, 32) * 32 if capturing else max(4096, triton.next_power_of_2(count))
    if used[0] + size > pool.numel():
        return None
    held = pool[used[0] : used[0] + size]
    used[0] += size
    if not capturing:
        by_stream[stream] = held
    return held


def clear_errors(device: torch.device | str) -> list[str]:
    """What the error flag of a device says, in words; clears it. Synchronises."""
    flag = error_flag(device)
    value = int(flag.item())
    flag.zero_()
    return [text for bit, text in ERRORS.items() if value & bit]


def max_registers(config: Config, headdim: int, page_size: int, append: bool) -> int | None:
    """Registers of a thread with which as many CTAs fit on an SM as shared memory allows.

    None, so ptxas chooses, where that is too few for what the kernel does.
    """
    if config.BLOCK_M > 16 or config.lanes > 1 or page_size % config.BLOCK_N or append:
        return None
    shared = (config.num_stages - 1) * config.BLOCK_N * 4 * headdim + 8192
    threads = 32 * config.num_warps * max(1, SHARED_OF_AN_SM // shared)
    return min(255, 65536 // threads // 8 * 8)


def launch(
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
    max_seqlen_q: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels; shapes must be right, values need not be.

    Args:
        q: (batch, seqlen_q, nheads, headdim); VARLEN: (total_q, nheads, headdim).
        k, v: (rows, capacity, nheads_k, headdim); VARLEN: (total_k, nheads_k, headdim); with a
            block table (num_pages, page_size, nheads_k, headdim). The last dimension contiguous.
        mode: CACHE, RANGE or VARLEN.
        bounds: int32. CACHE: keys stored (batch,). RANGE: first key, end of the keys, position of
            the first query (batch, 3). VARLEN: cu_seqlens_k (batch + 1,).
        index: int32. CACHE: row of the cache (batch,) or None. VARLEN: cu_seqlens_q (batch + 1,).
        block_table: int32 (batch, pages of a sequence), pages in order, or None.
        k_new, v_new: (batch, seqlen_new, nheads_k, headdim), appended in place, or None.
        max_seqlen_q: longest sequence of queries (VARLEN).

    Returns: out like q, contiguous, and the natural-log log-sum-exp, fp32: (batch, nheads,
        seqlen_q), VARLEN: (nheads, total_q).
    """
    ragged = mode == VARLEN
    batch = bounds.shape[0] - 1 if ragged else q.shape[0]
    seqlen_q, nheads, headdim = q.shape[-3:]
    longest = max_seqlen_q if ragged else seqlen_q
    nheads_k = k.shape[-2]
    if config is None:
        config = plan(longest, nheads, nheads_k, headdim)
    page_size = 0 if block_table is None else k.shape[1]
    num_rows = 1 if ragged else k.shape[0]
    capacity = k.shape[-3]
    if block_table is not None:
        capacity = block_table.shape[1] * page_size if num_rows else 0
    seqlen_new = 0 if k_new is None else k_new.shape[1]
    group = nheads // nheads_k
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (nheads, seqlen_q) if ragged else (batch, nheads, seqlen_q)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    num_splits = 1
    if not ragged:
        num_splits = max(1, min(config.max_splits, triton.cdiv(capacity, config.min_split)))
    grid = (nheads_k * num_splits * batch, triton.cdiv(longest * group, config.BLOCK_M))
    fused = num_splits > 1 and config.BLOCK_M == 16
    counter = counters(q.device, batch * nheads_k * grid[1]) if fused else bounds
    partial = partial_lse = lse
    if num_splits > 1:
        rows = (batch, num_splits, seqlen_q, nheads)
        partial = torch.empty((*rows, headdim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(rows, dtype=torch.float32, device=q.device)

    def strides(x: torch.Tensor) -> tuple[int, ...]:
        return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]

    new_k, new_v = (k, v) if k_new is None or v_new is None else (k_new, v_new)
    bound_args = (bounds, bounds if index is None else index)
    out_strides = (*strides(out), 0 if ragged else lse.stride(0), lse.stride(-2))
    # the pipeliner halves the depth where the address of a load is loaded in the same iteration
    num_stages = config.num_stages
    if page_size % config.BLOCK_N != 0:
        num_stages = 2 * num_stages - 1
    splitting = (1 if ragged else config.max_splits, config.min_split)
    policy = {
        "MODE": mode, "CAUSAL": causal, "INDEXED": index is not None and not ragged,
        "BLOCK_N": config.BLOCK_N, "HEADDIM": headdim, "CHUNK": CHUNK,
    }  # fmt: skip
    split_kernel[grid](
        q, k, v, new_k, new_v, out, lse, partial, partial_lse, *bound_args,
        bounds if block_table is None else block_table, error_flag(q.device), counter,
        *strides(q), *strides(k), *strides(v), *strides(new_k), *strides(new_v), *out_strides,
        0 if block_table is None else block_table.stride(0),
        seqlen_q, longest, seqlen_new, capacity, num_rows, num_splits, *splitting, nheads_k,
        scale * LOG2_E, SPLIT=num_splits > 1, FUSED=fused, GROUP=group, APPEND=k_new is not None,
        PAGE_SIZE=page_size, BLOCK_M=config.BLOCK_M, LANES=config.lanes,
        ROWS=min(COMBINED_ROWS, triton.next_power_of_2(longest * group)),
        num_warps=config.num_warps, num_stages=num_stages,
        maxnreg=max_registers(config, headdim, page_size, k_new is not None), **policy,
    )  # fmt: skip
    if num_splits > 1 and not fused:
        combine_kernel[(batch * seqlen_q * nheads,)](
            out, lse, partial, partial_lse, *bound_args, *out_strides,
            seqlen_q, seqlen_new, capacity, num_rows, num_splits, *splitting, nheads,
            num_warps=4, **policy,
        )  # fmt: skip
    return out, lse
