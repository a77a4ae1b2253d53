"""Streams: hop by hop equals the whole, no estimate looks further ahead than stated, and nothing breaks a stream."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import shallow, target, write_recipe
from numpy.testing import assert_array_equal

import edgesep
from edgesep import InputError, Stream, UnsupportedError, blocks, integer_states, load_separator, open_bundle
from edgesep.audit import executed
from edgesep.line import Line, deploy
from edgesep.paced import longest_run, paced
from edgesep.recipe import read_recipe
from edgesep.runtimes import int8_form, runtime
from edgesep.separators.segments import StreamingSegments
from edgesep.spec import StateSpec, StreamSpec
from edgesep.store import Store
from edgesep.stream import Hops, measured_look_ahead, whole
from edgesep.verify import output_snr_db

HOP, SYNTHESIS = 8, 16
STREAM = "[stream]\nhops_per_call = {hops}\ncontext_s = 0.05\n"
TARGETS = "".join(target(kind, precision) for kind in ("onnxruntime", "openvino") for precision in ("fp32", "int8"))


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    """A small TFACM for hearing aids: the synthesis window is half of the analysis window."""
    g, folder = golden("tfacm_released_small"), tmp_path_factory.mktemp("causal")
    return shallow(g, folder, variant="causal", synthesis=SYNTHESIS)


@pytest.fixture(scope="module")
def bundles(checkpoint, mixtures, cache, tmp_path_factory):
    """Bundles of one and of three hops per call."""
    found = {}
    for hops in (1, 3):
        folder = tmp_path_factory.mktemp(f"stream{hops}")
        targets = TARGETS if hops == 1 else target("onnxruntime") + target("openvino")
        recipe = write_recipe(folder, checkpoint, mixtures, targets + STREAM.format(hops=hops))
        assert deploy(recipe, folder / "bundle", store=Store(cache)).ok
        found[hops] = open_bundle(folder / "bundle")
    return found


@pytest.fixture(scope="module")
def mixture():
    return (0.1 * np.random.default_rng(5).standard_normal(4007)).astype(np.float32)


@pytest.fixture(scope="module")
def offline(checkpoint, mixture):
    """The causal separator on the whole mixture, with the stream's context."""
    separator = load_separator(checkpoint)
    return separator.streaming.bound(separator, 0.05)(mixture).numpy()


