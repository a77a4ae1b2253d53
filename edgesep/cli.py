"""The command line. Exit 0: done and criteria met; 1: criteria not met; 2: the input cannot be used."""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgesep import cli_compress, cli_measure
from edgesep.cli_common import (
    AsJson,
    BundlePath,
    Checkpoint,
    Config,
    FrontEnd,
    Threads,
    Variant,
    progress,
    screen,
    show,
)
from edgesep.cli_kernels import kernels_app
from edgesep.spec import EdgesepError

if TYPE_CHECKING:
    from edgesep.recipe import Recipe

app = typer.Typer(
    help="Deploy speech separators: lower, prune, quantize, export, and prove the result in dB and ms.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(kernels_app, name="kernels")


def _deploy(recipe: Path | Recipe, out: Path, as_json: bool = False) -> None:
    from edgesep.line import deploy

    with progress() as tick:
        done = deploy(recipe, out, tick=tick)
    show(list(done.rows), as_json)
    if not as_json:
        print(f"{'criteria met' if done.ok else 'CRITERIA NOT MET'}: {done.path}/report.md")
    raise typer.Exit(0 if done.ok else 1)


@app.command()
def deploy(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe")],
    out: Annotated[Path, typer.Option(help="folder of the bundle; an existing bundle is replaced")] = Path("bundle"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the recipe and print what would happen")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: checkpoint in, verified bundle out.

    Example: `edgesep deploy export/recipes/tdanet_pruned.toml --out bundle/`
    """
    if dry_run:
        from edgesep.line import Line
        from edgesep.recipe import read_recipe
        from edgesep.store import Store

        for text in Line(read_recipe(recipe), Store()).plan():
            print(text)
        return
    _deploy(recipe, out, as_json)


@app.command()
def demo(
    separator: Annotated[str, typer.Option(help="which packaged separator")] = "TDANet",
    out: Annotated[Path, typer.Option(help="folder of the bundle")] = Path("demo-bundle"),
    as_json: AsJson = False,
) -> None:
    """Deploy a packaged separator on packaged data, from checkpoint to verified bundle."""
    from edgesep.recipe import read_recipe

    folder = Path(str(resources.files("edgesep") / "demo"))
    known = {f.stem: f for f in folder.glob("*.pth")}
    if separator.lower() not in known:
        raise EdgesepError(f"no packaged separator {separator!r}, packaged are {', '.join(sorted(known))}")
    own = folder / f"{separator.lower()}.toml"
    recipe = read_recipe(own if own.is_file() else folder / "recipe.toml")
    named = recipe.separator.model_copy(update={"checkpoint": known[separator.lower()]})
    _deploy(recipe.model_copy(update={"separator": named}), out, as_json)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    config: Config = None,
    front_end: FrontEnd = None,
    variant: Variant = None,
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is: architecture, sizes, multiply-accumulates, rate, causal or not.

    Example: `edgesep inspect best_model.pth --config conf.yml`
    """
    from edgesep.inspect import inspect as look

    found = look(checkpoint, config, front_end=front_end, variant=variant)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, part in value.items():
                print(f"  {name:32s} {part}")
        else:
            print(f"{key:34s} {value:,}" if isinstance(value, int) else f"{key:34s} {value}")


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="folder for the files")],
    runtime: Annotated[str, typer.Option(help="onnxruntime, openvino or tensorrt")] = "onnxruntime",
    config: Config = None,
    front_end: FrontEnd = None,
    variant: Variant = None,
    native: Annotated[bool, typer.Option("--native", help="operators on kernels compiled for this machine")] = False,
) -> None:
    """Export a checkpoint in float32 for one runtime, checked against the original where it can run here.

    Example: `edgesep export best_model.pth --config conf.yml --runtime openvino --out export/`
    """
    from edgesep.export import export_checked
    from edgesep.separators import load_separator

    separator = load_separator(checkpoint, config, front_end=front_end, variant=variant)
    with progress() as tick:
        files, said = export_checked(separator, runtime, out, tick, native=native)
    if separator.note:
        print(separator.note)
    for text in said:
        print(text)
    for file in files:
        print(file)


