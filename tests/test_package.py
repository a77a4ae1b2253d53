"""What is installed, and what importing it costs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: files that a device imports
DEVICE_SIDE = ["spec", "bundle", "verify", "measure", "runtimes", "runtimes.onnxruntime", "runtimes.openvino"]
HEAVY = {"torch", "onnx", "onnxruntime", "openvino", "pydantic", "rich", "typer", "scipy", "soundfile", "yaml"}


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in out.split()}


def test_importing_edgesep_costs_numpy_only():
    assert not loaded_by("import edgesep; edgesep.open_bundle") & HEAVY


@pytest.mark.parametrize("module", DEVICE_SIDE)
def test_device_side_modules_do_not_import_torch(module):
    assert "torch" not in loaded_by(f"import edgesep.{module}")


def test_the_wheel_installs_one_package_and_the_demo(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"edgesep"}
    shipped = {f"edgesep/demo/{f.name}" for f in (ROOT / "edgesep" / "demo").iterdir() if f.is_file()}
    assert {"edgesep/demo/recipe.toml", "edgesep/demo/tdanet.pth"} <= shipped <= set(names)
    assert any(n.startswith("edgesep/native/") and n.endswith(".cpp") for n in names)  # kernels, built on first use
    assert sum(n.startswith("edgesep/demo/sets/test/mix_clean/") for n in names) == 40
