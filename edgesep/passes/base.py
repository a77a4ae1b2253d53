"""What passes are given and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesep.calibration import MixtureSet
from edgesep.separators.base import Separator
from edgesep.spec import Criteria

#: (done, total, text) of long work; total 0 where it is unknown
Tick = Callable[[int, int, str], None]


def silent(done: int, total: int, text: str) -> None:
    """The tick of one who does not want to know."""
    del done, total, text


@dataclass(frozen=True)
class Context:
    """What a pass may use besides the model.

    Attributes:
        original: the float separator as it was loaded, the reference of all quality figures.
        calibration: mixtures for calibration.
        train: mixtures whose sources may be remixed for training; the calibration set where the recipe names none.
        folder: for intermediate state; survives an interruption, so that long passes resume.
        criteria: what the artifacts must reach.
    """

    original: Separator
    calibration: MixtureSet
    train: MixtureSet
    folder: Path
    tick: Tick = silent
    criteria: Criteria = field(default_factory=Criteria)


@dataclass(frozen=True)
class PassResult:
    """A pass's outcome.

    Attributes:
        separator: the new separator, for torch passes.
        modified: whether anything changed.
        report: figures that belong into the manifest.
    """

    separator: Separator | None
    modified: bool
    report: dict[str, Any] = field(default_factory=dict)
