"""Compression within a budget: exact rewrites, the search for float layers, its resumption, the audit, the ranges."""

import json
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from conftest import shallow, target, write_recipe, write_set
from torch import nn

from edgesep import BuildError, InputError, audit, budget, compress, graph, load_separator, measure, open_bundle, report
from edgesep.calibration import MixtureSet
from edgesep.compress import compress as compressed
from edgesep.int8 import counted_macs, layer_macs
from edgesep.line import Line, deploy
from edgesep.passes.base import Context
from edgesep.passes.equalize import Equalize
from edgesep.passes.lower import Lower
from edgesep.passes.quantize import Quantize
from edgesep.ranges import ranges
from edgesep.recipe import DataSection, SeparatorSection, read_recipe
from edgesep.runtimes import int8_form, runtime
from edgesep.runtimes.base import Executed, Int8Form
from edgesep.separators import lip, tdanet
from edgesep.spec import Criteria
from edgesep.store import Store
from edgesep.verify import output_snr_db

GOLDEN = ("tdanet_small", "tdanetbest_small", "spmamba_small", "tfacm_released_small")  # IIANet: nothing to rewrite


@pytest.mark.parametrize("name", GOLDEN)
def test_lowering_changes_nothing_but_the_form(golden, name, context):
    separator = load_separator(golden(name).checkpoint)
    result = Lower()(separator, context)
    inputs = separator.example_inputs(5003)
    with torch.inference_mode():
        before, after = (s.module(*inputs).numpy() for s in (separator, result.separator))
    assert output_snr_db(after, before) >= 100


@pytest.mark.parametrize("context_s", [None, 0.05])
def test_a_causal_tfacm_is_lowered_to_rows_of_any_length(golden, context, tmp_path, context_s):
    separator = load_separator(shallow(golden("tfacm_released_small"), tmp_path, variant="causal", synthesis=16))
    if context_s:
        separator = separator.streaming.bound(separator, context_s)
    result = Lower()(separator, context)
    assert result.report["rewritten"] == {"own_rules": 1}
    graph.export_onnx(result.separator, result.separator.module, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, samples in ((1, 1), (1, 5003), (2, 777)):
        x = np.random.default_rng(samples).standard_normal((batch, samples)).astype(np.float32)
        with torch.inference_mode():
            wanted = separator.module(torch.from_numpy(x)).numpy()
        assert output_snr_db(session.run(None, {"mixture": x})[0], wanted) >= 100


def test_lowering_leaves_fewer_modules_and_the_original_as_it_was(golden, context):
    separator = load_separator(golden("tfacm_released_small").checkpoint)
    lowered = Lower()(separator, context)
    assert lowered.report["rewritten"] == {"merge_products": 4, "turn_transposed": 4}
    kinds = [type(m) for m in lowered.separator.module.modules()]
    assert nn.ConvTranspose1d not in kinds
    assert nn.ConvTranspose1d in [type(m) for m in separator.module.modules()]


def test_batch_norms_are_folded_into_the_convolutions_before_them(context):
    torch.manual_seed(2)
    front = lip.create({"stem": 4}, 0)
    for m in front.module.modules():
        if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    lowered = Lower()(front, context).separator
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in lowered.module.modules())


def test_equalization_changes_nothing_but_ranges(separator, context):
    loud = replace(separator, module=tdanet.create(separator.config, 8000).module)
    with torch.no_grad():  # one channel a hundred times louder than the others
        loud.module.sm.unet.last_layer[0].local_embedding.norm.weight[0] = 100
    x = context.calibration[0].mixture
    result = Equalize(mixtures=2)(loud, replace(context, original=loud))
    assert output_snr_db(result.separator(x).numpy(), loud(x).numpy()) >= 100
    assert max(result.report["gained_db"]) > 3
    assert loud.module.sm.unet.last_layer[0].local_embedding.norm.weight[0] == 100, "the original stays as it is"


