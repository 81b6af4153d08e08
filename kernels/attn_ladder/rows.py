"""What is done with 64 rows outside the hot loop: masking, writing, and computing them exactly."""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder.tiles import first_dealt
from attn_ladder.warpgroup import exp2, opaque, row_layout, unary

LN_2 = gl.constexpr(math.log(2))


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
def hide_diagonal(s, WG: gl.constexpr):
    """`hide` for 64 rows of a 128 x 128 block on the diagonal: the same in every tile. The rows are
    opaque, or ptxas would keep a predicate for every score across the tiles."""
    layout: gl.constexpr = s.type.layout
    offs_n = gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
    offs_m = opaque(gl.arange(0, 64, gl.SliceLayout(1, layout))) & 63
    if s.shape[1] == 128:
        offs_m += 64 * WG
    return gl.where(offs_m[:, None] >= offs_n[None, :], s, -float("inf"))


@gluon.jit
def store_tile(
    acc, l_i, m_i, m, head, WG: gl.constexpr, o_desc, o_smem, lse_ptr, shape, cfg: gl.constexpr
):
    """Write 64 rows: acc [64, headdim]; l_i, m_i [64] (scaled to base 2) in the layout of its rows.

    A row that saw no key (l_i = 0, m_i = -inf) gives 0 and -inf.
    """
    row = m * cfg.BLOCK_M + WG * 64
    b = head // shape.nheads
    offs_m = row + gl.arange(0, 64, l_i.type.layout)
    lse = (m_i + unary("lg2.approx.ftz.f32 $0, $1;", l_i)) * LN_2
    lse_row_ptr = lse_ptr + head.to(gl.int64) * shape.seqlen_q
    gl.store(lse_row_ptr + offs_m, lse, mask=offs_m < shape.seqlen_q)
    acc = acc * gl.where(l_i == 0.0, 0.0, 1.0 / l_i)[:, None]
    tma.store_wait(0)
    o_smem.reshape([64, cfg.headdim]).store(acc.to(o_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, row, head - b * shape.nheads, 0], o_smem)


@gluon.jit
def merge_parts(
    acc, l_i, m_i, i, scratch_ptr, counter_ptr, shape, WG: gl.constexpr, cfg: gl.constexpr
):
    """Leave a part of 64 rows in the workspace; the CTA that comes last merges all parts of them.

    acc [64, headdim], l_i and m_i [64] in the layout of its rows. Returns (whether this CTA merges,
    acc, l_i, m_i of all parts). They are added up in the order of the keys, whoever comes last.
    """
    HEADDIM: gl.constexpr = cfg.headdim
    layout: gl.constexpr = acc.type.layout
    rows: gl.constexpr = l_i.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    SLOT: gl.constexpr = 64 * (HEADDIM + 2)
    n = shape.num_blocks
    ctas = gl.num_programs(0)
    tile = first_dealt(gl.program_id(0), shape) // n + i - shape.rounds  # of those that are left
    offs_m = gl.arange(0, 64, rows)
    offs = offs_m[:, None] * HEADDIM + gl.arange(0, HEADDIM, columns)[None, :]
    part_ptr = scratch_ptr + ((gl.program_id(0) * 2 + i - shape.rounds) * 2 + WG) * SLOT
    gl.store(part_ptr + offs, acc)
    gl.store(part_ptr + 64 * HEADDIM + offs_m, l_i)
    gl.store(part_ptr + 64 * HEADDIM + 64 + offs_m, m_i)
    gl.thread_barrier()
    lowest = ((tile * n + 1) * ctas - 1) // shape.dealt  # the CTAs that have parts of this tile
    highest = ((tile + 1) * n * ctas - 1) // shape.dealt
    place_ptr = counter_ptr + tile * 2 + WG
    last = gl.atomic_add(place_ptr, 1, sem="acq_rel") == highest - lowest
    if last:
        m_all = gl.full([64], -float("inf"), gl.float32, rows)
        for cta in range(lowest, highest + 1):
            k = tile - first_dealt(cta, shape) // n
            part_ptr = scratch_ptr + ((cta * 2 + k) * 2 + WG) * SLOT + 64 * HEADDIM + 64
            m_all = gl.maximum(m_all, gl.load(part_ptr + offs_m, cache_modifier=".cg"))
        acc = gl.zeros([64, HEADDIM], gl.float32, layout)
        l_i = gl.zeros([64], gl.float32, rows)
        for cta in range(lowest, highest + 1):
            k = tile - first_dealt(cta, shape) // n
            part_ptr = scratch_ptr + ((cta * 2 + k) * 2 + WG) * SLOT
            m_part = gl.load(part_ptr + 64 * HEADDIM + 64 + offs_m, cache_modifier=".cg")
            scale = exp2(m_part - m_all)
            l_i += scale * gl.load(part_ptr + 64 * HEADDIM + offs_m, cache_modifier=".cg")
            acc += scale[:, None] * gl.load(part_ptr + offs, cache_modifier=".cg")
        m_i = m_all
        gl.store(place_ptr, 0)
    return last, acc, l_i, m_i


@gluon.jit
def await_stores():
    """Wait until this thread's bulk stores are in memory; `tma.store_wait` only waits until they
    have read shared memory, and a second store to the same rows could overtake the first."""
    thread = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;",
        "=r,r",
        [thread],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def redo_tile(
    m, head, loads, redo_descs, o_desc, q_smem, o_smem, ready_bar, lse_ptr, shape, qk_scale,
    WG: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Rare: 64 rows once more with the online softmax, 64 keys at a time through one buffer.

    Q stays in shared memory: as a register operand it was overwritten at headdim 64.
    """
    q_desc, k_desc, v_desc = redo_descs
    HEADDIM: gl.constexpr = cfg.headdim
    s_layout: gl.constexpr = row_layout(64)
    o_layout: gl.constexpr = row_layout(HEADDIM)
    rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row = m * cfg.BLOCK_M + WG * 64
    b = head // shape.nheads
    h = head - b * shape.nheads
    q = q_smem.reshape([64, HEADDIM])
    kv = o_smem.reshape([64, HEADDIM])
    await_stores()
    gl.thread_barrier()
    mbarrier.expect(ready_bar, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [b, row, h, 0], ready_bar, q_smem)
    mbarrier.wait(ready_bar, loads & 1)
    loads += 1
    m_i = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, s_layout))
    l_i = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([64, HEADDIM], gl.float32, o_layout)
    keys = shape.seqlen_k
    if cfg.causal:
        keys += min(0, row + 64 - shape.seqlen_q)
    for j in range((keys + 63) // 64):
        coord = [b, j * 64, h // shape.group, 0]
        gl.thread_barrier()
        mbarrier.expect(ready_bar, k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, coord, ready_bar, o_smem)
        mbarrier.wait(ready_bar, loads & 1)
        zero = gl.zeros([64, 64], gl.float32, s_layout)
        s = warpgroup_mma(q, kv.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        mbarrier.expect(ready_bar, v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, coord, ready_bar, o_smem)
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
        p = gl.convert_layout(p.to(o_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
        acc = warpgroup_mma(p, kv, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    m_i = gl.convert_layout(m_i, rows) * qk_scale
    l_i = gl.convert_layout(l_i, rows)
    store_tile(acc, l_i, m_i, m, head, WG, o_desc, o_smem, lse_ptr, shape, cfg)
    return loads
