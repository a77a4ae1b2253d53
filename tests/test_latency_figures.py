"""Latency figures follow the sample-count rule and carry their environment."""

import time

import pytest

from edgesep import VerificationError, measure


def test_percentiles_need_enough_queries():
    assert measure.percentiles([1.0] * 63)["p90_ms"] is None
    assert measure.percentiles([1.0] * 64)["p90_ms"] == 1.0
    assert measure.percentiles([1.0] * 661)["p99_ms"] is None
    assert measure.percentiles([float(i) for i in range(1000)])["p99_ms"] == pytest.approx(989, abs=1)


def test_calls_are_timed():
    times = measure.latencies_ms(lambda: time.sleep(0.004), seconds=0.1)
    assert len(times) >= 10
    assert min(times) >= 4


def test_pairs_alternate():
    order = []
    times = measure.paired_ms({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.01)
    assert order[4:10] == ["a", "b"] * 3
    assert len(times["a"]) == len(times["b"]) >= 5


def test_environment_names_the_processor():
    env = measure.environment()
    assert env["cpu"]
    assert env["cores"] >= 1


def test_a_failing_measurement_says_why(tmp_path):
    graph = {"folder": str(tmp_path), "files": ["none.onnx"], "inputs": {"x": [1, 8]}}
    with pytest.raises(VerificationError, match="does not load"):
        measure.measure_apart(
            {"runtime": "onnxruntime", "precision": "fp32", "threads": None, "seconds": 0.1, "graphs": [graph]}
        )
