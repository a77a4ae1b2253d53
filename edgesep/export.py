"""One checkpoint, exported in float32 for one runtime, without a recipe."""

from __future__ import annotations

import shutil
from pathlib import Path

from edgesep import bundle, graph, verify
from edgesep.line import ENGINE_LENGTHS_S, ODD_LENGTHS_S, claim
from edgesep.passes.base import Tick, silent
from edgesep.runtimes import runtime
from edgesep.separators import load_separator
from edgesep.spec import InputError, UnsupportedError, VerificationError
from edgesep.store import replace_folder


def export_checked(
    checkpoint: Path, config: Path | None, name: str, out: Path, tick: Tick = silent
) -> tuple[list[Path], str]:
    """Export a checkpoint in float32 for one runtime and check it against the original where it can run here.

    Returns:
        The files written, and a sentence with the output SNR in dB.

    Raises:
        VerificationError: the export's output is more than 80 dB SNR away from the original's; nothing is written.
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
        lengths = tuple(int(s * separator.sample_rate_hz) for s in ENGINE_LENGTHS_S)
        files = module.build(partial / "model.onnx", partial, "fp32", lengths)
        runner = module.Runner(partial, files, "fp32")
        said = f"{separator.name} for {module.version() if name == 'tensorrt' else f'{name} {module.version()}'}: "
        try:
            with bundle.Separating(runner, separator.inputs[0].name, separator.outputs[0].name) as run:
                noise = [
                    separator.example_inputs(int(s * separator.sample_rate_hz), 2)[0].numpy() for s in ODD_LENGTHS_S
                ]
                lowest = verify.shapes_snr_db(run, ((x, separator(x).numpy()) for x in noise))
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
