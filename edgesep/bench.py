"""Rows of measurement: what an artifact costs on this machine. Each is measured in a process of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgesep import measure
from edgesep.spec import StreamSpec, UnsupportedError

if TYPE_CHECKING:
    from edgesep.artifact import Artifact


def row(
    artifact: Artifact,
    separator: dict[str, Any],
    seconds: float,
    threads: int | None = None,
    how: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Latency, memory, load time and size of one artifact, with the environment they were measured in.

    Args:
        how: further keys of the job (``measure.measure``).
    """
    found = artifact.label() | {"threads": threads or artifact.threads, "size_mb": round(artifact.size_mb(), 4)}
    if artifact.settings:
        found["settings"] = dict(artifact.settings)
    if artifact.note:
        return found | {"status": "not run", "note": artifact.note}
    job = {
        "runtime": artifact.runtime,
        "precision": artifact.precision,
        "threads": threads or artifact.threads,
        "settings": dict(artifact.settings),
        "graphs": [
            {"folder": str(g.folder), "files": list(g.files), "inputs": f["second"]}
            for g, f in artifact.described(separator)
        ],
        "seconds": seconds,
        "stream": separator.get("stream"),
        **(how or {}),
    }
    try:
        artifact.available()
        found |= {"status": "ok", **measure.measure_apart(job)}
    except UnsupportedError as e:
        return found | {"status": "not run", "note": str(e)}
    # Queries are one second of audio, or one call of a stream.
    spec = separator.get("stream") and StreamSpec.from_json(separator["stream"])
    found["rtf"] = round(found["p50_ms"] / (spec.call_samples / spec.sample_rate_hz * 1e3 if spec else 1e3), 5)
    return found | {"environment": measure.environment()}


def stream_row(
    artifact: Artifact,
    separator: dict[str, Any],
    spec: StreamSpec,
    minutes: float,
    threads: int | None = None,
    load: bool = False,
) -> dict[str, Any]:
    """One artifact at the pace of audio, with the parts of its latency; what a sound card adds is not in it.

    Args:
        load: whether a second process keeps a core busy.
    """
    found = row(artifact, separator, minutes * 60, threads, {"paced": True, "load": load})
    ms = 1e3 / spec.sample_rate_hz
    parts: dict[str, Any] = {
        "load": load,
        "algorithmic_ms": round(spec.algorithmic_latency_samples * ms, 3),
        "buffering_ms": round((spec.call_samples - spec.hop_samples) * ms, 3),
    }
    if found.get("p99_ms") is not None:
        parts["latency_ms"] = round(parts["algorithmic_ms"] + parts["buffering_ms"] + found["p99_ms"], 3)
    return found | parts
