"""TDANet (arXiv 2209.15200): offline, time domain, for the authors' classes ``TDANet`` and ``TDANetBest``.

Shapes: B batch, T samples, K encoder kernel in samples, L frames (stride K/4), N = K/2 + 1 basis signals,
D bottleneck channels (``out_channels``), C U-Conv channels (``in_channels``), S sources. Feature maps are
``(B, channels, 1, L)``, see ``uconv``; the weights are the authors', with the unit axis added.

Two facts of the released forward shape this file:

* Its attention runs over the *batch* axis (``nn.MultiheadAttention`` without ``batch_first`` is fed
  ``(B, L, C)``), so for one mixture every attention weight is exactly 1 and the layer is the linear map
  ``out_proj(v_proj(x))``. ``attention="batch"`` computes that for each mixture on its own; the query and key
  weights are dead. ``attention="time"`` is the attention over frames that the paper describes; the project's own
  checkpoints are trained with it.
* The deepest fused map is never read, so it is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.base import Checkpoint, Separator, load_state, settle, sharing_copy
from edgesep.separators.uconv import (
    EPS,
    ConvNorm,
    FeedForward,
    Fusion,
    conv,
    descend,
    nearest,
    pointwise,
    pooled_sum,
    sharing,
)
from edgesep.separators.widths import Balance, scaled_by
from edgesep.spec import InputError, TensorSpec

NAMES = ("TDANet", "TDANetBest")
HEADS = 8


class Positions(nn.Module):
    """Adds sine and cosine positions to ``(B, 1, L, C)``.

    The authors store a table of 10,000 rows (20 MB at the published size). It is sin/cos of position x rate, so the
    graph computes the few rows it needs from one vector.
    """

    rate: Tensor
    is_sine: Tensor

    def __init__(self, channels: int):
        super().__init__()
        rate = torch.exp(torch.arange(0, channels, 2, dtype=torch.float32) * -(math.log(10000.0) / channels))
        self.register_buffer("rate", rate.repeat_interleave(2)[:channels].clone())
        self.register_buffer("is_sine", torch.arange(channels) % 2 == 0)

    @property
    def channels(self) -> int:
        return self.rate.numel()

    def keep_channels(self, keep: list[int]) -> None:
        """Follow a pruning of the channels around this module."""
        self.rate, self.is_sine = self.rate[keep], self.is_sine[keep]

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device).to(torch.float32)[:, None] * self.rate
        return x + torch.where(self.is_sine, at.sin(), at.cos())


class SelfAttention(nn.Module):
    """Norm, positions, attention (see the module's note on its axis), residual *within* the attention, norm."""

    def __init__(self, channels: int, attention: Literal["batch", "time"]):
        super().__init__()
        self.heads = HEADS
        self.over_time = attention == "time"
        self.positions = Positions(channels)
        self.attn_in_norm = nn.LayerNorm(channels)
        if self.over_time:
            self.query = conv(channels, channels)
            self.key = conv(channels, channels)
        self.value = conv(channels, channels)
        self.out_proj: nn.Module = conv(channels, channels)
        self.norm = nn.LayerNorm(channels)

    def balances(self) -> list[Balance]:
        """Attention weighs frames, so each channel of the values passes through it by itself."""
        return [Balance(self.out_proj, scaled_by(self.value))] if isinstance(self.out_proj, nn.Conv2d) else []

    def lower(self) -> bool:
        """As released, both projections follow each other: one product."""
        after = self.out_proj
        if self.over_time or not isinstance(after, nn.Conv2d):
            return False
        value, out = (c.weight.detach().double().flatten(1) for c in (self.value, after))
        merged = conv(value.shape[1], out.shape[0])
        with torch.no_grad():
            merged.weight.copy_((out @ value)[:, :, None, None])
            shifted = out @ cast(Tensor, self.value.bias).double() + cast(Tensor, after.bias).double()
            cast(Tensor, merged.bias).copy_(shifted)
        self.value, self.out_proj = merged, nn.Identity()
        return True

    def forward(self, x: Tensor) -> Tensor:
        y = self.positions(self.attn_in_norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        v = self.value(y)
        if self.over_time:
            q, k, v = (z.squeeze(2).unflatten(1, (self.heads, -1)) for z in (self.query(y), self.key(y), v))
            scale = q.shape[2] ** -0.5  # heads are (B, heads, C/heads, L)
            weight = torch.softmax((q * scale).transpose(2, 3) @ k, dim=-1)
            v = (v @ weight.transpose(2, 3)).flatten(1, 2).unsqueeze(2)
        y = self.out_proj(v)
        y = y + y  # the released residual adds the attention's own output, not its input
        return self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalAttention(nn.Module):
    def __init__(self, channels: int, attention: Literal["batch", "time"]):
        super().__init__()
        self.attn = SelfAttention(channels, attention)
        self.mlp = FeedForward(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class UConv(nn.Module):
    def __init__(
        self, bottleneck: int, channels: int, depth: int, fuse_global: bool, attention: Literal["batch", "time"]
    ):
        super().__init__()
        self.depth = depth
        self.proj_1x1 = ConvNorm(bottleneck, channels, 1, act=nn.PReLU())
        self.spp_dw = nn.ModuleList(
            ConvNorm(channels, channels, 5, stride=1 if i == 0 else 2, groups=channels) for i in range(depth)
        )
        # Level depth-1 of the released fusion is dead, except at depth 2, where index -1 reads it.
        self.fused_levels = depth if depth == 2 else depth - 1
        if fuse_global:
            self.loc_glo_fus = nn.ModuleList(Fusion(channels, 1) for _ in range(self.fused_levels))
        self.fuse_global = fuse_global
        self.globalatt = GlobalAttention(channels, attention)
        self.last_layer = nn.ModuleList(Fusion(channels, 5) for _ in range(depth - 1))
        self.res_conv = conv(channels, bottleneck)

    def balances(self) -> list[Balance]:
        first = cast(ConvNorm, self.spp_dw[0])
        return [
            cast(Fusion, self.last_layer[0]).read_by(self.res_conv),
            Balance(first.conv, scaled_by(self.proj_1x1.norm)),
        ]

    def forward(self, x: Tensor) -> Tensor:
        maps = descend(self.proj_1x1(x), self.spp_dw)
        context = self.globalatt(pooled_sum(maps))
        if self.fuse_global:
            fused = [f(m, context) for f, m in zip(self.loc_glo_fus, maps, strict=False)]
        else:
            fused = [nearest(context, m.shape[-1]) + m for m in maps[: self.fused_levels]]
        top = self.depth - 2
        y = self.last_layer[top](fused[top], fused[top - 1])
        for i in range(top - 1, -1, -1):
            y = self.last_layer[i](fused[i], y)
        return pointwise(self.res_conv, y) + x


class Recurrent(nn.Module):
    """One U-Conv block, applied ``iterations`` times, fed with the mixture again each time."""

    def __init__(self, unet: UConv, bottleneck: int, iterations: int):
        super().__init__()
        self.unet = unet
        self.iterations = iterations
        self.concat_block = nn.Sequential(conv(bottleneck, bottleneck, groups=bottleneck), nn.PReLU())

    def unroll(self) -> None:
        """Give every iteration modules of its own around the shared parameters (see ``separators.base.unrolled``)."""
        self.unets = nn.ModuleList(sharing_copy(self.unet) for _ in range(self.iterations))
        self.concat_blocks = nn.ModuleList(sharing_copy(self.concat_block) for _ in range(1, self.iterations))

    def forward(self, mixture: Tensor) -> Tensor:
        unets = getattr(self, "unets", [self.unet] * self.iterations)
        concat_blocks = getattr(self, "concat_blocks", [self.concat_block] * (self.iterations - 1))
        x = unets[0](mixture)
        for concat, unet in zip(concat_blocks, unets[1:], strict=True):
            x = unet(concat(mixture + x))
        return x


class TDANet(nn.Module):
    """``(B, T)`` float32 waveform → ``(B, S, T)`` estimates. Any T ≥ 1."""

    def __init__(
        self,
        *,
        out_channels: int,
        in_channels: int,
        num_blocks: int,
        upsampling_depth: int,
        kernel_samples: int,
        num_sources: int,
        fuse_global: bool,
        attention: Literal["batch", "time"],
    ):
        super().__init__()
        self.kernel, self.stride = kernel_samples, kernel_samples // 4
        self.sources, self.basis = num_sources, kernel_samples // 2 + 1
        half = kernel_samples // 2
        self.encoder = nn.Conv2d(1, self.basis, (1, self.kernel), (1, self.stride), (0, half), bias=False)
        self.ln = nn.GroupNorm(1, self.basis, eps=EPS)
        self.bottleneck = conv(self.basis, out_channels)
        unet = UConv(out_channels, in_channels, upsampling_depth, fuse_global, attention)
        self.sm = Recurrent(unet, out_channels, num_blocks)
        self.mask_net = nn.Sequential(nn.PReLU(), conv(out_channels, num_sources * self.basis))
        self.decoder = nn.ConvTranspose2d(
            self.basis * num_sources, num_sources, (1, self.kernel), (1, self.stride), (0, half), bias=False
        )
        nn.init.xavier_uniform_(self.encoder.weight)
        nn.init.xavier_uniform_(self.decoder.weight)

    def balances(self) -> list[Balance]:
        return [Balance(self.bottleneck, scaled_by(self.ln))]

    def forward(self, mixture: Tensor) -> Tensor:
        samples = mixture.shape[-1]
        edge = self.kernel - self.stride
        # The authors pad to a stride less than a multiple of the kernel, then by ``edge`` on both sides. Written with
        # the number of kernels, the frame count becomes 4·kernels + 6, which symbolic shape engines can follow.
        kernels = (samples + self.stride) // self.kernel + 1
        x = F.pad(mixture[:, None, None, :], (edge, kernels * self.kernel - self.stride - samples + edge))
        spectrum = self.encoder(x)  # (B, N, 1, L)
        with sharing():
            x = self.mask_net(self.sm(self.bottleneck(self.ln(spectrum))))
        mask = torch.relu(x).unflatten(1, (self.sources, self.basis))
        masked = (mask * spectrum[:, None]).flatten(1, 2)
        return self.decoder(masked)[:, :, 0, edge : edge + samples]


# -- from and to the authors' files ----------------------------------------------------------------------------------

ATTN = "sm.unet.globalatt.attn."
#: weights whose shapes give the sizes
SIZED = ("encoder.weight", "bottleneck.weight", "sm.unet.res_conv.weight", "decoder.weight")
NORMS = {"gamma": "weight", "beta": "bias"}  # TDANetBest's own norm module → GroupNorm


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state dict is one of ours."""
    return all(key in state for key in SIZED)


def build(checkpoint: Checkpoint) -> Separator:
    """Rebuild a TDANet from its checkpoint; sizes come from the shapes, the rest from the configuration."""
    state = checkpoint.state
    if absent := [k for k in SIZED if k not in state]:
        raise InputError(f"{checkpoint.path} holds no TDANet: {', '.join(absent)} missing; check name and file")
    sizes = {
        "out_channels": state["bottleneck.weight"].shape[0],
        "in_channels": state["sm.unet.res_conv.weight"].shape[1],
        "upsampling_depth": len({k.split(".")[3] for k in state if k.startswith("sm.unet.spp_dw.")}),
        "num_sources": state["decoder.weight"].shape[1],
    }
    config = settle(checkpoint, sizes, ("num_blocks", "enc_kernel_size", "attention"))
    kernel = state["encoder.weight"].shape[-1]
    rate = checkpoint.sample_rate_hz
    if rate is None and "enc_kernel_size" in config:
        rate = round(kernel * 1000 / config["enc_kernel_size"])
    if rate is None:
        raise InputError(
            f"{checkpoint.path} does not say its sample rate; give its conf.yml (datamodule.data_config.sample_rate)"
        )
    if "num_blocks" not in config:
        raise InputError(f"{checkpoint.path} does not say its number of iterations; give its conf.yml (num_blocks)")
    if "enc_kernel_size" in config and config["enc_kernel_size"] * rate // 1000 != kernel:
        raise InputError(
            f"configuration says enc_kernel_size = {config['enc_kernel_size']} ms at {rate} Hz"
            f" ({config['enc_kernel_size'] * rate // 1000} samples), but the encoder in {checkpoint.path} has {kernel};"
            " the checkpoint was trained at another sample rate"
        )
    if kernel % 4:
        raise InputError(f"encoder kernel of {kernel} samples in {checkpoint.path} is no multiple of 4")
    if sizes["upsampling_depth"] < 2:
        raise InputError(f"{checkpoint.path} has {sizes['upsampling_depth']} level(s), TDANet needs at least 2")
    attention = config.get("attention", "batch")
    if attention not in ("batch", "time"):
        raise InputError(f"attention = {attention!r} is not known, use 'batch' (as released) or 'time'")
    best = any(".loc_glo_fus." in k for k in state)
    module = TDANet(
        **sizes,
        num_blocks=config["num_blocks"],
        kernel_samples=kernel,
        fuse_global=best,
        attention=attention,
    )
    unused = f"sm.unet.loc_glo_fus.{module.sm.unet.fused_levels}."
    load_state(
        module, from_authors(state, attention), checkpoint.path, lambda k: k.endswith(".pe") or k.startswith(unused)
    )
    return separator(module.eval(), {**config, "enc_kernel_size": kernel * 1000 / rate}, rate, checkpoint_size(state))


def separator(module: TDANet, config: dict[str, Any], rate: int, parameters: int) -> Separator:
    """The separator around a module, trained or new."""
    heads = ("query", "key", "value") if module.sm.unet.globalatt.attn.over_time else ()
    return Separator(
        name=NAMES[module.sm.unet.fuse_global],
        module=module,
        config=config,
        sample_rate_hz=rate,
        sources=module.sources,
        parameters=parameters,
        inputs=(TensorSpec("mixture", ("batch", "samples")),),
        outputs=(TensorSpec("estimates", ("batch", module.sources, "samples")),),
        keep_float=("encoder", "decoder"),
        blocks=("sm.unet",),
        flat_maps=True,
        # Basis x mask and heads x head size are fixed by a reshape each. The residual stream stays because every
        # iteration lives on it: cut too, 30 % of the work costs 7 dB before recovery instead of 1.5.
        keep_shape=(
            "encoder",
            "bottleneck",
            "sm.unet.res_conv",
            "mask_net.1",
            "decoder",
            *(f"{ATTN}{p}" for p in heads),
        ),
    )


def create(config: Mapping[str, Any], rate: int) -> Separator:
    """A new TDANet with random weights, attention over time; ``config`` as the authors' ``audionet_config``."""
    module = TDANet(
        out_channels=config["out_channels"],
        in_channels=config["in_channels"],
        num_blocks=config["num_blocks"],
        upsampling_depth=config["upsampling_depth"],
        kernel_samples=config["enc_kernel_size"] * rate // 1000,
        num_sources=config["num_sources"],
        fuse_global=False,
        attention="time",
    )
    parameters = sum(p.numel() for p in module.parameters())
    return separator(module.eval(), {**config, "attention": "time"}, rate, parameters)


def checkpoint_size(state: Mapping[str, Tensor]) -> int:
    return sum(v.numel() for k, v in state.items() if not k.endswith(".pe"))


def from_authors(state: Mapping[str, Tensor], attention: str) -> dict[str, Tensor]:
    """The authors' keys → this module's: norm names, and the packed attention projection split."""
    channels = state["sm.unet.res_conv.weight"].shape[1]
    out = {f"{ATTN}positions.{k}": v for k, v in Positions(channels).state_dict().items()}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        if key.startswith(ATTN + "attn.in_proj_"):
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                if part == "value" or attention == "time":
                    out[f"{ATTN}{part}.{leaf.removeprefix('in_proj_')}"] = piece
        elif key.startswith(ATTN + "attn.out_proj."):
            out[f"{ATTN}out_proj.{leaf}"] = value
        else:
            out[f"{stem}.{NORMS.get(leaf, leaf)}".lstrip(".")] = value
    return out


def to_authors(module: TDANet) -> dict[str, Tensor]:
    """The inverse of ``from_authors`` for modules with attention over time (those this project trains)."""
    out, packed = {}, {}
    for key, value in module.state_dict().items():
        plain = value.squeeze(2) if value.ndim == 4 else value
        stem, _, leaf = key.rpartition(".")
        part = stem.removeprefix(ATTN)
        if part == "positions":
            continue
        if part in ("query", "key", "value"):
            packed[part, leaf] = plain
        elif part == "out_proj":
            out[f"{ATTN}attn.out_proj.{leaf}"] = plain.squeeze(-1) if plain.ndim == 3 else plain
        else:
            out[key] = plain
    for leaf in ("weight", "bias"):
        pieces = [packed[part, leaf] for part in ("query", "key", "value")]
        joined = torch.cat(pieces)
        out[f"{ATTN}attn.in_proj_{leaf}"] = joined.squeeze(-1) if joined.ndim == 3 else joined
    return out