def test_nodes_are_named_after_the_layer_they_compute(separator, exported):
    names = {graph.layer_of(n) for n in onnx.load(exported).graph.node if n.op_type == "Conv"}
    modules = dict(separator.module.named_modules())
    assert "sm.unet.res_conv" in names
    assert all(isinstance(modules[n], nn.Conv2d) for n in names)


def noisy_trials(noise: dict[str, float], mixtures: int = 10, rounding: float = 0.0):
    """Trials of made-up layers whose noises add up, one dB of drop for each unit."""
    calls = []

    def run(layers, count, rounded=False):
        calls.append(tuple(layers))
        total = sum(noise[n] for n in layers) + rounded * rounding
        return budget.Trial((total,) * min(count, mixtures), total)

    run.items, run.calls = range(mixtures), calls
    return run


def test_the_noisiest_layers_for_their_size_go_back_to_float_until_the_budget_holds():
    noise = {"big": 0.4, "small": 0.3, "quiet": 0.01}
    trials = noisy_trials(noise)
    macs = {"big": 90, "small": 5, "quiet": 5}
    fitted = budget.fit(macs, 0, trials, Criteria(max_si_snr_drop_db=0.5), lambda *_: None)
    assert fitted.kept == ("small",)
    assert fitted.report["met"]
    assert [row["layer"] for row in fitted.report["layers"]] == ["small", "big", "quiet"]


def test_small_noisy_layers_go_back_to_float_where_there_is_room():
    trials = noisy_trials({"big": 0.4, "small": 0.3, "quiet": 0.001})
    macs = {"big": 90, "small": 5, "quiet": 5}
    assert budget.fit(macs, 7, trials, Criteria(max_si_snr_drop_db=9), lambda *_: None).kept == ("small",)
    assert budget.fit(macs, 4, trials, Criteria(max_si_snr_drop_db=9), lambda *_: None).kept == ()


def test_as_few_layers_as_possible_go_back_and_few_are_tried():
    layers = {f"layer{i:03d}": 100 - i for i in range(100)}  # of one size, ever quieter
    trials = noisy_trials({name: noise / 5050 for name, noise in layers.items()})
    fitted = budget.fit(dict.fromkeys(layers, 1), 0, trials, Criteria(max_si_snr_drop_db=0.5), lambda *_: None)
    assert fitted.kept == tuple(layers)[:30], "70 * 71 / 2 of 5050 is just below a half"
    assert len(trials.calls) - len(layers) <= 14
    assert [s["float_layers"] for s in fitted.report["steps"]] == sorted(
        s["float_layers"] for s in fitted.report["steps"]
    )
    assert fitted.report["steps"][-1]["float_layers"] == 30


def test_weights_in_float_are_rounded_where_that_takes_less_than_half_of_the_budget():
    for rounding, wanted in ((0.04, True), (0.06, False)):
        trials = noisy_trials({"a": 0.03, "b": 0.2}, rounding=rounding)
        fitted = budget.fit({"a": 1, "b": 1}, 0, trials, Criteria(max_si_snr_drop_db=0.1), lambda *_: None)
        assert fitted.rounded == wanted
        assert fitted.kept == ("b",)
        assert fitted.report["layers"][1]["drop_db"] == 0.03, "what a layer costs alone is without"
    trials = noisy_trials({"a": 0.03})
    assert not budget.fit({"a": 1}, 0, trials, Criteria(0.1), lambda *_: None, rounded=False).rounded


def test_a_budget_that_no_layer_meets_is_said():
    fitted = budget.fit({"a": 1, "b": 1}, 0, noisy_trials({"a": 1, "b": 1}), Criteria(0.01), lambda *_: None)
    assert not fitted.report["met"]
    assert set(fitted.kept) == {"a", "b"}


def test_the_worst_mixtures_have_a_budget_of_their_own():
    trial = budget.Trial((0.0,) * 19 + (2.0,), 0.1)
    assert trial.fits(Criteria(max_si_snr_drop_db=0.4))
    assert not trial.fits(Criteria(max_si_snr_drop_db=0.4, worst5_drop_db=1.0))


