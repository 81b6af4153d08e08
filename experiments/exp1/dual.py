"""Research prototype: intra-warpgroup ping-pong. Each consumer warpgroup owns TWO 64-row query tiles A and B (CTA: 256 rows, two consumers).
Step: issue [QK_A(next), PV_A(cur)]; softmax B(cur); issue [QK_B(next), PV_B(cur)]; wait(2); softmax A(next); wait(0).  Nothing in flight at the back-edge.
Lazy max; the guard's flag is computed (no redo here). bf16, S a multiple of 256."""
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma, mbarrier, fence_async_shared, warpgroup_mma, warpgroup_mma_wait
C = gl.constexpr

@gluon.constexpr_function
def rel_asm(off):
    return "{ .reg .pred p; .reg .b32 a, l; mov.u32 l, %laneid; setp.eq.s32 p, l, 0; mov.b32 a, global_smem; mad.lo.s32 a, $1, 8, a; @p mbarrier.arrive.shared::cta.b64 _, [a + " + str(off) + "]; mov.b32 $0, $1; }"

@gluon.jit
def rel(bar, st, OFF: gl.constexpr, bl: gl.constexpr):
    if OFF == 0:
        mbarrier.arrive(bar.index(st), count=1)
    else:
        z = gl.full([128], 0, gl.int32, bl) + st
        gl.inline_asm_elementwise(rel_asm(OFF), "=r,r", [z], dtype=gl.int32, is_pure=False, pack=1)

@gluon.jit
def ex2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)

