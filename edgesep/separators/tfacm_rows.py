"""TFACM for whole mixtures on rows of channels: the same weights and sums with hardly a transposition.

The authors' maps have channels first, as convolutions want them; but most of TFACM is LSTMs, norms over channels and
products with matrices, which want them last. Blocks become those of the streaming graph, over all frames at once.

Shapes: B batch, L frames, F bins, C channels, H hidden, h heads, e features of a head; maps are ``(B, L, F, C)``, and
never ``(B·L·F, C)``: OpenVINO takes a norm's gain for a scale of its INT8 pass, which it cannot carry through a reshape
that makes three axes of one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgesep.separators.segments import State, overlap_add, segments_of
from edgesep.separators.tfacm import Block, attended
from edgesep.separators.tfacm_stream import RowBlock


class WholeBlock(RowBlock):
    """A causal block for maps ``(B, C, L, F)`` of any length."""

    def __init__(self, block: Block, bins: int):
        super().__init__(block, bins)
        self.inter_rnn = block.inter_rnn
        self.past = block.context
        self.register_buffer("taken", overlapping(bins - block.ks + 1, block.ks))
        self.register_buffer("spread", overlapping(bins, block.ks))  # the windows that reach a bin

    taken: Tensor
    spread: Tensor

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        x = x.permute(0, 2, 3, 1)
        x = self.along_bins(x)
        x, state = self.along_frames(x, state)
        return self.gate(self.look_back(x)).permute(0, 3, 1, 2), state

    def along_bins(self, x: Tensor) -> Tensor:
        """LSTM from low to high bins, each frame on its own."""
        y = self.intra_norm(x).flatten(0, 1).index_select(1, self.taken)
        y, _ = self.intra_rnn(y.unflatten(1, (-1, self.taps)).flatten(2))
        y = F.pad(y, (0, 0, self.taps - 1, self.taps - 1)).index_select(1, self.spread)
        y = self.intra_linear(y.unflatten(1, (self.bins, self.taps)).flatten(2))
        return y.unflatten(0, x.shape[:2]) + x

    def along_frames(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """LSTM within segments of frames, each bin on its own."""
        batch, frames = x.shape[:2]
        y = self.inter_norm(x).transpose(0, 1).flatten(1, 2)
        y, state = self.inter_rnn(segments_of(y), state)
        y = F.pad(overlap_add(y, frames), (0, 0, 0, 0, self.taps - 1, 0))
        y = self.inter_linear(torch.cat([y[k : k + frames] for k in range(self.taps)], -1))
        return y.unflatten(1, (batch, self.bins)).transpose(0, 1) + x, state

    def look_back(self, x: Tensor) -> Tensor:
        """Attention over the past, of at most ``context`` frames (its own included)."""
        heads = self.heads
        qkv = self.attn_conv(x)
        features = 2 * heads * self.qk_norm.gamma.shape[-1] // self.bins
        qk = self.qk_norm(of_heads(qkv[..., :features], 2 * heads))
        v = self.v_norm(of_heads(qkv[..., features:], heads))
        y = attended(qk[:, :heads], qk[:, heads:], v, self.past)
        y = y.unflatten(3, (self.bins, -1)).permute(0, 2, 3, 1, 4).flatten(3)
        y = self.attn_concat_proj(y).flatten(2)[:, None]
        return self.concat_norm(y)[:, 0].unflatten(2, (self.bins, -1)) + x


def of_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, L, F, heads·e)`` → ``(B, heads, L, F·e)``."""
    return x.unflatten(3, (heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)


def overlapping(count: int, size: int) -> Tensor:
    """Indices of ``count`` windows, each one element behind the last, in a row."""
    return (torch.arange(count)[:, None] + torch.arange(size)).flatten()
