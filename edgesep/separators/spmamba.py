"""SPMamba (arXiv 2404.02063): offline, time-frequency; TF-GridNet with bidirectional Mamba-1 in place of its BLSTMs.

Shapes: B batch, T samples, C embedding channels (``emb_dim``), L frames, F bins, S sources; maps are ``(B, C, L, F)``.
Rows of a Mamba block are ``(rows, steps, C·ks)``: over bins for each frame ("intra"), over frames for each bin
("inter").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.ops.causal_conv_torch import conv_op
from edgesep.ops.selective_scan_torch import scan_op
from edgesep.separators.base import Checkpoint, Separator, load_state, settle
from edgesep.separators.spectral import ChannelNorm, Stft, projection, windows
from edgesep.separators.widths import Balance, Cut, Width
from edgesep.spec import InputError, TensorSpec

NAMES = ("SPMamba",)
EXPAND, STATE, TAPS = 4, 16, 4
KEPT_PROJECTIONS = (".out_proj", ".dt_proj")  # in float when the rest is quantized


class RmsNorm(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Mixer(nn.Module):
    """Mamba-1: gate, causal depthwise convolution, selective scan. ``(rows, steps, M)`` → the same.

    ``reverse`` runs it from the last step to the first, without a copy the other way round.
    """

    def __init__(self, model: int, reverse: bool):
        super().__init__()
        self.reverse = reverse
        inner, self.rank = EXPAND * model, math.ceil(model / 16)
        self.in_proj = nn.Linear(model, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, TAPS, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATE + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, model, bias=False)
        # Steps between 1 ms and 100 ms at the start, as in Mamba.
        step = torch.exp(torch.rand(inner) * math.log(100) + math.log(1e-3))
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = conv_op(u, self.conv1d.weight[:, 0], self.conv1d.get_parameter("bias"), self.reverse)
        dt, b, c = self.x_proj(u).split([self.rank, STATE, STATE], -1)
        dt = F.linear(dt, self.dt_proj.weight)
        a = -torch.exp(self.A_log)
        y, _ = scan_op(u, dt, a, b, c, self.D, z, self.dt_proj.bias, None, True, self.reverse)
        return self.out_proj(y)


class Residual(nn.Module):
    def __init__(self, model: int, reverse: bool):
        super().__init__()
        self.mixer = Mixer(model, reverse)
        self.norm = RmsNorm(model)

    def balances(self) -> list[Balance]:
        return [Balance(self.mixer.in_proj, ((self.norm.weight, 0),))]

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x)) + x


class Bidirectional(nn.Module):
    """A block forwards and another one backwards, side by side: ``(rows, steps, M)`` → ``(rows, steps, 2M)``."""

    def __init__(self, model: int):
        super().__init__()
        self.forward_blocks = nn.ModuleList([Residual(model, reverse=False)])
        self.backward_blocks = nn.ModuleList([Residual(model, reverse=True)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.forward_blocks[0](x), self.backward_blocks[0](x)], -1)


class Block(nn.Module):
    def __init__(self, channels: int, ks: int, hs: int, bins: int, heads: int, qk_dim: int, eps: float):
        super().__init__()
        self.ks, self.hs, self.heads = ks, hs, heads
        for way in ("intra", "inter"):
            self.add_module(f"{way}_norm", ChannelNorm(channels, eps))
            self.add_module(f"{way}_mamba", Bidirectional(channels * ks))
            self.add_module(f"{way}_linear", nn.ConvTranspose1d(2 * channels * ks, channels, ks, stride=hs))
        features = math.ceil(qk_dim / bins)
        for head in range(heads):
            self.add_module(f"attn_conv_Q_{head}", projection(channels, features, bins, eps))
            self.add_module(f"attn_conv_K_{head}", projection(channels, features, bins, eps))
            self.add_module(f"attn_conv_V_{head}", projection(channels, channels // heads, bins, eps))
        self.attn_concat_proj = projection(channels, channels, bins, eps)

    def along(self, way: str, x: Tensor) -> Tensor:
        """Mamba along the last axis of ``(B, C, R, n)``, each of the R rows on its own, with a residual."""
        batch, _, rows, _ = x.shape
        y = self.get_submodule(f"{way}_norm")(x).transpose(1, 2).flatten(0, 1)
        y = self.get_submodule(f"{way}_mamba")(windows(y, self.ks, self.hs))
        y = self.get_submodule(f"{way}_linear")(y.transpose(1, 2))
        return y.unflatten(0, (batch, rows)).transpose(1, 2) + x

    def head(self, kind: str, x: Tensor) -> Tensor:
        """(B, heads, L, features·F) of Q, K or V."""
        maps = [self.get_submodule(f"attn_conv_{kind}_{i}")(x) for i in range(self.heads)]
        return torch.stack(maps, 1).transpose(2, 3).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        frames, bins = x.shape[2:]
        if self.hs > 1:  # whole windows only
            x = F.pad(x, (0, -(bins - self.ks) % self.hs, 0, -(frames - self.ks) % self.hs))
        x = self.along("intra", x)
        x = self.along("inter", x.transpose(2, 3)).transpose(2, 3)
        x = x[:, :, :frames, :bins]
        q, k, v = (self.head(kind, x) for kind in "QKV")
        weight = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1)
        y = (weight @ v).unflatten(3, (-1, bins)).transpose(2, 3).flatten(1, 2)
        return self.attn_concat_proj(y) + x


class SPMamba(nn.Module):
    """``(B, T)`` float32 waveform → ``(B, S, T)`` estimates."""

    def __init__(
        self,
        *,
        n_srcs: int,
        n_fft: int,
        stride: int,
        n_layers: int,
        attn_n_head: int,
        attn_approx_qk_dim: int,
        emb_dim: int,
        emb_ks: int,
        emb_hs: int,
        eps: float,
    ):
        super().__init__()
        self.sources = n_srcs
        self.stft = Stft(n_fft, stride)
        self.conv = nn.Sequential(nn.Conv2d(2, emb_dim, 3, padding=1), nn.GroupNorm(1, emb_dim, eps=eps))
        self.blocks = nn.ModuleList(
            Block(emb_dim, emb_ks, emb_hs, self.stft.bins, attn_n_head, attn_approx_qk_dim, eps)
            for _ in range(n_layers)
        )
        self.deconv = nn.ConvTranspose2d(emb_dim, 2 * n_srcs, 3, padding=1)

    def forward(self, mixture: Tensor) -> Tensor:
        samples, edge = mixture.shape[-1], self.stft.n_fft // 2
        centred = mixture - mixture.mean(-1, keepdim=True)
        level = (centred.square().sum(-1, keepdim=True) / (samples - 1)).sqrt()
        x = self.conv(self.stft.analyse(F.pad(mixture / level, (edge, edge), mode="reflect")))
        for block in self.blocks:
            x = block(x)
        spectra = self.deconv(x).unflatten(1, (self.sources, 2)).flatten(0, 1)
        y = self.stft.synthesise(spectra)[:, edge : edge + samples]
        return y.unflatten(0, (-1, self.sources)) * level[:, None]


SIZED = ("conv.0.weight", "deconv.weight", "blocks.0.intra_mamba.forward_blocks.0.mixer.A_log")
DEFAULTS = {"emb_hs": 1, "eps": 1e-5, "attn_approx_qk_dim": 512}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state dict is one of ours."""
    return all(key in state for key in SIZED)


