"""The native kernels of ``export/kernels``: built for this machine when first needed, found again afterwards.

Sources travel with the package (``edgesep/native``). A build is cached by its sources and the compiler's version; the
library holds every instruction set and chooses when it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgesep.spec import BuildError, UnsupportedError
from edgesep.store import default_root

SOURCES = Path(__file__).parent / "native"
log = logging.getLogger(__name__)


def sources_digest() -> str:
    total = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes())
    return total.hexdigest()


def compiler() -> str:
    """The C++ compiler's path.

    Raises:
        UnsupportedError: none found.
    """
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    raise UnsupportedError(
        f"no C++ compiler found ({named or 'c++, g++, clang++'}); install one (Debian, Ubuntu: apt install g++)"
    )


def tool(name: str) -> str:
    """Path of cmake or ninja: beside this Python, else on the PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    if path := str(beside) if beside.is_file() else shutil.which(name):
        return path
    raise UnsupportedError(f"{name} is not installed; pip install 'edgesep[kernels]'")


def build(*options: str) -> Path:
    """Configure and compile, or find what was compiled before; returns the build's folder.

    Args:
        options: for CMake, as ``-DEDGESEP_SANITIZE=ON``.

    Raises:
        UnsupportedError: compiler, cmake or ninja missing.
        BuildError: it did not compile; the compiler's last lines are in the message.
    """
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    key = hashlib.sha256("\0".join([sources_digest(), version, *options]).encode()).hexdigest()[:20]
    folder = default_root() / f"kernels-{key}"
    if folder.is_dir():
        return folder
    cmake, ninja = tool("cmake"), tool("ninja")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    log.info("compiling the native kernels with %s", version)
    try:
        made = ["-S", str(SOURCES), "-B", str(scratch)]
        for command in (
            [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={cxx}", *options, *made],
            [cmake, "--build", str(scratch)],
        ):
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if ran.returncode:
                last = "\n".join((ran.stdout + ran.stderr).splitlines()[-15:])
                raise BuildError(f"the native kernels did not compile ({' '.join(command[:2])} …):\n{last}")
        try:
            scratch.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@functools.cache
def core() -> ctypes.CDLL:
    """The core library, loaded.

    Raises:
        UnsupportedError, BuildError: as ``build``.
    """
    library = ctypes.CDLL(str(build() / "libedgesep_core.so"))
    library.edgesep_instruction_set.restype = ctypes.c_char_p
    for name in ("edgesep_scan_rows", "edgesep_conv_rows", "edgesep_scan_backward_workspace"):
        getattr(library, name).restype = ctypes.c_int64
    return library


@functools.cache
def core_if_possible() -> ctypes.CDLL | None:
    """The core library, or None (said once in the log) where it cannot be built."""
    try:
        return core()
    except (UnsupportedError, BuildError) as e:
        log.warning("slow path without native kernels: %s", e)
        return None


def split(call: Callable[..., Any], argument: ctypes.Structure, rows: int, threads: int) -> None:
    """``call(argument, first, end)`` over ``rows``, in parallel parts; ctypes releases the interpreter's lock."""
    parts = max(1, min(threads, rows))
    edges = [ctypes.c_int64(rows * i // parts) for i in range(parts + 1)]
    if parts == 1:
        call(ctypes.byref(argument), *edges)
        return
    with ThreadPoolExecutor(parts) as pool:
        for done in [pool.submit(call, ctypes.byref(argument), a, b) for a, b in itertools.pairwise(edges)]:
            done.result()
