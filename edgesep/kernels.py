"""The native kernels of ``export/kernels``: built for this machine when first needed, found again afterwards.

Sources travel with the package (``edgesep/native``); each folder with an ``adapter.*`` is a library for one runtime,
``core`` the kernels alone, compiled once and held by the others. A build is cached by its sources, target, runtime
version and compilers; the library holds every instruction set and chooses when it is loaded. A library's name in a
bundle says what it was built for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from edgesep.spec import BuildError, InputError, UnsupportedError
from edgesep.store import alone, default_root

SOURCES = Path(__file__).parent / "native"
TARGETS = {"x86_64": "g++", "aarch64": "g++-aarch64-linux-gnu"}  # machine → Debian's package of its compiler
CUDA = ("tensorrt", "cuda-tests")  # kinds that nvcc compiles
log = logging.getLogger(__name__)


def adapters() -> list[str]:
    """The runtimes that have an adapter."""
    return sorted(f.parent.name for f in SOURCES.glob("*/adapter.*"))


def sources_digest() -> str:
    total = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file():
            total.update(f"{file.relative_to(SOURCES)}\0".encode() + file.read_bytes())
    return total.hexdigest()


def compiler(target: str | None = None) -> str:
    """Path of the C++ compiler for this machine or for ``target``.

    Raises:
        InputError: a target that is not known.
        UnsupportedError: none found; the message names the package.
    """
    if target not in (None, *TARGETS):
        raise InputError(f"target {target!r} is not known, known are {', '.join(TARGETS)}")
    if target not in (None, platform.machine()):
        if path := shutil.which(f"{target}-linux-gnu-g++"):
            return path
        raise UnsupportedError(
            f"no C++ compiler for {target} found; install one (Debian: apt install {TARGETS[target]})"
        )
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


def file_name(kind: str, target: str | None = None) -> str:
    """Name of a library in a bundle: it says for which machine, and where that matters for which release."""
    release = f"-{_openvino_version()}" if kind == "openvino" else ""
    return f"libedgesep_{kind}{release}-{target or platform.machine()}.so"


def _openvino_version() -> str:
    """The adapter links the library of exactly this release."""
    try:
        return metadata.version("openvino")
    except metadata.PackageNotFoundError as e:
        raise UnsupportedError("openvino is not installed here; pip install openvino") from e


def _options(kind: str, target: str | None) -> list[str]:
    """For CMake."""
    made = []
    if target not in (None, platform.machine()):
        made += ["-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={target}"]
    if kind == "openvino":
        if made:
            raise UnsupportedError(
                f"OpenVINO's adapter links OpenVINO's own library for {target}; build it on the device: edgesep"
                " kernels build --runtime openvino"
            )
        found = importlib.util.find_spec("openvino")
        assert found is not None  # its version was read before
        assert found.origin is not None
        made.append(f"-DOpenVINO_DIR={Path(found.origin).parent / 'cmake'}")
    if kind == "onnxruntime" and (headers := os.environ.get("ONNXRUNTIME_INCLUDE_DIR")):
        made.append(f"-DONNXRUNTIME_INCLUDE_DIR={headers}")  # checks our own declarations
    if kind in CUDA:
        if made:
            raise UnsupportedError(f"CUDA kernels for {target} are built on the device itself")
        made.append(f"-DCMAKE_CUDA_COMPILER={_nvcc()}")
    if kind == "tensorrt":
        made.append(f"-DTENSORRT_INCLUDE_DIR={_tensorrt_headers()}")
    return made


def _nvcc() -> str:
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    raise UnsupportedError("nvcc is not found; install the CUDA toolkit (on a Jetson it comes with JetPack)")


def _tensorrt_headers() -> Path:
    """Folder of NvInfer.h: ``$TENSORRT_INCLUDE_DIR``, else where TensorRT's Debian packages put it."""
    named = os.environ.get("TENSORRT_INCLUDE_DIR")
    folders = [Path(named)] if named else [Path(f"/usr/include/{platform.machine()}-linux-gnu"), Path("/usr/include")]
    for folder in folders:
        if (folder / "NvInfer.h").is_file():
            return folder
    raise UnsupportedError(
        f"NvInfer.h is not in {' or '.join(map(str, folders))}; set TENSORRT_INCLUDE_DIR to the folder that holds it"
    )


def _prefix(kind: str, target: str | None) -> str:
    """Beginning of the cached folder's name; the compiler makes its end."""
    flags = (os.environ.get(name, "") for name in ("CXXFLAGS", "CUDAFLAGS", "LDFLAGS"))  # CMake reads them
    made_of = "".join([sources_digest(), file_name(kind, target), *flags])
    return f"kernels-{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"


