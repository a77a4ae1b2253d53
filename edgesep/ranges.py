"""How the ranges that quantizers see move with the mixture: with its level, with noise, with overlap.

A separator that normalises its input has the same ranges at every level; one that does not needs calibration mixtures
at the levels of its use. Runs on the build host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgesep.calibration import Mixture, MixtureSet
from edgesep.passes.base import Tick, silent
from edgesep.separators import Separator, load_separator
from edgesep.spec import InputError

LEVELS_DB = (-40.0, -20.0, 0.0)  # peak of the mixture, relative to full scale
NOISE_DB = 10.0  # mixture above white noise
SETTLED = 0.02  # ranges have settled where more mixtures widen them by less than this share


def ranges(
    checkpoint: str | Path,
    calibration: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    front_end: str | Path | None = None,
    variant: str | None = None,
    tick: Tick = silent,
) -> dict[str, Any]:
    """Activation ranges of a separator on a mixture set, and on the same mixtures changed in one way each.

    Returns:
        ``layers``: for each, the largest input and how many times that is larger or smaller at other levels, with
        noise, and with the second voice half a mixture late; ``mixtures``: how far ranges still grow with their number;
        ``settled_after`` mixtures; ``said`` in a sentence.
    """
    separator = load_separator(checkpoint, config, front_end=front_end, variant=variant)
    if len(separator.inputs) > 1 and separator.front_end is None:
        raise InputError(f"{separator.name} needs its lip front-end; give its checkpoint (--front-end)")
    mixtures = MixtureSet.open(calibration, separator.sample_rate_hz, separator.sources, len(separator.inputs) > 1)
    kinds = {"as it is": _same, **{f"{db:g} dBFS": _at(db) for db in LEVELS_DB}, "noise": _noisy, "half overlap": _late}
    if separator.sources < 2:  # its sets hold the wanted voice alone
        del kinds["half overlap"]
    largest: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for i, item in enumerate(mixtures):
        for name, change in kinds.items():
            tick(i, len(mixtures), f"ranges: {name}")
            largest[name].append(_largest(separator, change(item)))
    plain = largest["as it is"]
    layers = list(plain[0])
    over_all = {name: {n: max(found[n] for found in rows) for n in layers} for name, rows in largest.items()}
    shown = [
        {"layer": n, "largest input": round(over_all["as it is"][n], 4)}
        | {k: f"x{over_all[k][n] / max(over_all['as it is'][n], 1e-12):.2f}" for k in kinds if k != "as it is"}
        for n in layers
    ]
    growth = []
    for count in range(1, len(plain)):
        before, after = ({n: max(found[n] for found in plain[:c]) for n in layers} for c in (count, count + 1))
        grown = [after[n] / max(before[n], 1e-12) - 1 for n in layers]
        growth.append({"mixtures": count + 1, "ranges grew by": f"{np.mean(grown):.1%}", "most": f"{max(grown):.1%}"})
    settled = _settled(plain, layers)
    moved = max(
        abs(np.log(max(over_all[k][n], 1e-12) / max(over_all["as it is"][n], 1e-12))) for k in kinds for n in layers
    )
    said = (
        f"ranges settle (mean growth below {SETTLED:.0%}) after {settled} of {len(plain)} mixtures"
        if settled
        else f"ranges have not settled after {len(plain)} mixtures: use more"
    )
    if moved > np.log(1.5):
        said += "; they move with level, noise or overlap: calibrate on mixtures as they will be (quantize.levels_db)"
    return {"layers": shown, "mixtures": growth, "settled_after": settled, "said": said}


def _settled(found: Sequence[Mapping[str, float]], layers: Sequence[str]) -> int | None:
    """After how many mixtures the ranges are within ``SETTLED`` of their last value, mean over layers."""
    last = {n: max(f[n] for f in found) for n in layers}
    for count in range(1, len(found)):
        missing = np.mean([1 - max(f[n] for f in found[:count]) / max(last[n], 1e-12) for n in layers])
        if missing < SETTLED:
            return count
    return None


def _largest(separator: Separator, item: Mixture) -> dict[str, float]:
    """Largest magnitude that enters each layer with weights."""
    with watched(separator.module) as seen:
        separator(*(torch.from_numpy(x) for x in item.inputs()))
    return dict(seen)


@contextmanager
def watched(module: nn.Module) -> Iterator[dict[str, float]]:
    """Within it, the largest magnitude that enters each convolution, product and recurrence."""
    seen: dict[str, float] = {}
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.Linear | nn.LSTM):

            def look(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                seen[name] = max(seen.get(name, 0.0), float(inputs[0].abs().max()))

            hooks.append(part.register_forward_pre_hook(look))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _same(item: Mixture) -> Mixture:
    return item


def _at(peak_db: float) -> Any:
    return lambda item: item.at_level(peak_db - 20 * float(np.log10(np.abs(item.mixture).max())))


def _noisy(item: Mixture) -> Mixture:
    level = np.sqrt(np.mean(item.mixture**2)) * 10 ** (-NOISE_DB / 20)
    noise = np.random.default_rng(0).standard_normal(item.mixture.size).astype(np.float32)
    return replace(item, mixture=item.mixture + np.float32(level) * noise)


def _late(item: Mixture) -> Mixture:
    """The last source half a mixture later: voices alone and together."""
    late = item.sources[-1].copy()
    half = late.size // 2
    late[half:], late[:half] = late[: late.size - half].copy(), 0
    return replace(item, mixture=item.mixture - item.sources[-1] + late)
