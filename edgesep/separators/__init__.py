"""The separators. The folder is the registry: a module here that declares ``NAMES`` is a separator."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
    checkpoint: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    variant: str | None = None,
    front_end: str | Path | None = None,
) -> Separator:
    """Load a trained separator from its authors' file.

    Args:
        checkpoint: ``best_model.pth``, a Lightning ``.ckpt`` or a bare state dict.
        config: ``conf.yml`` (looked for beside the checkpoint) or its content.
        name: the class name, where neither file says it.
        variant: of the arithmetic, for separators that have several (TFACM: "causal" or "released").
        front_end: checkpoint of the lip front-end, where it is a file of its own (IIANet).

    Raises:
        InputError: the files cannot be used; the message says which and why.
    """
    read = read_checkpoint(checkpoint, config)
    if variant is not None:
        read.config["variant"] = variant
    wanted = name or read.model
    modules = list(separator_modules())
    if wanted is None:
        fitting = [m for m in modules if m.recognises(read.state)]
        if len(fitting) != 1:
            raise InputError(f"{checkpoint} does not say which separator it is; give its conf.yml or a name")
    else:
        fitting = [m for m in modules if wanted in m.NAMES]
        if not fitting:
            names = sorted(n for m in modules for n in m.NAMES)
            raise InputError(f"separator {wanted!r} is not known, known are {', '.join(names)}")
    built: Separator = fitting[0].build(read)
    if variant is not None and built.config.get("variant") != variant:
        raise InputError(f"{built.name} has no variant {variant!r}; leave it out")
    return _with_front_end(built, read, front_end)


def _with_front_end(built: Separator, read: Checkpoint, path: str | Path | None) -> Separator:
    """Put the front-end before a separator that takes an embedding."""
    if len(built.inputs) == 1:
        if path is not None:
            raise InputError(f"{built.name} takes audio alone; leave out the front-end {path}")
        return built
    if path is not None:
        front = load_separator(path)
    elif read.video_state:
        front = load_separator_of(replace(read, state=read.video_state, config={}))
    else:
        return built
    made, taken = front.outputs[0].shape[1], built.inputs[1].shape[1]
    if made != taken:
        raise InputError(
            f"the front-end {path or read.path} makes an embedding of {made} channels, {built.name} was trained with"
            f" {taken}; give the front-end it was trained with"
        )
    return replace(built, front_end=front)


def load_separator_of(read: Checkpoint) -> Separator:
    """The one separator that recognises these weights."""
    fitting = [m for m in separator_modules() if m.recognises(read.state)]
    if len(fitting) != 1:
        raise InputError(f"{read.path} holds video weights of no known front-end")
    built: Separator = fitting[0].build(read)
    return built
