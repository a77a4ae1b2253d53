"""What modules say of their channels: which can go together, and which can be scaled.

Inner widths are for modules whose insides no tracer follows (recurrent layers, scans): the residual stream around them
stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A tensor that loses slices along an axis.

    Attributes:
        tensor: its full name.
        parts: equal blocks along the axis, each of which holds every channel (the four gates of an LSTM).
    """

    tensor: str
    axis: int = 0
    parts: int = 1

    def places(self, channels: Tensor, size: int) -> Tensor:
        """Where these of ``size`` channels lie along the axis."""
        return (torch.arange(self.parts)[:, None] * size + channels).flatten()

    def channels_first(self, tensor: Tensor, size: int) -> Tensor:
        """``(size, all values of a channel)``."""
        return tensor.unflatten(self.axis, (self.parts, size)).movedim(self.axis + 1, 0).flatten(1)


@dataclass(frozen=True)
class Width:
    """So many channels, and the tensors that hold something for each of them."""

    size: int
    cuts: tuple[Cut, ...]


def lstm_cuts(name: str) -> tuple[Cut, ...]:
    """The tensors of an LSTM that hold its hidden channels; whoever reads its output comes on top."""
    gates = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    return (*(Cut(f"{name}.{gate}", 0, 4) for gate in gates), Cut(f"{name}.weight_hh_l0", 1))


@dataclass(frozen=True)
class Balance:
    """A product whose input channels may be scaled, because whoever makes them can be scaled the other way.

    Attributes:
        reader: a convolution or linear layer, the only one that reads these channels.
        makers: (parameter, axis): all that is multiplied or added into the channels before anything but ReLU and PReLU.
    """

    reader: nn.Module
    makers: tuple[tuple[nn.Parameter, int], ...]


def scaled_by(*makers: nn.Module) -> tuple[tuple[nn.Parameter, int], ...]:
    """Weight and bias of norms, and of convolutions whose outputs are the channels."""
    return tuple((p, 0) for maker in makers for p in maker.parameters(recurse=False))
