"""The native scan alone, timed on this machine: numpy and the compiled core are all it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgesep import kernels, measure
from edgesep.ops import native, selective_scan

#: Rows x steps of SPMamba as published, one second at 16 kHz: over bins for each frame, over frames for each bin.
SHAPES = {"bins": (126, 250), "frames": (257, 119)}
CHANNELS, STATE = 512, 16


def inputs(batch: int, length: int, channels: int = CHANNELS, state: int = STATE) -> dict[str, np.ndarray]:
    """Random inputs as Mamba's after a little training: A around -1 to -state, steps around 1 ms to 100 ms."""
    rng = np.random.default_rng(0)
    sizes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, length, channels)),
        **dict.fromkeys(("B", "C"), (batch, length, state)),
        **dict.fromkeys(("D", "delta_bias"), (channels,)),
        "A": (channels, state),
    }
    made = {k: rng.standard_normal(v, np.float32) for k, v in sizes.items()}
    made["A"] = -np.arange(1, state + 1) * np.exp(0.2 * made["A"])
    made["delta"] *= np.float32(0.5)
    made["delta_bias"] = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), channels)))).astype(np.float32)
    return {k: aligned(v) for k, v in made.items()}


def aligned(x: np.ndarray) -> np.ndarray:
    """A float32 copy that begins on a cache line, as the tensors of a runtime do and numpy's own do not."""
    room = np.empty(x.size + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    copy = room[start : start + x.size].reshape(x.shape)
    copy[...] = x
    return copy


def bench(
    threads: tuple[int, ...], seconds: float, tick: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each shape, instruction set and number of threads, alternating within a shape.

    Raises:
        UnsupportedError, BuildError: there are no kernels and none can be built here.
    """
    library = kernels.core()
    best = library.edgesep_instruction_set()
    sets = [name for name in ("avx512", "avx2", "baseline") if not library.edgesep_use(name.encode())]
    rows = []
    try:
        for shape, (batch, length) in SHAPES.items():
            tick(f"scan over {shape}")
            given = inputs(batch, length)
            few: dict[str, Any] = {k: v[:2] if v.ndim == 3 else v for k, v in given.items()}
            wanted, _ = selective_scan.reference(**few, delta_softplus=True)

            y = aligned(given["u"])

            def run(isa: str, count: int, given: dict[str, np.ndarray] = given, y: np.ndarray = y) -> np.ndarray:
                library.edgesep_use(isa.encode())
                return native.scan(given, y, threads=count, delta_softplus=True)[0]

            cases = {(isa, count): (lambda isa=isa, count=count: run(isa, count)) for isa in sets for count in threads}
            times = measure.paired_ms(cases, seconds * len(cases))
            updates = batch * length * CHANNELS * STATE
            for (isa, count), spent in times.items():
                got = run(isa, count)[:2]
                noise = ((got - wanted) ** 2).sum()
                rows.append(
                    {
                        "scan over": shape,
                        "instruction set": isa,
                        "threads": count,
                        "ns per state update": round(float(np.median(spent)) * 1e6 / updates, 4),
                        "p50 ms": round(float(np.median(spent)), 2),
                        "SNR dB": round(float(10 * np.log10((wanted**2).sum() / noise)), 1),
                    }
                )
    finally:
        library.edgesep_use(best)
    return rows
