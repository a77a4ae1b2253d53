"""The runtimes. The folder is the registry: one file per runtime, imported by name and only when asked for.

A runtime module holds ``PACKAGE`` (what pip calls it), ``version()``, ``build(model, folder, precision, shapes,
library)`` → file names, and ``Runner(folder, files, precision, threads, settings)``; optionally ``SETTINGS``, what may
be set instead of its defaults (``tune``), ``STREAM_SETTINGS``, what suits a stream, ``CHUNKED_SCAN``, which portable
form of the selective scan suits it, ``TAKES_KERNELS``, whether it runs the native one, ``FUSES``, whether those of
fused units and of streams too, ``ROWS``, whether it gains from a few wide rows at a time (``edgesep.rows``),
``FIXES_LENGTH``, whether it gains from one length (setting ``fixed_length``), ``INT8``, the ``base.Int8Form`` that it
multiplies in INT8, and ``executed(folder, files, precision, threads, feeds)``, the kernels (``base.Executed``) of one
query. It imports its own package and never torch (``eager`` excepted).
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from types import ModuleType

from edgesep.runtimes.base import Int8Form
from edgesep.spec import UnsupportedError

__all__ = ["int8_form", "names", "runtime"]


def names() -> list[str]:
    """Every runtime in this folder."""
    return sorted(i.name for i in pkgutil.iter_modules(__path__) if i.name != "base")


def runtime(name: str) -> ModuleType:
    """The runtime module of that name, its package imported.

    Raises:
        UnsupportedError: no such runtime, or its package is not installed.
    """
    if name not in names():
        raise UnsupportedError(f"runtime {name!r} is not known, known are {', '.join(names())}")
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError as e:
        package = {"eager": "edgesep[build]", "tensorrt": "tensorrt-rtx"}.get(name, name)
        raise UnsupportedError(
            f"runtime {name!r} is not installed here ({e}); install it with: pip install {package}"
        ) from e


def int8_form(name: str, native: bool = False) -> Int8Form:
    """The Q/DQ graph that suits a runtime, with native kernels or without: its ``INT8``, else the plain one."""
    module = runtime(name)
    form: Int8Form = getattr(module, "INT8", Int8Form())
    return replace(form, fused=native and getattr(module, "FUSES", False))
