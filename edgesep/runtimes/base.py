"""The contract of a runner."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from edgesep.spec import StreamSpec

#: input name → its shortest, usual and longest shape, for runtimes that compile for a range
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Int8Form:
    """Which Q/DQ graph a runtime multiplies in INT8.

    Attributes:
        symmetric: int8 activations around zero (TensorRT, ARM); else uint8 with a zero point (x86).
        outputs: what convolutions make is quantized too, without which some runtimes compute them in float.
        recurrent: LSTMs with INT8 weights, whose activations are quantized as they come; their state stays in float.
            Native streams have none: their input projections are products like others (``lstm_fusion``).
        narrow: its files store weights of eight bits as such also where they multiply in float (``compact``).
        fused: it runs whole units on native kernels, which round less (``fusion``, ``stream_fusion``): trials judge
            that form.
    """

    symmetric: bool = False
    outputs: bool = False
    recurrent: bool = False
    narrow: bool = False
    fused: bool = False


#: Operators of our own whose products are in float, or in integers, as the processor has it: no profile tells.
IN_FLOAT = ("PastAttention", "LstmSteps")


@dataclass(frozen=True)
class Executed:
    """Kernels that ran, of one operator and precision.

    Attributes:
        operator: what it computes, in the runtime's words.
        precision: what it computes in; "conversion" for those that only change precision.
        ms: their time in one query.
    """

    operator: str
    precision: str
    ms: float


def started(described: str) -> dict[str, np.ndarray]:
    """States of another type than float32, as a stream begins, from what a file says of itself (JSON)."""
    stream = json.loads(described or "{}").get("stream")
    states = StreamSpec.from_json(stream).states if stream else ()
    return {state.name: state.start() for state in states if state.dtype != "float32"}


class Runner(Protocol):
    """Runs one artifact. Construction is cheap; ``__enter__`` loads, ``__exit__`` frees."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once: arrays by input name → arrays by output name, float32 but for states that the file says are not."""
        ...

    def bound(self, feeds: dict[str, np.ndarray]) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
        """The same for arrays that stay where they are, of fixed shapes: bound once, nothing allocated in a call.

        Where the graph holds a state in another type, its start in that type takes its place in ``feeds``. The function
        that comes back reads the arrays that are there, whatever they hold then (its argument is theirs, as in
        ``run``), and returns the same output arrays every time.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
