"""Attention forward for the H100, as a ladder of five kernels.

    from attn_ladder import attention, explain

    out = attention(q, k, v, causal=True)   # (batch, seqlen, nheads, headdim), fp16 or bf16, CUDA
    print(explain(q, k, v, causal=True))    # which kernel that runs, with what copies

Importing the package loads neither torch nor triton; the first use of either function does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_ladder.dispatch import attention, explain

__all__ = ["attention", "explain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from attn_ladder import dispatch

    globals()[name] = getattr(dispatch, name)
    return globals()[name]
