"""Hugging Face transformers on these kernels: `attn_implementation="attn_ladder"`.

    from attn_ladder.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn_ladder")

transformers asks one function for a mask, once a forward pass, and another for attention, in every
layer. Here the mask is no matrix but, for each sequence, three numbers (a *key range*):

    first key, end of the keys, position of the first query      int32 (batch, 1, 1, 3)

Query i sees key j if first <= j < end and j <= position + i. That expresses causal and full
attention, padding on either side, and the empty slots of a `StaticCache`. What it cannot express
(holes, packed or windowed or custom masks) is refused; under `torch.compile`, where values cannot
be read, a mask with holes gives NaN and sets the error flag of `attn_ladder.decode`. A prefill
without padding has no mask at all and runs `attn_ladder.attention`.

RoPE is the model's; key heads stay unexpanded. `BoundedCache` is a cache of fixed capacity that
appends in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import logging

from attn_ladder import serving
from attn_ladder.decode import EVERY_KEY

NAME = "attn_ladder"
REFUSED = ("softcap", "s_aux", "position_bias", "sliding_window", "head_mask", "cache")
logger = logging.get_logger(__name__)


def register() -> None:
    """Make `attn_implementation="attn_ladder"` known to transformers. Repeating it is harmless."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, key_range)


def _may_read(device: torch.device) -> bool:
    """Whether values on a device may be read by the host here."""
    if torch.compiler.is_compiling():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def key_range(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: the key range of each sequence, int32 (batch, 1, 1, 3).

    Args:
        q_offset: position of the first query among the keys.
        attention_mask: bool (batch, keys so far), False at padding, or None.

    Returns: None for plain causal attention of as many queries as keys.

    Raises: `NotImplementedError` for a mask that no range of keys expresses.
    """
    causal = mask_function is causal_mask_function
    if not causal and mask_function is not bidirectional_mask_function:
        raise NotImplementedError(
            f"{mask_function=}: attn_ladder has causal and full masks with padding; "
            "load the model with attn_implementation='sdpa' for this one"
        )
    if use_vmap or local_size is not None or kv_offset != 0:
        raise NotImplementedError(
            f"{use_vmap=} {local_size=} {kv_offset=}: attn_ladder has no custom or windowed masks; "
            "load the model with attn_implementation='sdpa'"
        )
    device = torch.device(device)
    plain = causal and q_length == kv_length and isinstance(q_offset, int) and q_offset == 0
    if attention_mask is None:
        if plain:
            return None
        first = torch.zeros(batch_size, dtype=torch.int32, device=device)
        end = first + kv_length
    else:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
            raise NotImplementedError(
                f"attention_mask.shape={tuple(attention_mask.shape)} must be ({batch_size}, keys)"
            )
        kept = attention_mask[:, :kv_length].to(device=device, dtype=torch.int32)
        count = kept.sum(1)
        first = kept.argmax(1)  # of equal values the first
        end = first + count
        places = torch.arange(kept.shape[1], device=device)
        inside = (places >= first[:, None]) & (places < end[:, None])
        whole = (kept * inside).sum(1) == count
        if _may_read(device):
            padded = (count < kv_length).any()
            has_holes, has_padding = torch.stack([(~whole).any(), padded]).tolist()
            if has_holes:
                raise NotImplementedError(
                    "attention_mask has padding between tokens, which attn_ladder does not "
                    "support; pad on one side, or use attn_implementation='sdpa'"
                )
            if plain and not has_padding:
                return None
        first = torch.where(whole, first, -1)
    if causal:
        end = torch.clamp(end, max=q_offset + q_length)  # later slots are empty
        position = torch.zeros_like(first) + q_offset
    else:
        position = torch.full_like(first, EVERY_KEY)
    end = torch.maximum(end, first)
    return torch.stack([first, end, position], 1).to(torch.int32).view(batch_size, 1, 1, 3)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: (batch, nheads, seqlen_q, headdim).
        key, value: (batch, nheads_k, seqlen_k, headdim), everything cached.
        attention_mask: what `key_range` returned.

    Returns: out (batch, seqlen_q, nheads, headdim), and None for the probabilities.

    Raises: `NotImplementedError` for options and masks that are not supported, and for inputs that
        require grad; `ValueError` for a device that the kernels do not run on.
    """
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}={kwargs[name]!r} is not supported by attn_ladder")
    if dropout or kwargs.get("output_attentions"):
        raise NotImplementedError(
            f"{dropout=} output_attentions={kwargs.get('output_attentions')}: attn_ladder has "
            "neither; use attn_implementation='eager'"
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    serving.check_tensors(q, {"k": k, "v": v}, 4)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and q.shape[1] != k.shape[1]:
            raise NotImplementedError(
                f"attention_mask=None with {q.shape[1]} queries and {k.shape[1]} keys: attn_ladder "
                "cannot know which keys they see"
            )
        return torch.ops.attn_ladder.dense(q, k, v, causal, scaling)[0], None
    batch = q.shape[0]
    if attention_mask.dtype != torch.int32 or attention_mask.shape != (batch, 1, 1, 3):
        raise NotImplementedError(
            f"attention_mask of shape {tuple(attention_mask.shape)} and {attention_mask.dtype} is "
            "not supported by attn_ladder; give a mask (batch, keys), or use "
            "attn_implementation='sdpa'"
        )
    bounds = attention_mask.view(batch, 3)
    return torch.ops.attn_ladder.ranged(q, k, v, bounds, scaling)[0], None


class BoundedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of `max_cache_len` tokens, appended in place.

    Past the limit the buffers are given up: the layer says so once and grows by concatenation, as
    transformers' `DynamicLayer` does, so the tokens stay right.
    """

    def __init__(self, max_cache_len: int, **_: Any) -> None:
        super().__init__()
        if max_cache_len < 1:
            raise ValueError(f"{max_cache_len=} must be at least 1")
        self.max_cache_len = max_cache_len
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def _reserve(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, nheads_k, _, headdim = like.shape
        # tokens before heads, so that a token's heads lie side by side
        shape = (batch, self.max_cache_len, nheads_k, headdim)
        return like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, nheads_k, new tokens, headdim); returns all keys and values so far."""
        held = self.get_seq_length()
        total = held + key_states.shape[2]
        if total > self.max_cache_len:
            logger.warning_once(
                f"attn_ladder: the cache limit of {self.max_cache_len} tokens is reached; "
                "later tokens are kept by concatenation, which is slower"
            )
            self.buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self.buffers is None or (
            held and self.keys.data_ptr() != self.buffers[0].data_ptr()
        ):  # first use, or the batch was reordered
            self.buffers = self._reserve(key_states)
            if held:
                for buffer, kept in zip(self.buffers, (self.keys, self.values), strict=True):
                    buffer[:, :, :held] = kept
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, held:total] = new
        self.keys, self.values = (buffer[:, :, :total] for buffer in self.buffers)
        return self.keys, self.values

    def reset(self) -> None:
        self.buffers = None
        super().reset()


class BoundedCache(Cache):
    """A KV cache of `max_cache_len` tokens for each layer of a model's config."""

    def __init__(self, config: Any, max_cache_len: int) -> None:
        layers = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(layers=[BoundedLayer(max_cache_len) for _ in range(layers)])
