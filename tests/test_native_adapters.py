"""The custom operators in each runtime: native kernels and portable forms against the float64 reference."""

import shutil

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper

from edgesep import InputError, UnsupportedError, kernels, kernels_tests
from edgesep.ops import causal_conv, onnx_forms, selective_scan, selective_scan_onnx
from edgesep.verify import output_snr_db

onnx_forms.register()
FLAGS = [{}, {"delta_softplus": 1}, {"delta_softplus": 1, "reverse": 1}]
LEFT_OUT = [(), ("D", "z"), ("delta_bias",), ("D", "z", "delta_bias", "initial_state")]


def scan_inputs(batch=2, length=19, channels=21, state=16, leave_out=()):
    rng = np.random.default_rng(0)
    sizes = {"batch": batch, "length": length, "channels": channels, "state": state}
    made = {
        name: rng.standard_normal([sizes[a] for a in axes]).astype(np.float32)
        for name, axes in selective_scan_onnx.INPUTS.items()
        if name not in leave_out
    }
    made["A"] = -np.exp(made["A"])
    made["delta"] = np.abs(made["delta"])  # positive without softplus too, or the recurrence grows
    if "delta_bias" in made:
        made["delta_bias"] = np.abs(made["delta_bias"])
    return made


def scan_model(given, shapes=None, **attributes):
    names = [name if name in given else "" for name in selective_scan_onnx.INPUTS]
    node = helper.make_node("SelectiveScan", names, ["y", "last_state"], domain="edgesep", **attributes)
    return model([node], given, ["y", "last_state"], shapes)


def conv_model(given, reverse):
    node = helper.make_node("CausalConv1dSilu", ["x", "weight", "bias"], ["y"], domain="edgesep", reverse=reverse)
    return model([node], given, ["y"], None, constants=("weight", "bias"))


def model(nodes, given, outputs, shapes, constants=()):
    ins = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (shapes or {}).get(n, v.shape))
        for n, v in given.items()
        if n not in constants
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 3) for n in outputs]
    held = [onnx.numpy_helper.from_array(given[n], n) for n in constants]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgesep", 1)]
    graph = helper.make_graph(nodes, "one", ins, outs, held)
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def run_onnxruntime(made, feeds, native=True, folder=None):
    del folder
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(kernels.library("onnxruntime")))
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_openvino(made, feeds, native=True, folder=None):
    """By way of IR, so that the round trip is tested too."""
    core = openvino.Core()
    if native:
        core.add_extension(str(kernels.library("openvino")))
    onnx.save(made, folder / "model.onnx")
    openvino.save_model(core.read_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    compiled = core.compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    return [found[i] for i in range(len(compiled.outputs))]


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("leave_out", LEFT_OUT, ids=str)
@pytest.mark.parametrize("name", RUNTIMES)
def test_native_scan_equals_the_reference(name, leave_out, flags, tmp_path):
    given = scan_inputs(leave_out=leave_out)
    made = scan_model(given, {"u": ("batch", "length", 21)}, **flags)
    expected = selective_scan.reference(**given, **{k: bool(v) for k, v in flags.items()})
    for got, wanted in zip(RUNTIMES[name](made, given, folder=tmp_path), expected, strict=True):
        assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_portable_scan_equals_the_reference(flags, length, chunked):
    for leave_out in LEFT_OUT:
        given = scan_inputs(length=length, leave_out=leave_out)
        made = onnx_forms.portable(scan_model(given, {"u": ("batch", "length", 21)}, **flags), chunked)
        onnx.checker.check_model(made, full_check=True)
        assert not onnx_forms.is_native(made)
        expected = selective_scan.reference(**given, **{k: bool(v) for k, v in flags.items()})
        for got, wanted in zip(run_onnxruntime(made, given, native=False), expected, strict=True):
            assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("name", RUNTIMES)
def test_convolution_equals_the_reference(name, reverse, native, tmp_path):
    rng = np.random.default_rng(0)
    sizes = {"x": (2, 30, 21), "weight": (21, 4), "bias": (21,)}
    given = {k: rng.standard_normal(v).astype(np.float32) for k, v in sizes.items()}
    made = conv_model(given, reverse)
    made = made if native else onnx_forms.portable(made)
    (got,) = RUNTIMES[name](made, {"x": given["x"]}, native=native, folder=tmp_path)
    assert output_snr_db(got, causal_conv.reference(**given, reverse=bool(reverse))) >= 110


def test_functions_stand_in_for_the_kernels_and_are_taken_back():
    given = scan_inputs()
    before = scan_model(given, delta_softplus=1)
    made = onnx_forms.callable_anywhere(before)
    y, _ = run_onnxruntime(made, given, native=False)
    assert output_snr_db(y, selective_scan.reference(**given, delta_softplus=True)[0]) >= 110
    onnx_forms.original_names(made, before)
    assert made == before


def test_nodes_for_plugins_have_no_gaps_and_say_which_inputs_they_have():
    before = scan_model(scan_inputs(leave_out=("z", "initial_state")), delta_softplus=1)
    (node,) = onnx.load_from_string(onnx_forms.for_plugins(before.SerializeToString())).graph.node
    assert list(node.input) == ["u", "delta", "A", "B", "C", "D", "delta_bias"]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"delta_softplus": 1, "given": 0b010111111, "plugin_namespace": b"edgesep"}


def test_threads_of_the_session_split_the_rows_without_a_trace():
    given = scan_inputs(batch=5, channels=50)
    found = []
    for threads in (1, 2):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.register_custom_ops_library(str(kernels.library("onnxruntime")))
        made = scan_model(given, delta_softplus=1).SerializeToString()
        found.append(onnxruntime.InferenceSession(made, options).run(None, given)[0])
    np.testing.assert_array_equal(*found)


