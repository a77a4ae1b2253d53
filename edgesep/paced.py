"""A stream measured at the pace of audio: a call's samples arrive every call period, not back to back.

What a user of a stream fears are the calls that come late, so those are counted: a call misses its deadline when it is
not done before the next one's samples have arrived.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgesep.measure import percentiles


def paced(call: Callable[[], Any], period_s: float, seconds: float) -> dict[str, Any]:
    """Run ``call`` once in every period, for ``seconds`` and after half a second of warming up.

    Returns:
        p50, p90, p99 and p99.9 of the time a call computes, jitter (standard deviation of when a call is done after its
        samples arrived), late calls and the longest run of them.
    """
    for _ in range(max(3, int(0.5 / period_s))):
        call()
    count = max(1, int(seconds / period_s))
    computing, done = np.empty(count), np.empty(count)
    begin = time.perf_counter() + period_s
    for k in range(count):
        arrival = begin + k * period_s
        while (left := arrival - time.perf_counter()) > 0:
            time.sleep(left)
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        computing[k], done[k] = end - start, end - arrival
    late = done > period_s
    figures = percentiles([float(t) for t in computing * 1e3], (50, 90, 99, 99.9))
    return {
        "calls": count,
        **figures,
        "jitter_ms": round(float(done.std()) * 1e3, 4),
        "late_calls": int(late.sum()),
        "longest_late_run": longest_run(late),
    }


def longest_run(late: np.ndarray) -> int:
    """Length of the longest run of true values."""
    longest = now = 0
    for one in late:
        now = now + 1 if one else 0
        longest = max(longest, now)
    return longest


class Load:
    """A second process that keeps one core busy, as another program on the device would."""

    def __enter__(self) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True)
        self._process.start()
        time.sleep(0.5)  # until it is up

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _busy() -> None:
    x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    while True:
        x = np.tanh(x @ x * 1e-2)
