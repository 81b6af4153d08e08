"""Throw-away prototype (round 2) of an attention forward for sm_90a in Gluon (Triton 3.6.0): evidence, not the product.

bf16, seqlen a multiple of 64*NWG (128), no LSE, no GQA. What is new against round 1, each a constexpr:
  DYN    tiles handed out longest first by an atomic counter (reset by the last CTA), id broadcast through shared memory
  XT     cross-tile overlap: the next tile's first Q.K^T is issued before the last P.V is waited for and runs under the epilogue
         (2: after the last P.V, fewer registers)
  HALF   causal, two consumers: consumer 0 multiplies only the unmasked half of the diagonal key block
  GUARD  deferred guard: a row whose sum passed 2^60 sets a bit in a register; after the last tile, a warpgroup with any bit set redoes
         those tiles with the online softmax (Q reloaded from global memory): nothing but a compare and an OR in the hot path
  PP     ping-pong of the consumers' issue of matrix instructions through named barriers (not with three consumers and causal)
  XT 3   the tile boundary is a step: [next QK, last PV] under one token, first softmax under PV, then the epilogue
  QST    stages of the Q ring (2 lets XT prefetch Q when it is read from shared memory)
At most 128 tiles per CTA with DYN and GUARD together (list in shared memory).
"""
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import tma, mbarrier, fence_async_shared, warpgroup_mma, warpgroup_mma_wait

C = gl.constexpr


@gluon.constexpr_function
def exp2_asm(poly_n, pack):
    # `pack` elements, of which poly_n by polynomial on the FMA pipe (Cody-Waite + degree-3 minimax)
    lines = []
    for i in range(pack):
        o, a = f"${i}", f"${pack + i}"
        if i < poly_n:
            lines.append(f"""{{ .reg .f32 x, r, f, p; .reg .b32 e, b;
max.ftz.f32 x, {a}, 0fC2FC0000;
add.rn.ftz.f32 r, x, 0f4B400000;
sub.rn.ftz.f32 f, r, 0f4B400000;
sub.rn.ftz.f32 f, x, f;
fma.rn.ftz.f32 p, f, 0f3D61FBB1, 0f3E786F0E;
fma.rn.ftz.f32 p, p, f, 0f3F31798D;
fma.rn.ftz.f32 p, p, f, 0f3F7FFB49;
mov.b32 e, r; shl.b32 e, e, 23;
mov.b32 b, p; add.s32 b, b, e; mov.b32 {o}, b; }}""")
        else:
            lines.append(f"ex2.approx.ftz.f32 {o}, {a};")
    return "\n".join(lines)


@gluon.constexpr_function
def exp2_cons(pack):
    return ",".join(["=f"] * pack + ["f"] * pack)


@gluon.jit
def exp2t(x, POLY: gl.constexpr, PACK: gl.constexpr):
    return gl.inline_asm_elementwise(exp2_asm(POLY, PACK), exp2_cons(PACK), [x], dtype=gl.float32, is_pure=True, pack=PACK)


@gluon.constexpr_function
def rel_asm(off):
    return "{ .reg .pred p; .reg .b32 a, l; mov.u32 l, %laneid; setp.eq.s32 p, l, 0; mov.b32 a, global_smem; mad.lo.s32 a, $1, 8, a; @p mbarrier.arrive.shared::cta.b64 _, [a + " + str(off) + "]; mov.b32 $0, $1; }"


