"""Each separator at its published size: the builds of this toolkit against what one would do otherwise.

    python benchmarks/peers.py                                        # all separators, 1 and 4 s, 1 and 2 threads
    python benchmarks/peers.py --separator TDANet --audio 1 --threads 2 --seconds 60 --json

The others: eager PyTorch, torch.compile, the plain export (no lowering) on ONNX Runtime and on OpenVINO with their
default options, the same through ONNX Runtime's static quantizer and through NNCF. SPMamba has no plain export without
this toolkit's scan, so that its "plain" is the portable form, and eager runs the scan as a loop of PyTorch operators.

Every candidate is a process of its own, stopped while it is not its turn: idle threads of one runtime spin in the way
of the next. They take turns (A B C A B C ...), a few queries each. Weights are random, so that quality is the SNR of
the output against eager PyTorch's; what INT8 costs trained separators is measured by ``compression.py``. "Of peak" is
the share of what this machine's own float matrix product reaches (ONNX Runtime, the same threads). Memory is the peak
above what the process held before it loaded anything. Rows replace those of ``results/peers.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesep import measure
from edgesep.runtimes import int8_form, runtime
from edgesep.verify import output_snr_db

HERE = Path(__file__).parent
SETS = HERE.parent / "calibration"
#: name here → title among the published sizes
SIZES = {"TDANet": "TDANet base (4 ms)", "TDANetBest": "TDANet Large (2 ms)", "IIANet": "IIANet", "SPMamba": "SPMamba"}
OURS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
BASE = "plain export, onnxruntime"
LOADING_S = 600  # torch.compile takes minutes
BURST = 3  # queries of a turn, after one that warms up


def ours(source: Path, kind: str, precision: str, folder: Path, native: bool) -> list[str]:
    """Build an exported graph for a runtime; the artifact's files, with the kernels if it is native."""
    from edgesep import kernels
    from edgesep.ops import onnx_forms

    folder.mkdir()
    module, library = runtime(kind), kernels.library(kind) if native else None
    onnx_forms.write_form(source, folder / "model.onnx", module, native=native)
    files = list(module.build(folder / "model.onnx", folder, precision, {}, library))
    if library:
        files.append(Path(shutil.copy(library, folder / kernels.file_name(kind))).name)
    return files


