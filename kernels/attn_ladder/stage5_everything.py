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
- *Ping-pong.* Two consumers take turns to issue products, one's softmax under the other's products
  (Shah et al., 2024, section 3.1); within a consumer the softmax also runs under its own P·V.
- *Fewer bubbles.* The first consumer multiplies only the visible half of the diagonal block; at
  headdim 64 the next tile's first product runs under the epilogue; tiles are handed out longest
  first by a counter, or in pairs of a long and a short one; heads are grouped so that their keys
  and values stay in L2.

Expected: `tensor pipe active` at headdim 128, full, 8k from stage 4's level to 97 % (FA3: 87 %), no
masked instruction outside the peeled blocks. What limits it: the tensor pipe (then power) at
headdim 128, issue slots and MUFU together at headdim 64, 2.2 µs a tile outside the hot loop.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere.async_copy import mbarrier_arrive
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder.launch import Kernel, tile_counter
from attn_ladder.problem import Problem
from attn_ladder.stage import Stage

STAGE = Stage(title="Everything: lazy maximum, ping-pong, no masks", removes="branching")


ZERO, ONE, TWO = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
LN_2 = gl.constexpr(math.log(2))
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for; a consumer is one warpgroup with 64 query rows."""

    headdim: int
    causal: bool
    ragged: bool = False  # key tails and diagonals that no block boundary meets
    consumers: int = 2
    BLOCK_N: int = 128
    num_buffers: int = 2  # depth of the rings of K and V
    num_q_buffers: int = 1
    q_in_registers: bool = True
    ping_pong: bool = True
    half_diagonal: bool = False  # the first consumer skips the hidden half of the diagonal block
    cross_tile: bool = False  # the next tile's first product runs under the epilogue
    schedule: str = "static"  # or "pairs", "dynamic"
    l2_bytes: int = 32 << 20  # keys and values of the heads that are processed together
    list_size: int = 1024  # tiles that one CTA can be handed dynamically, a power of two

    def __post_init__(self) -> None:
        if self.headdim not in (64, 128):
            raise ValueError(f"headdim={self.headdim} must be 64 or 128")
        if self.consumers not in (2, 3):
            raise ValueError(f"consumers={self.consumers} must be 2 or 3")
        if self.BLOCK_N not in (64, 128):
            raise ValueError(f"BLOCK_N={self.BLOCK_N} must be 64 or 128")
        if self.num_buffers < 2:
            raise ValueError(f"num_buffers={self.num_buffers} must be at least 2")
        if self.schedule not in ("static", "pairs", "dynamic"):
            raise ValueError(f"schedule={self.schedule!r} must be static, pairs or dynamic")
        if self.ping_pong and self.consumers != 2:
            raise ValueError(f"ping_pong needs 2 consumers, not {self.consumers}")
        if self.half_diagonal and (self.ragged or self.consumers != 2 or self.BLOCK_N != 128):
            raise ValueError("half_diagonal needs 2 consumers, BLOCK_N=128 and ragged=False")
        if self.ragged and self.causal and (self.consumers != 2 or self.BLOCK_N != 128):
            raise ValueError("ragged causal tiles need 2 consumers and BLOCK_N=128")
        if self.cross_tile and (self.causal or self.schedule != "static"):
            raise ValueError("cross_tile needs causal=False and the static schedule")

    @property
    def BLOCK_M(self) -> int:
        return 64 * self.consumers


# Reasons: ratio to FA3 over 16k tokens, hidden 2048, on an H100, spaced launches.
_TWO_128 = Config(128, True, half_diagonal=True, schedule="pairs")
_TWO_64 = Config(64, True, num_buffers=3, half_diagonal=True, schedule="pairs")
_THREE_64 = Config(
    64, True, consumers=3, num_buffers=3, q_in_registers=False, ping_pong=False, schedule="dynamic"
)


def choose_config(
    headdim: int, causal: bool, seqlen_q: int, seqlen_k: int, ragged: bool = False
) -> Config:
    """The measured best configuration; no search at run time."""
    if headdim == 128 and not causal:
        config = Config(128, False)  # 1.11 to 1.14; three consumers would spill
    elif headdim == 128 and seqlen_k <= 2048:
        config = _TWO_128  # pairs win 0.5 to 2 % over the counter; 1.22, 1.14, 1.07
    elif headdim == 128:
        config = replace(_TWO_128, schedule="dynamic")  # 1 to 2 % over static; 1.08, 1.08, 1.09
    elif causal and seqlen_k <= 512:
        config = _TWO_64  # 1.29
    elif causal and (seqlen_k <= 4096 or ragged):
        # ping-pong is worth 4 %, groups of 16 MB more than 32 MB; 1.33, 1.13, 1.11
        config = replace(_TWO_64, schedule="dynamic", l2_bytes=16 << 20)
    elif causal:
        config = _THREE_64  # 1.08, 1.09: 192 rows share a key block
    elif seqlen_k <= 1024 or ragged:
        config = replace(
            _TWO_64, causal=False, half_diagonal=False, cross_tile=True, schedule="static"
        )
    else:
        # the overlap across tiles is worth 1.5 to 2 %; 1.15, 1.13, 1.08, 1.08
        config = replace(
            _THREE_64, causal=False, num_q_buffers=2, cross_tile=True, schedule="static"
        )
    if not ragged:
        return config
    # a second mask: at headdim 128 there is no register left for Q
    return replace(config, ragged=True, half_diagonal=False, q_in_registers=headdim == 64)


class Shape(NamedTuple):
    """The problem, as the kernel sees it; `num_m` counts the tiles of one head."""

    seqlen_q: int
    seqlen_k: int
    nheads: int
    group: int  # query heads that share a key head
    num_m: int
    num_heads: int  # batch * nheads
    heads_together: int


@gluon.constexpr_function
def row_layout(columns):
    """Layout of a product of 64 rows by one warpgroup, [64, columns] in fp32."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def barrier_asm(operation, index):
    return f"bar.{operation} {8 + index}, 256; mov.b32 $0, $1;"


