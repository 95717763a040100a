import json

import pytest
import torch

from kernels import bench

SMALL = {"tokens": 256, "dim": 16, "vocab": 20000}


def test_measures_every_implementation():
    rows = bench.measure(["linear_cross_entropy"], SMALL, "cpu", peers=False, repeats=1)
    by_name = {row["implementation"]: row for row in rows}
    assert set(by_name) == {"F.cross_entropy", "tiled", "tiled, unreduced"}
    for row in rows:
        assert row["shape"] == SMALL
        assert row["milliseconds"] > 0
        assert 0 < row["error"] < 1e-4  # float32 against float64: not equal, not far
    # 256 × 20000 float32 logits are 19.5 MiB, and PyTorch keeps them, their log-softmax and the
    # gradient; the chunks hold 16 MiB, so here both are seen to be measured, and not compared.
    logits = 256 * 20000 * 4 / 2**20
    assert 2 * logits <= by_name["F.cross_entropy"]["extra_mib"] <= 5 * logits
    assert by_name["tiled"]["extra_mib"] < by_name["F.cross_entropy"]["extra_mib"]
    text = bench.format_rows(rows)
    assert "tokens 256, dim 16, vocab 20000" in text
    assert text.count("\n") == 1 + len(rows)


def test_error_is_relative_to_the_largest_entry():
    exact = [torch.tensor([1.0, -4.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    actual = [torch.tensor([1.0, -3.0]), torch.zeros(())]
    assert bench._error(actual, exact) == 0.25


def test_a_peer_that_is_missing_or_fails_is_a_note():
    def missing():
        raise ModuleNotFoundError("no", name="some_peer")

    def failing(x):
        raise RuntimeError("only on GPUs\nand more")

    case = bench.Case(
        op="none",
        name="square",
        device="cpu",
        dtype=torch.float32,
        shape={"size": 3},
        inputs=lambda shape, dtype, generator: {
            "x": torch.randn(shape["size"], dtype=dtype, generator=generator).requires_grad_()
        },
        candidates={},
        peers={"missing": missing, "failing": lambda: failing},
        exact=torch.square,
    )
    rows = bench._measure_case(case, case.shape, peers=True, repeats=1)
    assert [row["note"] for row in rows] == [
        "not installed: some_peer",
        "RuntimeError: only on GPUs",
    ]
    assert all(row["milliseconds"] is None for row in rows)
    assert "only on GPUs" in bench.format_rows(rows)


@pytest.mark.parametrize(
    ("text", "shape"), [("", {}), ("tokens=4096,dim=512", {"tokens": 4096, "dim": 512})]
)
def test_shape(text, shape):
    assert bench.parse_shape(text) == shape


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shape", "tokens"],
        ["--shape", "tokens=0"],
        ["--op", "linear_cross_entropy", "--shape", "heads=4"],
        ["--op", "softmax"],
        ["--device", "tpu"],
        ["--repeats", "0"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert bench.main(arguments) == 2
    assert capsys.readouterr().err


def test_json(capsys):
    shape = "tokens=8,dim=4,vocab=16"
    arguments = ["--op", "linear_cross_entropy", "--shape", shape, "--no-peers", "--json"]
    assert bench.main([*arguments, "--device", "cpu", "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["torch"] == torch.__version__
    assert len(report["rows"]) == 3


@pytest.mark.slow
def test_linear_cross_entropy_takes_less_than_pytorch():
    """2048 × 256 hidden states, 50,257 words: at most PyTorch's time, 0.15 of its memory."""
    rows = bench.measure(["linear_cross_entropy"], None, "cpu", peers=False, repeats=3)
    dense, tiled = rows[0], rows[1]
    assert tiled["implementation"] == "tiled"
    assert tiled["milliseconds"] <= dense["milliseconds"]
    assert tiled["extra_mib"] <= 0.15 * dense["extra_mib"]
