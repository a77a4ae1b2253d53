"""The kernels on old and new ONNX Runtimes, each in an environment of its own (installs them: slow)."""

import subprocess
import sys
import venv

import numpy as np
import onnx
import pytest
from test_native_adapters import scan_inputs, scan_model

from edgesep import kernels
from edgesep.ops import selective_scan
from edgesep.verify import output_snr_db

pytestmark = pytest.mark.slow

RUN = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
with np.load("inputs.npz") as given:
    session = onnxruntime.InferenceSession("scan.onnx", options, providers=["CPUExecutionProvider"])
    np.savez("outputs.npz", *session.run(None, dict(given)))
print(onnxruntime.__version__)
"""


def run_with(version, folder):
    made, given = scan_model(scan_inputs(), delta_softplus=1), scan_inputs()
    onnx.save(made, folder / "scan.onnx")
    np.savez(folder / "inputs.npz", **given)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    wanted = [f"onnxruntime=={version}", "numpy<2" if version < "1.19" else "numpy"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    command = [python, "-c", RUN, kernels.library("onnxruntime")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", ["1.17.3", "1.20.1", "1.23.2", "1.32.0"])
def test_the_library_runs_in_every_release_from_1_17_on(version, tmp_path):
    done = run_with(version, tmp_path)
    assert done.stdout.strip() == version, done.stderr
    with np.load(tmp_path / "outputs.npz") as got:
        y, last = got["arr_0"], got["arr_1"]
    wanted = selective_scan.reference(**scan_inputs(), delta_softplus=True)
    assert min(output_snr_db(y, wanted[0]), output_snr_db(last, wanted[1])) >= 110


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="1.16 has wheels up to Python 3.11")
def test_an_older_release_is_told_which_one_it_needs(tmp_path):
    done = run_with("1.16.3", tmp_path)
    assert done.returncode == 1
    assert "need ONNX Runtime 1.17 or newer, this is 1.16.3" in done.stderr
