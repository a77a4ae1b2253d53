"""Equalization: channels that share one INT8 range get ranges of one size, the same function.

A product's input has one range for all its channels, so a channel that is a hundred times quieter than the loudest
keeps one or two bits. Where whoever makes the channels can be scaled (a norm's gain, a depthwise kernel, through ReLU
and PReLU), each is divided by a factor and the product's weights are multiplied by it (as SmoothQuant does for language
models, arXiv 2211.10438). How far to go is tried for each product, on what it saw of the calibration mixtures.

Modules name the products (``balances``).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edgesep.passes.base import Context, PassResult
from edgesep.passes.lower import output_snr_db
from edgesep.separators.base import Separator
from edgesep.separators.widths import Balance
from edgesep.spec import BuildError, InputError

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # 0: as it is; 1: all channels of one range
COLUMNS = 512  # positions of a call that are looked at
LEAST_DB = 90.0


@dataclass(frozen=True)
class Equalize:
    """Scale channels for the sake of INT8.

    Attributes:
        mixtures: how many calibration mixtures are looked at.
    """

    mixtures: int = 8

    stage: ClassVar[str] = "lower"

    def __post_init__(self) -> None:
        if self.mixtures < 1:
            raise InputError(f"equalize.mixtures is {self.mixtures}, at least one is needed")

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Equalize a copy.

        Raises:
            BuildError: the output differs from the given separator's.
        """
        module = copy.deepcopy(separator.module)
        named = (getattr(part, "balances", None) for part in module.modules())
        balances: list[Balance] = [b for of_module in named if callable(of_module) for b in of_module()]
        if not balances or separator.stream is not None:
            return PassResult(separator, False, {"products": 0})
        seen: dict[int, list[Tensor]] = defaultdict(list)
        hooks = [b.reader.register_forward_pre_hook(_keeping(seen[i])) for i, b in enumerate(balances)]
        count = min(self.mixtures, len(context.calibration))
        with torch.no_grad():
            for n in range(count):
                context.tick(n, count, "equalizing: looking at calibration mixtures")
                given = context.original.tensors(context.calibration[n].inputs())
                module(*(torch.from_numpy(given[s.name]) for s in separator.inputs))
        for hook in hooks:
            hook.remove()
        gained = [_apply(b, seen[i]) for i, b in enumerate(balances)]
        made = replace(separator, module=module.eval())
        snr_db = output_snr_db(made, separator)
        if snr_db < LEAST_DB:
            raise BuildError(
                f"equalization changed {separator.name}: output SNR {snr_db:.1f} dB, required {LEAST_DB:g}"
            )
        report: dict[str, Any] = {
            "products": len(balances),
            "gained_db": [round(g, 2) for g in gained],
            "output_snr_db": round(min(snr_db, 999.0), 1),
        }
        return PassResult(made, True, report)


def _keeping(found: list[Tensor]) -> Any:
    """A hook that keeps some columns of what a product is given, ``(positions, channels)``."""

    def keep(reader: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        rows = x.movedim(1, -1).flatten(0, -2) if isinstance(reader, nn.Conv2d) else x.flatten(0, -2)
        largest = rows[rows.abs().amax(1).topk(min(64, len(rows))).indices]
        found.append(torch.cat([rows[:: max(1, len(rows) // COLUMNS)], largest]).clone())

    return keep


@torch.no_grad()
def _apply(balance: Balance, calls: list[Tensor]) -> float:
    """Scale one product as suits it best; returns by how many dB its noise falls."""
    rows = torch.cat(calls)
    reach = rows.abs().amax(0).clamp(min=1e-6)
    reach = (reach / reach.max()).clamp(min=1e-3)
    weight = balance.reader.get_parameter("weight")
    depthwise = getattr(balance.reader, "groups", 1) > 1
    flat = weight.flatten(1)
    noises = []
    for exponent in EXPONENTS:
        scale = reach**exponent
        if depthwise:  # every kernel has a range of its own: scaling costs it nothing
            noises.append(float(sum(((_rounded(c / scale) * scale - c).square().sum()) for c in calls)))
            continue
        taps = flat.shape[1] // len(scale)
        quantized = _rounded_rows(flat * scale.repeat_interleave(taps)) / scale.repeat_interleave(taps)
        if taps > 1:  # judged by its inputs and weights apart: rows are single positions
            lost = float(sum(((_rounded(c / scale) * scale - c).square().sum()) for c in calls))
            noises.append(lost * float(quantized.square().mean()) + float((quantized - flat).square().mean()))
            continue
        wrong = 0.0
        for c in calls:
            wrong += float(((_rounded(c / scale) * scale) @ quantized.T - c @ flat.T).square().sum())
        noises.append(wrong)
    best = min(range(len(EXPONENTS)), key=noises.__getitem__)
    scale = reach ** EXPONENTS[best]
    for maker, axis in balance.makers:
        along = [1] * maker.ndim
        along[axis] = -1
        maker.div_(scale.view(along))
    along = [1] * weight.ndim
    along[0 if depthwise else 1] = -1
    weight.mul_(scale.view(along))
    return float(10 * torch.log10(torch.tensor((noises[0] + 1e-20) / (noises[best] + 1e-20))))


def _rounded(x: Tensor) -> Tensor:
    """Through uint8 with one range, zero in it."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


def _rounded_rows(weight: Tensor) -> Tensor:
    """Through int8 with a range for each row."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / step).round() * step
