"""A minute of two voices through every artifact of a bundle: peak memory, and what separating in blocks changes.

    edgesep demo --separator TDANet --out demo-bundle
    python benchmarks/long_files.py demo-bundle              # its rows in results/long_files.jsonl

Each artifact runs in processes of its own, once whole and once per block length. The SNR is that of the blocks' joined
output against the whole one's: it contains the seams and what a separator that normalises over or attends to the
whole utterance does differently when it hears less of it. Whether that is worse, the SI-SNR against the voices says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from recorded import record

import edgesep
from edgesep.measure import peak_rss_mb
from edgesep.verify import output_snr_db, pit_si_snr_db

HERE = Path(__file__).parent
TEST = HERE.parent / "calibration" / "test"
sys.path.insert(0, str(HERE.parent / "calibration"))
import synthesise  # noqa: E402  (the program that made the packaged sets also draws the mouths)


def voices(seconds: float, rate: int) -> np.ndarray:
    """``(2, samples)``: the first sources of the test set one after the other, and beside them the second ones.

    Voices change, as they do in a meeting; where two clips meet there is no pause.
    """
    clips = [np.concatenate([soundfile.read(f)[0] for f in sorted((TEST / s).iterdir())]) for s in ("s1", "s2")]
    return np.stack([np.resize(c, int(seconds * rate)) for c in clips]).astype(np.float32)


def child(job: dict[str, Any]) -> None:
    """One separation in this process; writes the estimates and prints the peak memory."""
    bundle = edgesep.open_bundle(job["bundle"])
    data = np.load(job["inputs"])
    start = time.perf_counter()
    estimates = bundle.separate(
        data["mixture"],
        data.get("mouth"),
        block_s=job["block_s"],
        runtime=job["runtime"],
        precision=job["precision"],
        ops=job.get("ops"),
        threads=1,
    )
    seconds = time.perf_counter() - start
    np.save(job["out"], estimates)
    print(json.dumps({"peak_mb": round(peak_rss_mb()), "took_s": round(seconds, 2)}))


def separated(job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """``child`` in a process of its own: what it measured, and the estimates; or how it failed."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}: out of memory?"]
        return {"failed": last[-1]}, None
    return json.loads(done.stdout), np.load(job["out"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--blocks", type=float, nargs="+", default=[5, 10, 20], help="block lengths in s")
    args = parser.parse_args()
    bundle = edgesep.open_bundle(args.bundle)
    sources = voices(args.seconds, bundle.sample_rate_hz)
    arrays = {"mixture": sources.sum(0)}
    if bundle.manifest["separator"].get("front_end"):
        motion = synthesise.mouth_motion(sources[0], bundle.sample_rate_hz)
        arrays["mouth"] = synthesise.mouth_video(np.random.default_rng(0), motion)
    rows = []
    runnable = [a for a in bundle.artifacts if a.runtime != "tensorrt"]  # those are built, not run
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder, "inputs.npz"), **arrays)
        files = {"bundle": str(args.bundle), "inputs": f"{folder}/inputs.npz", "out": f"{folder}/out.npy"}
        for artifact, block_s in itertools.product(runnable, (None, *args.blocks)):
            how = artifact.label() | {"block_s": block_s}
            row, estimates = separated(files | how)
            if block_s is None:
                whole = estimates
            elif estimates is not None and whole is not None:
                row["snr_to_whole_db"] = round(output_snr_db(estimates, whole), 1)
            if estimates is not None:
                row["si_snr_db"] = round(pit_si_snr_db(estimates, sources[: len(estimates)]), 2)
            rows.append({"separator": bundle.name, "audio_s": args.seconds, **how, **row})
            print(json.dumps(rows[-1]), flush=True)
    record("long_files", rows, ("separator",))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
