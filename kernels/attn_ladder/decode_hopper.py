"""Attention of a few query tokens over a KV cache, for sm_90: one persistent kernel.

As in `decode.py`, the query heads that share a key head and the query tokens are the rows of one
tile (row = token * group + head in group, at most 16), the keys of a sequence are split, and the
CTA that finishes a sequence's last split combines them. What differs is that nothing starts or ends
while memory is read:

- A CTA works through a list of items, each some neighbouring splits of one sequence and key head;
  item t, t + number of CTAs, … . Which sequence an item belongs to follows from a table of the
  sequences' numbers of items, summed up, that every warp makes at its start, in its registers.
- A producer warp loads K and V by TMA into a ring of blocks and runs ahead into the next items, as
  far as the ring is deep; so the loads never stop for a softmax, a merge or a combine.
- Four consumer warps ("lanes") share a block: each has a quarter of its keys, with a maximum, sum
  and accumulator of its own, so no warp waits for another one's scores. The lanes are merged
  once a split.

Split policy, fixed: a sequence is cut into splits of min_split * 2^i keys, with the least i that
gives at most max_splits of them; max_splits is the largest power of two for which a sequence has at
most 256 splits in all key heads. Results of splits are added up in groups of GROUP, in order, and
the groups in order. Only who does it depends on the batch: with few splits each is an item, and the
CTA that ends a sequence's last one adds up all; with many an item is one or more groups, added up
in registers. Results are scaled by powers of two, which is exact. So all roundings follow from the
length alone, and the output of a sequence is bitwise the same alone and inside any batch, padded on
the left or not, paged or not.

Little code runs once: it comes from memory, with nothing to hide the latency, and 100 instructions
cost about 0.15 µs where the cache is cold.

Keys beyond a sequence's length may be NaN: their scores are masked, and their values are zeroed in
registers. TMA reads nothing outside the tensors: pages that are not needed or do not exist are read
as zeros. Errors, partial results and counters are as `decode.py` describes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from attn_ladder.decode import EVERY_KEY
from attn_ladder.warpgroup import barriers, either, exp2, opaque

LANES = gl.constexpr(4)  # warps of the consumer, each with its own keys of a block
ROWS = gl.constexpr(16)  # packed query rows of a tile
COLUMNS = gl.constexpr(64)  # of a TMA box: 128 bytes, the width of the swizzle
GROUP = gl.constexpr(4)  # splits whose results are added up before others
CHUNK = gl.constexpr(64)  # rows of results that the combine has in flight at once
EVERY = gl.constexpr(EVERY_KEY)  # position of a query that sees all keys
LN_2 = gl.constexpr(0.6931471805599453)
BATCHES = (32, 128, 512)  # sizes of the table of sequences
PAGE_SIZES = (0, 16, 64, 256)
REGISTERS = 128  # of a thread at launch: 256 threads, two CTAs on an SM
PRODUCER_REGISTERS = gl.constexpr(40)  # the consumer gets what is left, 216


@dataclass(frozen=True)
class Config:
    """Blocks of BLOCK_N keys, a ring of `num_buffers` of them (K and V), `ctas_per_sm` CTAs on each
    SM; splits have at least `min_split` keys; `evict_first` says whether L2 gives up the keys that
    were read before anything else."""

    BLOCK_N: int = 64
    num_buffers: int = 2
    ctas_per_sm: int = 2
    min_split: int = 512
    evict_first: bool = True

    def __post_init__(self) -> None:
        if self.BLOCK_N not in (64, 128):
            raise ValueError(f"BLOCK_N={self.BLOCK_N} must be 64 or 128")
        if self.num_buffers < 2 or self.ctas_per_sm not in (1, 2):
            raise ValueError(f"{self} needs num_buffers >= 2 and ctas_per_sm of 1 or 2")
        if self.min_split < self.BLOCK_N or self.min_split & (self.min_split - 1):
            raise ValueError(
                f"min_split={self.min_split} must be a power of two of at least {self.BLOCK_N=}"
            )


@dataclass(frozen=True)
class Build:
    """What the kernel is compiled for; a cache without pages has page_size 0."""

    headdim: int
    page_size: int
    ranged: bool  # bounds are those of `decode.RANGE`, not of `decode.CACHE`
    indexed: bool
    batch: int  # sequences in the table, at most
    rows: int  # packed query rows, at most
    BLOCK_N: int
    num_buffers: int
    policy: str = ""  # of L2, in PTX; what `decode_launch` does with it, and a part of its key

    @property
    def box(self) -> int:
        """Keys of a TMA box: no more than a page holds."""
        return min(self.page_size or self.BLOCK_N, self.BLOCK_N)

    @property
    def boxes(self) -> int:
        """Boxes of the same columns in a block."""
        return self.BLOCK_N // self.box

    @property
    def marks(self) -> int:
        """Items whose bad pages are remembered: more than the ring has blocks of."""
        return 4 if self.num_buffers < 4 else 2 ** self.num_buffers.bit_length()

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
    inverse_group: int  # 2^16 over it, rounded up: x // group is x * inverse_group >> 16
    inverse_heads: int
    seqlen_new: int  # keys stored beyond the bounds
    capacity: int  # keys of a sequence
    num_rows: int  # rows of the cache, or pages
    num_splits: int  # for which there is room
    log2_splits: int  # of the most that a sequence has
    log2_min_split: int
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
    return gl.BlockedLayout([size // 32], [32], [warps], [0])


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
def log2_keys(length, call):
    """Log2 of the keys of a split of a sequence of `length` keys."""
    share = (length + (1 << call.log2_splits) - 1) >> call.log2_splits
    zeros = gl.inline_asm_elementwise(
        "clz.b32 $0, $1;", "=r,r", [gl.maximum(share, 1) - 1], dtype=gl.int32, is_pure=True, pack=1
    )
    return gl.maximum(call.log2_min_split, 32 - zeros)


@gluon.jit
def splits_of(length, call):
    """Splits of a sequence of `length` keys."""
    log2 = log2_keys(length, call)
    return gl.maximum((length + (1 << log2) - 1) >> log2, 1)


@gluon.jit
def bounds_of(b, bounds_ptr, index_ptr, inside, call, cfg: gl.constexpr):
    """(first key, number of keys, position of the first query among them, cache row, error) of
    sequences; in error there are no keys, and the row is 0."""
    row = b
    if cfg.ranged:
        first = gl.load(bounds_ptr + 3 * b, mask=inside, other=0)
        end = gl.load(bounds_ptr + 3 * b + 1, mask=inside, other=0)
        length = end - first
        position = gl.load(bounds_ptr + 3 * b + 2, mask=inside, other=0) - first
        error = gl.where((first < 0) | (end < first) | (end > call.capacity), 16, 0)
    else:
        first = 0 * b
        stored = gl.load(bounds_ptr + b, mask=inside, other=0)
        error = gl.where((stored < 0) | (stored > call.capacity - call.seqlen_new), 1, 0)
        length = stored + call.seqlen_new
        position = length - call.seqlen_q
    if cfg.indexed:
        row = gl.load(index_ptr + b, mask=inside, other=0)
        error = error | gl.where((row < 0) | (row >= call.num_rows), 4, 0)
    length = gl.where(error != 0, 0, length)
    return first, length, position, gl.where(error != 0, 0, row), error


@gluon.jit
def make_table(bounds_ptr, index_ptr, call, WARPS: gl.constexpr, cfg: gl.constexpr):
    """Of each sequence, the items up to and with its own, [cfg.batch]; the number of items; log2 of
    the splits of an item: of 1, or of a multiple of GROUP where that leaves items for nearly all
    CTAs, or of GROUP where that leaves them for half of the CTAs."""
    b = gl.arange(0, cfg.batch, table_layout(cfg.batch, WARPS))
    inside = b < call.batch
    _, length, _, _, _ = bounds_of(b, bounds_ptr, index_ptr, inside, call, cfg)
    parts = gl.where(inside, splits_of(length, call), 0)
    tenths = gl.sum(parts, 0) * call.nheads_k * 10
    ctas = gl.num_programs(0)
    log2_unit = gl.where(tenths < ctas * 18, 0, 2)
    log2_unit += (tenths >= ctas * 72).to(gl.int32) + (tenths >= ctas * 144).to(gl.int32)
    ends = gl.associative_scan((parts + (1 << log2_unit) - 1) >> log2_unit, 0, add) * call.nheads_k
    return ends, gl.max(ends, 0), log2_unit


@gluon.jit
def find_item(t, ends, log2_unit, bounds_ptr, index_ptr, call, cfg: gl.constexpr):
    """(sequence, key head, first split, splits of the sequence, log2 of the keys of a split; what
    `bounds_of` gives) of item t: heads first, so that neighbours in memory are read together."""
    before = ends <= t
    b = gl.sum(before.to(gl.int32), 0)
    first, length, position, row, error = bounds_of(b, bounds_ptr, index_ptr, True, call, cfg)
    t -= gl.max(gl.where(before, ends, 0), 0)  # at most 256, or the number of heads
    place = (t * call.inverse_heads) >> 16
    head = t - place * call.nheads_k
    parts, log2 = splits_of(length, call), log2_keys(length, call)
    return b, head, place << log2_unit, parts, log2, first, length, position, row, error


@gluon.jit
def prefetch(table_ptr, count):
    """Bring the first `count` entries of the block table to L2, up to 1,024."""
    line = 32 * gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    address = (table_ptr + gl.minimum(line, count - 1)).to(gl.int64)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load_partition(given, cfg: gl.constexpr):
    """One warp: the blocks of all items of this CTA, into the ring as slots come free.

    An item has at least one block, so that an empty sequence takes the same way. Pages that do not
    exist are marked for the consumer before the block is ready.
    """
    descs, bounds_ptr, index_ptr, table_ptr, ring, marks_smem, warm_bar, call = given
    smem, ready_bar, empty_bar = ring
    N: gl.constexpr = cfg.BLOCK_N
    BOXES: gl.constexpr = cfg.boxes
    PARTS: gl.constexpr = cfg.parts
    warp: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    box = gl.arange(0, 32, warp)
    pages = gl.zeros([32], gl.int32, warp)
    bad = gl.zeros([32], gl.int32, warp)
    item = 0
    it = 0
    # loads of what does not exist bring the tensor maps to the SM while the lengths are on the way
    mbarrier.expect(warm_bar.index(0), 2 * 2 * cfg.box * COLUMNS)
    for kv in gl.static_range(2):
        tma.async_copy_global_to_shared(
            descs[kv], [call.num_rows, 0, 0, 0], warm_bar.index(0), smem.index(kv)
        )
    if cfg.page_size != 0:
        prefetch(table_ptr, (call.batch - 1) * call.stride_tb + call.capacity // cfg.page_size)
    ends, items, log2_unit = make_table(bounds_ptr, index_ptr, call, 1, cfg)
    mbarrier.wait(warm_bar.index(0), 0)
    for t in range(gl.program_id(0), items, gl.num_programs(0)):
        b, head, split, _, log2, first_key, length, _, row, _ = find_item(
            t, ends, log2_unit, bounds_ptr, index_ptr, call, cfg
        )
        start = split << log2
        stop = gl.minimum(start + (1 << log2 + log2_unit), length)
        sequence_ptr = table_ptr + b.to(gl.int64) * call.stride_tb
        for j in range(gl.maximum((stop - start + N - 1) // N, 1)):
            if cfg.page_size != 0:
                if j % (32 // BOXES) == 0:  # the pages of the next 32 boxes
                    key = start + j * N + box * cfg.box
                    outside = call.num_rows
                    page_ptr = sequence_ptr + key // cfg.page_size
                    pages = gl.load(page_ptr, mask=key < stop, other=outside)
                    pages = gl.where((pages < 0) | (pages > outside), outside, pages)
                    missing = (key < stop) & (pages == outside)
                    bad = gl.where(missing, 2, gl.where(j == 0, 0, bad))
            slot = it % cfg.num_buffers
            mbarrier.wait(empty_bar.index(slot), (it // cfg.num_buffers) & 1 ^ 1)
            if cfg.page_size != 0:
                if j % (32 // BOXES) == 0:
                    marks_smem.index(item % cfg.marks).store(bad)
                    gl.thread_barrier()
            mbarrier.expect(ready_bar.index(slot), 4 * N * cfg.headdim)
            for i in gl.static_range(BOXES):
                first = first_key + start + j * N
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
        item += 1


@gluon.jit
def packed(row, call):
    """(query token, query head in its group) of a packed row; opaque, or what follows from rows
    would be computed once and spilled."""
    row = opaque(row)
    token = (row * call.inverse_group) >> 16
    return token, row - token * call.group


@gluon.jit
def load_queries(q_ptr, b, head, call, cfg: gl.constexpr):
    """[1, ROWS, headdim]: the packed rows."""
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 8], [1, 256 // cfg.headdim, cfg.headdim // 8], [1, 4, 1], [2, 1, 0]
    )
    row = along(1, ROWS, layout)
    first = b.to(gl.int64) * call.stride_qb + (head * call.group).to(gl.int64) * call.stride_qh
    token, member = packed(row, call)
    rows = token * call.stride_qm + member * call.stride_qh
    return gl.load(
        gl.multiple_of(q_ptr + first * 8, 16) + (rows * 8 + along(2, cfg.headdim, layout)),
        mask=row < call.seqlen_q * call.group, other=0.0,
    )  # fmt: skip


@gluon.jit
def as_operand(rows, q_smem):
    """[LANES, ROWS, headdim], the same in every lane: an operand of products, by way of q_smem."""
    layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout(), 2)
    gl.thread_barrier()  # all warps have read what was there
    q_smem.store(rows)
    gl.thread_barrier()
    lanes = gl.zeros([LANES, ROWS, rows.shape[2]], rows.dtype, layout)
    return gl.broadcast(q_smem.load(layout), lanes)[0]


@gluon.jit
def thread_sums(x):
    """[LANES, ROWS, columns] to [LANES, ROWS, 8]: sums within each thread, without a shuffle."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 8, 8]), 2)


