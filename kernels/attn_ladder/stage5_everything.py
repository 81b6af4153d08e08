"""Stage 5: everything at once, and no branch or rescale left in the hot loop.

Stage 4 keeps the tensor cores fed, but its consumers still pay for generality at every key block: a
mask decision, the maximum of the block, and a rescale of the accumulator. This stage removes the
constraint `branching`: a block of the hot loop is two products, one exp2 a score, one sum.

- *Lazy maximum.* The softmax is taken relative to the row maximum of the first key block (the
  diagonal one when causal). A later block needs no maximum and no rescale; the result is exact as
  long as no probability leaves the number format. Row sums outside [1/2, 2^60] and accumulators
  that are not finite (P beyond 65504 in fp16) set a bit of the tile; after the last tile a
  warpgroup redoes its flagged tiles with the online softmax.
- *Mask-free interior.* Blocks are visited from the last to the first, so that only blocks peeled
  off around the loop are masked.
- *Ping-pong.* Two or three consumers take turns to issue products, one's softmax under the others'
  products (Shah et al., 2024, section 3.1); from headdim 128 on it also runs under its own P·V.
- *Fewer bubbles.* The first consumer multiplies only the visible half of the diagonal block; at
  headdim 64 the next tile's first product runs under the epilogue; tiles are handed out longest
  first by a counter, or in pairs of a long and a short one; heads are grouped so that their keys
  and values stay in L2.
- *Headdim 256.* Q, K and V fill shared memory, so O goes from registers to global memory; up to
  256 bytes of what is per tile are kept in local memory, none in a loop over blocks.

Expected: `tensor pipe active` at headdim 128, full, 8k from stage 4's level to 97 %, no masked
instruction outside the peeled blocks. What limits it: the tensor pipe (then power) at headdim 128,
issue slots and MUFU together at headdim 64, and at short seqlen the work between two tiles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder.launch import Kernel, Layout, tile_counter
from attn_ladder.problem import Problem
from attn_ladder.rows import hide, hide_diagonal, redo_tile, store_tile
from attn_ladder.stage import Stage
from attn_ladder.tiles import TILE_LIST, Shape, listed_tile, num_tiles, tile_of
from attn_ladder.warpgroup import (
    barriers,
    either,
    exp2,
    fill,
    make_ring,
    meet,
    pin,
    release,
    row_layout,
    thread_sums,
)

STAGE = Stage(title="Everything: lazy maximum, ping-pong, no masks", removes="branching")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for; a consumer is one warpgroup with 64 query rows."""

    headdim: int
    causal: bool
    ragged: bool = False  # seqlen_k or a diagonal is no multiple of BLOCK_N
    consumers: int = 2
    BLOCK_N: int = 128
    num_buffers: int = 2  # depth of the rings of K and V
    num_q_buffers: int = 1
    q_in_registers: bool = True
    ping_pong: bool = True  # the consumers take turns to issue products
    overlap: str = "own"  # softmax runs under the consumer's own P·V, or only under "others"
    half_diagonal: bool = False  # the first consumer skips the hidden half of the diagonal block
    cross_tile: bool = False  # the next tile's first product runs under the epilogue
    direct_store: bool = False  # O is written from registers, without a buffer
    mask_all: bool = False  # every block is masked, as if none were known to be visible
    producer_warps: int = 1
    schedule: str = "static"  # or "pairs" of a long and a short tile, or "dynamic"
    l2_bytes: int = 32 << 20  # keys and values of the heads that are processed together

    def __post_init__(self) -> None:
        for fits, name, needs in (
            (self.headdim in (64, 128, 256), "headdim", "to be 64, 128 or 256"),
            (self.consumers in (2, 3), "consumers", "to be 2 or 3"),
            (self.BLOCK_N in (64, 128), "BLOCK_N", "to be 64 or 128"),
            (self.num_buffers >= 2, "num_buffers", "to be at least 2"),
            (self.num_q_buffers >= 1, "num_q_buffers", "to be at least 1"),
            (self.producer_warps in (1, 2, 4), "producer_warps", "to be 1, 2 or 4"),
            (self.schedule in ("static", "pairs", "dynamic"), "schedule", "a known order"),
            (self.overlap in ("own", "others"), "overlap", "to be own or others"),
            (self.ping_pong or self.overlap == "own", "overlap", "ping_pong to be others"),
            (self.consumers == 2 or not (self.ragged and self.causal),
             "ragged", "two consumers if causal"),
            (self.fixed_diagonal and self.BLOCK_N == 128 or not self.half_diagonal,
             "half_diagonal", "128 x 128 tiles, causal and not ragged"),
            (self.num_buffers * self.BLOCK_N >= self.BLOCK_M or not self.direct_store,
             "direct_store", "64 keys in the ring of V for each consumer"),
            (self.headdim < 256 or self.direct_store, "direct_store", "to be set at headdim 256"),
            (not (self.cross_tile and self.causal), "cross_tile", "causal=False"),
            (self.causal or self.schedule == "static", "schedule", "to be static if not causal"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r} needs {needs}: {self}")

    @property
    def BLOCK_M(self) -> int:
        return 64 * self.consumers

    @property
    def fixed_diagonal(self) -> bool:
        """Whether the mask of the diagonal block is the same in every tile."""
        return self.causal and not self.ragged and self.consumers == 2


def choose_config(headdim: int, causal: bool, seqlen_k: int, ragged: bool = False) -> Config:
    """The fastest configuration of those measured; CONTRIBUTING says what each choice is worth."""
    two = dict(num_buffers=3, num_q_buffers=2, overlap="others")
    three = dict(two, consumers=3, q_in_registers=False)
    if headdim == 256:
        order = "pairs" if causal else "static"
        memory = dict(BLOCK_N=64, q_in_registers=False, direct_store=True)
        return Config(256, causal, ragged, schedule=order, **memory)
    if headdim == 128 and not causal:
        return Config(128, False, ragged, q_in_registers=not ragged)
    if headdim == 128 and (ragged or seqlen_k > 2048):
        whole = dict(half_diagonal=not ragged, schedule="dynamic")
        return Config(128, True, ragged, q_in_registers=False, **whole)
    if headdim == 128:
        pairs = dict(half_diagonal=True, schedule="pairs", l2_bytes=16 << 20)
        return Config(128, True, num_q_buffers=2, q_in_registers=False, **pairs)
    if causal and seqlen_k > 4096 and not ragged:  # 192 rows use a key block
        return Config(64, True, schedule="dynamic", **three)
    if causal:
        l2_bytes = (8 if seqlen_k <= 512 else 16) << 20
        whole = dict(half_diagonal=not ragged, schedule="dynamic", l2_bytes=l2_bytes)
        return Config(64, True, ragged, **whole, **two)
    if seqlen_k <= 1024 or ragged:
        return Config(64, False, ragged, q_in_registers=ragged, cross_tile=True, **two)
    return Config(64, False, cross_tile=True, **three)


@gluon.constexpr_function
def turn_asm(operation, index):
    return f"bar.{operation} {8 + index}, 256; mov.b32 $0, $1;"


@gluon.constexpr_function
def after(index, cfg):
    return (index + 1) % cfg.consumers


@gluon.jit
def take_turn(OPERATION: gl.constexpr, INDEX: gl.constexpr, cfg: gl.constexpr):
    """Wait for the turn of consumer INDEX (`sync`) or hand it on to it (`arrive`), on a hardware
    barrier of two consumers that Triton leaves free."""
    if cfg.ping_pong:
        thread = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
        gl.inline_asm_elementwise(
            turn_asm(OPERATION, INDEX), "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def key_blocks(m, shape, cfg: gl.constexpr):
    """(number of key blocks of a tile, at least one; first key of the lowest one).

    Blocks start at multiples of BLOCK_N, except in ragged causal tiles: there the last one ends at
    the diagonal of the tile, and the lowest one may begin before key 0, where TMA reads zeros.
    """
    lowest = 0
    keys = shape.seqlen_k
    if cfg.causal:
        keys += (m + 1) * cfg.BLOCK_M - shape.seqlen_q
        if not cfg.ragged:
            keys = min(keys, shape.seqlen_k)
    n = max((keys + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
    if cfg.causal and cfg.ragged:
        lowest = keys - n * cfg.BLOCK_N
    return n, lowest


@gluon.jit
def seen_blocks(row, n, lowest, shape, cfg: gl.constexpr):
    """How many of the n key blocks of a causal tile the 64 rows from `row` on see, counted from the
    lowest. Rows that see no key keep a block."""
    keys = row + 64 + shape.seqlen_k - shape.seqlen_q - lowest
    seen = min((keys + cfg.BLOCK_N - 1) // cfg.BLOCK_N, n)
    if cfg.ragged:
        seen = max(seen, 1)
    return seen


@gluon.jit
def load_partition(given, cfg: gl.constexpr):
    """Q once a tile, K and V a block at a time, into the rings as slots come free."""
    descs, rings, tiles, counter_ptr, shape = given
    q_desc, k_desc, v_desc = descs
    q_ring, k_ring, v_ring = rings
    tiles_smem, tile_ready_bar = tiles
    N: gl.constexpr = cfg.BLOCK_N
    DEPTH: gl.constexpr = cfg.num_buffers
    Q_DEPTH: gl.constexpr = cfg.num_q_buffers
    CONSUMERS: gl.constexpr = cfg.consumers
    it = 0
    ti = 0
    tile = gl.program_id(0) if cfg.schedule == "dynamic" else 0
    end = num_tiles(shape, cfg)
    counted = counter_ptr.to(gl.int64) != 0
    one: gl.constexpr = gl.BlockedLayout([1], [32], [cfg.producer_warps], [0])
    if cfg.schedule == "dynamic":
        tiles_smem.index(0).store(gl.full([1], 0, gl.int32, one) + tile)
    while tile < end:
        m, head = tile_of(tile, shape, cfg)
        b = head // shape.nheads
        h = head - b * shape.nheads
        hk = h // shape.group
        n, lowest = key_blocks(m, shape, cfg)
        coord = [b, lowest + (n - 1) * N, hk, 0]
        fill(k_desc, coord, k_ring, it % DEPTH, (it // DEPTH) & 1)
        for w in gl.static_range(CONSUMERS):
            slot = w * Q_DEPTH + ti % Q_DEPTH
            fill(q_desc, [b, m * cfg.BLOCK_M + w * 64, h, 0], q_ring, slot, (ti // Q_DEPTH) & 1)
        tile += 1
        ti += 1
        if cfg.schedule == "dynamic":
            tile += gl.num_programs(0) - 1
            if ti == TILE_LIST - 1:
                tile = end
            elif counted:
                tile = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
            tiles_smem.index(ti).store(gl.full([1], 0, gl.int32, one) + tile)
            mbarrier.arrive(tile_ready_bar.index((ti - 1) % 8), count=1)
        for j in range(n - 2, -1, -1):
            coord = [b, lowest + j * N, hk, 0]
            fill(k_desc, coord, k_ring, (it + 1) % DEPTH, ((it + 1) // DEPTH) & 1)
            coord = [b, lowest + (j + 1) * N, hk, 0]
            fill(v_desc, coord, v_ring, it % DEPTH, (it // DEPTH) & 1)
            it += 1
        fill(v_desc, [b, lowest, hk, 0], v_ring, it % DEPTH, (it // DEPTH) & 1)
        it += 1
    if cfg.schedule == "dynamic" and counted:  # the last CTA resets the counter for the next launch
        if gl.atomic_add(counter_ptr + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
            gl.store(counter_ptr, 0)
            gl.store(counter_ptr + 1, 0)


@gluon.jit
def first_scores(
    q_regs, q_ring, k_ring, it, ti, there, WG: gl.constexpr, N: gl.constexpr, cfg: gl.constexpr
):
    """Issue Q·Kᵀ of tile `ti` with N keys of its first block: [64, N], asynchronous.

    Also returns Q if it is kept in registers. Without `there` it multiplies whatever it finds.
    """
    HEADDIM: gl.constexpr = cfg.headdim
    layout: gl.constexpr = row_layout(N)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, row_layout(cfg.BLOCK_N), 2)
    slot = WG * cfg.num_q_buffers + ti % cfg.num_q_buffers
    mbarrier.wait(q_ring[1].index(slot), (ti // cfg.num_q_buffers) & 1, pred=there)
    q = q_ring[0].index(slot).reshape([64, HEADDIM])
    if cfg.q_in_registers:
        q_regs = q.load(q_layout)
        mbarrier.arrive(q_ring[2].index(slot), count=1)
        q = gl.convert_layout(q_regs, gl.DotOperandLayout(0, layout, 2))
    k_slot = it % cfg.num_buffers
    mbarrier.wait(k_ring[1].index(k_slot), (it // cfg.num_buffers) & 1, pred=there)
    k = k_ring[0].index(k_slot).reshape([cfg.BLOCK_N, HEADDIM]).slice(0, N, dim=0)
    zero = gl.zeros([64, N], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True), q_regs


@gluon.jit
def key_step(
    q, p, acc, l_i, m_i, k_ring, v_ring, it, row, column, shape, qk_scale,
    WG: gl.constexpr, P_COLUMNS: gl.constexpr, MASKED: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Q·Kᵀ of the next block and P·V of this one, and the next softmax.

    With overlap "own" the turn ends when the products are issued, and the softmax runs under P·V;
    with "others" it ends when they are complete, and the softmax runs under those of the others.
    p [64, P_COLUMNS] of this block, acc [64, headdim], l_i [64, 8], m_i [64]. The first score of
    the next block is at (row, column), and MASKED says that not all of them may count.
    """
    N: gl.constexpr = cfg.BLOCK_N
    layout: gl.constexpr = row_layout(N)
    k_slot = (it + 1) % cfg.num_buffers
    slot = it % cfg.num_buffers
    mbarrier.wait(k_ring[1].index(k_slot), ((it + 1) // cfg.num_buffers) & 1)
    take_turn("sync", WG, cfg)
    k = k_ring[0].index(k_slot).reshape([N, cfg.headdim]).permute((1, 0))
    zero = gl.zeros([64, N], gl.float32, layout)
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ring[1].index(slot), (it // cfg.num_buffers) & 1)
    v = v_ring[0].index(slot).reshape([N, cfg.headdim]).slice(0, P_COLUMNS, dim=0)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if cfg.overlap == "own":
        take_turn("arrive", after(WG, cfg), cfg)
        s, acc = warpgroup_mma_wait(1, deps=[s, acc])
        release(k_ring, k_slot)
    else:
        s, acc = warpgroup_mma_wait(0, deps=[s, acc])
        take_turn("arrive", after(WG, cfg), cfg)
        release(k_ring, k_slot)
        release(v_ring, slot)
    if MASKED or cfg.mask_all:
        s = hide(s, row, column, shape, cfg)
    p = exp2(s * qk_scale - m_i[:, None])
    l_i = l_i + gl.convert_layout(thread_sums(p), l_i.type.layout)
    if cfg.overlap == "own":
        l_i = pin(l_i)
        acc, p, l_i = warpgroup_mma_wait(0, deps=[acc, p, l_i])
    p = gl.convert_layout(p.to(v_ring[0].dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    if cfg.overlap == "own":
        release(v_ring, slot)
    return p, acc, l_i


@gluon.jit
def softmax_partition(given, WG: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup: 64 rows of every tile of this CTA."""
    redo_descs, rings, redo_buffers, tiles, out, shape, qk_scale = given
    q_ring, k_ring, v_ring = rings
    redo_smem, redo_ready_bar = redo_buffers
    tiles_smem, tile_ready_bar = tiles
    N: gl.constexpr = cfg.BLOCK_N
    DEPTH: gl.constexpr = cfg.num_buffers
    HEADDIM: gl.constexpr = cfg.headdim
    dtype: gl.constexpr = v_ring[0].dtype
    HALF: gl.constexpr = cfg.half_diagonal and WG == 0
    FIRST: gl.constexpr = 64 if HALF else N  # keys of the first block that are used
    s_layout: gl.constexpr = row_layout(N)
    o_layout: gl.constexpr = row_layout(HEADDIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    sums: gl.constexpr = thread_sums(gl.zeros([64, N], gl.float32, s_layout)).type.layout
    it = 0
    ti = 0
    tile = gl.program_id(0) if cfg.schedule == "dynamic" else 0
    end = num_tiles(shape, cfg)
    flags = gl.full([64], 0, gl.int32, rows)
    s = gl.zeros([64, FIRST], gl.float32, row_layout(FIRST))
    q_regs = 0
    if cfg.q_in_registers:
        q_regs = gl.zeros([64, HEADDIM], dtype, gl.DotOperandLayout(0, s_layout, 2))
    if cfg.cross_tile:
        s, q_regs = first_scores(q_regs, q_ring, k_ring, 0, 0, tile < end, WG, FIRST, cfg)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k_ring, 0)
    if WG == cfg.consumers - 1:
        take_turn("arrive", 0, cfg)
    while tile < end:
        m, head = tile_of(tile, shape, cfg)
        row = m * cfg.BLOCK_M + WG * 64
        n, lowest = key_blocks(m, shape, cfg)
        if cfg.causal and cfg.BLOCK_M != N:  # free the blocks that these 64 rows do not see
            seen = seen_blocks(row, n, lowest, shape, cfg)
            for _ in range(n - seen):
                mbarrier.wait(k_ring[1].index(it % DEPTH), (it // DEPTH) & 1)
                release(k_ring, it % DEPTH)
                mbarrier.wait(v_ring[1].index(it % DEPTH), (it // DEPTH) & 1)
                release(v_ring, it % DEPTH)
                take_turn("sync", WG, cfg)  # every consumer takes as many turns a tile
                take_turn("arrive", after(WG, cfg), cfg)
                it += 1
            n = seen
        if not cfg.cross_tile:
            s, q_regs = first_scores(q_regs, q_ring, k_ring, it, ti, True, WG, FIRST, cfg)
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_ring, it % DEPTH)
        q_slot = WG * cfg.num_q_buffers + ti % cfg.num_q_buffers
        q = q_ring[0].index(q_slot).reshape([64, HEADDIM])
        if cfg.q_in_registers:
            q = q_regs
        if cfg.fixed_diagonal:
            s = hide_diagonal(s, WG)
        elif cfg.causal or cfg.ragged:
            s = hide(s, row, lowest + (n - 1) * N, shape, cfg)
        m_first = gl.max(s, 1) * qk_scale  # the reference of the whole tile
        m_i = gl.convert_layout(m_first, gl.SliceLayout(1, s_layout))
        if cfg.causal and cfg.ragged:
            m_first = gl.where(m_first == -float("inf"), 0.0, m_first)
        p_first = exp2(s * qk_scale - m_first[:, None])
        l_i = gl.convert_layout(thread_sums(p_first), sums)
        acc = gl.zeros([64, HEADDIM], gl.float32, o_layout)
        p_first = gl.convert_layout(p_first.to(dtype), p_layout)
        if HALF:
            if n > 1:
                p, acc, l_i = key_step(
                    q, p_first, acc, l_i, m_i, k_ring, v_ring, it, row, lowest + (n - 2) * N,
                    shape, qk_scale, WG, FIRST, False, cfg,
                )  # fmt: skip
                it += 1
            else:
                mbarrier.wait(v_ring[1].index(it % DEPTH), (it // DEPTH) & 1)
                v = v_ring[0].index(it % DEPTH).reshape([N, HEADDIM]).slice(0, FIRST, dim=0)
                acc = warpgroup_mma(p_first, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                p = gl.full([64, N], 0.0, dtype, p_layout)
            n -= 1
        else:
            p = p_first
        steps = n - 2 if cfg.causal and cfg.ragged else n - 1
        for i in range(steps):
            p, acc, l_i = key_step(
                q, p, acc, l_i, m_i, k_ring, v_ring, it, row, lowest + (n - 2 - i) * N, shape,
                qk_scale, WG, N, False, cfg,
            )  # fmt: skip
            it += 1
        if cfg.causal and cfg.ragged:
            if n > 1:
                p, acc, l_i = key_step(
                    q, p, acc, l_i, m_i, k_ring, v_ring, it, row, lowest, shape, qk_scale,
                    WG, N, True, cfg,
                )  # fmt: skip
                it += 1
        if not cfg.q_in_registers:
            mbarrier.arrive(q_ring[2].index(q_slot), count=1)
        slot = it % DEPTH
        it += 1
        ti += 1
        if cfg.schedule == "dynamic":
            mbarrier.wait(tile_ready_bar.index((ti - 1) % 8), ((ti - 1) // 8) & 1)
        tile = listed_tile(ti, tiles_smem, cfg)
        mbarrier.wait(v_ring[1].index(slot), ((it - 1) // DEPTH) & 1)
        v = v_ring[0].index(slot).reshape([N, HEADDIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        if cfg.cross_tile:
            s, q_regs = first_scores(q_regs, q_ring, k_ring, it, ti, tile < end, WG, FIRST, cfg)
            acc, s = warpgroup_mma_wait(1, deps=[acc, s])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_ring, slot)
        l_i = l_i + 0.0 * gl.convert_layout(thread_sums(acc), sums)  # NaN if acc is not finite
        l_row = gl.convert_layout(gl.sum(l_i, 1), rows)
        m_row = gl.convert_layout(m_i, rows)
        exact = (l_row >= 0.5) & (l_row <= 1152921504606846976.0)  # 2^60
        flags = flags | (gl.where(exact | (m_row == -float("inf")), 0, 1) << ((ti - 1) % 32))
        store_tile(acc, l_row, m_row, m, head, WG, out, shape, cfg)
        if cfg.cross_tile:
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_ring, it % DEPTH)
    if WG == 0:
        take_turn("sync", 0, cfg)
    if cfg.direct_store:  # no other consumer reads the slots of V that a redo takes
        meet(cfg.consumers)
    flagged = gl.reduce(flags, 0, either)
    if flagged != 0:
        loads = 0
        for i in range(ti):
            if (flagged >> (i % 32)) & 1 != 0:
                m, head = tile_of(listed_tile(i, tiles_smem, cfg), shape, cfg)
                loads = redo_tile(
                    m, head, loads, redo_descs, q_ring[0].index(WG * cfg.num_q_buffers),
                    redo_smem.index(WG), redo_ready_bar.index(WG), out, shape, qk_scale, WG, cfg,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, k_redo_desc, v_redo_desc, o_ptr, lse_ptr, counter_ptr, shape,
    qk_scale, cfg: gl.constexpr,
):  # fmt: skip
    CONSUMERS: gl.constexpr = cfg.consumers
    LIST: gl.constexpr = TILE_LIST if cfg.schedule == "dynamic" else 1
    q_ring = make_ring(q_desc, CONSUMERS * cfg.num_q_buffers, 1)
    k_ring = make_ring(k_desc, cfg.num_buffers, 128 * CONSUMERS)
    v_ring = make_ring(v_desc, cfg.num_buffers, 128 * CONSUMERS)
    if cfg.direct_store:
        BLOCKS: gl.constexpr = cfg.num_buffers * cfg.BLOCK_N // 64
        redo_smem = v_ring[0]._reinterpret(
            v_desc.dtype, [BLOCKS, 1, 64, 1, cfg.headdim], v_desc.layout
        )
        out = (o_ptr, lse_ptr)
    else:
        redo_smem = gl.allocate_shared_memory(
            o_desc.dtype, [CONSUMERS, 1, 64, 1, cfg.headdim], o_desc.layout
        )
        out = (o_desc, redo_smem, lse_ptr)
    tiles_smem = gl.allocate_shared_memory(
        gl.int32, [LIST, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    rings = (q_ring, k_ring, v_ring)
    redo_buffers = (redo_smem, barriers(CONSUMERS, 1))
    tiles = (tiles_smem, barriers(8, 1))
    redo_descs = (q_desc, k_redo_desc, v_redo_desc)
    load = ((q_desc, k_desc, v_desc), rings, tiles, counter_ptr, shape)
    softmax = (redo_descs, rings, redo_buffers, tiles, out, shape, qk_scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (softmax_partition, (softmax, gl.constexpr(0), cfg)),
                (softmax_partition, (softmax, gl.constexpr(1), cfg)),
                (load_partition, (load, cfg)),
            ],
            [4, cfg.producer_warps],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (softmax_partition, (softmax, gl.constexpr(0), cfg)),
                (softmax_partition, (softmax, gl.constexpr(1), cfg)),
                (softmax_partition, (softmax, gl.constexpr(2), cfg)),
                (load_partition, (load, cfg)),
            ],
            [4, 4, cfg.producer_warps],
            [160, 160, 24],
        )


def source(cfg: Config, dtype: str) -> dict:
    """The kernel with the types of its arguments, as `launch.Kernel` takes it."""
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 64, 1, cfg.headdim], element)
    rows = dict(q=64, k=cfg.BLOCK_N, v=cfg.BLOCK_N, o=64, k_redo=64, v_redo=64)
    signature = {
        f"{name}_desc": f"tensordesc<{dtype}[1, {n}, 1, {cfg.headdim}],{layout!r}>"
        for name, n in rows.items()
    }
    signature |= {"o_ptr": f"*{dtype}", "lse_ptr": "*fp32", "counter_ptr": "*i32"}
    signature["qk_scale"] = "fp32"
    signature["shape"] = Shape(*["i32"] * len(Shape._fields))
    return {"kernel": attention_kernel, "signature": signature, "constexprs": {"cfg": cfg}}


def offline(dtype: str = "bf16", **config) -> dict:
    """`source` from plain values, for `attn_ladder.offline.report`."""
    return source(Config(**config), dtype)


def schedule(
    config: Config | None,
    q_size: tuple[int, ...],
    k_size: tuple[int, ...],
    causal: bool,
    num_sms: int,
) -> tuple[Config, Shape, int]:
    """Configuration, shape and number of CTAs for q and k of these sizes.

    Raises `ValueError` if a given `config` cannot compute them.
    """
    batch, seqlen_q, nheads, headdim = q_size
    seqlen_k, nheads_k = k_size[1], k_size[2]
    offset = seqlen_k - seqlen_q
    ragged = seqlen_k % 128 != 0 or (causal and (offset < 0 or offset % 128 != 0))
    cfg = config or choose_config(headdim, causal, seqlen_k, ragged)
    if (cfg.headdim, cfg.causal) != (headdim, causal) or (ragged and not cfg.ragged):
        raise ValueError(f"config={cfg} cannot compute {headdim=} {causal=} {ragged=}")
    num_m = -(-seqlen_q // cfg.BLOCK_M)
    num_heads = batch * nheads
    tiles = num_m * num_heads
    if cfg.schedule == "pairs" and num_m % 2:
        cfg = replace(cfg, schedule="dynamic", num_q_buffers=1)  # its list takes the room
    if cfg.schedule == "dynamic" and tiles > num_sms * (TILE_LIST.value - 1):
        cfg = replace(cfg, schedule="static")
    group = nheads // nheads_k
    heads = min(num_heads, max(1, cfg.l2_bytes // (4 * seqlen_k * headdim)) * group)
    heads = -(-num_heads // -(-num_heads // heads))  # groups of equal size: a short last one hurts
    heads = min(num_heads, -(-heads // group) * group)
    shape = Shape(seqlen_q, seqlen_k, nheads, group, num_m, num_heads, heads)
    return cfg, shape, min(num_sms, tiles // 2 if cfg.schedule == "pairs" else tiles)


@lru_cache(maxsize=64)
def compiled(cfg: Config, dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(**source(cfg, DTYPES[dtype]))


@lru_cache(maxsize=512)
def plan(
    config: Config | None, dtype: torch.dtype, device: int, causal: bool, q_size: tuple[int, ...],
    k_size: tuple[int, ...], q_strides: tuple[int, ...], k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
) -> tuple[Kernel, Callable[..., tuple], bool, Shape, int, torch.Tensor]:  # fmt: skip
    """What calls that differ in addresses only share: the kernel, its tensor maps as a function of
    the addresses of q, k, v and out, whether it counts tiles, its shape, its number of CTAs, and a
    single number seen as an LSE: `empty_like` takes a quarter of the time of `empty`."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    cfg, shape, grid = schedule(config, q_size, k_size, causal, num_sms)
    o_strides = (math.prod(q_size[1:]), q_size[2] * q_size[3], q_size[3], 1)
    k, v = Layout(1, k_size, k_strides), Layout(2, k_size, v_strides)
    kernel = compiled(replace(cfg, l2_bytes=0), dtype, device)  # the kernel does not know it
    maps = kernel.tensor_maps(
        Layout(0, q_size, q_strides), k, v, Layout(3, q_size, o_strides), k, v
    )
    one = torch.empty((), dtype=torch.float32, device=torch.device("cuda", device))
    lse = one.expand(q_size[0], q_size[2], q_size[1])
    return kernel, maps, cfg.schedule == "dynamic", shape, grid, lse


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention forward; shapes and semantics as `attn_ladder.attention`.

    Strides of q, k, v must be multiples of 16 bytes, addresses too, the last dimension contiguous.
    `softmax_scale` must be positive. Returns out (batch, seqlen_q, nheads, headdim) in the dtype of
    q, and the natural-log log-sum-exp (batch, nheads, seqlen_q) in fp32.
    """
    device = q.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return forward(q, k, v, softmax_scale=softmax_scale, causal=causal, config=config)
    kernel, maps, dynamic, shape, grid, lse = plan(
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


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if capability != (9, 0):
        return f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.headdim not in (64, 128, 256):
        return f"supports headdim 64, 128 and 256, not headdim={problem.headdim}"
    if problem.page_size:
        return f"reads contiguous keys and values, not page_size={problem.page_size}"
    return None