def test_a_mean_within_budget_is_not_enough_where_few_mixtures_told_it():
    lost = (0.0, 0.2)
    assert not budget.Trial(lost * 5, 0.1).fits(Criteria(max_si_snr_drop_db=0.12))
    assert budget.Trial(lost * 200, 0.1).fits(Criteria(max_si_snr_drop_db=0.12))


def test_trials_of_a_native_target_judge_what_its_kernels_round(separator, exported, context):
    """Units in one operator compute their depthwise convolutions in float, so that those cost nearly nothing."""
    noise = {}
    for native in (False, True):
        form = int8_form("onnxruntime", native)
        seen = {}

        def fit(macs, _spare, trials, *_, seen=seen):
            layers = [n for n in macs if "spp_dw.0" in n]
            seen["noise"] = trials(layers, 2).noise
            return budget.Fitted((), False, {})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(budget, "fit", fit)
            folder = context.folder / str(native)
            folder.mkdir()
            given = replace(context, folder=folder)
            Quantize(method="onnxruntime", mixtures=2, fit=True)(separator, exported, folder / "out.onnx", given, form)
        noise[native] = seen["noise"]
    assert 0 < noise[True] < noise[False] / 4


@pytest.fixture(scope="module")
def fitting_recipe(golden, mixtures, tmp_path_factory):
    text = write_recipe(
        tmp_path_factory.mktemp("fit"),
        golden("tdanet_small").checkpoint,
        mixtures,
        target("onnxruntime") + target("onnxruntime", "int8"),
    )
    body = text.read_text().replace('method = "onnxruntime"', 'method = "onnxruntime"\nfit = true')
    text.write_text(body.replace("max_si_snr_drop_db = 3.0", "max_si_snr_drop_db = 0.5"))
    return text


@pytest.fixture(scope="module")
def fitted(fitting_recipe, cache, tmp_path_factory):
    """A bundle fitted to its budget, and the report of its quantize pass."""
    out = tmp_path_factory.mktemp("out") / "bundle"
    done = deploy(fitting_recipe, out, store=Store(cache))
    manifest = json.loads((out / "manifest.json").read_text())
    return done, next(p["report"] for p in manifest["passes"] if p["pass"] == "quantize")


def test_a_search_fits_real_layers_to_the_budget(fitted):
    _, found = fitted
    assert found["fit"]["met"]
    assert found["fit"]["steps"][-1]["drop_db"] <= 0.5
    assert {row["layer"] for row in found["fit"]["layers"]} >= {"sm.unet.res_conv", "bottleneck"}


def test_the_report_shows_sensitivity_and_what_ran(fitted):
    text = (fitted[0].path / "report.md").read_text()
    assert "## Sensitivity to INT8: TDANet (uint8 activations, quantized outputs, INT8 LSTMs)" in text
    assert "█" in text
    assert "## What ran: onnxruntime int8" in text


def test_an_interrupted_search_goes_on_and_ends_with_the_same_result(fitting_recipe, fitted, tmp_path):
    class Stop(Exception):
        pass

    seen = []

    def stop(done, _total, text):
        if text.startswith("sensitivity"):
            seen.append(text)
            if done == 12:
                raise Stop

    store = Store(tmp_path)
    with pytest.raises(Stop):
        Line(read_recipe(fitting_recipe), store, stop).trial()
    saved = [json.loads(f.read_text()) for f in tmp_path.rglob("trials.json")]
    assert len(saved) == 1
    assert len(saved[0]) == 12
    ran = []
    original = budget.Trials._run

    def counting(self, *args):
        ran.append(1)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget.Trials, "_run", counting)
        found = Line(read_recipe(fitting_recipe), store).trial()
    layers = fitted[1]["fit"]["layers"]
    assert len(ran) == len(layers) + len(fitted[1]["fit"]["steps"]) + 1 - 12, "what was tried is not tried again"
    assert {k: found[k] for k in ("drop_db", "worst5_drop_db")} == {
        k: fitted[1]["fit"]["steps"][-1][k] for k in ("drop_db", "worst5_drop_db")
    }


