"""TFACM (arXiv 2505.13094): causal, time-frequency; TF-GridNet's skeleton with segment LSTMs and a cache memory.

Shapes: B batch, T samples, C channels (``emb_dim``), L frames, F bins, S segments, K = 70 frames a segment (stride
35); maps are ``(B, C, L, F)``; R = B·F rows for the time LSTM, whose sequences are ``(K, S, R, C)``: steps
first, segments before rows, so that neither an LSTM nor a state ever needs a transposition.

The authors' released forward is **not** causal; three places leak the future. ``variant="causal"`` closes them with
the same weights, ``variant="released"`` keeps them for checkpoints trained that way:

* the cache memory hands a segment the state of its predecessor, which overlaps it by half (35 ms): hand over the
  state of the one before that, which ends where the segment begins;
* the output deconvolution is centred in time (one frame): crop it so that it looks back;
* the gate reinterprets ``(B, C, L, F)`` as ``(B·F, C, L)`` without moving axes, which mixes the whole utterance: its
  kernels are all of size 1, so on the map itself it is three 1x1 convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.base import Checkpoint, Separator, load_state, settle
from edgesep.separators.spectral import ChannelBinNorm, ChannelNorm, Stft, normalise, windows
from edgesep.spec import InputError, TensorSpec

NAMES = ("TFACMCausal",)
SEGMENT = 70  # frames, hard-coded by the authors
NORM_EPS = 1e-8

Variant = Literal["causal", "released"]
State = tuple[Tensor, Tensor]  # hidden and cell, (S, R, H) each


class PastConv(nn.Module):
    """Convolution over (frames, bins): pads the past in time, both sides in frequency."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.past = kernel - 1
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=(0, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, self.past, 0)) if self.past else x)


def projection(inputs: int, outputs: int, bins: int, eps: float) -> nn.Sequential:
    """1x1 convolution, one-slope PReLU, norm over channels and bins."""
    return nn.Sequential(PastConv(inputs, outputs, 1), nn.PReLU(), ChannelBinNorm(outputs, bins, eps))


class LastNorm(nn.Module):
    """Layer norm over the last axis, parameters in the authors' shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, (-1,), NORM_EPS) * self.gamma[0, :, 0] + self.beta[0, :, 0]


class SegmentLstm(nn.Module):
    """LSTM within each segment, from a given state: ``(K, S, R, C)`` → the same, and the last states."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden)
        self.proj = nn.Linear(hidden, channels)
        self.norm = LastNorm(channels)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        segments, rows = x.shape[1:3]
        flat = x.flatten(1, 2)
        if state is None:
            zero = flat.new_zeros(1, flat.shape[1], self.lstm.hidden_size)
            start = (zero, zero)
        else:
            start = (state[0].flatten(0, 1)[None], state[1].flatten(0, 1)[None])
        y, (h, c) = self.lstm(flat, start)
        y = flat + self.norm(self.proj(y))
        return y.unflatten(1, (segments, rows)), (
            h[0].unflatten(0, (segments, rows)),
            c[0].unflatten(0, (segments, rows)),
        )


class Recall(nn.Module):
    """LSTM and projection over the segments' states ``(S, R, H)``."""

    def __init__(self, hidden: int):
        super().__init__()
        self.rnn = nn.LSTM(hidden, hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.rnn(x)[0])


class Memory(nn.Module):
    """The cache memory: what segments hand to those ``distance`` later in the next block."""

    def __init__(self, hidden: int, distance: int):
        super().__init__()
        self.distance = distance
        self.h_net, self.c_net = Recall(hidden), Recall(hidden)
        self.h_norm, self.c_norm = LastNorm(hidden), LastNorm(hidden)

    def forward(self, state: State) -> State:
        h = state[0] + self.h_norm(self.h_net(state[0]))
        c = state[1] + self.c_norm(self.c_net(state[1]))
        return self.later(h), self.later(c)

    def later(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.distance, 0))[: x.shape[0]]


