"""Whether the cores of this machine share a cache just now.

A virtual machine's cores are moved between those of its host. While two of them lie in different groups of cores,
everything that one thread of a small graph writes and another reads crosses the chip: a stream on two threads takes
twice as long, with nothing of it in the load or in the steal time. So a benchmark of two threads asks before and after.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edgesep import kernels

SOURCE = Path(__file__).with_name("round_trip.cpp")
NEAR_NS = 150  # between what is found within a group (50) and beyond (320)
ATTEMPTS = 3
PATIENCE_S = 5.0

T = TypeVar("T")


@functools.cache
def _program() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory()
    made = Path(folder.name, SOURCE.stem)
    subprocess.run([kernels.compiler(), "-O2", "-std=c++17", "-pthread", str(SOURCE), "-o", str(made)], check=True)
    return made, folder


def round_trip_ns() -> float:
    """How long a cache line takes from the first core that this process may use to the second one and back."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    said = subprocess.run([_program()[0], str(first), str(second)], check=True, capture_output=True, text=True)
    return float(said.stdout)


def near() -> bool:
    """Whether the cores share a cache; a single one has it for itself."""
    return len(os.sched_getaffinity(0)) < 2 or round_trip_ns() < NEAR_NS


def while_near(run: Callable[[], T]) -> tuple[T, bool]:
    """What ``run`` gives while the cores share a cache, and whether they did: after a few attempts it counts anyway."""
    for _ in range(ATTEMPTS):
        until = time.monotonic() + PATIENCE_S
        while not near() and time.monotonic() < until:
            time.sleep(0.2)
        found = run()
        if near():
            return found, True
    return found, False
