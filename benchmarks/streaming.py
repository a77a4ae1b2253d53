"""What a stream does over minutes, with less past, at the pace of audio, and against rerunning the whole graph.

    edgesep demo --separator HearingAid --out demo-bundle-hearing-aid
    python benchmarks/streaming.py demo-bundle-hearing-aid edgesep/demo/hearingaid.pth
    python benchmarks/streaming.py demo-bundle-hearing-aid edgesep/demo/hearingaid.pth --part drift

The parts, each a group of rows in ``results/streaming.jsonl`` (a rerun replaces its part's rows; those of the published
size only where the same processor measured them):

* drift: ten minutes of stream, the same minute of mixtures ten times: SI-SNR of every minute, memory before and after;
  then ten seconds of silence, and then ten seconds 40 dB louder, and the minute again after each.
* context: attention over 0.25 to 2 s of past: quality on the test set, state, memory, time of a call.
* paced: a minute at the pace of audio on an idle machine, and one beside a second process that keeps a core busy.
* window: one call of the stream against the plain way, the offline graph run again over the last second for every hop.
* published: TFACM at its published size (8 kHz, 8 ms window, hop 1 ms, random weights), 8 hops per call, with portable
  and with native operators; rounds while the cores shared a cache and others apart (``cores``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builds import built
from cores import near
from paper_tables import PUBLISHED
from recorded import record

import edgesep
from edgesep import Stream, bench, graph, measure
from edgesep.artifact import Artifact, Separating
from edgesep.calibration import MixtureSet
from edgesep.passes.base import Context
from edgesep.passes.quantize import Quantize
from edgesep.runtimes import int8_form, runtime
from edgesep.separators import tfacm
from edgesep.verify import output_snr_db, pit_si_snr_db, quality

HERE = Path(__file__).parent
TEST = HERE.parent / "calibration" / "test"
CALIBRATION = TEST.parent / "calibration"
RUNTIMES = ("onnxruntime", "openvino")
PUBLISHED_BUILDS = (*itertools.product(RUNTIMES, ("fp32", "int8"), (False, True)), ("openvino", "bf16", True))

ROUNDS = 9  # of all builds in turn, of a second each


def minute(test: MixtureSet, rate: int) -> list[np.ndarray]:
    """``(sources, samples)`` of test items, a minute together."""
    found, total = [], 0
    for item in test:
        found.append(item.sources)
        total += item.sources.shape[1]
        if total >= 60 * rate:
            break
    return found


def scored(stream: Stream, items: list[np.ndarray]) -> float:
    """Mean SI-SNR of one more minute through a running stream, each item judged after its first half second."""
    joined = np.concatenate(items, 1)
    estimates = np.concatenate([stream.process(joined.sum(0)), stream.process(np.zeros(stream.sample_rate_hz // 4))], 1)
    estimates = estimates[:, stream.latency_samples :]
    skipped, scores, at = stream.sample_rate_hz // 2, [], 0
    for item in items:
        there = slice(at + skipped, at + item.shape[1])
        scores.append(pit_si_snr_db(estimates[:, there], item[:, skipped:]))
        at += item.shape[1]
    return float(np.mean(scores))


def drift(bundle: edgesep.bundle.Bundle, minutes: int) -> Iterator[dict[str, Any]]:
    rate = bundle.sample_rate_hz
    items = minute(MixtureSet.open(TEST, rate, bundle.sources), rate)
    joined = np.concatenate(items, 1).sum(0)
    for artifact in bundle.artifacts:
        with Stream(bundle, runtime=artifact.runtime, precision=artifact.precision, threads=1) as stream:
            first = scored(stream, items)
            before_mb = measure.peak_rss_mb()
            scores = [first, *(scored(stream, items) for _ in range(minutes - 1))]
            after_mb = measure.peak_rss_mb()
            stream.process(np.zeros(10 * rate, np.float32))
            silence = scored(stream, items)
            stream.process(100 * joined[: 10 * rate])
            loud = scored(stream, items)
        yield artifact.label() | {
            "si_snr_db": [round(s, 3) for s in scores],
            "largest_change_db": round(max(abs(s - first) for s in scores), 3),
            "after_silence_db": round(silence - first, 3),
            "after_40_db_louder_db": round(loud - first, 3),
            "grown_mb": round(after_mb - before_mb, 1),
        }


def streaming_artifact(
    separator: Any, folder: Path, kind: str, threads: int, precision: str = "fp32", native: bool = False
) -> tuple[Artifact, dict[str, Any]]:
    """One build of a streaming separator, and what a manifest would say of it."""
    file, out = folder / "model.onnx", folder / f"{kind}-{precision}-{native}"
    if not file.exists():
        graph.export_onnx(separator, separator.module, file)
    model = file
    if precision == "int8":
        mixtures = MixtureSet.open(CALIBRATION, separator.sample_rate_hz, separator.sources)
        model, context = out.with_suffix(".onnx"), Context(separator, mixtures, mixtures, folder)
        Quantize(method="onnxruntime", mixtures=4)(separator, file, model, context, int8_form(kind, native))
    files = built(model, kind, precision, out, native)
    facts = separator.describe() | {"front_end": None}
    settings = getattr(runtime(kind), "STREAM_SETTINGS", {})
    return Artifact(kind, precision, threads, out, tuple(files), settings=settings), facts


def context(checkpoint: Path) -> Iterator[dict[str, Any]]:
    separator = edgesep.load_separator(checkpoint)
    test = MixtureSet.open(TEST, separator.sample_rate_hz, separator.sources)
    for seconds in (0.25, 0.5, 1.0, 2.0):
        bounded = separator.streaming.bound(separator, seconds)
        stream = separator.streaming.stream(bounded, 1)
        with tempfile.TemporaryDirectory() as folder:
            artifact, facts = streaming_artifact(stream, Path(folder), "onnxruntime", 1)
            with Separating(artifact, facts) as run:
                found = quality(run, ((m.inputs(), m.sources, bounded(*m.inputs())[0].numpy()) for m in test))
            row = bench.row(artifact, facts, 3.0)
        states_kb = sum(np.prod(s.shape) * 4 for s in stream.stream.states) / 1e3
        yield {
            "context_s": seconds,
            "si_snri_db": round(found.si_snri_db, 3),
            "output_snr_db": round(found.output_snr_db, 1),
            "state_kb": round(float(states_kb), 1),
            **{k: row[k] for k in ("p50_ms", "p99_ms", "rtf", "peak_rss_mb")},
        }


def paced(bundle: edgesep.bundle.Bundle, minutes: float) -> Iterator[dict[str, Any]]:
    for load in (False, True):
        yield from bundle.bench_stream(minutes, 1, load)


def window(bundle: edgesep.bundle.Bundle, checkpoint: Path, window_s: float = 1.0) -> Iterator[dict[str, Any]]:
    """A hop the plain way: the offline graph over the last second, of which the newest hop is kept."""
    offline = edgesep.load_separator(checkpoint)
    x = 0.1 * np.random.default_rng(0).standard_normal((1, int(window_s * offline.sample_rate_hz))).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        graph.export_onnx(offline, offline.module, file)
        for kind in RUNTIMES:
            artifact = bundle.artifact(kind, "fp32")
            files = runtime(kind).build(file, Path(folder), "fp32", {})
            with (
                runtime(kind).Runner(Path(folder), files, "fp32", 1) as whole,
                bundle.separating(artifact, 1) as separating,
            ):
                hops = separating.hops
                call, mixture = hops.mixture[0].copy(), {"mixture": x}
                calls = {"stream": lambda h=hops, c=call: h.call(c), "window": lambda w=whole, m=mixture: w.run(m)}
                times = measure.paired_ms(calls, 10.0)
            medians = {name: float(np.median(t)) for name, t in times.items()}
            yield {
                "runtime": kind,
                "window_s": window_s,
                "hops_per_call": hops.spec.hops_per_call,
                "stream_ms": round(medians["stream"], 4),
                "window_ms": round(medians["window"], 3),
                "cheaper": round(medians["window"] / medians["stream"], 1),
            }


def published(hops: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    size = next(p for p in PUBLISHED if p.name == "TFACMCausal")
    separator = tfacm.create(size.config, size.rate)
    bounded = separator.streaming.bound(separator, 0.5)
    x = (0.1 * np.random.default_rng(0).standard_normal(8000)).astype(np.float32)
    whole = bounded(x).numpy()[None]
    stream = separator.streaming.stream(bounded, hops)
    with tempfile.TemporaryDirectory() as folder:
        builds = {
            build: streaming_artifact(stream, Path(folder), build[0], 2, build[1], build[2])
            for build in PUBLISHED_BUILDS
        }
        times: dict[tuple[Any, int], list[dict[str, Any]]] = {}
        for _ in range(ROUNDS):
            for (build, (artifact, facts)), threads in itertools.product(builds.items(), (1, 2)):
                before = near()
                row = bench.row(replace(artifact, threads=threads), facts, 1.0)
                row["near"] = before if before == near() else None  # they were moved in between
                times.setdefault((build, threads), []).append(row)
        for build, (artifact, facts) in builds.items():
            kind, precision, native = build
            with Separating(artifact, facts) as run:
                snr_db = output_snr_db(run(x[None]), whole)
            for threads in (1, 2):
                fast, *_, slow = found = sorted(times[build, threads], key=lambda r: r["p50_ms"])
                yield {
                    "runtime": kind,
                    "precision": precision,
                    "ops": "native" if native else "portable",
                    "threads": threads,
                    "hops_per_call": hops,
                    "context_s": 0.5,
                    "output_snr_db": round(snr_db, 1),
                    **{k: found[ROUNDS // 2][k] for k in ("p50_ms", "p99_ms", "rtf", "peak_rss_mb")},
                    "rtf_low": fast["rtf"],
                    "rtf_high": slow["rtf"],
                    "rtf_near": median_rtf(found, True),
                    "rtf_far": median_rtf(found, False),
                    "rounds_near": sum(r["near"] is True for r in found),
                    "rounds": ROUNDS,
                }


def median_rtf(found: list[dict[str, Any]], where: bool) -> float | None:
    """Of the rounds in which the cores shared a cache, or of those in which they did not."""
    rtfs = [r["rtf"] for r in found if r["near"] is where]
    return round(float(np.median(rtfs)), 5) if rtfs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="that the bundle was made of")
    names = ("drift", "context", "paced", "window", "published")
    parser.add_argument("--part", choices=names, action="append", help="may be repeated (default: all)")
    parser.add_argument("--minutes", type=float, default=10, help="of drift")
    parser.add_argument("--paced-minutes", type=float, default=1)
    args = parser.parse_args()
    bundle = edgesep.open_bundle(args.bundle)
    parts = {
        "drift": lambda: drift(bundle, int(args.minutes)),
        "context": lambda: context(args.checkpoint),
        "paced": lambda: paced(bundle, args.paced_minutes),
        "window": lambda: window(bundle, args.checkpoint),
        "published": lambda: published(8),
    }
    for name in args.part or names:
        rows = []
        for found in parts[name]():
            rows.append({"part": name, "separator": bundle.name, **found})
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "environment"}), flush=True)
        record("streaming", rows, ("part",), each_processor=name == "published")


if __name__ == "__main__":
    main()
