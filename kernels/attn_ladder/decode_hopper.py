"""Attention of a few query tokens over a KV cache, for sm_90: one persistent kernel.

The work and its policy are those of `decode.py`: the query heads that share a key head and the
query tokens are the rows of one tile (row = token * group + head in group, at most 16), the keys
of a sequence are split, and the CTA that finishes a sequence's last split combines them. What
differs is that nothing starts or ends while memory is read:

- A CTA works through a list of items, one (sequence, key head, split) each; item t, t + number of
  CTAs, … . Which sequence an item belongs to follows from a table of the sequences' numbers of
  splits, summed up, that every CTA makes at its start.
- A producer warp loads K and V by TMA into a ring of blocks and runs ahead into the next items, as
  far as the ring is deep; so the loads never stop for a softmax, a merge or a combine.
- Four consumer warps ("lanes") share a block: each has a quarter of its keys, with a maximum, sum
  and accumulator of its own, so no warp waits for another one's scores. The lanes are merged
  once an item, through the slot of the ring that held its last block.

Split policy, fixed: a sequence of n keys is cut into splits of

    max(min_split, ceil(ceil(n / max_splits) / BLOCK_N) * BLOCK_N)   keys,

with max_splits the largest power of two that gives a sequence at most 256 items. The order of all
sums follows from the length alone, so the output of a sequence is bitwise the same alone and inside
any batch, paged or not.

Keys beyond a sequence's length may be NaN: their scores are masked, and their values are zeroed in
registers. TMA reads nothing outside the tensors: pages that are not needed or do not exist are read
as zeros. Errors, partial results and counters are as `decode.py` describes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.runtime import driver

from attn_ladder import launch
from attn_ladder.decode import EVERY_KEY, TARGET_CTAS, counters, error_flag
from attn_ladder.warpgroup import barriers, either, exp2

LANES = gl.constexpr(4)  # warps of the consumer, each with its own keys of a block
ROWS = gl.constexpr(16)  # packed query rows of a tile
COLUMNS = gl.constexpr(64)  # of a TMA box: 128 bytes, the width of the swizzle
CHUNK = gl.constexpr(16)  # splits that the combine has in flight at once
COMBINED_ROWS = gl.constexpr(4)  # of a tile that it handles at once
EVERY = gl.constexpr(EVERY_KEY)  # position of a query that sees all keys
LN_2 = gl.constexpr(0.6931471805599453)
BATCHES = (128, 1024)  # sizes of the table of sequences
PAGE_SIZES = (0, 16, 64, 256)
REGISTERS = 128  # of a thread at launch: 256 threads, two CTAs on an SM
PRODUCER_REGISTERS = gl.constexpr(48)  # the consumer gets what is left, 208


@dataclass(frozen=True)
class Config:
    """Blocks of BLOCK_N keys, a ring of `num_buffers` of them (K and V), `ctas_per_sm` CTAs on each
    SM; splits have at least `min_split` keys."""

    BLOCK_N: int = 64
    num_buffers: int = 3
    ctas_per_sm: int = 2
    min_split: int = 256

    def __post_init__(self) -> None:
        if self.BLOCK_N not in (64, 128):
            raise ValueError(f"BLOCK_N={self.BLOCK_N} must be 64 or 128")
        if self.num_buffers < 2 or self.ctas_per_sm not in (1, 2):
            raise ValueError(f"{self} needs num_buffers >= 2 and ctas_per_sm of 1 or 2")
        if self.min_split < 1 or self.min_split % self.BLOCK_N:
            raise ValueError(f"min_split={self.min_split} must be a multiple of {self.BLOCK_N=}")


@dataclass(frozen=True)
class Build:
    """What the kernel is compiled for; a cache without pages has page_size 0."""

    headdim: int
    page_size: int
    indexed: bool
    batch: int  # sequences in the table, at most
    BLOCK_N: int
    num_buffers: int

    @property
    def box(self) -> int:
        """Keys of a TMA box: no more than a page holds."""
        return min(self.page_size or self.BLOCK_N, self.BLOCK_N)

    @property
    def boxes(self) -> int:
        """Boxes of the same columns in a block."""
        return self.BLOCK_N // self.box

    @property
    def parts(self) -> int:
        """Boxes next to each other in a row."""
        return self.headdim // 64


class Call(NamedTuple):
    """The call as the kernel sees it; strides of q in units of 8 elements."""

    batch: int
    seqlen_q: int
    group: int
    nheads_k: int
    capacity: int  # keys of a sequence
    num_rows: int  # rows of the cache, or pages
    num_splits: int  # for which there is room
    max_splits: int
    min_split: int
    causal: int
    stride_qb: int
    stride_qm: int
    stride_qh: int
    stride_tb: int


@gluon.constexpr_function
def scores_layout():
    """Layout of [LANES, ROWS, columns]: every warp has the 16 rows of its lane."""
    return gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def merge_layout(outer, columns):
    """Layout of [outer, rows, columns]: `outer` within threads, a row within a warp."""
    return gl.BlockedLayout([outer, 1, columns // 32], [1, 1, 32], [1, 4, 1], [2, 1, 0])


@gluon.constexpr_function
def table_layout(size, warps):
    """Layout of [size]: each warp has all of it, so that no warp waits for another one."""
    bases = [[1 << i] for i in range(size.bit_length() - 1)]
    registers, lanes = [*bases[:2], *bases[7:]], bases[2:7]
    return gl.DistributedLinearLayout(
        registers, lanes, [[0]] * (warps.bit_length() - 1), [], [size]
    )


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def along(AXIS: gl.constexpr, SIZE: gl.constexpr, layout: gl.constexpr):
    """0, 1, … along an axis of three, [1, SIZE, 1] for AXIS 1."""
    FIRST: gl.constexpr = 0 if AXIS > 0 else 1
    SECOND: gl.constexpr = 2 if AXIS < 2 else 1
    x = gl.arange(0, SIZE, gl.SliceLayout(FIRST, gl.SliceLayout(SECOND, layout)))
    return gl.expand_dims(gl.expand_dims(x, FIRST), SECOND)


@gluon.jit
def split_length(length, call, cfg: gl.constexpr):
    """Keys of a split of a sequence of `length` keys."""
    share = (length + call.max_splits - 1) // call.max_splits
    return gl.maximum(call.min_split, (share + cfg.BLOCK_N - 1) // cfg.BLOCK_N * cfg.BLOCK_N)


@gluon.jit
def load_bounds(bounds_ptr, index_ptr, call, cfg: gl.constexpr):
    """Length and cache row of each sequence, as they are in memory."""
    layout: gl.constexpr = gl.BlockedLayout([cfg.batch // 128], [32], [4], [0])
    sequence = gl.arange(0, cfg.batch, layout)
    length = gl.load(bounds_ptr + sequence, mask=sequence < call.batch, other=0)
    row = sequence
    if cfg.indexed:
        row = gl.load(index_ptr + sequence, mask=sequence < call.batch, other=0)
    return sequence, length, row


@gluon.jit
def make_tables(sequence, length, row, call, cfg: gl.constexpr):
    """Of each sequence: splits up to and with its own, length or minus the error, cache row."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    error = gl.where((length < 0) | (length > call.capacity), 1, 0)
    if cfg.indexed:
        error = error | gl.where((row < 0) | (row >= call.num_rows), 4, 0)
    length = gl.where(error != 0, 0, length)
    keys = split_length(length, call, cfg)
    parts = gl.where(sequence < call.batch, gl.maximum((length + keys - 1) // keys, 1), 0)
    tables = gl.allocate_shared_memory(gl.int32, [3, cfg.batch], plain)
    tables.index(0).store(gl.associative_scan(parts, 0, add))
    tables.index(1).store(gl.where(error != 0, -error, length))
    tables.index(2).store(gl.where(error != 0, 0, row))
    return tables


@gluon.jit
def entry(table, i, WARPS: gl.constexpr, cfg: gl.constexpr):
    """Number i of a table."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    one = table._reinterpret(gl.int32, [cfg.batch, 1], plain).index(i)
    return gl.max(one.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def number_of_items(tables, call, WARPS: gl.constexpr, cfg: gl.constexpr):
    return entry(tables.index(0), cfg.batch - 1, WARPS, cfg) * call.nheads_k


@gluon.jit
def find_item(t, tables, call, WARPS: gl.constexpr, cfg: gl.constexpr):
    """(sequence, key head, split, number of splits, first key, end of the keys, length, cache row,
    error) of item t: heads first, so that neighbours in memory are read together."""
    layout: gl.constexpr = table_layout(cfg.batch, WARPS)
    place = t // call.nheads_k
    head = t - place * call.nheads_k
    ends = tables.index(0).load(layout)
    before = ends <= place
    b = gl.sum(before.to(gl.int32), 0)
    split = place - gl.max(gl.where(before, ends, 0), 0)
    length = entry(tables.index(1), b, WARPS, cfg)
    row = entry(tables.index(2), b, WARPS, cfg)
    error = gl.maximum(-length, 0)
    length = gl.maximum(length, 0)
    keys = split_length(length, call, cfg)
    start = split * keys
    parts = gl.maximum((length + keys - 1) // keys, 1)
    return b, head, split, parts, start, gl.minimum(start + keys, length), length, row, error


@gluon.jit
def prefetch_queries(q_ptr, b, head, call, cfg: gl.constexpr):
    """Bring the packed rows into L2: under load, memory takes longer than a block's products."""
    LINES: gl.constexpr = cfg.headdim // 64  # of 128 bytes
    line = gl.arange(0, ROWS * LINES, gl.BlockedLayout([1], [32], [1], [0]))
    row = gl.minimum(line // LINES, call.seqlen_q * call.group - 1)
    first = b.to(gl.int64) * call.stride_qb + (head * call.group).to(gl.int64) * call.stride_qh
    rows = row // call.group * call.stride_qm + row % call.group * call.stride_qh
    address = (q_ptr + first * 8 + (rows * 8 + line % LINES * 64)).to(gl.int64)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_partition(given, cfg: gl.constexpr):
    """One warp: the blocks of all items of this CTA, into the ring as slots come free.

    An item has at least one block, so that an empty sequence takes the same way.
    """
    descs, q_ptr, table_ptr, tables, ring, call = given
    smem, ready_bar, empty_bar = ring
    N: gl.constexpr = cfg.BLOCK_N
    BOXES: gl.constexpr = cfg.boxes
    PARTS: gl.constexpr = cfg.parts
    warp: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    box = gl.arange(0, 32, warp)
    pages = gl.zeros([32], gl.int32, warp)
    it = 0
    for t in range(gl.program_id(0), number_of_items(tables, call, 1, cfg), gl.num_programs(0)):
        b, head, _, _, start, stop, _, row, _ = find_item(t, tables, call, 1, cfg)
        prefetch_queries(q_ptr, b, head, call, cfg)
        sequence_ptr = table_ptr + b.to(gl.int64) * call.stride_tb
        for j in range(gl.maximum((stop - start + N - 1) // N, 1)):
            if cfg.page_size != 0:
                if j % (32 // BOXES) == 0:  # the pages of the next 32 boxes
                    key = start + j * N + box * cfg.box
                    outside = call.num_rows
                    page_ptr = sequence_ptr + key // cfg.page_size
                    pages = gl.load(page_ptr, mask=key < stop, other=outside)
                    pages = gl.where((pages < 0) | (pages > outside), outside, pages)
            slot = it % cfg.num_buffers
            mbarrier.wait(empty_bar.index(slot), (it // cfg.num_buffers) & 1 ^ 1)
            mbarrier.expect(ready_bar.index(slot), 4 * N * cfg.headdim)
            for i in gl.static_range(BOXES):
                first = start + j * N
                if cfg.page_size != 0:
                    row = gl.sum(gl.where(box == j * BOXES % 32 + i, pages, 0), 0)
                    first = (first + i * cfg.box) % cfg.page_size
                for kv in gl.static_range(2):
                    for part in gl.static_range(PARTS):
                        tma.async_copy_global_to_shared(
                            descs[kv], [row, first, head, part * COLUMNS], ready_bar.index(slot),
                            smem.index(((slot * 2 + kv) * PARTS + part) * BOXES + i),
                        )  # fmt: skip
            it += 1


@gluon.jit
def load_queries(q_ptr, b, head, call, cfg: gl.constexpr):
    """[LANES, ROWS, headdim]: the packed rows, for every lane, as an operand of its products."""
    layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout(), 2)
    row = along(1, ROWS, layout) + 0 * along(0, LANES, layout)
    first = b.to(gl.int64) * call.stride_qb + (head * call.group).to(gl.int64) * call.stride_qh
    rows = row // call.group * call.stride_qm + row % call.group * call.stride_qh
    return gl.load(
        gl.multiple_of(q_ptr + first * 8, 16) + (rows * 8 + along(2, cfg.headdim, layout)),
        mask=row < call.seqlen_q * call.group, other=0.0,
    )  # fmt: skip


@gluon.jit
def thread_sums(x):
    """[LANES, ROWS, columns] to [LANES, ROWS, 8]: sums within each thread, without a shuffle."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 8, 8]), 2)


@gluon.jit
def key_block(
    q, acc, l_i, m_i, blocks, ring, it, start_n, rows_seen, stop, keep, qk_scale,
    MASKED: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the block of the ring at step `it`; frees it but `keep`.

    q [LANES, ROWS, headdim], acc likewise, l_i [LANES, ROWS, 8], m_i [LANES, ROWS]. Row m sees the
    keys below rows_seen[0, m, 0]; keys from `stop` on may be anything.
    """
    SHARE: gl.constexpr = cfg.BLOCK_N // LANES
    layout: gl.constexpr = scores_layout()
    k_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    slot = it % cfg.num_buffers
    mbarrier.wait(ring[1].index(slot), (it // cfg.num_buffers) & 1)
    k = blocks.index(slot * 2).permute((0, 2, 1)).load(k_layout)  # [LANES, headdim, SHARE]
    s = mma_v2(q, k, gl.zeros([LANES, ROWS, SHARE], gl.float32, layout))
    if MASKED:
        key = start_n + along(0, LANES, layout) * SHARE + along(2, SHARE, layout)
        s = gl.where(key < rows_seen, s, -float("inf"))
    m_next = gl.maximum(m_i, gl.max(s, 2))
    m_safe = m_next
    if MASKED:
        m_safe = gl.where(m_next == -float("inf"), 0.0, m_next)  # a row without a key so far
    p = exp2(s * qk_scale - gl.expand_dims(m_safe * qk_scale, 2))
    alpha = gl.expand_dims(exp2((m_i - m_safe) * qk_scale), 2)
    sums = thread_sums(p)
    l_i = l_i * gl.convert_layout(alpha, l_i.type.layout) + sums
    v = blocks.index(slot * 2 + 1).load(k_layout)  # [LANES, SHARE, headdim]
    if MASKED:
        key = start_n + along(0, LANES, k_layout) * SHARE + along(1, SHARE, k_layout)
        v = gl.where(key < stop, v, gl.zeros_like(v))
    p = gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, layout, 2))
    acc = mma_v2(p, v, acc * alpha)
    mbarrier.arrive(ring[2].index(slot), count=1, pred=keep == 0)
    return acc, l_i, m_next


@gluon.jit
def merge(acc, l_i, m_i, scratch, lanes_smem, qk_scale, cfg: gl.constexpr):
    """The lanes' results as one: the mean [ROWS, headdim] and its log-sum-exp, base 2, [ROWS]."""
    layout: gl.constexpr = merge_layout(LANES.value, cfg.headdim)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, layout))
    gl.thread_barrier()  # all warps have read the block that `scratch` overwrites
    scratch.store(acc)
    lanes_smem.index(0).store(m_i)
    lanes_smem.index(1).store(gl.convert_layout(gl.sum(l_i, 2), m_i.type.layout))
    gl.thread_barrier()
    m = lanes_smem.index(0).load(gl.SliceLayout(2, layout))  # [LANES, ROWS]
    m_all = gl.max(m, 0)
    m_safe = gl.where(m_all == -float("inf"), 0.0, m_all)
    weight = exp2((m - gl.expand_dims(m_safe, 0)) * qk_scale)
    total = gl.sum(weight * lanes_smem.index(1).load(gl.SliceLayout(2, layout)), 0)
    mean = gl.sum(gl.expand_dims(weight, 2) * scratch.load(layout), 0)
    total = gl.convert_layout(total, rows)
    m_safe = gl.convert_layout(m_safe, rows)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = gl.where(empty, -float("inf"), m_safe * qk_scale + gl.log2(total))
    return mean / gl.expand_dims(total, 1), lse


@gluon.jit
def store_rows(
    mean, lse, row, first_row, inside, out_ptr, lse_ptr, head, call, cfg: gl.constexpr
):  # fmt: skip
    """Write packed rows of the result, and their log-sum-exp, base 2, as a natural one."""
    nheads = call.nheads_k * call.group
    token = row // call.group
    head_q = head * call.group + row % call.group
    offs_d = gl.arange(0, cfg.headdim, gl.SliceLayout(0, mean.type.layout))
    out_ptr = gl.multiple_of(out_ptr + first_row * cfg.headdim, 16)
    offsets = gl.expand_dims((token * nheads + head_q) * cfg.headdim, 1)
    gl.store(
        out_ptr + (offsets + gl.expand_dims(offs_d, 0)), mean.to(out_ptr.dtype.element_ty),
        mask=gl.expand_dims(inside, 1),
    )  # fmt: skip
    lse_ptr += first_row
    gl.store(lse_ptr + head_q * call.seqlen_q + token, lse * LN_2, mask=inside)


@gluon.jit
def store_split(
    mean, lse, row, inside, partial_ptr, partial_lse_ptr, b, head, split, call, cfg: gl.constexpr
):  # fmt: skip
    """Write packed rows of a partial result: (batch, num_splits, seqlen_q, nheads, headdim)."""
    nheads = call.nheads_k * call.group
    first = (b.to(gl.int64) * call.num_splits + split) * call.seqlen_q * nheads
    place = row // call.group * nheads + head * call.group + row % call.group
    offs_d = gl.arange(0, cfg.headdim, gl.SliceLayout(0, mean.type.layout))
    partial_ptr = gl.multiple_of(partial_ptr + first * cfg.headdim, 16)
    offsets = gl.expand_dims(place * cfg.headdim, 1) + gl.expand_dims(offs_d, 0)
    gl.store(partial_ptr + offsets, mean, mask=gl.expand_dims(inside, 1))
    gl.store(partial_lse_ptr + first + place, lse, mask=inside)


@gluon.jit
def combine(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, b, head, parts, call, cfg: gl.constexpr
):  # fmt: skip
    """The softmax-weighted mean of a sequence's partial results, for one key head.

    CHUNK splits at a time, whose loads are in flight together, in order. `.cg`: other CTAs wrote.
    """
    layout: gl.constexpr = merge_layout(CHUNK.value, cfg.headdim)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, layout))
    tile_rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    splits: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, layout))
    wide: gl.constexpr = gl.SliceLayout(0, layout)
    HEADDIM: gl.constexpr = cfg.headdim
    offs_d = along(2, HEADDIM, layout)
    nheads = call.nheads_k * call.group
    step = call.seqlen_q * nheads
    first = b.to(gl.int64) * call.num_splits * step
    partial_ptr = gl.multiple_of(partial_ptr + first * cfg.headdim, 16)
    partial_lse_ptr += first
    for start_m in range(0, call.seqlen_q * call.group, COMBINED_ROWS):
        row = start_m + gl.arange(0, COMBINED_ROWS, tile_rows)
        inside = gl.expand_dims(row < call.seqlen_q * call.group, 0)
        places = gl.expand_dims(row // call.group * nheads + row % call.group, 0)
        m_i = gl.full([COMBINED_ROWS], -float("inf"), gl.float32, tile_rows)
        l_i = gl.zeros([COMBINED_ROWS], gl.float32, tile_rows)
        acc = gl.zeros([COMBINED_ROWS, HEADDIM], gl.float32, wide)
        for start_s in range(0, parts, CHUNK):
            split = gl.expand_dims(start_s + gl.arange(0, CHUNK, splits), 1)
            place = split * step + places + head * call.group  # [CHUNK, COMBINED_ROWS]
            mask = (split < parts) & inside
            lse = gl.load(
                partial_lse_ptr + place, mask=mask, other=-float("inf"), cache_modifier=".cg"
            )
            partial = gl.load(
                partial_ptr + (gl.expand_dims(place * HEADDIM, 2) + offs_d),
                mask=gl.expand_dims(mask, 2), other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            m_next = gl.maximum(m_i, gl.max(lse, 0))
            m_safe = gl.where(m_next == -float("inf"), 0.0, m_next)
            weight = exp2(lse - gl.expand_dims(m_safe, 0))
            alpha = exp2(m_i - m_safe)
            alpha_rows = gl.expand_dims(gl.convert_layout(alpha, rows), 1)
            acc = acc * alpha_rows + gl.sum(gl.expand_dims(weight, 2) * partial, 0)
            l_i = l_i * alpha + gl.sum(weight, 0)
            m_i = m_next
        empty = l_i == 0.0
        total = gl.where(empty, 1.0, l_i)
        lse = gl.convert_layout(gl.where(empty, -float("inf"), m_i + gl.log2(total)), rows)
        mean = acc / gl.expand_dims(gl.convert_layout(total, rows), 1)
        row = gl.convert_layout(row, rows)
        first_row = b.to(gl.int64) * step
        inside_rows = row < call.seqlen_q * call.group
        store_rows(mean, lse, row, first_row, inside_rows, out_ptr, lse_ptr, head, call, cfg)


@gluon.jit
def bad_pages(table_ptr, b, start, stop, call, cfg: gl.constexpr):
    """For each thread, whether a page of these keys does not exist."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    table_ptr += b.to(gl.int64) * call.stride_tb
    bad = gl.zeros([128], gl.int32, layout)
    if cfg.page_size != 0:
        end = (stop + cfg.page_size - 1) // cfg.page_size
        for first in range(start // cfg.page_size, end, 128):
            place = first + gl.arange(0, 128, layout)
            page = gl.load(table_ptr + place, mask=place < end, other=0)
            bad = bad | gl.where((page < 0) | (page >= call.num_rows), 1, 0)
    return bad


@gluon.jit
def softmax_partition(given, cfg: gl.constexpr):
    """Four warps: the attention of the items of this CTA, block by block."""
    pointers, table_ptr, tables, ring, views, call, qk_scale = given
    q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, error_ptr, counter_ptr = pointers
    blocks, scratch, lanes_smem = views
    N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    layout: gl.constexpr = scores_layout()
    zeros = gl.zeros([LANES, ROWS, N // LANES], gl.float32, layout)
    sums_layout: gl.constexpr = thread_sums(zeros).type.layout
    num_rows = call.seqlen_q * call.group
    nheads = call.nheads_k * call.group
    it = 0
    for t in range(gl.program_id(0), number_of_items(tables, call, LANES, cfg), gl.num_programs(0)):
        b, head, split, parts, start, stop, length, _, error = find_item(
            t, tables, call, LANES, cfg
        )
        q = load_queries(q_ptr, b, head, call, cfg)
        bad = bad_pages(table_ptr, b, start, stop, call, cfg)

        # keys below start + full * N are seen by every row
        position = gl.where(call.causal != 0, length - call.seqlen_q, EVERY)
        rows_seen = gl.minimum(stop, position + along(1, ROWS, layout) // call.group + 1)
        full = gl.maximum(gl.minimum(stop, position + 1) - start, 0) // N
        num_blocks = gl.maximum((stop - start + N - 1) // N, 1)
        m_i = gl.full([LANES, ROWS], -float("inf"), gl.float32, gl.SliceLayout(2, layout))
        l_i = gl.zeros([LANES, ROWS, 8], gl.float32, sums_layout)
        acc = gl.zeros([LANES, ROWS, HEADDIM], gl.float32, layout)
        for j in range(full):
            keep = (j == num_blocks - 1).to(gl.int32)
            acc, l_i, m_i = key_block(
                q, acc, l_i, m_i, blocks, ring, it, start + j * N, rows_seen, stop, keep, qk_scale,
                False, cfg,
            )  # fmt: skip
            it += 1
        for j in range(full, num_blocks):
            keep = (j == num_blocks - 1).to(gl.int32)
            acc, l_i, m_i = key_block(
                q, acc, l_i, m_i, blocks, ring, it, start + j * N, rows_seen, stop, keep, qk_scale,
                True, cfg,
            )  # fmt: skip
            it += 1

        slot = (it - 1) % cfg.num_buffers
        mean, lse = merge(
            acc, l_i, m_i, scratch.index(slot * (N // 64)), lanes_smem, qk_scale, cfg
        )  # fmt: skip
        fence_async_shared()  # the slot was written here, and TMA writes it next
        mbarrier.arrive(ring[2].index(slot), count=1)
        if cfg.page_size != 0:
            error = error | gl.reduce(bad, 0, either) * 2
        if error != 0:
            gl.atomic_or(error_ptr, error)
        poison = gl.where(error != 0, float("nan"), 0.0)
        mean += poison
        lse += poison
        row = gl.arange(0, ROWS, lse.type.layout)
        inside = row < num_rows
        if parts == 1:
            first_row = b.to(gl.int64) * call.seqlen_q * nheads
            store_rows(mean, lse, row, first_row, inside, out_ptr, lse_ptr, head, call, cfg)
        else:
            store_split(
                mean, lse, row, inside, partial_ptr, partial_lse_ptr, b, head, split, call, cfg
            )  # fmt: skip
            arrivals_ptr = counter_ptr + b * call.nheads_k + head
            gl.thread_barrier()
            arrived = gl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") + 1
            if arrived == parts:
                combine(
                    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, b, head, parts, call, cfg
                )  # fmt: skip
                gl.store(arrivals_ptr, 0)  # for the next launch


@gluon.jit
def decode_kernel(
    k_desc, v_desc, q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, bounds_ptr, index_ptr,
    table_ptr, error_ptr, counter_ptr, call, qk_scale, cfg: gl.constexpr,
):  # fmt: skip
    DEPTH: gl.constexpr = cfg.num_buffers
    HEADDIM: gl.constexpr = cfg.headdim
    dtype: gl.constexpr = k_desc.dtype
    # loaded first, so that the latency passes while the barriers are made
    sequence, length, row = load_bounds(bounds_ptr, index_ptr, call, cfg)
    # a slot is K and V; each [parts][BLOCK_N][64], which is how [BLOCK_N, headdim] is swizzled
    smem = gl.allocate_shared_memory(
        dtype, [DEPTH * 2 * cfg.parts * cfg.boxes, 1, cfg.box, 1, COLUMNS], k_desc.layout
    )
    ring = (smem, barriers(DEPTH, 1), barriers(DEPTH, 1))
    block: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    blocks = smem._reinterpret(dtype, [DEPTH * 2, LANES, cfg.BLOCK_N // LANES, HEADDIM], block)
    wide: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])
    scratch = smem._reinterpret(gl.float32, [DEPTH * cfg.BLOCK_N // 64, LANES, ROWS, HEADDIM], wide)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lanes_smem = gl.allocate_shared_memory(gl.float32, [2, LANES, ROWS], plain)
    tables = make_tables(sequence, length, row, call, cfg)
    pointers = (q_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, error_ptr, counter_ptr)
    softmax = (pointers, table_ptr, tables, ring, (blocks, scratch, lanes_smem), call, qk_scale)
    load = ((k_desc, v_desc), q_ptr, table_ptr, tables, ring, call)
    gl.warp_specialize(
        [(softmax_partition, (softmax, cfg)), (load_partition, (load, cfg))],
        [1], [PRODUCER_REGISTERS],
    )  # fmt: skip


def source(cfg: Build, dtype: str) -> dict[str, Any]:
    """The kernel with the types of its arguments, as `attn_ladder.offline.Source` takes it."""
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, cfg.box, 1, 64], element)
    types: dict[str, Any] = {
        f"{name}_desc": f"tensordesc<{dtype}[1, {cfg.box}, 1, 64],{layout!r}>" for name in "kv"
    }
    types |= {f"{name}_ptr": f"*{dtype}" for name in ("q", "out")}
    types |= {f"{name}_ptr": "*fp32" for name in ("lse", "partial", "partial_lse")}
    types |= {f"{name}_ptr": "*i32" for name in ("bounds", "index", "table", "error", "counter")}
    types |= {"call": Call(*["i32"] * len(Call._fields)), "qk_scale": "fp32"}
    return dict(kernel=decode_kernel, signature=types, constexprs={"cfg": cfg})


def offline(dtype: str = "bf16", **build: Any) -> dict[str, Any]:
    """`source` from plain values, for `attn_ladder.offline.report`, which sets no limit of
    registers: what it shows is what one CTA on an SM could have."""
    return source(Build(**build), dtype)


class Kernel(launch.Kernel):
    """`launch.Kernel` with a limit of registers, so that two CTAs fit on an SM."""

    def __init__(
        self, kernel: Any, signature: dict[str, Any], constexprs: dict[str, Any], maxnreg: int
    ) -> None:
        names = kernel.arg_names
        types = {**signature, **dict.fromkeys(constexprs, "constexpr")}
        values = {(names.index(name),): value for name, value in constexprs.items()}
        self.compiled = triton.compile(
            GluonASTSource(kernel, {name: types[name] for name in names}, values, {}),
            target=driver.active.get_current_target(),
            options={"num_warps": 4, "maxnreg": maxnreg},
        )
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
    return Kernel(**source(cfg, launch.DTYPES[dtype]), maxnreg=REGISTERS)


def choose_config(headdim: int) -> Config:
    """Blocks of 32 KB, two rings on an SM: one CTA merges and combines while the other computes."""
    return Config(BLOCK_N=8192 // headdim)


def build(config: Config, headdim: int, page_size: int, indexed: bool, batch: int) -> Build:
    """What is compiled for a call. Raises `ValueError` where that is not possible."""
    if config.BLOCK_N * headdim > 8192:
        raise ValueError(f"{config} needs more registers than there are at {headdim=}")
    size = next(size for size in BATCHES if batch <= size)
    return Build(headdim, page_size, indexed, size, config.BLOCK_N, config.num_buffers)


def split_policy(nheads_k: int, capacity: int, config: Config) -> tuple[int, int]:
    """(most splits of a sequence, splits of one as long as the capacity at most)."""
    max_splits = 1
    while 2 * max_splits * nheads_k <= TARGET_CTAS:
        max_splits *= 2
    return max_splits, max(1, min(max_splits, triton.cdiv(capacity, config.min_split)))


@lru_cache(maxsize=1024)
def plan(
    config: Config | None, dtype: torch.dtype, device: int, causal: bool, indexed: bool,
    table: tuple[int, int] | None, q_size: tuple[int, ...], k_size: tuple[int, ...],
    q_strides: tuple[int, ...], k_strides: tuple[int, ...], v_strides: tuple[int, ...],
) -> tuple[Kernel, Callable[..., tuple[Any, ...]], Call, int, int]:  # fmt: skip
    """What calls that differ in addresses only share: the kernel, its tensor maps as a function of
    the addresses of k and v, the call, the number of CTAs, rows of partial results.

    `table`: pages of a sequence and the stride of the block table.
    """
    batch, seqlen_q, nheads, headdim = q_size
    num_rows, size, nheads_k, _ = k_size
    config = config or choose_config(headdim)
    page_size, capacity = (0, size) if table is None else (size, size * table[0])
    max_splits, num_splits = split_policy(nheads_k, capacity, config)
    call = Call(
        batch, seqlen_q, nheads // nheads_k, nheads_k, capacity, num_rows, num_splits, max_splits,
        config.min_split, int(causal), *(step // 8 for step in q_strides[:3]),
        0 if table is None else table[1],
    )  # fmt: skip
    kernel = compiled(build(config, headdim, page_size, indexed, batch), dtype, device)
    maps = kernel.tensor_maps(
        launch.Layout(0, k_size, k_strides), launch.Layout(1, k_size, v_strides)
    )
    grid = min(
        config.ctas_per_sm * launch.multiprocessors(device), batch * nheads_k * num_splits
    )  # fmt: skip
    rows = batch * num_splits * seqlen_q * nheads if num_splits > 1 else 0
    return kernel, maps, call, grid, rows


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bounds: torch.Tensor,
    index: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode.launch` in its mode CACHE without new keys, where `unsupported` gives None.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (rows, capacity, nheads_k, headdim), or (num_pages, page_size, nheads_k, headdim).
        bounds: keys stored, int32 (batch,), contiguous.
        index: row of the cache, int32 (batch,), contiguous, or None.
        block_table: int32 (batch, pages of a sequence), pages in order, or None.
        softmax_scale: positive; 1 / sqrt(headdim) if None.

    Returns: out like q, contiguous, and the natural-log log-sum-exp, fp32 (batch, nheads,
        seqlen_q). The device of q must be current.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    device = q.get_device()
    table = None if block_table is None else (block_table.shape[1], block_table.stride(0))
    kernel, maps, call, grid, rows = plan(
        config, q.dtype, device, causal, index is not None, table, q.shape, k.shape, q.stride(),
        k.stride(), v.stride(),
    )  # fmt: skip
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    partial = torch.empty(rows * (headdim + 1), dtype=torch.float32, device=q.device)
    counter = counters(q.device, batch * call.nheads_k) if rows else lse
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    sums = partial.data_ptr()
    pointers = (
        q.data_ptr(), out.data_ptr(), lse.data_ptr(), sums, sums + 4 * rows * headdim,
        bounds.data_ptr(), (bounds if index is None else index).data_ptr(),
        (bounds if block_table is None else block_table).data_ptr(),
        error_flag(q.device).data_ptr(), counter.data_ptr(),
    )  # fmt: skip
    stream = torch._C._cuda_getCurrentRawStream(device)
    descs = maps(k.data_ptr(), v.data_ptr())
    kernel.launch(grid, stream, (*descs, *pointers, call, scale * launch.LOG2_E, None))
    return out, lse


def unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_table: torch.Tensor | None,
    capability: tuple[int, int],
) -> str | None:
    """Why `forward` cannot run a call that `decode.launch` could, or None."""
    batch, seqlen_q, nheads, headdim = q.shape
    rows = seqlen_q * (nheads // k.shape[2])
    page_size = 0 if block_table is None else k.shape[1]
    capacity = k.shape[1] * (1 if block_table is None else block_table.shape[1])
    for fits, text in (
        (capability == (9, 0), f"needs compute capability 9.0, not {capability}"),
        (q.dtype in launch.ELEMENTS, f"needs fp16 or bf16, not {q.dtype}"),
        (headdim in (64, 128), f"supports headdim 64 and 128, not {headdim}"),
        (rows <= ROWS.value, f"packs {ROWS.value} query rows of a key head at most, not {rows}"),
        (batch <= BATCHES[-1], f"holds {BATCHES[-1]} sequences at most, not {batch}"),
        (page_size in PAGE_SIZES, f"supports pages of {PAGE_SIZES[1:]}, not {page_size}"),
        (capacity < EVERY_KEY, f"counts keys below {EVERY_KEY}, not {capacity}"),
        (block_table is None or block_table.stride(1) == 1, "needs contiguous rows of pages"),
    ):
        if not fits:
            return text
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = [step for n, step in zip(x.shape[:3], x.stride(), strict=False) if n > 1]
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(s <= 0 or s % 8 for s in steps):
            return f"needs {name} aligned to 16 bytes, with strides of a multiple of 16 bytes"
        if name == "q" and any(step >= 2**31 for step in steps):
            return "needs q to span less than 2^31 elements a dimension"
    return None
