"""The doors to what a bundle costs on this machine: ``bench``, ``tune`` and ``audit``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgesep.cli_common import AsJson, BundlePath, Threads, print_table, progress, show
from edgesep.spec import InputError


def bench(
    bundle: BundlePath,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long each artifact is timed")] = 5.0,
    stream: Annotated[bool, typer.Option("--stream", help="at the pace of audio: late calls, jitter, p99.9")] = False,
    minutes: Annotated[float, typer.Option(min=0.01, help="with --stream: how long each artifact is timed")] = 1.0,
    load: Annotated[bool, typer.Option("--load", help="with --stream: a second process keeps a core busy")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's artifacts on this machine: percentiles, real-time factor, memory, load time.

    Example: `edgesep bench bundle/ --threads 1`

    A stream that must not be late: `edgesep bench bundle/ --stream --minutes 10 --load`
    """
    from edgesep.bundle import open_bundle

    opened = open_bundle(bundle)
    with progress() as tick:

        def now(text: str) -> None:
            tick(0, 0, f"measuring {text}")

        rows = opened.bench_stream(minutes, threads, load, now) if stream else opened.bench(seconds, threads, now)
    show(rows, as_json)
    if stream and not as_json:
        print("latency: algorithmic + buffering + p99 of a call; the sound card adds its own")


def tune(
    bundle: BundlePath,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long each candidate is timed in each of its turns")] = 1,
    as_json: AsJson = False,
) -> None:
    """Find the fastest threads and runtime settings on this machine and keep them in the bundle.

    Run it on the device, with nothing else running. Example: `edgesep tune bundle/`
    """
    from edgesep.bundle import open_bundle
    from edgesep.tune import tune as find

    opened = open_bundle(bundle)
    with progress() as tick:
        rows = find(opened, seconds, lambda text: tick(0, 0, f"tuning {text}"))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    keys = (
        "runtime",
        "precision",
        "ops",
        "length",
        "threads",
        "settings",
        "before_ms",
        "p50_ms",
        "times_faster",
        "note",
    )
    shown = [k for k in keys if any(row.get(k) for row in rows)]
    print_table([{k: row.get(k) or None for k in shown} for row in rows])


def audit(
    bundle: BundlePath,
    threads: Threads = None,
    picture: Annotated[Path | None, typer.Option(help="write the shares of the time as SVG to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which kernels ran in which precision on this machine, and whether lower precision was worth it.

    Example: `edgesep audit bundle/ --threads 1 --picture profile.svg`
    """
    from edgesep.audit import bundle_rows
    from edgesep.bundle import open_bundle
    from edgesep.profile_picture import profile_svg

    opened = open_bundle(bundle)
    if picture and not picture.parent.is_dir():
        raise InputError(f"--picture {picture}: there is no folder {picture.parent}; make it first")
    with progress() as tick:
        rows = bundle_rows(opened, threads, lambda text: tick(0, 0, f"auditing {text}"))
    if picture:
        picture.write_text(profile_svg(rows))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    shown = ("runtime", "precision", "times_fp32_speed", "times_smaller")
    print_table(
        [
            {k: row.get(k) for k in shown}
            | {"share of time": ", ".join(f"{p} {s:.0%}" for p, s in row.get("time_share", {}).items())}
            for row in rows
        ]
    )
    for row in rows:
        if said := row.get("rejected") or row.get("note"):
            print(said)
        for op in row.get("operators", [])[:5]:
            print(f"  {row['runtime']} {row['precision']}: {op['operator']} {op['precision']} {op['share']:.0%}")
