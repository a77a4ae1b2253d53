"""TFACM for whole mixtures on rows of channels: the same weights and sums with hardly a transposition.

The authors' maps have channels first, as convolutions want them; but most of TFACM is LSTMs, norms over channels and
products with matrices, which want them last. Blocks become those of the streaming graph, over all frames at once.

Shapes: B batch, L frames, F bins, C channels, H hidden, h heads, e features of a head; maps are ``(B·L·F, C)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgesep.separators.segments import State, overlap_add, segments_of
from edgesep.separators.tfacm import Block
from edgesep.separators.tfacm_stream import RowBlock


class WholeBlock(RowBlock):
    """A causal block for maps ``(B, C, L, F)`` of any length."""

    def __init__(self, block: Block, bins: int):
        super().__init__(block, bins)
        self.inter_rnn = block.inter_rnn
        self.past = block.context

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        batch, _, frames, _ = x.shape
        rows = self.over_bins(x.permute(0, 2, 3, 1).flatten(0, 2))
        rows, state = self.along_frames(rows, state, batch, frames)
        rows = self.gate(self.look_back(rows, batch, frames))
        return rows.view(batch, frames, self.bins, self.channels).permute(0, 3, 1, 2), state

    def along_frames(self, x: Tensor, state: State | None, batch: int, frames: int) -> tuple[Tensor, State]:
        """LSTM within segments of frames, each bin on its own."""
        y = self.inter_norm(x).view(batch, frames, self.bins, self.channels).transpose(0, 1).flatten(1, 2)
        y, state = self.inter_rnn(segments_of(y), state)
        y = F.pad(overlap_add(y, frames), (0, 0, 0, 0, self.taps - 1, 0))
        y = torch.cat([y[k : k + frames] for k in range(self.taps)], -1)
        y = self.inter_linear(y).view(frames, batch, self.bins, self.channels).transpose(0, 1)
        return y.flatten(0, 2) + x, state

    def look_back(self, x: Tensor, batch: int, frames: int) -> Tensor:
        """Attention over the past, of at most ``context`` frames (its own included)."""
        heads = self.heads
        qkv = self.attn_conv(x)
        features = 2 * heads * self.qk_norm.gamma.shape[-1] // self.bins
        qk = self.qk_norm(self.of_heads(qkv[:, :features], 2 * heads, batch, frames))
        v = self.v_norm(self.of_heads(qkv[:, features:], heads, batch, frames))
        at = torch.arange(frames, device=x.device)
        hidden = at[None, :] > at[:, None]
        if self.past is not None:
            hidden = hidden | (at[None, :] <= at[:, None] - self.past)
        score = (qk[:, :heads] @ qk[:, heads:].transpose(2, 3)).masked_fill(hidden, float("-inf"))
        y = torch.softmax(score, -1) @ v
        y = y.view(batch, heads, frames, self.bins, -1).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2)
        y = self.attn_concat_proj(y).view(batch, 1, frames, -1)
        return self.concat_norm(y).view(-1, self.channels) + x

    def of_heads(self, x: Tensor, heads: int, batch: int, frames: int) -> Tensor:
        """``(B·L·F, heads·e)`` → ``(B, heads, L, F·e)``."""
        return x.view(batch, frames, self.bins, heads, -1).permute(0, 3, 1, 2, 4).flatten(3)
