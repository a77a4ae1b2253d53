"""Sizes of the published separators as built here, beside what their papers say.

    python benchmarks/paper_tables.py            # prints the rows and records them in results/papers.jsonl

Random weights: neither parameters nor multiply-accumulates depend on them. ``gmacs_per_s`` counts matrix products,
convolutions, recurrences and scans over one second of audio. ``profiled_gmacs_per_s`` adds what profilers of modules
count too, and so most papers: biases, norms, activations, and 9 instead of 2 operations for a scan's state update.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recorded import record
from torch.utils._python_dispatch import TorchDispatchMode

from edgesep import separators
from edgesep.inspect import cost

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Published:
    """One size in a paper and what the paper says of it."""

    title: str
    name: str
    rate: int
    config: dict[str, Any]
    parameters: int
    gmacs: float


TDANET = {"out_channels": 128, "in_channels": 512, "num_blocks": 16, "upsampling_depth": 5, "num_sources": 2}
PUBLISHED = (
    Published("TDANet Large (2 ms)", "TDANet", 16000, {**TDANET, "enc_kernel_size": 2}, 2_316_391, 9.1),
    Published("TDANet base (4 ms)", "TDANet", 16000, {**TDANET, "enc_kernel_size": 4}, 2_330_439, 4.8),
    Published(
        "IIANet",
        "IIANet",
        16000,
        {
            "out_channels": 128,
            "in_channels": 512,
            "vpre_channels": 512,
            "vin_channels": 64,
            "vout_channels": 64,
            "num_blocks": 16,
            "upsampling_depth": 5,
            "enc_kernel_size": 1,
            "num_sources": 1,
        },
        3_036_670,
        18.6,
    ),
    Published("lip front-end", "ResNetVideoModel", 16000, {}, 11_186_688, 7.9),
    Published(
        "TFACM",
        "TFACMCausal",
        8000,
        {
            "n_srcs": 2,
            "n_fft": 64,
            "stride": 8,
            "n_layers": 3,
            "lstm_hidden_units": 64,
            "attn_n_head": 2,
            "attn_approx_qk_dim": 132,
            "emb_dim": 64,
            "emb_ks": 8,
            "emb_hs": 1,
        },
        952_942,
        36.5,
    ),
    Published(
        "SPMamba",
        "SPMamba",
        16000,
        {
            "n_srcs": 2,
            "n_fft": 512,
            "stride": 128,
            "n_layers": 6,
            "attn_n_head": 4,
            "attn_approx_qk_dim": 512,
            "emb_dim": 16,
            "emb_ks": 8,
            "emb_hs": 1,
        },
        6_141_826,
        238,
    ),
)


#: What profilers of modules count for each element that these operators make: norms scale and shift.
ELEMENTWISE = {
    "aten::convolution": 1,  # the bias
    "aten::native_group_norm": 2,
    "aten::native_layer_norm": 2,
    "aten::_prelu_kernel": 1,
    "aten::relu": 1,
    "aten::sigmoid": 1,
    "aten::silu": 1,
    "aten::gelu": 1,
    "aten::_softmax": 1,
    "aten::upsample_nearest2d": 1,
}
SCAN = 9  # multiplications and additions that Mamba's reference count takes for each state update; here 2


class Elementwise(TorchDispatchMode):
    """Counts what ``ELEMENTWISE`` lists and the state updates of scans."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.updates = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out[0] if isinstance(out, tuple) else out
        self.elements += ELEMENTWISE.get(func.name(), 0) * (made.numel() if isinstance(made, torch.Tensor) else 0)
        if func.name() == "edgesep::selective_scan":
            self.updates += made.numel() * args[2].shape[1]
        return out


def created(name: str, config: dict[str, Any], rate: int) -> separators.Separator:
    """A separator of this architecture with random weights."""
    return next(m for m in separators.separator_modules() if name in m.NAMES).create(config, rate)


def row(size: Published) -> dict[str, Any]:
    separator = created(size.name, size.config, size.rate)
    gmacs = cost(separator)[0] / 1e9
    with torch.no_grad(), Elementwise() as more:
        separator.module(*separator.example_inputs(separator.sample_rate_hz))
    profiled = gmacs + (more.elements + (SCAN - 2) * more.updates) / 1e9
    return {
        "size": size.title,
        "parameters": separator.parameters,
        "paper_parameters": size.parameters,
        "gmacs_per_s": round(gmacs, 2),
        "paper_gmacs_per_s": size.gmacs,
        "profiled_gmacs_per_s": round(profiled, 2),
    }


def main() -> None:
    rows = []
    for size in PUBLISHED:
        rows.append(row(size))
        print(json.dumps(rows[-1]), flush=True)
    record("papers", rows, ("size",))


if __name__ == "__main__":
    main()
