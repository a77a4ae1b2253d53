"""The commands: exit codes, one-line errors, files written."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile


def edgesep(*args, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edgesep.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def refused(done: subprocess.CompletedProcess) -> str:
    """The message of a command that was refused: exit 2, one line, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["deploy", "demo", "inspect", "export", "verify", "bench", "separate"])
def test_every_command_explains_itself(command):
    done = edgesep(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_inspect_tells_what_a_checkpoint_is(golden):
    done = edgesep("inspect", golden("tdanetbest_small").checkpoint, "--json")
    found = json.loads(done.stdout)
    assert (found["separator"], found["sample_rate_hz"], found["causal"]) == ("TDANetBest", 16000, False)
    assert found["parameters"] == sum(v.numel() for v in golden("tdanetbest_small").state.values())


def test_dry_run_prints_the_plan_and_writes_nothing(recipe, tmp_path):
    done = edgesep("deploy", recipe, "--out", tmp_path / "b", "--dry-run")
    assert done.returncode == 0
    assert "pass quantize" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_deploy_exits_0_and_1(recipe, deployed, tmp_path):
    cache = {"EDGESEP_CACHE": str(deployed[1].root)}
    done = edgesep("deploy", recipe, "--out", tmp_path / "b", **cache)
    assert done.returncode == 0, done.stderr
    assert "criteria met" in done.stdout
    (tmp_path / "r.toml").write_text(recipe.read_text().replace("max_si_snr_drop_db = 3.0", "max_rtf = 1e-9"))
    assert edgesep("deploy", tmp_path / "r.toml", "--out", tmp_path / "c", **cache).returncode == 1
    assert (tmp_path / "c" / "manifest.json").is_file()


def test_verify_and_bench_print_tables_and_json(deployed):
    path = deployed[0].path
    assert edgesep("verify", path).returncode == 0
    rows = json.loads(edgesep("bench", path, "--seconds", "0.2", "--threads", "1", "--json").stdout)
    assert [r["status"] for r in rows] == ["ok"] * 3
    assert all(r["threads"] == 1 and r["rtf"] > 0 and r["peak_rss_mb"] > 0 for r in rows)


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (44100, 2)])
def test_separate_writes_one_file_per_source_at_the_files_rate(deployed, tmp_path, rate, channels):
    signal = 0.1 * np.random.default_rng(0).standard_normal((rate, channels))
    soundfile.write(tmp_path / "mix.wav", signal, rate, subtype="PCM_24")
    done = edgesep("separate", deployed[0].path, tmp_path / "mix.wav", "--out", tmp_path / "sources")
    assert done.returncode == 0, done.stderr
    for i in (1, 2):
        y, y_rate = soundfile.read(tmp_path / "sources" / f"mix_s{i}.wav")
        assert (y.shape, y_rate) == ((rate,), rate)
        assert np.isfinite(y).all()
        assert np.abs(y).max() > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "tensorrt"])
def test_export_writes_what_the_runtime_loads(brief, tmp_path, runtime):
    done = edgesep("export", brief, "--runtime", runtime, "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert ("built, not run" if runtime == "tensorrt" else "output SNR") in done.stdout
    assert all((tmp_path / "x" / line.split("/")[-1]).is_file() for line in done.stdout.splitlines()[1:])


def test_bad_input_is_one_line_and_exit_2(recipe, deployed, golden, tmp_path):
    assert "does not exist" in refused(edgesep("inspect", tmp_path / "none.pth"))
    assert "unknown" not in refused(edgesep("deploy", tmp_path / "none.toml"))
    assert "is no bundle" in refused(edgesep("verify", tmp_path))
    (tmp_path / "r.toml").write_text(recipe.read_text().replace("golden = 2", "gold = 2"))
    assert "unknown key data.gold" in refused(edgesep("deploy", tmp_path / "r.toml"))
    soundfile.write(tmp_path / "eight.wav", np.ones((100, 8)), 8000)
    out = ("--out", tmp_path / "s")
    assert "8 channels" in refused(edgesep("separate", deployed[0].path, tmp_path / "eight.wav", *out))
    assert not (tmp_path / "s").exists()
    assert "no packaged separator" in refused(edgesep("demo", "--separator", "ConvTasNet"))
    assert "not known" in refused(
        edgesep("export", golden("tdanet_small").checkpoint, "--runtime", "tvm", "--out", tmp_path / "y")
    )


def test_foreign_or_unwritable_output_is_refused_and_left_alone(recipe, deployed, tmp_path):
    cache = {"EDGESEP_CACHE": str(deployed[1].root)}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert "holds no bundle" in refused(edgesep("deploy", recipe, "--out", tmp_path / "mine", **cache))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(edgesep("deploy", recipe, "--out", tmp_path / "file" / "b", **cache))


def test_a_changed_byte_stops_every_command(deployed, tmp_path):
    broken = shutil.copytree(deployed[0].path, tmp_path / "b")
    with (broken / "artifacts" / "openvino-fp32" / "fp32.onnx").open("r+b") as f:
        f.seek(10)
        f.write(b"\xff\x00\xff")
    assert "has changed" in refused(edgesep("verify", broken))


def test_a_full_disk_is_one_line(recipe, deployed, tmp_path):
    """Files may not grow beyond 20 kB: what a full disk does to a write, without filling one."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from edgesep.cli import main; sys.argv = ['edgesep', 'deploy', *sys.argv[1:]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe), "--out", str(tmp_path / "b")],
        capture_output=True,
        text=True,
        env={**os.environ, "EDGESEP_CACHE": str(deployed[1].root)},
        check=False,
    )
    refused(done)
    assert list(tmp_path.iterdir()) == []
