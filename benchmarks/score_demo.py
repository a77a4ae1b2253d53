"""Score a packaged separator on the test set's unseen voices and record the row that the README shows.

python benchmarks/score_demo.py edgesep/demo/tdanet.pth --training "40 min on 2 cores, 20,000 steps"
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from pathlib import Path

import numpy as np

from edgesep import load_separator, verify
from edgesep.calibration import MixtureSet

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--training", required=True, help="how it was trained: time, machine, steps")
    args = parser.parse_args()
    separator = load_separator(args.checkpoint)
    test = MixtureSet.open(HERE.parent / "calibration" / "test", separator.sample_rate_hz, separator.sources)
    gains = []
    for item in test:
        before = float(np.mean(verify.si_snr_db(np.broadcast_to(item.mixture, item.sources.shape), item.sources)))
        gains.append(verify.pit_si_snr_db(separator(item.mixture).numpy(), item.sources) - before)
    low, high = verify.bootstrap_interval(gains)
    row = {
        "separator": separator.name,
        "parameters": separator.parameters,
        "sample_rate_hz": separator.sample_rate_hz,
        "mixtures": len(gains),
        "test_si_snri_db": round(float(np.mean(gains)), 3),
        "low_db": round(low, 3),
        "high_db": round(high, 3),
        "worst5_db": round(-verify.worst_share([-g for g in gains], 0.05), 3),
        "training": args.training,
        "seed": tomllib.loads((HERE / "demos.toml").read_text())[separator.name]["seed"],
        "date": time.strftime("%Y-%m-%d"),
    }
    file = HERE / "results" / "demos.jsonl"
    others = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    kept = [r for r in others if r["separator"] != row["separator"]]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