@gluon.jit
def key_block(
    q, acc, l_i, m_i, blocks, ring, it, start_n, rows_seen, stop, qk_scale,
    MASKED: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the block of the ring at step `it`, which it frees.

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
    mbarrier.arrive(ring[2].index(slot), count=1)
    return acc, l_i, m_next


@gluon.jit
def merge(acc, l_i, m_i, scratch, lanes_smem, qk_scale, cfg: gl.constexpr):
    """The lanes' results as one, over a power of two: weighted sum of values [rows, headdim], sum
    of weights and exponent of that power [rows]; of no keys 0, 0 and -inf.

    So results are added up exactly but for the rounding of the sum, whatever their exponents.
    """
    layout: gl.constexpr = merge_layout(LANES.value, cfg.headdim)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, layout))
    gl.thread_barrier()  # all warps have read what was there
    scratch.store(acc)
    lanes_smem.index(0).store(m_i)
    lanes_smem.index(1).store(gl.convert_layout(gl.sum(l_i, 2), m_i.type.layout))
    gl.thread_barrier()
    used = scratch.slice(0, cfg.rows, dim=1)
    lanes_m = lanes_smem.index(0).slice(0, cfg.rows, dim=1)
    lanes_l = lanes_smem.index(1).slice(0, cfg.rows, dim=1)
    m = lanes_m.load(gl.SliceLayout(2, layout)) * qk_scale  # [LANES, rows]
    exponent = gl.ceil(gl.max(m, 0))
    weight = exp2(m - gl.expand_dims(finite(exponent), 0))
    total = gl.sum(weight * lanes_l.load(gl.SliceLayout(2, layout)), 0)
    acc = gl.sum(gl.expand_dims(weight, 2) * used.load(layout), 0)
    return acc, gl.convert_layout(total, rows), gl.convert_layout(exponent, rows)


