"""One checkpoint, exported in float32 for one runtime, without a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgesep import graph, verify
from edgesep.line import ODD_LENGTHS_S, claim, engine_shapes
from edgesep.passes.base import Tick, silent
from edgesep.runtimes import runtime
from edgesep.separators import Separator, load_separator
from edgesep.spec import InputError, UnsupportedError, VerificationError
from edgesep.store import replace_folder


def export_checked(
    checkpoint: Path, config: Path | None, name: str, out: Path, tick: Tick = silent
) -> tuple[list[Path], str]:
    """Export a checkpoint in float32 for one runtime and check it against the original where it can run here.

    Returns:
        The files written, and a sentence with the output SNR in dB.

    Raises:
        VerificationError: the output SNR against the original is below 80 dB; nothing is written.
    """
    module = runtime(name)
    if name == "eager":
        raise UnsupportedError("eager is the original itself; export for onnxruntime, openvino or tensorrt")
    separator = load_separator(checkpoint, config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; give a new one")
    partial = claim(out)
    try:
        tick(0, 0, "exporting to ONNX")
        graph.export_onnx(separator, separator.module, partial / "model.onnx")
        tick(0, 0, f"building for {name}")
        files = module.build(partial / "model.onnx", partial, "fp32", engine_shapes(separator))
        runner = module.Runner(partial, files, "fp32")
        said = f"{separator.name} for {module.version() if name == 'tensorrt' else f'{name} {module.version()}'}: "
        try:
            with runner:
                lowest = min(_snr_db(runner, separator, seconds) for seconds in ODD_LENGTHS_S)
            if lowest < 80:
                raise VerificationError(
                    f"the export differs from the original: output SNR {lowest:.1f} dB, required 80 dB"
                )
            said += f"output SNR against the original {lowest:.1f} dB (three lengths, batch 2)"
        except UnsupportedError as e:
            said += f"built, not run ({e})"
        replace_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [out / f for f in files], said


def _snr_db(runner: Any, separator: Separator, seconds: float) -> float:
    """Output SNR against the original on noise of one length, batch 2."""
    inputs = separator.example_inputs(int(seconds * separator.sample_rate_hz), 2)
    outputs = runner.run({spec.name: x.numpy() for spec, x in zip(separator.inputs, inputs, strict=True)})
    return verify.output_snr_db(outputs[separator.outputs[0].name], separator(*inputs).numpy())
