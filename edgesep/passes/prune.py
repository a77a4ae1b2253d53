"""Structured pruning: whole channels are removed until a share of the multiply-accumulates is gone.

torch-pruning finds which channels hang together; a separator says which sizes must stay (``keep_shape``), and a
module with state of its own per channel says how to keep some of them (``keep_channels``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch_pruning as tp
from torch import nn

from edgesep import graph
from edgesep.passes.base import Context, PassResult
from edgesep.separators.base import Separator
from edgesep.spec import BuildError, InputError

STEPS = 200  # of the way from all channels to none; fine enough to stop close to the wanted share


@dataclass(frozen=True)
class Prune:
    """Remove channels by importance.

    Attributes:
        macs_share: share of the multiply-accumulates to remove, between 0 and 1.
        norm: importance of a channel: L1 or L2 norm of its weights, over all layers it runs through.
        round_to: channel counts stay multiples of this, for the sake of vector units.
    """

    macs_share: float = 0.3
    norm: Literal[1, 2] = 2
    round_to: int = 4

    stage: ClassVar[str] = "torch"

    def __post_init__(self) -> None:
        if not 0 < self.macs_share < 1:
            raise InputError(f"prune.macs_share is {self.macs_share}, it must lie between 0 and 1")
        if self.norm not in (1, 2):
            raise InputError(f"prune.norm is {self.norm}, use 1 or 2")

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Prune a copy; the input stays as it is.

        Raises:
            BuildError: the share cannot be reached without cutting a protected size.
        """
        module = copy.deepcopy(separator.module)
        example = separator.example_inputs(separator.sample_rate_hz)
        protected = [module.get_submodule(name) for name in separator.keep_shape]
        sizes = {name: module.state_dict()[f"{name}.weight"].shape[0] for name in separator.keep_shape}
        own = {type(m): _OwnChannels() for m in module.modules() if hasattr(m, "keep_channels")}
        before, _ = tp.utils.count_ops_and_params(module, example)
        with graph.quiet():
            pruner = tp.pruner.BasePruner(
                module,
                example,
                importance=tp.importance.GroupMagnitudeImportance(p=self.norm),
                pruning_ratio=0.95,
                iterative_steps=STEPS,
                ignored_layers=protected,
                customized_pruners=own,
                round_to=self.round_to,
                root_module_types=[nn.Conv2d, nn.Linear],
                # Its defaults are mutable and shared between pruners of one process.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
                channel_groups={},
            )
            macs, steps = before, 0
            while macs > (1 - self.macs_share) * before:
                if steps == STEPS:
                    raise BuildError(
                        f"prune.macs_share = {self.macs_share} is out of reach for {separator.name}: with every"
                        f" channel that may go removed, {macs / before:.0%} of the multiply-accumulates remain"
                    )
                pruner.step()
                steps += 1
                macs, _ = tp.utils.count_ops_and_params(module, example)
                context.tick(int(100 * (1 - macs / before)), int(100 * self.macs_share), "pruning")
        for name, size in sizes.items():
            if (now := module.state_dict()[f"{name}.weight"].shape[0]) != size:
                raise BuildError(f"pruning changed {name} from {size} to {now} channels, which must stay")
        parameters = sum(p.numel() for p in module.parameters())
        report = {
            "macs_removed_share": round(1 - macs / before, 4),
            "parameters_before": sum(p.numel() for p in separator.module.parameters()),
            "parameters": parameters,
            "steps": steps,
        }
        return PassResult(replace(separator, module=module.eval(), parameters=parameters), True, report)


class _OwnChannels(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """Adapts modules that keep something per channel besides parameters."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        gone = set(idxs)
        layer.keep_channels([i for i in range(layer.channels) if i not in gone])
        module: nn.Module = layer
        return module

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return int(layer.channels)

    get_in_channels = get_out_channels
