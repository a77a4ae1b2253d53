"""Value types that every part of the library shares: tensor descriptions, criteria and the error types.

Costs numpy only, so that a device can import it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
class Criteria:
    """What an artifact must reach to be released; ``None`` means not checked.

    Attributes:
        max_si_snr_drop_db: mean SI-SNR lost against the float original on the test mixtures, in dB.
        min_output_snr_db: SNR of a float artifact's output against the original's output, in dB. Low-precision
            artifacts are judged by the drop instead: their output differs from the original's by design.
        max_rtf: real-time factor (compute time divided by audio time), p50.
    """

    max_si_snr_drop_db: float | None = 0.3
    min_output_snr_db: float | None = 80.0
    max_rtf: float | None = None
