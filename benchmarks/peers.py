"""Each separator at its published size: the builds of this toolkit against what one would do otherwise.

    python benchmarks/peers.py                                        # all separators, 1 and 4 s, 1 and 2 threads
    python benchmarks/peers.py --separator TDANet --audio 1 --threads 2 --seconds 60 --json

The others: eager PyTorch, torch.compile, the plain export (no lowering) on ONNX Runtime and on OpenVINO with their
default options, the same through ONNX Runtime's static quantizer and through NNCF. SPMamba has no plain export without
this toolkit's scan, so that its "plain" is the portable form, and eager runs the scan as a loop of PyTorch operators.
IIANet is given a mouth embedding; the front-end that makes it of 25 mouth crops a second is compared by itself.

Every candidate is a process of its own, stopped while it is not its turn: idle threads of one runtime spin in the way
of the next. They take turns (A B C A B C ...), a few queries each; one, where it takes over five seconds. Turns of two
threads wait until the cores share a cache (``cores``), and are repeated where that ended meanwhile. Weights are
random, so that quality is the SNR of the output against eager PyTorch's; what INT8 costs trained separators is measured
by ``compression.py``. "Of peak" is the share of what this machine's own float matrix product reaches (ONNX Runtime, the
same threads). Memory is the peak above what the process held before it loaded anything. Rows replace those of
the same processor in ``results/peers.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builds import built, nncf_quantized, statically_quantized
from candidate import Candidate
from cores import while_near
from paper_tables import PUBLISHED, created
from recorded import record

from edgesep.calibration import MixtureSet
from edgesep.runtimes import int8_form
from edgesep.verify import output_snr_db

HERE = Path(__file__).parent
SETS = HERE.parent / "calibration"
FRONT_END = "IIANet's front-end"
#: name here → title among the published sizes
SIZES = {
    "TDANet": "TDANet base (4 ms)",
    "TDANetBest": "TDANet Large (2 ms)",
    "IIANet": "IIANet",
    FRONT_END: "IIANet",
    "SPMamba": "SPMamba",
}
OURS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
BASE = "plain export, onnxruntime"


class Built:
    """The files of one separator, kept between runs, and the jobs that run them: paths are those within ``folder``."""

    def __init__(self, name: str, quantizers: bool):
        from edgesep import kernels
        from edgesep.separators import lip
        from edgesep.store import Store, file_digest

        self.name, self.quantizers = name, quantizers
        self.size = next(s for s in PUBLISHED if s.title == SIZES[name])
        torch.manual_seed(0)
        self.original = created(self.size.name, self.size.config, self.size.rate)
        self.front = self.original  # what mixtures are given to
        if len(self.original.inputs) > 1:  # calibration mixtures come with mouths
            self.front = replace(self.original, front_end=lip.create({}, 0))
        if name == FRONT_END:
            assert self.front.front_end
            self.original = self.front.front_end
        self.store = Store()
        sources = [file_digest(HERE / f) for f in ("peers.py", "builds.py")]
        libraries = [str(kernels.library(kind)) for kind in {kind for kind, _ in OURS}]
        self.key = {"separator": name, "quantizers": quantizers, "sources": sources, "kernels": sorted(libraries)}
        self.folder = self.store.step("peers", self.key, self._build)
        self.jobs: dict[str, dict[str, Any]] = json.loads((self.folder / "jobs.json").read_text())
        for job in self.jobs.values():
            job["root"] = str(self.folder)

    def feeds(self, count: int = 4) -> list[dict[str, np.ndarray]]:
        mixtures = self.calibration()
        return [
            {s.name: self.front.tensors(mixtures[i].inputs())[s.name] for s in self.original.inputs}
            for i in range(count)
        ]

    def calibration(self) -> MixtureSet:
        return MixtureSet.open(SETS / "calibration", self.front.sample_rate_hz, mouth=len(self.front.inputs) > 1)

    def _build(self, folder: Path) -> None:
        from edgesep import graph
        from edgesep.ops import onnx_forms
        from edgesep.passes.base import Context
        from edgesep.passes.lower import Lower
        from edgesep.passes.quantize import Quantize

        print(f"{self.name}: building", file=sys.stderr, flush=True)
        original = self.original
        torch.save(original.module.state_dict(), folder / "state.pth")
        plain, scratch, source = folder / "plain.onnx", folder / "own.onnx", folder / "lowered.onnx"
        graph.export_onnx(original, original.module, scratch)
        onnx_forms.write_form(scratch, plain)
        mixtures = self.calibration()
        context = Context(self.front, mixtures, mixtures, folder)
        lowered = Lower()(self.original, context).separator
        graph.export_onnx(lowered, lowered.module, source)
        quantize = Quantize(method="onnxruntime", mixtures=4)
        config = {} if self.name == FRONT_END else self.size.config
        eager = {"state": "state.pth", "name": original.name, "config": config, "rate": self.size.rate}
        jobs: dict[str, dict[str, Any]] = {"eager PyTorch": {"kind": "eager", **eager}}
        if self.name != "SPMamba":  # its scan in PyTorch is a loop over all frames, which is unrolled for hours
            jobs["torch.compile"] = {"kind": "compile", **eager}
        jobs[BASE] = {"kind": "onnxruntime", "file": plain.name}
        jobs["plain export, openvino"] = {"kind": "openvino", "file": plain.name}
        if self.quantizers:
            for what, file in statically_quantized(plain, self.feeds(), folder):
                made = {"failed": file} if isinstance(file, str) else {"kind": "onnxruntime", "file": file.name}
                jobs[f"onnxruntime's static INT8, {what}"] = made
        for kind, precision in OURS:
            made_in = folder / f"{kind}-{precision}"
            shutil.rmtree(made_in, ignore_errors=True)  # of a run that was interrupted
            model = source
            if precision == "int8":
                model = folder / f"int8-{kind}.onnx"
                quantize(lowered, source, model, context, int8_form(kind, native=True))
            files = built(model, kind, precision, made_in, native=True)
            job = {"kind": "edgesep", "runtime": kind, "precision": precision, "folder": made_in.name, "files": files}
            jobs[f"edgesep, {kind} {precision}"] = job
        (folder / "jobs.json").write_text(json.dumps(jobs, indent=1))

    def nncf(self, samples: int) -> dict[str, Any]:
        """NNCF's build for one length."""
        plain, shapes = self.folder / "plain.onnx", {n: v.shape for n, v in self.given(samples).items()}

        def make(folder: Path) -> None:
            file = nncf_quantized(plain, self.feeds(), shapes, folder)
            job = {"failed": file} if isinstance(file, str) else {"kind": "openvino", "file": file.name}
            (folder / "job.json").write_text(json.dumps(job))

        folder = self.store.step("peers-nncf", self.key | {"samples": samples}, make)
        return {"root": str(folder), **json.loads((folder / "job.json").read_text())}

    def given(self, samples: int) -> dict[str, np.ndarray]:
        """One query: a test mixture, over and over, and noise for an embedding."""
        mixtures = MixtureSet.open(SETS / "test", self.front.sample_rate_hz, mouth=len(self.front.inputs) > 1)
        if self.name == FRONT_END:
            crops = self.front.tensors(mixtures[0].inputs())["mouth_crops"]
            return {"mouth_crops": crops[:, :, np.arange(samples) % crops.shape[2]]}
        mixture = mixtures[0].mixture
        made = {
            s.name: v.numpy() for s, v in zip(self.original.inputs, self.original.example_inputs(samples), strict=True)
        }
        return made | {"mixture": np.resize(mixture, (1, samples)).astype(np.float32)}