def test_int8_forms_are_those_of_the_target(separator, exported, context, tmp_path):
    for form, name in ((Int8Form(symmetric=True), "s8"), (Int8Form(outputs=True), "u8")):
        Quantize(method="onnxruntime", mixtures=1)(separator, exported, tmp_path / f"{name}.onnx", context, form)
    for name, kind in (("s8", onnx.TensorProto.INT8), ("u8", onnx.TensorProto.UINT8)):
        model = onnx.load(tmp_path / f"{name}.onnx")
        constants = {c.name: c for c in model.graph.initializer}
        quantizers = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        assert {constants[n.input[2]].data_type for n in quantizers} == {kind}
        zeros = {int(onnx.numpy_helper.to_array(constants[n.input[2]])) for n in quantizers}
        assert (zeros == {0}) == (name == "s8")
    made = [n for n in onnx.load(tmp_path / "u8.onnx").graph.node if n.op_type == "Conv" and "res_conv" in n.name]
    readers = [n.op_type for n in onnx.load(tmp_path / "u8.onnx").graph.node if made[0].output[0] in n.input]
    assert readers == ["QuantizeLinear"]


@pytest.mark.slow  # three builds, an engine among them
def test_every_runtime_takes_its_own_form_of_one_separator(golden, mixtures, tmp_path):
    separator = load_separator(golden("tdanet_small").checkpoint)
    mixture_set = MixtureSet.open(mixtures, separator.sample_rate_hz)
    context = Context(separator, mixture_set, mixture_set, tmp_path)
    graph.export_onnx(separator, separator.module, tmp_path / "fp32.onnx")
    for name in ("onnxruntime", "openvino", "tensorrt"):
        module, folder = runtime(name), tmp_path / name
        folder.mkdir()
        form = int8_form(name)
        Quantize(method="onnxruntime", mixtures=2)(
            separator, tmp_path / "fp32.onnx", folder / "model.onnx", context, form
        )
        assert module.build(folder / "model.onnx", folder, "int8", separator.profile())


@pytest.mark.slow  # an export with LSTMs
def test_lstms_multiply_in_int8_where_the_runtime_can(golden, mixtures, tmp_path):
    separator = load_separator(golden("tfacm_released_small").checkpoint)
    mixture_set = MixtureSet.open(mixtures, separator.sample_rate_hz)
    context = Context(separator, mixture_set, mixture_set, tmp_path)
    graph.export_onnx(separator, separator.module, tmp_path / "fp32.onnx")
    shares = {}
    for recurrent in (False, True):
        form = Int8Form(recurrent=recurrent)
        made = Quantize(method="onnxruntime", mixtures=2)(
            separator, tmp_path / "fp32.onnx", tmp_path / "int8.onnx", context, form
        )
        shares[recurrent] = made.report["quantized_macs_share"]
    assert shares[True] > shares[False] + 0.2
    x = mixture_set[0].mixture[None]
    with runtime("onnxruntime").Runner(tmp_path, ["int8.onnx"], "int8") as runner:
        assert output_snr_db(runner.run({"mixture": x})["estimates"], separator(x).numpy()) > 12