@gluon.jit
def guard(x):
    return gl.inline_asm_elementwise("{ .reg .pred q; setp.lt.f32 q, $4, 0f00000000; @q exit; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; }",
                                     "=f,=f,=f,=f,f,f,f,f", [x], dtype=gl.float32, is_pure=False, pack=4)

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
def producer(q_desc, k_desc, v_desc, ctr, q_s, k_s, v_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
             S, H, nm, nbh, SWZ, ntiles,
             D: gl.constexpr, BN: gl.constexpr, NT: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, CAUSAL: gl.constexpr, ORDER: gl.constexpr, DYN: gl.constexpr):
    BM: gl.constexpr = NT * 64
    lb: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    it = 0
    ti = 0
    if DYN:
        cur = gl.program_id(0)
        lim = ntiles
    else:
        cur = 0
        lim = num_tiles(nm, nbh, ORDER)
    while cur < lim:
        m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
        b = bh // H
        col = (bh - b * H) * D
        if CAUSAL:
            n = min(((m + 1) * BM + BN - 1) // BN, (S + BN - 1) // BN)
        else:
            n = (S + BN - 1) // BN
        st = it % ST
        ph = (it // ST) & 1
        mbarrier.wait(k_empty.index(st), ph ^ 1)
        mbarrier.expect(k_full.index(st), BN * D * 2)
        tma.async_copy_global_to_shared(k_desc, [b, (n - 1) * BN, col], k_full.index(st), k_s.index(st))
        for w0 in gl.static_range(NT):
            qs = (NT - 1 - w0) * QST + ti % QST
            mbarrier.wait(q_empty.index(qs), ((ti // QST) & 1) ^ 1)
            mbarrier.expect(q_full.index(qs), 64 * D * 2)
            tma.async_copy_global_to_shared(q_desc, [b, m * BM + (NT - 1 - w0) * 64, col], q_full.index(qs), q_s.index(qs))
        if DYN:
            nx = gl.num_programs(0) + gl.atomic_add(ctr, 1, sem="relaxed")
            list_s.index((ti + 1) & 127).store(gl.full([1], 0, gl.int32, lb) + nx)
            mbarrier.arrive(t_full.index(ti & 7), count=1)
        else:
            nx = cur + 1
        for j in range(n - 2, -1, -1):
            it2 = it + 1
            st2 = it2 % ST
            ph2 = (it2 // ST) & 1
            mbarrier.wait(k_empty.index(st2), ph2 ^ 1)
            mbarrier.expect(k_full.index(st2), BN * D * 2)
            tma.async_copy_global_to_shared(k_desc, [b, j * BN, col], k_full.index(st2), k_s.index(st2))
            st = it % ST
            ph = (it // ST) & 1
            mbarrier.wait(v_empty.index(st), ph ^ 1)
            mbarrier.expect(v_full.index(st), BN * D * 2)
            tma.async_copy_global_to_shared(v_desc, [b, (j + 1) * BN, col], v_full.index(st), v_s.index(st))
            it = it2
        st = it % ST
        ph = (it // ST) & 1
        mbarrier.wait(v_empty.index(st), ph ^ 1)
        mbarrier.expect(v_full.index(st), BN * D * 2)
        tma.async_copy_global_to_shared(v_desc, [b, 0, col], v_full.index(st), v_s.index(st))
        it += 1
        ti += 1
        cur = nx
    if DYN:
        dn = gl.atomic_add(ctr + 1, 1, sem="acq_rel")
        if dn == gl.num_programs(0) - 1:
            gl.store(ctr, 0)
            gl.store(ctr + 1, 0)

@gluon.jit
def softmax(s, m_i, l_i, scale, BN: gl.constexpr):
    p = ex2(s * scale - m_i[:, None])
    return p, l_i + gl.sum(gl.reshape(p, [64, BN // 8, 8]), 1)

@gluon.jit
def qk(q, k_s, st, s0, BN: gl.constexpr, D: gl.constexpr):
    return warpgroup_mma(q, k_s.index(st).reshape([BN, D]).permute((1, 0)), s0, use_acc=False, is_async=True)

@gluon.jit
def mask_max(s, rel_row, BN: gl.constexpr, sl: gl.constexpr, MASK: gl.constexpr, scale):
    # rel_row: row of the tile's first query minus column of the block's first key
    if MASK:
        # opaque to the compiler, which would keep 32 loop-invariant comparisons in registers
        offs_m = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [rel_row + gl.arange(0, 64, gl.SliceLayout(1, sl))], dtype=gl.int32, is_pure=False, pack=1)
        offs_n = gl.arange(0, BN, gl.SliceLayout(0, sl))
        s = gl.where(offs_m[:, None] >= offs_n[None, :], s, -float("inf"))
    return s, gl.max(s, 1) * scale

@gluon.jit
def skip(k_full, k_empty, v_full, v_empty, it, ST: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr, bl: gl.constexpr):
    mbarrier.wait(k_full.index(it % ST), (it // ST) & 1)
    rel(k_empty, it % ST, KE, bl)
    mbarrier.wait(v_full.index(it % ST), (it // ST) & 1)
    rel(v_empty, it % ST, VE, bl)

@gluon.jit
def dstep(qa, qb, pa, sb, acca, accb, la, lb, ma, mb, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, tra,
          D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr, PIN: gl.constexpr, ERL: gl.constexpr, TR: gl.constexpr, pl: gl.constexpr, bl: gl.constexpr):
    st2 = (it + 1) % ST
    st = it % ST
    vv = v_s.index(st).reshape([BN, D])
    trace(tra, 0, TR, bl)
    mbarrier.wait(k_full.index(st2), ((it + 1) // ST) & 1)
    mbarrier.wait(v_full.index(st), (it // ST) & 1)
    trace(tra, 1, TR, bl)
    if PIN & 16:
        xb = sb * scale - mb[:, None]
    toka = qk(qa, k_s, st2, s0, BN, D)
    acca = warpgroup_mma(pa, vv, acca, is_async=True)
    trace(tra, 2, TR, bl)
    if PIN & 4:
        lb = guard(lb)
    if PIN & 32:
        # the current K block's release stands here to keep the order: products first, then the exponentials
        rel(k_empty, st, KE, bl)
    if PIN & 8:
        # two groups may be pending: no wait, an order
        sb, lb = warpgroup_mma_wait(2, deps=[sb, lb])
    if PIN & 16:
        p = ex2(xb)
        lb = lb + gl.sum(gl.reshape(p, [64, BN // 8, 8]), 1)
    else:
        p, lb = softmax(sb, mb, lb, scale, BN)
    if PIN & 2:
        lb = guard(lb)
    pb = gl.convert_layout(p.to(gl.bfloat16), pl)
    trace(tra, 3, TR, bl)
    tokb = qk(qb, k_s, st2, s0, BN, D)
    accb = warpgroup_mma(pb, vv, accb, is_async=True)
    trace(tra, 4, TR, bl)
    sa, acca = warpgroup_mma_wait(2, deps=[toka, acca])
    trace(tra, 5, TR, bl)
    p, la = softmax(sa, ma, la, scale, BN)
    if PIN & 1:
        la = guard(la)
    if ERL:
        # scores and products of B complete; release before the conversion of A's probabilities
        sb, accb, p, la = warpgroup_mma_wait(0, deps=[tokb, accb, p, la])
        trace(tra, 6, TR, bl)
        if not (PIN & 32):
            rel(k_empty, st2, KE, bl)
        rel(v_empty, st, VE, bl)
        pa = gl.convert_layout(p.to(gl.bfloat16), pl)
    else:
        pa = gl.convert_layout(p.to(gl.bfloat16), pl)
        sb, accb, pa, la = warpgroup_mma_wait(0, deps=[tokb, accb, pa, la])
        trace(tra, 6, TR, bl)
        if not (PIN & 32):
            rel(k_empty, st2, KE, bl)
        rel(v_empty, st, VE, bl)
    return pa, sb, acca, accb, la, lb

@gluon.jit
def sstep(qa, pa, acca, la, ma, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale,
          D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr, PIN: gl.constexpr, pl: gl.constexpr, bl: gl.constexpr):
    st2 = (it + 1) % ST
    st = it % ST
    mbarrier.wait(k_full.index(st2), ((it + 1) // ST) & 1)
    toka = qk(qa, k_s, st2, s0, BN, D)
    mbarrier.wait(v_full.index(st), (it // ST) & 1)
    acca = warpgroup_mma(pa, v_s.index(st).reshape([BN, D]), acca, is_async=True)
    sa, acca = warpgroup_mma_wait(1, deps=[toka, acca])
    rel(k_empty, st2, KE, bl)
    p, la = softmax(sa, ma, la, scale, BN)
    if PIN & 1:
        la = guard(la)
    acca, p, la = warpgroup_mma_wait(0, deps=[acca, p, la])
    rel(v_empty, st, VE, bl)
    return gl.convert_layout(p.to(gl.bfloat16), pl), acca, la

@gluon.jit
def finish(acc, l, o_buf, o_desc, b, row, col, flags, ti, D: gl.constexpr, ol: gl.constexpr, OPEND: gl.constexpr):
    inv = gl.convert_layout(1.0 / gl.sum(l, 1), gl.SliceLayout(1, ol))
    flags = flags | (gl.where(inv > 8.67e-19, 0, 1) << (ti & 31))
    acc = acc * inv[:, None]
    tma.store_wait(OPEND)
    o_buf.reshape([64, D]).store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, row, col], o_buf)
    return flags

@gluon.jit
def consumer(o_desc, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, flg,
             S, H, nm, nbh, SWZ, ntiles, scale, trp,
             WG: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, NT: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr,
             CAUSAL: gl.constexpr, PIN: gl.constexpr, ORDER: gl.constexpr, QREG: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr,
             DYN: gl.constexpr, PAIR: gl.constexpr, ERL: gl.constexpr, TR: gl.constexpr):
    BM: gl.constexpr = NT * 64
    # sub-tiles: A is the later one (more keys when causal)
    RA: gl.constexpr = (3 if WG == 0 else 2) if PAIR else (1 if WG == 0 else 3)
    RB: gl.constexpr = (0 if WG == 0 else 1) if PAIR else (0 if WG == 0 else 2)
    sl: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    ol: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    pl: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ol, k_width=2)
    ql: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sl, k_width=2)
    bl: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row_o: gl.constexpr = gl.SliceLayout(1, ol)
    it = 0
    ti = 0
    tstep = 0
    tra = trp
    if DYN:
        cur = gl.program_id(0)
        lim = ntiles
    else:
        cur = 0
        lim = num_tiles(nm, nbh, ORDER)
    s0 = gl.zeros([64, BN], gl.float32, sl)
    lz = gl.sum(gl.reshape(s0, [64, BN // 8, 8]), 1)
    fa = gl.full([64], 0, gl.int32, row_o)
    fb = gl.full([64], 0, gl.int32, row_o)
    while cur < lim:
        m, bh = tile_coords(cur, nm, nbh, SWZ, ORDER, DYN)
        b = bh // H
        col = (bh - b * H) * D
        if CAUSAL:
            n = (m + 1) * (BM // BN)
            for _ in gl.static_range((NT - 1 - RA) * 64 // BN):
                skip(k_full, k_empty, v_full, v_empty, it, ST, KE, VE, bl)
                it += 1
                n -= 1
        else:
            n = S // BN
        qsa = RA * QST + ti % QST
        qsb = RB * QST + ti % QST
        qph = (ti // QST) & 1
        mbarrier.wait(q_full.index(qsa), qph)
        if QREG:
            qa = q_s.index(qsa).reshape([64, D]).load(ql)
            mbarrier.arrive(q_empty.index(qsa), count=1)
        else:
            qa = q_s.index(qsa).reshape([64, D])
        if QREG:
            mbarrier.wait(q_full.index(qsb), qph)
            qb = q_s.index(qsb).reshape([64, D]).load(ql)
            mbarrier.arrive(q_empty.index(qsb), count=1)
        else:
            qb = q_s.index(qsb).reshape([64, D])
        acca = gl.zeros([64, D], gl.float32, ol)
        accb = gl.zeros([64, D], gl.float32, ol)
        mbarrier.wait(k_full.index(it % ST), (it // ST) & 1)
        toka = qk(qa, k_s, it % ST, s0, BN, D)
        if CAUSAL:
            sa = warpgroup_mma_wait(0, deps=[toka])
            rel(k_empty, it % ST, KE, bl)
            sa, ma = mask_max(sa, 0, BN, sl, True, scale)
            p, la = softmax(sa, ma, lz, scale, BN)
            pa = gl.convert_layout(p.to(gl.bfloat16), pl)
            for _ in gl.static_range(RA - RB - 1):
                pa, acca, la = sstep(qa, pa, acca, la, ma, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, D, BN, ST, KE, VE, PIN, pl, bl)
                it += 1
                n -= 1
            # B joins at its diagonal block
            st2 = (it + 1) % ST
            st = it % ST
            mbarrier.wait(k_full.index(st2), ((it + 1) // ST) & 1)
            if not QREG:
                mbarrier.wait(q_full.index(qsb), qph)
            tokb = qk(qb, k_s, st2, s0, BN, D)
            toka = qk(qa, k_s, st2, s0, BN, D)
            mbarrier.wait(v_full.index(st), (it // ST) & 1)
            acca = warpgroup_mma(pa, v_s.index(st).reshape([BN, D]), acca, is_async=True)
            sb, sa, acca = warpgroup_mma_wait(0, deps=[tokb, toka, acca])
            sb, mb = mask_max(sb, 0, BN, sl, True, scale)
            if not (PIN & 32):
                rel(k_empty, st2, KE, bl)
            rel(v_empty, st, VE, bl)
            p, la = softmax(sa, ma, la, scale, BN)
            pa = gl.convert_layout(p.to(gl.bfloat16), pl)
            it += 1
            n -= 1
        else:
            if not QREG:
                mbarrier.wait(q_full.index(qsb), qph)
            tokb = qk(qb, k_s, it % ST, s0, BN, D)
            sa = warpgroup_mma_wait(1, deps=[toka])
            sa, ma = mask_max(sa, 0, BN, sl, False, scale)
            p, la = softmax(sa, ma, lz, scale, BN)
            pa = gl.convert_layout(p.to(gl.bfloat16), pl)
            if PIN & 1:
                la = guard(la)
            sb, la = warpgroup_mma_wait(0, deps=[tokb, la])
            if not (PIN & 32):
                rel(k_empty, it % ST, KE, bl)
            sb, mb = mask_max(sb, 0, BN, sl, False, scale)
        lb = lz
        for j in range(n - 1):
            if TR:
                tra = trp + ((gl.program_id(0) * 2 + WG) * 1024 + min(tstep, 1023)) * 32
                tstep += 1
            pa, sb, acca, accb, la, lb = dstep(qa, qb, pa, sb, acca, accb, la, lb, ma, mb, s0, k_s, v_s, k_full, k_empty, v_full, v_empty, it, scale, tra, D, BN, ST, KE, VE, PIN, ERL, TR, pl, bl)
            it += 1
        if not QREG:
            mbarrier.arrive(q_empty.index(qsa), count=1)
            mbarrier.arrive(q_empty.index(qsb), count=1)
        st = it % ST
        vv = v_s.index(st).reshape([BN, D])
        mbarrier.wait(v_full.index(st), (it // ST) & 1)
        acca = warpgroup_mma(pa, vv, acca, is_async=True)
        if PIN & 32:
            rel(k_empty, st, KE, bl)
        p, lb = softmax(sb, mb, lb, scale, BN)
        pb = gl.convert_layout(p.to(gl.bfloat16), pl)
        accb = warpgroup_mma(pb, vv, accb, is_async=True)
        acca = warpgroup_mma_wait(1, deps=[acca])
        fa = finish(acca, la, o_s.index(2 * WG), o_desc, b, m * BM + RA * 64, col, fa, ti, D, ol, 1)
        accb, fa = warpgroup_mma_wait(0, deps=[accb, fa])
        rel(v_empty, st, VE, bl)
        fb = finish(accb, lb, o_s.index(2 * WG + 1), o_desc, b, m * BM + RB * 64, col, fb, ti, D, ol, 1)
        it += 1
        if DYN:
            mbarrier.wait(t_full.index(ti & 7), (ti // 8) & 1)
            nx = gl.max(list_s.index((ti + 1) & 127).load(bl), 0)
        else:
            nx = cur + 1
        ti += 1
        cur = nx
    tma.store_wait(0)
    f = fa | fb
    gl.store(flg + gl.program_id(0) + gl.arange(0, 64, row_o) * 0, f, mask=f != 0)

@gluon.jit(do_not_specialize=["S", "H", "nm", "nbh", "SWZ", "ntiles", "trp"])
def fa_dual(q_desc, k_desc, v_desc, o_desc, ctr, flg, S, H, nm, nbh, SWZ, ntiles, scale, trp,
            D: gl.constexpr, BN: gl.constexpr, ST: gl.constexpr, QST: gl.constexpr, CAUSAL: gl.constexpr,
            PIN: gl.constexpr, ORDER: gl.constexpr, QREG: gl.constexpr, KE: gl.constexpr, VE: gl.constexpr,
            DYN: gl.constexpr, PAIR: gl.constexpr, ERL: gl.constexpr, TR: gl.constexpr, CREG: gl.constexpr, PREG: gl.constexpr, num_warps: gl.constexpr = 4):
    NT: gl.constexpr = 4
    q_s = gl.allocate_shared_memory(gl.bfloat16, [NT * QST, 1, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(gl.bfloat16, [ST, 1, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(gl.bfloat16, [ST, 1, BN, D], v_desc.layout)
    o_s = gl.allocate_shared_memory(gl.bfloat16, [NT, 1, 64, D], o_desc.layout)
    list_s = gl.allocate_shared_memory(gl.int32, [128, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    mbl: gl.constexpr = mbarrier.MBarrierLayout()
    k_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    v_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    q_full = gl.allocate_shared_memory(gl.int64, [NT * QST, 1], mbl)
    q_empty = gl.allocate_shared_memory(gl.int64, [NT * QST, 1], mbl)
    t_full = gl.allocate_shared_memory(gl.int64, [8, 1], mbl)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbl)
    for i in gl.static_range(ST):
        mbarrier.init(k_empty.index(i), count=2 if KE == 0 else 8)
        mbarrier.init(v_empty.index(i), count=2 if VE == 0 else 8)
    for i in gl.static_range(ST):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    for i in gl.static_range(NT * QST):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(8):
        mbarrier.init(t_full.index(i), count=1)
    gl.warp_specialize([
        (consumer, (o_desc, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, flg,
                    S, H, nm, nbh, SWZ, ntiles, scale, trp, C(0), D, BN, NT, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, PAIR, ERL, TR)),
        (consumer, (o_desc, q_s, k_s, v_s, o_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full, flg,
                    S, H, nm, nbh, SWZ, ntiles, scale, trp, C(1), D, BN, NT, ST, QST, CAUSAL, PIN, ORDER, QREG, KE, VE, DYN, PAIR, ERL, TR)),
        (producer, (q_desc, k_desc, v_desc, ctr, q_s, k_s, v_s, list_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, t_full,
                    S, H, nm, nbh, SWZ, ntiles, D, BN, NT, ST, QST, CAUSAL, ORDER, DYN)),
    ], [4, 1], [CREG, PREG])
