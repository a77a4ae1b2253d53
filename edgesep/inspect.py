"""What a checkpoint is, before anything is done with it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from edgesep.separators import Separator, load_separator


def inspect(
    checkpoint: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    front_end: str | Path | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """Architecture, sizes and cost of a checkpoint.

    Returns:
        Facts by name; ``gmacs_per_s`` counts the multiply-accumulates of matrix products, convolutions and scans for
        one second of audio; ``activation_mb`` is the most that activations hold at once during that second in eager
        mode; ``front_end`` the same facts of a lip front-end.
    """
    separator = load_separator(checkpoint, config, front_end=front_end, variant=variant)
    found = facts(separator)
    if separator.front_end:
        found["front_end"] = facts(separator.front_end)
    return found


def facts(separator: Separator) -> dict[str, Any]:
    """What ``inspect`` says of one graph."""
    total, parts, peak = cost(separator)
    return {
        "separator": separator.name,
        "parameters": separator.parameters,
        "sample_rate_hz": separator.sample_rate_hz,
        "sources": separator.sources,
        "causal": separator.causal,
        "algorithmic_latency_ms": separator.algorithmic_latency_ms or "whole utterance",
        "shortest_mixture_samples": separator.min_samples,
        "gmacs_per_s": round(total / 1e9, 4),
        "gmacs_per_s_by_module": {name: round(part / 1e9, 4) for name, part in parts.items()},
        "activation_mb": round(peak / 1e6, 2),
        "config": dict(separator.config),
        **({"note": separator.note} if separator.note else {}),
    }


def cost(separator: Separator) -> tuple[int, dict[str, int], int]:
    """Of one second: multiply-accumulates, the same by module (to depth 3, from 1 % on), peak activation bytes."""
    inputs = separator.example_inputs(separator.sample_rate_hz)
    with FlopCounterMode(display=False, depth=2, custom_mapping=_recurrence_flops()) as counter, torch.inference_mode():
        separator.module(*inputs)
    with _Activations(separator) as activations, torch.no_grad():
        separator.module(*inputs)
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    root = type(separator.module).__name__
    parts = {
        name.removeprefix(f"{root}."): sum(ops.values()) // 2
        for name, ops in counts.items()
        if name.startswith(f"{root}.")
    }
    total = counter.get_total_flops() // 2
    shown = {name: part for name, part in parts.items() if name.count(".") < 3 and part >= total / 100}
    return total, dict(sorted(shown.items(), key=lambda item: -item[1])), activations.peak


def _recurrence_flops() -> dict[Any, Any]:
    """What torch does not count: LSTMs, and the project's operators (two multiply-accumulates a state update)."""
    from edgesep.ops import causal_conv_torch, selective_scan_torch  # noqa: F401  (registers the operators)

    def scan(u: tuple[int, ...], _: Any, A: tuple[int, ...], *rest: Any, **more: Any) -> int:
        del rest, more
        return 2 * 2 * u[0] * u[1] * u[2] * A[1]

    def conv(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **more: Any) -> int:
        del rest, more
        return 2 * x[0] * x[1] * x[2] * weight[1]

    def lstm(x: tuple[int, ...], w: tuple[int, ...], r: tuple[int, ...], *rest: Any, **more: Any) -> int:
        del rest, more
        return 2 * x[0] * x[1] * (w[0] * w[1] + r[0] * r[1])

    own = torch.ops.edgesep
    return {own.selective_scan: scan, own.causal_conv1d_silu: conv, torch.ops.aten.mkldnn_rnn_layer: lstm}


class _Activations(TorchDispatchMode):
    """Bytes of the storages that live between operators, weights left out."""

    def __init__(self, separator: Separator):
        super().__init__()  # type: ignore[no-untyped-call]
        state = separator.module.state_dict().values()
        self._known: dict[int, Any] = {v.untyped_storage().data_ptr(): None for v in state}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor):
                self._watch(made)
        return out

    def _watch(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known:
            return

        def freed() -> None:
            self._known.pop(address, None)
            self.now -= size

        self._known[address] = weakref.finalize(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