@gluon.jit
def rel(bar, st, OFF: gl.constexpr, bl: gl.constexpr):
    # release a ring slot. OFF > 0: one arrival per warp through inline asm (no bar.sync); the barrier's offset in
    # `global_smem` must then be handed in, since Gluon gives no address of a shared allocation
    if OFF == 0:
        mbarrier.arrive(bar.index(st), count=1)
    else:
        z = gl.full([128], 0, gl.int32, bl) + st
        gl.inline_asm_elementwise(rel_asm(OFF), "=r,r", [z], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def relp_asm(off):
    return "{ .reg .pred p; .reg .b32 a, l; mov.u32 l, %laneid; or.b32 l, l, $2; setp.eq.s32 p, l, 0; mov.b32 a, global_smem; mad.lo.s32 a, $1, 8, a; @p mbarrier.arrive.shared::cta.b64 _, [a + " + str(off) + "]; mov.b32 $0, $1; }"


@gluon.jit
def relp(bar, st, off_, OFF: gl.constexpr, bl: gl.constexpr):
    # release unless `off_` (0 or 1) is set
    if OFF == 0:
        mbarrier.arrive(bar.index(st), count=1, pred=off_ == 0)
    else:
        z = gl.full([128], 0, gl.int32, bl)
        gl.inline_asm_elementwise(relp_asm(OFF), "=r,r,r", [z + st, z + off_], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def guard(x):
    return gl.inline_asm_elementwise("{ .reg .pred q; setp.lt.f32 q, $4, 0f00000000; @q exit; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }",
                                     "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=False, pack=4)


@gluon.jit
def named_bar(OP: gl.constexpr, ID: gl.constexpr, lay: gl.constexpr):
    # bar.sync / bar.arrive of two warpgroups on a free hardware barrier (one element per thread)
    z = gl.full([128], 0, gl.int32, lay)
    gl.inline_asm_elementwise(OP + " " + ID + ", 256; mov.b32 $0, $1;", "=r,r", [z], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pp_sync(WG: gl.constexpr, PP: gl.constexpr, lay: gl.constexpr):
    if PP:
        if WG == 0:
            named_bar("bar.sync", "8", lay)
        elif WG == 1:
            named_bar("bar.sync", "9", lay)
        else:
            named_bar("bar.sync", "10", lay)


@gluon.jit
def pp_arrive(WG: gl.constexpr, NWG: gl.constexpr, PP: gl.constexpr, lay: gl.constexpr):
    if PP:
        if (WG + 1) % NWG == 0:
            named_bar("bar.arrive", "8", lay)
        elif (WG + 1) % NWG == 1:
            named_bar("bar.arrive", "9", lay)
        else:
            named_bar("bar.arrive", "10", lay)


@gluon.constexpr_function
def tr_asm(slot):
    return "{ .reg .u32 c; mov.u32 c, %clock; st.global.u32 [$1+" + str(4 * slot) + "], c; mov.u32 $0, c; }"

@gluon.jit
def trace(addr, SLOT: gl.constexpr, TR: gl.constexpr, bl: gl.constexpr):
    # every thread stores the clock to one address
    if TR:
        z = gl.full([128], 0, gl.int64, bl) + addr
        gl.inline_asm_elementwise(tr_asm(SLOT), "=r,l", [z], dtype=gl.int32, is_pure=False, pack=1)

@gluon.jit
def num_tiles(nm, nbh, ORDER: gl.constexpr):
    if ORDER == 2:
        items = nbh * nm // 2
        return 2 * ((items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0))
    else:
        items = nbh * nm
        return (items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def tile_coords(i, nm, nbh, SWZ, ORDER: gl.constexpr, DYN: gl.constexpr):
    if ORDER == 2:
        u = gl.program_id(0) + gl.num_programs(0) * (i // 2)
        hp = nm // 2
        bh = u // hp
        pr = u - bh * hp
        if i % 2 == 0:
            m = nm - 1 - pr
        else:
            m = pr
    else:
        if DYN:
            t = i
        else:
            t = gl.program_id(0) + gl.num_programs(0) * i
        if ORDER == 1:
            # groups of SWZ heads, in each the longest tile first
            per = nm * SWZ
            g = t // per
            r = t - g * per
            gsz = max(1, min(SWZ, nbh - g * SWZ))
            mi = r // gsz
            bh = g * SWZ + (r - mi * gsz)
            m = nm - 1 - mi
        else:
            bh = t // nm
            m = t - bh * nm
    return m, bh


@gluon.jit
def load_q(q_desc, q_s, q_full, q_empty, ti, b, m, col, D: gl.constexpr, NWG: gl.constexpr, QST: gl.constexpr):
    for w in gl.static_range(NWG):
        qs = w * QST + ti % QST
        mbarrier.wait(q_empty.index(qs), ((ti // QST) & 1) ^ 1)
        mbarrier.expect(q_full.index(qs), 64 * D * 2)
        tma.async_copy_global_to_shared(q_desc, [b, m * (NWG * 64) + w * 64, col], q_full.index(qs), q_s.index(qs))


@gluon.jit
def producer(q_desc, k_desc, v_desc, ctr, q_s, k_s, v_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
             S, H, nm, nbh, SWZ, ntiles,
             D: gl.constexpr, BN: gl.constexpr, NWG: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, CAUSAL: gl.constexpr, ORDER: gl.constexpr, DYN: gl.constexpr, KS: gl.constexpr, QE: gl.constexpr):
    BM: gl.constexpr = NWG * 64
    lb: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    ti = 0
    if DYN:
        cur = gl.program_id(0)
        lim = ntiles
    else:
        cur = 0
        lim = num_tiles(nm, nbh, ORDER)
    if QE:
        m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
        b = bh // H
        load_q(q_desc, q_s, q_full, q_empty, 0, b, m, (bh - b * H) * D, D, NWG, QST)
    while cur < lim:
        m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
        b = bh // H
        col = (bh - b * H) * D
        if CAUSAL:
            n = min(((m + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
        else:
            n = (S + BN - 1) // BN
        st = it % KS
        ph = (it // KS) & 1
        mbarrier.wait(k_empty.index(st), ph ^ 1)
        mbarrier.expect(k_full.index(st), BN * D * 2)
        tma.async_copy_global_to_shared(k_desc, [b, (n - 1) * BN, col], k_full.index(st), k_s.index(st))
        if not QE:
            load_q(q_desc, q_s, q_full, q_empty, ti, b, m, col, D, NWG, QST)
        if DYN:
            nx = gl.num_programs(0) + gl.atomic_add(ctr, 1, sem="relaxed")
            list_s.index((ti + 1) & 127).store(gl.full([1], 0, gl.int32, lb) + nx)
            mbarrier.arrive(t_full.index(ti & 7), count=1)
        else:
            nx = cur + 1
        for j in range(n - 2, -1, -1):
            it2 = it + 1
            st2 = it2 % KS
            ph2 = (it2 // KS) & 1
            mbarrier.wait(k_empty.index(st2), ph2 ^ 1)
            mbarrier.expect(k_full.index(st2), BN * D * 2)
            tma.async_copy_global_to_shared(k_desc, [b, j * BN, col], k_full.index(st2), k_s.index(st2))
            st = it % ST
            ph = (it // ST) & 1
            mbarrier.wait(v_empty.index(st), ph ^ 1)
            mbarrier.expect(v_full.index(st), BN * D * 2)
            tma.async_copy_global_to_shared(v_desc, [b, (j + 1) * BN, col], v_full.index(st), v_s.index(st))
            it = it2
        if QE:
            # the next tile's Q early: its slot has been free since this tile began
            if nx < lim:
                mq, bq = tile_coords(nx, nm, nbh, SWZ, ORDER, DYN)
                b2 = bq // H
                load_q(q_desc, q_s, q_full, q_empty, ti + 1, b2, mq, (bq - b2 * H) * D, D, NWG, QST)
        st = it % ST
        ph = (it // ST) & 1
        mbarrier.wait(v_empty.index(st), ph ^ 1)
        mbarrier.expect(v_full.index(st), BN * D * 2)
        tma.async_copy_global_to_shared(v_desc, [b, 0, col], v_full.index(st), v_s.index(st))
        it += 1
        ti += 1
        cur = nx
    if DYN:
        # the last CTA to finish resets the counters for the next launch
        dn = gl.atomic_add(ctr + 1, 1, sem="acq_rel")
        if dn == gl.num_programs(0) - 1:
            gl.store(ctr, 0)
            gl.store(ctr + 1, 0)


@gluon.jit
def redo_tile(q_desc, o_desc, k64_desc, v64_desc, qbuf, buf, bar, fbp, S, b, row, col, scale, D: gl.constexpr, CAUSAL: gl.constexpr):
    # rare: ordinary online softmax, 64 keys at a time, no pipelining, through this warpgroup's O buffer
    s6: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    pl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ol, k_width=2)
    rs: gl.constexpr = gl.SliceLayout(1, s6)
    ro: gl.constexpr = gl.SliceLayout(1, ol)
    tma.store_wait(0)
    gl.thread_barrier()
    mbarrier.expect(bar, 64 * D * 2)
    tma.async_copy_global_to_shared(q_desc, [b, row, col], bar, qbuf)
    mbarrier.wait(bar, fbp & 1)
    fbp += 1
    q6 = qbuf.reshape([64, D])
    m = gl.full([64], -1.0e30, gl.float32, rs)
    l = gl.full([64], 0.0, gl.float32, rs)
    acc = gl.zeros([64, D], gl.float32, ol)
    n = (S + 63) // 64
    if CAUSAL:
        n = min(n, row // 64 + 1)
    for j in range(n):
        gl.thread_barrier()
        mbarrier.expect(bar, 64 * D * 2)
        tma.async_copy_global_to_shared(k64_desc, [b, j * 64, col], bar, buf)
        mbarrier.wait(bar, fbp & 1)
        fbp += 1
        s = warpgroup_mma(q6, buf.reshape([64, D]).permute((1, 0)), gl.zeros([64, 64], gl.float32, s6), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        gl.thread_barrier()
        mbarrier.expect(bar, 64 * D * 2)
        tma.async_copy_global_to_shared(v64_desc, [b, j * 64, col], bar, buf)
        if CAUSAL:
            offs_m = row + gl.arange(0, 64, rs)
            offs_n = j * 64 + gl.arange(0, 64, gl.SliceLayout(0, s6))
            s = gl.where(offs_m[:, None] >= offs_n[None, :], s, -float("inf"))
        mn = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - mn[:, None])
        al = gl.exp2(m - mn)
        l = l * al + gl.sum(p, 1)
        m = mn
        acc = acc * gl.convert_layout(al, ro)[:, None]
        mbarrier.wait(bar, fbp & 1)
        fbp += 1
        acc = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), pl), buf.reshape([64, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
    acc = acc * gl.convert_layout(1.0 / l, ro)[:, None]
    gl.thread_barrier()
    buf.reshape([64, D]).store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, row, col], buf)
    tma.store_wait(0)
    return fbp


@gluon.jit
def or_(a, b):
    return a | b


@gluon.jit
def opaque(x):
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first(s, dlt, scale, WG: gl.constexpr, BN: gl.constexpr, BF: gl.constexpr, NWG: gl.constexpr, CAUSAL: gl.constexpr, MK: gl.constexpr, sl: gl.constexpr, sf: gl.constexpr):
    # mask, reference and exponentials of a tile's first block; dlt: first row minus first key
    row_s: gl.constexpr = gl.SliceLayout(1, sl)
    row_f: gl.constexpr = gl.SliceLayout(1, sf)
    if CAUSAL:
        offs_n = gl.arange(0, BF, gl.SliceLayout(0, sf))
        if MK == 1 and NWG == 2 and BN == 128:
            # rows 64 WG .. 64 WG + 63 of a 128 x 128 diagonal block: constants, made opaque so that no predicate is kept across tiles
            offs_m = (opaque(gl.arange(0, 64, row_f)) & 63) + (64 if BF == 128 and WG == 1 else 0)
        else:
            offs_m = dlt + gl.arange(0, 64, row_f)
        s = gl.where(offs_m[:, None] >= offs_n[None, :], s, -float("inf"))
    m_f = gl.max(s, 1) * scale
    m_i = gl.convert_layout(m_f, row_s)
    p = exp2t(s * scale - m_f[:, None], 0, 1)
    l_f = gl.sum(gl.reshape(p, [64, BF // 8, 8]), 1)
    z = gl.zeros([64, BN], gl.float32, sl)
    lz: gl.constexpr = gl.sum(gl.reshape(z, [64, BN // 8, 8]), 1).type.layout
    return p, gl.convert_layout(l_f, lz), m_i


@gluon.jit
def step(q, pb, acc, l_i, m_i, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, tra,
         WG: gl.constexpr, NWG: gl.constexpr, PP: gl.constexpr, SEQ: gl.constexpr, KW: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, PIN: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr, TR: gl.constexpr, KS: gl.constexpr, pl: gl.constexpr, bl: gl.constexpr):
    # SEQ 0: softmax(next) runs under PV(current); 1: after it (QK, PV); 2: after it (PV, QK)
    # PP token over: 1 the issue; 2 the issue and QK's (SEQ: everything's) completion; 3 QK's issue; 5 the softmax
    it2 = it + 1
    st2 = it2 % KS
    st = it % ST
    ph = (it // ST) & 1
    trace(tra, 0, TR, bl)
    mbarrier.wait(k_full.index(st2), (it2 // KS) & 1)
    vv = v_s.index(st).reshape([BN, D])
    if KW < BN:
        vv = vv.slice(0, KW, dim=0)
    if PP == 1 or PP == 2 or PP == 3 or PP == 4:
        pp_sync(WG, True, bl)
    trace(tra, 1, TR, bl)
    if SEQ == 2:
        mbarrier.wait(v_full.index(st), ph)
        acc = warpgroup_mma(pb, vv, acc, is_async=True)
    tok = warpgroup_mma(q, k_s.index(st2).reshape([BN, D]).permute((1, 0)), s0, use_acc=False, is_async=True)
    if PP == 3:
        pp_arrive(WG, NWG, True, bl)
    if SEQ != 2:
        mbarrier.wait(v_full.index(st), ph)
        acc = warpgroup_mma(pb, vv, acc, is_async=True)
    if PP == 1:
        pp_arrive(WG, NWG, True, bl)
    trace(tra, 2, TR, bl)
    if PP == 4:
        # the token goes on once the first of the two is complete
        s, acc = warpgroup_mma_wait(1, deps=[tok, acc])
        pp_arrive(WG, NWG, True, bl)
        if SEQ != 2:
            rel(k_empty, st2, KE, bl)
        s, acc = warpgroup_mma_wait(0, deps=[s, acc])
    elif SEQ:
        s, acc = warpgroup_mma_wait(0, deps=[tok, acc])
    else:
        s, acc = warpgroup_mma_wait(1, deps=[tok, acc])
    trace(tra, 3, TR, bl)
    if PP == 2:
        pp_arrive(WG, NWG, True, bl)
    if PP != 4 or SEQ == 2:
        rel(k_empty, st2, KE, bl)
    if SEQ:
        rel(v_empty, st, VE, bl)
    if PP == 5:
        pp_sync(WG, True, bl)
    p = exp2t(s * scale - m_i[:, None], 0, 1)
    l_i = l_i + gl.convert_layout(gl.sum(gl.reshape(p, [64, BN // 8, 8]), 1), l_i.type.layout)
    if SEQ == 0:
        if PIN == 5:
            l_i = guard(l_i)
        else:
            mbarrier.wait(v_full.index(st), ph)
    trace(tra, 4, TR, bl)
    if PP == 5:
        pp_arrive(WG, NWG, True, bl)
    if SEQ == 0:
        acc, p, l_i = warpgroup_mma_wait(0, deps=[acc, p, l_i])
    trace(tra, 5, TR, bl)
    pn = gl.convert_layout(p.to(gl.bfloat16), pl)
    if SEQ == 0:
        rel(v_empty, st, VE, bl)
    trace(tra, 6, TR, bl)
    return pn, acc, l_i


@gluon.jit
def consumer(q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
             S, H, nm, nbh, SWZ, ntiles, scale, trp,
             WG: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, NWG: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr,
             CAUSAL: gl.constexpr, PIN: gl.constexpr, ORDER: gl.constexpr, QREG: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr,
             DYN: gl.constexpr, XT: gl.constexpr, HALF: gl.constexpr, GUARD: gl.constexpr, PP: gl.constexpr, SEQ: gl.constexpr, TR: gl.constexpr, KS: gl.constexpr, MK: gl.constexpr):
    BM: gl.constexpr = NWG * 64
    HB: gl.constexpr = HALF and CAUSAL and WG == 0 and NWG == 2 and BN == 128
    BF: gl.constexpr = 64 if HB else BN
    sl: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    sf: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BF, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    pl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ol, k_width=2)
    ql: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sl, k_width=2)
    qfl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sf, k_width=2)
    row_s: gl.constexpr = gl.SliceLayout(1, sl)
    row_f: gl.constexpr = gl.SliceLayout(1, sf)
    row_o: gl.constexpr = gl.SliceLayout(1, ol)
    bl: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_buf = o_s.index(WG)
    it = 0
    ti = 0
    tstep = 0
    tra = trp + ((gl.program_id(0) * 3 + WG) * 1024 + 1023) * 32
    if DYN:
        cur = gl.program_id(0)
        lim = ntiles
    else:
        cur = 0
        lim = num_tiles(nm, nbh, ORDER)
    if WG == NWG - 1:
        pp_arrive(WG, NWG, PP > 0, bl)
    s0 = gl.zeros([64, BN], gl.float32, sl)
    sf0 = gl.zeros([64, BF], gl.float32, sf)
    flags = gl.full([64], 0, gl.int32, row_o)
    m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
    s = sf0
    if QREG:
        qr = gl.full([64, D], 0.0, gl.bfloat16, ql)
    else:
        qr = 0
    if XT == 3 or XT == 1:
        # prologue: first scores of the first tile
        if CAUSAL:
            n = min(((m + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
            if BM > BN:
                nw = min((m * BM + WG * 64 + 64 + BN - 1) // BN, n)
                sk0 = n - nw
                if cur >= lim:
                    sk0 = 0
                for _ in range(sk0):
                    mbarrier.wait(k_full.index(it % KS), (it // KS) & 1)
                    rel(k_empty, it % KS, KE, bl)
                    mbarrier.wait(v_full.index(it % ST), (it // ST) & 1)
                    rel(v_empty, it % ST, VE, bl)
                    it += 1
                    pp_sync(WG, PP > 0, bl)
                    pp_arrive(WG, NWG, PP > 0, bl)
        mbarrier.wait(q_full.index(WG * QST), 0, pred=cur < lim)
        mbarrier.wait(k_full.index(it % KS), (it // KS) & 1, pred=cur < lim)
        kk = k_s.index(it % KS).reshape([BN, D])
        if HB:
            kk = kk.slice(0, 64, dim=0)
        if QREG:
            qr = q_s.index(WG * QST).reshape([64, D]).load(ql)
            mbarrier.arrive(q_empty.index(WG * QST), count=1)
            tok0 = warpgroup_mma(gl.convert_layout(qr, qfl), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
        else:
            tok0 = warpgroup_mma(q_s.index(WG * QST).reshape([64, D]), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[tok0])
        rel(k_empty, it % KS, KE, bl)
    if XT == 3:
        if CAUSAL:
            d0 = m * BM + WG * 64 - (min((m * BM + WG * 64 + 64 + BN - 1) // BN, (S + BN - 1) // BN) - 1) * BN
        else:
            d0 = 0
        p, l_i, m_i = first(s, d0, scale, WG, BN, BF, NWG, CAUSAL, MK, sl, sf)
        pf = gl.convert_layout(p.to(gl.bfloat16), pl)
    while cur < lim:
        b = bh // H
        col = (bh - b * H) * D
        row = m * BM + WG * 64
        if CAUSAL:
            n = min(((m + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
        else:
            n = (S + BN - 1) // BN
        if CAUSAL and BM > BN:
            nw = min((row + 64 + BN - 1) // BN, n)
            if not XT:
                for _ in range(n - nw):
                    mbarrier.wait(k_full.index(it % KS), (it // KS) & 1)
                    rel(k_empty, it % KS, KE, bl)
                    mbarrier.wait(v_full.index(it % ST), (it // ST) & 1)
                    rel(v_empty, it % ST, VE, bl)
                    it += 1
                    pp_sync(WG, PP > 0, bl)
                    pp_arrive(WG, NWG, PP > 0, bl)
            n = nw
        qs = WG * QST + ti % QST
        if not XT:
            mbarrier.wait(q_full.index(qs), (ti // QST) & 1)
            if QREG:
                qr = q_s.index(qs).reshape([64, D]).load(ql)
                mbarrier.arrive(q_empty.index(qs), count=1)
            mbarrier.wait(k_full.index(it % KS), (it // KS) & 1)
            trace(tra, 3, TR, bl)
            kk = k_s.index(it % KS).reshape([BN, D])
            if HB:
                kk = kk.slice(0, 64, dim=0)
            if QREG:
                tok = warpgroup_mma(gl.convert_layout(qr, qfl), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
            else:
                tok = warpgroup_mma(q_s.index(qs).reshape([64, D]), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[tok])
            trace(tra, 4, TR, bl)
            rel(k_empty, it % KS, KE, bl)
        if QREG:
            q = qr
        else:
            q = q_s.index(qs).reshape([64, D])
        if XT != 3:
            p, l_i, m_i = first(s, row - (n - 1) * BN, scale, WG, BN, BF, NWG, CAUSAL, MK, sl, sf)
            pf = gl.convert_layout(p.to(gl.bfloat16), pl)
            trace(tra, 5, TR, bl)
        acc = gl.zeros([64, D], gl.float32, ol)
        if HB:
            if n > 1:
                if TR:
                    tra = trp + ((gl.program_id(0) * 3 + WG) * 1024 + min(tstep, 1022)) * 32
                    tstep += 1
                pb, acc, l_i = step(q, pf, acc, l_i, m_i, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, tra, WG, NWG, PP, SEQ, BF, D, BN, ST, PIN, KE, VE, TR, KS, pl, bl)
                it += 1
            else:
                mbarrier.wait(v_full.index(it % ST), (it // ST) & 1)
                acc = warpgroup_mma(pf, v_s.index(it % ST).reshape([BN, D]).slice(0, BF, dim=0), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                pb = gl.full([64, BN], 0.0, gl.bfloat16, pl)
            n -= 1
        else:
            pb = pf
        for j in range(n - 1):
            if TR:
                tra = trp + ((gl.program_id(0) * 3 + WG) * 1024 + min(tstep, 1023)) * 32
                tstep += 1
            pb, acc, l_i = step(q, pb, acc, l_i, m_i, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, tra, WG, NWG, PP, SEQ, BN, D, BN, ST, PIN, KE, VE, TR, KS, pl, bl)
            it += 1
        if not QREG:
            mbarrier.arrive(q_empty.index(qs), count=1)
        if TR:
            tra = trp + ((gl.program_id(0) * 3 + WG) * 1024 + min(tstep, 1022)) * 32
            tstep += 1
        trace(tra, 0, TR, bl)
        trace(tra, 7, TR, bl)
        st = it % ST
        ph = (it // ST) & 1
        nti = ti + 1
        itn = it + 1
        if DYN:
            mbarrier.wait(t_full.index(ti & 7), (ti // 8) & 1)
            nx = gl.max(list_s.index(nti & 127).load(bl), 0)
        else:
            nx = cur + 1
        m2, bh2 = tile_coords(nx, nm, nbh, SWZ, ORDER, DYN)
        more = nx < lim
        if XT == 1 and CAUSAL and BM > BN:
            n2 = min(((m2 + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
            sk = n2 - min((m2 * BM + WG * 64 + 64 + BN - 1) // BN, n2)
            if not more:
                sk = 0
            for _ in range(sk):
                mbarrier.wait(k_full.index(itn % KS), (itn // KS) & 1)
                rel(k_empty, itn % KS, KE, bl)
                mbarrier.wait(v_full.index(itn % ST), (itn // ST) & 1)
                rel(v_empty, itn % ST, VE, bl)
                itn += 1
                pp_sync(WG, PP > 0, bl)
                pp_arrive(WG, NWG, PP > 0, bl)
        if XT == 3:
            # the tile boundary is a step: next tile's first scores and this tile's last P.V together, the first softmax under P.V
            sk = 0
            if CAUSAL:
                n2 = min(((m2 + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
                nw2 = min((m2 * BM + WG * 64 + 64 + BN - 1) // BN, n2)
                if BM > BN:
                    if more:
                        sk = n2 - nw2
                itn += sk
                d2 = m2 * BM + WG * 64 - (nw2 - 1) * BN
            else:
                d2 = 0
            stn = itn % KS
            qn = WG * QST + nti % QST
            mbarrier.wait(q_full.index(qn), (nti // QST) & 1, pred=more)
            if QREG:
                qr = q_s.index(qn).reshape([64, D]).load(ql)
                mbarrier.arrive(q_empty.index(qn), count=1)
            mbarrier.wait(k_full.index(stn), (itn // KS) & 1, pred=more)
            kk = k_s.index(stn).reshape([BN, D])
            if HB:
                kk = kk.slice(0, 64, dim=0)
            pp_sync(WG, PP > 0, bl)
            trace(tra, 1, TR, bl)
            if SEQ == 2:
                mbarrier.wait(v_full.index(st), ph)
                acc = warpgroup_mma(pb, v_s.index(st).reshape([BN, D]), acc, is_async=True)
            if QREG:
                tok = warpgroup_mma(gl.convert_layout(qr, qfl), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
            else:
                tok = warpgroup_mma(q_s.index(qn).reshape([64, D]), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
            if SEQ != 2:
                mbarrier.wait(v_full.index(st), ph)
                acc = warpgroup_mma(pb, v_s.index(st).reshape([BN, D]), acc, is_async=True)
            if PP == 1 or PP == 3:
                pp_arrive(WG, NWG, True, bl)
            trace(tra, 2, TR, bl)
            if PP == 4:
                sx, acc = warpgroup_mma_wait(1, deps=[tok, acc])
                pp_arrive(WG, NWG, True, bl)
                sx, acc = warpgroup_mma_wait(0, deps=[sx, acc])
            elif SEQ:
                sx, acc = warpgroup_mma_wait(0, deps=[tok, acc])
            else:
                sx, acc = warpgroup_mma_wait(1, deps=[tok, acc])
            trace(tra, 3, TR, bl)
            if PP == 2:
                pp_arrive(WG, NWG, True, bl)
            rel(k_empty, stn, KE, bl)
            if SEQ:
                rel(v_empty, st, VE, bl)
            p, ln, m_i = first(sx, d2, scale, WG, BN, BF, NWG, CAUSAL, MK, sl, sf)
            if SEQ == 0:
                if PIN == 5:
                    ln = guard(ln)
                else:
                    mbarrier.wait(v_full.index(st), ph)
                trace(tra, 4, TR, bl)
                acc, p, ln = warpgroup_mma_wait(0, deps=[acc, p, ln])
            pf = gl.convert_layout(p.to(gl.bfloat16), pl)
            if SEQ == 0:
                rel(v_empty, st, VE, bl)
            trace(tra, 5, TR, bl)
            inv = gl.convert_layout(1.0 / gl.sum(l_i, 1), row_o)
            l_i = ln
            if GUARD:
                flags = flags | (gl.where(inv > 8.67e-19, 0, 1) << (ti & 31))
            acc = acc * inv[:, None]
            tma.store_wait(0)
            o_buf.reshape([64, D]).store(acc.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [b, row, col], o_buf)
            trace(tra, 6, TR, bl)
            if CAUSAL and BM > BN:
                for x in range(sk):
                    # the blocks skipped above: hand them back and let the token pass
                    pp_sync(WG, PP > 0, bl)
                    pp_arrive(WG, NWG, PP > 0, bl)
                    iz = itn - sk + x
                    mbarrier.wait(k_full.index(iz % KS), (iz // KS) & 1)
                    rel(k_empty, iz % KS, KE, bl)
                    mbarrier.wait(v_full.index(iz % ST), (iz // ST) & 1)
                    rel(v_empty, iz % ST, VE, bl)
        else:
            mbarrier.wait(v_full.index(st), ph)
            acc = warpgroup_mma(pb, v_s.index(st).reshape([BN, D]), acc, is_async=True)
            if XT:
                # next tile's first scores, under the epilogue (garbage, never used, after the last tile)
                stn = itn % KS
                qn = WG * QST + nti % QST
                mbarrier.wait(q_full.index(qn), (nti // QST) & 1, pred=more)
                if QREG:
                    qr = q_s.index(qn).reshape([64, D]).load(ql)
                    mbarrier.arrive(q_empty.index(qn), count=1)
                mbarrier.wait(k_full.index(stn), (itn // KS) & 1, pred=more)
                kk = k_s.index(stn).reshape([BN, D])
                if HB:
                    kk = kk.slice(0, 64, dim=0)
                if QREG:
                    tok = warpgroup_mma(gl.convert_layout(qr, qfl), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
                else:
                    tok = warpgroup_mma(q_s.index(qn).reshape([64, D]), kk.permute((1, 0)), sf0, use_acc=False, is_async=True)
                acc, tokw = warpgroup_mma_wait(1, deps=[acc, tok])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            trace(tra, 1, TR, bl)
            rel(v_empty, st, VE, bl)
            inv = gl.convert_layout(1.0 / gl.sum(l_i, 1), row_o)
            if GUARD:
                # `inv` tiny, zero or NaN: the row sums grew beyond 2^60 over the first block's maximum
                flags = flags | (gl.where(inv > 8.67e-19, 0, 1) << (ti & 31))
            acc = acc * inv[:, None]
            tma.store_wait(0)
            o_buf.reshape([64, D]).store(acc.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(o_desc, [b, row, col], o_buf)
            trace(tra, 2, TR, bl)
            if XT:
                s = warpgroup_mma_wait(0, deps=[tokw])
                rel(k_empty, stn, KE, bl)
        it = itn
        ti = nti
        cur = nx
        m = m2
        bh = bh2
    tma.store_wait(0)
    if WG == 0:
        pp_sync(WG, PP > 0, bl)
    if GUARD:
        fl = gl.reduce(flags, 0, or_)
        if fl != 0:
            fbp = 0
            for i in range(ti):
                if ((fl >> (i & 31)) & 1) != 0:
                    if DYN:
                        if i == 0:
                            cur = gl.program_id(0)
                        else:
                            cur = gl.max(list_s.index(i & 127).load(bl), 0)
                    else:
                        cur = i
                    m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
                    b = bh // H
                    fbp = redo_tile(q_desc, o_desc, k64_desc, v64_desc, q_s.index(WG * QST), o_buf, fb_bar.index(WG), fbp, S, b, m * BM + WG * 64, (bh - b * H) * D, scale, D, CAUSAL)


@gluon.jit(do_not_specialize=["S", "H", "nm", "nbh", "SWZ", "ntiles", "trp"])
def fa_fwd(q_desc, k_desc, v_desc, o_desc, k64_desc, v64_desc, ctr, S, H, nm, nbh, SWZ, ntiles, scale, trp,
           D: gl.constexpr, BN: gl.constexpr, NWG: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, CAUSAL: gl.constexpr,
           PIN: gl.constexpr, ORDER: gl.constexpr, QREG: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr,
           DYN: gl.constexpr, XT: gl.constexpr, HALF: gl.constexpr, GUARD: gl.constexpr, PP: gl.constexpr, SEQ: gl.constexpr, TR: gl.constexpr, KS: gl.constexpr, MK: gl.constexpr, QE: gl.constexpr, CREG: gl.constexpr, PREG: gl.constexpr, num_warps: gl.constexpr = 4):
    q_s = gl.allocate_shared_memory(gl.bfloat16, [NWG * QST, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [KS, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [ST, 1, BN, D], v_desc.layout)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [NWG, 1, 64, D], o_desc.layout)
    list_s = gl.allocate_shared_memory(gl.int32, [128, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbl: gl.constexpr = mbarrier.MBarrierLayout()
    k_empty = gl.allocate_shared_memory(gl.int64, [KS, 1], mbl)
    v_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    q_full = gl.allocate_shared_memory(gl.int64, [NWG * QST, 1], mbl)
    q_empty = gl.allocate_shared_memory(gl.int64, [NWG * QST, 1], mbl)
    fb_bar = gl.allocate_shared_memory(gl.int64, [NWG, 1], mbl)
    t_full = gl.allocate_shared_memory(gl.int64, [8, 1], mbl)
    k_full = gl.allocate_shared_memory(gl.int64, [KS, 1], mbl)
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    for i in gl.static_range(KS):
        # first two inits in the PTX: the runner finds the offsets of these two rings there
        mbarrier.init(k_empty.index(i), count=NWG if KE == 0 else 4 * NWG)
        if i == 0:
            for x in gl.static_range(ST):
                mbarrier.init(v_empty.index(x), count=NWG if VE == 0 else 4 * NWG)
    for i in gl.static_range(KS):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(ST):
        mbarrier.init(v_full.index(i), count=1)
    for i in gl.static_range(NWG * QST):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(NWG):
        mbarrier.init(fb_bar.index(i), count=1)
    for i in gl.static_range(8):
        mbarrier.init(t_full.index(i), count=1)
    if NWG == 2:
        gl.warp_specialize([
            (consumer, (q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, scale, trp, C(0), D, BN, NWG, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, XT, HALF, GUARD, PP, SEQ, TR, KS, MK)),
            (consumer, (q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, scale, trp, C(1), D, BN, NWG, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, XT, HALF, GUARD, PP, SEQ, TR, KS, MK)),
            (producer, (q_desc, k_desc, v_desc, ctr, q_s, k_s, v_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, D, BN, NWG, ST, QST, CAUSAL, ORDER, DYN, KS, QE)),
        ], [4, 1], [CREG, PREG])
    else:
        gl.warp_specialize([
            (consumer, (q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, scale, trp, C(0), D, BN, NWG, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, XT, HALF, GUARD, PP, SEQ, TR, KS, MK)),
            (consumer, (q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, scale, trp, C(1), D, BN, NWG, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, XT, HALF, GUARD, PP, SEQ, TR, KS, MK)),
            (consumer, (q_desc, o_desc, k64_desc, v64_desc, fb_bar, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, scale, trp, C(2), D, BN, NWG, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, XT, HALF, GUARD, PP, SEQ, TR, KS, MK)),
            (producer, (q_desc, k_desc, v_desc, ctr, q_s, k_s, v_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                        S, H, nm, nbh, SWZ, ntiles, D, BN, NWG, ST, QST, CAUSAL, ORDER, DYN, KS, QE)),
        ], [4, 4, 1], [CREG, CREG, PREG])
