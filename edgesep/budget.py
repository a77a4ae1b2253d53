"""Which layers stay in float for a budget in dB: the sensitivity of each, then the worst back to float, one by one.

Trials run on calibration mixtures, never on the test set, in ONNX Runtime, whose arithmetic of a Q/DQ graph is the
others' too. Each trial is written down as it ends, so an interrupted search goes on where it was and ends with the same
result.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgesep import kernels, verify
from edgesep.artifact import Artifact, Separating
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context, Tick
from edgesep.runtimes import runtime
from edgesep.separators.base import Separator
from edgesep.spec import BuildError, Criteria, UnsupportedError

SUBSET = 4  # mixtures on which single layers are tried
Make = Callable[[Iterable[str], bool], Path]  # layers to quantize, weights of the others rounded → the Q/DQ file


@dataclass(frozen=True)
class Trial:
    """What quantizing some layers did to the calibration mixtures.

    Attributes:
        drops_db: SI-SNR lost against the float original, a mixture each.
        noise: power of the difference to the original's output in relation to that output, mean over mixtures.
    """

    drops_db: tuple[float, ...]
    noise: float

    @property
    def drop_db(self) -> float:
        return float(np.mean(self.drops_db))

    @property
    def drop_high_db(self) -> float:
        """Upper end of the 95 % interval of the mean: a budget must hold for mixtures that are not among these."""
        return verify.bootstrap_interval(self.drops_db)[1]

    @property
    def worst5_db(self) -> float:
        return verify.worst_share(self.drops_db, 0.05)

    def fits(self, criteria: Criteria) -> bool:
        limits = (self.drop_high_db, criteria.max_si_snr_drop_db), (self.worst5_db, criteria.worst5_drop_db)
        return all(limit is None or found <= limit for found, limit in limits)


class Trials:
    """Runs trials of one graph and remembers them in a file.

    Args:
        make: writes the Q/DQ file in which some layers are quantized and the weights of the others rounded, or not.
        folder: where the trials' file lies; one that exists is continued.
        fused: judge the form with units on native kernels.
    """

    def __init__(self, separator: Separator, context: Context, make: Make, folder: Path, fused: bool = False):
        self.separator, self.original, self.make, self.fused = separator, context.original, make, fused
        self.items = list(context.calibration)
        self.file = folder / "trials.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.given: list[dict[str, np.ndarray]] = []  # every named input, that of a front-end in float
        self.references: list[np.ndarray] = []
        front = context.original.front_end
        self.front = front is not None and separator.name == front.name

    def __call__(self, layers: Iterable[str], mixtures: int, rounded: bool = False) -> Trial:
        """Some layers in INT8 on the first mixtures, the weights of the others in eight bits, or not."""
        name = json.dumps([mixtures, rounded, *sorted(layers)])
        if name not in self.known:
            found = self._run(self.make(layers, rounded), min(mixtures, len(self.items)))
            self.known[name] = [list(found.drops_db), found.noise]
            if self.file.exists():  # a search for another budget may have gone on beside this one
                self.known = json.loads(self.file.read_text()) | self.known
            beside = self.file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(self.known))
            beside.replace(self.file)
        drops, noise = self.known[name]
        return Trial(tuple(drops), noise)

    def _run(self, model: Path, mixtures: int) -> Trial:
        while len(self.references) < mixtures:
            self.given.append(self.original.tensors(self.items[len(self.references)].inputs()))
            inputs = (self.given[-1][s.name] for s in self.original.inputs)
            self.references.append(self.original(*inputs)[0].numpy())
        drops, noises = [], []
        facts = self.separator.describe() | {"front_end": None}
        with Separating(_artifact(model, self.fused), facts) as run:
            for item, given, reference in zip(self.items[:mixtures], self.given, self.references, strict=False):
                made = run(*(given[s.name] for s in (self.separator.inputs[:1] if run.hops else self.separator.inputs)))
                estimates = self.original(given["mixture"], made)[0].numpy() if self.front else made[0]
                if not np.isfinite(estimates).all():
                    raise BuildError(f"quantized {self.separator.name} returned NaN for {item.name}; report this graph")
                lost = verify.pit_si_snr_db(reference, item.sources) - verify.pit_si_snr_db(estimates, item.sources)
                drops.append(lost)
                noises.append(float(np.square(estimates - reference).sum() / (np.square(reference).sum() + 1e-20)))
        return Trial(tuple(drops), float(np.mean(noises)))


def _artifact(model: Path, fused: bool) -> Artifact:
    """A Q/DQ file as an artifact of ONNX Runtime, with native kernels where it needs some and they can be had."""
    module, built, library = runtime("onnxruntime"), model.parent / "built", None
    if fused or onnx_forms.is_native(onnx.load(model)):
        with contextlib.suppress(UnsupportedError, BuildError):
            library = kernels.library("onnxruntime")
        onnx_forms.write_form(model, model, module if fused else None, native=library is not None)
    built.mkdir(exist_ok=True)
    files = module.build(model, built, "int8", {})
    if library:
        files.append(kernels.file_name("onnxruntime"))
        if not (built / files[-1]).exists():  # the last trial's is loaded, and must not change
            shutil.copyfile(library, built / files[-1])
    return Artifact("onnxruntime", "int8", None, built, tuple(files))


@dataclass(frozen=True)
class Fitted:
    """The outcome of a search.

    Attributes:
        kept: layers that stay in float.
        rounded: their weights have eight bits.
        report: sensitivities, trials and whether the budget was met, for the manifest.
    """

    kept: tuple[str, ...]
    rounded: bool
    report: dict[str, Any]


def fit(
    macs: Mapping[str, int], spare: float, trials: Trials, criteria: Criteria, tick: Tick, rounded: bool = True
) -> Fitted:
    """Return the layers with most noise for their size to float until the mean and the worst 5 % are within budget.

    The mean with its uncertainty: a few mixtures say little of the next ones.

    Args:
        macs: layers that may be quantized, with their multiply-accumulates.
        spare: so many multiply-accumulates may go back to float even where the budget holds without: a small layer that
            makes much of the noise is not worth it, and calibration mixtures are few.
        rounded: give the weights of layers in float eight bits, unless that alone takes half of the budget.

    Noise of independent roundings adds up, so what a layer adds alone tells its part of the whole; a drop in dB of one
    layer alone is too small to rank by.
    """
    layers = sorted(macs)
    found = {}
    for i, layer in enumerate(layers):
        tick(i, len(layers), f"sensitivity of {layer}")
        found[layer] = trials([layer], SUBSET)
    total = sum(macs.values()) or 1
    ranked = sorted(layers, key=lambda n: (-found[n].noise / max(macs[n], 1), n))
    everything = len(trials.items)
    rounding = None
    if rounded:
        tick(0, 0, "rounding weights alone")
        rounding = trials([], everything, True)
        rounded = rounding.fits(criteria.half())
    kept: list[str] = []
    steps = [_step(kept, trials(layers, everything, rounded))]
    most = max(t.noise for t in found.values())
    for layer in ranked:
        if macs[layer] <= spare and found[layer].noise > most / 30 and len(kept) + 1 < len(layers):
            spare -= macs[layer]
            kept.append(layer)
    left = [n for n in ranked if n not in kept]
    if kept:
        steps.append(_step(kept, trials(left, everything, rounded)))

    def fits(count: int) -> bool:
        """Whether the budget holds with so many more layers in float."""
        trial = trials(left[count:], everything, rounded)
        if count:
            steps.append(_step([*kept, *left[:count]], trial))
        tick(0, 0, f"{len(kept) + count} layers in float: drop {trial.drop_db:.3f} dB, worst {trial.worst5_db:.3f} dB")
        return trial.fits(criteria)

    low, high = -1, 0  # doubling, then halving: a separator has a hundred layers, and a trial takes its time
    while high < len(left) and not fits(high):
        low, high = high, 2 * high or 1
    high = min(high, len(left))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    kept += left[:high]
    report = {
        "met": len(kept) < len(layers),
        "mixtures": everything,
        "rounding_alone": rounding and {k: v for k, v in _step([], rounding).items() if k.endswith("_db")},
        "layers": [
            {
                "layer": name,
                "macs_share": round(macs[name] / total, 5),
                "drop_db": round(found[name].drop_db, 4),
                "output_snr_db": round(float(-10 * np.log10(max(found[name].noise, 1e-20))), 2),
                "float": name in kept,
            }
            for name in ranked
        ],
        "steps": sorted((s for s in steps if s["float_layers"] <= len(kept)), key=lambda s: s["float_layers"]),
    }
    return Fitted(tuple(kept), rounded, report)


def _step(kept: Sequence[str], trial: Trial) -> dict[str, Any]:
    return {
        "float_layers": len(kept),
        "last": kept[-1] if kept else None,
        "drop_db": round(trial.drop_db, 4),
        "drop_high_db": round(trial.drop_high_db, 4),
        "worst5_drop_db": round(trial.worst5_db, 4),
    }
