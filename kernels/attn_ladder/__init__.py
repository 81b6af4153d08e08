"""Attention forward for the H100, as a ladder of five kernels.

    from attn_ladder import attention, explain

    out = attention(q, k, v, causal=True)   # (batch, seqlen, nheads, headdim), fp16 or bf16, CUDA
    print(explain(q, k, v, causal=True))    # which kernel that runs, with what copies

`attention_with_kvcache` decodes over a KV cache, `attention_varlen` takes ragged sequences, and
`attn_ladder.integrations.transformers.register()` serves Hugging Face models with them.

Importing the package loads neither torch nor triton; the first use of a name does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_ladder.dispatch import attention, explain
    from attn_ladder.serving import attention_varlen, attention_with_kvcache

__all__ = ["attention", "attention_varlen", "attention_with_kvcache", "explain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "dispatch" if name in ("attention", "explain") else "serving"
    globals()[name] = getattr(import_module(f"attn_ladder.{module}"), name)
    return globals()[name]
