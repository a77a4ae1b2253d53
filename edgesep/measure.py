"""Latency and memory of a runner, one query after the other (MLPerf's SingleStream).

Runs as a program of its own (``python -m edgesep.measure``, JSON in, JSON out), so that peak memory and load time
belong to one artifact and not to whatever ran before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgesep.runtimes import runtime
from edgesep.spec import EdgesepError, StreamSpec, VerificationError
from edgesep.stream import Hops

#: percentile → queries needed before it is reported (MLPerf's early-stopping counts, confidence 0.99)
QUERIES_FOR: dict[float, int] = {50: 1, 90: 64, 99: 662, 99.9: 6600}


def percentiles(times_ms: list[float], wanted: Iterable[float] = (50, 90, 99)) -> dict[str, float | None]:
    """Percentiles in ms; None where there are too few queries for one to mean anything."""
    return {
        f"p{p}_ms": round(float(np.percentile(times_ms, p)), 4) if len(times_ms) >= QUERIES_FOR[p] else None
        for p in wanted
    }


def time_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def latencies_ms(call: Callable[[], Any], seconds: float, least: int = 10, most: int = 1000) -> list[float]:
    """Warm up (three calls and a fifth of the time), then time calls for ``seconds``."""
    until = time.perf_counter() + seconds / 5
    for i in range(most):
        call()
        if i >= 2 and time.perf_counter() > until:
            break
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < until and len(times) < most):
        times.append(time_ms(call))
    return times


def environment() -> dict[str, Any]:
    """What a figure depends on besides the artifact."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "isa": [
            f
            for f in ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp")
            if f in _flags()
        ],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo(key: str) -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.lower().startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    return (_cpuinfo("flags") or _cpuinfo("features")).split()


def noise(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Quiet noise of these shapes by input name, always the same."""
    rng = np.random.default_rng(0)
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load and time one artifact in this process.

    Args:
        job: runtime, precision, threads, settings, seconds; graphs, run one after the other in each query: folder,
            files, inputs (name → shape) of each; stream: the spec of a streaming graph, a query is then one call;
            paced: call at the pace of audio, load: with a second process that keeps a core busy.

    Returns:
        load time, percentiles in ms, number of queries, peak RSS of the process in MB.
    """
    before_mb = peak_rss_mb()
    module = runtime(job["runtime"])
    calls = []
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for graph in job["graphs"]:
            runner = module.Runner(
                Path(graph["folder"]), graph["files"], job["precision"], job["threads"], job.get("settings")
            )
            stack.enter_context(runner)
            calls.append((runner, noise(graph["inputs"])))
        load_ms = (time.perf_counter() - start) * 1e3
        if job.get("stream"):
            hops = Hops(calls[0][0].bound, StreamSpec.from_json(job["stream"]))
            samples = noise({"mixture": [hops.spec.call_samples]})["mixture"]
            if job.get("paced"):
                return {"load_ms": round(load_ms, 1), **_paced(hops, samples, job), **_closing(module, before_mb)}
            times = latencies_ms(lambda: hops.call(samples), job["seconds"], most=20_000)
        else:
            times = latencies_ms(lambda: [runner.run(feeds) for runner, feeds in calls], job["seconds"])
    return {
        "load_ms": round(load_ms, 1),
        "queries": len(times),
        **percentiles(times),
        **_closing(module, before_mb),
    }


def _closing(module: Any, before_mb: float) -> dict[str, Any]:
    return {
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "start_rss_mb": round(before_mb, 1),
        "runtime_version": module.version(),
    }


def _paced(hops: Hops, samples: np.ndarray, job: Mapping[str, Any]) -> dict[str, Any]:
    from edgesep.paced import Load, paced

    period_s = hops.spec.call_samples / hops.spec.sample_rate_hz
    with Load() if job.get("load") else contextlib.nullcontext():
        return paced(lambda: hops.call(samples), period_s, job["seconds"])


def peak_rss_mb() -> float:
    """Peak memory of this process; where /proc tells, without what the parent had before exec."""
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def measure_apart(job: Mapping[str, Any]) -> dict[str, Any]:
    """``measure`` in a fresh process.

    Raises:
        VerificationError: the process failed; its last line is the message.
    """
    done = subprocess.run(
        [sys.executable, "-m", "edgesep.measure"], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise VerificationError(f"measuring {job['runtime']} {job['precision']} failed: {said[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def paired_ms(
    calls: Mapping[Any, Callable[[], Any]], seconds: float, least: int = 5, warm: int = 2
) -> dict[Any, list[float]]:
    """Time several calls A B C A B C ... in one run, so that whatever else the machine does hits all alike."""
    for call in calls.values():
        for _ in range(warm):
            call()
    times: dict[Any, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while min(map(len, times.values())) < least or time.perf_counter() < until:
        for name, call in calls.items():
            times[name].append(time_ms(call))
    return times


def main() -> None:
    try:
        print(json.dumps(measure(json.load(sys.stdin))))
    except EdgesepError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
