"""What the time-frequency separators share: an exportable STFT pair and the norms of the TF-GridNet family.

Shapes: B batch, T samples, C channels, L frames, F bins; maps are ``(B, C, L, F)``.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stft(nn.Module):
    """Hann STFT and its inverse as convolutions with fixed kernels.

    The exporter makes an invalid graph of ``torch.istft``, and TensorRT's parser has no DFT; convolutions go
    everywhere. The inverse is windowed overlap-add, divided by the sum of the squared windows.
    """

    forward_kernel: Tensor
    inverse_kernel: Tensor
    window_square: Tensor

    def __init__(self, n_fft: int, hop: int):
        super().__init__()
        self.n_fft, self.hop, self.bins = n_fft, hop, n_fft // 2 + 1
        window = torch.hann_window(n_fft, dtype=torch.float64)
        angle = 2 * torch.pi / n_fft * torch.outer(torch.arange(self.bins), torch.arange(n_fft)).double()
        forward = torch.cat([angle.cos(), -angle.sin()]) * window
        # Every bin but the first and the last stands for its mirror image too.
        twice = torch.full((self.bins, 1), 2.0, dtype=torch.float64)
        twice[0] = twice[-1] = 1
        inverse = torch.cat([twice * angle.cos(), -twice * angle.sin()]) * window / n_fft
        for name, kernel in (
            ("forward_kernel", forward),
            ("inverse_kernel", inverse),
            ("window_square", window.square()[None]),
        ):
            self.register_buffer(name, kernel.float()[:, None], persistent=False)

    def analyse(self, x: Tensor) -> Tensor:
        """``(B, T')`` padded signal → ``(B, 2, L, F)``, real and imaginary."""
        y = F.conv1d(x[:, None], self.forward_kernel, stride=self.hop)
        return y.unflatten(1, (2, self.bins)).transpose(2, 3)

    def synthesise(self, spectra: Tensor) -> Tensor:
        """``(B, 2, L, F)`` → ``(B, n_fft + (L-1)·hop)``, normalised by the windows' overlap."""
        y = spectra.transpose(2, 3).flatten(1, 2)
        total = F.conv_transpose1d(y, self.inverse_kernel, stride=self.hop)
        weight = F.conv_transpose1d(torch.ones_like(y[:1, :1]), self.window_square, stride=self.hop)
        return (total / weight.clamp(min=1e-6))[:, 0]


class CausalStft(nn.Module):
    """STFT that can run hop by hop: frame k ends with sample ``(k+1)·hop - 1``.

    The inverse writes the last ``synthesis`` samples of each frame alone: its overlap-add, and so the algorithmic
    latency, is that short whatever the analysis window (dual-window STFT, arXiv 2204.09911). With ``synthesis`` =
    ``n_fft`` both windows are Hann; else the analysis window rises slowly and falls within half a synthesis window, so
    that analysis times synthesis is a Hann window of ``synthesis`` samples. The windows' overlap repeats every hop and
    is divided out in the kernel.
    """

    forward_kernel: Tensor
    inverse_kernel: Tensor

    def __init__(self, n_fft: int, hop: int, synthesis: int):
        super().__init__()
        self.n_fft, self.hop, self.synthesis, self.bins = n_fft, hop, synthesis, n_fft // 2 + 1
        analysis = torch.hann_window(n_fft, dtype=torch.float64)
        restored = analysis
        if synthesis < n_fft:
            fall, rise = synthesis // 2, n_fft - synthesis // 2
            rising = torch.hann_window(2 * rise, dtype=torch.float64)[:rise]
            falling = torch.hann_window(2 * fall, dtype=torch.float64)[fall:]
            analysis = torch.cat([rising, falling]).sqrt()
            restored = torch.hann_window(synthesis, dtype=torch.float64) / analysis[-synthesis:]
        product = analysis[-synthesis:] * restored
        overlap = F.pad(product, (0, -synthesis % hop)).unflatten(0, (-1, hop)).sum(0)
        restored = restored / overlap.repeat(-(-synthesis // hop))[:synthesis]
        angle = 2 * torch.pi / n_fft * torch.outer(torch.arange(self.bins), torch.arange(n_fft)).double()
        twice = torch.full((self.bins, 1), 2.0, dtype=torch.float64)  # a bin stands for its mirror image too
        twice[0] = twice[-1] = 1
        inverse = torch.cat([twice * angle.cos(), -twice * angle.sin()])[:, -synthesis:] * restored / n_fft
        forward = torch.cat([angle.cos(), -angle.sin()]) * analysis
        self.register_buffer("forward_kernel", forward.float()[:, None], persistent=False)
        self.register_buffer("inverse_kernel", inverse.float()[:, None], persistent=False)

    @property
    def look_ahead(self) -> int:
        """How far ahead of a sample the latest lies that it depends on: Hann windows begin with a zero."""
        return self.synthesis - 2

    def analyse(self, x: Tensor) -> Tensor:
        """``(B, n_fft + (L-1)·hop)`` → ``(B, 2, L, F)``, real and imaginary."""
        y = F.conv1d(x[:, None], self.forward_kernel, stride=self.hop)
        return y.unflatten(1, (2, self.bins)).transpose(2, 3)

    def synthesise(self, spectra: Tensor) -> Tensor:
        """``(B, 2, L, F)`` → ``(B, synthesis + (L-1)·hop)``; the first and last ``synthesis - hop`` are incomplete."""
        y = spectra.transpose(2, 3).flatten(1, 2)
        return F.conv_transpose1d(y, self.inverse_kernel, stride=self.hop)[:, 0]


class ChannelNorm(nn.Module):
    """Layer norm over channels, ``(B, C, L, F)``, statistics for each frame and bin."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.movedim(1, -1), self.gamma.shape[1:2], self.gamma.flatten(), self.beta.flatten(), self.eps)
        return y.movedim(-1, 1)


class ChannelBinNorm(nn.Module):
    """Layer norm over channels and bins, statistics for each frame."""

    def __init__(self, channels: int, bins: int, eps: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, bins))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, bins))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta = self.gamma[0, :, 0], self.beta[0, :, 0]
        return F.layer_norm(x.transpose(1, 2), gamma.shape, gamma, beta, self.eps).transpose(1, 2)


def windows(x: Tensor, size: int, hop: int) -> Tensor:
    """``(R, C, n)`` → ``(R, m, C·size)``: overlapping windows along the last axis, channel-major.

    ``n`` must be ``size + (m-1)·hop``: whole windows.
    """
    m = (x.shape[-1] - size) // hop + 1
    if hop == size and not torch.compiler.is_exporting():  # one copy instead of size + 1, but a guard on n in a trace
        return x.unflatten(2, (-1, size)).transpose(1, 2).flatten(2)
    parts = [x[..., k : k + (m - 1) * hop + 1 : hop] for k in range(size)]
    return torch.stack(parts, dim=2).flatten(1, 2).transpose(1, 2)


def projection(inputs: int, outputs: int, bins: int, eps: float) -> nn.Sequential:
    """1x1 convolution, one-slope PReLU, norm over channels and bins."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.PReLU(), ChannelBinNorm(outputs, bins, eps))


def backwards(conv: nn.ConvTranspose2d) -> nn.Conv2d:
    """The convolution that sums what a transposed one of stride 1 spreads.

    Along the bins it is padded; in time (first axis) it takes the past that it needs as part of its input.
    """
    size = cast(tuple[int, int], conv.kernel_size)
    made = nn.Conv2d(conv.in_channels, conv.out_channels, size, padding=(0, 1))
    with torch.no_grad():
        made.weight.copy_(conv.weight.transpose(0, 1).flip((2, 3)))
        cast(Tensor, made.bias).copy_(cast(Tensor, conv.bias))
    return made
