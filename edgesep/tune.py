"""Runtime settings by measurement on the machine where a bundle runs: threads, and what a runtime lets one set.

One thing after another: each alternative takes turns with the best so far, a fresh process every time, and replaces it
if it was faster in every turn by more than chance. Runs on a device; the outcome is kept in the bundle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgesep import bench, measure
from edgesep.artifact import Artifact
from edgesep.bundle import Bundle, write_manifest
from edgesep.runtimes import runtime
from edgesep.spec import UnsupportedError

TURNS = 3
NOISE = 0.03  # medians that differ by less than this share are the same


def tune(bundle: Bundle, seconds: float = 1.0, tick: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """Find settings for every artifact that runs here and keep them in the bundle.

    Args:
        seconds: how long each candidate is timed, each of its turns.

    Returns:
        For each artifact: threads and settings that were chosen, the medians in ms with and without, and what was
        tried. Nothing of the bundle changes before all are measured.
    """
    facts, rows, found = bundle.manifest["separator"], [], []
    for artifact in bundle.artifacts:
        row: dict[str, Any] = artifact.label()
        try:
            if artifact.note:
                raise UnsupportedError(artifact.note)
            artifact.available()
            artifact, outcome = _tuned(artifact, facts, seconds, tick)
            row |= outcome
        except UnsupportedError as e:
            row["note"] = str(e)
        rows.append(row)
        found.append(artifact)
    manifest = {k: v for k, v in bundle.manifest.items() if k != "digest"}
    manifest["artifacts"] = [a.to_json(bundle.path) for a in found]
    manifest["tuning"] = {"environment": measure.environment(), "rows": rows}
    write_manifest(bundle.path, manifest)
    return rows


def _tuned(
    artifact: Artifact, facts: dict[str, Any], seconds: float, tick: Callable[[str], None]
) -> tuple[Artifact, dict[str, Any]]:
    known = getattr(runtime(artifact.runtime), "SETTINGS", {})
    start = best = _with(artifact, settings={k: v for k, v in artifact.settings.items() if k not in known})
    tried = []
    for name, values in (("threads", _thread_counts()), *known.items()):
        others = [
            _with(best, threads=v) if name == "threads" else _with(best, settings={**best.settings, name: v})
            for v in values
        ]
        tick(f"{artifact.name}: {name}")
        times = _turns([best, *others], facts, seconds)
        for value, one in zip(values, times[1:], strict=True):
            tried.append({name: value, "times_faster": round(float(np.median(times[0]) / np.median(one)), 3)})
        fastest = min(range(len(times)), key=lambda i: float(np.median(times[i])))
        if _faster(times[fastest], times[0]):
            best = others[fastest - 1]
    if best == start:
        return start, {"threads": start.threads, "settings": dict(start.settings), "times_faster": 1.0, "tried": tried}
    tick(f"{artifact.name}: what was chosen")
    before, after = _turns([start, best], facts, seconds)
    if not _faster(after, before):  # each step was small, and their sum was chance
        best, after = start, before
    return best, {
        "threads": best.threads,
        "settings": dict(best.settings),
        "before_ms": round(float(np.median(before)), 3),
        "p50_ms": round(float(np.median(after)), 3),
        "times_faster": round(float(np.median(before) / np.median(after)), 3),
        "tried": tried,
    }


def _with(artifact: Artifact, **changes: Any) -> Artifact:
    """The artifact with other settings, all of its graphs alike."""
    front = artifact.front_end and replace(artifact.front_end, **changes)
    return replace(artifact, front_end=front, **changes)


def _thread_counts() -> list[int]:
    """1, 2, 4, ... and as many as there are cores for this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({*(1 << n for n in range(cores.bit_length())), cores} - {0})


def _turns(candidates: Sequence[Artifact], facts: dict[str, Any], seconds: float) -> list[list[float]]:
    """Medians in ms of each candidate, a turn after the other."""
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(TURNS):
        for mine, candidate in zip(times, candidates, strict=True):
            mine.append(bench.row(candidate, facts, seconds)["p50_ms"])
    return times


def _faster(times: Sequence[float], than: Sequence[float]) -> bool:
    return all(mine < theirs * (1 - NOISE) for mine, theirs in zip(times, than, strict=True))
