"""FlashAttention-2 through PyTorch SDPA."""

from torch.nn.attention import SDPBackend

from attn_ladder.peers._sdpa import forward_with, selected, unsupported_by
from attn_ladder.stage import Peer

PEER = Peer(title="FlashAttention-2 through PyTorch SDPA", distribution="torch")

session = selected(SDPBackend.FLASH_ATTENTION)
forward = forward_with(SDPBackend.FLASH_ATTENTION)
unsupported = unsupported_by("FA2")
