"""IIANet (arXiv 2308.08143): offline, audio-visual; separates the speaker whose mouth it is shown.

Shapes: B batch, T samples, L audio frames, V video frames (25 a second), D bottleneck channels (``out_channels``), C
audio channels (``in_channels``), W video channels (``vin_channels`` = ``vout_channels``), E embedding channels
(``vpre_channels``). Audio maps are ``(B, C, 1, L)``, video maps ``(B, W, 1, V)``, see ``uconv``.

The audio path iterates one U-Conv ``num_blocks`` times; video takes part in the first four iterations only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.base import Checkpoint, Separator, load_state, settle
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

NAMES = ("IIANet",)
WITH_VIDEO = 4  # iterations
FRAMES_PER_S = 25.0


class BottomUp(nn.Module):
    """Projection, then one depthwise convolution a level; returns the map of each level."""

    def __init__(self, inputs: int, channels: int, depth: int, kernel: int, act: nn.Module):
        super().__init__()
        self.proj_1x1 = ConvNorm(inputs, channels, 1, act=act)
        self.spp_dw = nn.ModuleList(
            ConvNorm(channels, channels, kernel, stride=1 if i == 0 else 2, groups=channels) for i in range(depth)
        )

    def balances(self) -> list[Balance]:
        scalable = isinstance(self.proj_1x1.act, nn.PReLU)
        return [Balance(cast(ConvNorm, self.spp_dw[0]).conv, scaled_by(self.proj_1x1.norm))] if scalable else []

    def forward(self, x: Tensor) -> list[Tensor]:
        return descend(self.proj_1x1(x), self.spp_dw)


class TopDown(nn.Module):
    """Fuses each level with the global map, then the levels with each other from the deepest up."""

    def __init__(self, outputs: int, channels: int, depth: int):
        super().__init__()
        self.loc_glo_fus = nn.ModuleList(Fusion(channels, 1) for _ in range(depth))
        self.last_layer = nn.ModuleList(Fusion(channels, 5) for _ in range(depth - 1))
        self.res_conv = conv(channels, outputs)

    def balances(self) -> list[Balance]:
        return [cast(Fusion, self.last_layer[0]).read_by(self.res_conv)]

    def climb(self, fused: list[Tensor]) -> Tensor:
        y = fused[-1]
        for level, layer in zip(reversed(fused[:-1]), reversed(self.last_layer), strict=True):
            y = layer(level, y)
        return pointwise(self.res_conv, y)


class AudioTopDown(TopDown):
    def forward(self, maps: list[Tensor], context: Tensor, video: list[Tensor] | None) -> Tensor:
        fused = []
        for i, (fuse, x) in enumerate(zip(self.loc_glo_fus, maps, strict=True)):
            y = fuse(x, nearest(context, x.shape[-1]))
            if video is not None:
                y = y + torch.sigmoid(nearest(video[i], x.shape[-1])) * y
            fused.append(y)
        return self.climb(fused)


class VideoTopDown(TopDown):
    def __init__(self, outputs: int, channels: int, depth: int, audio: int):
        super().__init__(outputs, channels, depth)
        self.video_res = nn.ModuleList(ConvNorm(channels, audio, 3, bias=False) for _ in range(depth))

    def forward(self, maps: list[Tensor], context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The next video map, and a gate for each level of the audio path."""
        fused = [fuse(x, context) for fuse, x in zip(self.loc_glo_fus, maps, strict=True)]
        return self.climb(fused), [res(x) for res, x in zip(self.video_res, fused, strict=True)]


