"""The passes. The folder is the registry: one file per pass, holding one frozen dataclass named like the file.

A pass is a value: its fields are its configuration. Called with a model and a ``Context`` it returns a ``PassResult``.
``stage`` says what it takes: ``"torch"`` passes turn a ``Separator`` into another one and act on every target;
``"lower"`` passes do so with what is exported, after those; ``"onnx"`` passes make the ONNX file of another precision
and act on the targets of that precision.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from edgesep.spec import InputError

__all__ = ["make", "names"]


def names() -> list[str]:
    """Every pass in this folder."""
    return sorted(i.name for i in pkgutil.iter_modules(__path__) if i.name != "base")


def make(name: str, **fields: Any) -> Any:
    """The pass of that name with these fields.

    Raises:
        InputError: no such pass or field, or a value it does not take.
    """
    if name not in names():
        raise InputError(f"pass {name!r} is not known, known are {', '.join(names())}")
    kind = getattr(import_module(f"{__name__}.{name}"), name.title())
    known = list(kind.__dataclass_fields__)
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(f"pass {name!r} has no field {unknown[0]!r}, it has {', '.join(known)}")
    return kind(**fields)