def played(stream: Stream, mixture: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The mixture in blocks of these sizes, over and over."""
    parts, start, turn = [], 0, 0
    while start < mixture.size:
        size = sizes[turn % len(sizes)]
        parts.append(stream.process(mixture[start : start + size]))
        start, turn = start + size, turn + 1
    parts.append(stream.flush())
    return np.concatenate(parts, 1)[:, stream.latency_samples :]


@pytest.mark.parametrize("hops", [1, 2, 5, 7, 8, 35])
def test_calls_of_any_length_give_the_offline_output(checkpoint, mixture, offline, hops):
    separator = load_separator(checkpoint)
    stream = separator.streaming.stream(separator.streaming.bound(separator, 0.05), hops)

    def run(feeds):
        with torch.no_grad():
            made = stream.module(*(torch.from_numpy(feeds[s.name]) for s in stream.inputs))
        return {s.name: value.numpy() for s, value in zip(stream.outputs, made, strict=True)}

    calls = Hops(lambda _: run, stream.stream)
    padded = np.pad(mixture, (0, SYNTHESIS + calls.call_samples))
    starts = range(0, padded.size - calls.call_samples + 1, calls.call_samples)
    parts = [calls.call(padded[t : t + calls.call_samples]).copy() for t in starts]
    made = np.concatenate(parts, 1)[:, calls.delay_samples :][:, : mixture.size]
    assert output_snr_db(made, offline) >= 100


def test_the_inputs_that_hold_a_cell_leave_the_others_their_eight_bits():
    separator = load_separator(Path(edgesep.__file__).parent / "demo" / "hearingaid.pth")
    for block in separator.module.blocks:
        own = block.inter_rnn.lstm.weight_ih_l0
        weight = StreamingSegments(block.inter_rnn).rnn.weight_ih_l0
        scale = weight.abs().amax(1, keepdim=True) / 127  # of a gate, as in INT8
        rounded = (torch.round(weight / scale) * scale)[:, : own.shape[1]]
        assert output_snr_db(rounded.detach().numpy(), own.detach().numpy()) > 30


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("hops", [1, 3])
@pytest.mark.parametrize("sizes", [[1], [HOP], [8 * HOP], [5, 1, 131, 0, 17, 64, 3]], ids=str)
def test_any_schedule_of_blocks_gives_the_offline_output(bundles, mixture, offline, runtime, hops, sizes):
    with Stream(bundles[hops], runtime=runtime) as stream:
        assert output_snr_db(played(stream, mixture, sizes), offline) >= 80


def test_blocks_of_whole_calls_come_back_in_the_same_length(bundles):
    with Stream(bundles[3], runtime="onnxruntime") as stream:
        for calls in (1, 4, 2):
            assert stream.process(np.zeros(calls * 3 * HOP, np.float32)).shape == (2, calls * 3 * HOP)
        assert stream.latency_samples == SYNTHESIS - HOP


@pytest.mark.parametrize(
    ("hops", "runtime", "precision"),
    [
        (1, "onnxruntime", "fp32"),
        (1, "onnxruntime", "int8"),
        (1, "openvino", "fp32"),
        (1, "openvino", "int8"),
        (3, "onnxruntime", "fp32"),
        (3, "openvino", "fp32"),
    ],
)
def test_the_measured_look_ahead_is_the_stated_one(bundles, hops, runtime, precision):
    bundle = bundles[hops]
    spec = StreamSpec.from_json(bundle.manifest["separator"]["stream"])
    with bundle.runner(runtime, precision=precision) as runner:
        assert measured_look_ahead(Hops(runner.bound, spec)) == spec.look_ahead_samples == SYNTHESIS - 2


def handed_on(latency: int, graph) -> Hops:
    """Calls of four samples, of which a function makes estimates with the call before; latency as it claims."""

    def run(feeds):
        now, last = feeds["mixture"], feeds["state_last"]
        return {"estimates": graph(now, last).copy()[:, None], "next_state_last": now}

    return Hops(lambda _: run, StreamSpec(8000, 4, 1, latency, 0, None, (StateSpec("state_last", (1, 4)),)))


def test_more_or_less_look_ahead_than_stated_is_seen():
    assert measured_look_ahead(handed_on(4, lambda _, last: last)) == -4  # four samples later than it claims
    assert measured_look_ahead(handed_on(4, lambda now, _: now.mean(1, keepdims=True).repeat(4, 1))) == 3


def test_what_a_bundle_promises_stands_in_its_onnx_file(bundles):
    bundle = bundles[3]
    file = bundle.path / "artifacts" / "onnxruntime-fp32" / "fp32.onnx"
    facts = json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["edgesep"])
    spec = StreamSpec.from_json(facts["stream"])
    assert spec == StreamSpec.from_json(bundle.manifest["separator"]["stream"])
    assert (spec.hop_samples, spec.hops_per_call, spec.call_samples) == (HOP, 3, 3 * HOP)
    assert (spec.algorithmic_latency_samples, spec.delay_samples, spec.context_frames) == (
        SYNTHESIS,
        SYNTHESIS - HOP,
        50,
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_past_that_int8_products_read_is_held_in_int8(bundles, mixture, tmp_path, runtime):
    bundle = bundles[1]
    file = bundle.path / "artifacts" / f"{runtime}-int8" / "int8.onnx"
    model = onnx.load(file)
    onnx.checker.check_model(model)
    facts = json.loads({p.key: p.value for p in model.metadata_props}["edgesep"])
    narrow = {s["name"] for s in facts["stream"]["states"] if s["dtype"] == "uint8"}
    assert narrow == {s["name"] for s in facts["stream"]["states"] if s["ring_axis"] is not None}
    assert narrow == {i["name"] for i in facts["inputs"] if i["dtype"] == "uint8"}
    assert {f"next_{n}" for n in narrow} == {o["name"] for o in facts["outputs"] if o["dtype"] == "uint8"}
    with Stream(bundle, runtime=runtime, precision="int8") as stream:
        held = stream._stateful().states
        assert {name for name, array in held.items() if array.dtype == np.uint8} == narrow
        stream.process(mixture)
        assert all(np.ptp(held[name]) > 50 for name in narrow), "most of the eight bits are used"
        stream.save_state(tmp_path / "state.npz")
        expected = stream.process(mixture)
    with Stream(bundle, runtime=runtime, precision="int8") as stream:
        stream.load_state(tmp_path / "state.npz")
        assert_array_equal(stream.process(mixture), expected)
    audited = {
        (e.operator, e.precision) for e in executed(bundle.artifact(runtime, "int8"), bundle.manifest["separator"])
    }
    assert audited & {("MatMulIntegerToFloat", "int8"), ("FullyConnected", "int8")}


def test_held_in_int8_or_in_float_the_estimates_are_the_same(
    checkpoint, mixtures, mixture, cache, tmp_path, monkeypatch
):
    session = onnxruntime.InferenceSession

    def as_written(model, options, **given):
        """Fused differently, sums differ in their last bit, and what is rounded then in its first."""
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return session(model, options, **given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", as_written)
    line = Line(
        read_recipe(write_recipe(tmp_path, checkpoint, mixtures, TARGETS + STREAM.format(hops=1))), Store(cache)
    )
    separator, _, models, _, _ = line.compressed()
    source, _ = models["int8", int8_form("onnxruntime")]
    made = []
    for how in ("int8", "float"):
        if how == "float":
            monkeypatch.setattr(integer_states, "hold_in_integers", lambda _: None)
        (tmp_path / how).mkdir()
        files = runtime("onnxruntime").build(source, tmp_path / how, "int8", {})
        with runtime("onnxruntime").Runner(tmp_path / how, files, "int8", 1) as runner:
            hops = Hops(runner.bound, separator.stream)
            made.append(whole(hops, mixture))
        assert any(array.dtype == np.uint8 for array in hops.states.values()) == (how == "int8")
    assert_array_equal(*made)


def test_the_bundle_s_page_tells_how_to_feed_a_call(bundles):
    page = (bundles[3].path / "README.md").read_text()
    spec = StreamSpec.from_json(bundles[3].manifest["separator"]["stream"])
    assert "`mixture`: float32 (1, 24). Output `estimates`: float32 (1, 2, 24)" in page
    for state in spec.states:
        assert f"| `{state.name}` | {state.shape} |" in page
    assert "`next_state_block0_keys` goes to slot (frame modulo 50) of axis 2" in page
    assert "one call of the stream" in (bundles[3].path / "report.md").read_text()


def test_a_hop_with_nan_is_silenced_and_the_stream_goes_on(bundles, mixture):
    with Stream(bundles[1], runtime="onnxruntime") as stream:
        silenced = mixture.copy()
        silenced[10 * HOP : 11 * HOP] = 0
        expected = played(stream, silenced, [HOP])
        broken = mixture.copy()
        broken[10 * HOP + 3], broken[10 * HOP + 5] = np.nan, np.inf
        assert_array_equal(played(stream, broken, [HOP]), expected)
        assert stream.silenced_hops == 1


def test_a_reset_in_the_middle_forgets_everything(bundles, mixture):
    with Stream(bundles[3], runtime="onnxruntime") as stream:
        expected = played(stream, mixture, [100])
        stream.process(mixture[:1001])
        stream.reset()
        assert_array_equal(played(stream, mixture, [100]), expected)


def test_a_stream_goes_on_from_a_saved_state(bundles, mixture, tmp_path):
    with Stream(bundles[3], runtime="onnxruntime") as stream:
        expected = played(stream, mixture, [100])
        first = stream.process(mixture[:1001])
        stream.save_state(tmp_path / "state.npz")
    with Stream(bundles[3], runtime="onnxruntime") as stream:
        stream.load_state(tmp_path / "state.npz")
        rest = [stream.process(mixture[1001:]), stream.flush()]
        assert_array_equal(np.concatenate([first, *rest], 1)[:, stream.latency_samples :], expected)


def test_a_state_of_another_bundle_is_refused_and_nothing_lost(bundles, mixture, tmp_path):
    with Stream(bundles[1], runtime="onnxruntime") as other:
        other.save_state(tmp_path / "state.npz")
    (tmp_path / "text.npz").write_text("no state")
    with Stream(bundles[3], runtime="onnxruntime") as stream:
        expected = played(stream, mixture, [100])
        first = stream.process(mixture[:1001])
        with pytest.raises(InputError, match="state of another bundle or artifact"):
            stream.load_state(tmp_path / "state.npz")
        with pytest.raises(InputError, match="is no state of a stream"):
            stream.load_state(tmp_path / "text.npz")
        rest = [stream.process(mixture[1001:]), stream.flush()]
        assert_array_equal(np.concatenate([first, *rest], 1)[:, stream.latency_samples :], expected)


def test_bad_blocks_are_named(bundles):
    with Stream(bundles[1], runtime="onnxruntime") as stream:
        with pytest.raises(InputError, match="block is at 16000 Hz, this stream runs at 8000 Hz"):
            stream.process(np.zeros(HOP, np.float32), sample_rate_hz=16000)
        with pytest.raises(InputError, match="one channel"):
            stream.process(np.zeros((2, HOP), np.float32))
        assert stream.process(np.zeros(HOP, np.float32), sample_rate_hz=8000).shape == (2, HOP)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_raw_graph_names_a_hop_of_the_wrong_size(bundles, runtime):
    bundle = bundles[1]
    feeds = Hops(dict, StreamSpec.from_json(bundle.manifest["separator"]["stream"])).feeds
    wrong = feeds | {"mixture": np.zeros((1, HOP + 1), np.float32)}
    with bundle.runner(runtime) as runner:
        with pytest.raises(InputError, match=r"mixture must be \(1, 8\), got \(1, 9\)"):
            runner.run(wrong)
        with pytest.raises(InputError, match=r"mixture must be \(1, 8\), got \(1, 9\)"):
            runner.bound(wrong)


def test_silence_and_a_jump_in_level_leave_the_stream_in_bounds(bundles, mixture):
    with Stream(bundles[1], runtime="onnxruntime") as stream:
        usual = np.sqrt(np.mean(np.square(stream.separate(mixture))))
        for before in (np.zeros(8000, np.float32), 100 * mixture):
            after = stream.separate(np.concatenate([before, mixture]))[:, before.size :]
            assert 0.1 < np.sqrt(np.mean(np.square(after))) / usual < 10


def test_a_recipe_streams_only_what_can(golden, checkpoint, mixtures, tmp_path):
    def line(name, text):
        return Line(read_recipe(write_recipe(tmp_path, name, mixtures, TARGETS + text)), Store())

    with pytest.raises(InputError, match=r"TDANet does not stream.*whole utterance"):
        line(golden("tdanet_small").checkpoint, "[stream]\n")
    with pytest.raises(InputError, match="does not stream: released arithmetic"):
        line(golden("tfacm_released_small").checkpoint, "[stream]\n")
    with pytest.raises(InputError, match=r"looks back without bound; give the recipe's stream\.context_s"):
        line(checkpoint, "[stream]\n")
    with pytest.raises(InputError, match="36 hops per call, TFACMCausal with this context takes 1 to 35"):
        line(checkpoint, "[stream]\nhops_per_call = 36\ncontext_s = 1.0\n").plan()
    plan = line(checkpoint, STREAM.format(hops=2)).plan()
    assert any("2 hop(s) of 1 ms a call, algorithmic latency 2 ms, attention over 50 frames" in text for text in plan)


def test_a_bundle_of_whole_mixtures_streams_in_blocks_only(deployed, mixture):
    bundle = open_bundle(deployed[0].path)
    with pytest.raises(UnsupportedError, match="separates whole mixtures"):
        Stream(bundle)
    with Stream(bundle, runtime="onnxruntime", block_s=0.4) as stream:
        rate = bundle.sample_rate_hz
        assert stream.call_samples + stream.latency_samples == int(0.4 * rate)
        long = np.resize(mixture, 2 * rate)
        assert stream.separate(long).shape == (2, 2 * rate)
        with pytest.raises(UnsupportedError, match="begin it anew"):
            stream.save_state("never.npz")


def test_blocks_online_keep_the_sources_in_place(mixture):
    """A separator that swaps its sources at every block, joined without a seam."""
    turns = iter(range(1000))

    def swapping(x):
        parts = [x, -0.5 * x]
        return np.stack(parts[:: 1 if next(turns) % 2 else -1], 1)

    online = blocks.Online(swapping, 400, 2)
    calls = mixture[: mixture.size // 300 * 300].reshape(-1, 300)
    got = np.concatenate([online.call(call) for call in calls], 1)[:, online.delay_samples :]
    expected = np.stack([mixture, -0.5 * mixture])[:, : got.shape[1]]
    assert max(output_snr_db(got, expected), output_snr_db(got[::-1], expected)) > 100


def test_late_calls_and_their_longest_run_are_counted():
    assert longest_run(np.array([0, 1, 1, 0, 1, 1, 1, 0], bool)) == 3
    slow = iter([*[0.0] * 55, *[0.03] * 3, *[0.0] * 1000])

    def call():
        import time

        time.sleep(next(slow))

    found = paced(call, 0.01, 0.5)
    assert found["calls"] == 50
    assert found["late_calls"] >= 3
    assert found["longest_late_run"] >= 3
    assert found["p99_ms"] is None  # 50 calls are too few


def run_cli(*args):
    return subprocess.run(
        [sys.executable, "-m", "edgesep.cli", *map(str, args)], capture_output=True, text=True, check=False
    )


def test_the_command_line_streams_a_file_and_measures_at_the_pace_of_audio(bundles, mixture, offline, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "mix.wav", mixture, 8000, subtype="FLOAT")
    done = run_cli("stream", bundles[1].path, tmp_path / "mix.wav", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    got = np.stack([soundfile.read(tmp_path / "out" / f"mix_s{i}.wav", dtype="float32")[0] for i in (1, 2)])
    assert output_snr_db(got, offline) >= 80
    done = run_cli("bench", bundles[3].path, "--stream", "--minutes", "0.02", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [r["status"] for r in rows] == ["ok"] * 2
    assert all(r["calls"] == int(1.2 / 0.003) and r["algorithmic_ms"] == 2 and r["buffering_ms"] == 2 for r in rows)


def test_live_streaming_says_what_is_missing(bundles, monkeypatch):
    import builtins

    from edgesep import live

    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "sounddevice":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with Stream(bundles[1], runtime="onnxruntime") as stream:
        with pytest.raises(UnsupportedError, match="needs sounddevice and PortAudio"):
            live.play(stream, 1, print)
        with pytest.raises(InputError, match="source 3 does not exist"):
            live.play(stream, 3, print)


def test_a_device_streams_without_torch(bundles):
    program = f"""
import sys
from pathlib import Path
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"torch", "onnx", "openvino", "yaml"}}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import edgesep, numpy as np
with edgesep.Stream(edgesep.open_bundle({str(bundles[1].path)!r})) as stream:
    print(stream.process(np.zeros(80, np.float32)).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(2, 80)", done.stderr


def test_whole_takes_the_delay_out(mixture):
    assert_array_equal(whole(handed_on(8, lambda _, last: last), mixture[:1001])[0], mixture[:1001])


def test_the_readme_s_stream_runs(bundles, tmp_path):
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Stream(" in b)
    (tmp_path / "bundle").symlink_to(bundles[1].path)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(SYNTHESIS - HOP)
