"""What TDANet and IIANet share: convolutions over frames, global layer norm, nearest resampling, gated fusion.

Shapes: feature maps are ``(B, C, 1, L)``, B batch, C channels, L frames: every convolution is a Conv2d with a unit
axis, because quantizers and runtimes treat Conv2d as a first-class operator and Conv1d as an afterthought.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.ops import conv_norm_torch
from edgesep.separators.widths import Balance, scaled_by

EPS = 1e-8


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 1-D convolution over frames, "same" padding, as Conv2d over ``(B, channels, 1, L)``."""
    return nn.Conv2d(
        inputs, outputs, (1, kernel), stride=(1, stride), padding=(0, (kernel - 1) // 2), groups=groups, bias=bias
    )


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)`` of kernel 1; in training on one thread torch's convolutions of size 1 are slow, products are not."""
    return conv_norm_torch.pointwise(x, conv) if conv_norm_torch.wanted(conv, x) else conv(x)


class ConvNorm(nn.Module):
    """Convolution, then global layer norm over channels and frames, then an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        act: nn.Module | None = None,
    ):
        super().__init__()
        self.conv = conv(inputs, outputs, kernel, stride, groups, bias)
        self.norm = nn.GroupNorm(1, outputs, eps=EPS)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        fits = conv.kernel_size[1] == 1 if conv.groups == 1 else conv.groups == conv.in_channels == conv.out_channels
        if fits and conv_norm_torch.wanted(self, x):
            return conv_norm_torch.conv_norm(x, conv, self.norm, self.act)
        return self.act(self.norm(conv(x)))


_SHARED: ContextVar[dict[str, Any] | None] = ContextVar("shared", default=None)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Within it, what depends on lengths alone is traced once and not again in every iteration."""
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` gave for this key before; lengths are told apart by how they follow from the input's."""
    known = _SHARED.get()
    if known is None:
        return make()
    name = " ".join(map(str, key))
    if name not in known:
        known[name] = make()
    return known[name]


def nearest(x: Tensor, frames: int) -> Tensor:
    """Nearest resampling of ``(B, C, 1, l)`` to ``frames`` frames."""
    if torch.compiler.is_exporting():
        index = shared(("nearest", x.shape[-1], frames), lambda: nearest_index(x.shape[-1], frames, x))
        return x.index_select(-1, index)
    return F.interpolate(x, size=(1, frames), mode="nearest")


def nearest_index(length: int, frames: int, like: Tensor) -> Tensor:
    """Which frame ``F.interpolate`` takes: floor of a float32 product.

    Where the exact product is an integer, its rounding decides between two frames, and ONNX's Resize decides
    otherwise: for one length in eight that costs an export 70 dB. So the graph computes torch's own index.
    """
    at = torch.arange(frames, device=like.device).to(torch.float32) * float_ratio(length, frames, like)
    return at.floor().long().clamp(max=length - 1)


def float_ratio(length: int, frames: int, like: Tensor) -> Tensor:
    """``length / frames`` rounded once to float32, whatever the runtime makes of a float division.

    OpenVINO multiplies by the reciprocal, which is off in the last bit. Long division in base 256 needs integers
    below 2**24 only (up to 65,535 frames), and the digits' sum is rounded in its last addition alone.
    """
    divisor = torch.scalar_tensor(frames, dtype=torch.int64, device=like.device)
    rest = torch.scalar_tensor(length, dtype=torch.int64, device=like.device)
    parts = []
    for digit in range(5):
        quotient = torch.div(rest, divisor, rounding_mode="trunc")
        rest = (rest - quotient * divisor) * 256
        parts.append(quotient.to(torch.float32) * 256.0**-digit)
    # A remainder beyond the last digit breaks a tie of the rounding upwards.
    beyond = (rest > 0).to(torch.float32) * 2.0**-34
    return (parts[0] + parts[1] + parts[2]) + (parts[3] + parts[4] + beyond)


class Windows:
    """Adaptive average pooling to a common length, in a form that exports with dynamic lengths.

    The exporter freezes the length of ``adaptive_avg_pool``. Output i is the mean over
    ``[floor(i·l/m), ceil((i+1)·l/m))``, and because every level halves the one above (rounded up), a window never
    holds more than ``2**levels + 1`` frames: gather that many and weight them.
    """

    def __init__(self, length: int, pooled: int, levels: int, like: Tensor):
        span = torch.arange(2**levels + 1, device=like.device)
        i = torch.arange(pooled, device=like.device)
        start = (i * length) // pooled
        end = ((i + 1) * length + pooled - 1) // pooled  # OpenVINO folds quotients of negative integers wrongly
        at = start[:, None] + span
        self.index = at.clamp(max=length - 1).flatten()
        self.weight = (at < end[:, None]).to(like.dtype) / (end - start)[:, None].to(like.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        taken = x.index_select(-1, self.index).unflatten(-1, self.weight.shape)
        return (taken * self.weight).sum(-1)


def pooled_sum(maps: list[Tensor]) -> Tensor:
    """Sum of all levels, averaged down to the deepest; level i has been halved i times."""
    total = maps[-1]
    frames = total.shape[-1]
    for i, x in enumerate(maps[:-1]):
        if torch.compiler.is_exporting():
            make = functools.partial(Windows, x.shape[-1], frames, len(maps) - 1 - i, x)
            total = total + shared(("windows", x.shape[-1], frames), make)(x)
        else:
            total = total + F.adaptive_avg_pool2d(x, (1, frames))
    return total


def descend(x: Tensor, levels: Iterable[nn.Module]) -> list[Tensor]:
    """The map after each level."""
    maps = []
    for level in levels:
        x = level(x)
        maps.append(x)
    return maps


class FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = ConvNorm(channels, hidden, 1, bias=False)
        self.dwconv = conv(hidden, hidden, 5, groups=hidden)
        self.fc2 = ConvNorm(hidden, channels, 1, bias=False)

    def balances(self) -> list[Balance]:
        return [Balance(self.dwconv, scaled_by(self.fc1.norm)), Balance(self.fc2.conv, scaled_by(self.dwconv))]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.dwconv(self.fc1(x))))


class Fusion(nn.Module):
    """Local map, gated and shifted by a map of another rate that is resampled to it ("LA" in the paper)."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.local_embedding = ConvNorm(channels, channels, kernel, groups=channels, bias=False)
        self.global_embedding = ConvNorm(channels, channels, kernel, groups=channels, bias=False)
        self.global_act = ConvNorm(channels, channels, kernel, groups=channels, bias=False)

    def read_by(self, reader: nn.Module) -> Balance:
        """Its output's channels, where one product reads them."""
        return Balance(reader, scaled_by(self.local_embedding.norm, self.global_embedding.norm))

    def forward(self, local: Tensor, context: Tensor) -> Tensor:
        frames = local.shape[-1]
        if conv_norm_torch.wanted(self, context):
            parts = self.local_embedding(local), self.global_act(context), self.global_embedding(context)
            return conv_norm_torch.gated(*parts)
        gate = nearest(torch.sigmoid(self.global_act(context)), frames)
        return self.local_embedding(local) * gate + nearest(self.global_embedding(context), frames)