def test_layers_are_counted_with_all_iterations(separator, exported):
    macs = layer_macs(counted_macs(onnx.load(exported), separator), ("Conv",))
    conv = separator.module.sm.unet.res_conv
    frames = 8000 // 8 + 2  # within a few frames of padding
    expected = 2 * conv.in_channels * conv.out_channels * frames
    assert macs["sm.unet.res_conv"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_audit_tells_which_precision_ran(separator, exported, context, tmp_path, name):
    module = runtime(name)
    form = int8_form(name)
    Quantize(method="onnxruntime", mixtures=1)(separator, exported, tmp_path / "int8.onnx", context, form)
    shares = {}
    for precision, model in (("fp32", exported), ("int8", tmp_path / "int8.onnx")):
        folder = tmp_path / precision
        folder.mkdir()
        files = module.build(model, folder, precision, separator.profile())
        ran = module.executed(folder, files, precision, 1, measure.noise(separator.describe()["second"]))
        shares[precision] = audit.summary(ran)["time_share"]
        assert sum(shares[precision].values()) == pytest.approx(1, abs=1e-3)
    assert shares["fp32"]["fp32"] > 0.7  # beside it there are conversions of indices, and whatever else runs here
    assert shares["fp32"].get("int8", 0) < 0.01 < shares["int8"]["int8"]


def test_a_build_that_brings_nothing_is_rejected_with_the_operators_to_blame(monkeypatch):
    low, plain = (SimpleNamespace(name=f"onnxruntime {p}", size_mb=lambda: 1.0) for p in ("int8", "fp32"))
    ran = {
        id(low): [Executed("QuantizeLinear", "conversion", 3.0), Executed("Conv", "int8", 1.0)],
        id(plain): [Executed("Conv", "fp32", 2.0)],
    }
    monkeypatch.setattr(audit, "executed", lambda a, *_: ran[id(a)])
    monkeypatch.setattr(audit, "Separating", lambda *_: SimpleNamespace(__enter__=0))
    monkeypatch.setattr(audit.contextlib.ExitStack, "enter_context", lambda _, run: run)
    monkeypatch.setattr(audit, "_query", lambda *_: None)
    monkeypatch.setattr(audit.measure, "paired_ms", lambda *_: {"low": [4.0], "plain": [2.0]})
    found = audit.compare(low, plain, {})
    assert "neither faster (0.50x) nor smaller (1.00x)" in found["rejected"]
    assert "QuantizeLinear (+3.00 ms)" in found["rejected"]
    monkeypatch.setattr(audit.measure, "paired_ms", lambda *_: {"low": [1.0], "plain": [2.0]})
    assert "rejected" not in audit.compare(low, plain, {})


def test_a_runtime_that_does_not_tell_its_kernels_is_still_timed(monkeypatch):
    """TensorRT has no per-kernel report here: the comparison stands, and the page says what it cannot show."""
    kind = "tensorrt", "portable", False
    low, plain = (
        SimpleNamespace(name=f"tensorrt {p}", runtime="tensorrt", kind=kind, precision=p, size_mb=lambda: 1.0)
        for p in ("int8", "fp32")
    )
    monkeypatch.setattr(audit.contextlib.ExitStack, "enter_context", lambda _, run: run)
    monkeypatch.setattr(audit, "Separating", lambda *_: None)
    monkeypatch.setattr(audit, "_query", lambda *_: None)
    monkeypatch.setattr(audit.measure, "paired_ms", lambda *_: {"low": [4.0], "plain": [2.0]})
    builds = {kind: plain}
    assert "does not tell" in audit.look(plain, builds, {})["note"]
    found = audit.look(low, builds, {})
    assert found["times_fp32_speed"] == 0.5
    assert "neither faster" in found["rejected"]
    page = "\n".join(report._audit({"runtime": "tensorrt", "precision": "int8", "audit": found}))
    assert "does not tell" in page
    assert "0.50 times the speed" in page


def test_the_picture_of_a_build_shows_its_operators_longest_first(fitted):
    bundle = fitted[0].path
    assert "(profile.svg)" in (bundle / "report.md").read_text()
    words = [
        t.text for t in ElementTree.parse(bundle / "profile.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    ]
    rows = [r for r in json.loads((bundle / "manifest.json").read_text())["results"] if r.get("audit")]
    assert {r["precision"] for r in rows} == {"fp32", "int8"}
    shown = [f"{o['operator']}, {o['precision']}" for r in rows for o in r["audit"]["operators"]]
    assert [w for w in words if w in shown] == shown
    assert any(w.endswith(", int8") for w in words)


def test_a_rejected_artifact_is_not_chosen(fitted):
    bundle = open_bundle(fitted[0].path)
    first, second = bundle.artifacts
    bundle.artifacts = (replace(first, rejected="slow"), replace(second, rejected=""))
    assert bundle.artifact() == bundle.artifacts[1]
    assert bundle.artifact(precision=first.precision).rejected == "slow", "whoever asks for it gets it"


@pytest.mark.slow  # the README's own commands are tested every time
def test_compress_stays_in_its_budget_and_prunes_no_more_than_that(golden, mixtures, tmp_path):
    made = compressed(
        SeparatorSection(checkpoint=golden("tdanet_small").checkpoint),
        DataSection(calibration=mixtures, test=mixtures, golden=2),
        tmp_path / "bundle",
        budget_db=0.5,
        worst5_db=2.0,
        store=Store(tmp_path / "cache"),
    )
    assert made.tried[0]["drop_db"] <= 0.5
    assert made.deployed.ok
    assert "not pruned: recovery needs at least" in made.said[0], "four mixtures are learnt by heart"


@pytest.mark.slow  # two searches and two recoveries
def test_what_the_budget_leaves_is_spent_on_pruning(golden, mixtures, tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "FEW", 1)
    monkeypatch.setattr(compress, "SHARES", (0.1, 0.3))
    made = compressed(
        SeparatorSection(checkpoint=golden("tdanet_small").checkpoint),
        DataSection(calibration=mixtures, test=mixtures, train=mixtures, golden=2),
        tmp_path / "bundle",
        budget_db=40.0,
        steps=2,
        store=Store(tmp_path / "cache"),
    )
    assert [row["share"] for row in made.tried] == [0.0, 0.1, 0.3]
    facts = open_bundle(tmp_path / "bundle").manifest["separator"]
    assert facts["parameters"] < load_separator(golden("tdanet_small").checkpoint).parameters


@pytest.mark.parametrize("db", [0.0, -1.0])
def test_a_budget_of_nothing_is_refused(golden, mixtures, tmp_path, db):
    with pytest.raises(InputError, match="leaves nothing to gain"):
        compressed(
            SeparatorSection(checkpoint=golden("tdanet_small").checkpoint),
            DataSection(calibration=mixtures, test=mixtures),
            tmp_path / "bundle",
            budget_db=db,
        )


def test_a_silent_calibration_set_is_refused(golden, tmp_path):
    root = write_set(tmp_path / "silent", mixtures=1)
    for d in ("mix_clean", "s1", "s2"):
        soundfile.write(root / d / "0.wav", np.zeros(6400), 8000, subtype="FLOAT")
    recipe = write_recipe(tmp_path, golden("tdanet_small").checkpoint, root, target("onnxruntime", "int8"))
    with pytest.raises(InputError, match="silent"):
        deploy(recipe, tmp_path / "bundle", store=Store(tmp_path / "cache"))


def test_activations_that_are_not_finite_are_refused(separator, context, tmp_path):
    broken = replace(separator, module=tdanet.create(separator.config, 8000).module)
    with torch.no_grad():
        broken.module.bottleneck.bias[0] = float("nan")
    graph.export_onnx(broken, broken.module, tmp_path / "broken.onnx")
    with pytest.raises(BuildError, match=r"NaN|calibration"):
        Quantize(method="onnxruntime", mixtures=1)(
            broken, tmp_path / "broken.onnx", tmp_path / "int8.onnx", replace(context, original=broken)
        )


def test_ranges_move_with_level_only_where_nothing_normalises(golden, mixtures):
    found = ranges(golden("tdanet_small").checkpoint, mixtures)
    rows = {row["layer"]: row for row in found["layers"]}
    assert float(rows["encoder"]["-40 dBFS"][1:]) < 0.1, "the encoder sees the mixture as it is"
    assert rows["bottleneck"]["-40 dBFS"] == "x1.00", "behind the global norm the level is gone"
    assert len(found["mixtures"]) == 3
    assert "they move with level" in found["said"]


def test_calibration_at_other_levels_widens_the_ranges(separator, exported, context, tmp_path):
    scales = {}
    for levels in ((), (20.0,)):
        folder = tmp_path / str(len(levels))
        folder.mkdir()
        Quantize(method="onnxruntime", mixtures=1, levels_db=levels)(
            separator, exported, folder / "int8.onnx", replace(context, folder=folder)
        )
        scales[levels] = json.loads(next(folder.glob("ranges-*.json")).read_text())
    assert scales[()] != scales[20.0,]
