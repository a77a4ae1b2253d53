"""Every runtime and precision of a bundle against eager torch, paired in one run (A B C A B C ...).

    python benchmarks/runtimes.py demo-bundle edgesep/demo/tdanet.pth
    python benchmarks/runtimes.py demo-bundle edgesep/demo/tdanet.pth --threads 1 --audio 4 --seconds 60

Quotes ratios of medians; on a shared machine only these mean something. Rows are appended to
``benchmarks/results/runtimes.jsonl`` with their environment.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from recorded import record

import edgesep
from edgesep import measure
from edgesep.runtimes.eager import Runner as EagerRunner

HERE = Path(__file__).parent


EAGER = ("eager", "fp32", None)


def key(row: dict[str, Any]) -> tuple[str, str, str | None]:
    """What tells an artifact's row from the others."""
    return row["runtime"], row["precision"], row.get("ops")


def spread(times_ms: list[float], base_ms: list[float]) -> tuple[float, float, float]:
    """Ratio of medians base/times, with a bootstrap 95 % interval over rounds."""
    a, b = np.array(base_ms), np.array(times_ms)
    pick = np.random.default_rng(0).integers(0, len(a), (1000, len(a)))
    ratios = np.median(a[pick], axis=1) / np.median(b[pick], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="the float original, for the eager reference")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--audio", type=float, default=1.0, help="seconds of audio a query")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure")
    args = parser.parse_args()

    bundle = edgesep.open_bundle(args.bundle)
    original = edgesep.load_separator(args.checkpoint)
    drops = {key(r): r.get("drop_db") for r in bundle.manifest["results"]}
    x = original.example_inputs(int(args.audio * bundle.sample_rate_hz))[0].numpy()
    with contextlib.ExitStack() as stack:
        eager = stack.enter_context(EagerRunner(original, args.threads))
        calls = {EAGER: lambda: eager.run({"mixture": x})}
        for artifact in bundle.artifacts:
            if not artifact.note:
                run = stack.enter_context(bundle.separating(artifact, args.threads))
                calls[key(artifact.label())] = lambda run=run: run(x)
        times = measure.paired_ms(calls, args.seconds)
    base = times[EAGER]
    common = {
        "benchmark": "runtimes",
        "separator": bundle.name,
        "parameters": bundle.manifest["separator"]["parameters"],
        "audio_s": args.audio,
        "threads": args.threads,
        "rounds": len(base),
        "versions": bundle.manifest["versions"],
    }
    print(f"{bundle.name}, {args.audio} s of audio, {args.threads} thread(s), {len(base)} rounds")
    rows = []
    for (runtime, precision, ops), found in times.items():
        ratio, low, high = spread(found, base)
        row = {"runtime": runtime, "precision": precision} | ({"ops": ops} if ops else {})
        row["p50_ms"] = round(float(np.median(found)), 3)
        row |= {"faster_than_eager": round(ratio, 3), "low": round(low, 3), "high": round(high, 3)}
        row |= {
            "rtf": round(float(np.median(found)) / 1e3 / args.audio, 5),
            "drop_db": drops[runtime, precision, ops],
        }
        rows.append(row | common)
        what = f"{runtime:12s} {precision:5s} {ops or '':8s}"
        print(f"{what} {row['p50_ms']:9.2f} ms  {ratio:5.2f}x eager [{low:.2f}, {high:.2f}]")
    record("runtimes", rows)


if __name__ == "__main__":
    main()
