"""Stage 4: a producer warp that loads ahead into rings of buffers, and consumers that compute.

In stage 3 the warps that compute also load, in program order: a load is issued between two products
of the same warpgroup, one tile ahead and not across query tiles, so memory latency shows whenever
it is longer than a tile's work, and always at the start of a query tile.

Here one warp does nothing but load. It runs ahead as far as the rings of K and V are deep, into
the next query tile if need be, and waits only for buffers (`*_empty_bar`). Two warpgroups with
nearly all registers consume; K and V are released separately, each as soon as its product is
complete. With the loads out of the way a consumer keeps two products in flight: the scores of the
next key tile and the product with V of this one run while the softmax runs (FlashAttention-3,
section 3.2), and the consumers take turns to issue them (section 3.1), so that the softmax of one
fills the products of the other.

What should move: long-scoreboard and barrier stalls together, to below 10 % of samples (the plan
asks for memory stalls below 40 %); `tensor pipe active` at headdim 128, full, 8k, from below 60 %
to above 80 %. The plan promises 1.20 to 1.30 times the speed.

What limits it: each key tile is asked whether it must be masked, and each rescales the accumulator
by a maximum that hardly ever changes after the first tiles; stage 5 attacks that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attn_ladder.launch import descriptor, group_of_heads, multiprocessors
from attn_ladder.problem import Problem
from attn_ladder.stage import Stage
from attn_ladder.tiles import list_entry, list_length
from attn_ladder.warpgroup import fill, release, row_layout, take_turn, thread_sums

STAGE = Stage(title="Producer warp, rings of buffers, overlapped consumers", removes="memory")
BLOCK_M = gl.constexpr(128)  # two consumers of 64 query rows


@dataclass(frozen=True)
class Config:
    """Two consumers of 64 query rows × BLOCK_N keys; rings of `num_buffers` tiles of K and of V,
    and of `num_q_buffers` tiles of Q.

    `ping_pong` makes the consumers take turns. With `overlap` "own" a turn ends when the products
    are issued and the softmax runs under the consumer's own; with "others" it ends when they are
    complete and the softmax runs under those of the other one. `sums_in_threads` adds up the parts
    of a row that threads have only at the end of a query tile. `l2_bytes` is what the keys and
    values of a group of heads may take of the L2 cache.
    """

    BLOCK_N: int = 128
    num_buffers: int = 2
    num_q_buffers: int = 1
    ping_pong: bool = True
    overlap: str = "own"
    sums_in_threads: bool = True
    l2_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        if self.BLOCK_N not in (64, 128):
            raise ValueError(f"BLOCK_N={self.BLOCK_N} must be 64 or 128")
        if self.num_buffers < 1:
            raise ValueError(f"num_buffers={self.num_buffers} must be at least 1")
        if self.num_q_buffers < 1:
            raise ValueError(f"num_q_buffers={self.num_q_buffers} must be at least 1")
        if self.overlap not in ("own", "others") or (
            self.overlap == "others" and not self.ping_pong
        ):
            raise ValueError(f"overlap={self.overlap!r} must be own, or others with ping_pong")


CONFIGS = {
    64: Config(num_buffers=3, num_q_buffers=2, overlap="others"),
    128: Config(num_buffers=2),
    # what fits beside Q and the output; with sums in threads ptxas moves the softmax below the wait
    256: Config(BLOCK_N=64, num_buffers=1, sums_in_threads=False),
}


@gluon.jit
def key_tiles(tile_m, seqlen_q, seqlen_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """(key tiles that a query tile goes through, how many of them all its rows see whole).

    A query tile that sees no key goes through one tile of keys all the same, wholly masked.
    """
    end = seqlen_k
    whole = seqlen_k
    if CAUSAL:
        first_row_end = tile_m * BLOCK_M + seqlen_k - seqlen_q + 1
        end = min(end, max(0, first_row_end + BLOCK_M - 1))
        whole = min(whole, max(0, first_row_end))
    return max(1, (end + BLOCK_N - 1) // BLOCK_N), whole // BLOCK_N


@gluon.jit
def producer_partition(tensors, buffers, scalars, CAUSAL: gl.constexpr, cfg: gl.constexpr):
    """The warp that loads, as far ahead as the buffers reach."""
    q_desc, k_desc, v_desc, out_desc, lse_ptr = tensors
    q_ring, k_ring, v_ring, out_smem = buffers
    qk_scale, heads_per_group = scalars
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    Q_BUFFERS: gl.constexpr = cfg.num_q_buffers
    nheads = q_desc.shape[2]
    num_m = (q_desc.shape[1] + BLOCK_M - 1) // BLOCK_M
    num_heads = q_desc.shape[0] * nheads
    it = 0
    for i in range(list_length(num_m * num_heads)):
        batch_head, tile_m = list_entry(i, num_m, num_heads, heads_per_group)
        batch = batch_head // nheads
        head = batch_head % nheads
        head_k = head // (nheads // k_desc.shape[2])
        num_n, _ = key_tiles(tile_m, q_desc.shape[1], k_desc.shape[1], CAUSAL, BLOCK_N)
        for consumer in gl.static_range(2):
            coord = [batch, tile_m * BLOCK_M + consumer * 64, head, 0]
            slot = consumer * Q_BUFFERS + i % Q_BUFFERS
            fill(q_desc, coord, q_ring, slot, (i // Q_BUFFERS) & 1)
        for tile_n in range(num_n):
            slot = it % NUM_BUFFERS
            phase = (it // NUM_BUFFERS) & 1
            coord_kv = [batch, tile_n * BLOCK_N, head_k, 0]
            fill(k_desc, coord_kv, k_ring, slot, phase)
            fill(v_desc, coord_kv, v_ring, slot, phase)
            it += 1


@gluon.jit
def mask(scores, last_key, tile_n, num_whole):
    """-inf where a row does not see the key; `last_key` is the last one that each row sees."""
    if tile_n >= num_whole:
        offs_n = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        keep = offs_n[None, :] <= (last_key - tile_n * scores.shape[1])[:, None]
        scores = gl.where(keep, scores, -float("inf"))
    return scores


@gluon.jit
def softmax_step(scores, m_i, qk_scale):
    """Probabilities of a tile, the running maximum after it, the factor for all sums before it."""
    m_next = gl.maximum(m_i, gl.max(scores, 1) * qk_scale)
    m_safe = gl.where(m_next == -float("inf"), 0.0, m_next)  # a row that has seen no key so far
    p = gl.exp2(scores * qk_scale - m_safe[:, None])
    return p, m_next, gl.exp2(m_i - m_safe)


@gluon.jit
def issue_scores(q, k_ring, slot, zeros):
    """Put Q·Kᵀ with a key tile that has landed in flight: [64, BLOCK_N]."""
    k = k_ring[0].index(slot).reshape([zeros.shape[1], q.shape[1]])
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def key_step(
    q, p, acc, l_i, m_i, buffers, it, last_key, tile_n, num_whole, qk_scale,
    CONSUMER: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """Q·Kᵀ of key tile `tile_n` and P·V of the one before, which is the `it`th of this CTA; the
    next softmax under P·V or after it.

    p [64, BLOCK_N] of the tile before, acc [64, headdim], l_i [64, 8] or [64], m_i [64].
    """
    _, k_ring, v_ring, _ = buffers
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    S_LAYOUT: gl.constexpr = m_i.type.layout.parent
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    slot = it % NUM_BUFFERS
    phase = (it // NUM_BUFFERS) & 1
    k_slot = (it + 1) % NUM_BUFFERS
    mbarrier.wait(k_ring[1].index(k_slot), ((it + 1) // NUM_BUFFERS) & 1)
    take_turn("sync", CONSUMER, cfg)
    scores = issue_scores(q, k_ring, k_slot, zeros)
    mbarrier.wait(v_ring[1].index(slot), phase)
    v = v_ring[0].index(slot).reshape([BLOCK_N, acc.shape[1]])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if cfg.overlap == "own":
        take_turn("arrive", 1 - CONSUMER, cfg)
        scores, acc = warpgroup_mma_wait(1, deps=[scores, acc])
        release(k_ring, k_slot)
    else:
        scores, acc = warpgroup_mma_wait(0, deps=[scores, acc])
        take_turn("arrive", 1 - CONSUMER, cfg)
        release(k_ring, k_slot)
        release(v_ring, slot)
    scores = mask(scores, last_key, tile_n, num_whole)
    p, m_i, alpha = softmax_step(scores, m_i, qk_scale)
    if cfg.sums_in_threads:
        alpha_parts = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))
        l_i = l_i * alpha_parts[:, None] + gl.convert_layout(thread_sums(p), l_i.type.layout)
    else:
        l_i = l_i * alpha + gl.sum(p, 1)
    if cfg.overlap == "own":
        # long complete: without the branch ptxas waits for the product before the softmax
        mbarrier.wait(v_ring[1].index(slot), phase)
        acc, p, l_i = warpgroup_mma_wait(0, deps=[acc, p, l_i])
        release(v_ring, slot)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))
    acc = acc * alpha[:, None]  # [64, headdim]
    p = gl.convert_layout(p.to(k_ring[0].dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return p, acc, l_i, m_i


@gluon.jit
def attend(
    tensors, buffers, batch, head, tile_m, i, it, qk_scale,
    CONSUMER: gl.constexpr, CAUSAL: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """One query tile, `i`th of its CTA: this consumer's 64 rows against all keys the tile sees.

    `it` key tiles have gone through the buffers before it; returns how many have after it.
    """
    q_desc, k_desc, v_desc, out_desc, lse_ptr = tensors
    q_ring, k_ring, v_ring, out_smem = buffers
    HEADDIM: gl.constexpr = q_desc.block_type.shape[3]
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    Q_BUFFERS: gl.constexpr = cfg.num_q_buffers
    S_LAYOUT: gl.constexpr = row_layout(BLOCK_N)
    O_LAYOUT: gl.constexpr = row_layout(HEADDIM)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    seqlen_q = q_desc.shape[1]
    seqlen_k = k_desc.shape[1]
    row = tile_m * BLOCK_M + CONSUMER * 64
    offs_m = row + gl.arange(0, 64, ROWS)
    last_key = gl.full([64], 0, gl.int32, ROWS) + seqlen_k - 1
    if CAUSAL:
        last_key = gl.minimum(last_key, offs_m + (seqlen_k - seqlen_q))
    num_n, num_whole = key_tiles(tile_m, seqlen_q, seqlen_k, CAUSAL, BLOCK_N)

    q_slot = CONSUMER * Q_BUFFERS + i % Q_BUFFERS
    q = q_ring[0].index(q_slot).reshape([64, HEADDIM])
    m_i = gl.full([64], -float("inf"), gl.float32, ROWS)
    acc = gl.zeros([64, HEADDIM], gl.float32, O_LAYOUT)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    mbarrier.wait(q_ring[1].index(q_slot), (i // Q_BUFFERS) & 1)
    slot = it % NUM_BUFFERS
    mbarrier.wait(k_ring[1].index(slot), (it // NUM_BUFFERS) & 1)
    scores = issue_scores(q, k_ring, slot, zeros)
    scores = warpgroup_mma_wait(0, deps=[scores])  # [64, BLOCK_N]
    release(k_ring, slot)
    scores = mask(scores, last_key, 0, num_whole)
    p, m_i, alpha = softmax_step(scores, m_i, qk_scale)
    l_i = thread_sums(p) if cfg.sums_in_threads else gl.sum(p, 1)
    p = gl.convert_layout(p.to(q_desc.dtype), P_LAYOUT)

    for tile_n in range(1, num_n):
        p, acc, l_i, m_i = key_step(
            q, p, acc, l_i, m_i, buffers, it, last_key, tile_n, num_whole, qk_scale, CONSUMER, cfg
        )
        it += 1

    release(q_ring, q_slot)
    slot = it % NUM_BUFFERS
    mbarrier.wait(v_ring[1].index(slot), (it // NUM_BUFFERS) & 1)
    v = v_ring[0].index(slot).reshape([BLOCK_N, HEADDIM])
    acc = warpgroup_mma(p, v, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    release(v_ring, slot)

    if cfg.sums_in_threads:
        l_i = gl.convert_layout(gl.sum(l_i, 1), ROWS)
    empty = l_i == 0.0  # rows that see no key
    inverse = gl.where(empty, 0.0, 1.0 / l_i)
    lse = gl.where(empty, -float("inf"), (m_i + gl.log2(l_i)) * 0.6931471805599453)
    lse_ptr += (batch * q_desc.shape[2] + head).to(gl.int64) * seqlen_q
    gl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)
    acc = acc * gl.convert_layout(inverse, OUT_ROWS)[:, None]
    out_buf = out_smem.index(CONSUMER)
    tma.store_wait(0)  # the tile before has left the buffer
    out_buf.reshape([64, HEADDIM]).store(acc.to(q_desc.dtype))
    fence_async_shared()  # the copy engine must see what the threads have written
    tma.async_copy_shared_to_global(out_desc, [batch, row, head, 0], out_buf)
    return it + 1


@gluon.jit
def consumer_partition(
    tensors, buffers, scalars, CONSUMER: gl.constexpr, CAUSAL: gl.constexpr, cfg: gl.constexpr
):
    """A warpgroup that computes."""
    qk_scale, heads_per_group = scalars
    q_desc = tensors[0]
    nheads = q_desc.shape[2]
    num_m = (q_desc.shape[1] + BLOCK_M - 1) // BLOCK_M
    num_heads = q_desc.shape[0] * nheads
    if CONSUMER == 1:
        take_turn("arrive", 0, cfg)  # the first consumer begins
    it = 0
    for i in range(list_length(num_m * num_heads)):
        batch_head, tile_m = list_entry(i, num_m, num_heads, heads_per_group)
        it = attend(
            tensors, buffers, batch_head // nheads, batch_head % nheads, tile_m, i, it, qk_scale,
            CONSUMER, CAUSAL, cfg,
        )  # fmt: skip
    tma.store_wait(0)
    if CONSUMER == 0:
        take_turn("sync", 0, cfg)  # takes the last turn given


@gluon.jit(do_not_specialize=["heads_per_group"])
def attention_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, qk_scale, heads_per_group,
    CAUSAL: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_desc.dtype
    HEADDIM: gl.constexpr = q_desc.block_type.shape[3]
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    KV: gl.constexpr = [NUM_BUFFERS, 1, cfg.BLOCK_N, 1, HEADDIM]
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    Q_SLOTS: gl.constexpr = 2 * cfg.num_q_buffers
    q_smem = gl.allocate_shared_memory(DTYPE, [Q_SLOTS, 1, 64, 1, HEADDIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, KV, k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, KV, v_desc.layout)
    out_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, HEADDIM], out_desc.layout)
    q_ready_bar = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], BAR)
    q_empty_bar = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], BAR)
    k_ready_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    k_empty_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    v_ready_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    v_empty_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    for i in gl.static_range(Q_SLOTS):
        mbarrier.init(q_ready_bar.index(i), count=1)
        mbarrier.init(q_empty_bar.index(i), count=128)  # every thread of a consumer
    for i in gl.static_range(NUM_BUFFERS):
        mbarrier.init(k_ready_bar.index(i), count=1)
        mbarrier.init(k_empty_bar.index(i), count=256)  # of both consumers
        mbarrier.init(v_ready_bar.index(i), count=1)
        mbarrier.init(v_empty_bar.index(i), count=256)
    tensors = (q_desc, k_desc, v_desc, out_desc, lse_ptr)
    q_ring = (q_smem, q_ready_bar, q_empty_bar)
    k_ring = (k_smem, k_ready_bar, k_empty_bar)
    v_ring = (v_smem, v_ready_bar, v_empty_bar)
    buffers = (q_ring, k_ring, v_ring, out_smem)
    scalars = (qk_scale, heads_per_group)
    gl.warp_specialize(
        [
            (consumer_partition, (tensors, buffers, scalars, gl.constexpr(0), CAUSAL, cfg)),
            (consumer_partition, (tensors, buffers, scalars, gl.constexpr(1), CAUSAL, cfg)),
            (producer_partition, (tensors, buffers, scalars, CAUSAL, cfg)),
        ],
        [4, 1],
        [240, 24],
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention forward; shapes and semantics as `attn_ladder.attention`, any 16-byte strides.

    Returns out (batch, seqlen_q, nheads, headdim) in the dtype of q, and the natural-log
    log-sum-exp (batch, nheads, seqlen_q) in fp32.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    config = config or CONFIGS[headdim]
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    if not scale > 0:
        raise ValueError(f"{softmax_scale=} must be positive: the maximum is taken before scaling")
    out = torch.empty((batch, seqlen_q, nheads, headdim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    num_tiles = triton.cdiv(seqlen_q, BLOCK_M.value) * nheads * batch
    num_ctas = multiprocessors(q.device.index)
    heads_per_group = group_of_heads(k, nheads, num_ctas, config.l2_bytes)
    attention_kernel[(min(num_ctas, num_tiles),)](
        descriptor(q, 64), descriptor(k, config.BLOCK_N), descriptor(v, config.BLOCK_N),
        descriptor(out, 64), lse, scale * math.log2(math.e), heads_per_group,
        CAUSAL=causal, cfg=config, num_warps=4,
    )  # fmt: skip
    return out, lse


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if capability != (9, 0):
        return f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.headdim not in CONFIGS:
        return f"supports headdim {', '.join(map(str, CONFIGS))}, not headdim={problem.headdim}"
    if problem.page_size:
        return f"reads contiguous keys and values, not page_size={problem.page_size}"
    return None