class GatePath(nn.Module):
    """Depthwise and pointwise convolution, kernels of size 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Transposed(nn.Module):
    """ConvTranspose1d that looks back: output t depends on inputs t-ks+1 … t."""

    def __init__(self, inputs: int, outputs: int, kernel: int, hop: int):
        super().__init__()
        self.conv_transpose = nn.ConvTranspose1d(inputs, outputs, kernel, stride=hop)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_transpose(x)[..., : x.shape[-1]]


def segments_of(x: Tensor) -> Tensor:
    """``(L, R, C)`` → ``(K, S, R, C)``: half-overlapping segments, half a segment of zeros in front."""
    half, length = SEGMENT // 2, x.shape[0]
    pairs = (length + half) // SEGMENT + 1  # the authors' padding: an even number of segments
    x = F.pad(x, (0, 0, 0, 0, half, pairs * SEGMENT - length))
    halves = x.unflatten(0, (2 * pairs + 1, half)).transpose(0, 1)
    return torch.cat([halves[:, :-1], halves[:, 1:]])


def overlap_add(x: Tensor, length: int) -> Tensor:
    """``(K, S, R, C)`` → ``(length, R, C)``: sums overlapping segments and drops the padding."""
    half = SEGMENT // 2
    total = F.pad(x[:half], (0, 0, 0, 0, 0, 1)) + F.pad(x[half:], (0, 0, 0, 0, 1, 0))
    return total.transpose(0, 1).flatten(0, 1)[half : half + length]


class Block(nn.Module):
    def __init__(
        self,
        channels: int,
        hidden: int,
        ks: int,
        hs: int,
        bins: int,
        heads: int,
        qk_dim: int,
        eps: float,
        released: bool,
    ):
        super().__init__()
        self.ks, self.hs, self.heads, self.released = ks, hs, heads, released
        self.intra_norm = ChannelNorm(channels, eps)
        self.intra_rnn = nn.LSTM(channels * ks, hidden, batch_first=True)
        self.intra_linear = nn.ConvTranspose1d(hidden, channels, ks, stride=hs)
        self.inter_norm = ChannelNorm(channels, eps)
        self.inter_rnn = SegmentLstm(channels, hidden)
        self.inter_linear = Transposed(hidden, channels, ks, hs)
        features = math.ceil(qk_dim / bins)
        for head in range(heads):
            self.add_module(f"attn_conv_Q_{head}", projection(channels, features, bins, eps))
            self.add_module(f"attn_conv_K_{head}", projection(channels, features, bins, eps))
            self.add_module(f"attn_conv_V_{head}", projection(channels, channels // heads, bins, eps))
        self.attn_concat_proj = projection(channels, channels, bins, eps)
        self.gcfn_left = nn.Sequential(PastConv(channels, channels, 1), GatePath(channels))
        self.gcfn_right = nn.Sequential(PastConv(channels, channels, 1), GatePath(channels), nn.PReLU())
        self.gcfn_final = PastConv(channels, channels, 1)

    def over_bins(self, x: Tensor) -> Tensor:
        """LSTM from low to high bins, each frame on its own."""
        batch, _, frames, _ = x.shape
        y = self.intra_norm(x).transpose(1, 2).flatten(0, 1)
        y, _ = self.intra_rnn(windows(y, self.ks, self.hs))
        y = self.intra_linear(y.transpose(1, 2))
        return y.unflatten(0, (batch, frames)).transpose(1, 2) + x

    def over_frames(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """LSTM within segments of frames, each bin on its own."""
        batch, _, frames, bins = x.shape
        rows = self.inter_norm(x).permute(2, 0, 3, 1).flatten(1, 2)
        y, state = self.inter_rnn(segments_of(rows), state)
        y = self.inter_linear(overlap_add(y, frames).permute(1, 2, 0))
        return y.unflatten(0, (batch, bins)).permute(0, 2, 3, 1) + x, state

    def head(self, kind: str, x: Tensor) -> Tensor:
        """(B, heads, L, features·F) of Q, K or V."""
        maps = [self.get_submodule(f"attn_conv_{kind}_{i}")(x) for i in range(self.heads)]
        return torch.stack(maps, 1).transpose(2, 3).flatten(3)

    def attend(self, x: Tensor) -> Tensor:
        """Attention over the whole past."""
        q, k, v = (self.head(kind, x) for kind in "QKV")
        at = torch.arange(x.shape[2], device=x.device)
        score = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        weight = torch.softmax(score.masked_fill(at[None, :] > at[:, None], float("-inf")), -1)
        y = (weight @ v).unflatten(3, (-1, x.shape[3])).transpose(2, 3).flatten(1, 2)
        return self.attn_concat_proj(y) + x

    def gate(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.released:
            x = x.reshape(shape[0] * shape[3], shape[1], shape[2], 1)
        return self.gcfn_final(self.gcfn_left(x) * self.gcfn_right(x)).reshape(shape)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        frames, bins = x.shape[2:]
        if self.hs > 1:  # whole windows only
            x = F.pad(x, (0, -(bins - self.ks) % self.hs, 0, -(frames - self.ks) % self.hs))
        x, state = self.over_frames(self.over_bins(x), state)
        return self.gate(self.attend(x[:, :, :frames, :bins])), state


class TFACM(nn.Module):
    """``(B, T)`` float32 waveform → ``(B, S, T)`` estimates."""

    def __init__(
        self,
        *,
        n_srcs: int,
        n_fft: int,
        stride: int,
        n_layers: int,
        lstm_hidden_units: int,
        attn_n_head: int,
        attn_approx_qk_dim: int,
        emb_dim: int,
        emb_ks: int,
        emb_hs: int,
        eps: float,
        variant: Variant,
    ):
        super().__init__()
        self.sources, self.released = n_srcs, variant == "released"
        self.stft = Stft(n_fft, stride)
        self.conv = nn.Sequential(PastConv(2, emb_dim, 3), ChannelNorm(emb_dim, eps))
        self.blocks = nn.ModuleList(
            Block(
                emb_dim,
                lstm_hidden_units,
                emb_ks,
                emb_hs,
                self.stft.bins,
                attn_n_head,
                attn_approx_qk_dim,
                eps,
                self.released,
            )
            for _ in range(n_layers)
        )
        self.mems = nn.ModuleList([Memory(lstm_hidden_units, 1 if self.released else 2)])
        self.deconv = nn.ConvTranspose2d(emb_dim, 2 * n_srcs, 3, padding=(0, 1))

    def forward(self, mixture: Tensor) -> Tensor:
        samples, edge = mixture.shape[-1], self.stft.n_fft // 2
        x = self.conv(self.stft.analyse(F.pad(mixture, (edge, edge), mode="reflect")))
        frames = x.shape[2]
        state: State | None = None
        for i, block in enumerate(self.blocks):
            x, state = block(x, self.mems[0](state) if i and state is not None else None)
        first = 1 if self.released else 0  # the released one is centred: one frame ahead
        spectra = self.deconv(x)[:, :, first : first + frames]
        y = self.stft.synthesise(spectra.unflatten(1, (self.sources, 2)).flatten(0, 1))[:, edge : edge + samples]
        return y.unflatten(0, (-1, self.sources))


SIZED = ("conv.0.conv.weight", "deconv.weight", "mems.0.h_net.rnn.weight_hh_l0", "blocks.0.intra_linear.weight")
DEFAULTS: dict[str, Any] = {"emb_hs": 1, "eps": 1e-5, "variant": "released"}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state dict is one of ours."""
    return all(key in state for key in SIZED)


