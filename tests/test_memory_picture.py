"""The picture of the paper's case shows the predictions that are committed, and measured peaks beside them."""

import json
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import memory_picture, predict, residency  # noqa: E402
from bench.memory_picture import GIB, Bar, bars_of  # noqa: E402

PREDICTED = json.loads(predict.OUT.read_text())
ROWS = {(r["variant"], r["chunks"]): r for r in PREDICTED["cases"][0]["rows"]}
SETTINGS = {"model": "llama-2-7b", "tokens": 1024, "batch": 1, "chunks": 32, "checkpointing": True}


def run(**variants):
    """A file of bench.residency on a GPU, cut down to what is read."""
    return {
        "settings": SETTINGS,
        "device": "a GPU",
        "commit": "abc",
        "variants": {name.replace("_", " ").replace("K", "K="): result for name, result in variants.items()},
    }


def test_bars_are_the_rows_of_the_case():
    bars = bars_of(PREDICTED)
    assert [bar.predicted for bar in bars] == [ROWS[key]["peak"] for key in memory_picture.VARIANTS]
    assert all(bar.measured is None for bar in bars)
    assert bars[0].parts["weights"] == 2 * 6738415616


def test_measured_variants_are_those_of_the_benchmark():
    known = residency.variants(memory_picture.CHUNKS, 2, 1 << 20)
    for _, variant in memory_picture.VARIANTS.values():
        assert variant in known


def test_measured_peaks_stand_beside_their_predictions():
    peak = 18_900_000_000
    bars = bars_of(PREDICTED, run(adamw={"error": "out of memory: x"}, paged_K32={"peak_bytes": peak}))
    assert [(bar.measured, bool(bar.missing)) for bar in bars] == [
        (None, True),
        (peak, False),
        (None, False),
        (None, False),
    ]


def test_the_floor_is_weights_inputs_and_one_block():
    floor = memory_picture.floor_bytes()
    weights, inputs = 2 * 6738415616, 32 * 1024 * 4096 * 2
    assert weights + inputs < floor < weights + inputs + GIB // 4
    # what the lines are there for: the paper's figure lies above the floor, and no prediction below it
    assert floor < memory_picture.PAPER * GIB
    assert all(bar.predicted > floor for bar in bars_of(PREDICTED))


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (
            {"settings": SETTINGS | {"tokens": 64}, "variants": {}},
            "{'tokens': 64}, expected {'tokens': 1024}",
        ),
        ({"settings": SETTINGS | {"checkpointing": False}, "variants": {}}, "'checkpointing': False"),
        ({"variants": {}}, "'model': None"),
        (run(paged_K32={"peak_bytes": None}), "no peak_bytes"),
    ],
)
def test_a_run_of_something_else_is_refused(measured, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        bars_of(PREDICTED, measured)


def test_a_suite_holds_one_place_of_state_in_each_of_its_cases():
    place = {"settings": SETTINGS, "variants": {"paged K=32": {"peak_bytes": 17 * GIB}}}
    full = {"settings": SETTINGS, "variants": {"adamw": {"peak_bytes": 50 * GIB}}}
    lean = {"settings": SETTINGS, "variants": {"lean K=128": {"peak_bytes": 13 * GIB}}}
    rows = {"paper/paged": {"result": place}, "paper/adamw": {"result": full}, "paper/lean": {"result": lean}}
    rows |= {"paper/stream": {"verdict": "no time left"}, "kernels/pager": {"result": {"variants": {}}}}
    bars = bars_of(PREDICTED, memory_picture.measured_in({"cases": rows}))
    assert {bar.name: bar.measured for bar in bars if bar.measured} == {"paged, K=32": 17 * GIB}
    with pytest.raises(ValueError, match="'model': None"):
        bars_of(PREDICTED, memory_picture.measured_in({"cases": {}}))


def test_predictions_without_the_case_are_refused():
    with pytest.raises(ValueError, match="hold 0 cases"):
        bars_of({"cases": PREDICTED["cases"][1:]})
    lacking = {"cases": [PREDICTED["cases"][0] | {"rows": [r for r in ROWS.values() if r["chunks"] != 32]}]}
    with pytest.raises(ValueError, match="lack 'chunkft, paged' with K=32"):
        bars_of(lacking)


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_picture_says_how_far_measured_is_from_predicted(tmp_path, monkeypatch):
    from bench import plots

    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, out: drawn.append(figure))
    parts = dict.fromkeys(memory_picture.KINDS, GIB)
    bars = [
        Bar("far", parts | {"state": 90 * GIB}, None, "out of memory"),
        Bar("near", parts, int(5.5 * GIB)),
        Bar("x", parts),
    ]
    memory_picture.draw(bars, 4 * GIB, "source.json", tmp_path / "x.png")
    (figure,) = drawn
    plots.plt.close(figure)
    whole, above = figure.axes
    found = texts(figure)
    assert "94.00 predicted" in found
    assert "5.50 measured, 1.100 of predicted" in found
    assert "5.50 measured (+4.50), 1.100 of predicted" in found
    assert "did not fit" in found
    assert found.count("not measured") == 2
    assert "floor 4.00" in found
    assert [label.get_text() for label in above.get_yticklabels()] == ["near", "x"]
    widths = [bar.get_width() for bar in whole.patches]
    assert sum(widths[:5]) == pytest.approx(94)
    assert 5.5 in widths
    assert figure.texts[0].get_text() == "source.json"


def test_the_command_draws_and_names_its_sources(tmp_path, capsys):
    measured = tmp_path / "residency-7b.json"
    measured.write_text(json.dumps(run(stream_K32={"peak_bytes": 15_000_000_000})))
    out = tmp_path / "memory.png"
    memory_picture.main(["--measured", str(measured), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "measured 13.97 GiB" in printed
    assert "floor with resident weights" in printed
    assert memory_picture.describe(predict.OUT, PREDICTED).startswith(
        "bench/results/memory-predicted.json, commit "
    )
    assert memory_picture.describe(measured, run()).endswith("commit abc, a GPU")


def test_errors_are_one_sentence(tmp_path):
    for arguments in (
        ["--measured", str(tmp_path / "absent.json")],
        ["--predicted", str(REPO / "pyproject.toml")],
    ):
        with pytest.raises(SystemExit) as ended:
            memory_picture.main([*arguments, "--out", str(tmp_path / "x.png")])
        assert str(ended.value).startswith("error: ")
    assert not (tmp_path / "x.png").exists()