@gluon.jit
def finite(exponent):
    """The exponent, or 0 for that of no keys."""
    return gl.where(exponent == -float("inf"), 0.0, exponent)


@gluon.jit
def add_up(acc, total, exponent, acc_2, total_2, exponent_2):
    """The sum of two results of `merge`."""
    larger = gl.maximum(exponent, exponent_2)
    scale = exp2(exponent - finite(larger))
    scale_2 = exp2(exponent_2 - finite(larger))
    total = total * scale + total_2 * scale_2
    acc = acc * gl.expand_dims(scale, 1) + acc_2 * gl.expand_dims(scale_2, 1)
    return acc, total, larger


@gluon.jit
def store_rows(
    acc, total, exponent, row, first_row, inside, out_ptr, lse_ptr, head, call, cfg: gl.constexpr
):  # fmt: skip
    """Write packed rows of the mean, and their natural-log log-sum-exp; 0 and -inf of no keys."""
    token, member = packed(row, call)
    head_q = head * call.group + member
    nheads = call.nheads_k * call.group
    offs_d = gl.arange(0, cfg.headdim, gl.SliceLayout(0, acc.type.layout))
    empty = total == 0.0
    lse = gl.where(empty, -float("inf"), (exponent + gl.log2(total)) * LN_2)
    mean = acc * gl.expand_dims(1.0 / gl.where(empty, 1.0, total), 1)
    out_ptr = gl.multiple_of(out_ptr + first_row * cfg.headdim, 16)
    offsets = gl.expand_dims((token * nheads + head_q) * cfg.headdim, 1)
    gl.store(
        out_ptr + (offsets + gl.expand_dims(offs_d, 0)), mean.to(out_ptr.dtype.element_ty),
        mask=gl.expand_dims(inside, 1),
    )  # fmt: skip
    gl.store(lse_ptr + first_row + head_q * call.seqlen_q + token, lse, mask=inside)


