"""Compression of the packaged separators: what INT8 and pruning cost in dB, and what they bring.

    python calibration/synthesise.py train --mixtures 800 --out runs/train
    python benchmarks/compression.py --train runs/train
    python benchmarks/compression.py --part int8 --separator TDANet

The parts, each a group of rows in ``results/compression.jsonl`` (a rerun replaces the rows of its part and separator):

* int8: every layer that can be in INT8 within 0.1 dB mean and 0.3 dB in the worst 5 % of the calibration mixtures.
* budget: the same for 0.05 dB.
* pruned: 30 and 50 % of the multiply-accumulates pruned, recovered by fine-tuning, then INT8.
* sensitivity: drop and output SNR of each part of the separator, in INT8 alone.
* engines: TensorRT's builder on its own form of the Q/DQ graph.
* half: products in fp16, on ONNX Runtime and through TensorRT's builder.
* qat: every layer in INT8 without training, after training in float and after training with the rounding of INT8.
* peers: the same float model through NNCF and through ONNX Runtime's static quantizer, defaults, paired in one run.

Figures are those of the test set, which no search looks at. Interrupted runs resume: finished steps are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from recorded import record

import edgesep
from edgesep import kernels, measure, verify
from edgesep.calibration import Mixture, MixtureSet
from edgesep.line import Line, deploy
from edgesep.recipe import CriteriaSection, DataSection, Recipe, SeparatorSection, StreamSection, TargetSection
from edgesep.runtimes import int8_form, runtime
from edgesep.store import Store

HERE = Path(__file__).parent
SETS = HERE.parent / "calibration"
DEMOS = {"TDANet": "tdanet", "IIANet": "iianet", "SPMamba": "spmamba", "TFACM": "tfacm", "HearingAid": "hearingaid"}
RUNTIMES = ("onnxruntime", "openvino")
SHOWN = ("drop_db", "drop_worst5_db", "si_snri_db", "size_mb")  # times are those of `peers`, paired on a quiet machine


def recipe(
    name: str,
    passes: list[dict[str, Any]],
    limit_db: float | None,
    worst5_db: float | None,
    train: Path | None = None,
    runtimes: tuple[str, ...] = RUNTIMES,
    precisions: tuple[str, ...] = ("fp32", "int8"),
    ops: str | None = None,
) -> Recipe:
    ops = ops or ("native" if name != "TFACM" and name != "HearingAid" and "tensorrt" not in runtimes else "portable")
    return Recipe(
        separator=SeparatorSection(checkpoint=Path(edgesep.__file__).parent / "demo" / f"{DEMOS[name]}.pth"),
        data=DataSection(calibration=SETS / "calibration", test=SETS / "test", train=train),
        passes=tuple(passes),
        targets=tuple(TargetSection(runtime=r, precision=p, ops=ops) for r in runtimes for p in precisions),
        criteria=CriteriaSection(max_si_snr_drop_db=limit_db, worst5_drop_db=worst5_db),
        stream=StreamSection(hops_per_call=1, context_s=0.5) if name == "HearingAid" else None,
    )


LOWER = [{"pass": "lower"}, {"pass": "equalize"}]
FIT = {"pass": "quantize", "method": "onnxruntime", "fit": True}


def deployed(made: Recipe, store: Store) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and pass reports of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        done = deploy(made, Path(folder) / "bundle", store=store, tick=said)
        manifest = json.loads((done.path / "manifest.json").read_text())
    return list(done.rows), manifest["passes"]


_last = ""


def said(done: int, total: int, text: str) -> None:
    global _last
    if text.split(":")[0].split(",")[0] != _last:
        _last = text.split(":")[0].split(",")[0]
        print(f"    {text}", flush=True)
    del done, total


def int8(name: str, store: Store, limit_db: float, worst5_db: float | None) -> Iterator[dict[str, Any]]:
    rows, reports = deployed(recipe(name, [*LOWER, FIT], limit_db, worst5_db), store)
    fitted = [r for r in reports if r["pass"] == "quantize"]
    plain = {r["runtime"]: r for r in rows if r["precision"] == "fp32"}
    for row in rows:
        if row["precision"] != "int8":
            continue
        mine = [
            r for r in fitted if r["report"]["form"] == asdict(int8_form(row["runtime"], row.get("ops") == "native"))
        ]
        yield {
            "runtime": row["runtime"],
            "limit_db": limit_db,
            "met": not row["misses"] and all(r["report"]["fit"]["met"] for r in mine),
            "misses": row["misses"],
            "quantized_macs_share": {r["graph"]: round(r["report"]["quantized_macs_share"], 4) for r in mine},
            "float_layers": {
                r["graph"]: [x["layer"] for x in r["report"]["fit"]["layers"] if x["float"]] for r in mine
            },
            "times_smaller": round(model_mb(plain[row["runtime"]]) / model_mb(row), 3),
            "time_share": row.get("audit", {}).get("time_share"),
            "rejected": row.get("audit", {}).get("rejected"),
            **{k: row.get(k) for k in SHOWN},
        }


def model_mb(row: dict[str, Any]) -> float:
    """The size of a build without the kernels, which are code and the same for all."""
    library = kernels.library(row["runtime"]).stat().st_size / 1e6 if row.get("ops") == "native" else 0.0
    return float(row["size_mb"]) - library


def pruned(name: str, store: Store, train: Path, steps: int) -> Iterator[dict[str, Any]]:
    for share in (0.3, 0.5):
        passes = [
            {"pass": "prune", "share": share},
            {"pass": "finetune", "steps": steps, "lr": 1e-3, "seconds": 2.0},
            *LOWER,
            FIT,
        ]
        rows, reports = deployed(recipe(name, passes, None, None, train, ("openvino",)), store)
        found = {r["pass"]: r["report"] for r in reports}
        for row in rows:
            if row["runtime"] != "eager":
                yield {
                    "runtime": row["runtime"],
                    "precision": row["precision"],
                    "share": share,
                    "steps": steps,
                    **{k: found["prune"][k] for k in ("macs_removed_share", "parameters", "parameters_before")},
                    "recovered_db": found["finetune"],
                    **{k: row.get(k) for k in SHOWN},
                }


def qat(name: str, store: Store, train: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Every layer in INT8, whatever that costs: as it is, after training in float, after training with the rounding."""
    tune = {"pass": "finetune", "steps": steps, "lr": 5e-4, "seconds": 2.0}
    for how, before in (("none", []), ("in float", [tune]), ("with rounding", [tune | {"quantized": True}])):
        passes = [*before, *LOWER, {"pass": "quantize", "method": "onnxruntime"}]
        rows, _ = deployed(recipe(name, passes, None, None, train if before else None, ("openvino",)), store)
        for row in rows:
            if row["runtime"] != "eager":
                yield {"trained": how, "steps": steps if before else 0, "precision": row["precision"]} | {
                    k: row.get(k) for k in SHOWN
                }


