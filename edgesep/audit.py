"""Did it really run in INT8, and did that help: the kernels that ran, their precision and share of the time.

A build of lower precision that is neither faster nor smaller than the float one of the same runtime is rejected, with
the operators that cost it its lead. Runs on a device.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from edgesep import measure
from edgesep.artifact import Artifact, Separating
from edgesep.bundle import Bundle
from edgesep.runtimes import runtime
from edgesep.runtimes.base import Executed
from edgesep.spec import EdgesepError, UnsupportedError

NOISE = 0.03  # two builds whose medians differ by less than this share take the same time
SMALLER = 0.9  # of the float build's size: files differ by a few names, too


def executed(artifact: Artifact, separator: dict[str, Any], threads: int | None = None) -> list[Executed]:
    """The kernels of one query, front-end first.

    Raises:
        UnsupportedError: the runtime does not tell.
    """
    module = runtime(artifact.runtime)
    if not hasattr(module, "executed"):
        raise UnsupportedError(f"{artifact.runtime} does not tell which kernels it ran")
    found: list[Executed] = []
    for graph, facts in artifact.described(separator):
        files, feeds = list(graph.files), measure.noise(facts["second"])
        found += module.executed(graph.folder, files, graph.precision, threads or artifact.threads, feeds)
    return found


def summary(kernels: Sequence[Executed]) -> dict[str, Any]:
    """Time in kernels, its shares by precision, and the operators that took most of it."""
    total = sum(k.ms for k in kernels) or 1.0
    by_precision: dict[str, float] = defaultdict(float)
    by_operator: dict[tuple[str, str], float] = defaultdict(float)
    for k in kernels:
        by_precision[k.precision] += k.ms
        by_operator[k.operator, k.precision] += k.ms
    top = sorted(by_operator.items(), key=lambda item: -item[1])[:10]
    return {
        "ms": round(total, 4),
        "time_share": {p: round(ms / total, 4) for p, ms in sorted(by_precision.items(), key=lambda i: -i[1])},
        "operators": [
            {"operator": op, "precision": p, "ms": round(ms, 4), "share": round(ms / total, 4)} for (op, p), ms in top
        ],
    }


def compare(
    low: Artifact, plain: Artifact, separator: dict[str, Any], seconds: float = 1.0, threads: int | None = None
) -> dict[str, Any]:
    """A build of lower precision against the float one of the same runtime, paired in one run.

    Returns:
        ``times_fp32_speed``, ``times_smaller``, the low one's ``summary`` (or a ``note``, where the runtime does not
        tell) and, where it is neither faster nor smaller, ``rejected``: why, with the operators to blame.
    """
    with contextlib.ExitStack() as stack:
        calls: dict[str, Callable[[], Any]] = {}
        for name, artifact in (("low", low), ("plain", plain)):
            calls[name] = _query(stack.enter_context(Separating(artifact, separator, threads)), separator)
        times = {name: float(np.median(t)) for name, t in measure.paired_ms(calls, seconds).items()}
    ratio, smaller = times["plain"] / times["low"], plain.size_mb() / low.size_mb()
    ran, told = _told(low, separator, threads)
    found: dict[str, Any] = {"times_fp32_speed": round(ratio, 3), "times_smaller": round(smaller, 3), **told}
    if ratio < 1 + NOISE and smaller < 1 / SMALLER:
        blame = ", ".join(f"{op} ({ms:+.2f} ms)" for op, ms in _slower(ran, _told(plain, separator, threads)[0])[:3])
        found["rejected"] = f"{low.name} is neither faster ({ratio:.2f}x) nor smaller ({smaller:.2f}x) than fp32" + (
            f"; it loses its time in {blame}" if blame else ""
        )
    return found


def look(
    artifact: Artifact,
    plain: Mapping[tuple[Any, ...], Artifact],
    separator: dict[str, Any],
    threads: int | None = None,
) -> dict[str, Any]:
    """What a build ran; one of lower precision beside the float one of its runtime and operators in ``plain``."""
    base = plain.get(artifact.kind)
    if base is None or artifact.precision == "fp32":
        return _told(artifact, separator, threads)[1]
    return compare(artifact, base, separator, threads=threads)


def float_builds(artifacts: Iterable[Artifact]) -> dict[tuple[Any, ...], Artifact]:
    """The float artifact of each kind that runs here."""
    return {a.kind: a for a in artifacts if a.precision == "fp32" and not a.note}


def bundle_rows(
    bundle: Bundle, threads: int | None = None, tick: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Every artifact on this machine: its kernels, and for lower precisions the comparison with the float one."""
    facts, rows = bundle.manifest["separator"], []
    plain = float_builds(bundle.artifacts)
    for artifact in bundle.artifacts:
        tick(artifact.name)
        row = artifact.label()
        try:
            if artifact.note:
                raise UnsupportedError(artifact.note)
            artifact.available()
            row |= look(artifact, plain, facts, threads)
        except EdgesepError as e:
            row["note"] = f"{artifact.name}: {e}"
        rows.append(row)
    return rows


def _told(artifact: Artifact, separator: dict[str, Any], threads: int | None) -> tuple[list[Executed], dict[str, Any]]:
    """The kernels and their ``summary``; none and a ``note`` where the runtime does not tell."""
    try:
        ran = executed(artifact, separator, threads)
    except UnsupportedError as e:
        return [], {"note": str(e)}
    return ran, summary(ran)


def _query(run: Separating, separator: dict[str, Any]) -> Callable[[], Any]:
    front = separator["front_end"]
    inputs = list(measure.noise(separator["second"]).values())
    if run.hops is not None:
        samples, hops = inputs[0][0], run.hops
        return lambda: hops.call(samples)
    if front:
        inputs[-1:] = measure.noise(front["second"]).values()
    return lambda: run(*inputs)


def _slower(low: Sequence[Executed], plain: Sequence[Executed]) -> list[tuple[str, float]]:
    """Operators on which the low build spends more than the float one, most first."""
    spent: dict[str, float] = defaultdict(float)
    for kernels, sign in ((low, 1), (plain, -1)):
        for k in kernels:
            spent[k.operator] += sign * k.ms
    return sorted(((op, ms) for op, ms in spent.items() if ms > 0), key=lambda item: -item[1])
