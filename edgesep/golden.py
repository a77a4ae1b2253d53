"""The golden vectors of a bundle: what a device verifies itself against. Written on the build host.

``golden.npz`` holds test mixtures with their sources and the float original's estimates, and inputs of odd lengths
in batches of 1 and 2 with the original's estimates; ``Bundle.golden`` reads it. Shapes: mixtures ``(batch, samples)``,
sources ``(batch, sources, samples)``, mouth video ``(frames, height, width)``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgesep import verify, video
from edgesep.calibration import Mixture, MixtureSet
from edgesep.separators import Separator

#: Lengths in seconds of the shape check, for batch 1 and 2; none is a multiple of anything in a separator.
ODD_LENGTHS_S = (0.4999, 1.0371, 1.8213)


def cases(original: Separator, test: MixtureSet) -> list[tuple[verify.Inputs, np.ndarray]]:
    """Inputs of odd lengths, batch 1 and 2, with the original's estimates."""
    found = []
    for parts in _odd(test, original.sample_rate_hz):
        inputs = tuple(np.concatenate(arrays) for arrays in zip(*(m.inputs() for m in parts), strict=True))
        found.append((inputs, original(*inputs).numpy()))
    return found


def _odd(test: MixtureSet, rate: int) -> list[list[Mixture]]:
    """The first two mixtures at each odd length: the first one alone, and both."""
    made = []
    for seconds in ODD_LENGTHS_S:
        n = int(seconds * rate)
        items = [test[i % len(test)] for i in (0, 1)]
        parts = [replace(m, mixture=np.resize(m.mixture, n), mouth=_resized(m.mouth, n, rate)) for m in items]
        made += [parts[:1], parts]
    return made


def _resized(mouth: np.ndarray | None, samples: int, rate: int) -> np.ndarray | None:
    """Mouth video of that many samples, repeated where it is too short."""
    if mouth is None:
        return None
    return np.resize(mouth, (video.frames_for(samples, rate), *mouth.shape[1:]))


def write(
    path: Path,
    test: MixtureSet,
    references: list[np.ndarray],
    count: int,
    cases: list[tuple[verify.Inputs, np.ndarray]],
) -> None:
    """Write ``count`` mixtures spread over the test set, and the odd cases."""
    chosen = np.linspace(0, len(test) - 1, min(count, len(test))).round().astype(int)
    arrays: dict[str, Any] = {"items": len(chosen), "cases": len(cases)}
    for i, index in enumerate(chosen):
        item = test[int(index)]
        arrays |= {f"mixture_{i}": item.mixture, f"sources_{i}": item.sources, f"original_{i}": references[index]}
        if item.mouth is not None:
            arrays[f"mixture_mouth_{i}"] = item.mouth[None]
    for i, (parts, (inputs, original)) in enumerate(zip(_odd(test, test[0].sample_rate_hz), cases, strict=True)):
        arrays |= {f"case_{i}": inputs[0], f"case_original_{i}": original}
        shown = [m.mouth for m in parts if m.mouth is not None]
        if shown:
            arrays[f"case_mouth_{i}"] = np.stack(shown)
    np.savez_compressed(path, **arrays)