def compared(made: Built, folder: Path, audio_s: float, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of one length and number of threads."""
    from runtimes import spread
    from selective_scan import matmul_gflops

    from edgesep.inspect import cost

    samples = int(audio_s * made.original.sample_rate_hz)
    inputs = folder / f"given-{samples}.npz"
    np.savez(inputs, **made.given(samples))
    others = {"NNCF INT8, openvino": made.nncf(samples)} if made.quantizers else {}
    jobs = made.jobs | others
    candidates: dict[str, Candidate] = {}
    failed: dict[str, str] = {}
    try:
        for n, (what, job) in enumerate(jobs.items()):
            print(f"    {what}", file=sys.stderr, flush=True)
            if "failed" in job:
                failed[what] = job["failed"]
                continue
            candidate = Candidate({**job, "threads": threads}, inputs, folder / f"output-{n}.npy")
            if candidate.failed:
                failed[what] = candidate.failed
                candidate.close()
            else:
                candidates[what] = candidate
        peak_gflops = matmul_gflops(threads)
        until = time.monotonic() + seconds
        rounds = 0
        while rounds < 2 or time.monotonic() < until:
            rounds += 1
            for what, candidate in list(candidates.items()):
                times, near = while_near(candidate.turn) if threads > 1 else (candidate.turn(), True)
                candidate.times += times
                candidate.apart += not near
                if candidate.failed:
                    failed[what] = candidates.pop(what).failed
                    candidate.close()
    finally:
        for candidate in candidates.values():
            candidate.close()
    common = {"separator": made.name, "audio_s": audio_s, "threads": threads}
    gflop = 2e-9 * cost(made.original)[0] * audio_s
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
            "turns": rounds,
            "turns_apart": candidate.apart,
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
    args = parser.parse_args()
    for name in args.separator or SIZES:
        made = Built(name, not args.no_quantizers)
        for threads in args.threads:
            for audio_s in args.audio:
                print(f"{name}: {audio_s:g} s, {threads} thread(s)", file=sys.stderr, flush=True)
                rows = []
                with tempfile.TemporaryDirectory() as folder:
                    for row in compared(made, Path(folder), audio_s, threads, args.seconds):
                        rows.append(row)
                        print(json.dumps(row) if args.json else said(row), flush=True)
                record("peers", rows, ("separator", "audio_s", "threads"), each_processor=True)


def said(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['candidate']:32} failed: {row['failed']}"
    return (
        f"{row['candidate']:32} {row['p50_ms']:9.1f} ms {row['faster']:6.2f} x {row['output_snr_db']:6.1f} dB"
        f" {row['of_peak']:6.1%} of peak {row['memory_mb']:7.0f} MB"
    )


if __name__ == "__main__":
    main()
