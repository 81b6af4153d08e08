"""Stage 3: a persistent grid that strides over the tiles of all batches and heads.

Stage 2 launches one CTA for each query tile. Each sets up its barriers and shared memory before
its first load, and how well the last wave of CTAs fills the GPU is left to chance; at seqlen 512 a
tile is only a few microseconds of work.

Here as many CTAs are launched as the GPU holds, once, and each walks a list of query tiles that
follows from its number alone, so that nothing is fetched or counted at run time. The order of the
list replaces the hardware's scheduler: it runs from the longest causal tile to the shortest and is
dealt out back and forth (each other round in reverse), which gives every CTA nearly the same
number of key tiles, and heads are taken in groups whose keys and values fit in L2 and whose number
divides that of the CTAs.

What should move: CTAs launched per call, from the number of query tiles to 264 (132 at headdim
128); idle SM cycles, to below 3 %; GPU time at seqlen 512 by 10 to 20 %, at 2048 by less than 5 %.
The plan promises a sixfold gain per sequence from batch 1 to 32, most of which is the GPU being
filled.

What limits it: the warps that compute also load, so the loads of a tile begin only when the tile
before has been stored, and a fast warpgroup waits for a slow one; stage 4 attacks that.
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

STAGE = Stage(title="Persistent grid over all batches and heads", removes="launch")
BLOCK_M = gl.constexpr(128)  # two warpgroups of 64 query rows


@dataclass(frozen=True)
class Config:
    """Two warpgroups of 64 query rows × BLOCK_N keys; `num_buffers` tiles of K and V are kept.

    A thread may hold `num_registers`: 128 lets two CTAs share an SM, 240 is for one.
    `l2_bytes` is what the keys and values of a group of heads may take of the L2 cache.
    """

    BLOCK_N: int = 64
    num_buffers: int = 2
    num_registers: int = 128
    l2_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        if self.BLOCK_N not in (64, 128):
            raise ValueError(f"BLOCK_N={self.BLOCK_N} must be 64 or 128")
        if self.num_buffers < 2:
            raise ValueError(f"num_buffers={self.num_buffers} must be at least 2")
        if self.num_registers not in (128, 240):
            raise ValueError(f"num_registers={self.num_registers} must be 128 or 240")


CONFIGS = {
    64: Config(BLOCK_N=64, num_registers=128),
    128: Config(BLOCK_N=128, num_registers=240),
    256: Config(BLOCK_N=64, num_registers=240),
}


@gluon.jit
def key_tiles(tile_m, seqlen_q, seqlen_k, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """(key tiles of which a query tile sees anything, how many of them all its rows see whole)."""
    end = seqlen_k
    whole = seqlen_k
    if CAUSAL:
        first_row_end = tile_m * BLOCK_M + seqlen_k - seqlen_q + 1
        end = min(end, max(0, first_row_end + BLOCK_M - 1))
        whole = min(whole, max(0, first_row_end))
    return (end + BLOCK_N - 1) // BLOCK_N, whole // BLOCK_N


@gluon.jit
def load_kv(tensors, buffers, batch, head, tile_n, num_n, it, cfg: gl.constexpr):
    """Start the copy of a tile of keys and values once both warpgroups have left its buffers."""
    q_desc, k_desc, v_desc, out_desc, lse_ptr = tensors
    q_smem, k_smem, v_smem, q_ready_bar, k_ready_bar, v_ready_bar, kv_empty_bar = buffers
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    slot = it % NUM_BUFFERS
    phase = (it // NUM_BUFFERS) & 1
    pred = tile_n < num_n
    coord = [batch, tile_n * BLOCK_N, head // (q_desc.shape[2] // k_desc.shape[2]), 0]
    k_bar = k_ready_bar.index(slot)
    v_bar = v_ready_bar.index(slot)
    mbarrier.wait(kv_empty_bar.index(slot), phase ^ 1, pred=pred)
    mbarrier.expect(k_bar, k_desc.block_type.nbytes, pred=pred)
    mbarrier.expect(v_bar, v_desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(k_desc, coord, k_bar, k_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(v_desc, coord, v_bar, v_smem.index(slot), pred=pred)


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
def attend(
    tensors, buffers, batch, head, tile_m, i, it, qk_scale,
    WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """One query tile, `i`th of its CTA: this warpgroup's 64 rows against all keys the tile sees.

    `it` key tiles have gone through the buffers before it; returns how many have after it.
    """
    q_desc, k_desc, v_desc, out_desc, lse_ptr = tensors
    q_smem, k_smem, v_smem, q_ready_bar, k_ready_bar, v_ready_bar, kv_empty_bar = buffers
    HEADDIM: gl.constexpr = q_desc.block_type.shape[3]
    BLOCK_N: gl.constexpr = cfg.BLOCK_N
    NUM_BUFFERS: gl.constexpr = cfg.num_buffers
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADDIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    seqlen_q = q_desc.shape[1]
    seqlen_k = k_desc.shape[1]
    row = tile_m * BLOCK_M + WARPGROUP * 64
    offs_m = row + gl.arange(0, 64, ROWS)
    last_key = gl.full([64], 0, gl.int32, ROWS) + seqlen_k - 1
    if CAUSAL:
        last_key = gl.minimum(last_key, offs_m + (seqlen_k - seqlen_q))
    num_n, num_whole = key_tiles(tile_m, seqlen_q, seqlen_k, CAUSAL, BLOCK_N)

    q_bar = q_ready_bar.index(WARPGROUP)
    q_buf = q_smem.index(WARPGROUP)
    q = q_buf.reshape([64, HEADDIM])
    mbarrier.expect(q_bar, q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [batch, row, head, 0], q_bar, q_buf)
    if WARPGROUP == 0:
        load_kv(tensors, buffers, batch, head, 0, num_n, it, cfg)
    m_i = gl.full([64], -float("inf"), gl.float32, ROWS)
    l_i = gl.full([64], 0.0, gl.float32, ROWS)
    acc = gl.zeros([64, HEADDIM], gl.float32, O_LAYOUT)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, S_LAYOUT)
    mbarrier.wait(q_bar, i & 1)

    for tile_n in range(num_n):
        slot = it % NUM_BUFFERS
        phase = (it // NUM_BUFFERS) & 1
        mbarrier.wait(k_ready_bar.index(slot), phase)
        k = k_smem.index(slot).reshape([BLOCK_N, HEADDIM])
        scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])  # [64, BLOCK_N]
        if WARPGROUP == 0:
            load_kv(tensors, buffers, batch, head, tile_n + 1, num_n, it + 1, cfg)
        scores = mask(scores, last_key, tile_n, num_whole)
        p, m_i, alpha = softmax_step(scores, m_i, qk_scale)
        l_i = l_i * alpha + gl.sum(p, 1)
        acc = acc * gl.convert_layout(alpha, OUT_ROWS)[:, None]  # [64, headdim]
        p = gl.convert_layout(p.to(q_desc.dtype), P_LAYOUT)
        mbarrier.wait(v_ready_bar.index(slot), phase)
        v = v_smem.index(slot).reshape([BLOCK_N, HEADDIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(kv_empty_bar.index(slot), count=1)
        it += 1

    empty = l_i == 0.0  # rows that see no key
    inverse = gl.where(empty, 0.0, 1.0 / l_i)
    lse = gl.where(empty, -float("inf"), (m_i + gl.log2(l_i)) * 0.6931471805599453)
    lse_ptr += (batch * q_desc.shape[2] + head).to(gl.int64) * seqlen_q
    gl.store(lse_ptr + offs_m, lse, mask=offs_m < seqlen_q)
    acc = acc * gl.convert_layout(inverse, OUT_ROWS)[:, None]
    q.store(acc.to(q_desc.dtype))
    fence_async_shared()  # the copy engine must see what the threads have written
    tma.async_copy_shared_to_global(out_desc, [batch, row, head, 0], q_buf)
    tma.store_wait(0)  # Q's buffer may be filled again
    return it


@gluon.jit
def warpgroup_partition(
    tensors, buffers, scalars,
    WARPGROUP: gl.constexpr, CAUSAL: gl.constexpr, cfg: gl.constexpr,
):  # fmt: skip
    """What one warpgroup does; the first also issues the loads of keys and values."""
    qk_scale, heads_per_group = scalars
    q_desc = tensors[0]
    nheads = q_desc.shape[2]
    num_m = (q_desc.shape[1] + BLOCK_M - 1) // BLOCK_M
    num_heads = q_desc.shape[0] * nheads
    it = 0
    for i in range(list_length(num_m * num_heads)):
        batch_head, tile_m = list_entry(i, num_m, num_heads, heads_per_group)
        it = attend(
            tensors, buffers, batch_head // nheads, batch_head % nheads, tile_m, i, it, qk_scale,
            WARPGROUP, CAUSAL, cfg,
        )  # fmt: skip


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
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    q_smem = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, HEADDIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, KV, k_desc.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, KV, v_desc.layout)
    q_ready_bar = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    k_ready_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    v_ready_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    kv_empty_bar = gl.allocate_shared_memory(gl.int64, [NUM_BUFFERS, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(q_ready_bar.index(i), count=1)
    for i in gl.static_range(NUM_BUFFERS):
        mbarrier.init(k_ready_bar.index(i), count=1)
        mbarrier.init(v_ready_bar.index(i), count=1)
        mbarrier.init(kv_empty_bar.index(i), count=2)  # both warpgroups
    tensors = (q_desc, k_desc, v_desc, out_desc, lse_ptr)
    buffers = (q_smem, k_smem, v_smem, q_ready_bar, k_ready_bar, v_ready_bar, kv_empty_bar)
    scalars = (qk_scale, heads_per_group)
    gl.warp_specialize(
        [
            (warpgroup_partition, (tensors, buffers, scalars, FIRST, CAUSAL, cfg)),
            (warpgroup_partition, (tensors, buffers, scalars, SECOND, CAUSAL, cfg)),
        ],
        [4],
        [cfg.num_registers],
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
    num_ctas = multiprocessors(q.device.index) * (256 // config.num_registers)
    heads_per_group = group_of_heads(k, nheads, num_ctas, config.l2_bytes)
    attention_kernel[(min(num_ctas, num_tiles),)](
        descriptor(q, 64), descriptor(k, config.BLOCK_N), descriptor(v, config.BLOCK_N),
        descriptor(out, 64), lse, scale * math.log2(math.e), heads_per_group,
        CAUSAL=causal, cfg=config, num_warps=4, maxnreg=config.num_registers,
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
