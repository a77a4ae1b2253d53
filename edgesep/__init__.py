"""Speech separation on the edge: lower, prune, quantize, export and prove trained separators.

Importing costs numpy only; what needs torch or a runtime is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgesep.spec import BuildError, EdgesepError, InputError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    from edgesep.bundle import open_bundle
    from edgesep.line import deploy
    from edgesep.separators import load_separator
    from edgesep.stream import Stream

__all__ = [
    "BuildError",
    "EdgesepError",
    "InputError",
    "Stream",
    "UnsupportedError",
    "VerificationError",
    "deploy",
    "load_separator",
    "open_bundle",
]

_HOMES = {
    "Stream": "edgesep.stream",
    "deploy": "edgesep.line",
    "load_separator": "edgesep.separators",
    "open_bundle": "edgesep.bundle",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgesep' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
