"""Structured pruning: whole channels are removed until a share of the work, the size or the time is gone.

Two ways of cutting. A separator that names its inner widths (``Separator.widths``: LSTM gates, Mamba's inner channels,
whose residual stream stays) is cut along those; of a convolutional one torch-pruning finds which channels hang
together, the separator says which sizes must stay (``keep_shape``), and a module with state of its own per channel says
how to keep some of them (``keep_channels``). Every width loses the same share of its channels, the least important.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import nn

from edgesep import graph, measure, training
from edgesep.inspect import cost
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, PassResult
from edgesep.runtimes import names, runtime
from edgesep.separators.base import Separator, resize
from edgesep.spec import BuildError, InputError

MOST = 0.75  # of the channels of a width
HALVINGS = 6  # of the interval in which the share of channels is sought


@dataclass(frozen=True)
class Prune:
    """Remove channels by importance.

    Attributes:
        share: how much of it to remove, between 0 and 1.
        of: multiply-accumulates, parameters, or latency, measured in ``runtime`` on this machine, fp32, one thread.
        importance: of a channel, over all tensors that hold it: L1 or L2 norm, or Taylor (weight times gradient of the
            loss on the calibration mixtures).
        round_to: channel counts stay multiples of this, for the sake of vector units.
        runtime: for latency.
    """

    share: float = 0.3
    of: Literal["macs", "parameters", "latency"] = "macs"
    importance: Literal["l1", "l2", "taylor"] = "taylor"
    round_to: int = 4
    runtime: str = "onnxruntime"

    stage: ClassVar[str] = "torch"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"prune.share is {self.share}, it must lie between 0 and 1")
        if self.of not in ("macs", "parameters", "latency"):
            raise InputError(f"prune.of is {self.of!r}, use macs, parameters or latency")
        if self.importance not in ("l1", "l2", "taylor"):
            raise InputError(f"prune.importance is {self.importance!r}, use l1, l2 or taylor")
        if self.runtime not in names() or self.runtime == "eager":
            raise InputError(f"prune.runtime is {self.runtime!r}, it must be one that is built for, as onnxruntime")
        if self.round_to < 1:
            raise InputError(f"prune.round_to is {self.round_to}, it must be at least 1")

    def __call__(self, separator: Separator, context: Context) -> PassResult:
        """Prune a copy; the input stays as it is.

        Raises:
            BuildError: the share cannot be reached without cutting a protected size.
        """
        source = replace(separator, module=copy.deepcopy(separator.module))
        if self.importance == "taylor":
            _backpropagate(source, context)
        cut = self._along_widths if separator.widths else self._along_graph
        left = {"macs": _macs_left, "parameters": _parameters_left, "latency": self._latency_left}[self.of](separator)

        def tried(ratio: float) -> tuple[Separator, float]:
            module = cut(source, ratio).eval()
            pruned = replace(separator, module=module, parameters=sum(p.numel() for p in module.parameters()))
            return pruned, left(pruned)

        low, high = 0.0, MOST
        pruned, remains = tried(high)
        if remains > 1 - self.share:
            raise BuildError(
                f"prune.share = {self.share} of {self.of} is out of reach for {separator.name}: with every channel that"
                f" may go removed, {remains:.0%} remain"
            )
        for turn in range(HALVINGS):
            context.tick(turn, HALVINGS, f"pruning: {1 - remains:.0%} of {self.of} removed")
            middle = (low + high) / 2
            found, kept = tried(middle)
            if kept <= 1 - self.share:
                high, pruned, remains = middle, found, kept
            else:
                low = middle
        _refuse_other_shapes(separator, pruned)
        report = {
            "removed_share": round(1 - remains, 4),
            "macs_removed_share": round(1 - _macs_left(separator)(pruned), 4),
            "parameters_before": sum(p.numel() for p in separator.module.parameters()),
            "parameters": pruned.parameters,
        }
        return PassResult(pruned, True, report)

    def _latency_left(self, separator: Separator) -> Callable[[Separator], float]:
        scratch = tempfile.TemporaryDirectory()  # goes with the function
        x = {s.name: x.numpy() for s, x in zip(separator.inputs, _second(separator), strict=True)}
        whole = self._built(separator, Path(scratch.name, "whole"))

        def left(pruned: Separator) -> float:
            folder = Path(tempfile.mkdtemp(dir=scratch.name), "pruned")
            with whole as before, self._built(pruned, folder) as after:
                calls = {"before": lambda: before.run(x), "after": lambda: after.run(x)}
                times = measure.paired_ms(calls, 1.0)
            return float(np.median(times["after"]) / np.median(times["before"]))

        return left

    def _built(self, separator: Separator, folder: Path) -> Any:
        folder.mkdir()
        module, file = runtime(self.runtime), folder / "model.onnx"
        graph.export_onnx(separator, separator.module, file)
        onnx_forms.write_form(file, file)
        files = module.build(file, folder, "fp32", separator.profile())
        return module.Runner(folder, files, "fp32", 1)

    # -- along the separator's own widths ----------------------------------------------------------------------------

    def _along_widths(self, source: Separator, ratio: float) -> nn.Module:
        assert source.widths is not None  # the caller looked
        module = copy.deepcopy(source.module)
        state = dict(module.state_dict())
        values = dict(source.module.named_parameters())
        for width in source.widths(source.module):
            keep = self._least(width.size, ratio)
            weight = torch.zeros(width.size)
            for c in width.cuts:
                weight += self._weight(
                    c.channels_first(values[c.tensor].detach(), width.size), values[c.tensor], c, width
                )
            channels = weight.topk(keep).indices.sort().values
            for c in width.cuts:
                state[c.tensor] = state[c.tensor].index_select(c.axis, c.places(channels, width.size))
        resize(module, state)
        return module

    def _weight(self, rows: torch.Tensor, value: torch.Tensor, cut: Any, width: Any) -> torch.Tensor:
        """Importance of each channel in one tensor."""
        if self.importance == "l1":
            return rows.abs().sum(1)
        if self.importance == "l2":
            return rows.square().sum(1)
        if value.grad is None:  # nothing depends on it
            return torch.zeros(width.size)
        return (rows * cut.channels_first(value.grad, width.size)).square().sum(1)

    def _least(self, size: int, ratio: float) -> int:
        """Channels that stay."""
        return min(size, max(self.round_to, round((1 - ratio) * size / self.round_to) * self.round_to))

    # -- along the traced graph --------------------------------------------------------------------------------------

    def _along_graph(self, source: Separator, ratio: float) -> nn.Module:
        module = copy.deepcopy(source.module)
        if self.importance == "taylor":  # gradients are not copied
            for mine, theirs in zip(module.parameters(), source.module.parameters(), strict=True):
                mine.grad = theirs.grad
        score = {
            "l1": tp.importance.GroupMagnitudeImportance(p=1),
            "l2": tp.importance.GroupMagnitudeImportance(p=2),
            "taylor": tp.importance.GroupTaylorImportance(),
        }[self.importance]
        with graph.quiet():
            pruner = tp.pruner.BasePruner(
                module,
                _second(source),
                importance=score,
                pruning_ratio=ratio,
                ignored_layers=[module.get_submodule(name) for name in source.keep_shape],
                customized_pruners={type(m): _OwnChannels() for m in module.modules() if hasattr(m, "keep_channels")},
                round_to=self.round_to,
                root_module_types=[nn.Conv2d, nn.Linear],
                # Its defaults are mutable and shared between pruners of one process.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
                channel_groups={},
            )
            pruner.step()
        return module


def _second(separator: Separator) -> tuple[torch.Tensor, ...]:
    return separator.example_inputs(separator.sample_rate_hz)


def _macs_left(separator: Separator) -> Callable[[Separator], float]:
    before = cost(separator)[0]
    return lambda pruned: cost(pruned)[0] / before


def _parameters_left(separator: Separator) -> Callable[[Separator], float]:
    before = sum(p.numel() for p in separator.module.parameters())
    return lambda pruned: pruned.parameters / before


def _backpropagate(separator: Separator, context: Context) -> None:
    """Gradients of the loss on the calibration mixtures, summed."""
    separator.module.zero_grad()
    for i, item in enumerate(context.calibration):
        context.tick(i, len(context.calibration), "gradients for the importance of channels")
        given = context.original.tensors(item.inputs())
        inputs = [torch.from_numpy(given[s.name]) for s in separator.inputs]
        estimates = separator.module(*inputs)
        wanted = torch.from_numpy(item.sources[None, : estimates.shape[1]])
        training.pit_snr_loss(inputs[0], estimates, wanted).backward()


def _refuse_other_shapes(before: Separator, after: Separator) -> None:
    """Raises BuildError where a size that must stay has changed."""
    old, new = before.module.state_dict(), after.module.state_dict()
    for name in before.keep_shape:
        axis = 1 if isinstance(before.module.get_submodule(name), nn.ConvTranspose2d) else 0  # of its outputs
        was, now = (state[f"{name}.weight"].shape[axis] for state in (old, new))
        if was != now:
            raise BuildError(f"pruning changed {name} from {was} to {now} channels, which must stay")


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