def _made_with(kind: str, cxx: str) -> list[str]:
    """What the compilers say of themselves, and TensorRT's headers of their release: an upgrade needs a new build."""
    compilers = [cxx, _nvcc()] if kind in CUDA else [cxx]
    said = [subprocess.run([c, "--version"], capture_output=True, text=True, check=False).stdout for c in compilers]
    if kind == "tensorrt" and (release := _tensorrt_headers() / "NvInferVersion.h").is_file():
        said.append(release.read_text())
    return said


def find(kind: str, target: str | None = None) -> Path | None:
    """The library of that kind as it was built before, by whichever compiler, or None."""
    built = default_root().glob(f"{_prefix(kind, target)}-*/libedgesep_{kind}.so")
    return max(built, key=lambda f: f.stat().st_mtime, default=None)


def build(kind: str = "core", *options: str, target: str | None = None) -> Path:
    """Configure and compile, or find what was compiled before; returns the build's folder.

    Args:
        kind: ``core``, ``tests``, ``cuda-tests`` or one of ``adapters()``.
        options: for CMake, as ``-DEDGESEP_SANITIZE=ON``.
        target: another machine's, as ``aarch64``.

    Raises:
        InputError: a kind or target that is not known.
        UnsupportedError: compiler, cmake, ninja or the runtime missing.
        BuildError: it did not compile; the compiler's last lines are in the message.
    """
    if kind not in ("tests", "cuda-tests"):
        _refuse_unknown(kind)
    cxx, own = compiler(target), _options(kind, target)
    versions = _made_with(kind, cxx)
    key = hashlib.sha256("\0".join([*versions, *options]).encode()).hexdigest()[:12]
    # Builds with options are named apart: find() must not hand a sanitized library to an artifact.
    folder = default_root() / f"{'options-' if options else ''}{_prefix(kind, target)}-{key}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as e:
        raise UnsupportedError(
            f"{folder.parent} cannot be written ({e.strerror}); set EDGESEP_CACHE to a folder"
        ) from e
    try:
        with alone(folder):
            if not folder.is_dir():
                log.info("compiling the native kernels (%s) with %s", kind, versions[0].split("\n")[0])
                made = [f"-DEDGESEP_BUILD={kind}", *own, *options]
                if kind not in ("core", "cuda-tests"):
                    made.append(f"-DEDGESEP_CORE={build('core', *options, target=target)}")
                _compile([f"-DCMAKE_CXX_COMPILER={cxx}", *made], scratch)
                scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _compile(options: list[str], folder: Path) -> None:
    cmake, ninja = tool("cmake"), tool("ninja")
    for command in (
        [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options, "-S", str(SOURCES), "-B", str(folder)],
        [cmake, "--build", str(folder)],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            last = "\n".join((ran.stdout + ran.stderr).splitlines()[-15:])
            raise BuildError(f"the native kernels did not compile ({' '.join(command[:2])} …):\n{last}")


def _refuse_unknown(kind: str) -> None:
    if kind not in ("core", *adapters()):
        raise InputError(f"there are no kernels for {kind!r}, there are for {', '.join(adapters())}")


def refuse_without(module: Any) -> None:
    """Refuse a runtime module that takes no native kernels, before any are compiled for it."""
    if not getattr(module, "TAKES_KERNELS", True):
        raise UnsupportedError(f'{module.PACKAGE} takes no native kernels; leave ops = "portable" for this target')


def library(kind: str, target: str | None = None) -> Path:
    """The library of that kind, built if need be (see ``build``)."""
    _refuse_unknown(kind)  # programs are no libraries
    return build(kind, target=target) / f"libedgesep_{kind}.so"


def library_among(kind: str, folder: Path, files: list[str]) -> Path | None:
    """The library that an artifact needs: its own if it was built for this machine, else one built here before.

    Returns None for an artifact without native kernels.

    Raises:
        UnsupportedError: there is none for this machine; the message gives the command that builds it.
    """
    carried = [name for name in files if name.endswith(".so")]
    if not carried:
        return None
    wanted = file_name(kind)
    if wanted in carried:
        return folder / wanted
    if built := find(kind):
        return built
    raise UnsupportedError(
        f"the native kernels of this artifact are {', '.join(carried)}, this machine needs {wanted}; build it with:"
        f" edgesep kernels build --runtime {kind}"
    )


@functools.cache
def core() -> ctypes.CDLL:
    """The core library, loaded.

    Raises:
        UnsupportedError, BuildError: as ``build``.
    """
    path = library("core")
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as e:
        raise UnsupportedError(f"{path} cannot be loaded: {e}") from e
    loaded.edgesep_instruction_set.restype = ctypes.c_char_p
    for name in ("scan_rows", "conv_rows", "conv_norm_rows", "scan_backward_workspace"):
        getattr(loaded, f"edgesep_{name}").restype = ctypes.c_int64
    return loaded


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
