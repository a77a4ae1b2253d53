"""The command line's doors to compression: ``compress`` and ``ranges``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from edgesep.cli_common import AsJson, Checkpoint, Config, FrontEnd, Variant, print_table, progress
from edgesep.cli_common import show as show_rows
from edgesep.spec import EdgesepError


def compress(
    checkpoint: Checkpoint,
    calibration: Annotated[Path, typer.Option(help="mixture set for calibration and for the search")],
    test: Annotated[Path, typer.Option(help="mixture set for the proof; not looked at before")],
    budget_db: Annotated[float, typer.Option(help="mean SI-SNR that may be lost, in dB")] = 0.2,
    worst5_db: Annotated[float | None, typer.Option(help="what the worst 5 % may lose (default: 3 x budget)")] = None,
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino")] = "onnxruntime",
    train: Annotated[
        Path | None, typer.Option(help="mixture set for recovery after pruning; without it no pruning")
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="of fine-tuning after each pruning; 0: no pruning")] = 600,
    out: Annotated[Path, typer.Option(help="folder of the bundle")] = Path("bundle"),
    config: Config = None,
    front_end: FrontEnd = None,
    variant: Variant = None,
    ops: Annotated[str, typer.Option(help="operators: native or portable")] = "portable",
    hops_per_call: Annotated[int | None, typer.Option(min=1, help="compress the stream of so many hops a call")] = None,
    context_s: Annotated[
        float | None, typer.Option(min=0.001, help="with --hops-per-call: past that attention sees")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a separator as small and fast as a budget in dB allows: INT8, then pruning, each proven.

    Example: `edgesep compress best_model.pth --budget-db 0.2 --calibration sets/dev --test sets/test`

    Interrupted? The same command goes on where it was.
    """
    from edgesep.compress import compress as run
    from edgesep.recipe import DataSection, SeparatorSection, StreamSection

    if ops not in ("native", "portable"):
        raise EdgesepError(f"--ops {ops!r} is not known, use native or portable")
    if context_s is not None and hops_per_call is None:
        raise EdgesepError("--context-s is for streams; give --hops-per-call too")
    stream = StreamSection(hops_per_call=hops_per_call, context_s=context_s) if hops_per_call else None
    with progress() as tick:
        made = run(
            SeparatorSection(checkpoint=checkpoint, config=config, front_end=front_end, variant=variant),
            DataSection(calibration=calibration, test=test, train=train),
            out,
            budget_db=budget_db,
            worst5_db=worst5_db,
            runtime=runtime,
            steps=steps,
            ops="native" if ops == "native" else "portable",
            stream=stream,
            tick=tick,
        )
    rows: list[dict[str, Any]] = list(made.deployed.rows)
    if as_json:
        print(json.dumps({"tried": made.tried, "said": made.said, "results": rows}, indent=1))
    else:
        print("on the calibration mixtures:")
        print_table([{k: row.get(k) for k in ("share", "drop_db", "worst5_drop_db")} for row in made.tried])
        print("proof on the test mixtures:")
        show_rows(rows, as_json=False)
        for text in made.said:
            print(text)
        print(f"{'within budget' if made.deployed.ok else 'NOT WITHIN BUDGET'}: {made.deployed.path}/report.md")
    raise typer.Exit(0 if made.deployed.ok else 1)


def ranges(
    checkpoint: Checkpoint,
    calibration: Annotated[Path, typer.Option(help="mixture set")],
    config: Config = None,
    front_end: FrontEnd = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Say how activation ranges move with the level, noise and overlap of a mixture, and when they have settled.

    Example: `edgesep ranges best_model.pth --calibration sets/dev`
    """
    from edgesep.ranges import ranges as look

    with progress() as tick:
        found = look(checkpoint, calibration, config, front_end=front_end, variant=variant, tick=tick)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print_table(found["layers"])
    print_table(found["mixtures"])
    print(found["said"])
