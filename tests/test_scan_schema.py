"""The scan as an ONNX operator: checked, inferred and evaluated."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from edgesep.ops import onnx_forms, selective_scan, selective_scan_onnx

onnx_forms.register()

SIZES = {"batch": 2, "length": 7, "channels": 5, "state": 3}


def arrays(leave_out=()):
    rng = np.random.default_rng(0)
    made = {
        name: rng.standard_normal([SIZES[a] for a in axes]).astype(np.float32)
        for name, axes in selective_scan_onnx.INPUTS.items()
        if name not in leave_out
    }
    made["A"] = -np.abs(made["A"])
    return made


def model(given, shapes=None, outputs=("y", "last_state"), **attributes):
    names = [name if name in given else "" for name in selective_scan_onnx.INPUTS]
    node = helper.make_node("SelectiveScan", names, list(outputs), domain="edgesep", **attributes)
    ins = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (shapes or {}).get(n, v.shape)) for n, v in given.items()
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 3) for n in outputs]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgesep", 1)]
    return helper.make_model(helper.make_graph([node], "scan", ins, outs), opset_imports=opsets, ir_version=9)


def inferred(made):
    graph = onnx.shape_inference.infer_shapes(made, strict_mode=True).graph
    return [[d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim] for o in graph.output]


@pytest.mark.parametrize("leave_out", [(), ("D", "z"), ("D", "z", "delta_bias", "initial_state")])
@pytest.mark.parametrize("attributes", [{}, {"delta_softplus": 1}, {"reverse": 1, "delta_softplus": 1}])
def test_the_evaluator_runs_the_reference(leave_out, attributes):
    given = arrays(leave_out)
    made = model(given, **attributes)
    onnx.checker.check_model(made, full_check=True)
    y, last = ReferenceEvaluator(made, new_ops=[selective_scan_onnx.SelectiveScan]).run(None, given)
    flags = {k: bool(v) for k, v in attributes.items()}
    wanted_y, wanted_last = selective_scan.reference(**given, **flags)
    np.testing.assert_allclose(y, wanted_y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, wanted_last, rtol=1e-5, atol=1e-6)


def test_one_output_suffices():
    given = arrays()
    (y,) = ReferenceEvaluator(model(given, outputs=("y",)), new_ops=[selective_scan_onnx.SelectiveScan]).run(
        None, given
    )
    assert y.shape == given["u"].shape


def test_shapes_are_inferred_from_whatever_is_known():
    shapes = {"u": ("n", "t", None), "delta": (None, None, 5), "A": (5, 3), "initial_state": ("n", None, None)}
    assert inferred(model(arrays(), shapes)) == [[2, 7, 5], [2, 5, 3]]
    unknown = {
        n: tuple(a if a in ("batch", "length") else SIZES[a] for a in x) for n, x in selective_scan_onnx.INPUTS.items()
    }
    assert inferred(model(arrays(), unknown)) == [["batch", "length", 5], ["batch", 5, 3]]


@pytest.mark.parametrize(
    ("shapes", "message"), [({"z": (2, 7, 4)}, "z has channels = 4"), ({"B": (2, 7)}, "B has rank 2, expected 3")]
)
def test_shapes_that_contradict_each_other_are_named(shapes, message):
    with pytest.raises(onnx.shape_inference.InferenceError, match=message):
        inferred(model(arrays(), shapes))
