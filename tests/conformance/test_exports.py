"""Every fixture in ``tests/golden`` through every runtime: the authors' outputs, odd lengths, batches of 1 and 2."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgesep import kernels, load_separator
from edgesep.graph import export_onnx
from edgesep.lstm_scan import scans_for_lstms
from edgesep.ops import onnx_forms
from edgesep.passes.base import Context
from edgesep.passes.halve import Halve
from edgesep.runtimes import names, runtime
from edgesep.verify import output_snr_db

NAMES = sorted(f.stem for f in (Path(__file__).parent.parent / "golden").glob("*.json"))
pytestmark = pytest.mark.slow  # minutes of tracing; the line's own tests run one separator through it
LENGTHS_S = (0.4003, 0.7331, 1.1117)  # multiples of nothing


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """name → separator and its ONNX file."""
    made = {}

    def get(name):
        if name not in made:
            separator = load_separator(golden(name).checkpoint)
            model = tmp_path_factory.mktemp(name) / "model.onnx"
            export_onnx(separator, separator.module, model)
            made[name] = separator, model
        return made[name]

    return get


def built(module, separator, model, folder, native=False):
    """The runtime's files, in the form that it takes."""
    form = folder / "model.onnx"
    onnx_forms.write_form(model, form, module, native=native)
    library = kernels.library(module.PACKAGE) if native else None
    files = module.build(form, folder, "fp32", separator.profile(), library)
    if library:
        shutil.copyfile(library, folder / kernels.file_name(module.PACKAGE))
        files.append(kernels.file_name(module.PACKAGE))
    return files


@pytest.mark.parametrize("ops", ["portable", "native"])
@pytest.mark.parametrize("runtime_name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NAMES)
def test_exports_equal_the_authors_forward_at_any_length_and_batch(
    golden, exported, name, runtime_name, ops, tmp_path, record_property
):
    separator, model = exported(name)
    module = runtime(runtime_name)
    if ops == "native" and not onnx_forms.has_native_form(onnx.load(model), module):
        pytest.skip("this separator has no native operators for this runtime")
    files = built(module, separator, model, tmp_path, ops == "native")
    with module.Runner(tmp_path, files, "fp32", 2) as runner:

        def run(inputs):
            feeds = {spec.name: np.asarray(x, np.float32) for spec, x in zip(separator.inputs, inputs, strict=True)}
            return runner.run(feeds)[separator.outputs[0].name]

        worst = output_snr_db(run(golden(name).inputs), golden(name).output)
        for seconds in LENGTHS_S:
            for batch in (1, 2):
                inputs = separator.example_inputs(int(seconds * separator.sample_rate_hz), batch=batch)
                worst = min(worst, output_snr_db(run(inputs), separator(*inputs).numpy()))
    record_property("output_snr_db", worst)
    assert worst >= 80


@pytest.mark.parametrize("runtime_name", [n for n in names() if n != "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_length_changes_nothing(exported, name, runtime_name, tmp_path):
    """What a runtime computes once, when lengths are known, is what it computes in every call otherwise."""
    module = runtime(runtime_name)
    if not getattr(module, "FIXES_LENGTH", False):
        pytest.skip("this runtime has no builds of fixed length")
    separator, model = exported(name)
    files = built(module, separator, model, tmp_path)
    with module.Runner(tmp_path, files, "fp32", 2, {"fixed_length": True}) as runner:
        inputs = separator.example_inputs(int(LENGTHS_S[1] * separator.sample_rate_hz))
        feeds = {spec.name: np.asarray(x, np.float32) for spec, x in zip(separator.inputs, inputs, strict=True)}
        assert output_snr_db(runner.run(feeds)[separator.outputs[0].name], separator(*inputs).numpy()) >= 80


@pytest.mark.parametrize("name", NAMES)
def test_the_tensorrt_builder_takes_the_graph(exported, name, tmp_path):
    separator, model = exported(name)
    module = runtime("tensorrt")
    assert built(module, separator, model, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_in_half_precision_the_output_stays_close_and_the_tensorrt_builder_takes_it(
    golden, exported, name, tmp_path, record_property
):
    separator, model = exported(name)
    half = tmp_path / "half.onnx"
    nothing = Context(separator, [], [], tmp_path)
    assert Halve()(separator, model, half, nothing).report["fp16_products"] > 0
    files = built(runtime("onnxruntime"), separator, half, tmp_path)
    with runtime("onnxruntime").Runner(tmp_path, files, "fp32", 2) as runner:
        feeds = {s.name: np.asarray(x, np.float32) for s, x in zip(separator.inputs, golden(name).inputs, strict=True)}
        found = output_snr_db(runner.run(feeds)[separator.outputs[0].name], golden(name).output)
    record_property("output_snr_db", found)
    assert found >= 45
    assert built(runtime("tensorrt"), separator, half, tmp_path)


def test_lstms_written_as_scans_compute_the_same(exported, tmp_path):
    separator, model = exported("tfacm_released_small")
    outputs = []
    for number, text in enumerate((model.read_bytes(), scans_for_lstms(model.read_bytes()))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(text)
        module = runtime("onnxruntime")
        files = module.build(folder / "model.onnx", folder, "fp32", {})
        with module.Runner(folder, files, "fp32", 1) as runner:
            outputs.append(runner.run({"mixture": separator.example_inputs(9001, batch=2)[0].numpy()})["estimates"])
    assert output_snr_db(outputs[1], outputs[0]) >= 100
