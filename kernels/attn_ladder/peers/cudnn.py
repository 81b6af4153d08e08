"""cuDNN attention through PyTorch SDPA."""

from torch.nn.attention import SDPBackend

from attn_ladder.peers._sdpa import forward_with, selected, unsupported_by
from attn_ladder.stage import Peer

PEER = Peer(title="cuDNN attention through PyTorch SDPA", distribution="nvidia-cudnn-cu13")

session = selected(SDPBackend.CUDNN_ATTENTION)
forward = forward_with(SDPBackend.CUDNN_ATTENTION)
unsupported = unsupported_by("cuDNN")
