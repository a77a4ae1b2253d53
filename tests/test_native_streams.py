"""Streams on native kernels: each operator against its reference, whole streams against the offline separator."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import shallow, target, write_recipe
from onnx import TensorProto, helper
from test_fused import RUNTIMES
from test_streaming import STREAM, SYNTHESIS, played

from edgesep import Stream, load_separator, onnxruntime_form, open_bundle, openvino_form
from edgesep.audit import executed
from edgesep.line import deploy
from edgesep.onnx_edit import inferred_shapes
from edgesep.ops import head_norm, lstm_steps, onnx_forms, past_attention, window_product
from edgesep.spec import StreamSpec
from edgesep.store import Store
from edgesep.stream import Hops, measured_look_ahead
from edgesep.verify import output_snr_db


def operator(kind, given, outputs, constant=(), **attributes):
    """A graph of one node; ``constant`` inputs are initializers, those that are None are left out."""
    inputs = ["" if v is None else n for n, v in given.items()]
    node = helper.make_node(kind, inputs, outputs, f"{kind}_0", domain="edgesep", **attributes)
    ins = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in given.items()
        if n not in constant and v is not None
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    values = [onnx.numpy_helper.from_array(given[n], n) for n in constant]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgesep", 1)]
    made = helper.make_graph([node], "one", ins, outs, values)
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def attention_inputs(frames=8, past=21, rounded=False):
    r = np.random.default_rng(0)
    shapes = {
        "q": (1, 2, frames, 13),
        "k": (1, 2, frames, 13),
        "v": (1, 2, frames, 37),
        "past_k": (1, 2, past, 13),
        "past_v": (1, 2, past, 37),
        "hidden": (frames, past + frames),
    }
    made = {n: r.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    seen = np.tri(frames, past + frames, past, dtype=bool)
    seen[:, :5] = False
    made["hidden"] = np.where(seen, 0, -np.inf).astype(np.float32)
    if rounded:
        for name in ("past_k", "past_v"):
            made[name] = r.integers(0, 256, shapes[name]).astype(np.uint8)
    return made


@pytest.mark.parametrize("frames", [1, 8, 20])
@pytest.mark.parametrize("name", RUNTIMES)
def test_attention_over_the_past_equals_its_reference(name, frames, tmp_path):
    given = attention_inputs(frames)
    (got,) = RUNTIMES[name](operator("PastAttention", given, ["y"]), given, tmp_path)
    assert output_snr_db(got, past_attention.reference(**given)) >= 110


@pytest.mark.parametrize("name", RUNTIMES)
def test_attention_over_a_past_in_eight_bits_equals_its_reference(name, tmp_path):
    given, attributes = attention_inputs(rounded=True), {"k_scale": 0.01, "k_zero": 130.0, "v_scale": 0.02}
    (got,) = RUNTIMES[name](operator("PastAttention", given, ["y"], **attributes), given, tmp_path)
    # Where processors sum products of integers, a query has 15 bits and a weight perhaps eight.
    assert output_snr_db(got, past_attention.reference(**given, **attributes)) >= 50


def test_keys_may_be_in_eight_bits_and_values_in_float(tmp_path):
    given, attributes = attention_inputs(), {"k_scale": 0.01, "k_zero": 130.0}
    given["past_k"] = attention_inputs(rounded=True)["past_k"]
    made = operator("PastAttention", given, ["y"], **attributes)
    for run in RUNTIMES.values():  # queries have 15 bits where processors sum products of integers
        assert output_snr_db(run(made, given, tmp_path)[0], past_attention.reference(**given, **attributes)) >= 85


@pytest.mark.parametrize(
    ("name", "message"), [("onnxruntime", "uint8 where they have a scale"), ("openvino", "past_v is u8, expected f32")]
)
def test_a_past_of_the_wrong_type_is_refused(name, message, tmp_path):
    given = attention_inputs(rounded=True)
    with pytest.raises(Exception, match=message):  # each runtime has its own
        RUNTIMES[name](operator("PastAttention", given, ["y"], k_scale=0.01), given, tmp_path)


def head_inputs(*more):
    r = np.random.default_rng(0)
    shapes = {"x": (3, 7, 15), "gain": (2, 7, 5), "bias": (2, 7, 5), "slope": (10,)}
    return {n: r.standard_normal(s).astype(np.float32) for n, s in shapes.items() if n != "slope" or n in more}


@pytest.mark.parametrize("more", [(), ("slope",)], ids=["plain", "slope"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_norm_of_heads_equals_its_reference(name, more, tmp_path):
    given, attributes = head_inputs(*more), {"first": 4, "epsilon": 1e-3}
    (got,) = RUNTIMES[name](operator("HeadNorm", given, ["y"], **attributes), given, tmp_path)
    wanted = head_norm.reference(**given, **attributes)
    assert got.shape == wanted.shape == (1, 2, 3, 35)
    assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize("name", RUNTIMES)
def test_heads_of_channels_that_are_not_there_are_refused(name, tmp_path):
    given = head_inputs()
    with pytest.raises(Exception, match="expected rows of 16 channels or more"):  # each runtime has its own
        RUNTIMES[name](operator("HeadNorm", given, ["y"], first=6), given, tmp_path)


@pytest.mark.parametrize(
    ("kind", "given", "shape"),
    [
        ("HeadNorm", head_inputs(), [1, 2, 3, 35]),
        ("PastAttention", attention_inputs(), [1, 2, 8, 37]),
        ("PastAttention", attention_inputs(rounded=True), [1, 2, 8, 37]),
    ],
)
def test_shapes_behind_an_operator_are_known(kind, given, shape):
    onnx_forms.register()
    made = operator(kind, given, ["y"])
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    assert list(inferred_shapes(made)["y"]) == shape


def window_inputs(*given, taps=3, inputs=10, outputs=80, windows=13):
    r = np.random.default_rng(0)
    matrix = r.standard_normal((taps * inputs, outputs))
    made = {
        "x": r.standard_normal((4, 5, inputs)),
        "weight": window_product.grouped(matrix, taps),
        "bias": r.standard_normal(outputs),
        "index": r.integers(-1, 20, (windows, taps)),
        "slope": 0.5 * r.standard_normal(outputs),
        "residual": r.standard_normal((windows, outputs)),
    }
    kept = {"x", "weight", "bias", *given}
    return {n: v if n == "index" else v.astype(np.float32) for n, v in made.items() if n in kept}


def window_operator(given, **attributes):
    made = operator("WindowProduct", given, ["y"], **attributes)
    names = ("x", "weight", "bias", "index", "slope", "residual", "scale")
    made.graph.node[0].input[:] = [n if n in given else "" for n in names]
    while not made.graph.node[0].input[-1]:
        made.graph.node[0].input.pop()
    return made


@pytest.mark.parametrize("behind", [(), ("slope",), ("residual",), ("slope", "residual")], ids="+".join)
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_product_of_windows_equals_its_reference(name, behind, tmp_path):
    for given in (window_inputs("index", *behind), window_inputs(*behind, taps=1, windows=20)):
        (got,) = RUNTIMES[name](window_operator(given), given, tmp_path)
        wanted = window_product.reference(**given)
        assert got.shape == wanted.shape
        assert output_snr_db(got, wanted) >= 110


def rounded_window_inputs(*more, taps=3, inputs=12, outputs=80, windows=13):
    """In eight bits; x is far from where rounding turns."""
    r, given = (
        np.random.default_rng(0),
        window_inputs(*more, taps=taps, inputs=inputs, outputs=outputs, windows=windows),
    )
    given["x"] = (0.02 * (r.integers(-150, 200, given["x"].shape) + 0.2)).astype(np.float32)
    given["weight"] = window_product.in_bytes(r.integers(-128, 128, (taps * inputs, outputs)).astype(np.int8), taps)
    return given | {"scale": (1e-4 * r.random(outputs)).astype(np.float32)}


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_product_of_windows_in_eight_bits_equals_its_reference(name, tmp_path):
    attributes = {"x_scale": 0.02, "x_zero": 100}
    for given in (
        rounded_window_inputs("index", "slope", "residual"),
        rounded_window_inputs(taps=1, windows=20, outputs=24),
    ):
        (got,) = RUNTIMES[name](window_operator(given, **attributes), given, tmp_path)
        wanted = window_product.reference(**given, **attributes)
        assert got.shape == wanted.shape
        assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize(
    ("name", "message"), [("onnxruntime", "int8 where it has a scale"), ("openvino", "weight is i8, expected f32")]
)
def test_windows_meet_a_matrix_in_eight_bits_only_with_a_scale(name, message, tmp_path):
    given = rounded_window_inputs("index")
    del given["scale"]
    given["weight"] = np.ascontiguousarray(given["weight"][..., :64])
    with pytest.raises(Exception, match=message):  # each runtime has its own
        RUNTIMES[name](window_operator(given), given, tmp_path)


@pytest.mark.parametrize("inputs", [window_inputs, rounded_window_inputs])
@pytest.mark.parametrize(("given", "rows"), [(("index", "slope"), 13), (("residual",), 20)])
def test_shapes_behind_a_product_of_windows_are_known(given, rows, inputs):
    onnx_forms.register()
    made = window_operator(inputs(*given, taps=3 if "index" in given else 1, windows=rows))
    onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True)
    assert inferred_shapes(made)["y"] == (rows, 80)


SEQUENCES = np.concatenate([start + np.arange(8) + np.arange(9)[:, None] for start in (-7, 3)])


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("taps", window_product.TAPS)
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_product_of_overlapping_windows_equals_its_reference(name, taps, turns, tmp_path):
    index = np.where((SEQUENCES < 0) | (SEQUENCES > 19), -1, SEQUENCES)[:, :taps]
    index = np.ascontiguousarray(index.reshape(2, 9, taps).swapaxes(0, 1).reshape(18, taps) if turns else index)
    assert window_product.rounds(index) < len(index) / 2
    given = window_inputs("slope", "residual", taps=taps, windows=len(index))
    matrix = given.pop("weight").transpose(1, 2, 0, 3).reshape(taps, 10, -1)[..., :80]
    given = {"x": given.pop("x"), "weight": window_product.unfolded(matrix), "index": index, **given}
    assert given["weight"].shape == (3, 9 if taps == 4 else 27, 10, 32)
    wanted = window_product.reference(**given)
    plain = window_product.reference(**given | {"weight": window_product.grouped(matrix.reshape(taps * 10, -1), taps)})
    np.testing.assert_allclose(wanted, plain, atol=1e-4)
    (got,) = RUNTIMES[name](window_operator(given), given, tmp_path)
    assert output_snr_db(got, wanted) >= 110


@pytest.mark.parametrize(
    ("index", "rounds"),
    [
        ([[0, 1, 2, 3]], 1),
        ([[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 9], [4, 5, 9, 7]], 2),  # the fifth window
        ([[0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5, 6]], 2),  # two rows on
        ([[5, -1, -1, -1], [-1, -1, -1, 0]], 1),  # what lies between does not matter
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 2),
        ([[0, 1, 2, 3], [9, 8, 7, 6], [1, 2, 3, 4], [8, 7, 6, 5], [2, 3, 4, 0]], 2),  # two sequences in turns
    ],
)
def test_a_round_takes_windows_that_are_one_row_behind_each_other(index, rounds):
    assert window_product.rounds(np.array(index)) == rounds


@pytest.mark.parametrize("row", [-2, 20])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_row_that_is_not_there_is_refused(name, row, tmp_path):
    given = window_inputs("index")
    given["index"][3, 1] = row
    with pytest.raises(Exception, match=f"index holds {row}, expected -1 to 19"):  # each runtime has its own
        RUNTIMES[name](window_operator(given), given, tmp_path)


def lstm_inputs(order=None, frames=6, rows=7, hidden=20):
    r = np.random.default_rng(0)
    sets = 1 if order is None else len(order[0])
    made = {
        "gates": r.standard_normal((frames * rows, 4 * hidden)),
        "recurrent": lstm_steps.grouped(0.3 * r.standard_normal((hidden, 4 * hidden))),
        "initial_h": r.standard_normal((1, sets * rows, hidden)),
        "initial_c": r.standard_normal((1, sets * rows, hidden)),
    }
    made = {name: value.astype(np.float32) for name, value in made.items()}
    return made if order is None else made | {"order": np.array(order)}


def in_eight_bits(given):
    recurrent, scale = lstm_steps.in_bytes(given["recurrent"])
    changed = {"recurrent": recurrent, "initial_h": np.tanh(given["initial_h"]), "order": given.get("order")}
    return given | changed | {"scale": scale}


ORDERS = [None, [[0, 3], [1, 4], [2, -1], [3, -1]]]
STATES = ["y", "last_h", "last_c"]


@pytest.mark.parametrize("order", ORDERS, ids=["plain", "sets"])
@pytest.mark.parametrize("name", [*RUNTIMES, "portable"])
def test_an_lstm_s_steps_equal_their_reference(name, order, tmp_path):
    given = lstm_inputs(order)
    made = operator("LstmSteps", given, STATES, constant=["recurrent"])
    feeds = {n: v for n, v in given.items() if n != "recurrent"}
    if name == "portable":
        made = onnx_forms.portable(made)
        assert not onnx_forms.is_native(made)
        got = onnxruntime.InferenceSession(made.SerializeToString()).run(None, feeds)
    else:
        got = RUNTIMES[name](made, feeds, tmp_path)
    for one, wanted in zip(got, lstm_steps.reference(**given), strict=True):
        assert one.shape == wanted.shape
        assert output_snr_db(one, wanted) >= 110


@pytest.mark.parametrize("order", ORDERS, ids=["plain", "sets"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_an_lstm_in_eight_bits_stays_close_to_its_reference(name, order, tmp_path):
    given = in_eight_bits(lstm_inputs(order, hidden=30))
    made = operator("LstmSteps", given, STATES, constant=["recurrent", "scale"])
    feeds = {n: v for n, v in given.items() if n not in ("recurrent", "scale") and v is not None}
    got, wanted = RUNTIMES[name](made, feeds, tmp_path), lstm_steps.reference(**given)
    assert all(output_snr_db(one, other) >= 25 for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_matrix_in_eight_bits_without_a_scale_is_refused(name, tmp_path):
    given = lstm_inputs()
    given["recurrent"], _ = lstm_steps.in_bytes(given["recurrent"])
    feeds = {n: v for n, v in given.items() if n != "recurrent"}
    with pytest.raises(Exception, match=r"recurrent (is i8|has shape)"):
        RUNTIMES[name](operator("LstmSteps", given, STATES, constant=["recurrent"]), feeds, tmp_path)


def test_a_recurrent_matrix_in_eight_bits_is_rounded_once():
    matrix = lstm_inputs(hidden=30)["recurrent"]
    rounded = lstm_steps.from_bytes(*lstm_steps.in_bytes(matrix), 30)
    assert 30 < output_snr_db(rounded, matrix) < 60
    np.testing.assert_allclose(lstm_steps.from_bytes(*lstm_steps.in_bytes(rounded), 30), rounded, rtol=1e-6)


@pytest.mark.parametrize("frame", [-2, 6])
@pytest.mark.parametrize("name", RUNTIMES)
def test_a_frame_that_is_not_there_is_refused(name, frame, tmp_path):
    given = lstm_inputs([[0, 3], [frame, -1]])
    with pytest.raises(Exception, match=f"index holds {frame}, expected -1 to 5"):
        RUNTIMES[name](operator("LstmSteps", given, STATES), given, tmp_path)


def test_the_reference_is_torch_s_lstm():
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(9, 20).double()
    x, h, c = torch.randn(6, 7, 9).double(), torch.randn(1, 7, 20).double(), torch.randn(1, 7, 20).double()
    with torch.no_grad():
        wanted, (last_h, last_c) = lstm(x, (h, c))
        gates = x @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + lstm.bias_hh_l0
        order = [0, 3, 1, 2]  # torch: input, forget, cell, output
        turned = [v.unflatten(-1, (4, -1))[..., order, :].flatten(-2) for v in (gates, lstm.weight_hh_l0.T)]
    made = lstm_steps.reference(turned[0].numpy(), lstm_steps.grouped(turned[1].numpy()), h.numpy(), c.numpy())
    for one, of_torch in zip(made, (wanted[:, None], last_h, last_c), strict=True):
        np.testing.assert_allclose(one, of_torch.numpy(), atol=1e-12)


@pytest.mark.parametrize("written", [dict, in_eight_bits])
def test_shapes_of_an_lstm_s_steps_are_inferred(written):
    onnx_forms.register()
    model = operator("LstmSteps", written(lstm_inputs(ORDERS[1])), STATES)
    made = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    found = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in made.graph.output]
    assert found == [[4, 1, 14, 20], [1, 14, 20], [1, 14, 20]]


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    """Of two blocks: the second is handed the states of segments that ended in the first."""
    folder = tmp_path_factory.mktemp("causal")
    return shallow(golden("tfacm_released_small"), folder, layers=2, variant="causal", synthesis=SYNTHESIS)


TARGETS = "".join(target(kind, precision, ops="native") for kind in RUNTIMES for precision in ("fp32", "int8"))


@pytest.fixture(scope="module")
def bundle(checkpoint, mixtures, cache, tmp_path_factory):
    """Of three hops a call: segments begin anywhere within one."""
    folder = tmp_path_factory.mktemp("native")
    recipe = write_recipe(folder, checkpoint, mixtures, TARGETS + STREAM.format(hops=3))
    assert deploy(recipe, folder / "bundle", store=Store(cache)).ok
    return open_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def mixture():
    return (0.1 * np.random.default_rng(5).standard_normal(4007)).astype(np.float32)


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 80), ("int8", 10)])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_native_stream_gives_the_offline_output(bundle, checkpoint, mixture, runtime, precision, least_db):
    separator = load_separator(checkpoint)
    offline = separator.streaming.bound(separator, 0.05)(mixture).numpy()
    with Stream(bundle, runtime=runtime, precision=precision) as stream:
        assert output_snr_db(played(stream, mixture, [131, 5]), offline) >= least_db
    spec = StreamSpec.from_json(bundle.manifest["separator"]["stream"])
    with bundle.runner(runtime, precision=precision) as runner:
        assert measured_look_ahead(Hops(runner.bound, spec)) == spec.look_ahead_samples


def graph_of(bundle, runtime, precision):
    artifact = bundle.artifact(runtime, precision)
    return onnx.load(artifact.folder / artifact.files[0])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_native_streams_hold_no_lstm_and_no_product_with_the_past(bundle, runtime, precision):
    model = graph_of(bundle, runtime, precision)
    kinds = [n.op_type for n in model.graph.node]
    assert {"LstmSteps", "PastAttention", "HeadNorm"} <= set(kinds)
    assert not {"LSTM", "DynamicQuantizeLSTM", "Softmax"} & set(kinds)
    projected = next(n for n in model.graph.node if n.op_type == "LstmSteps").input[0]
    maker = next(n for n in model.graph.node if projected in n.output)
    assert maker.op_type == "WindowProduct"
    assert (len(maker.input) == 7) == (precision == "int8")  # the last one is a scale
    assert "Gather" not in {n.op_type for n in model.graph.node if maker.input[0] in n.output}


def test_sets_of_rows_share_their_projection_and_one_order(bundle):
    model = graph_of(bundle, "onnxruntime", "fp32")
    steps = [n for n in model.graph.node if n.op_type == "LstmSteps"]
    orders = [n.input[4] for n in steps if len(n.input) > 4 and n.input[4]]
    assert (len(steps), len(orders), len(set(orders))) == (6, 2, 1)  # over bins and over frames, and the memory's two
    behind = [n.op_type for n in model.graph.node if n.input and n.input[0] in {s.output[0] for s in steps}]
    assert set(behind) == {"Reshape"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_native_stream_holds_its_past_in_eight_bits(bundle, mixture, runtime):
    facts = json.loads({p.key: p.value for p in graph_of(bundle, runtime, "int8").metadata_props}["edgesep"])
    narrow = {s["name"] for s in facts["stream"]["states"] if s["dtype"] == "uint8"}
    assert narrow == {s["name"] for s in facts["stream"]["states"] if s["ring_axis"] is not None} != set()
    with Stream(bundle, runtime=runtime, precision="int8") as stream:
        stream.process(mixture)
        held = stream._stateful().states
        assert {name for name, array in held.items() if array.dtype == np.uint8} == narrow
    artifact = bundle.artifact(runtime, "int8")
    audited = {(e.operator, e.precision) for e in executed(artifact, bundle.manifest["separator"])}
    assert {("LstmSteps", "fp32"), ("PastAttention", "fp32"), ("WindowProduct", "int8")} <= audited


def test_most_of_a_native_stream_is_in_int8_also_where_the_runtime_has_no_such_lstm(bundle):
    shares = [p["report"]["quantized_macs_share"] for p in bundle.manifest["passes"] if p["pass"] == "quantize"]
    assert len(shares) == len(RUNTIMES)
    assert min(shares) > 0.5  # attention and what LSTMs remember are summed in float


def windows(scale=0.02, more=(), pad=0.0):
    """A graph that gathers windows of a padded map and rounds them; ``more`` are further outputs."""
    values = {"index": np.array([0, 1, 2, 1, 2, 3, 3, 4, 5]), "shape": np.array([3, 3, 5])}
    values |= {"scale": np.float32(scale), "zero": np.full(np.shape(scale), 131, np.uint8)}
    values |= {"pads": np.array([1, 0, 1, 0]), "pad": np.float32(pad)}
    per_channel = {"axis": 2} if np.ndim(scale) else {}
    made = helper.make_node
    nodes = [
        made("Pad", ["x", "pads", "pad"], ["padded"]),
        made("Gather", ["padded", "index"], ["windows"], axis=0),
        made("Reshape", ["windows", "shape"], ["apart"]),
        made("QuantizeLinear", ["apart", "scale", "zero"], ["rounded"], **per_channel),
        made("DequantizeLinear", ["rounded", "scale", "zero"], ["y"], **per_channel),
    ]
    graph = helper.make_graph(
        nodes,
        "windows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 5])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 3, 5]) for name in ("y", *more)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


FORMS = {"onnxruntime": onnxruntime_form.for_onnxruntime, "openvino": openvino_form.for_openvino}


def as_it_runs(model, name):
    return onnx.load_from_string(FORMS[name](model.SerializeToString()))


@pytest.mark.parametrize("name", FORMS)
def test_values_rounded_before_they_are_gathered_are_the_same(name, tmp_path):
    model, early = windows(), as_it_runs(windows(), name)
    onnx.checker.check_model(early)
    assert [n.op_type for n in early.graph.node] == ["QuantizeLinear", "Pad", "Gather", "Reshape", "DequantizeLinear"]
    given = {"x": np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)}
    before, after = (RUNTIMES[name](m, given, tmp_path)[0] for m in (model, early))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", FORMS)
def test_values_that_are_padded_with_others_are_rounded_behind_that(name):
    kinds = [n.op_type for n in as_it_runs(windows(pad=0.5), name).graph.node]
    assert kinds == ["Pad", "QuantizeLinear", "Gather", "Reshape", "DequantizeLinear"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("given", [{"scale": [0.01, 0.02, 0.03, 0.04, 0.05]}, {"more": ["apart"]}], ids=str)
def test_values_that_others_read_or_that_are_rounded_by_channel_are_rounded_where_they_were(given, name):
    kinds = [n.op_type for n in as_it_runs(windows(**given), name).graph.node]
    assert kinds == ["Pad", "Gather", "Reshape", "QuantizeLinear", "DequantizeLinear"]