@gluon.jit
def store_split(
    acc, total, exponent, row, inside, partial_ptr, totals_ptr, b, head, split, call,
    cfg: gl.constexpr,
):  # fmt: skip
    """Write packed rows of a partial result: acc (batch, num_splits, seqlen_q, nheads, headdim);
    total and exponent, next to each other, likewise."""
    nheads = call.nheads_k * call.group
    first = (b.to(gl.int64) * call.num_splits + split) * call.seqlen_q * nheads
    token, member = packed(row, call)
    place = token * nheads + head * call.group + member
    offs_d = gl.arange(0, cfg.headdim, gl.SliceLayout(0, acc.type.layout))
    partial_ptr = gl.multiple_of(partial_ptr + first * cfg.headdim, 16)
    offsets = gl.expand_dims(place * cfg.headdim, 1) + gl.expand_dims(offs_d, 0)
    gl.store(partial_ptr + offsets, acc, mask=gl.expand_dims(inside, 1))
    bits = total.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    bits |= exponent.to(gl.int32, bitcast=True).to(gl.int64) << 32
    gl.store(totals_ptr + first + place, bits, mask=inside)


@gluon.jit
def combine(
    out_ptr, lse_ptr, partial_ptr, totals_ptr, b, head, parts, call,
    STEP: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Add up the stored results of a sequence's `parts` splits, for one key head: STEP is 1, or
    GROUP where the first split of a group has the group's.

    Some at a time, whose loads are in flight together. What is loaded beyond the end is the last
    result again, with weight 0. `.cg`: other CTAs wrote.
    """
    TILE: gl.constexpr = cfg.rows
    HEADDIM: gl.constexpr = cfg.headdim
    AT_ONCE: gl.constexpr = CHUNK // TILE if STEP == 1 or TILE > 8 else CHUNK // TILE // 2
    layout: gl.constexpr = gl.BlockedLayout([1, HEADDIM // 32], [1, 32], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    offs_d = gl.expand_dims(gl.arange(0, HEADDIM, gl.SliceLayout(0, layout)), 0)
    step = call.seqlen_q * call.nheads_k * call.group
    first = b.to(gl.int64) * call.num_splits * step
    row = gl.arange(0, TILE, rows)
    token, member = packed(gl.minimum(row, call.seqlen_q * call.group - 1), call)
    place = (token * call.nheads_k + head) * call.group + member
    offsets = gl.expand_dims(place * HEADDIM, 1) + offs_d
    partial_ptr = gl.multiple_of(partial_ptr + first * HEADDIM, 16)
    totals_ptr += first
    exponent = gl.full([TILE], -float("inf"), gl.float32, rows)
    total = gl.zeros([TILE], gl.float32, rows)
    acc = gl.zeros([TILE, HEADDIM], gl.float32, layout)
    for start in range(0, parts, AT_ONCE * STEP):
        bits = ()
        accs = ()
        for i in gl.static_range(AT_ONCE):
            at = gl.minimum(start + i * STEP, (parts - 1) // STEP * STEP) * step
            bits = bits + (gl.load(totals_ptr + (at + place), cache_modifier=".cg"),)
        for i in gl.static_range(AT_ONCE):
            at = gl.minimum(start + i * STEP, (parts - 1) // STEP * STEP) * step
            acc_i = gl.load(partial_ptr + (at * HEADDIM + offsets), cache_modifier=".cg")
            accs = accs + (acc_i,)
        exponents = ()
        larger = exponent
        for i in gl.static_range(AT_ONCE):
            inside = start + i * STEP < parts
            exponents = exponents + (gl.where(inside, upper(bits[i]), -float("inf")),)
            larger = gl.maximum(larger, exponents[i])
        scale = exp2(exponent - finite(larger))
        total *= scale
        acc *= gl.expand_dims(scale, 1)
        exponent = larger
        for i in gl.static_range(AT_ONCE):
            if i % (GROUP // STEP) == 0:
                group_total = gl.zeros([TILE], gl.float32, rows)
                group_acc = gl.zeros([TILE, HEADDIM], gl.float32, layout)
            scale = exp2(exponents[i] - finite(larger))
            group_total += scale * bits[i].to(gl.int32).to(gl.float32, bitcast=True)
            group_acc += gl.expand_dims(scale, 1) * accs[i]
            if (i + 1) % (GROUP // STEP) == 0:
                total += group_total
                acc += group_acc
    first_row = b.to(gl.int64) * step
    inside = row < call.seqlen_q * call.group
    store_rows(acc, total, exponent, row, first_row, inside, out_ptr, lse_ptr, head, call, cfg)


@gluon.jit
def upper(bits):
    """The upper half of 64 bits, a float."""
    return (bits >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def softmax_partition(given, cfg: gl.constexpr):
    """Four warps: the attention of the items of this CTA, block by block."""
    pointers, bounds_ptr, index_ptr, ring, marks_smem, views, call, qk_scale = given
    q_ptr, out_ptr, lse_ptr, partial_ptr, totals_ptr, error_ptr, counter_ptr = pointers
    blocks, scratch, lanes_smem, q_smem = views
    N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    layout: gl.constexpr = scores_layout()
    zeros = gl.zeros([LANES, ROWS, N // LANES], gl.float32, layout)
    sums_layout: gl.constexpr = thread_sums(zeros).type.layout
    merged: gl.constexpr = gl.SliceLayout(0, merge_layout(LANES.value, HEADDIM))
    merged_rows: gl.constexpr = gl.SliceLayout(1, merged)
    TILE: gl.constexpr = cfg.rows
    num_rows = call.seqlen_q * call.group
    nheads = call.nheads_k * call.group
    ends, items, log2_unit = make_table(bounds_ptr, index_ptr, call, LANES, cfg)
    it = 0
    done = 0
    t = gl.program_id(0)
    item = find_item(gl.minimum(t, items - 1), ends, log2_unit, bounds_ptr, index_ptr, call, cfg)
    rows = load_queries(q_ptr, item[0], item[1], call, cfg)
    while t < items:
        q = as_operand(rows, q_smem)
        b, head, first, parts, log2, _, length, position, _, error = item
        t += gl.num_programs(0)
        if t < items:  # long before it is needed: under load, memory takes longer than a block
            item = find_item(t, ends, log2_unit, bounds_ptr, index_ptr, call, cfg)
            rows = load_queries(q_ptr, item[0], item[1], call, cfg)
        end = gl.minimum(first + (1 << log2_unit), parts)
        whole = end - first == parts
        count = gl.where(log2_unit == 0, parts, (parts + GROUP - 1) // GROUP)  # results to add up
        # keys below rows_seen are seen by a row, keys below position + 1 by every row
        position = gl.where(call.causal != 0, position, EVERY)
        # sums of a group of splits, and of the groups; nothing so far
        sum_acc = gl.zeros([TILE, HEADDIM], gl.float32, merged)
        sum_total = gl.zeros([TILE], gl.float32, merged_rows)
        sum_exponent = gl.full([TILE], -float("inf"), gl.float32, merged_rows)
        group_acc = gl.zeros([TILE, HEADDIM], gl.float32, merged)
        group_total = gl.zeros([TILE], gl.float32, merged_rows)
        exponent = gl.full([TILE], -float("inf"), gl.float32, merged_rows)
        stored = 0
        for split in range(first, end):
            start = split << log2
            stop = gl.minimum(start + (1 << log2), length)
            rows_seen = gl.minimum(stop, position + packed(along(1, ROWS, layout), call)[0] + 1)
            full = gl.maximum(gl.minimum(stop, position + 1) - start, 0) // N
            num_blocks = gl.maximum((stop - start + N - 1) // N, 1)
            m_i = gl.full([LANES, ROWS], -float("inf"), gl.float32, gl.SliceLayout(2, layout))
            l_i = gl.zeros([LANES, ROWS, 8], gl.float32, sums_layout)
            acc = gl.zeros([LANES, ROWS, HEADDIM], gl.float32, layout)
            for j in range(full):
                acc, l_i, m_i = key_block(
                    q, acc, l_i, m_i, blocks, ring, it, start + j * N, rows_seen, stop,
                    qk_scale, False, cfg,
                )  # fmt: skip
                it += 1
            for j in range(full, num_blocks):
                acc, l_i, m_i = key_block(
                    q, acc, l_i, m_i, blocks, ring, it, start + j * N, rows_seen, stop,
                    qk_scale, True, cfg,
                )  # fmt: skip
                it += 1
            split_acc, split_total, split_exponent = merge(
                acc, l_i, m_i, scratch, lanes_smem, qk_scale, cfg
            )
            group_acc, group_total, exponent = add_up(
                group_acc, group_total, exponent, split_acc, split_total, split_exponent
            )
            if (log2_unit == 0) | (split % GROUP == GROUP - 1) | (split == end - 1):
                sum_acc, sum_total, sum_exponent = add_up(
                    sum_acc, sum_total, sum_exponent, group_acc, group_total, exponent
                )
                group_acc = gl.zeros_like(group_acc)
                group_total = gl.zeros_like(group_total)
                exponent = gl.full_like(exponent, -float("inf"))
                if (split == end - 1) | (whole == 0):
                    if cfg.page_size != 0:
                        marks = marks_smem.index(done % cfg.marks).load(table_layout(32, LANES))
                        error = error | gl.reduce(marks, 0, either)
                    if error != 0:
                        gl.atomic_or(error_ptr, error)
                        sum_total += float("nan")
                        sum_acc += float("nan")
                    row = gl.arange(0, TILE, merged_rows)
                    inside = row < num_rows
                    if whole:
                        first_row = b.to(gl.int64) * call.seqlen_q * nheads
                        store_rows(
                            sum_acc, sum_total, sum_exponent, row, first_row, inside, out_ptr,
                            lse_ptr, head, call, cfg,
                        )  # fmt: skip
                    else:
                        store_split(
                            sum_acc, sum_total, sum_exponent, row, inside, partial_ptr, totals_ptr,
                            b, head, gl.where(log2_unit == 0, split, split // GROUP * GROUP), call,
                            cfg,
                        )  # fmt: skip
                        sum_acc = gl.zeros_like(sum_acc)
                        sum_total = gl.zeros_like(sum_total)
                        sum_exponent = gl.full_like(sum_exponent, -float("inf"))
                    stored += 1
        if whole == 0:
            arrivals_ptr = counter_ptr + b * call.nheads_k + head
            gl.thread_barrier()
            arrived = gl.atomic_add(arrivals_ptr, stored, sem="acq_rel", scope="gpu") + stored
            if arrived == count:
                if log2_unit == 0:
                    combine(out_ptr, lse_ptr, partial_ptr, totals_ptr, b, head, parts, call, 1, cfg)
                else:
                    combine(
                        out_ptr, lse_ptr, partial_ptr, totals_ptr, b, head, parts, call, GROUP, cfg
                    )
                gl.store(arrivals_ptr, 0)  # for the next launch
        done += 1


@gluon.jit
def decode_kernel(
    k_desc, v_desc, q_ptr, out_ptr, lse_ptr, partial_ptr, totals_ptr, bounds_ptr, index_ptr,
    table_ptr, error_ptr, counter_ptr, call, qk_scale, cfg: gl.constexpr,
):  # fmt: skip
    DEPTH: gl.constexpr = cfg.num_buffers
    HEADDIM: gl.constexpr = cfg.headdim
    dtype: gl.constexpr = k_desc.dtype
    # a slot is K and V; each [parts][BLOCK_N][64], which is how [BLOCK_N, headdim] is swizzled
    smem = gl.allocate_shared_memory(
        dtype, [DEPTH * 2 * cfg.parts * cfg.boxes, 1, cfg.box, 1, COLUMNS], k_desc.layout
    )
    ring = (smem, barriers(DEPTH, 1), barriers(DEPTH, 1))
    block: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    blocks = smem._reinterpret(dtype, [DEPTH * 2, LANES, cfg.BLOCK_N // LANES, HEADDIM], block)
    wide: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [2, 1, 0])
    scratch = gl.allocate_shared_memory(gl.float32, [LANES, ROWS, HEADDIM], wide)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    lanes_smem = gl.allocate_shared_memory(gl.float32, [2, LANES, ROWS], plain)
    warm_bar = barriers(1, 1)
    MARKS: gl.constexpr = cfg.marks if cfg.page_size != 0 else 1
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    marks_smem = gl.allocate_shared_memory(gl.int32, [MARKS, 32], flat)
    pointers = (q_ptr, out_ptr, lse_ptr, partial_ptr, totals_ptr, error_ptr, counter_ptr)
    q_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    q_smem = gl.allocate_shared_memory(dtype, [1, ROWS, HEADDIM], q_layout)
    views = (blocks, scratch, lanes_smem, q_smem)
    softmax = (pointers, bounds_ptr, index_ptr, ring, marks_smem, views, call, qk_scale)
    load = ((k_desc, v_desc), bounds_ptr, index_ptr, table_ptr, ring, marks_smem, warm_bar, call)
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
    types |= {"lse_ptr": "*fp32", "partial_ptr": "*fp32", "totals_ptr": "*i64"}
    types |= {f"{name}_ptr": "*i32" for name in ("bounds", "index", "table", "error", "counter")}
    types |= {"call": Call(*["i32"] * len(Call._fields)), "qk_scale": "fp32"}
    return dict(kernel=decode_kernel, signature=types, constexprs={"cfg": cfg})


def offline(dtype: str = "bf16", **build: Any) -> dict[str, Any]:
    """`source` from plain values, for `attn_ladder.offline.report`, which sets no limit of
    registers: what it shows is what one CTA on an SM could have."""
    return source(Build(**build), dtype)