BAD = {
    "B has shape (2, 19, 15), expected (2, 19, 16)": {"B": np.zeros((2, 19, 15), np.float32)},
    "u has shape (2, 0, 21): no dimension may be 0": {
        name: np.zeros((2, 0, n), np.float32) for name, n in (("u", 21), ("delta", 21), ("z", 21), ("B", 16), ("C", 16))
    },
    "A has 65 states, at most 64 are supported": {
        "A": np.zeros((21, 65), np.float32),
        "B": np.zeros((2, 19, 65), np.float32),
        "C": np.zeros((2, 19, 65), np.float32),
        "initial_state": np.zeros((2, 21, 65), np.float32),
    },
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", RUNTIMES)
def test_inputs_that_do_not_fit_are_named(name, message, tmp_path):
    given = scan_inputs() | BAD[message]
    made = scan_model(given, {k: (None,) * v.ndim for k, v in given.items()}, delta_softplus=1)
    with pytest.raises(Exception, match=message.partition("(")[0]) as raised:
        RUNTIMES[name](made, given, folder=tmp_path)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", RUNTIMES)
def test_another_number_type_is_refused(name, tmp_path):
    given = {k: v.astype(np.float64) for k, v in scan_inputs().items()}
    made = scan_model(given, delta_softplus=1)
    for value in made.graph.input:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(Exception, match=r"double|f64"):
        RUNTIMES[name](made, given, folder=tmp_path)


def test_an_artifact_with_the_kernels_of_another_machine_gives_the_command(tmp_path, monkeypatch):
    foreign = ["fp32.onnx", "libedgesep_openvino-2020.1.0-x86_64.so"]
    with monkeypatch.context() as nothing_built:
        nothing_built.setenv("EDGESEP_CACHE", str(tmp_path))
        assert kernels.library_among("onnxruntime", tmp_path, ["fp32.onnx"]) is None
        own = kernels.file_name("onnxruntime")
        assert kernels.library_among("onnxruntime", tmp_path, ["fp32.onnx", own]) == tmp_path / own
        with pytest.raises(UnsupportedError, match=r"2020.1.0.*edgesep kernels build --runtime openvino"):
            kernels.library_among("openvino", tmp_path, foreign)
    built = kernels.library("openvino")
    assert kernels.library_among("openvino", tmp_path, foreign) == built


@pytest.mark.parametrize("name", ["tensorrt", "cuda-tests"])
def test_without_a_cuda_compiler_the_error_names_what_to_install(name, monkeypatch):
    monkeypatch.setattr(kernels.shutil, "which", lambda tool, **_: None if tool == "nvcc" else f"/usr/bin/{tool}")
    with pytest.raises(UnsupportedError, match="nvcc is not found; install the CUDA toolkit"):
        kernels.build(name)


def test_without_tensorrt_the_error_names_its_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.shutil, "which", lambda tool, **_: f"/usr/bin/{tool}")
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(UnsupportedError, match="set TENSORRT_INCLUDE_DIR to the folder that holds it"):
        kernels.build("tensorrt")


def test_another_release_of_tensorrt_or_of_a_compiler_asks_for_a_new_build(monkeypatch, tmp_path):
    headers, nvcc = tmp_path / "include", tmp_path / "nvcc"
    headers.mkdir()
    (headers / "NvInfer.h").touch()
    which = shutil.which
    monkeypatch.setattr(kernels.shutil, "which", lambda tool, **k: str(nvcc) if tool == "nvcc" else which(tool, **k))
    monkeypatch.setattr(kernels, "_compile", lambda *_: None)
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(headers))
    monkeypatch.setenv("EDGESEP_CACHE", str(tmp_path / "cache"))

    def built(tensorrt: str, cuda: str):
        (headers / "NvInferVersion.h").write_text(tensorrt)
        nvcc.write_text(f"#!/bin/sh\necho {cuda}\n")
        nvcc.chmod(0o755)
        return kernels.build("tensorrt")

    first = built("10.3", "12.6")
    assert built("10.3", "12.6") == first
    assert len({first, built("10.7", "12.6"), built("10.3", "13.0")}) == 3


def test_kernels_for_no_known_runtime_or_target_are_refused():
    with pytest.raises(InputError, match="there are for onnxruntime, openvino, tensorrt"):
        kernels.build("tflite")
    with pytest.raises(InputError, match="no kernels for 'tests'"):
        kernels.library("tests")  # programs, of which nothing can be put beside a graph
    with pytest.raises(InputError, match="known are x86_64, aarch64"):
        kernels.build("onnxruntime", target="riscv64")


def test_openvino_for_another_machine_is_built_there(monkeypatch):
    monkeypatch.setattr(kernels, "compiler", lambda _: shutil.which("c++"))
    with pytest.raises(UnsupportedError, match="build it on the device"):
        kernels.build("openvino", target="aarch64")


def test_the_plain_tests_pass_under_the_sanitizers():
    passed, said = kernels_tests.run_tests()
    assert passed, [line for line in said if not line.startswith("ok")]


@pytest.mark.slow  # compiles everything once more
@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++, a second compiler")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_clang_compiles_the_kernels_without_a_warning(name, monkeypatch):
    monkeypatch.setenv("CXX", "clang++")
    assert kernels.library(name).is_file()


@pytest.mark.slow  # an emulator
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_the_plain_tests_pass_on_aarch64():
    passed, said = kernels_tests.run_tests("aarch64")
    assert passed, [line for line in said if not line.startswith("ok")]
    assert kernels.library("onnxruntime", "aarch64").is_file()
