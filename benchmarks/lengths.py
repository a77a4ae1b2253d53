"""What dynamic lengths cost: the same build compiled for one length and for all, paired in one run.

    python benchmarks/lengths.py --separator TDANet --separator IIANet

Published sizes, random weights, native operators, as in ``peers.py``. OpenVINO is told the shapes (``fixed_length``);
ONNX Runtime is given a graph whose inputs have them. Rows replace those of ``results/lengths.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed
from peers import SIZES, Built
from recorded import record

from edgesep import measure
from edgesep.runtimes import runtime
from edgesep.verify import output_snr_db


def compared(made: Built, kind: str, precision: str, audio_s: float, threads: int, seconds: float) -> dict[str, Any]:
    given = made.given(int(audio_s * made.original.sample_rate_hz))
    job = made.jobs[f"edgesep, {kind} {precision}"]
    module, source = runtime(kind), made.folder / job["folder"]
    with tempfile.TemporaryDirectory() as scratch:
        folder, settings = source, {"fixed_length": True}
        if not getattr(module, "FIXES_LENGTH", False):
            folder, settings = Path(scratch), {}
            for file in job["files"]:
                shutil.copy(source / file, folder)
            model = onnx.load(folder / job["files"][0])
            for name, value in given.items():
                make_input_shape_fixed(model.graph, name, value.shape)
            onnx.save(model, folder / job["files"][0])
        # Idle threads of one must not spin in the way of the other.
        quiet = {k: v for k, v in {"spin": False}.items() if k in module.SETTINGS}
        with (
            module.Runner(source, job["files"], precision, threads, quiet) as dynamic,
            module.Runner(folder, job["files"], precision, threads, settings | quiet) as fixed,
        ):
            start = time.perf_counter()
            (found,) = fixed.run(given).values()
            first_s = time.perf_counter() - start
            snr_db = output_snr_db(found, next(iter(dynamic.run(given).values())))
            calls = {"dynamic": lambda: dynamic.run(given), "fixed": lambda: fixed.run(given)}
            medians = {k: float(np.median(t)) for k, t in measure.paired_ms(calls, seconds).items()}
    return {
        "runtime": kind,
        "precision": precision,
        "threads": threads,
        "audio_s": audio_s,
        "dynamic_ms": round(medians["dynamic"], 2),
        "fixed_ms": round(medians["fixed"], 2),
        "fixed_faster": round(medians["dynamic"] / medians["fixed"], 3),
        "first_query_s": round(first_s, 2),
        "output_snr_db": round(min(snr_db, 999.0), 1),
    }


def rows(name: str, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    made = Built(name, quantizers=False)
    for kind in ("onnxruntime", "openvino"):
        for precision in ("fp32", "int8"):
            for audio_s in (1.0, 4.0):
                yield {"separator": name, **compared(made, kind, precision, audio_s, threads, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--separator", choices=SIZES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each pair is timed")
    args = parser.parse_args()
    for name in args.separator or SIZES:
        found = []
        for row in rows(name, args.threads, args.seconds):
            found.append(row)
            print(json.dumps(row), flush=True)
        record("lengths", found, ("separator",))


if __name__ == "__main__":
    main()
