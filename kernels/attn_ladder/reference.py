"""What is right: attention in fp32, and the error that low-precision PyTorch makes on the same
inputs.

The acceptance rule is that of FlashAttention-3's own test suite (Shah et al., 2024;
`hopper/test_flash_attn.py`): a kernel may err at most twice as much as PyTorch does when it
computes in the input's precision, plus a rounding term.
"""

from __future__ import annotations

import math

import torch


def visible(seqlen_q: int, seqlen_k: int, causal: bool, device: torch.device | str) -> torch.Tensor:
    """Mask (seqlen_q, seqlen_k), True where a query sees a key; causal aligns bottom-right.

    seqlen_q=2, seqlen_k=4:  1 1 1 0      seqlen_q=4, seqlen_k=2:  0 0
                             1 1 1 1                               0 0
                                                                   1 0
                                                                   1 1
    """
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return mask.tril(seqlen_k - seqlen_q) if causal else mask


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    upcast: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by definition, materialising the scores.

    Args:
        q: (batch, seqlen_q, nheads, headdim).
        k, v: (batch, seqlen_k, nheads_k, headdim), nheads % nheads_k == 0.
        upcast: compute in fp32; otherwise in the dtype of the inputs, scaling K instead of Q, as
        FA3's tests do.

    Returns: out (batch, seqlen_q, nheads, headdim), fp32 if `upcast` else the dtype of q, and the
        natural-log log-sum-exp (batch, nheads, seqlen_q) in fp32. A row that sees no key gives 0
        and -inf.
    """
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1])
    group = q.shape[2] // k.shape[2]
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    if upcast:
        scores = torch.einsum("bqhd,bkhd->bhqk", q * softmax_scale, k)
    else:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k * softmax_scale)
    mask = visible(q.shape[1], k.shape[1], causal, q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores.float(), dim=-1)
    empty = ~mask.any(dim=-1)
    p = torch.softmax(scores, dim=-1).masked_fill(empty[:, None], 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), v), lse


def rounding_term(reference: torch.Tensor) -> float:
    """FA3's absolute allowance: what adding and subtracting 0.3 costs at the reference's
    magnitude."""
    return 2.0 * (reference + 0.3 - 0.3 - reference).abs().max().item()


def error_bound(reference: torch.Tensor, low_precision: torch.Tensor) -> tuple[float, float]:
    """(largest admissible error, error of low-precision PyTorch) against an fp32 `reference`.

    The rounding term is taken in the dtype of `low_precision`, as in FA3's tests.
    """
    own = (low_precision.float() - reference).abs().max().item()
    return 2.0 * own + rounding_term(reference.to(low_precision.dtype)), own
