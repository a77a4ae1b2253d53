"""The command line's ``kernels`` commands."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgesep.cli_common import AsJson, print_table, progress

kernels_app = typer.Typer(
    help="The native kernels: build them for a runtime or another machine, test and time them.", no_args_is_help=True
)
Target = Annotated[str | None, typer.Option(help="another machine's, as aarch64 (default: this one)")]


@kernels_app.command("build")
def kernels_build(
    runtime: Annotated[list[str] | None, typer.Option(help="onnxruntime, openvino, tensorrt; may be repeated")] = None,
    target: Target = None,
) -> None:
    """Compile the kernels, or find them compiled; prints the library's path as the last line.

    Example: `edgesep kernels build --runtime onnxruntime --target aarch64`
    """
    from edgesep import kernels

    for kind in runtime or ["onnxruntime"]:
        with progress() as tick:
            tick(0, 0, f"compiling the kernels for {kind}")
            built = kernels.library(kind, target)
        print(built)


@kernels_app.command("test")
def kernels_test(
    target: Target = None,
    cuda: Annotated[bool, typer.Option("--cuda", help="the CUDA kernels on this machine's GPU, with times")] = False,
) -> None:
    """Run the kernels' own tests: every instruction set against float64, under the sanitizers; qemu for a target."""
    from edgesep.kernels_tests import run_cuda_tests, run_tests

    with progress() as tick:
        tick(0, 0, "compiling and running the tests")
        passed, lines = run_cuda_tests() if cuda else run_tests(target)
    print("\n".join(lines))
    raise typer.Exit(0 if passed else 1)


@kernels_app.command("bench")
def kernels_bench(
    threads: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated (default: 1 and 2)")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="how long each is timed")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Time the scan for SPMamba's shapes on every instruction set of this machine, in ns per state update."""
    from edgesep.kernels_bench import bench

    with progress() as tick:
        rows = bench(tuple(threads or (1, 2)), seconds, lambda text: tick(0, 0, text))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table(rows)
