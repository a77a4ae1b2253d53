"""The float original in eager torch: the reference of every other runtime."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np
import torch

from edgesep.separators.base import Separator

PACKAGE = "torch"


def version() -> str:
    return str(torch.__version__)


class Runner:
    """Runs a ``Separator``'s module; the global thread count of torch is set inside the context only."""

    def __init__(self, separator: Separator, threads: int | None = None):
        self.separator, self.threads = separator, threads

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._before)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            y = self.separator.module(*(torch.from_numpy(feeds[s.name]) for s in self.separator.inputs))
        return {self.separator.outputs[0].name: y.numpy()}
