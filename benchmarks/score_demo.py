"""Score a packaged separator on the test set's unseen voices and record the row that the README shows.

    python benchmarks/score_demo.py edgesep/demo/tdanet.pth --training "40 min on 2 cores, 20,000 steps"

An audio-visual separator is scored on the first voice, and once more with the other voice's video.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
from recorded import record

from edgesep import load_separator, verify
from edgesep.calibration import Mixture, MixtureSet
from edgesep.separators import Separator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "calibration"))
import synthesise  # noqa: E402  (the program that made the packaged sets also draws the mouths)


def gain_db(separator: Separator, item: Mixture) -> float:
    """SI-SNRi of one mixture in dB, over the sources that the separator gives."""
    wanted = item.sources[: separator.sources]
    before = float(np.mean(verify.si_snr_db(np.broadcast_to(item.mixture, wanted.shape), wanted)))
    return verify.pit_si_snr_db(separator(*item.inputs())[0].numpy(), wanted) - before


def with_the_other_mouth(item: Mixture, seed: int) -> Mixture:
    """The mixture with video of its second voice."""
    motion = synthesise.mouth_motion(item.sources[1], item.sample_rate_hz)
    return replace(item, mouth=synthesise.mouth_video(np.random.default_rng(seed), motion))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--training", required=True, help="how it was trained: time, machine, steps")
    parser.add_argument("--name", help="its section in demos.toml (default: the separator's class)")
    args = parser.parse_args()
    separator = load_separator(args.checkpoint)
    visual = separator.front_end is not None
    folder = HERE.parent / "calibration" / "test"
    test = MixtureSet.open(folder, separator.sample_rate_hz, 2, mouth=visual)
    gains = [gain_db(separator, item) for item in test]
    low, high = verify.bootstrap_interval(gains)
    name = args.name or separator.name
    row = {
        "separator": name,
        "parameters": separator.parameters,
        "sample_rate_hz": separator.sample_rate_hz,
        "mixtures": len(gains),
        "test_si_snri_db": round(float(np.mean(gains)), 3),
        "low_db": round(low, 3),
        "high_db": round(high, 3),
        "worst5_db": round(-verify.worst_share([-g for g in gains], 0.05), 3),
        "training": args.training,
        "seed": tomllib.loads((HERE / "demos.toml").read_text())[name]["seed"],
    }
    if visual:
        wrong = [gain_db(separator, with_the_other_mouth(item, i)) for i, item in enumerate(test)]
        row["wrong_mouth_si_snri_db"] = round(float(np.mean(wrong)), 3)
    record("demos", [row], ("separator",))
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
