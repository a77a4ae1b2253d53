"""The lip front-end of IIANet: mouth crops to mouth embedding (Conv3d, then ResNet-18 for each frame).

Shapes: B batch, V video frames (25 a second), E embedding channels (512 as published); crops ``(B, 1, V, 88, 88)``
grey → embedding ``(B, E, V)``. It looks two frames (80 ms) ahead. Not a separator by itself; it is exported, quantized
and counted as a graph of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from edgesep.separators.base import Checkpoint, Separator, load_state
from edgesep.spec import InputError, TensorSpec

NAMES = ("ResNetVideoModel",)
CROP, FRAMES_PER_S = 88, 25
STEM = 64  # channels of the first convolution as published; the last layer has eight times as many
AHEAD_FRAMES = 2  # half of the 5-frame kernel


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.PReLU(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class Trunk(nn.Module):
    def __init__(self, stem: int):
        super().__init__()
        widths = (stem, stem, 2 * stem, 4 * stem, 8 * stem)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            first = BasicBlock(inputs, outputs, 1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", nn.Sequential(first, BasicBlock(outputs, outputs, 1)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


class LipFrontEnd(nn.Module):
    """``(B, 1, V, 88, 88)`` → ``(B, 8·stem, V)``."""

    def __init__(self, stem: int = STEM):
        super().__init__()
        self.embedding = 8 * stem
        self.trunk = Trunk(stem)
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, stem, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False), nn.BatchNorm3d(stem), nn.PReLU(stem)
        )

    def forward(self, mouth_crops: Tensor) -> Tensor:
        batch, _, frames = mouth_crops.shape[:3]
        x = self.frontend3D(mouth_crops).transpose(1, 2).flatten(0, 1)
        # The authors pool in 3-D with a depth of 1: for each frame the same as in 2-D.
        x = self.trunk(F.max_pool2d(x, 3, 2, 1))
        return x.unflatten(0, (batch, frames)).transpose(1, 2)


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state dict is one of ours."""
    return "frontend3D.0.weight" in state and "trunk.layer4.1.conv2.weight" in state


def build(checkpoint: Checkpoint) -> Separator:
    """Rebuild the front-end; keys of a word classifier (``tcn``) trained with it are not used."""
    if not recognises(checkpoint.state):
        raise InputError(f"{checkpoint.path} holds no lip front-end: frontend3D.* or trunk.* is missing")
    module = LipFrontEnd(checkpoint.state["frontend3D.0.weight"].shape[0])
    load_state(module, checkpoint.state, checkpoint.path, lambda k: "tcn" in k)
    return separator(module.eval())


def create(config: Mapping[str, Any], rate: int) -> Separator:
    """A new front-end with random weights; ``config`` may name ``stem``, its rate is fixed."""
    del rate
    return separator(LipFrontEnd(config.get("stem", STEM)).eval())


def separator(module: LipFrontEnd) -> Separator:
    """The graph's description; its "samples" are video frames."""
    return Separator(
        name="ResNetVideoModel",
        module=module,
        config={},
        sample_rate_hz=FRAMES_PER_S,
        sources=1,
        parameters=sum(p.numel() for p in module.parameters()),
        inputs=(TensorSpec("mouth_crops", ("batch", 1, "frames", CROP, CROP)),),
        outputs=(TensorSpec("mouth_embedding", ("batch", module.embedding, "frames")),),
        frames_per_s=FRAMES_PER_S,
        algorithmic_latency_ms=1000 * AHEAD_FRAMES / FRAMES_PER_S,
        keep_float=("frontend3D",),
        keep_shape=("trunk.layer4.1.conv2",),
    )


def to_authors(module: LipFrontEnd) -> dict[str, Tensor]:
    """The authors' state dict: the keys are the same."""
    return dict(module.state_dict())