def half(name: str, store: Store) -> Iterator[dict[str, Any]]:
    """fp16: the quality where this machine can run the graph, the size and the builder's word elsewhere."""
    runtimes = ("onnxruntime",) if name == "HearingAid" else ("onnxruntime", "tensorrt")
    passes = [LOWER[0], {"pass": "halve"}]
    rows, reports = deployed(recipe(name, passes, None, None, None, runtimes, ("fp32", "fp16"), "portable"), store)
    products = [r["report"] for r in reports if r["pass"] == "halve"]
    for row in rows[1:]:
        yield {
            **{k: row.get(k) for k in ("runtime", "precision", "status", "runtime_version", *SHOWN, "output_snr_db")},
            "fp16_products": [f"{p['fp16_products']} of {p['products']}" for p in products],
            "casts": sum(p["casts"] for p in products),
        }


def sensitivity(name: str, store: Store) -> Iterator[dict[str, Any]]:
    line = Line(recipe(name, [*LOWER, FIT], 0.1, 0.3, runtimes=("onnxruntime",), precisions=("int8",)), store, said)
    for report in line.compressed()[-1]:
        if report["pass"] == "quantize":
            for layer in report["report"]["fit"]["layers"]:
                yield {"graph": report["graph"], **layer}


def engines(name: str, store: Store) -> Iterator[dict[str, Any]]:
    made = recipe(name, [*LOWER, FIT], 0.1, 0.3, runtimes=("tensorrt",), precisions=("int8",))
    rows, _ = deployed(made, store)
    yield from (
        {"runtime": r["runtime"], **{k: r.get(k) for k in ("status", "size_mb", "runtime_version")}} for r in rows[1:]
    )


