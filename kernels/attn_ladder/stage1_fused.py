"""Stage 1: the fused architecture, in plain Triton.

Attention without the score matrix in memory (Dao et al., 2022): a CTA owns BLOCK_M query rows,
streams over the keys BLOCK_N at a time, and keeps the running maximum m_i, the running sum l_i and
the accumulator acc of the online softmax in registers (Milakov and Gimelshein, 2018). Nothing else
is done: the compiler pipelines the loads, all warps of the CTA move through the loop in step, one
CTA is launched for each query tile.

This is the baseline of the ladder, so it removes no constraint. It runs wherever Triton runs (sm_80
and later, and the interpreter on a CPU), and is what `attn_ladder.attention` falls back to where
there is no sm_90.

What limits it: the whole CTA waits at a barrier for every shared-memory tile, so the tensor pipe
idles while the softmax runs. The `barrier` share of the stall samples and `tensor pipe active` are
the witnesses; stage 2 attacks the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attn_ladder.problem import Problem
from attn_ladder.stage import Stage

STAGE = Stage(title="Fused attention in plain Triton", removes=None)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """Tile of one CTA: BLOCK_M query rows × BLOCK_N keys, `num_warps` warps, `num_stages` of
    Triton's pipeliner."""

    BLOCK_M: int = 128
    BLOCK_N: int = 64
    num_warps: int = 8
    num_stages: int = 2

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two and at least 16")


CONFIGS = {
    64: Config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
    128: Config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
    256: Config(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
}


@triton.jit
def load_tile(
    base_ptr,
    offs_row,
    stride_row,
    seqlen,
    HEADDIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows of Q, K or V, zero beyond the sequence where MASKED: [len(offs_row), BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = base_ptr + offs_row[:, None].to(tl.int64) * stride_row + offs_d[None, :]
    if BLOCK_D != HEADDIM:
        return tl.load(
            ptrs, mask=(offs_row[:, None] < seqlen) & (offs_d[None, :] < HEADDIM), other=0.0
        )
    if MASKED:
        return tl.load(ptrs, mask=offs_row[:, None] < seqlen, other=0.0)
    return tl.load(ptrs)


@triton.jit
def key_block(
    acc, m_i, l_i, q, k_ptr, v_ptr, start_n, offs_m,
    stride_kn, stride_vn, seqlen_q, seqlen_k, qk_scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, offs_n, stride_kn, seqlen_k, HEADDIM, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N]
    if MASKED:
        keep = offs_n[None, :] < seqlen_k
        if CAUSAL:
            keep = keep & (offs_n[None, :] <= offs_m[:, None] + (seqlen_k - seqlen_q))
        scores = tl.where(keep, scores, float("-inf"))
    m_next = tl.maximum(m_i, tl.max(scores, 1))
    m_safe = m_next
    if MASKED:
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)  # a row without a key so far
    p = tl.exp2(scores - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    v = load_tile(v_ptr, offs_n, stride_vn, seqlen_k, HEADDIM, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, m_next, l_i


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_om, stride_oh,
    seqlen_q, seqlen_k, nheads, group, qk_scale,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEADDIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_m = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest causal tile first
    batch = (tl.program_id(1) // nheads).to(tl.int64)
    head = (tl.program_id(1) % nheads).to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + (head // group) * stride_kh
    v_ptr += batch * stride_vb + (head // group) * stride_vh
    out_ptr += batch * stride_ob + head * stride_oh
    lse_ptr += tl.program_id(1).to(tl.int64) * seqlen_q

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, offs_m, stride_qm, seqlen_q, HEADDIM, BLOCK_D, True)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    end = seqlen_k
    interior = seqlen_k // BLOCK_N * BLOCK_N
    if CAUSAL:
        offset = seqlen_k - seqlen_q
        end = tl.minimum(seqlen_k, tl.maximum(0, (tile_m + 1) * BLOCK_M + offset))
        # every row of the tile sees the keys up to and including tile_m * BLOCK_M + offset
        interior = tl.minimum(
            interior, tl.maximum(0, tile_m * BLOCK_M + offset + 1) // BLOCK_N * BLOCK_N
        )
    for start_n in range(0, interior, BLOCK_N):
        acc, m_i, l_i = key_block(
            acc, m_i, l_i, q, k_ptr, v_ptr, start_n, offs_m,
            stride_kn, stride_vn, seqlen_q, seqlen_k, qk_scale,
            CAUSAL, False, BLOCK_N, HEADDIM, BLOCK_D,
        )  # fmt: skip
    for start_n in range(interior, end, BLOCK_N):
        acc, m_i, l_i = key_block(
            acc, m_i, l_i, q, k_ptr, v_ptr, start_n, offs_m,
            stride_kn, stride_vn, seqlen_q, seqlen_k, qk_scale,
            CAUSAL, True, BLOCK_N, HEADDIM, BLOCK_D,
        )  # fmt: skip

    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = tl.where(
        empty, float("-inf"), (m_i + tl.log2(tl.where(empty, 1.0, l_i))) * 0.6931471805599453
    )
    offs_d = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_d[None, :]
    inside = offs_m < seqlen_q
    tl.store(
        out_ptrs,
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (offs_d[None, :] < HEADDIM),
    )
    tl.store(lse_ptr + offs_m, lse, mask=inside)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention forward; shapes and semantics as `attn_ladder.attention`, the last dimension
    contiguous.

    Returns out (batch, seqlen_q, nheads, headdim) in the dtype of q, and the natural-log
    log-sum-exp (batch, nheads, seqlen_q) in fp32.
    """
    batch, seqlen_q, nheads, headdim = q.shape
    seqlen_k, nheads_k = k.shape[1], k.shape[2]
    block_d = triton.next_power_of_2(max(headdim, 16))
    if config is None:
        config = CONFIGS[64 if block_d <= 64 else 128 if block_d <= 128 else 256]
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.empty((batch, seqlen_q, nheads, headdim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    attention_kernel[(triton.cdiv(seqlen_q, config.BLOCK_M), batch * nheads)](
        q, k, v, out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        seqlen_q, seqlen_k, nheads, nheads // nheads_k, scale * LOG2_E,
        CAUSAL=causal, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
        HEADDIM=headdim, BLOCK_D=block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why this kernel cannot run a problem on a GPU of that compute capability, or None."""
    if capability < (8, 0):
        return f"stage1 needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.headdim > 256:
        return f"stage1 supports headdim up to 256; the problem has headdim={problem.headdim}"
    return None