class AudioGlobal(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.attn = ConvNorm(channels, channels, 3, bias=False)
        self.mlp = FeedForward(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class VideoGlobal(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.attn = ConvNorm(channels, channels, 3, bias=False)
        self.mlp = ConvNorm(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Crossing(nn.Module):
    """Audio and video gate each other at the top."""

    def __init__(self, audio: int, video: int):
        super().__init__()
        self.W_wav = ConvNorm(video, audio, 1)
        self.W_video = ConvNorm(audio, video, 1)
        self.M_wav = ConvNorm(audio, video, 3, bias=False)
        self.M_video = ConvNorm(video, audio, 5, bias=False)
        self.amlp = AudioGlobal(audio)
        self.vmlp = VideoGlobal(video)

    def forward(self, a: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        as_video, as_audio = nearest(a, v.shape[-1]), nearest(v, a.shape[-1])
        a_next = a + self.W_wav(as_audio * torch.sigmoid(self.M_wav(a)))
        v_next = v + self.W_video(as_video * torch.sigmoid(self.M_video(v)))
        return self.amlp(a_next), self.vmlp(v_next)


class Recurrent(nn.Module):
    def __init__(self, bottleneck: int, audio: int, video_in: int, video: int, depth: int, iterations: int):
        super().__init__()
        self.iterations = iterations
        self.audio_blocks = nn.ModuleList(
            [BottomUp(bottleneck, audio, depth, 5, nn.PReLU()), AudioTopDown(bottleneck, audio, depth)]
        )
        self.video_blocks = nn.ModuleList(
            [BottomUp(video_in, video, depth, 3, nn.GELU()), VideoTopDown(video_in, video, depth, audio)]
        )
        self.InterA_T = Crossing(audio, video)
        self.InterA_B_A = nn.Sequential(conv(bottleneck, bottleneck, groups=bottleneck), nn.PReLU())
        self.InterA_B_V = nn.Sequential(conv(video, video, groups=video), nn.ReLU())

    def forward(self, audio: Tensor, video: Tensor) -> Tensor:
        a, v = audio, video
        up, down = self.audio_blocks
        for i in range(self.iterations):
            if i:
                a = self.InterA_B_A(a + audio)
            maps = up(a)
            if i < WITH_VIDEO:
                if i:
                    v = self.InterA_B_V(v + video)
                video_maps = self.video_blocks[0](v)
                context, video_context = self.InterA_T(pooled_sum(maps), pooled_sum(video_maps))
                turned, gates = self.video_blocks[1](video_maps, video_context)
                v = turned + v
                a = down(maps, context, gates) + a
            else:
                a = down(maps, self.InterA_T.amlp(pooled_sum(maps)), None) + a
        return a


class IIANet(nn.Module):
    """``(B, T)`` mixture and ``(B, E, V)`` mouth embedding → ``(B, S, T)`` estimates (S is 1 as published)."""

    def __init__(
        self,
        *,
        out_channels: int,
        in_channels: int,
        vpre_channels: int,
        vin_channels: int,
        vout_channels: int,
        num_blocks: int,
        upsampling_depth: int,
        kernel_samples: int,
        num_sources: int,
    ):
        super().__init__()
        self.kernel, self.stride = kernel_samples, kernel_samples // 4
        self.sources, self.basis = num_sources, kernel_samples // 2 + 1
        half = kernel_samples // 2
        self.encoder = nn.Conv2d(1, self.basis, (1, self.kernel), (1, self.stride), (0, half), bias=False)
        self.ln = nn.GroupNorm(1, self.basis, eps=EPS)
        self.bottleneck = conv(self.basis, out_channels)
        self.pre_v = conv(vpre_channels, vin_channels, 3)
        self.sm = Recurrent(out_channels, in_channels, vin_channels, vout_channels, upsampling_depth, num_blocks)
        self.mask_net = nn.Sequential(nn.PReLU(), conv(out_channels, num_sources * self.basis))
        self.decoder = nn.ConvTranspose2d(
            self.basis * num_sources, num_sources, (1, self.kernel), (1, self.stride), (0, half), bias=False
        )

    def balances(self) -> list[Balance]:
        return [Balance(self.bottleneck, scaled_by(self.ln))]

    def forward(self, mixture: Tensor, mouth_embedding: Tensor) -> Tensor:
        samples = mixture.shape[-1]
        edge = self.kernel - self.stride
        kernels = (samples + self.stride) // self.kernel + 1  # as in TDANet
        x = F.pad(mixture[:, None, None, :], (edge, kernels * self.kernel - self.stride - samples + edge))
        spectrum = self.encoder(x)
        with sharing():
            x = self.sm(self.bottleneck(self.ln(spectrum)), self.pre_v(mouth_embedding[:, :, None, :]))
        mask = torch.relu(self.mask_net(x)).unflatten(1, (self.sources, self.basis))
        masked = (mask * spectrum[:, None]).flatten(1, 2)
        return self.decoder(masked)[:, :, 0, edge : edge + samples]


SIZED = ("encoder.weight", "bottleneck.weight", "pre_v.weight", "sm.audio_blocks.1.res_conv.weight", "decoder.weight")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state dict is one of ours."""
    return all(key in state for key in SIZED)


def build(checkpoint: Checkpoint) -> Separator:
    """Rebuild an IIANet from its checkpoint; sizes come from the shapes, the rest from the configuration."""
    state = checkpoint.state
    if absent := [k for k in SIZED if k not in state]:
        raise InputError(f"{checkpoint.path} holds no IIANet: {', '.join(absent)} missing; check name and file")
    sizes = {
        "out_channels": state["bottleneck.weight"].shape[0],
        "in_channels": state["sm.audio_blocks.1.res_conv.weight"].shape[1],
        "vpre_channels": state["pre_v.weight"].shape[1],
        "vin_channels": state["pre_v.weight"].shape[0],
        "vout_channels": state["sm.video_blocks.1.res_conv.weight"].shape[1],
        "upsampling_depth": len({k.split(".")[4] for k in state if k.startswith("sm.audio_blocks.0.spp_dw.")}),
        "num_sources": state["decoder.weight"].shape[1],
    }
    config = settle(checkpoint, sizes, ("num_blocks", "enc_kernel_size"))
    kernel, rate = state["encoder.weight"].shape[-1], checkpoint.sample_rate_hz
    if rate is None or "num_blocks" not in config:
        raise InputError(f"{checkpoint.path} does not say its sample rate and iterations; give its conf.yml")
    if "enc_kernel_size" in config and config["enc_kernel_size"] * rate // 1000 != kernel:
        raise InputError(
            f"configuration says enc_kernel_size = {config['enc_kernel_size']} ms at {rate} Hz, but the encoder in"
            f" {checkpoint.path} has {kernel} samples; the checkpoint was trained at another sample rate"
        )
    if kernel % 4:
        raise InputError(f"encoder kernel of {kernel} samples in {checkpoint.path} is no multiple of 4")
    module = IIANet(**sizes, num_blocks=config["num_blocks"], kernel_samples=kernel)
    load_state(module, state, checkpoint.path, lambda _: False)
    return separator(module.eval(), {**config, "enc_kernel_size": kernel * 1000 / rate}, rate)


def create(config: Mapping[str, Any], rate: int) -> Separator:
    """A new IIANet with random weights; ``config`` as the authors' ``audionet_config``."""
    sizes = {k: v for k, v in config.items() if k != "enc_kernel_size"}
    return separator(IIANet(**sizes, kernel_samples=config["enc_kernel_size"] * rate // 1000).eval(), config, rate)


def separator(module: IIANet, config: Mapping[str, Any], rate: int) -> Separator:
    """The separator around a module, trained or new."""
    return Separator(
        name="IIANet",
        module=module,
        config=dict(config),
        sample_rate_hz=rate,
        sources=module.sources,
        parameters=sum(p.numel() for p in module.parameters()),
        inputs=(
            TensorSpec("mixture", ("batch", "samples")),
            TensorSpec("mouth_embedding", ("batch", module.pre_v.in_channels, "frames")),
        ),
        outputs=(TensorSpec("estimates", ("batch", module.sources, "samples")),),
        frames_per_s=FRAMES_PER_S,
        keep_float=("encoder", "decoder"),
        blocks=("sm.audio_blocks.1",),
        flat_maps=True,
        keep_shape=(
            *("encoder", "mask_net.1", "decoder"),
            *("bottleneck", "sm.audio_blocks.1.res_conv"),  # the residual streams, as in TDANet
            *("pre_v", "sm.video_blocks.1.res_conv"),
        ),
    )


def to_authors(module: IIANet) -> dict[str, Tensor]:
    """The authors' state dict: the same keys, 1-D kernels."""
    return {k: v.squeeze(2) if v.ndim == 4 else v for k, v in module.state_dict().items()}