def build(checkpoint: Checkpoint) -> Separator:
    """Rebuild an SPMamba from its checkpoint; the hop (``stride``) and the rate come from the configuration."""
    state = checkpoint.state
    if absent := [k for k in SIZED if k not in state]:
        raise InputError(f"{checkpoint.path} holds no SPMamba: {', '.join(absent)} missing; check name and file")
    heads = sum(k.startswith("blocks.0.attn_conv_Q_") and k.endswith(".0.weight") for k in state)
    bins = state["blocks.0.attn_conv_Q_0.2.gamma"].shape[3]
    sizes = {
        "n_srcs": state["deconv.weight"].shape[1] // 2,
        "n_fft": 2 * (bins - 1),
        "n_layers": len({k.split(".")[1] for k in state if k.startswith("blocks.")}),
        "attn_n_head": heads,
        "emb_dim": state["conv.0.weight"].shape[0],
        "emb_ks": state["blocks.0.intra_linear.weight"].shape[2],
    }
    config = DEFAULTS | settle(checkpoint, sizes, ("stride", "attn_approx_qk_dim", "emb_hs", "eps"))
    if "stride" not in config or checkpoint.sample_rate_hz is None:
        raise InputError(f"{checkpoint.path} does not say its hop (stride) and sample rate; give its conf.yml")
    module = SPMamba(**config)
    load_state(module, state, checkpoint.path, lambda _: False)
    return separator(module.eval(), config, checkpoint.sample_rate_hz)


def create(config: Mapping[str, Any], rate: int) -> Separator:
    """A new SPMamba with random weights; ``config`` as the authors' ``audionet_config``."""
    known = DEFAULTS | dict(config)
    return separator(SPMamba(**known).eval(), known, rate)


def separator(module: SPMamba, config: Mapping[str, Any], rate: int) -> Separator:
    """The separator around a module, trained or new."""
    hop, n_fft, ks = module.stft.hop, module.stft.n_fft, config["emb_ks"]
    return Separator(
        name="SPMamba",
        module=module,
        config=dict(config),
        sample_rate_hz=rate,
        sources=module.sources,
        parameters=sum(p.numel() for p in module.parameters()),
        inputs=(TensorSpec("mixture", ("batch", "samples")),),
        outputs=(TensorSpec("estimates", ("batch", module.sources, "samples")),),
        min_samples=max(n_fft // 2 + 1, (ks - 1) * hop),  # to reflect at the edges, and for one window of frames
        # The gated output of a scan has tails that one range does not hold (0.45 instead of 0.12 dB), and its step
        # sizes drive an exponential.
        keep_float=("conv", "deconv", "stft", *(n for n, _ in module.named_modules() if n.endswith(KEPT_PROJECTIONS))),
        keep_shape=("conv.0", "deconv"),
        widths=widths,
        blocks=tuple(f"blocks.{i}" for i in range(len(module.blocks))),
    )


def widths(module: SPMamba) -> list[Width]:
    """The inner channels of each Mamba block: most of the work, and nobody outside sees them."""
    outputs = ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
    found = []
    for name, part in module.named_modules():
        if isinstance(part, Mixer):
            readers = Cut(f"{name}.x_proj.weight", 1), Cut(f"{name}.out_proj.weight", 1)
            made = (Cut(f"{name}.{tensor}") for tensor in outputs)
            found.append(Width(part.D.numel(), (Cut(f"{name}.in_proj.weight", 0, 2), *made, *readers)))
    return found


def to_authors(module: SPMamba) -> dict[str, Tensor]:
    """The authors' state dict: the keys are the same."""
    return dict(module.state_dict())
