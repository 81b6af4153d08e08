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

from attn_ladder.warpgroup import exp2, opaque, row_layout, store_layout, unary

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
    """`hide` for 64 rows of a block of 64 or 128 keys on the diagonal: the same in every tile. The
    rows are opaque, or ptxas would keep a predicate for every score across the tiles."""
    layout: gl.constexpr = s.type.layout
    offs_n = gl.arange(0, s.shape[1], gl.SliceLayout(0, layout))
    offs_m = opaque(gl.arange(0, 64, gl.SliceLayout(1, layout))) & 63
    if s.shape[1] == 128:
        offs_m += 64 * WG
    return gl.where(offs_m[:, None] >= offs_n[None, :], s, -float("inf"))


@gluon.jit
def store_tile(acc, l_i, m_i, m, head, WG: gl.constexpr, out, shape, cfg: gl.constexpr):
    """Write 64 rows: acc [64, headdim]; l_i, m_i [64] (scaled to base 2) in the layout of its rows.

    `out` is where to: (o_ptr, lse_ptr) from registers, or (o_desc, smem, lse_ptr) through a buffer
    for each consumer. A row that saw no key (l_i = 0, m_i = -inf) gives 0 and -inf.
    """
    lse_ptr = out[1] if cfg.direct_store else out[2]
    row = m * cfg.BLOCK_M + WG * 64
    b = head // shape.nheads
    offs_m = row + gl.arange(0, 64, l_i.type.layout)
    lse = (m_i + unary("lg2.approx.ftz.f32 $0, $1;", l_i)) * LN_2
    lse_row_ptr = lse_ptr + head.to(gl.int64) * shape.seqlen_q
    gl.store(lse_row_ptr + offs_m, lse, mask=offs_m < shape.seqlen_q)
    acc = acc * gl.where(l_i == 0.0, 0.0, 1.0 / l_i)[:, None]
    h = head - b * shape.nheads
    if cfg.direct_store:
        o = gl.convert_layout(acc.to(out[0].dtype.element_ty), store_layout(cfg.headdim))
        rows = gl.arange(0, 64, gl.SliceLayout(1, o.type.layout))
        columns = gl.arange(0, cfg.headdim, gl.SliceLayout(0, o.type.layout))
        first = ((b.to(gl.int64) * shape.seqlen_q + row) * shape.nheads + h) * cfg.headdim
        o_ptr = gl.multiple_of(out[0] + first, 16)
        offsets = rows[:, None] * (shape.nheads * cfg.headdim) + columns[None, :]
        gl.store(o_ptr + offsets, o, mask=(row + rows < shape.seqlen_q)[:, None])
    else:
        o_smem = out[1].index(WG)
        tma.store_wait(0)
        o_smem.reshape([64, cfg.headdim]).store(acc.to(o_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out[0], [b, row, h, 0], o_smem)


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
    m, head, loads, redo_descs, q_smem, kv_smem, ready_bar, out, shape, qk_scale,
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
    kv = kv_smem.reshape([64, HEADDIM])
    if not cfg.direct_store:
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
        tma.async_copy_global_to_shared(k_desc, coord, ready_bar, kv_smem)
        mbarrier.wait(ready_bar, loads & 1)
        zero = gl.zeros([64, 64], gl.float32, s_layout)
        s = warpgroup_mma(q, kv.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        mbarrier.expect(ready_bar, v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, coord, ready_bar, kv_smem)
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
        p = gl.convert_layout(p.to(kv_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
        acc = warpgroup_mma(p, kv, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    gl.thread_barrier()
    m_i = gl.convert_layout(m_i, rows) * qk_scale
    l_i = gl.convert_layout(l_i, rows)
    store_tile(acc, l_i, m_i, m, head, WG, out, shape, cfg)
    return loads