@gluon.jit
def take_turn(OPERATION: gl.constexpr, INDEX: gl.constexpr, cfg: gl.constexpr):
    """`sync` or `arrive` of the two consumers on a hardware barrier that Triton leaves free."""
    if cfg.ping_pong:
        thread = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
        gl.inline_asm_elementwise(
            barrier_asm(OPERATION, INDEX), "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def release(empty_bar):
    """Free a slot of a ring: all 128 threads arrive. Gluon's own arrive costs a `bar.sync`, this
    one (meant for asynchronous copies, of which there are none here) does not."""
    mbarrier_arrive(empty_bar, increment_count=False)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def pin(l_i):
    """Keep the softmax above the wait that follows. ptxas would hoist the wait, but not across an
    edge of the control flow, here an exit that is never taken (sums are not negative)."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred q; setp.lt.f32 q, $4, 0f00000000; @q exit;"
        " mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }",
        "=f,=f,=f,=f,f,f,f,f", [l_i], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def thread_sums(x):
    """[64, columns] to [64, 8]: sums within each thread, no shuffle."""
    return gl.sum(gl.reshape(x, [64, x.shape[1] // 8, 8]), 1)


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def num_tiles(shape, cfg: gl.constexpr):
    """How many tiles this CTA takes; with the counter, the end of the ids."""
    tiles = shape.num_heads * shape.num_m
    if cfg.schedule == "dynamic":
        return tiles
    if cfg.schedule == "pairs":
        return 2 * gl.cdiv(tiles // 2 - gl.program_id(0), gl.num_programs(0))
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def tile_of(i, shape, cfg: gl.constexpr):
    """Tile i as (block of query rows, batch * nheads + head)."""
    if cfg.schedule == "pairs":
        pair = gl.program_id(0) + gl.num_programs(0) * (i // 2)
        head = pair // (shape.num_m // 2)
        m = pair - head * (shape.num_m // 2)
        if i % 2 == 0:
            m = shape.num_m - 1 - m
    else:
        t = i
        if cfg.schedule == "static":
            t = gl.program_id(0) + gl.num_programs(0) * i
        if cfg.causal:  # groups of heads, in each the longest tile first
            first = t // (shape.num_m * shape.heads_together) * shape.heads_together
            size = max(1, min(shape.heads_together, shape.num_heads - first))
            rest = t - first * shape.num_m
            head = first + rest % size
            m = shape.num_m - 1 - rest // size
        else:
            head = t // shape.num_m
            m = t - head * shape.num_m
    return m, head


@gluon.jit
def key_blocks(m, shape, cfg: gl.constexpr):
    """(number of key blocks of a tile, first key of the lowest one).

    Blocks start at multiples of BLOCK_N, except in ragged causal tiles: there the last one ends at
    the diagonal of the tile, and the lowest one may begin before key 0, where TMA reads zeros.
    """
    lowest = 0
    keys = shape.seqlen_k
    if cfg.causal:
        keys += min((m + 1) * cfg.BLOCK_M - shape.seqlen_q, 0)
        if cfg.ragged:
            keys = (m + 1) * cfg.BLOCK_M + shape.seqlen_k - shape.seqlen_q
    n = max((keys + cfg.BLOCK_N - 1) // cfg.BLOCK_N, 1)
    if cfg.causal and cfg.ragged:
        lowest = keys - n * cfg.BLOCK_N
    return n, lowest


@gluon.jit
def fill(
    desc, coordinates, ready_bar, empty_bar, smem, turn, DEPTH: gl.constexpr, BYTES: gl.constexpr
):  # fmt: skip
    """Load a tile into slot `turn % DEPTH` of a ring, once it is free."""
    slot = turn % DEPTH
    mbarrier.wait(empty_bar.index(slot), ((turn // DEPTH) & 1) ^ 1)
    mbarrier.expect(ready_bar.index(slot), BYTES)
    tma.async_copy_global_to_shared(desc, coordinates, ready_bar.index(slot), smem.index(slot))


@gluon.jit
def load_partition(
    q_desc, k_desc, v_desc, counter_ptr, smem, bars, shape, cfg: gl.constexpr
):  # fmt: skip
    """One warp: Q once a tile, K and V a block at a time, into the rings as slots come free."""
    q_smem, k_smem, v_smem, o_smem, tiles_smem = smem
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, tile_ready, redo_ready = bars
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    DEPTH: gl.constexpr = cfg.num_buffers
    Q_DEPTH: gl.constexpr = cfg.num_q_buffers
    CONSUMERS: gl.constexpr = cfg.consumers
    Q_BYTES: gl.constexpr = 128 * HEADDIM
    KV_BYTES: gl.constexpr = BLOCK_N * 2 * HEADDIM
    it = 0
    ti = 0
    cur = 0
    if cfg.schedule == "dynamic":
        cur = gl.program_id(0)
    end = num_tiles(shape, cfg)
    counted = counter_ptr.to(gl.int64) != 0
    while cur < end:
        m, head = tile_of(cur, shape, cfg)
        b = head // shape.nheads
        h = head - b * shape.nheads
        hk = h // shape.group
        n, lowest = key_blocks(m, shape, cfg)
        fill(
            k_desc,
            [b, lowest + (n - 1) * BLOCK_N, hk, 0],
            k_ready,
            k_empty,
            k_smem,
            it,
            DEPTH,
            KV_BYTES,
        )
        for w in gl.static_range(CONSUMERS):
            slot = w * Q_DEPTH + ti % Q_DEPTH
            mbarrier.wait(q_empty.index(slot), ((ti // Q_DEPTH) & 1) ^ 1)
            mbarrier.expect(q_ready.index(slot), Q_BYTES)
            tma.async_copy_global_to_shared(
                q_desc, [b, m * cfg.BLOCK_M + w * 64, h, 0], q_ready.index(slot), q_smem.index(slot)
            )
        following = cur + 1
        ti += 1
        if cfg.schedule == "dynamic":
            following = end
            if ti < cfg.list_size:
                following = cur + gl.num_programs(0)
                if counted:
                    following = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
            one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
            tiles_smem.index(ti % cfg.list_size).store(gl.full([1], 0, gl.int32, one) + following)
            mbarrier.arrive(tile_ready.index((ti - 1) % 8), count=1)
        for j in range(n - 2, -1, -1):
            fill(
                k_desc,
                [b, lowest + j * BLOCK_N, hk, 0],
                k_ready,
                k_empty,
                k_smem,
                it + 1,
                DEPTH,
                KV_BYTES,
            )
            fill(
                v_desc,
                [b, lowest + (j + 1) * BLOCK_N, hk, 0],
                v_ready,
                v_empty,
                v_smem,
                it,
                DEPTH,
                KV_BYTES,
            )
            it += 1
        fill(v_desc, [b, lowest, hk, 0], v_ready, v_empty, v_smem, it, DEPTH, KV_BYTES)
        it += 1
        cur = following
    if cfg.schedule == "dynamic":  # the last CTA to finish resets the counter for the next launch
        if counted:
            done = gl.atomic_add(counter_ptr + 1, 1, sem="acq_rel")
            if done == gl.num_programs(0) - 1:
                gl.store(counter_ptr, 0)
                gl.store(counter_ptr + 1, 0)


@gluon.jit
def skip_block(k_ready, k_empty, v_ready, v_empty, it, cfg: gl.constexpr):
    """Free a block that these 64 rows do not see."""
    slot = it % cfg.num_buffers
    phase = (it // cfg.num_buffers) & 1
    mbarrier.wait(k_ready.index(slot), phase)
    release(k_empty.index(slot))
    mbarrier.wait(v_ready.index(slot), phase)
    release(v_empty.index(slot))


@gluon.jit
def first_scores(q, k, K_ROWS: gl.constexpr, cfg: gl.constexpr):
    """Issue Q·Kᵀ of the first key block: [64, K_ROWS], asynchronous."""
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    layout: gl.constexpr = row_layout(K_ROWS)
    k = k.reshape([BLOCK_N, HEADDIM])
    if K_ROWS < BLOCK_N:
        k = k.slice(0, K_ROWS, dim=0)
    if cfg.q_in_registers:
        q = gl.convert_layout(q, gl.DotOperandLayout(0, layout, 2))
    zero = gl.zeros([64, K_ROWS], gl.float32, layout)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def hide(s, row, column, shape, cfg: gl.constexpr):
    """Scores that do not count become -inf; the first one of s is at (row, column)."""
    layout: gl.constexpr = s.type.layout
    offs_n = column + gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
    if cfg.causal:
        offs_m = row + gl.arange(0, 64, gl.SliceLayout(1, layout))
        last = offs_m + shape.seqlen_k - shape.seqlen_q
        s = gl.where(last[:, None] >= offs_n[None, :], s, -float("inf"))
        if cfg.ragged:
            s = gl.where((offs_n >= 0)[None, :], s, -float("inf"))
    else:
        s = gl.where((offs_n < shape.seqlen_k)[None, :], s, -float("inf"))
    return s


@gluon.jit
def key_step(
    q, p, acc, l_i, m_i, smem, bars, it, qk_scale, column,
    WG: gl.constexpr, P_COLUMNS: gl.constexpr, LOWEST: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Q·Kᵀ of the next block and P·V of this one in flight; the next softmax under P·V.

    The last P has P_COLUMNS columns; p [64, P_COLUMNS], acc [64, headdim], l_i [64, 8], m_i [64].
    """
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    k_smem, v_smem = smem
    k_ready, k_empty, v_ready, v_empty = bars
    layout: gl.constexpr = row_layout(BLOCK_N)
    k_slot = (it + 1) % cfg.num_buffers
    v_slot = it % cfg.num_buffers
    v_phase = (it // cfg.num_buffers) & 1
    mbarrier.wait(k_ready.index(k_slot), ((it + 1) // cfg.num_buffers) & 1)
    take_turn("sync", WG, cfg)
    k = k_smem.index(k_slot).reshape([BLOCK_N, HEADDIM])
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    v = v_smem.index(v_slot).reshape([BLOCK_N, HEADDIM])
    if P_COLUMNS < BLOCK_N:
        v = v.slice(0, P_COLUMNS, dim=0)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    take_turn("arrive", 1 - WG, cfg)
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    release(k_empty.index(k_slot))
    if LOWEST:
        offs_n = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        s = gl.where((offs_n >= 0)[None, :], s, -float("inf"))
    p = exp2(s * qk_scale - m_i[:, None])
    l_i = pin(l_i + gl.convert_layout(thread_sums(p), l_i.type.layout))
    acc, p, l_i = warpgroup_mma_wait(0, deps=[acc, p, l_i])
    p = gl.convert_layout(p.to(k_smem.dtype), gl.DotOperandLayout(0, row_layout(HEADDIM), 2))
    release(v_empty.index(v_slot))
    return p, acc, l_i


@gluon.jit
def redo_tile(
    o_desc, redo_descs, lse_ptr, q_smem, tile_smem, ready_bar, loads, head, row, shape, qk_scale,
    cfg: gl.constexpr,
):  # fmt: skip
    """Rare: 64 rows once more with the online softmax, 64 keys at a time through one buffer.

    Q stays in shared memory: as a register operand it was overwritten at headdim 64.
    """
    q_desc, k_redo_desc, v_redo_desc = redo_descs
    HEADDIM: gl.constexpr = cfg.headdim
    s_layout: gl.constexpr = row_layout(64)
    o_layout: gl.constexpr = row_layout(HEADDIM)
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    BYTES: gl.constexpr = 128 * HEADDIM
    b = head // shape.nheads
    h = head - b * shape.nheads
    q = q_smem.reshape([64, HEADDIM])
    tile = tile_smem.reshape([64, HEADDIM])
    gl.thread_barrier()
    mbarrier.expect(ready_bar, BYTES)
    tma.async_copy_global_to_shared(q_desc, [b, row, h, 0], ready_bar, q_smem)
    mbarrier.wait(ready_bar, loads & 1)
    loads += 1
    m_i = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([64, HEADDIM], gl.float32, o_layout)
    keys = shape.seqlen_k
    if cfg.causal:
        keys = min(keys, row + 64 + shape.seqlen_k - shape.seqlen_q)
    for j in range((keys + 63) // 64):
        gl.thread_barrier()
        mbarrier.expect(ready_bar, BYTES)
        tma.async_copy_global_to_shared(
            k_redo_desc, [b, j * 64, h // shape.group, 0], ready_bar, tile_smem
        )
        mbarrier.wait(ready_bar, loads & 1)
        zero = gl.zeros([64, 64], gl.float32, s_layout)
        s = warpgroup_mma(q, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        mbarrier.expect(ready_bar, BYTES)
        tma.async_copy_global_to_shared(
            v_redo_desc, [b, j * 64, h // shape.group, 0], ready_bar, tile_smem
        )
        s = hide(s, row, j * 64, shape, cfg)
        m_new = gl.maximum(m_i, gl.max(s, 1))
        m_safe = gl.where(m_new == -float("inf"), 0.0, m_new)
        p = exp2((s - m_safe[:, None]) * qk_scale)
        alpha = exp2((m_i - m_safe) * qk_scale)
        l_i = l_i * alpha + gl.sum(p, 1)
        acc = acc * gl.convert_layout(alpha, rows)[:, None]
        m_i = m_new
        mbarrier.wait(ready_bar, (loads + 1) & 1)
        loads += 2
        p = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
        acc = warpgroup_mma(p, tile, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    offs_m = row + gl.arange(0, 64, rows)
    l_o = gl.convert_layout(l_i, rows)
    lse = (gl.convert_layout(m_i, rows) * qk_scale + log2(l_o)) * LN_2
    lse_row_ptr = lse_ptr + head.to(gl.int64) * shape.seqlen_q
    gl.store(lse_row_ptr + offs_m, lse, mask=offs_m < shape.seqlen_q)
    acc = acc * gl.where(l_o == 0.0, 0.0, 1.0 / l_o)[:, None]
    gl.thread_barrier()
    tile.store(acc.to(q_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, row, h, 0], tile_smem)
    tma.store_wait(0)
    return loads


@gluon.jit
def softmax_partition(
    o_desc, redo_descs, lse_ptr, smem, bars, shape, qk_scale, WG: gl.constexpr, cfg: gl.constexpr
):  # fmt: skip
    """One warpgroup: 64 rows of every tile of this CTA."""
    q_smem, k_smem, v_smem, o_smem, tiles_smem = smem
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, tile_ready, redo_ready = bars
    kv_smem = (k_smem, v_smem)
    kv_bars = (k_ready, k_empty, v_ready, v_empty)
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    HALF: gl.constexpr = cfg.half_diagonal and WG == 0
    FIRST: gl.constexpr = 64 if HALF else BLOCK_N  # columns of the first block that are used
    s_layout: gl.constexpr = row_layout(BLOCK_N)
    first_layout: gl.constexpr = row_layout(FIRST)
    o_layout: gl.constexpr = row_layout(HEADDIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_layout: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    sums_layout: gl.constexpr = thread_sums(
        gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    ).type.layout
    o_tile = o_smem.index(WG).reshape([64, HEADDIM])
    list_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    it = 0
    ti = 0
    cur = 0
    if cfg.schedule == "dynamic":
        cur = gl.program_id(0)
    end = num_tiles(shape, cfg)
    offset = shape.seqlen_k - shape.seqlen_q
    flags = gl.full([64], 0, gl.int32, rows)
    s = gl.zeros([64, FIRST], gl.float32, first_layout)
    if cfg.q_in_registers:
        q_regs = gl.zeros([64, HEADDIM], k_smem.dtype, q_layout)
    if cfg.cross_tile:
        mbarrier.wait(q_ready.index(WG * cfg.num_q_buffers), 0, pred=cur < end)
        mbarrier.wait(k_ready.index(0), 0, pred=cur < end)
        q_tile = q_smem.index(WG * cfg.num_q_buffers).reshape([64, HEADDIM])
        if cfg.q_in_registers:
            q_regs = q_tile.load(q_layout)
            mbarrier.arrive(q_empty.index(WG * cfg.num_q_buffers), count=1)
            s = first_scores(q_regs, k_smem.index(0), FIRST, cfg)
        else:
            s = first_scores(q_tile, k_smem.index(0), FIRST, cfg)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k_empty.index(0))
    if WG == cfg.consumers - 1:
        take_turn("arrive", 0, cfg)
    while cur < end:
        m, head = tile_of(cur, shape, cfg)
        row = m * cfg.BLOCK_M + WG * 64
        n, lowest = key_blocks(m, shape, cfg)
        if cfg.causal and cfg.consumers == 3:
            seen = min((row + 64 + offset + BLOCK_N - 1) // BLOCK_N, n)
            for _ in range(n - seen):
                skip_block(k_ready, k_empty, v_ready, v_empty, it, cfg)
                it += 1
            n = seen
        q_slot = WG * cfg.num_q_buffers + ti % cfg.num_q_buffers
        q = q_smem.index(q_slot).reshape([64, HEADDIM])
        if not cfg.cross_tile:
            mbarrier.wait(q_ready.index(q_slot), (ti // cfg.num_q_buffers) & 1)
            if cfg.q_in_registers:
                q_regs = q.load(q_layout)
                mbarrier.arrive(q_empty.index(q_slot), count=1)
        if cfg.q_in_registers:
            q = q_regs
        if not cfg.cross_tile:
            k_slot = it % cfg.num_buffers
            mbarrier.wait(k_ready.index(k_slot), (it // cfg.num_buffers) & 1)
            s = first_scores(q, k_smem.index(k_slot), FIRST, cfg)
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_empty.index(k_slot))
        if cfg.causal or cfg.ragged:
            s = hide(s, row, lowest + (n - 1) * BLOCK_N, shape, cfg)
        m_first = gl.max(s, 1) * qk_scale
        m_i = gl.convert_layout(m_first, gl.SliceLayout(1, s_layout))
        if cfg.causal and cfg.ragged:
            m_first = gl.where(m_first == -float("inf"), 0.0, m_first)
        p_first = exp2(s * qk_scale - m_first[:, None])
        l_i = gl.convert_layout(thread_sums(p_first), sums_layout)
        acc = gl.zeros([64, HEADDIM], gl.float32, o_layout)
        p_first = gl.convert_layout(p_first.to(k_smem.dtype), p_layout)
        if HALF:
            if n > 1:
                p, acc, l_i = key_step(
                    q,
                    p_first,
                    acc,
                    l_i,
                    m_i,
                    kv_smem,
                    kv_bars,
                    it,
                    qk_scale,
                    0,
                    WG,
                    FIRST,
                    False,
                    cfg,
                )
                it += 1
            else:
                mbarrier.wait(v_ready.index(it % cfg.num_buffers), (it // cfg.num_buffers) & 1)
                v = v_smem.index(it % cfg.num_buffers).reshape([BLOCK_N, HEADDIM])
                acc = warpgroup_mma(p_first, v.slice(0, FIRST, dim=0), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                p = gl.full([64, BLOCK_N], 0.0, k_smem.dtype, p_layout)
            n -= 1
        else:
            p = p_first
        last = n - 1
        if cfg.causal and cfg.ragged:
            last = n - 2
        for _ in range(last):
            p, acc, l_i = key_step(
                q, p, acc, l_i, m_i, kv_smem, kv_bars, it, qk_scale, 0, WG, BLOCK_N, False, cfg
            )
            it += 1
        if cfg.causal and cfg.ragged:
            if n > 1:
                p, acc, l_i = key_step(
                    q,
                    p,
                    acc,
                    l_i,
                    m_i,
                    kv_smem,
                    kv_bars,
                    it,
                    qk_scale,
                    lowest,
                    WG,
                    BLOCK_N,
                    True,
                    cfg,
                )
                it += 1
        if not cfg.q_in_registers:
            mbarrier.arrive(q_empty.index(q_slot), count=1)
        v_slot = it % cfg.num_buffers
        v_phase = (it // cfg.num_buffers) & 1
        following = cur + 1
        if cfg.schedule == "dynamic":
            mbarrier.wait(tile_ready.index(ti % 8), (ti // 8) & 1)
            following = gl.max(tiles_smem.index((ti + 1) % cfg.list_size).load(list_layout), 0)
        mbarrier.wait(v_ready.index(v_slot), v_phase)
        acc = warpgroup_mma(p, v_smem.index(v_slot).reshape([BLOCK_N, HEADDIM]), acc, is_async=True)
        if cfg.cross_tile:  # after the last tile: of whatever is there, never used
            more = following < end
            k_slot = (it + 1) % cfg.num_buffers
            q_slot = WG * cfg.num_q_buffers + (ti + 1) % cfg.num_q_buffers
            mbarrier.wait(q_ready.index(q_slot), ((ti + 1) // cfg.num_q_buffers) & 1, pred=more)
            q_next = q_smem.index(q_slot).reshape([64, HEADDIM])
            if cfg.q_in_registers:
                q_regs = q_next.load(q_layout)
                mbarrier.arrive(q_empty.index(q_slot), count=1)
                q_next = q_regs
            mbarrier.wait(k_ready.index(k_slot), ((it + 1) // cfg.num_buffers) & 1, pred=more)
            s = first_scores(q_next, k_smem.index(k_slot), FIRST, cfg)
            acc, s = warpgroup_mma_wait(1, deps=[acc, s])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_empty.index(v_slot))
        offs_m = row + gl.arange(0, 64, rows)
        l_i = l_i + 0.0 * gl.convert_layout(thread_sums(acc), l_i.type.layout)  # NaN if not finite
        l_o = gl.convert_layout(gl.sum(l_i, 1), rows)
        inverse = 1.0 / l_o
        lse = (gl.convert_layout(m_i, rows) + log2(l_o)) * LN_2
        bad = gl.where((l_o >= 0.5) & (l_o <= 1152921504606846976.0), 0, 1)
        if cfg.causal and cfg.ragged:
            sees = offs_m + offset >= 0
            inverse = gl.where(sees, inverse, 0.0)
            lse = gl.where(sees, lse, -float("inf"))
            bad = gl.where(sees, bad, 0)
        flags = flags | (bad << (ti % 32))
        lse_row_ptr = lse_ptr + head.to(gl.int64) * shape.seqlen_q
        gl.store(lse_row_ptr + offs_m, lse, mask=offs_m < shape.seqlen_q)
        acc = acc * inverse[:, None]
        tma.store_wait(0)
        o_tile.store(acc.to(k_smem.dtype))
        fence_async_shared()
        b = head // shape.nheads
        tma.async_copy_shared_to_global(
            o_desc, [b, row, head - b * shape.nheads, 0], o_smem.index(WG)
        )
        if cfg.cross_tile:
            s = warpgroup_mma_wait(0, deps=[s])
            release(k_empty.index(k_slot))
        it += 1
        ti += 1
        cur = following
    tma.store_wait(0)
    if WG == 0:
        take_turn("sync", 0, cfg)
    flagged = gl.reduce(flags, 0, either)
    if flagged != 0:
        loads = 0
        for i in range(ti):
            if ((flagged >> (i % 32)) & 1) != 0:
                cur = i
                if cfg.schedule == "dynamic":
                    cur = gl.program_id(0)
                    if i > 0:
                        cur = gl.max(tiles_smem.index(i % cfg.list_size).load(list_layout), 0)
                m, head = tile_of(cur, shape, cfg)
                loads = redo_tile(
                    o_desc, redo_descs, lse_ptr,
                    q_smem.index(WG * cfg.num_q_buffers), o_smem.index(WG), redo_ready.index(WG),
                    loads, head, m * cfg.BLOCK_M + WG * 64, shape, qk_scale, cfg,
                )  # fmt: skip


@gluon.jit
def barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, k_redo_desc, v_redo_desc, lse_ptr, counter_ptr, shape, qk_scale,
    cfg: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    HEADDIM: gl.constexpr = cfg.headdim
    dtype: gl.constexpr = q_desc.dtype
    NUM_Q: gl.constexpr = cfg.consumers * cfg.num_q_buffers
    DEPTH: gl.constexpr = cfg.num_buffers
    LIST: gl.constexpr = cfg.list_size if cfg.schedule == "dynamic" else 1
    q_smem = gl.allocate_shared_memory(dtype, [NUM_Q, 1, 64, 1, HEADDIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [DEPTH, 1, BLOCK_N, 1, HEADDIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [DEPTH, 1, BLOCK_N, 1, HEADDIM], v_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [cfg.consumers, 1, 64, 1, HEADDIM], o_desc.layout)
    list_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles_smem = gl.allocate_shared_memory(gl.int32, [LIST, 1], list_layout)
    q_ready = barriers(NUM_Q, 1)
    q_empty = barriers(NUM_Q, 1)
    k_ready = barriers(DEPTH, 1)
    k_empty = barriers(DEPTH, 128 * cfg.consumers)
    v_ready = barriers(DEPTH, 1)
    v_empty = barriers(DEPTH, 128 * cfg.consumers)
    tile_ready = barriers(8, 1)
    redo_ready = barriers(cfg.consumers, 1)
    smem = (q_smem, k_smem, v_smem, o_smem, tiles_smem)
    bars = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, tile_ready, redo_ready)
    redo = (q_desc, k_redo_desc, v_redo_desc)
    if cfg.consumers == 2:
        gl.warp_specialize(
            [
                (
                    softmax_partition,
                    (o_desc, redo, lse_ptr, smem, bars, shape, qk_scale, ZERO, cfg),
                ),
                (softmax_partition, (o_desc, redo, lse_ptr, smem, bars, shape, qk_scale, ONE, cfg)),
                (load_partition, (q_desc, k_desc, v_desc, counter_ptr, smem, bars, shape, cfg)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    softmax_partition,
                    (o_desc, redo, lse_ptr, smem, bars, shape, qk_scale, ZERO, cfg),
                ),
                (softmax_partition, (o_desc, redo, lse_ptr, smem, bars, shape, qk_scale, ONE, cfg)),
                (softmax_partition, (o_desc, redo, lse_ptr, smem, bars, shape, qk_scale, TWO, cfg)),
                (load_partition, (q_desc, k_desc, v_desc, counter_ptr, smem, bars, shape, cfg)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def source(cfg: Config, dtype: str) -> dict:
    """The kernel with the types of its arguments, as `launch.Kernel` and `offline` take it."""
    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for([1, 64, 1, cfg.headdim], element)
    rows = dict(q=64, k=cfg.BLOCK_N, v=cfg.BLOCK_N, o=64, k_redo=64, v_redo=64)
    signature = {
        f"{name}_desc": f"tensordesc<{dtype}[1, {n}, 1, {cfg.headdim}],{layout!r}>"
        for name, n in rows.items()
    }
    signature |= {"lse_ptr": "*fp32", "counter_ptr": "*i32", "qk_scale": "fp32"}
    signature["shape"] = Shape(*["i32"] * len(Shape._fields))
    return {"kernel": attention_kernel, "signature": signature, "constexprs": {"cfg": cfg}}


def offline(dtype: str = "bf16", **config) -> dict:
    """`source` from plain values, for `attn_ladder.offline.report`."""
    return source(Config(**config), dtype)


@lru_cache(maxsize=64)
def compiled(cfg: Config, dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(**source(cfg, {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]))


@dataclass(frozen=True, eq=False)
class Plan:
    """What calls with equal shapes, strides, dtype and device share; hashed by identity."""

    cfg: Config
    kernel: Kernel
    shape: Shape
    grid: int
    sizes: tuple[tuple[int, ...], ...]  # of q, k, v, out
    strides: tuple[tuple[int, ...], ...]


def layout_of(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor map; where a dimension has one element, its stride is arbitrary but must
    be a multiple of 16 bytes."""
    return tuple(n if size > 1 else sizes[3] for size, n in zip(sizes, strides, strict=True))


def schedule(
    config: Config | None, batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int,
    headdim: int, causal: bool, num_sms: int,
) -> tuple[Config, Shape, int]:  # fmt: skip
    """Configuration, shape and number of CTAs of a problem.

    Raises `ValueError` if a given `config` cannot compute it.
    """
    offset = seqlen_k - seqlen_q
    ragged = seqlen_k % 128 != 0 or (causal and (offset < 0 or offset % 128 != 0))
    cfg = config or choose_config(headdim, causal, seqlen_q, seqlen_k, ragged)
    if (cfg.headdim, cfg.causal) != (headdim, causal) or (ragged and not cfg.ragged):
        raise ValueError(f"config={cfg} cannot compute {headdim=} {causal=} {ragged=}")
    num_m = -(-seqlen_q // cfg.BLOCK_M)
    num_heads = batch * nheads
    if cfg.schedule == "pairs" and num_m % 2:
        cfg = replace(cfg, schedule="dynamic")
    tiles = num_m * num_heads
    if cfg.schedule == "dynamic" and tiles > num_sms * cfg.list_size:
        cfg = replace(cfg, schedule="static")
    group = nheads // nheads_k
    heads = min(num_heads, max(1, cfg.l2_bytes // (4 * seqlen_k * headdim)) * group)
    heads = -(-num_heads // -(-num_heads // heads))  # groups of equal size: a short last one hurts
    heads = min(num_heads, -(-heads // group) * group)
    shape = Shape(seqlen_q, seqlen_k, nheads, group, num_m, num_heads, heads)
    return cfg, shape, min(num_sms, tiles // 2 if cfg.schedule == "pairs" else tiles)


@lru_cache(maxsize=512)
def plan(
    dtype: torch.dtype, device: int, q_size, q_stride, k_size, k_stride, v_stride, causal, config
) -> Plan:  # fmt: skip
    batch, seqlen_q, nheads, headdim = q_size
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    cfg, shape, grid = schedule(
        config, batch, seqlen_q, k_size[1], nheads, k_size[2], headdim, causal, num_sms
    )
    o_stride = (seqlen_q * nheads * headdim, nheads * headdim, headdim, 1)
    sizes = (q_size, k_size, k_size, q_size)
    strides = (q_stride, k_stride, v_stride, o_stride)
    strides = tuple(layout_of(*both) for both in zip(sizes, strides, strict=True))
    return Plan(cfg, compiled(cfg, dtype, device), shape, grid, sizes, strides)


@lru_cache(maxsize=1024)
def tensor_maps(plan: Plan, *pointers: int) -> tuple:
    """Launch arguments of the six descriptors: q, k, v, out and k, v in blocks of 64 rows."""
    arguments = ()
    for position, tensor in enumerate((0, 1, 2, 3, 1, 2)):
        arguments += plan.kernel.tensor_map(
            position, pointers[tensor], plan.sizes[tensor], plan.strides[tensor]
        )
    return arguments


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

    Strides of q, k, v must be multiples of 16 bytes, pointers too, the last dimension contiguous.
    `softmax_scale` must be positive. Returns out (batch, seqlen_q, nheads, headdim) in the dtype of
    q, and the natural-log log-sum-exp (batch, nheads, seqlen_q) in fp32.
    """
    device = q.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return forward(q, k, v, softmax_scale=softmax_scale, causal=causal, config=config)
    size = q.shape
    work = plan(q.dtype, device, size, q.stride(), k.shape, k.stride(), v.stride(), causal, config)
    out = torch.empty(size, dtype=q.dtype, device=q.device)
    lse = torch.empty((size[0], size[2], size[1]), dtype=torch.float32, device=q.device)
    maps = tensor_maps(work, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    stream = torch._C._cuda_getCurrentRawStream(device)
    counter = tile_counter(device, stream) if work.cfg.schedule == "dynamic" else 0
    qk_scale = LOG2_E * (size[3] ** -0.5 if softmax_scale is None else softmax_scale)
    work.kernel.launch(
        work.grid, stream, (*maps, lse.data_ptr(), counter, work.shape, qk_scale, None)
    )
    return out, lse


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if capability != (9, 0):
        return f"stage5 needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.headdim not in (64, 128):
        return f"stage5 supports headdim 64 and 128; the problem has headdim={problem.headdim}"
    if problem.page_size:
        return f"stage5 has no paged keys; the problem has page_size={problem.page_size}"
    return None
