"""One backend of PyTorch's scaled_dot_product_attention as a subject."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn_ladder.problem import Problem

ENABLED = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}


def selected(backend: SDPBackend) -> Callable[[], AbstractContextManager]:
    """Makes contexts in which SDPA has this backend alone."""
    return lambda: sdpa_kernel(backend)


def forward_with(backend: SDPBackend) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        config: None = None,
    ) -> tuple[torch.Tensor, None]:
        """SDPA with this backend alone, on transposed views; it exposes no log-sum-exp.

        The backend is selected for the call, which takes longer than the call itself, unless a
        caller that counts host time has selected it before (`session`).
        """
        for other, enabled in ENABLED.items():
            if enabled() != (other is backend):
                with sdpa_kernel(backend):
                    return forward(q, k, v, softmax_scale=softmax_scale, causal=causal)
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=causal,
            scale=softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None

    return forward


def unsupported_by(name: str) -> Callable[[Problem, tuple[int, int]], str | None]:
    def unsupported(problem: Problem, capability: tuple[int, int]) -> str | None:
        """Why this peer cannot run a problem on a GPU of that compute capability, or None."""
        if capability < (8, 0):
            major, minor = capability
            return f"{name} needs compute capability 8.0; this GPU has {major}.{minor}"
        if problem.causal and problem.seqlen_q != problem.seqlen_k:
            return "SDPA aligns a causal mask top-left; the problem needs bottom-right"
        return None

    return unsupported