@app.command()
def verify(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Re-verify a bundle on this machine against its golden vectors. Needs numpy and one runtime."""
    from edgesep.bundle import open_bundle

    opened = open_bundle(bundle)
    with progress() as tick:
        rows = opened.verify(lambda text: tick(0, 0, f"verifying {text}"))
    show(rows, as_json)
    ran = [r for r in rows if r["status"] != "not run"]
    if not ran:
        screen.print("edgesep: no artifact of this bundle can run here", style="red")
    raise typer.Exit(0 if ran and all(r["status"] == "ok" for r in ran) else 1)


@app.command()
def separate(
    bundle: BundlePath,
    audio: Annotated[Path, typer.Argument(help="WAV or FLAC, any rate, mono or stereo")],
    out: Annotated[Path, typer.Option(help="folder for one WAV per source")],
    runtime: Annotated[str | None, typer.Option(help="default: the first that runs here")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8")] = None,
    ops: Annotated[str | None, typer.Option(help="operators: native or portable")] = None,
    threads: Threads = None,
    mouth: Annotated[Path | None, typer.Option(help="IIANet: mouth video of the wanted speaker, .npz or .npy")] = None,
    late_s: Annotated[float, typer.Option(min=0, help="seconds by which the video starts after the audio")] = 0.0,
    block_s: Annotated[float | None, typer.Option(help="separate in overlapping blocks of so many seconds")] = None,
) -> None:
    """Separate an audio file: one 32-bit float WAV per source, at the file's own rate.

    Example: `edgesep separate bundle/ mix.wav --out sources/`

    Hours of audio in bounded memory: `edgesep separate bundle/ long.wav --out sources/ --block-s 10`
    """
    from edgesep import audio as sound
    from edgesep import video
    from edgesep.bundle import open_bundle

    opened = open_bundle(bundle)
    mixture, rate = sound.read(audio, opened.sample_rate_hz)
    seen = video.read(mouth) if mouth else None
    with progress() as tick:
        tick(0, 0, f"separating {audio.name}")
        estimates = opened.separate(
            mixture,
            seen,
            late_s=late_s,
            block_s=block_s,
            runtime=runtime,
            precision=precision,
            ops=ops,
            threads=threads,
        )
    _write_sources(sound.resample(estimates, opened.sample_rate_hz, rate), rate, out, audio.stem)


def _write_sources(estimates: Any, rate: int, out: Path, stem: str) -> None:
    from edgesep import audio as sound

    try:
        out.mkdir(parents=True, exist_ok=True)
        for i, signal in enumerate(estimates):
            file = out / f"{stem}_s{i + 1}.wav"
            sound.write(file, signal, rate)
            print(file)
    except (OSError, RuntimeError) as e:
        raise EdgesepError(f"{out} cannot be written ({e}); give a folder you may write to") from e


@app.command()
def stream(
    bundle: BundlePath,
    audio: Annotated[Path | None, typer.Argument(help="WAV or FLAC; leave out for --live")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for one WAV per source")] = None,
    live: Annotated[bool, typer.Option("--live", help="from the sound card and back to it")] = False,
    source: Annotated[int, typer.Option(min=1, help="with --live: which source to play")] = 1,
    block_s: Annotated[float | None, typer.Option(help="bundles without a stream: blocks of so many seconds")] = None,
    mouth: Annotated[Path | None, typer.Option(help="IIANet: mouth video of the wanted speaker, .npz or .npy")] = None,
    runtime: Annotated[str | None, typer.Option(help="default: the first that runs here")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8")] = None,
    threads: Threads = None,
) -> None:
    """Separate hop by hop, with a bounded memory: a file, or the sound card's input until Ctrl-C.

    Example: `edgesep stream bundle/ mix.wav --out sources/`

    Live: `edgesep stream bundle/ --live --source 2`
    """
    from edgesep import audio as sound
    from edgesep import live as card
    from edgesep import video
    from edgesep.bundle import open_bundle
    from edgesep.stream import Stream

    if live == (audio is not None) or (audio is not None and out is None):
        raise EdgesepError("give an audio file and --out DIR, or --live alone")
    opened = open_bundle(bundle)
    with Stream(opened, runtime=runtime, precision=precision, threads=threads, block_s=block_s) as stream:
        if audio is None:
            card.play(stream, source, lambda text: print(text, file=sys.stderr))
            return
        assert out is not None  # checked above
        mixture, rate = sound.read(audio, opened.sample_rate_hz)
        with progress() as tick:
            seen = video.read(mouth) if mouth else None
            estimates = stream.separate(mixture, seen, lambda done: tick(done, mixture.size, f"streaming {audio.name}"))
        if stream.silenced_hops:
            print(f"{stream.silenced_hops} hops held NaN or infinite samples and were silenced", file=sys.stderr)
    _write_sources(sound.resample(estimates, opened.sample_rate_hz, rate), rate, out, audio.stem)


for command in (
    cli_measure.bench,
    cli_measure.tune,
    cli_measure.audit,
    cli_compress.compress,
    cli_compress.ranges,
):
    app.command()(command)


def main() -> None:
    """Entry point: the library's errors become one line on stderr and exit status 2."""
    try:
        app()
    except EdgesepError as e:
        sys.exit(_say(e))
    except OSError as e:
        reason = "the disk is full; free some space" if e.errno == 28 else e.strerror or e
        where = f" ({e.filename})" if e.filename else ""
        sys.exit(_say(f"{reason}{where}"))


def _say(error: object) -> int:
    print(f"edgesep: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
