"""What the README says is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import write_set

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(brief, tmp_path_factory):
    """A folder with the files that the README names."""
    root = tmp_path_factory.mktemp("readme")
    for file in ("best_model.pth", "conf.yml"):
        shutil.copy(brief.with_name(file), root)
    for name in ("calibration", "test"):
        write_set(root / "sets" / name)
    shutil.copy(root / "sets/test/mix_clean/0.wav", root / "mix.wav")
    shutil.copy(root / "mix.wav", root / "meeting.wav")
    (root / "recipe.toml").write_text(blocks("toml")[0])
    return root


def run(command: list[str], workplace: Path) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=workplace, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def test_every_command_runs(workplace):
    commands = [line.split("#")[0].split() for line in blocks("sh")[0].splitlines()]
    assert {c[1] for c in commands} == {"inspect", "export", "deploy", "verify", "bench", "separate"}
    for command in commands:
        run(command, workplace)
    assert (workplace / "bundle" / "report.md").is_file()
    assert soundfile.info(workplace / "sources" / "mix_s2.wav").frames == soundfile.info(workplace / "mix.wav").frames
    # The Python example works on the bundle that the commands made.
    run([sys.executable, "-c", blocks("python")[0]], workplace)


@pytest.mark.slow  # a search, an audit and a look at the ranges
def test_compression_holds_the_budget(workplace):
    write_set(workplace / "sets" / "train")
    compress, audit, ranges = (line.split("#")[0].split() for line in blocks("sh")[1].splitlines())
    assert "within budget" in run([*compress, "--out", "compressed"], workplace)
    audit[audit.index("bundle/")] = "compressed"
    assert "times_fp32_speed" in run(audit, workplace)
    assert "ranges" in run(ranges, workplace)


def test_kernels_are_built_and_timed(tmp_path):
    build, bench, test = (line.split("#")[0].split() for line in blocks("sh")[2].splitlines())
    built = run(build, tmp_path).splitlines()
    assert all(Path(line).is_file() for line in built)
    assert "avx2" in run(bench, tmp_path) or "baseline" in run(bench, tmp_path)
    assert test == ["edgesep", "kernels", "test"]  # run by the kernels' own test


def test_tables_are_those_of_the_recorded_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme_tables.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_file_it_names_exists():
    for name in re.findall(r"(?:export|benchmarks|calibration)/[\w/]+\.\w+", TEXT):
        assert (ROOT / name).is_file(), name
