"""The kernel benchmark without a GPU: predictions that are called so, for the cases that the issue names."""

import json

import pytest
import torch

from bench import kernels
from bench.kernel_cases import CHUNKS, FORMS, MODELS, TOKENS, cases, slice_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would measure here")


def test_cases_fit_their_weights():
    chosen = list(cases())
    assert {(c.model, c.chunks, c.tokens) for c in chosen} == {
        (m, k, t) for m in MODELS for k in CHUNKS for t in TOKENS
    }
    assert {c.form for c in chosen} == set(FORMS)
    for case in chosen:
        for rows, (size, _) in zip(case.rows, case.weights, strict=True):
            assert 0 < rows <= size - case.start
        assert (case.start % 8 != 0) == (case.form == "misaligned")
    assert slice_rows(512, 128) == 8
    assert slice_rows(4096, 32) == 128


def test_predictions_are_marked_as_such(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    kernels.main(
        ["--models", "llama-3-8b", "qwen3-30b-a3b", "--chunks", "32", "--tokens", "4096", "--out", str(out)]
    )
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    assert result["kind"] == "predicted"
    assert "Nothing here was measured" in printed[0]
    lines = [line for line in printed if "us  " in line]
    assert len(lines) == len(result["records"])
    assert all("(predicted)" in line for line in lines)
    for case in result["records"].values():
        assert case["roofline_us"] < min(case["triton_us"], case["torch_us"])
        assert case["auto"] == "torch" or case["form"] in ("blocks", "group", "experts")
    assert set(result["geometric_means"]) == {"a100", "rtx4090", "h100", "b200"}


def test_a_table_needs_measurements(tmp_path, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--table", str(tmp_path / "t.json")])
    assert "--table needs measurements" in capsys.readouterr().err
