"""Fused units: each operator against its reference in both runtimes, whole graphs against those they stand for."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper

from edgesep import fusion, graph, int8, kernels, units
from edgesep.ops import fused
from edgesep.runtimes import int8_form
from edgesep.verify import output_snr_db


def run_onnxruntime(made, feeds, folder):
    del folder
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(kernels.library("onnxruntime")))
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_openvino(made, feeds, folder):
    """By way of IR, so that the round trip is tested too."""
    core = openvino.Core()
    core.add_extension(str(kernels.library("openvino")))
    onnx.save(made, folder / "model.onnx")
    openvino.save_model(core.read_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    compiled = core.compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(feeds)
    return [found[i] for i in range(len(compiled.outputs))]


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


def operator(kind, names, given, outputs, **attributes):
    inputs = [name if name in given else "" for name in names]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(kind, inputs, outputs, domain="edgesep", **attributes)
    types = {np.dtype(np.int64): TensorProto.INT64, np.dtype(np.float32): TensorProto.FLOAT}
    ins = [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in given.items()]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgesep", 1)]
    return helper.make_model(helper.make_graph([node], "one", ins, outs), opset_imports=opsets, ir_version=9)


CONV = {"weight", "bias"}
NORM = {"gamma", "beta"}
GATED = {"gate", "shift", "index"}
READ = {"x_stats", "x_gamma", "x_beta"}
RAISED = {"x_shift", "x_index"}


def inputs(parts, batch=2, frames_in=41, channels=37, taps=5, stride=1):
    r = np.random.default_rng(0)
    frames, coarse, x_coarse = (frames_in - 1) // stride + 1, 11, 7
    shapes = {
        **dict.fromkeys(("bias", "gamma", "beta", "x_bias", "x_gamma", "x_beta"), (channels,)),
        "x": (batch, 1, frames_in, channels),
        "weight": (taps, channels),
        "gate": (batch, 1, coarse if "index" in parts else frames, channels),
        "shift": (batch, 1, coarse if "index" in parts else frames, channels),
        "x_stats": (batch, 2),
        "x_shift": (batch, 1, x_coarse, channels),
    }
    made = {n: r.standard_normal(s).astype(np.float32) for n, s in shapes.items() if n in {"x", *parts}}
    if "index" in parts:
        made["index"] = r.integers(0, coarse, frames)
    if "x_index" in parts:
        made["x_index"] = r.integers(0, x_coarse, frames_in)
    return made


@pytest.mark.parametrize(
    ("parts", "attributes"),
    [
        (CONV | NORM, {}),
        (CONV | NORM, {"slope": 0.25}),
        (CONV | NORM | GATED, {}),
        (CONV | NORM | {"shift"}, {"slope": 0.1}),
        (CONV, {"slope": 0.0}),
        (CONV | NORM, {"stride": 2}),
        (NORM | {"bias"}, {"sigmoid": 1}),
        (NORM, {}),
        ({"bias", "shift"}, {}),
        ({"shift", "index"}, {}),
        (CONV | NORM | GATED | READ | RAISED, {"x_slope": 0.2}),
        (CONV | NORM | READ | {"x_bias"}, {"x_slope": 0.2, "stride": 2}),
        (CONV | NORM | RAISED, {}),
        (READ | NORM, {}),
        (CONV | READ | RAISED, {"deferred": 1}),
        (CONV, {"deferred": 1, "stride": 2}),
    ],
    ids=lambda v: "+".join(sorted(v)) if isinstance(v, set) else str(v),
)
@pytest.mark.parametrize("size", [{}, {"frames_in": 1, "channels": 5}, {"frames_in": 900, "channels": 64, "batch": 1}])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_unit_equals_its_reference(name, size, parts, attributes, tmp_path):
    given = inputs(parts, **size, stride=attributes.get("stride", 1))
    deferred = attributes.get("deferred", 0)
    made = operator("ConvNorm", fused.CONV_NORM, given, ["out", "stats"][: 1 + deferred], **attributes)
    wanted = fused.conv_norm(**given, **attributes)
    for got, exact in zip(RUNTIMES[name](made, given, tmp_path), wanted, strict=True):
        assert got.shape == exact.shape
        assert output_snr_db(got, exact) >= 100


@pytest.mark.parametrize("taps", [1, 3, 7])
def test_kernels_of_every_length(taps, tmp_path):
    given = inputs(CONV | NORM | READ, taps=taps)
    made = operator("ConvNorm", fused.CONV_NORM, given, ["out"])
    assert output_snr_db(run_onnxruntime(made, given, tmp_path)[0], fused.conv_norm(**given)[0]) >= 100


@pytest.mark.parametrize("name", RUNTIMES)
def test_statistics_equal_their_reference(name, tmp_path):
    given = inputs({"bias"})
    made = operator("GlobalStats", fused.GLOBAL_STATS, given, ["stats"])
    (got,) = RUNTIMES[name](made, given, tmp_path)
    assert output_snr_db(got, fused.global_stats(**given)) >= 100


@pytest.mark.parametrize("read", [set(), READ | {"x_bias"}], ids=["plain", "normed"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_pooled_sum_equals_its_reference(name, read, tmp_path):
    r = np.random.default_rng(1)
    given = inputs(read) | {
        "total": r.standard_normal((2, 1, 6, 37)).astype(np.float32),
        "index": r.integers(0, 41, 18),
        "weight": r.random((6, 3)).astype(np.float32),
    }
    given = {k: given[k] for k in fused.POOLED_SUM if k in given}
    made = operator("PooledSum", fused.POOLED_SUM, given, ["out"], x_slope=0.3)
    (got,) = RUNTIMES[name](made, given, tmp_path)
    assert output_snr_db(got, fused.pooled_sum(**given, x_slope=0.3)) >= 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"index": np.full(41, 11)}, "index holds 11, expected 0 to 10"),
        ({"x_index": np.full(41, -1)}, "index holds -1, expected 0 to 6"),
        ({"gamma": np.ones(36, np.float32)}, "gamma has shape"),
        ({"weight": np.ones((4, 37), np.float32)}, "weight has shape"),
        ({"x": np.ones((2, 3, 41, 37), np.float32)}, "x has shape"),
        ({"gate": np.ones((2, 1, 12, 37), np.float32)}, "gate has shape"),
        ({"beta": None}, "gamma and beta belong together"),
        ({"x_stats": None}, "x_stats, x_gamma and x_beta belong together"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("name", RUNTIMES)
def test_what_does_not_fit_is_named(name, change, said, tmp_path):
    given = inputs(CONV | NORM | GATED | READ | RAISED) | change
    given = {k: v for k, v in given.items() if v is not None}
    made = operator("ConvNorm", fused.CONV_NORM, given, ["out"])
    with pytest.raises(Exception, match=said):  # each runtime has its own class
        RUNTIMES[name](made, given, tmp_path)


@pytest.fixture(scope="module")
def quantized(separator, exported, tmp_path_factory):
    """TDANet's export with every product in INT8, in ONNX Runtime's form."""
    model, folder = onnx.load(exported), tmp_path_factory.mktemp("int8")

    def feeds():
        for seed in range(2):
            noise = np.random.default_rng(seed).standard_normal((1, 4000))
            yield {"mixture": (0.1 * noise).astype(np.float32)}

    layers = {graph.layer_of(n) for n in model.graph.node if n.op_type in int8.QUANTIZED}
    quantizer = int8.OnnxRuntimeQuantizer(separator, model, feeds, folder)
    quantizer.write(folder / "int8.onnx", layers, int8_form("onnxruntime"))
    return separator, onnx.load(folder / "int8.onnx")


def test_no_map_is_transposed_between_the_first_and_the_last_unit(exported):
    model = onnx.load(exported)
    made = fusion.fuse(model)
    kinds = [n.op_type for n in made.graph.node]
    turned = {n.output[0] for n in made.graph.node if n.op_type == "Transpose"}
    reading = [n for n in made.graph.node if n.op_type == "ConvNorm" and turned.intersection(n.input)]
    assert len(reading) <= 1  # what the encoder makes
    assert kinds.count("ConvNorm") > 20


def test_norms_are_left_to_their_readers(exported):
    model = onnx.load(exported)
    found = units.find(units.Graph(model.graph)).values()
    assert any(u.deferred for u in found)
    assert all(u.gamma is not None and not u.gate for u in found if u.deferred)


def test_products_stay_in_int8(quantized):
    _, model = quantized
    pointwise = [
        n
        for n in model.graph.node
        if n.op_type == "Conv"
        and "spp_dw" not in n.name
        and helper.get_node_attr_value(n, "kernel_shape") == [1, 1]
        and helper.get_node_attr_value(n, "group") == 1
    ]
    made = fusion.fuse(model)
    dequantized = {n.output[0] for n in made.graph.node if n.op_type == "DequantizeLinear"}
    products = [n for n in made.graph.node if n.op_type == "MatMul" and dequantized.issuperset(n.input)]
    assert len(products) >= len(pointwise) > 5


def test_fusing_a_quantized_graph_only_takes_rounding_away(quantized, tmp_path):
    separator, model = quantized
    x = separator.example_inputs(4001)[0]
    exact = separator(x).numpy()
    options = onnxruntime.SessionOptions()
    before = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"mixture": x.numpy()})[0]
    (after,) = run_onnxruntime(fusion.fuse(model), {"mixture": x.numpy()}, tmp_path)
    assert output_snr_db(after, exact) >= output_snr_db(before, exact) - 0.5
