"""The separators. The folder is the registry: a module here that declares ``NAMES`` is a separator."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from edgesep.separators.base import Checkpoint, Separator, read_checkpoint
from edgesep.spec import InputError

__all__ = ["Checkpoint", "Separator", "load_separator", "separator_modules"]


def separator_modules() -> Iterator[ModuleType]:
    """Every separator in this folder."""
    for info in pkgutil.iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        if hasattr(module, "NAMES"):
            yield module


def load_separator(
    checkpoint: str | Path, config: str | Path | Mapping[str, Any] | None = None, *, name: str | None = None
) -> Separator:
    """Load a trained separator from its authors' file.

    Args:
        checkpoint: ``best_model.pth``, a Lightning ``.ckpt`` or a bare state dict.
        config: ``conf.yml`` (looked for beside the checkpoint) or its content.
        name: the class name, where neither file says it.

    Raises:
        InputError: the files cannot be used; the message says which and why.
    """
    read = read_checkpoint(checkpoint, config)
    wanted = name or read.model
    modules = list(separator_modules())
    if wanted is None:
        found = [m for m in modules if m.recognises(read.state)]
        if len(found) != 1:
            raise InputError(f"{checkpoint} does not say which separator it is; give its conf.yml or a name")
        return _build(found[0], read)
    for module in modules:
        if wanted in module.NAMES:
            return _build(module, read)
    names = sorted(n for m in modules for n in m.NAMES)
    raise InputError(f"separator {wanted!r} is not known, known are {', '.join(names)}")


def _build(module: ModuleType, read: Checkpoint) -> Separator:
    built: Separator = module.build(read)
    return built
