"""One checkpoint, exported in float32 for one runtime, without a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx

from edgesep import graph, kernels, verify
from edgesep.build import claim, native_library
from edgesep.golden import ODD_LENGTHS_S
from edgesep.ops import onnx_forms
from edgesep.passes.base import Tick, silent
from edgesep.runtimes import runtime
from edgesep.separators import Separator
from edgesep.spec import InputError, UnsupportedError, VerificationError
from edgesep.store import replace_folder


def export_checked(
    separator: Separator, name: str, out: Path, tick: Tick = silent, *, native: bool = False
) -> tuple[list[Path], list[str]]:
    """Export a separator in float32 for one runtime and check it against the original where it can run here.

    A front-end is exported too, as a graph of its own in ``out/front-end``.

    Args:
        native: leave what can be to the native kernels, whose library is put beside the graph.

    Returns:
        The files written, and a sentence for each graph with its output SNR in dB.

    Raises:
        InputError: native operators are asked for and the separator has none, or ``out`` is not empty.
        VerificationError: the output SNR against the original is below 80 dB; nothing is written.
    """
    module = runtime(name)
    if name == "eager":
        raise InputError("eager is the original itself; export for onnxruntime, openvino or tensorrt")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give a new one")
    partial = claim(out)
    written, said = [], []
    try:
        for graph_of, folder in ((separator, partial), (separator.front_end, partial / "front-end")):
            if graph_of is None:
                continue
            folder.mkdir(exist_ok=True)
            files, sentence = _export(graph_of, module, name, folder, tick, native, main=graph_of is separator)
            written += [folder.relative_to(partial) / f for f in files]
            said.append(sentence)
        replace_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [out / f for f in written], said


def _export(
    separator: Separator, module: Any, name: str, folder: Path, tick: Tick, native: bool, main: bool
) -> tuple[list[str], str]:
    """One graph: its files in ``folder``, and what the check found."""
    tick(0, 0, f"exporting {separator.name} to ONNX")
    model = folder / "model.onnx"
    graph.export_onnx(separator, separator.module, model)
    library = None
    if native:
        has_form = onnx_forms.has_native_form(onnx.load(model), module)
        compiled = native_library(separator, has_form, name, "leave --native out", tick, main=main)
        if compiled:
            library = folder / kernels.file_name(name)
            shutil.copyfile(compiled, library)
    onnx_forms.write_form(model, model, module, native=library is not None)
    tick(0, 0, f"building {separator.name} for {name}")
    files = module.build(model, folder, "fp32", separator.profile(), library)
    files += [library.name] if library else []
    runner = module.Runner(folder, files, "fp32")
    said = f"{separator.name} for {module.version() if name == 'tensorrt' else f'{name} {module.version()}'}: "
    try:
        with runner:
            lowest = min(_snr_db(runner, separator, seconds) for seconds in ODD_LENGTHS_S)
        if lowest < 80:
            raise VerificationError(f"the export differs from the original: output SNR {lowest:.1f} dB, required 80 dB")
        said += f"output SNR against the original {lowest:.1f} dB (three lengths, batch 2)"
    except UnsupportedError as e:
        said += f"built, not run ({e})"
    return files, said


def _snr_db(runner: Any, separator: Separator, seconds: float) -> float:
    """Output SNR against the original on noise of one length, batch 2."""
    inputs = separator.example_inputs(int(seconds * separator.sample_rate_hz), 2)
    outputs = runner.run({spec.name: x.numpy() for spec, x in zip(separator.inputs, inputs, strict=True)})
    return verify.output_snr_db(outputs[separator.outputs[0].name], separator(*inputs).numpy())
