"""Stage 5: everything at once, and no branch or rescale left in the hot loop.

Stage 4 keeps the tensor cores fed, but its consumers still pay for generality at every key block: a
mask decision, the maximum of the block, and a rescale of the accumulator. This stage removes the
constraint `branching`: a block of the hot loop is two products, one exp2 a score, one sum.

- *Lazy maximum.* The softmax is taken relative to the row maximum of the first key block (the
  diagonal one when causal). A later block needs no maximum and no rescale; the result is exact as
  long as no probability leaves the number format. Row sums outside [1/2, 2^60] and accumulators
  that are not finite (P beyond 65504 in fp16) set a bit of the tile; after the last tile a
  warpgroup redoes its flagged tiles with the online softmax.
- *Mask-free interior.* From the last block to the first: only those around the loop are masked.
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
tensor pipe and MUFU together at headdim 64, and at short seqlen the work between two tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder.launch import Runner
from attn_ladder.problem import Problem
from attn_ladder.rows import hide, hide_diagonal, redo_tile, store_tile
from attn_ladder.stage import Stage
from attn_ladder.tiles import (
    TILE_LIST,
    key_blocks,
    listed_tile,
    num_tiles,
    seen_blocks,
    tile_list,
    tile_of,
)
from attn_ladder.top_config import Config, choose_config, schedule, signature  # noqa: F401 all are public here
from attn_ladder.warpgroup import (
    after,
    barriers,
    either,
    exp2,
    fill,
    make_ring,
    meet,
    pin,
    release,
    row_layout,
    take_turn,
    thread_sums,
)

STAGE = Stage(title="Everything: lazy maximum, ping-pong, no masks", removes="branching")


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
    q_ring = make_ring(q_desc, CONSUMERS * cfg.num_q_buffers, 1)
    k_ring = make_ring(k_desc, cfg.num_buffers, 128 * CONSUMERS)
    v_ring = make_ring(v_desc, cfg.num_buffers, 128 * CONSUMERS)
    BLOCKS: gl.constexpr = cfg.num_buffers * cfg.BLOCK_N // 64 if cfg.direct_store else CONSUMERS
    REDO: gl.constexpr = [BLOCKS, 1, 64, 1, cfg.headdim]
    if cfg.direct_store:
        redo_smem = v_ring[0]._reinterpret(v_desc.dtype, REDO, v_desc.layout)
        out = (o_ptr, lse_ptr)
    else:
        redo_smem = gl.allocate_shared_memory(o_desc.dtype, REDO, o_desc.layout)
        out = (o_desc, redo_smem, lse_ptr)
    tiles_smem = tile_list(cfg)
    rings = (q_ring, k_ring, v_ring)
    redo_buffers = (redo_smem, barriers(CONSUMERS, 1))
    # only where they are used: without a use, other data would share the memory of these barriers
    tiles = (tiles_smem, barriers(8, 1) if cfg.schedule == "dynamic" else tiles_smem)
    redo_descs = (q_desc, k_redo_desc, v_redo_desc)
    load = ((q_desc, k_desc, v_desc), rings, tiles, counter_ptr, shape)
    softmax = (redo_descs, rings, redo_buffers, tiles, out, shape, qk_scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (softmax_partition, (softmax, gl.constexpr(0), cfg)),
                (softmax_partition, (softmax, gl.constexpr(1), cfg)),
                (load_partition, (load, cfg)),
            ], [4, cfg.producer_warps], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (softmax_partition, (softmax, gl.constexpr(0), cfg)),
                (softmax_partition, (softmax, gl.constexpr(1), cfg)),
                (softmax_partition, (softmax, gl.constexpr(2), cfg)),
                (load_partition, (load, cfg)),
            ], [4, 4, cfg.producer_warps], [160, 160, 24],
        )  # fmt: skip


def source(cfg: Config, dtype: str) -> dict:
    """The kernel with the types of its arguments, as `launch.Kernel` takes it."""
    return dict(kernel=attention_kernel, signature=signature(cfg, dtype), constexprs={"cfg": cfg})


def offline(dtype: str = "bf16", **config) -> dict:
    """`source` from plain values, for `attn_ladder.offline.report`."""
    return source(Config(**config), dtype)


runner = Runner(lambda *a: schedule(*a), lambda *a: source(*a))  # found late: variants replace them
forward = runner.forward


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if capability != (9, 0):
        return f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.headdim not in (64, 128, 256):
        return f"supports headdim 64, 128 and 256, not headdim={problem.headdim}"
    if problem.page_size:
        return f"reads contiguous keys and values, not page_size={problem.page_size}"
    return None
