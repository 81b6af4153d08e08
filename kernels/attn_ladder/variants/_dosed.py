"""A small fused attention kernel into which a dose of a constraint can be planted.

The result does not depend on the dose, so the green gate holds for every dose; only the witness
should move.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attn_ladder.problem import Problem

BLOCK_M = 128
BLOCK_N = 64
NUM_WARPS = 8
LOG2_E = math.log2(math.e)


@triton.jit
def empty_kernel(chain_ptr):
    """A launch and nothing else."""


@triton.jit
def dosed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, chain_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh, stride_ob, stride_om, stride_oh,
    seqlen, nheads, qk_scale,
    BRANCHING: tl.constexpr, SYNC: tl.constexpr, MEMORY: tl.constexpr,
    HEADDIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """`seqlen` must be a multiple of both tiles; not causal; as many key heads as query heads."""
    batch = (tl.program_id(1) // nheads).to(tl.int64)
    head = (tl.program_id(1) % nheads).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEADDIM)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    q = tl.load(q_ptr + offs_m[:, None] * stride_qm + offs_d[None, :])
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEADDIM], tl.float32)
    lanes = tl.arange(0, NUM_WARPS * 32)
    sink = lanes
    link = 0
    for start_n in range(0, seqlen, BLOCK_N):
        for _ in tl.static_range(MEMORY):
            link = tl.load(
                chain_ptr + link, volatile=True
            )  # each address is the value loaded before: 0
        for _ in tl.static_range(SYNC):
            tl.inline_asm_elementwise(
                "bar.sync 0; mov.b32 $0, $1;",
                "=r,r",
                [lanes],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        if BRANCHING > 0:
            # lane i of a warp goes round BRANCHING * (i % 8) times
            sink = tl.inline_asm_elementwise(
                """{ .reg .pred more; .reg .b32 n, x;
                and.b32 n, $1, 7; mul.lo.s32 n, n, $2; mov.b32 x, $3;
                again: setp.gt.s32 more, n, 0; @!more bra done;
                mad.lo.s32 x, x, 5, 1; sub.s32 n, n, 1; bra.uni again;
                done: mov.b32 $0, x; }""",
                "=r,r,r,r",
                [lanes, tl.full([NUM_WARPS * 32], BRANCHING, tl.int32), sink],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        offs_n = link + start_n + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + offs_n[:, None] * stride_kn + offs_d[None, :])
        scores = tl.dot(q, tl.trans(k)) * qk_scale  # [BLOCK_M, BLOCK_N]
        m_next = tl.maximum(m_i, tl.max(scores, 1))
        p = tl.exp2(scores - m_next[:, None])
        alpha = tl.exp2(m_i - m_next)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = tl.load(v_ptr + offs_n[:, None] * stride_vn + offs_d[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_next
    if BRANCHING > 0:
        tl.store(chain_ptr + 1 + lanes, sink)  # without it ptxas drops the loop
    out_ptrs = out_ptr + batch * stride_ob + head * stride_oh
    out_ptrs += offs_m[:, None] * stride_om + offs_d[None, :]
    tl.store(out_ptrs, (acc / l_i[:, None]).to(out_ptr.dtype.element_ty))
    lse_ptr += (batch * nheads + head) * seqlen
    tl.store(lse_ptr + offs_m, (m_i + tl.log2(l_i)) * 0.6931471805599453)


def forward_dosed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None,
    branching: int = 0,
    sync: int = 0,
    memory: int = 0,
    launches: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with planted doses: rounds of a divergent loop, CTA barriers and dependent loads
    for each key block, and launches for each call (all but the last of an empty kernel, which the
    GPU ends sooner than the host can launch the next)."""
    batch, seqlen, nheads, headdim = q.shape
    scale = headdim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.empty_like(q)
    lse = torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)
    chain = _chain(q.device)
    for _ in range(launches - 1):
        empty_kernel[(1,)](chain, num_warps=1)
    dosed_kernel[(seqlen // BLOCK_M, batch * nheads)](
        q, k, v, out, lse, chain,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        seqlen, nheads, scale * LOG2_E,
        BRANCHING=branching, SYNC=sync, MEMORY=memory,
        HEADDIM=headdim, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, NUM_WARPS=NUM_WARPS,
        num_warps=NUM_WARPS, num_stages=2,
    )  # fmt: skip
    return out, lse


def offline(branching: int = 0, sync: int = 0, memory: int = 0) -> dict:
    """`dosed_kernel` with doses, at headdim 64, for `attn_ladder.offline.report`."""
    constexprs = dict(BRANCHING=branching, SYNC=sync, MEMORY=memory, HEADDIM=64)
    constexprs |= dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, NUM_WARPS=NUM_WARPS)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= {"lse_ptr": "*fp32", "chain_ptr": "*i32", "qk_scale": "fp32"}
    signature = {n: types.get(n, "i32") for n in dosed_kernel.arg_names if n not in constexprs}
    return dict(
        kernel=dosed_kernel, signature=signature, constexprs=constexprs, num_warps=NUM_WARPS
    )


def offline_empty() -> dict:
    """`empty_kernel`, likewise."""
    return dict(kernel=empty_kernel, signature={"chain_ptr": "*i32"}, constexprs={}, num_warps=1)


_CHAINS: dict[torch.device, torch.Tensor] = {}


def _chain(device: torch.device) -> torch.Tensor:
    if device not in _CHAINS:
        _CHAINS[device] = torch.zeros(1 + NUM_WARPS * 32, dtype=torch.int32, device=device)
    return _CHAINS[device]


def unsupported_dosed(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why the dosed kernel cannot run a problem, or None."""
    if capability < (8, 0):
        return f"controls need compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    if problem.causal or problem.seqlen_q != problem.seqlen_k or problem.seqlen_q % BLOCK_M:
        return f"controls are not causal and need seqlen_q = seqlen_k, a multiple of {BLOCK_M}"
    if problem.nheads != problem.nheads_k or problem.headdim not in (64, 128):
        return "controls need nheads = nheads_k and headdim 64 or 128"
    return None