def build(checkpoint: Checkpoint) -> Separator:
    """Rebuild a TFACM from its checkpoint.

    The authors' files say nothing of a variant and get the released arithmetic, with which they were trained;
    ``variant: causal`` in ``audionet_config`` loads the same weights into the causal one.
    """
    state = checkpoint.state
    if absent := [k for k in SIZED if k not in state]:
        raise InputError(f"{checkpoint.path} holds no TFACM: {', '.join(absent)} missing; check name and file")
    bins = state["blocks.0.attn_conv_Q_0.2.gamma"].shape[3]
    sizes = {
        "n_srcs": state["deconv.weight"].shape[1] // 2,
        "n_fft": 2 * (bins - 1),
        "n_layers": len({k.split(".")[1] for k in state if k.startswith("blocks.")}),
        "lstm_hidden_units": state["mems.0.h_net.rnn.weight_hh_l0"].shape[1],
        "attn_n_head": sum(k.startswith("blocks.0.attn_conv_Q_") and k.endswith(".0.conv.weight") for k in state),
        "emb_dim": state["conv.0.conv.weight"].shape[0],
        "emb_ks": state["blocks.0.intra_linear.weight"].shape[2],
    }
    features = state["blocks.0.attn_conv_Q_0.0.conv.weight"].shape[0]
    config = DEFAULTS | settle(checkpoint, sizes, ("stride", "attn_approx_qk_dim", "emb_hs", "eps", "variant"))
    config.setdefault("attn_approx_qk_dim", features * bins)
    if "stride" not in config or checkpoint.sample_rate_hz is None:
        raise InputError(f"{checkpoint.path} does not say its hop (stride) and sample rate; give its conf.yml")
    if config["variant"] not in ("causal", "released"):
        raise InputError(f"variant {config['variant']!r} is not known, use 'causal' or 'released'")
    module = TFACM(**config)
    load_state(module, state, checkpoint.path, lambda k: k.startswith("cln."))
    return separator(module.eval(), config, checkpoint.sample_rate_hz, sum(v.numel() for v in state.values()))


def create(config: Mapping[str, Any], rate: int) -> Separator:
    """A new TFACM with random weights, causal; ``config`` as the authors' ``audionet_config``."""
    known: dict[str, Any] = {**DEFAULTS, **config, "variant": "causal"}
    module = TFACM(**known)
    return separator(module.eval(), known, rate, sum(p.numel() for p in module.parameters()))


def separator(module: TFACM, config: Mapping[str, Any], rate: int, parameters: int) -> Separator:
    """The separator around a module, trained or new."""
    window = module.stft.n_fft
    return Separator(
        name="TFACMCausal",
        module=module,
        config=dict(config),
        sample_rate_hz=rate,
        sources=module.sources,
        parameters=parameters,
        inputs=(TensorSpec("mixture", ("batch", "samples")),),
        outputs=(TensorSpec("estimates", ("batch", module.sources, "samples")),),
        causal=not module.released,
        # Any output sample depends on input up to one synthesis window later.
        algorithmic_latency_ms=None if module.released else 1000 * window / rate,
        min_samples=window // 2 + 1,
        # The gate multiplies two branches: its product has tails that eight bits do not hold (0.35 instead of 0.08 dB).
        keep_float=("conv", "deconv", "stft", *(f"blocks.{i}.gcfn_final" for i in range(len(module.blocks)))),
        keep_shape=("deconv",),
        note="released arithmetic: not causal, cannot stream; variant: causal closes its leaks"
        if module.released
        else "",
    )


def to_authors(module: TFACM) -> dict[str, Tensor]:
    """The authors' state dict: their keys, and their 1-D kernels in the gate."""
    state = dict(module.state_dict())
    return {k: v[..., 0] if ".gcfn_" in k and v.ndim == 4 else v for k, v in state.items()}
