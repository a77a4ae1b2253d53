"""The contract of a runner."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np

#: input name → its shortest, usual and longest shape, for runtimes that compile for a range
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class Runner(Protocol):
    """Runs one artifact. Construction is cheap; ``__enter__`` loads, ``__exit__`` frees."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once: float32 arrays by input name → arrays by output name."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
