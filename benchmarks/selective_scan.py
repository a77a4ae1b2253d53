"""The selective scan in every form, paired in one run: alone at SPMamba's shapes, and SPMamba as published around it.

    python benchmarks/selective_scan.py                     # both parts, 1 and 2 threads
    python benchmarks/selective_scan.py --part operator --seconds 20

Alone: ONNX Runtime's Scan (the portable form), the native operator in ONNX Runtime and in OpenVINO, against float64,
beside the rate of this machine's matrix products. Whole: one second at 16 kHz through SPMamba at its published size,
random weights; eager with the scan as a loop of torch operators (what a machine without kernels runs), eager with the
kernels, and both forms of the export in both runtimes. Rows replace those of ``results/selective_scan.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from builds import built
from onnx import TensorProto, helper
from paper_tables import PUBLISHED
from recorded import record
from runtimes import spread

from edgesep import graph, kernels, measure
from edgesep.kernels_bench import SHAPES, aligned, inputs
from edgesep.ops import onnx_forms, selective_scan, selective_scan_onnx
from edgesep.runtimes import runtime
from edgesep.runtimes.eager import Runner as EagerRunner
from edgesep.separators import spmamba
from edgesep.verify import output_snr_db

HERE = Path(__file__).parent
SPMAMBA = next(size for size in PUBLISHED if size.name == "SPMamba")


def session(model: onnx.ModelProto, threads: int, native: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Idle threads of one runtime must not spin in the way of the other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if native:
        options.register_custom_ops_library(str(kernels.library("onnxruntime")))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def model_of(node: onnx.NodeProto, given: dict[str, np.ndarray], outputs: list[str]) -> onnx.ModelProto:
    ins = [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in given.items()]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgesep", 1)]
    return helper.make_model(helper.make_graph([node], "one", ins, outs), opset_imports=opsets, ir_version=9)


def bound(run: onnxruntime.InferenceSession, given: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """The session as a call that writes ``y`` to the same memory each time."""
    y = aligned(given["u"])
    binding = run.io_binding()
    for name, value in given.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def call() -> np.ndarray:
        run.run_with_iobinding(binding)
        return y

    return call


def matmul_gflops(threads: int) -> float:
    """Rate of a matrix product that stays in the cache, in ONNX Runtime: the most this machine's cores add up."""
    rng = np.random.default_rng(0)
    given = {"a": rng.standard_normal((1000, 128), np.float32), "b": rng.standard_normal((128, 512), np.float32)}
    run = session(model_of(helper.make_node("MatMul", ["a", "b"], ["c"]), given, ["c"]), threads, native=False)
    times = measure.latencies_ms(lambda: run.run(None, given), 1.0)
    return 2 * 1000 * 128 * 512 / float(np.median(times)) / 1e6


def operator(threads: int, seconds: float) -> list[dict[str, Any]]:
    """The scan alone; rows by shape and form."""
    rows = []
    peak = matmul_gflops(threads)
    for shape, (batch, length) in SHAPES.items():
        given = inputs(batch, length)
        names = [name if name in given else "" for name in selective_scan_onnx.INPUTS][: len(given)]
        node = helper.make_node("SelectiveScan", names, ["y", "last_state"], domain="edgesep", delta_softplus=1)
        model = model_of(node, given, ["y"])
        loop, native = session(onnx_forms.portable(model), threads, False), session(model, threads, True)
        core = openvino.Core()
        core.add_extension(str(kernels.library("openvino")))
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(model, Path(folder, "model.onnx"))
            read = core.read_model(Path(folder, "model.onnx"))
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = core.compile_model(read, "CPU", options).create_infer_request()
        calls: dict[tuple[str, str], Callable[[], np.ndarray]] = {
            ("onnxruntime", "portable"): bound(loop, given),
            ("onnxruntime", "native"): bound(native, given),
            ("openvino", "native"): lambda request=request, given=given: request.infer(
                given, share_inputs=True, share_outputs=True
            )[0],
        }
        few = {k: v[:2] if v.ndim == 3 else v for k, v in given.items()}
        wanted, _ = selective_scan.reference(**few, delta_softplus=True)
        times = measure.paired_ms(calls, seconds)
        updates = batch * length * given["A"].size
        for (name, form), spent in times.items():
            ratio, low, high = spread(spent, times["onnxruntime", "portable"])
            per_update = float(np.median(spent)) * 1e6 / updates
            rows.append(
                {
                    "part": "operator",
                    "over": shape,
                    "runtime": name,
                    "scan": form,
                    "threads": threads,
                    "p50_ms": round(float(np.median(spent)), 2),
                    "ns_per_update": round(per_update, 4),
                    "faster": round(ratio, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "snr_db": round(output_snr_db(calls[name, form]()[:2], wanted), 1),
                    # An exponential is 6 multiply-adds, the update and its output 3 more: 18 operations.
                    "gflops": round(18 / per_update, 1),
                    "matmul_gflops": round(peak, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def whole(threads: int, seconds: float) -> list[dict[str, Any]]:
    """SPMamba at its published size; rows by runtime and form of the scan."""
    torch.manual_seed(0)
    separator = spmamba.create(SPMAMBA.config, SPMAMBA.rate)
    x = separator.example_inputs(SPMAMBA.rate)[0].numpy()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as root:
        exported = Path(root, "model.onnx")
        graph.export_onnx(separator, separator.module, exported)
        eager = stack.enter_context(EagerRunner(separator, threads))
        runners: dict[tuple[str, str], Any] = {("eager", "native"): eager}
        for name in ("onnxruntime", "openvino"):
            for form in ("portable", "native"):
                folder = Path(root, f"{name}-{form}")
                files = built(exported, name, "fp32", folder, native=form == "native")
                spinless = {"spin": False} if name == "onnxruntime" else {}
                runner = runtime(name).Runner(folder, files, "fp32", threads, spinless)
                runners[name, form] = stack.enter_context(runner)
        found: dict[tuple[str, str], np.ndarray] = {}

        def timed(key: tuple[str, str], run: Any) -> Callable[[], None]:
            def call() -> None:
                found[key] = run.run({"mixture": x})["estimates"]

            return call

        calls = {key: timed(key, run) for key, run in runners.items()}
        eager_reference = timed(("eager", "reference"), eager)

        def without_kernels() -> None:
            usual = kernels.core_if_possible
            kernels.core_if_possible = lambda: None
            try:
                eager_reference()
            finally:
                kernels.core_if_possible = usual

        calls = {("eager", "reference"): without_kernels, **calls}
        times = measure.paired_ms(calls, seconds, least=2, warm=1)
        rows = []
        for (name, form), spent in times.items():
            ratio, low, high = spread(spent, times["eager", "reference"])
            rows.append(
                {
                    "part": "whole",
                    "runtime": name,
                    "scan": form,
                    "threads": threads,
                    "p50_ms": round(float(np.median(spent)), 1),
                    "faster": round(ratio, 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "output_snr_db": round(output_snr_db(found[name, form], found["eager", "reference"]), 1),
                    "rounds": len(spent),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"operator": operator, "whole": whole}
    parser.add_argument("--part", choices=parts, help="default: both")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each shape or size")
    args = parser.parse_args()
    common = {
        "versions": {"onnxruntime": onnxruntime.__version__, "openvino": runtime("openvino").version()},
        "instruction_set": kernels.core().edgesep_instruction_set().decode(),
    }
    chosen = [args.part] if args.part else list(parts)
    rows = [row | common for part in chosen for threads in args.threads for row in parts[part](threads, args.seconds)]
    record("selective_scan", rows, ("part", "threads"))


if __name__ == "__main__":
    main()
