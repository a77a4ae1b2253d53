"""Walks the folders: whatever lies in them keeps its contract, and a new file is tested without editing a test."""

import ast
import dataclasses
from pathlib import Path

import pytest

import edgesep
from edgesep import passes, runtimes, separators

PACKAGE = Path(edgesep.__file__).parent
RUNTIMES = runtimes.names()
PASSES = passes.names()
SEPARATORS = list(separators.separator_modules())


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_a_version_and_a_runner(name):
    module = runtimes.runtime(name)
    assert module.PACKAGE
    assert module.version()
    assert {"run", "__enter__", "__exit__"} <= set(dir(module.Runner))


@pytest.mark.parametrize("name", [n for n in RUNTIMES if n != "eager"])
def test_a_runtime_builds_and_never_imports_torch(name):
    assert callable(runtimes.runtime(name).build)
    assert not imports(PACKAGE / "runtimes" / f"{name}.py") & {"torch", "onnx"}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_dataclass_with_defaults(name):
    made = passes.make(name)
    assert dataclasses.is_dataclass(made)
    assert made.__dataclass_params__.frozen
    assert made.stage in ("torch", "lower", "onnx")
    assert made.stage != "onnx" or made.precision
    assert made == type(made)(**dataclasses.asdict(made))


@pytest.mark.parametrize("module", SEPARATORS, ids=lambda m: m.__name__)
def test_a_separator_module_declares_its_doors(module):
    assert all(isinstance(n, str) for n in module.NAMES)
    for door in ("recognises", "build", "create", "to_authors"):
        assert callable(getattr(module, door))
    assert not module.recognises({})


def test_only_graph_calls_the_exporter():
    callers = [f.name for f in PACKAGE.rglob("*.py") if "torch.onnx.export(" in f.read_text()]
    assert callers == ["graph.py"]


def test_checkpoints_are_never_unpickled():
    for file in PACKAGE.rglob("*.py"):
        for line in file.read_text().splitlines():
            if "torch.load(" in line:
                assert "weights_only=True" in line, f"{file}: {line}"


def test_every_file_is_short_or_says_why():
    long = [f.name for f in PACKAGE.rglob("*.py") if len(f.read_text().splitlines()) > 450]
    assert long == []
