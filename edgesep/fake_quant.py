"""Training with INT8 rounding: convolutions and linear layers compute with what eight bits keep of weights and inputs.

The weights that are trained stay in float. Ranges of inputs are those of the calibration mixtures, a range for every
call of a layer, as in the Q/DQ graph; gradients pass through the rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Rounded(nn.Module):
    """A weight through int8, a range for each of its rows."""

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / 127
        zero = torch.zeros(len(step), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, step, zero, 0, -127, 127)


class RoundedProducts:
    """Rounds the products of a module until it is closed.

    Args:
        kept: submodules that stay in float.
    """

    def __init__(self, module: nn.Module, kept: Iterable[str]):
        self.module, self.ranges = module, dict[tuple[str, int], tuple[float, float]]()
        self.calls: Counter[str] = Counter()
        self.observing = False
        self.layers = {
            name: part
            for name, part in module.named_modules()
            if isinstance(part, nn.Conv2d | nn.Linear) and not any(name == k or name.startswith(f"{k}.") for k in kept)
        }
        self._hooks = [module.register_forward_pre_hook(lambda *_: self.calls.clear())]
        for name, part in self.layers.items():
            self._hooks.append(part.register_forward_pre_hook(self._hook(name)))
            parametrize.register_parametrization(part, "weight", Rounded())

    def _hook(self, name: str) -> Any:
        def round_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            call = name, self.calls[name]
            self.calls[name] += 1
            x = inputs[0]
            if self.observing:
                low, high = self.ranges.get(call, (0.0, 0.0))
                self.ranges[call] = min(low, float(x.min())), max(high, float(x.max()))
                return None
            low, high = self.ranges[call]
            step = max((high - low) / 255, 1e-12)
            return (torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, 255), *inputs[1:])

        return round_input

    @torch.no_grad()
    def calibrate(self, inputs: Iterable[tuple[Tensor, ...]]) -> None:
        """Take the ranges from these inputs."""
        self.observing = True
        self.module.eval()
        for given in inputs:
            self.module(*given)
        self.observing = False

    def close(self) -> None:
        """Back to float, with the weights as trained."""
        for hook in self._hooks:
            hook.remove()
        for part in self.layers.values():
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
