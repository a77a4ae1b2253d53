"""A bundle: what deploy writes, what a device can do with it, and what it refuses."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import onnxruntime
import pytest

import edgesep
from edgesep.line import deploy
from edgesep.verify import output_snr_db


@pytest.fixture
def bundle_copy(deployed, tmp_path):
    return shutil.copytree(deployed[0].path, tmp_path / "copy")


def test_deploy_meets_the_criteria_and_says_so(deployed):
    result, _ = deployed
    assert result.ok
    rows = {(r["runtime"], r["precision"]): r for r in result.rows}
    assert set(rows) == {
        ("eager", "fp32"),
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
    }
    for name in ("onnxruntime", "openvino"):
        row = rows[name, "fp32"]
        assert row["shapes_snr_db"] >= 80
        assert row["output_snr_db"] >= 80
        assert abs(row["drop_db"]) < 0.01
        assert row["p50_ms"] > 0
        assert row["environment"]["cpu"]


def test_rerun_redoes_nothing_and_gives_the_same_quality(recipe, deployed, tmp_path):
    first, store = deployed
    again = deploy(recipe, tmp_path / "again", store=type(store)(store.root))
    assert again.redone == ()
    for a, b in zip(first.rows, again.rows, strict=True):
        assert a.get("si_snr_db") == b.get("si_snr_db")


def test_a_changed_pass_redoes_only_what_follows(recipe, deployed, tmp_path):
    text = recipe.read_text().replace('method = "onnxruntime"', 'method = "onnxruntime"\nmixtures = 2')
    (tmp_path / "r.toml").write_text(text)
    store = type(deployed[1])(deployed[1].root)
    changed = deploy(tmp_path / "r.toml", tmp_path / "out", store=store)
    assert changed.redone == ("quantize", "build")


def test_criteria_that_are_not_met_mark_the_bundle(recipe, deployed, tmp_path):
    (tmp_path / "r.toml").write_text(
        recipe.read_text().replace("max_si_snr_drop_db = 3.0", "min_output_snr_db = 300.0")
    )
    failed = deploy(tmp_path / "r.toml", tmp_path / "out", store=type(deployed[1])(deployed[1].root))
    assert not failed.ok
    assert "CRITERIA NOT MET" in (tmp_path / "out" / "report.md").read_text()
    assert edgesep.open_bundle(tmp_path / "out").manifest["ok"] is False


def test_verify_repeats_the_figures(deployed):
    rows = edgesep.open_bundle(deployed[0].path).verify()
    assert [r["status"] for r in rows] == ["ok", "ok", "ok"]


def test_runner_runs_the_named_runtime(deployed, golden):
    bundle = edgesep.open_bundle(deployed[0].path)
    g = golden("tdanet_small")
    with bundle.runner("openvino") as runner:
        y = runner.run({"mixture": g.inputs[0]})["estimates"]
    assert output_snr_db(y, g.output) >= 80


def test_separate_takes_one_mixture_or_a_batch(deployed, golden):
    bundle = edgesep.open_bundle(deployed[0].path)
    g = golden("tdanet_small")
    one = bundle.separate(g.inputs[0][0])
    assert one.shape == (2, 3997)
    assert output_snr_db(one[None], g.output) >= 80
    assert bundle.separate(np.repeat(g.inputs[0], 2, axis=0)).shape == (2, 2, 3997)


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        (np.zeros(4000), "silent"),
        (np.zeros(0), "at least"),
        (np.r_[np.ones(10), np.nan], "1 NaN"),
        (np.ones((2, 2, 2)), "expected"),
    ],
)
def test_unusable_signals_are_refused(deployed, signal, message):
    with pytest.raises(edgesep.InputError, match=message):
        edgesep.open_bundle(deployed[0].path).separate(signal)


def test_a_changed_byte_is_found(bundle_copy):
    file = bundle_copy / "artifacts" / "onnxruntime-fp32" / "fp32.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(edgesep.VerificationError, match=r"fp32\.onnx has changed"):
        edgesep.open_bundle(bundle_copy)


def test_a_changed_manifest_is_found(bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["criteria"]["max_si_snr_drop_db"] = 99
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(edgesep.VerificationError, match=r"manifest\.json has changed"):
        edgesep.open_bundle(bundle_copy)


def test_a_missing_file_is_found(bundle_copy):
    (bundle_copy / "golden.npz").unlink()
    with pytest.raises(edgesep.VerificationError, match=r"golden\.npz is missing"):
        edgesep.open_bundle(bundle_copy)


def test_no_bundle(tmp_path):
    with pytest.raises(edgesep.InputError, match="is no bundle"):
        edgesep.open_bundle(tmp_path)


def test_unknown_artifact_lists_those_there_are(deployed):
    with pytest.raises(edgesep.UnsupportedError, match="it holds onnxruntime fp32, onnxruntime int8, openvino fp32"):
        edgesep.open_bundle(deployed[0].path).separate(np.ones(100), runtime="openvino", precision="int8")


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""
BUILD_HOST = {"torch", "onnx", "openvino", "tensorrt", "tensorrt_rtx", "yaml", "neural_compressor", "torch_pruning"}


def run_with_blocked(blocked: set[str], body: str) -> str:
    code = BLOCK.format(blocked=blocked) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_device_with_numpy_and_one_runtime_does_everything(deployed):
    out = run_with_blocked(
        BUILD_HOST | {"pydantic", "rich", "typer", "soundfile", "soxr", "scipy"},
        f"""
        import numpy as np, edgesep
        bundle = edgesep.open_bundle({str(deployed[0].path)!r})
        assert bundle.separate(np.ones(4000, np.float32)).shape == (2, 4000)
        print([r["status"] for r in bundle.verify()])
        print([r["status"] for r in bundle.bench(seconds=0.1)])
        """,
    )
    # The bench runs in a child process, where nothing is blocked.
    assert out.splitlines()[0] == "['ok', 'ok', 'not run']"


def test_a_missing_runtime_is_named_with_the_command_that_installs_it(deployed):
    out = run_with_blocked(
        {"onnxruntime", "openvino"},
        f"""
        import numpy as np, edgesep
        try:
            edgesep.open_bundle({str(deployed[0].path)!r}).separate(np.ones(4000, np.float32))
        except edgesep.UnsupportedError as e:
            print(e)
        """,
    )
    assert "pip install onnxruntime" in out


def test_the_onnx_file_says_how_to_feed_it(deployed):
    session = onnxruntime.InferenceSession(deployed[0].path / "artifacts" / "onnxruntime-int8" / "int8.onnx")
    facts = json.loads(session.get_modelmeta().custom_metadata_map["edgesep"])
    assert facts["sample_rate_hz"] == 8000
    assert facts["inputs"][0]["shape"] == ["batch", "samples"]


def test_an_interrupted_deployment_leaves_no_bundle(recipe, deployed, tmp_path):
    def stop(_done, _total, text):
        if text.startswith("measuring onnxruntime"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(recipe, tmp_path / "bundle", store=type(deployed[1])(deployed[1].root), tick=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_bundle(recipe, deployed, tmp_path, monkeypatch):
    from edgesep import bundle

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        deploy(recipe, tmp_path / "bundle", store=type(deployed[1])(deployed[1].root))
    assert list(tmp_path.iterdir()) == []
