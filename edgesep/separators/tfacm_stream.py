"""TFACM as a streaming graph: the same weights and sums, lowered for a few frames at a time.

A runtime spends about a microsecond on each operator, and a hop is too little work to hide that. So the graph has few:
maps are rows of channels, where 1x1 convolutions are matrix products and norms need no transposition; the projections
of all heads are one product; a gate path's three linear steps are one; convolutions that look back are products over
the last frames.

Shapes: N frames of one call, F bins, C channels, H hidden, h heads, e features of a head, T context frames; maps are
``(N·F, C)``, rows of the time LSTM ``(N, F, C)``, ring states ``(1, h, T, F·e)``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.segments import SEGMENT, Memory, State, StreamingSegments
from edgesep.separators.spectral import CausalStft, ChannelBinNorm, ChannelNorm, backwards
from edgesep.separators.streaming import Call, Carried, clock
from edgesep.separators.tfacm import TFACM, Block, GatePath, PastConv


class StreamingTFACM(nn.Module):
    """One call of a stream: ``(1, N·hop)`` samples and the states → ``(1, S, N·hop)`` estimates and the next states."""

    def __init__(self, net: TFACM, hops: int, context: int):
        super().__init__()
        self.hops, self.context, self.sources = hops, context, net.sources
        self.stft = HopStft(cast(CausalStft, net.stft), hops)
        first, norm = net.conv
        self.conv, self.norm = cast(PastConv, first).conv, RowNorm(cast(ChannelNorm, norm))
        blocks = cast(Iterable[Block], net.blocks)
        self.blocks = nn.ModuleList(StreamingBlock(b, self.stft.bins, hops) for b in blocks)
        self.memory = cast(Memory, net.mems[0])
        self.deconv = backwards(net.deconv)
        carried = Carried()
        with torch.no_grad():
            self.run(torch.zeros(1, hops * self.stft.hop), carried)  # tells which states there are
        self.states = tuple(carried.specs.values())
        self.next_shapes = {s.name: tuple(carried.next[s.name].shape) for s in self.states}

    def forward(self, mixture: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        carried = Carried(dict(zip((s.name for s in self.states), states, strict=True)))
        estimates = self.run(mixture, carried)
        return estimates, *(carried.next[s.name] for s in self.states)

    def run(self, mixture: Tensor, carried: Carried) -> Tensor:
        stft, frames = self.stft, self.hops
        spectra = stft.analyse(carried.extend("samples", mixture, stft.size - stft.hop, 1))
        x = self.conv(carried.extend("conv", spectra, 2, 2))
        x = self.norm(x.permute(0, 2, 3, 1).flatten(0, 2))
        call = Call(carried, *clock(carried, frames, SEGMENT // 2, self.context))
        state: State | None = None
        for i, block in enumerate(self.blocks):
            if state is not None:
                state = self.memory.step(state, call.ended, carried.under(f"memory{i}"))
            x, state = block(x, state, call.under(f"block{i}"), self.context)
        maps = x.view(1, frames, stft.bins, -1).permute(0, 3, 1, 2)
        spectra = self.deconv(carried.extend("deconv", maps, 2, 2))
        y = stft.synthesise(spectra.unflatten(1, (self.sources, 2)).flatten(0, 1))
        overlap = stft.synthesis - stft.hop
        y = y + F.pad(carried.take("overlap", (self.sources, overlap)), (0, y.shape[1] - overlap))
        carried.keep("overlap", y[:, frames * stft.hop :])
        return y[None, :, : frames * stft.hop]


class RowBlock(nn.Module):
    """What a block does to each frame alone, and its weights."""

    def __init__(self, block: Block, bins: int):
        super().__init__()
        self.bins, self.taps, self.heads = bins, block.ks, block.heads
        channels = block.intra_norm.gamma.shape[1]
        self.intra_norm, self.inter_norm = RowNorm(block.intra_norm), RowNorm(block.inter_norm)
        self.intra_rnn = by_taps(block.intra_rnn, block.ks)
        self.intra_linear = gathering(block.intra_linear)
        self.inter_linear = gathering(block.inter_linear.conv_transpose)
        paths = [
            [cast(nn.Sequential, block.get_submodule(f"attn_conv_{kind}_{i}")) for i in range(block.heads)]
            for kind in "QKV"
        ]
        self.attn_conv = RowProjection([path for kind in paths for path in kind])
        self.qk_norm, self.v_norm = HeadNorm([*paths[0], *paths[1]]), HeadNorm(paths[2])
        with torch.no_grad():  # the scale of the scores stands in the queries' norm
            scale = torch.ones_like(self.qk_norm.gamma)
            scale[:, : block.heads] = self.qk_norm.gamma.shape[-1] ** -0.5
            self.qk_norm.gamma.mul_(scale)
            self.qk_norm.beta.mul_(scale)
        self.attn_concat_proj = RowProjection([block.attn_concat_proj])
        self.concat_norm = HeadNorm([block.attn_concat_proj])
        self.gate_paths = RowProjection([block.gcfn_left, block.gcfn_right])
        final = block.gcfn_final.conv
        self.gcfn_final = linear(final.weight.flatten(1), final.bias)
        self.channels = channels

    def gate(self, x: Tensor) -> Tensor:
        left, right = self.gate_paths(x).chunk(2, -1)
        return self.gcfn_final(left * right)


class StreamingBlock(RowBlock):
    """A block for the frames of one call. Windows are gathered as whole rows, in the order in which they are read."""

    def __init__(self, block: Block, bins: int, frames: int):
        super().__init__(block, bins)
        self.inter_rnn, self.frames = StreamingSegments(block.inter_rnn), frames
        self.intra_rnn.batch_first = False
        n, taps = torch.arange(frames), torch.arange(self.taps)
        bin_, window = torch.arange(bins)[:, None], torch.arange(bins - self.taps + 1)[:, None, None]
        self.register_buffer("taken", (n[:, None] * bins + window + taps).flatten())  # window, frame, tap
        self.register_buffer("spread", ((bin_ + taps) * frames + n[:, None, None]).flatten())  # frame, bin, tap
        self.register_buffer("recent", ((n[:, None, None] + taps) * bins + bin_).flatten())

    taken: Tensor
    spread: Tensor
    recent: Tensor

    def over_bins(self, x: Tensor) -> Tensor:
        y = self.intra_norm(x).index_select(0, self.taken)
        y, _ = self.intra_rnn(y.view(-1, self.frames, self.taps * self.channels))
        y = F.pad(y, (0, 0, 0, 0, self.taps - 1, self.taps - 1)).flatten(0, 1)
        return self.intra_linear(windows_of(y, self.spread, self.taps)) + x

    def over_frames(self, x: Tensor, state: State | None, call: Call) -> tuple[Tensor, State]:
        rows = self.inter_norm(x).view(-1, self.bins, self.channels)
        y, state = self.inter_rnn(rows, state, call)
        y = call.carried.extend("inter_linear", y, self.taps - 1, 0).flatten(0, 1)
        return self.inter_linear(windows_of(y, self.recent, self.taps)) + x, state

    def attend(self, x: Tensor, call: Call, context: int) -> Tensor:
        heads, frames = self.heads, self.frames
        qkv = self.attn_conv(x)
        features = 2 * heads * self.qk_norm.gamma.shape[-1] // self.bins
        qk = self.qk_norm(self.by_head(qkv[:, :features], 2 * heads))
        v = self.v_norm(self.by_head(qkv[:, features:], heads))
        q, k = qk[:, :heads], qk[:, heads:]
        rings = [call.carried.ring(name, new, context) for name, new in (("keys", k), ("values", v))]
        score = torch.cat([q @ rings[0].transpose(2, 3), q @ k.transpose(2, 3)], -1) + call.hidden
        weight = torch.softmax(score, -1)
        y = weight[..., :context] @ rings[1] + weight[..., context:] @ v
        y = y.view(heads, frames, self.bins, -1).permute(1, 2, 0, 3).flatten(2)
        y = self.attn_concat_proj(y.flatten(0, 1)).view(1, 1, frames, -1)
        return self.concat_norm(y).view(x.shape) + x

    def by_head(self, x: Tensor, heads: int) -> Tensor:
        """``(N·F, heads·e)`` → ``(1, heads, N, F·e)``."""
        return x.view(-1, self.bins, heads, x.shape[1] // heads).permute(2, 0, 1, 3).flatten(2)[None]

    def forward(self, x: Tensor, state: State | None, call: Call, context: int) -> tuple[Tensor, State]:
        x, state = self.over_frames(self.over_bins(x), state, call)
        return self.gate(self.attend(x, call, context)), state


class HopStft(nn.Module):
    """``CausalStft`` for the frames of one call: products, for which runtimes have faster kernels than for convolutions
    of one channel."""

    taken: Tensor
    forward_kernel: Tensor
    inverse_kernel: Tensor

    def __init__(self, stft: CausalStft, frames: int):
        super().__init__()
        self.frames, self.hop, self.bins = frames, stft.hop, stft.bins
        self.size, self.synthesis = stft.n_fft, stft.synthesis
        self.register_buffer("taken", (torch.arange(frames)[:, None] * stft.hop + torch.arange(stft.n_fft)).flatten())
        self.register_buffer("forward_kernel", stft.forward_kernel[:, 0].T.contiguous())
        self.register_buffer("inverse_kernel", stft.inverse_kernel[:, 0].clone())

    def analyse(self, x: Tensor) -> Tensor:
        """``(1, size + (N-1)·hop)`` → ``(1, 2, N, F)``, real and imaginary."""
        windows = x if self.frames == 1 else x.index_select(1, self.taken).view(self.frames, self.size)
        return (windows @ self.forward_kernel).view(self.frames, 2, self.bins).transpose(0, 1)[None]

    def synthesise(self, spectra: Tensor) -> Tensor:
        """``(S, 2, N, F)`` → ``(S, synthesis + (N-1)·hop)``; the first and last ``synthesis - hop`` are incomplete."""
        parts = spectra.transpose(1, 2).flatten(2) @ self.inverse_kernel
        if self.frames == 1:
            return parts[:, 0]
        # Rows of a hop more than what comes out: read again in rows of that, each stands a hop behind the last.
        length = self.synthesis + (self.frames - 1) * self.hop
        rows = F.pad(parts, (0, length + self.hop - self.synthesis)).flatten(1)
        return rows[:, : self.frames * length].unflatten(1, (self.frames, length)).sum(1)


class RowNorm(nn.Module):
    """``ChannelNorm`` of rows ``(n, C)``."""

    def __init__(self, norm: ChannelNorm):
        super().__init__()
        self.gamma, self.beta, self.eps = (
            nn.Parameter(norm.gamma.flatten()),
            nn.Parameter(norm.beta.flatten()),
            norm.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)


class HeadNorm(nn.Module):
    """The ``ChannelBinNorm`` at the end of each projection, of maps ``(1, paths, N, F·e)``."""

    def __init__(self, paths: list[nn.Sequential]):
        super().__init__()
        norms = [cast(ChannelBinNorm, path[2]) for path in paths]
        self.eps = norms[0].eps
        self.gamma = nn.Parameter(torch.stack([n.gamma[0, :, 0].T.flatten() for n in norms])[None, :, None])
        self.beta = nn.Parameter(torch.stack([n.beta[0, :, 0].T.flatten() for n in norms])[None, :, None])

    def forward(self, x: Tensor) -> Tensor:
        size = self.gamma.shape[-1:]
        if self.gamma.shape[1] == 1:
            return F.layer_norm(x, size, self.gamma.flatten(), self.beta.flatten(), self.eps)
        return F.layer_norm(x, size, None, None, self.eps) * self.gamma + self.beta


class RowProjection(nn.Module):
    """1x1 convolutions side by side and the PReLU of each, in one product: ``(n, C)`` → ``(n, all outputs)``.

    A path is a projection (convolution, PReLU, norm, which is left out here) or a gate path (convolution, depthwise and
    pointwise one, PReLU or not), whose linear steps become one.
    """

    slope: Tensor

    def __init__(self, paths: list[nn.Sequential]):
        super().__init__()
        weights, biases, slopes = [], [], []
        for path in paths:
            conv = cast(PastConv, path[0]).conv
            weight, bias = conv.weight.flatten(1).double(), cast(Tensor, conv.bias).double()
            if isinstance(path[1], GatePath):
                deep, mixing = path[1].depthwise, path[1].pointwise
                scale, shift = deep.weight.flatten().double(), cast(Tensor, deep.bias).double()
                mixed = mixing.weight.flatten(1).double()
                weight = mixed @ (scale[:, None] * weight)
                bias = mixed @ (scale * bias + shift) + cast(Tensor, mixing.bias).double()
            weights.append(weight)
            biases.append(bias)
            slopes.append(next((p.weight for p in path if isinstance(p, nn.PReLU)), torch.ones(1)).expand(len(bias)))
        self.linear = linear(torch.cat(weights).float(), torch.cat(biases).float())
        self.register_buffer("slope", torch.cat(slopes).detach().clone())
        self.falls = bool(self.slope.max() <= 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.falls:  # then the larger of both is the right one
            return torch.maximum(y, y * self.slope)
        return torch.where(y > 0, y, y * self.slope)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight, made.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(cast(Tensor, bias).detach().clone())
    return made


def gathering(conv: nn.ConvTranspose1d) -> nn.Linear:
    """What a transposed convolution of stride 1 spreads, summed: of the last k inputs, the oldest first.

    The oldest one meets the last tap.
    """
    return linear(conv.weight.flip(2).permute(1, 2, 0).flatten(1), conv.bias)


def windows_of(x: Tensor, index: Tensor, size: int) -> Tensor:
    """``(rows, C)`` → ``(windows, size·C)``: the rows of every window, as ``index`` tells them, side by side."""
    return x.index_select(0, index).view(-1, size * x.shape[1])


def by_taps(rnn: nn.LSTM, taps: int) -> nn.LSTM:
    """The LSTM for windows that hold tap after tap instead of channel after channel."""
    made = nn.LSTM(rnn.input_size, rnn.hidden_size, batch_first=True)
    state = rnn.state_dict()
    state["weight_ih_l0"] = state["weight_ih_l0"].unflatten(1, (-1, taps)).transpose(1, 2).flatten(1)
    made.load_state_dict(state)
    return made
