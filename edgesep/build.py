"""Artifacts: the file of a runtime for one target, made from the graph behind it, in a folder of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from edgesep import bundle, kernels
from edgesep.artifact import Artifact
from edgesep.ops import onnx_forms
from edgesep.passes.base import Tick
from edgesep.recipe import TargetSection
from edgesep.runtimes import int8_form, runtime
from edgesep.runtimes.base import Int8Form
from edgesep.separators import Separator
from edgesep.spec import InputError, UnsupportedError
from edgesep.store import Store, file_digest

OF_THE_RUNTIME = {"fp32", "bf16"}  # precisions of the runtime, not of the graph
#: (precision, form) → the ONNX file and the key of the step that made it
Models = dict[tuple[str, Int8Form | None], tuple[Path, dict[str, Any]]]


def made_by(target: TargetSection) -> tuple[str, Int8Form | None]:
    """Which graph is behind a target."""
    if target.precision in OF_THE_RUNTIME:
        return "fp32", None
    form = int8_form(target.runtime, target.ops == "native") if target.precision == "int8" else None
    return target.precision, form


def build(
    target: TargetSection,
    separator: Separator,
    models: Models,
    out: Path,
    store: Store,
    tick: Tick,
    *,
    main: bool = True,
) -> Artifact:
    """The artifact of one target, in a folder of its own in ``out``; a note says if it cannot run here.

    Args:
        models: the graphs that targets are made of.
        main: the separator itself, not its front-end.

    Raises:
        InputError: native operators are asked for and the separator has none.
        UnsupportedError: the kernels cannot be compiled here.
    """
    module, (model, key) = runtime(target.runtime), models[made_by(target)]
    has_both = onnx_forms.has_native_form(onnx.load(model), module)
    library = None
    if target.ops == "native":
        instead = 'leave ops = "portable" for this target'
        library = native_library(separator, has_both, target.runtime, instead, tick, main=main)

    def make(folder: Path) -> None:
        tick(0, 0, f"building {separator.name} for {target.runtime} {target.precision}")
        form = folder / "model.onnx"
        onnx_forms.write_form(model, form, module, native=library is not None, precision=target.precision)
        files = module.build(form, folder, target.precision, separator.profile(), library)
        (folder / "files.json").write_text(json.dumps(files))

    built_key = {"of": key, "runtime": target.runtime, "precision": target.precision, "version": module.version()}
    built_key |= {"ops": target.ops, "library": library and file_digest(library)}
    built = store.step("build", built_key, make)
    files = json.loads((built / "files.json").read_text())
    extras = [*(["native"] if library else []), *(["fixed"] if target.fixed_length else [])]
    folder = out / "-".join([target.runtime, target.precision, *extras])
    folder.mkdir(parents=True)
    for name in files:
        shutil.copyfile(built / name, folder / name)
    if library:
        files.append(kernels.file_name(target.runtime))
        shutil.copyfile(library, folder / files[-1])
    artifact = Artifact(
        target.runtime,
        target.precision,
        target.threads or None,
        folder,
        tuple(files),
        ops=target.ops if has_both else None,
        settings=({"fixed_length": True} if target.fixed_length else {})
        | (getattr(module, "STREAM_SETTINGS", {}) if separator.stream else {}),
    )
    try:
        with artifact.runner():
            pass
    except UnsupportedError as e:
        return replace(artifact, note=str(e))
    return artifact


def native_library(
    separator: Separator, has_form: bool, kind: str, instead: str, tick: Tick, *, main: bool
) -> Path | None:
    """The kernels that a graph wants compiled; None for a front-end that has no native form.

    Args:
        has_form: whether the graph has one for this runtime (``has_native_form``).
        instead: what to ask for where it has none.
        main: the separator itself, not its front-end.

    Raises:
        InputError: the separator itself has none.
        UnsupportedError: the runtime takes no kernels, or they cannot be compiled here.
    """
    if not has_form:
        if main:
            raise InputError(f"{separator.name} has no native operators for {kind}; {instead}")
        return None
    kernels.refuse_without(runtime(kind))
    tick(0, 0, f"compiling the native kernels for {kind}")
    return kernels.library(kind)


def claim(out: Path) -> Path:
    """A fresh folder beside ``out``, after checking that ``out`` may be written and holds nothing foreign."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the bundle")
    if out.is_dir() and any(out.iterdir()) and not (out / bundle.MANIFEST).is_file():
        raise InputError(f"{out} is not empty and holds no bundle; give another folder")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as e:
        raise InputError(f"{out} cannot be written ({e.strerror}); give a folder you may write to") from e
    return partial


def versions() -> dict[str, str]:
    """Of everything that an artifact depends on, as far as it is installed."""
    wanted: list[str] = [
        "numpy",
        "torch",
        "onnx",
        "onnxruntime",
        "openvino",
        "tensorrt-rtx",
        "neural-compressor",
        "torch-pruning",
    ]
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in wanted:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
