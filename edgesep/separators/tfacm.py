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

The causal one also streams (``tfacm_stream``), and is lowered to rows of channels (``tfacm_rows``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.base import Checkpoint, Separator, Streaming, load_state, settle
from edgesep.separators.segments import SEGMENT, Memory, SegmentLstm, State, overlap_add, segments_of
from edgesep.separators.spectral import CausalStft, ChannelBinNorm, ChannelNorm, Stft, windows
from edgesep.separators.widths import Cut, Width, lstm_cuts
from edgesep.spec import InputError, StreamSpec, TensorSpec

NAMES = ("TFACMCausal",)
Variant = Literal["causal", "released"]


class PastConv(nn.Module):
    """Convolution over (frames, bins): pads the past in time, both sides in frequency."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.past = kernel - 1
        self.only_linear = not self.past  # nothing but the convolution, which lowering may merge with others
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=(0, kernel // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, self.past, 0)) if self.past else x)


def projection(inputs: int, outputs: int, bins: int, eps: float) -> nn.Sequential:
    """1x1 convolution, one-slope PReLU, norm over channels and bins."""
    return nn.Sequential(PastConv(inputs, outputs, 1), nn.PReLU(), ChannelBinNorm(outputs, bins, eps))


class GatePath(nn.Module):
    """Depthwise and pointwise convolution, kernels of size 1."""

    only_linear = True

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


def attended(q: Tensor, k: Tensor, v: Tensor, context: int | None) -> Tensor:
    """``(B, heads, L, ·)``: each frame attends to itself and the past, ``context`` frames in all at most."""
    at = torch.arange(q.shape[2], device=q.device)
    hidden = at[None, :] > at[:, None]
    if context is not None:
        hidden = hidden | (at[None, :] <= at[:, None] - context)
    return torch.softmax((q @ k.transpose(2, 3)).masked_fill(hidden, float("-inf")), -1) @ v


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
        context: int | None,
        released: bool,
    ):
        super().__init__()
        self.ks, self.hs, self.heads, self.context, self.released = ks, hs, heads, context, released
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
        """Attention over the past, of at most ``context`` frames (its own included)."""
        q, k, v = (self.head(kind, x) for kind in "QKV")
        q = q * q.shape[-1] ** -0.5
        y = attended(q, k, v, self.context)
        y = y.unflatten(3, (-1, x.shape[3])).transpose(2, 3).flatten(1, 2)
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
        synthesis: int | None = None,
        context: int | None = None,
    ):
        super().__init__()
        self.sources, self.released = n_srcs, variant == "released"
        self.stft: Stft | CausalStft = (
            Stft(n_fft, stride) if self.released else CausalStft(n_fft, stride, synthesis or n_fft)
        )
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
                context,
                self.released,
            )
            for _ in range(n_layers)
        )
        self.mems = nn.ModuleList([Memory(lstm_hidden_units, 1 if self.released else 2)])
        self.deconv = nn.ConvTranspose2d(emb_dim, 2 * n_srcs, 3, padding=(0, 1))

    def lower(self) -> bool:
        """Blocks work on rows of channels."""
        from edgesep.separators.tfacm_rows import WholeBlock  # which is made of this file's modules

        if self.released or not all(isinstance(b, Block) and b.hs == 1 for b in self.blocks):
            return False
        self.blocks = nn.ModuleList(WholeBlock(cast(Block, b), self.stft.bins) for b in self.blocks)
        return True

    def forward(self, mixture: Tensor) -> Tensor:
        samples: int = mixture.shape[-1]
        stft = self.stft
        skipped: int
        if isinstance(stft, CausalStft):
            x = F.pad(mixture, (stft.n_fft - stft.hop, stft.synthesis - 1))
            skipped = stft.synthesis - stft.hop
        else:
            skipped = stft.n_fft // 2
            x = F.pad(mixture, (skipped, skipped), mode="reflect")
        x = self.conv(stft.analyse(x))
        frames = x.shape[2]
        state: State | None = None
        for i, block in enumerate(self.blocks):
            x, state = block(x, self.mems[0](state) if i and state is not None else None)
        first = 1 if self.released else 0  # the released one is centred: one frame ahead
        spectra = self.deconv(x)[:, :, first : first + frames]
        y = stft.synthesise(spectra.unflatten(1, (self.sources, 2)).flatten(0, 1))[:, skipped : skipped + samples]
        return y.unflatten(0, (-1, self.sources))


SIZED = ("conv.0.conv.weight", "deconv.weight", "mems.0.h_net.rnn.weight_hh_l0", "blocks.0.intra_linear.weight")
CAUSAL_ONLY = ("synthesis", "context")  # samples of the synthesis window, frames of attention's past
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
    config = DEFAULTS | settle(
        checkpoint, sizes, ("stride", "attn_approx_qk_dim", "emb_hs", "eps", "variant", *CAUSAL_ONLY)
    )
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
    window = module.stft.synthesis if isinstance(module.stft, CausalStft) else module.stft.n_fft
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
        min_samples=window // 2 + 1 if module.released else 1,
        # The gate multiplies two branches: its product has tails that eight bits do not hold (0.35 instead of 0.08 dB).
        keep_float=("conv", "deconv", "stft", *(f"blocks.{i}.gcfn_final" for i in range(len(module.blocks)))),
        keep_shape=("deconv",),
        widths=widths,
        blocks=tuple(f"blocks.{i}" for i in range(len(module.blocks))),
        streaming=None if module.released or module.blocks[0].hs != 1 else Streaming(bound, stream),
        note="released arithmetic: not causal, cannot stream; variant: causal closes its leaks"
        if module.released
        else "",
    )


def widths(module: TFACM) -> list[Width]:
    """The hidden channels of the LSTMs. Those over frames hand their state on through the cache memory, so the hidden
    channels of all blocks go together."""
    found, over_frames = [], []
    for i, block in enumerate(cast(Iterable[Block], module.blocks)):
        own = f"blocks.{i}.intra_rnn"
        found.append(Width(block.intra_rnn.hidden_size, (*lstm_cuts(own), Cut(f"blocks.{i}.intra_linear.weight"))))
        own = f"blocks.{i}.inter_rnn"
        over_frames += [*lstm_cuts(f"{own}.lstm"), Cut(f"{own}.proj.weight", 1)]
    for kind in "hc":
        net = f"mems.0.{kind}_net"
        over_frames += [Cut(f"{net}.rnn.weight_ih_l0", 1), Cut(f"{net}.proj.weight"), Cut(f"{net}.proj.bias")]
        over_frames += [Cut(f"mems.0.{kind}_norm.{part}", 1) for part in ("gamma", "beta")]
    hidden = cast(Block, module.blocks[0]).inter_rnn.lstm.hidden_size
    return [*found, Width(hidden, tuple(over_frames))]


def bound(separator: Separator, context_s: float | None) -> Separator:
    """The separator with attention over the last ``context_s`` seconds."""
    hop = separator.config["stride"]
    context = separator.config.get("context")
    if context_s is not None:
        context = max(1, round(context_s * separator.sample_rate_hz / hop))
    if context is None:
        raise InputError(f"{separator.name} looks back without bound; give the recipe's stream.context_s, as 1.0")
    module = copy.deepcopy(cast(TFACM, separator.module))
    for block in cast(Iterable[Block], module.blocks):
        block.context = context
    return replace(separator, module=module, config=separator.config | {"context": context})


def stream(separator: Separator, hops: int) -> Separator:
    """The streaming separator around the weights of a bounded one."""
    from edgesep.separators.tfacm_stream import StreamingTFACM  # which is made of this file's modules

    net, context = cast(TFACM, separator.module), separator.config["context"]
    stft = cast(CausalStft, net.stft)
    most = min(SEGMENT // 2, context)
    if not 1 <= hops <= most:
        raise InputError(f"{hops} hops per call, {separator.name} with this context takes 1 to {most}")
    module = StreamingTFACM(net, hops, context).eval()
    spec = StreamSpec(
        sample_rate_hz=separator.sample_rate_hz,
        hop_samples=stft.hop,
        hops_per_call=hops,
        algorithmic_latency_samples=stft.synthesis,
        look_ahead_samples=stft.look_ahead,
        context_frames=context,
        states=module.states,
    )
    states = [TensorSpec(s.name, s.shape, s.dtype) for s in spec.states]
    size = spec.call_samples
    return replace(
        separator,
        module=module,
        inputs=(TensorSpec("mixture", (1, size)), *states),
        outputs=(
            TensorSpec("estimates", (1, separator.sources, size)),
            *(TensorSpec(f"next_{name}", shape) for name, shape in module.next_shapes.items()),
        ),
        streaming=None,
        stream=spec,
    )


def to_authors(module: TFACM) -> dict[str, Tensor]:
    """The authors' state dict: their keys, and their 1-D kernels in the gate."""
    state = dict(module.state_dict())
    return {k: v[..., 0] if ".gcfn_" in k and v.ndim == 4 else v for k, v in state.items()}
