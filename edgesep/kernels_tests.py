"""The C++ tests of ``export/kernels``, built and run where they are asked for."""

from __future__ import annotations

import platform
import shutil
import subprocess

from edgesep import kernels
from edgesep.spec import UnsupportedError

TESTS = ("edgesep_test", "edgesep_cuda_logic_test")


def run_tests(target: str | None = None, sanitize: bool = True) -> tuple[bool, list[str]]:
    """Build the C++ tests and run them, for another machine under qemu; (whether all passed, what they printed).

    Raises:
        UnsupportedError: qemu is missing.
    """
    foreign = target not in (None, platform.machine())
    # An emulated sanitizer needs its own libraries and finds nothing that the native one does not. The CUDA kernels'
    # logic is the same everywhere.
    options = ["-DEDGESEP_SANITIZE=ON"] if sanitize and not foreign else []
    folder, before = kernels.build("tests", *options, target=target), []
    if foreign:
        emulator = shutil.which(f"qemu-{target}")
        if emulator is None:
            raise UnsupportedError(f"qemu-{target} is not installed; install it (Debian: apt install qemu-user)")
        before = [emulator, "-L", f"/usr/{target}-linux-gnu"]
    ran = [_run([*before, str(folder / name)]) for name in (TESTS[:1] if foreign else TESTS)]
    return all(status == 0 for status, _ in ran), [line for _, lines in ran for line in lines]


def run_cuda_tests() -> tuple[bool | None, list[str]]:
    """Compile the CUDA kernels and run them on this machine's GPU; None in place of a verdict where there is none.

    Raises:
        UnsupportedError: no CUDA compiler.
    """
    status, lines = _run([str(kernels.build("cuda-tests") / "edgesep_cuda_test")])
    return (None if status == NO_GPU else status == 0), lines


NO_GPU = 77  # exit status of the CUDA tests without one


def _run(command: list[str]) -> tuple[int, list[str]]:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return ran.returncode, [*ran.stdout.splitlines(), *ran.stderr.splitlines()]
