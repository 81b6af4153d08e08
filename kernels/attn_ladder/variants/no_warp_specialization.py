"""The top stage without warp specialization: the warpgroups that compute also issue the loads.

There is no producer and there are no turns. Each warpgroup loads its own Q, and the first, as in
stage 3, also K and V: under the products of a step it waits until the slots of the next K and V are
free and fills them, and under the last product of a tile those that the next tile begins with. Lazy
maximum with guard and redo, mask-free interior, tiles, rings and the persistent grid are the top
stage's. What needs a producer or turns goes with them: causal tiles come in pairs of a long and a
short one from a list, since nobody is free to wait for a counter, with two warpgroups; a softmax
runs under the warpgroup's own P·V; and no product crosses the border of two tiles.

What should move against the top stage: GPU time up and `tensor pipe active` down, most at headdim
64, where turns matter most; `samples_mbarrier` and `samples_cta_barrier` up in the first
warpgroup, which waits for the slowest one at each step and meets at barriers around its loads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder import stage5_everything
from attn_ladder.problem import Problem
from attn_ladder.rows import hide_diagonal, redo_tile, store_tile
from attn_ladder.stage import Variant
from attn_ladder.stage5_everything import first_scores, key_blocks
from attn_ladder.tiles import num_tiles, tile_of
from attn_ladder.variants._copied import copied
from attn_ladder.warpgroup import (
    barriers,
    either,
    exp2,
    make_ring,
    pin,
    release,
    row_layout,
    thread_sums,
)

VARIANT = Variant(
    title="Top stage without warp specialization",
    of="stage5",
    changes="the warps that compute also load; no turns",
)


@gluon.jit
def load(desc, coord, ring, slot, phase, needed):
    """`warpgroup.fill`, if the tile is needed."""
    smem, ready_bar, empty_bar = ring
    bar = ready_bar.index(slot)
    mbarrier.wait(empty_bar.index(slot), phase ^ 1, pred=needed)
    mbarrier.expect(bar, desc.block_type.nbytes, pred=needed)
    tma.async_copy_global_to_shared(desc, coord, bar, smem.index(slot), pred=needed)


@gluon.jit
def load_block(desc, b, j, hk, ring, it, needed, cfg: gl.constexpr):
    """Block j of the keys or values into the slot of the `it`th block of this CTA."""
    D: gl.constexpr = cfg.num_buffers
    load(desc, [b, j * cfg.BLOCK_N, hk, 0], ring, it % D, (it // D) & 1, needed)


@gluon.jit
def load_first(descs, rings, ti, end, it, shape, WG: gl.constexpr, cfg: gl.constexpr):
    """What tile `ti` of this CTA begins with, if there is one: Q, two blocks of K, one of V."""
    q_desc, k_desc, v_desc = descs
    q_ring, k_ring, v_ring = rings
    Q_DEPTH: gl.constexpr = cfg.num_q_buffers
    m, head = tile_of(ti, shape, cfg)
    b = head // shape.nheads
    h = head - b * shape.nheads
    hk = h // shape.group
    n, _ = key_blocks(m, shape, cfg)
    there = ti < end
    if WG == 0:
        load_block(k_desc, b, n - 1, hk, k_ring, it, there, cfg)
    slot = WG * Q_DEPTH + ti % Q_DEPTH
    coord = [b, m * cfg.BLOCK_M + WG * 64, h, 0]
    load(q_desc, coord, q_ring, slot, (ti // Q_DEPTH) & 1, there)
    if WG == 0:
        load_block(v_desc, b, n - 1, hk, v_ring, it, there, cfg)
        load_block(k_desc, b, n - 2, hk, k_ring, it + 1, there & (n > 1), cfg)


@gluon.jit
def key_step(
    q, p, acc, l_i, m_i, descs, rings, b, j, hk, it, qk_scale,
    WG: gl.constexpr, P_COLUMNS: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Q·Kᵀ of block j and P·V of block j + 1, the `it`th of this CTA, and the softmax of block j.

    Under the products the first warpgroup loads what comes next: K of block j - 1, if there is one,
    and V of block j. p [64, P_COLUMNS], acc [64, headdim], l_i [64, 8], m_i [64].
    """
    _, k_ring, v_ring = rings
    N: gl.constexpr = cfg.BLOCK_N
    D: gl.constexpr = cfg.num_buffers
    k_slot = (it + 1) % D
    slot = it % D
    mbarrier.wait(k_ring[1].index(k_slot), ((it + 1) // D) & 1)
    k = k_ring[0].index(k_slot).reshape([N, cfg.headdim]).permute((1, 0))
    zero = gl.zeros([64, N], gl.float32, row_layout(N))
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ring[1].index(slot), (it // D) & 1)
    v = v_ring[0].index(slot).reshape([N, cfg.headdim]).slice(0, P_COLUMNS, dim=0)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if WG == 0:
        load_block(descs[1], b, j - 1, hk, k_ring, it + 2, j > 0, cfg)
        load_block(descs[2], b, j, hk, v_ring, it + 1, True, cfg)
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    release(k_ring, k_slot)
    p = exp2(s * qk_scale - m_i[:, None])
    l_i = pin(l_i + gl.convert_layout(thread_sums(p), l_i.type.layout))
    acc, p, l_i = warpgroup_mma_wait(0, deps=[acc, p, l_i])
    p = gl.convert_layout(p.to(v_ring[0].dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    release(v_ring, slot)
    return p, acc, l_i


@gluon.jit
def warpgroup_partition(given, WG: gl.constexpr, cfg: gl.constexpr):
    """One warpgroup: 64 rows of every tile of this CTA, from loading to storing."""
    descs, redo_descs, rings, redo_smem, redo_bar, out, shape, qk_scale = given
    q_ring, k_ring, v_ring = rings
    N: gl.constexpr = cfg.BLOCK_N
    D: gl.constexpr = cfg.num_buffers
    HEADDIM: gl.constexpr = cfg.headdim
    dtype: gl.constexpr = v_ring[0].dtype
    HALF: gl.constexpr = cfg.half_diagonal and WG == 0
    FIRST: gl.constexpr = 64 if HALF else N  # keys of the first block that are used
    s_layout: gl.constexpr = row_layout(N)
    o_layout: gl.constexpr = row_layout(HEADDIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    sums: gl.constexpr = thread_sums(gl.zeros([64, N], gl.float32, s_layout)).type.layout
    q_regs = 0
    if cfg.q_in_registers:
        q_regs = gl.zeros([64, HEADDIM], dtype, gl.DotOperandLayout(0, s_layout, 2))
    end = num_tiles(shape, cfg)
    flags = gl.full([64], 0, gl.int32, rows)
    it = 0
    load_first(descs, rings, 0, end, 0, shape, WG, cfg)
    for ti in range(end):
        m, head = tile_of(ti, shape, cfg)
        b = head // shape.nheads
        hk = (head - b * shape.nheads) // shape.group
        n, _ = key_blocks(m, shape, cfg)
        s, q_regs = first_scores(q_regs, q_ring, k_ring, it, ti, True, WG, FIRST, cfg)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k_ring, it % D)
        q_slot = WG * cfg.num_q_buffers + ti % cfg.num_q_buffers
        q = q_ring[0].index(q_slot).reshape([64, HEADDIM])
        if cfg.q_in_registers:
            q = q_regs
        if cfg.causal:
            s = hide_diagonal(s, WG)
        m_first = gl.max(s, 1) * qk_scale  # the reference of the whole tile
        m_i = gl.convert_layout(m_first, gl.SliceLayout(1, s_layout))
        p_first = exp2(s * qk_scale - m_first[:, None])
        l_i = gl.convert_layout(thread_sums(p_first), sums)
        acc = gl.zeros([64, HEADDIM], gl.float32, o_layout)
        p_first = gl.convert_layout(p_first.to(dtype), p_layout)
        j = n - 2  # the next block; they are visited from the last to the first
        if HALF:
            if n > 1:
                p, acc, l_i = key_step(
                    q, p_first, acc, l_i, m_i, descs, rings, b, j, hk, it, qk_scale, WG, FIRST, cfg
                )
                it += 1
            else:
                mbarrier.wait(v_ring[1].index(it % D), (it // D) & 1)
                v = v_ring[0].index(it % D).reshape([N, HEADDIM]).slice(0, FIRST, dim=0)
                acc = warpgroup_mma(p_first, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                p = gl.full([64, N], 0.0, dtype, p_layout)
            j -= 1
        else:
            p = p_first
        for i in range(j + 1):
            p, acc, l_i = key_step(
                q, p, acc, l_i, m_i, descs, rings, b, j - i, hk, it, qk_scale, WG, N, cfg
            )
            it += 1
        if not cfg.q_in_registers:
            mbarrier.arrive(q_ring[2].index(q_slot), count=1)
        slot = it % D
        mbarrier.wait(v_ring[1].index(slot), (it // D) & 1)
        v = v_ring[0].index(slot).reshape([N, HEADDIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        it += 1
        load_first(descs, rings, ti + 1, end, it, shape, WG, cfg)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_ring, slot)
        l_i = l_i + 0.0 * gl.convert_layout(thread_sums(acc), sums)  # NaN if acc is not finite
        l_row = gl.convert_layout(gl.sum(l_i, 1), rows)
        m_row = gl.convert_layout(m_i, rows)
        exact = (l_row >= 0.5) & (l_row <= 1152921504606846976.0)  # 2^60
        flags = flags | (gl.where(exact | (m_row == -float("inf")), 0, 1) << (ti % 32))
        store_tile(acc, l_row, m_row, m, head, WG, out, shape, cfg)
    flagged = gl.reduce(flags, 0, either)
    if flagged != 0:
        loads = 0
        for i in range(end):
            if (flagged >> (i % 32)) & 1 != 0:
                m, head = tile_of(i, shape, cfg)
                loads = redo_tile(
                    m, head, loads, redo_descs, q_ring[0].index(WG * cfg.num_q_buffers),
                    redo_smem.index(WG), redo_bar.index(WG), out, shape, qk_scale, WG, cfg,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def attention_kernel(
    q_desc, k_desc, v_desc, o_desc, k_redo_desc, v_redo_desc, o_ptr, lse_ptr, counter_ptr, shape,
    qk_scale, cfg: gl.constexpr,
):  # fmt: skip
    """Two or three warpgroups with the same code; only the first loads K and V."""
    W: gl.constexpr = cfg.consumers
    q_ring = make_ring(q_desc, W * cfg.num_q_buffers, 1)
    k_ring = make_ring(k_desc, cfg.num_buffers, 128 * W)
    v_ring = make_ring(v_desc, cfg.num_buffers, 128 * W)
    o_smem = gl.allocate_shared_memory(o_desc.dtype, [W, 1, 64, 1, cfg.headdim], o_desc.layout)
    descs = (q_desc, k_desc, v_desc)
    redo_descs = (q_desc, k_redo_desc, v_redo_desc)
    out = (o_desc, o_smem, lse_ptr)
    rings = (q_ring, k_ring, v_ring)
    given = (descs, redo_descs, rings, o_smem, barriers(W, 1), out, shape, qk_scale)
    if W == 2:
        gl.warp_specialize(
            [
                (warpgroup_partition, (given, gl.constexpr(0), cfg)),
                (warpgroup_partition, (given, gl.constexpr(1), cfg)),
            ],
            [4],
            [240],
        )
    else:
        gl.warp_specialize(
            [
                (warpgroup_partition, (given, gl.constexpr(0), cfg)),
                (warpgroup_partition, (given, gl.constexpr(1), cfg)),
                (warpgroup_partition, (given, gl.constexpr(2), cfg)),
            ],
            [4, 4],
            [168, 168],
        )


def single_role(cfg: Any) -> Any:
    """A configuration of the top stage without what needs a producer or turns."""
    changed = replace(cfg, ping_pong=False, overlap="own", cross_tile=False)
    return replace(changed, schedule="pairs", consumers=2) if cfg.causal else changed


def schedule(config: Any, *problem: Any) -> tuple[Any, Any, int]:
    """The top stage's `schedule` for what `single_role` makes of its configuration."""
    top = stage5_everything.schedule(config, *problem)[0]
    if top.ragged or top.headdim == 256:
        raise ValueError(f"config={top} must not be ragged or of headdim 256; see `unsupported`")
    cfg, shape, grid = stage5_everything.schedule(single_role(top), *problem)
    if cfg.schedule == "dynamic":  # an odd number of tiles a head has no pairs
        cfg = replace(cfg, schedule="static")
    return cfg, shape, grid


_stage = copied(
    stage5_everything,
    "no_warp_specialization",
    attention_kernel=attention_kernel,
    schedule=schedule,
)
forward = _stage.forward


def offline(
    dtype: str = "bf16", headdim: int = 64, causal: bool = False, seqlen: int = 4096
) -> dict:
    """The kernel that runs at a seqlen, for `attn_ladder.offline.report`."""
    cfg = single_role(stage5_everything.choose_config(headdim, causal, seqlen))
    return _stage.source(cfg, dtype)


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if problem.headdim not in (64, 128):
        return f"supports headdim 64 and 128, not headdim={problem.headdim}"
    offset = problem.seqlen_k - problem.seqlen_q
    if problem.seqlen_k % 128 or (problem.causal and (offset < 0 or offset % 128)):
        sizes = f"seqlen_q={problem.seqlen_q} seqlen_k={problem.seqlen_k}"
        return f"needs key blocks and diagonals that are multiples of 128, not {sizes}"
    return stage5_everything.unsupported(problem, capability)