class Built:
    """The files of one separator, and the jobs that run them."""

    def __init__(self, name: str, folder: Path, quantizers: bool):
        import torch
        from paper_tables import PUBLISHED, created

        from edgesep import graph
        from edgesep.calibration import MixtureSet
        from edgesep.ops import onnx_forms
        from edgesep.passes.base import Context
        from edgesep.passes.lower import Lower
        from edgesep.passes.quantize import Quantize
        from edgesep.separators import lip

        self.name, self.folder = name, folder
        self.size = next(s for s in PUBLISHED if s.title == SIZES[name])
        torch.manual_seed(0)
        self.original = original = created(self.size.name, self.size.config, self.size.rate)
        torch.save(original.module.state_dict(), folder / "state.pth")
        seen = len(original.inputs) > 1
        plain, scratch = folder / "plain.onnx", folder / "own.onnx"
        graph.export_onnx(original, original.module, scratch)
        onnx_forms.write_form(scratch, plain)
        if seen:  # calibration mixtures come with mouths
            from dataclasses import replace

            self.original = original = replace(original, front_end=lip.create({}, 0))
        mixtures = MixtureSet.open(SETS / "calibration", original.sample_rate_hz, mouth=seen)
        context = Context(original, mixtures, mixtures, folder)
        lowered = Lower()(original, context).separator
        source = folder / "lowered.onnx"
        graph.export_onnx(lowered, lowered.module, source)
        quantize = Quantize(method="onnxruntime", mixtures=4)
        self.feeds = [
            {s.name: original.tensors(mixtures[i].inputs())[s.name] for s in original.inputs} for i in range(4)
        ]
        size = {"name": self.size.name, "config": self.size.config, "rate": self.size.rate}
        eager = {"state": str(folder / "state.pth"), **size}
        self.jobs: dict[str, dict[str, Any]] = {"eager PyTorch": {"kind": "eager", **eager}}
        if name != "SPMamba":  # its scan in PyTorch is a loop over all frames, which is unrolled for hours
            self.jobs["torch.compile"] = {"kind": "compile", **eager}
        self.jobs[BASE] = {"kind": "onnxruntime", "file": str(plain)}
        self.jobs["plain export, openvino"] = {"kind": "openvino", "file": str(plain)}
        self.quantizers = quantizers
        if quantizers:
            self._static_int8(plain)
        for kind, precision in OURS:
            made = folder / f"{kind}-{precision}"
            model = source
            if precision == "int8":
                model = folder / f"int8-{kind}.onnx"
                quantize(lowered, source, model, context, int8_form(kind))
            files = ours(model, kind, precision, made, native=True)
            job = {"kind": "edgesep", "runtime": kind, "precision": precision, "folder": str(made), "files": files}
            self.jobs[f"edgesep, {kind} {precision}"] = job

    def _static_int8(self, plain: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
                self.left = iter(feeds)

            def get_next(self) -> Any:
                return next(self.left, None)

        for what, only in (("", None), (", products alone", ["Conv", "MatMul", "Gemm"])):
            name, file = f"onnxruntime's static INT8{what}", self.folder / "static.onnx"
            try:
                quantize_static(plain, file, Reader(self.feeds), op_types_to_quantize=only)
            except Exception as e:  # whatever a peer's tool raises is its result
                self.jobs[name] = {"failed": first_line(e)}
            else:
                self.jobs[name] = {"kind": "onnxruntime", "file": str(file)}
                return

    def nncf(self, samples: int) -> dict[str, Any]:
        """NNCF takes static shapes alone."""
        try:
            import nncf
            import openvino

            model = openvino.Core().read_model(self.folder / "plain.onnx")
            wanted = self.given(samples)
            model.reshape({name: list(value.shape) for name, value in wanted.items()})
            feeds = [{n: np.resize(v, wanted[n].shape) for n, v in feed.items()} for feed in self.feeds]
            file = self.folder / f"nncf-{samples}.xml"
            openvino.save_model(nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds)), file, False)
        except Exception as e:  # whatever a peer's tool raises is its result
            return {"failed": first_line(e)}
        return {"kind": "openvino", "file": str(file)}

    def given(self, samples: int) -> dict[str, np.ndarray]:
        """One query: a test mixture, over and over, and noise for an embedding."""
        from edgesep.calibration import MixtureSet

        mixture = MixtureSet.open(SETS / "test", self.original.sample_rate_hz)[0].mixture
        made = {
            s.name: v.numpy() for s, v in zip(self.original.inputs, self.original.example_inputs(samples), strict=True)
        }
        return made | {"mixture": np.resize(mixture, (1, samples)).astype(np.float32)}


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def loaded(job: dict[str, Any], given: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """A candidate as a call, in the process that runs it."""
    threads = job["threads"]
    if job["kind"] in ("eager", "compile"):
        import torch
        from paper_tables import created

        from edgesep import kernels

        kernels.core_if_possible = lambda: None  # PyTorch as it is
        torch.set_num_threads(threads)
        separator = created(job["name"], job["config"], job["rate"])
        separator.module.load_state_dict(torch.load(job["state"], weights_only=True))
        module = torch.compile(separator.module) if job["kind"] == "compile" else separator.module
        inputs = [torch.from_numpy(given[s.name]) for s in separator.inputs]

        def run() -> np.ndarray:
            with torch.inference_mode():
                return np.asarray(module(*inputs))

        return run
    if job["kind"] == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
        return lambda: np.asarray(session.run(None, given)[0])
    if job["kind"] == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(job["file"], "CPU", {"INFERENCE_NUM_THREADS": threads})
        request = compiled.create_infer_request()
        return lambda: np.array(request.infer(given)[0])
    if job["kind"] == "edgesep":
        runner = runtime(job["runtime"]).Runner(Path(job["folder"]), job["files"], job["precision"], threads)
        runner.__enter__()  # until the process ends
        return lambda: np.asarray(next(iter(runner.run(given).values())))
    raise ValueError(job["kind"])


def child() -> None:
    """Load what stdin's first line says; then a line with a number asks for as many queries."""
    job = json.loads(sys.stdin.readline())
    with np.load(job["inputs"]) as file:
        given = dict(file)
    before = measure.peak_rss_mb()
    try:
        call = loaded(job, given)
        np.save(job["output"], call())
        call()
    except Exception as e:  # the parent's row says what a candidate raised
        print(json.dumps({"failed": first_line(e)}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        call()
        times = [measure.time_ms(call) for _ in range(int(line))]
        print(json.dumps({"times": times, "memory_mb": measure.peak_rss_mb() - before}), flush=True)


class Candidate:
    """A process that waits for its turn."""

    def __init__(self, job: dict[str, Any], inputs: Path, output: Path):
        env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
        command = [sys.executable, __file__, "--child"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.output, self.times, self.memory_mb = output, list[float](), 0.0
        limit = threading.Timer(LOADING_S, self.process.kill)
        limit.start()
        told = self._ask(json.dumps({**job, "inputs": str(inputs), "output": str(output)}))
        self.failed = str(told.get("failed", "")) if limit.is_alive() else f"not ready after {LOADING_S} s"
        limit.cancel()
        if not self.failed:
            self.process.send_signal(signal.SIGSTOP)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return dict(json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):
            return {"failed": f"the process ended with status {self.process.wait()}"}

    def turn(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        said = self._ask(str(BURST))
        self.failed = said.get("failed", "")
        self.times += said.get("times", [])
        self.memory_mb = said.get("memory_mb", 0.0)
        if not self.failed:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compared(built: Built, audio_s: float, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one length and number of threads."""
    from runtimes import spread
    from selective_scan import matmul_gflops

    from edgesep.inspect import cost

    samples = int(audio_s * built.original.sample_rate_hz)
    inputs = built.folder / f"given-{samples}.npz"
    np.savez(inputs, **built.given(samples))
    others = {"NNCF INT8, openvino": built.nncf(samples)} if built.quantizers else {}
    jobs = built.jobs | others
    candidates: dict[str, Candidate] = {}
    failed: dict[str, str] = {}
    try:
        for n, (what, job) in enumerate(jobs.items()):
            print(f"    {what}", file=sys.stderr, flush=True)
            if "failed" in job:
                failed[what] = job["failed"]
                continue
            made = Candidate({**job, "threads": threads}, inputs, built.folder / f"output-{n}.npy")
            if made.failed:
                failed[what] = made.failed
                made.close()
            else:
                candidates[what] = made
        peak_gflops = matmul_gflops(threads)
        until = time.monotonic() + seconds
        rounds = 0
        while rounds < 2 or time.monotonic() < until:
            rounds += 1
            for what, candidate in list(candidates.items()):
                candidate.turn()
                if candidate.failed:
                    failed[what] = candidates.pop(what).failed
                    candidate.close()
    finally:
        for candidate in candidates.values():
            candidate.close()
    common = {"separator": built.name, "audio_s": audio_s, "threads": threads}
    gflop = 2e-9 * cost(built.original)[0] * audio_s
    reference = np.load(candidates["eager PyTorch"].output)
    base = candidates[BASE].times
    for what, candidate in candidates.items():
        p50 = float(np.median(candidate.times))
        ratio, low, high = spread(candidate.times, base)
        yield common | {
            "candidate": what,
            "p50_ms": round(p50, 2),
            "faster": round(ratio, 3),
            "low": round(low, 3),
            "high": round(high, 3),
            "output_snr_db": round(min(output_snr_db(np.load(candidate.output), reference), 999.0), 1),
            "rtf": round(p50 / 1e3 / audio_s, 4),
            "of_peak": round(gflop / (p50 / 1e3) / peak_gflops, 4),
            "peak_gflops": round(peak_gflops, 1),
            "memory_mb": round(candidate.memory_mb, 1),
            "queries": len(candidate.times),
        }
    yield from (common | {"candidate": what, "failed": why} for what, why in failed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--separator", choices=SIZES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--audio", type=float, nargs="+", default=[1.0, 4.0], help="seconds of audio a query")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to measure each combination")
    parser.add_argument(
        "--no-quantizers", action="store_true", help="without other tools' INT8 (an hour for IIANet's graph)"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip(), "environment": measure.environment()}
    file = HERE / "results" / "peers.jsonl"
    for name in args.separator or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: building", file=sys.stderr, flush=True)
            built = Built(name, Path(folder), not args.no_quantizers)
            for threads in args.threads:
                for audio_s in args.audio:
                    print(f"{name}: {audio_s:g} s, {threads} thread(s)", file=sys.stderr, flush=True)
                    rows = []
                    for row in compared(built, audio_s, threads, args.seconds):
                        rows.append(row | about)
                        print(json.dumps(row) if args.json else said(row), flush=True)
                    before = [json.loads(t) for t in file.read_text().splitlines()] if file.exists() else []
                    case = (name, audio_s, threads)
                    kept = [r for r in before if (r["separator"], r["audio_s"], r["threads"]) != case]
                    file.write_text("".join(json.dumps(r) + "\n" for r in [*kept, *rows]))


def said(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['candidate']:32} failed: {row['failed']}"
    return (
        f"{row['candidate']:32} {row['p50_ms']:9.1f} ms {row['faster']:6.2f} x {row['output_snr_db']:6.1f} dB"
        f" {row['of_peak']:6.1%} of peak {row['memory_mb']:7.0f} MB"
    )


if __name__ == "__main__":
    main()
