"""One contestant of ``peers.py`` in a process of its own, stopped while it is not its turn.

What runs here imports no more than it needs, so that its memory and its threads are those of its runtime.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgesep import measure

LOADING_S = 600  # torch.compile takes minutes
BURST = 3  # queries of a turn, after one that warms up
LONG_MS = 5000  # what takes longer needs no warming up, and once a turn will do


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def loaded(job: dict[str, Any], given: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    """A candidate as a call, in the process that runs it."""
    threads, root = job["threads"], Path(job["root"])
    if job["kind"] in ("eager", "compile"):
        import torch
        from paper_tables import created

        from edgesep import kernels

        kernels.core_if_possible = lambda: None  # PyTorch as it is
        torch.set_num_threads(threads)
        separator = created(job["name"], job["config"], job["rate"])
        separator.module.load_state_dict(torch.load(root / job["state"], weights_only=True))
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
        session = onnxruntime.InferenceSession(root / job["file"], options, providers=["CPUExecutionProvider"])
        return lambda: np.asarray(session.run(None, given)[0])
    if job["kind"] == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(root / job["file"], "CPU", {"INFERENCE_NUM_THREADS": threads})
        request = compiled.create_infer_request()
        return lambda: np.array(request.infer(given)[0])
    if job["kind"] == "edgesep":
        from edgesep.runtimes import runtime

        runner = runtime(job["runtime"]).Runner(root / job["folder"], job["files"], job["precision"], threads)
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
    except Exception as e:  # the parent's row says what a candidate raised
        print(json.dumps({"failed": first_line(e)}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        first = measure.time_ms(call)
        times = [first] if first > LONG_MS else [measure.time_ms(call) for _ in range(int(line))]
        print(json.dumps({"times": times, "memory_mb": measure.peak_rss_mb() - before}), flush=True)


class Candidate:
    """A process that waits for its turn."""

    def __init__(self, job: dict[str, Any], inputs: Path, output: Path):
        env = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.output, self.memory_mb = output, 0.0
        self.times, self.apart = list[float](), 0  # of all turns; turns while cores shared no cache
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

    def turn(self) -> list[float]:
        """Times of a few queries; none if it failed."""
        self.process.send_signal(signal.SIGCONT)
        said = self._ask(str(BURST))
        self.failed = said.get("failed", "")
        self.memory_mb = said.get("memory_mb", 0.0)
        if not self.failed:
            self.process.send_signal(signal.SIGSTOP)
        return list(said.get("times", []))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    child()
