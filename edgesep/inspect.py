"""What a checkpoint is, before anything is done with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgesep.separators import Separator, load_separator


def inspect(checkpoint: str | Path, config: str | Path | Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Architecture, sizes and cost of a checkpoint.

    Returns:
        Facts by name; ``gmacs_per_s`` counts the multiply-accumulates of matrix products and convolutions for one
        second of audio, as the exported graph executes them.
    """
    separator = load_separator(checkpoint, config)
    total, parts = macs(separator)
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
        "config": dict(separator.config),
        **({"note": separator.note} if separator.note else {}),
    }


def macs(separator: Separator) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one second of audio: the total, and by module (to depth 3, from 1 % on)."""
    with FlopCounterMode(display=False, depth=2) as counter, torch.inference_mode():
        separator.module(*separator.example_inputs(separator.sample_rate_hz))
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    root = type(separator.module).__name__
    parts = {
        name.removeprefix(f"{root}."): sum(ops.values()) // 2
        for name, ops in counts.items()
        if name.startswith(f"{root}.")
    }
    total = counter.get_total_flops() // 2
    shown = {name: part for name, part in parts.items() if name.count(".") < 3 and part >= total / 100}
    return total, dict(sorted(shown.items(), key=lambda item: -item[1]))
