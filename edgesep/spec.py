"""Value types that every part of the library shares: tensor descriptions, criteria and the error types.

Costs numpy only, so that a device can import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


class EdgesepError(Exception):
    """Base of the library's own errors. The message says what was expected, what came and what to do."""


class VerificationError(EdgesepError):
    """An artifact does not do what it promised (quality, hash, missing output, NaN)."""


class BuildError(EdgesepError):
    """An artifact could not be made from valid input."""


class UnsupportedError(EdgesepError):
    """The request is understood but this machine, runtime or separator cannot serve it."""


class InputError(EdgesepError, ValueError):
    """A file, recipe or signal from the user cannot be used as it is."""


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a graph.

    Attributes:
        name: name in the graph.
        shape: sizes; a string names a dynamic axis (for example ``("batch", "samples")``).
        dtype: numpy dtype name.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorSpec:
        return cls(data["name"], tuple(data["shape"]), data["dtype"])


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a streaming graph hands to its next call: input ``NAME``, output ``next_NAME``.

    Attributes:
        initial: value at the start of a stream: one number, or one for each element of the last axis.
        ring_axis: None: ``next_NAME`` takes the place of ``NAME``. Else the input is a ring along this axis and
            ``next_NAME`` holds the new frames alone; they go to the slots ``frame index modulo length``. The caller
            writes them into the buffer that the graph reads, so that nothing else of it is copied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    initial: float | tuple[float, ...] = 0.0
    ring_axis: int | None = None

    def start(self) -> np.ndarray:
        """A fresh array of the initial value."""
        return np.ascontiguousarray(np.broadcast_to(np.asarray(self.initial, self.dtype), self.shape).copy())


@dataclass(frozen=True)
class StreamSpec:
    """What a streaming graph promises.

    Attributes:
        hop_samples: one frame's step.
        hops_per_call: hops that one call takes and returns.
        algorithmic_latency_samples: the synthesis window; an output sample is complete that long after its input began.
        look_ahead_samples: the latest input an output sample depends on lies this far ahead of it, at most.
        context_frames: what attention sees of the past, its own frame included; None where there is no attention.
        states: in the order of the graph's inputs.
    """

    sample_rate_hz: int
    hop_samples: int
    hops_per_call: int
    algorithmic_latency_samples: int
    look_ahead_samples: int
    context_frames: int | None
    states: tuple[StateSpec, ...]

    @property
    def call_samples(self) -> int:
        """Samples in and out of one call."""
        return self.hop_samples * self.hops_per_call

    @property
    def delay_samples(self) -> int:
        """By how much the outputs lag behind the inputs of the same call."""
        return self.algorithmic_latency_samples - self.hop_samples

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StreamSpec:
        states = []
        for state in data["states"]:
            initial = state["initial"]
            known = {
                "shape": tuple(state["shape"]),
                "initial": tuple(initial) if isinstance(initial, list) else initial,
            }
            states.append(StateSpec(**{**state, **known}))
        return cls(**{**data, "states": tuple(states)})


@dataclass(frozen=True)
class Criteria:
    """What an artifact must reach to be released; ``None`` means not checked.

    Attributes:
        max_si_snr_drop_db: mean SI-SNR lost against the float original on the test mixtures, in dB.
        worst5_drop_db: the same for the worst 5 % of the mixtures.
        min_output_snr_db: SNR of a float artifact's output against the original's output, in dB. Low-precision
            artifacts are judged by the drop instead: their output differs from the original's by design.
        max_rtf: real-time factor (compute time divided by audio time), p50.
    """

    max_si_snr_drop_db: float | None = 0.3
    worst5_drop_db: float | None = None
    min_output_snr_db: float | None = 80.0
    max_rtf: float | None = None

    def half(self) -> Criteria:
        """The same with half of what may be lost."""
        mean_db, worst_db = (v and v / 2 for v in (self.max_si_snr_drop_db, self.worst5_drop_db))
        return replace(self, max_si_snr_drop_db=mean_db, worst5_drop_db=worst_db)


def refuse_shapes(feeds: Mapping[str, np.ndarray], shapes: Mapping[str, Sequence[Any]]) -> None:
    """Say which input has a size that the graph fixes otherwise; nothing where all fit.

    Raises:
        InputError: names the input, its shape and the graph's.
    """
    for name, given in feeds.items():
        want = shapes.get(name)
        if want is None:
            raise InputError(f"the graph has no input {name!r}; it takes {', '.join(shapes)}")
        sizes = zip(want, given.shape, strict=False)
        if len(want) != given.ndim or any(isinstance(n, int) and n != m for n, m in sizes):
            raise InputError(f"input {name} must be {tuple(want)}, got {given.shape}")