def peers(name: str, store: Store) -> Iterator[dict[str, Any]]:
    """Ours, NNCF's and ONNX Runtime's INT8 of the same export, each on the runtimes that take it.

    NNCF takes static shapes alone, so that all run at the length of the sets' mixtures; OpenVINO, which gains from
    that, compiles every build for it.
    """
    import onnx
    from builds import built, nncf_quantized, statically_quantized

    from edgesep import graph
    from edgesep.artifact import Artifact, Separating
    from edgesep.ops import onnx_forms

    line = Line(recipe(name, [*LOWER, FIT], 0.1, 0.3), store, said)
    if line.stream:
        return  # the others know no streams
    separator, _, models, _, _ = line.compressed()
    original = line.original
    facts = separator.describe() | {"front_end": None}

    def given(mixture: Mixture) -> dict[str, np.ndarray]:
        known = original.tensors(mixture.inputs())
        return {s.name: known[s.name] for s in original.inputs}

    feeds = [given(m) for m in line.calibration]

    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = Path(scratch)
        plain = folder / "plain.onnx"
        graph.export_onnx(original, original.module, plain)
        onnx_forms.write_form(plain, plain)
        files: dict[tuple[str, str], tuple[Path, list[str]]] = {}
        for what, file in statically_quantized(plain, feeds, folder):
            if isinstance(file, str):
                yield {"maker": f"onnxruntime, {what}", "runtime": "onnxruntime", "failed": file}
                continue
            for kind in RUNTIMES:
                files[f"onnxruntime, {what}", kind] = (folder, [file.name])
        file = nncf_quantized(plain, feeds, {n: v.shape for n, v in feeds[0].items()}, folder)
        if isinstance(file, str):
            yield {"maker": "nncf", "runtime": "openvino", "failed": file}
        else:
            files["nncf", "openvino"] = (folder, [file.name, file.with_suffix(".bin").name])
        for kind in RUNTIMES:
            for what, precision in (("float", "fp32"), ("edgesep", "int8")):
                source, _ = models[precision, int8_form(kind, name != "TFACM") if precision == "int8" else None]
                native = onnx_forms.has_native_form(onnx.load(source), runtime(kind))
                mine = folder / f"{what}-{kind}"
                files[what, kind] = (mine, built(source, kind, precision, mine, native))
        test = [
            (m, original(*m.inputs())[0].numpy())
            for m in MixtureSet.open(SETS / "test", original.sample_rate_hz, original.sources, len(original.inputs) > 1)
        ]
        x = tuple(given(test[0][0]).values())
        calls, found = {}, {}
        for (what, kind), (where, names) in files.items():
            fixed = {"fixed_length": True} if getattr(runtime(kind), "FIXES_LENGTH", False) else {}
            artifact = Artifact(kind, "fp32" if what == "float" else "int8", 1, where, tuple(names), settings=fixed)
            try:
                run = stack.enter_context(Separating(artifact, facts, 1))
                items = ((tuple(given(m).values()), m.sources, r) for m, r in test)
                quality = verify.quality(run, items)
            except edgesep.VerificationError as e:
                yield {"maker": what, "runtime": kind, "failed": str(e).splitlines()[0].replace(f"{folder}/", "")[:200]}
                continue
            calls[what, kind] = lambda run=run: run(*x)
            found[what, kind] = quality.to_json() | {"size_mb": round(artifact.size_mb(), 4)}
        times = measure.paired_ms(calls, 20.0)
        for (what, kind), quality in found.items():
            base, mine_ms = np.median(times["float", kind]), np.median(times[what, kind])
            yield {
                "maker": what,
                "runtime": kind,
                **{k: quality[k] for k in ("drop_db", "drop_worst5_db", "output_snr_db", "size_mb")},
                "p50_ms": round(float(mine_ms), 3),
                "times_fp32_speed": round(float(base / mine_ms), 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("int8", "budget", "sensitivity", "engines", "half", "pruned", "qat", "peers")
    parser.add_argument("--part", choices=names, action="append", help="may be repeated (default: all)")
    parser.add_argument("--separator", choices=list(DEMOS), action="append", help="may be repeated (default: all)")
    parser.add_argument("--train", type=Path, help="mixture set for recovery after pruning")
    parser.add_argument("--steps", type=int, default=400, help="of recovery")
    args = parser.parse_args()
    store = Store()
    parts = {
        "int8": lambda n: int8(n, store, 0.1, 0.3),
        "budget": lambda n: int8(n, store, 0.05, None),
        "sensitivity": lambda n: sensitivity(n, store),
        "engines": lambda n: engines(n, store),
        "half": lambda n: half(n, store),
        "pruned": lambda n: pruned(n, store, args.train, args.steps),
        "qat": lambda n: qat(n, store, args.train, args.steps),
        "peers": lambda n: peers(n, store),
    }
    if args.train is None and {"pruned", "qat"} & set(args.part or names):
        parser.error("the parts 'pruned' and 'qat' need --train; make a set with: calibration/synthesise.py train")
    for name in args.separator or DEMOS:
        for part in args.part or names:
            print(f"{name}: {part}", flush=True)
            rows = []
            for found in parts[part](name):
                rows.append({"part": part, "separator": name, **found})
                print(json.dumps(rows[-1]), flush=True)
            record("compression", rows, ("part", "separator"))


if __name__ == "__main__":
    main()
