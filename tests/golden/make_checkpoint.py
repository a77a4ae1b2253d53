"""Rebuild the golden checkpoints from their key/shape lists.

    python make_checkpoint.py tdanet_small.json out_dir

writes out_dir/best_model.pth in the format that the authors' repositories save
({"model_name", "state_dict", "model_args"}) and out_dir/conf.yml as their test scripts read it.
The weights are drawn per key, so no weight file has to be stored: the same list gives the same
checkpoint on every machine. `golden_input(spec)` gives the inputs, the .npz beside the .json holds
the outputs that the authors' own forward gave for them (float32, CPU, eval mode).
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np


def draw(key: str, shape: list[int], seed: int) -> np.ndarray:
    """One weight tensor, float32, from its key, shape and the fixture's seed."""
    r = np.random.default_rng([seed, zlib.crc32(key.encode())])
    leaf = key.rsplit(".", 1)[-1]
    x = r.standard_normal(shape)
    if leaf == "num_batches_tracked":
        return np.array(1, dtype=np.int64)
    if leaf == "A_log":
        return (np.log(np.arange(1, shape[1] + 1))[None, :] + 0.1 * x).astype(np.float32)
    if leaf == "running_var":
        return (1 + 0.1 * np.abs(x)).astype(np.float32)
    if key.endswith("dt_proj.bias"):
        return (-3 + 0.5 * x).astype(np.float32)
    if leaf in ("bias", "beta", "running_mean") or leaf.endswith("_bias"):
        return (0.1 * x).astype(np.float32)
    if leaf in ("D", "gamma", "gain") or (leaf == "weight" and len(shape) == 1 and shape[0] > 1):
        return (1 + 0.1 * x).astype(np.float32)  # norm scales (and per-channel PReLU)
    if len(shape) <= 1:
        return (0.25 + 0.02 * x).astype(np.float32)  # single-slope PReLU
    fan_in = int(np.prod(shape[1:]))
    return (x / np.sqrt(max(fan_in, 1))).astype(np.float32)


def state_dict(spec: dict) -> dict[str, np.ndarray]:
    return {k: draw(k, s, spec["seed"]) for k, s in spec["keys"]}


def golden_input(spec: dict) -> list[np.ndarray]:
    """The forward's positional inputs, float32, in order."""
    r = np.random.default_rng([spec["seed"], 7])
    return [(i["scale"] * r.standard_normal(i["shape"])).astype(np.float32) for i in spec["inputs"]]


def main() -> None:
    import torch
    import yaml

    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: torch.from_numpy(v) for k, v in state_dict(spec).items()}
    torch.save(
        {"model_name": spec["model_name"], "state_dict": weights, "model_args": {"n_src": 2}}, out / "best_model.pth"
    )
    (out / "conf.yml").write_text(yaml.safe_dump(spec["conf"]))


if __name__ == "__main__":
    main()
