"""Tables of measurements: keyed by all that speed depends on; the least of several; neighbours that agree."""

import json
from dataclasses import fields, replace

import pytest

from chunkft.kernels import measured
from chunkft.kernels.heuristics import Config, Problem
from chunkft.kernels.targets import TARGETS

H100, A100 = TARGETS["h100"], TARGETS["a100"]
PLAIN = Problem(4096, 500, 4096)
FAST, SLOW = Config(128, 128, 64, 8, 3, tma=True), Config(64, 128, 64, 4, 3)


def write(tmp_path, measurements, capability=90, version=measured.FORMAT):
    path = tmp_path / "table.json"
    entries = [measured.entry(*one) for one in measurements]
    path.write_text(json.dumps({"format": version, "family": capability, "entries": entries}))
    return path


def table(tmp_path, *measurements):
    return measured.load(write(tmp_path, measurements))


def test_about_the_same_sizes_find_the_measurement(tmp_path):
    found = table(tmp_path, (PLAIN, FAST, 1.2))
    assert found.find(PLAIN, H100) == (FAST, 1.2)
    assert found.find(replace(PLAIN, tokens=4000, rows=530), H100) == (FAST, 1.2)
    assert found.find(replace(PLAIN, tokens=5800), H100) is None
    assert found.find(PLAIN, A100) is None


@pytest.mark.parametrize(
    "change",
    [
        {"itemsize": 4},
        {"out_itemsize": 4},
        {"row_block": 64},
        {"col_block": 64},
        {"row_shift": 3},
        {"col_shift": 5},
        {"described": False},
        {"accumulate": True},
        {"parts": (250, 250)},
        {"parts": (250, 250), "shared": True},
    ],
    ids=str,
)
def test_what_speed_depends_on_is_told_apart(tmp_path, change):
    other = replace(PLAIN, **change)
    assert table(tmp_path, (PLAIN, SLOW, 1.2)).find(other, H100) is None
    assert table(tmp_path, (other, SLOW, 1.2)).find(PLAIN, H100) is None
    both = table(tmp_path, (PLAIN, SLOW, 1.2), (other, SLOW, 0.7))
    assert both.find(PLAIN, H100)[1] == 1.2
    assert both.find(other, H100)[1] == 0.7


def test_every_fact_of_a_problem_is_keyed_or_known_not_to_matter(tmp_path):
    # whoever gives Problem a new fact has to decide about it
    assert {field.name for field in fields(Problem)} == {
        "tokens", "rows", "cols", "itemsize", "out_itemsize", "row_block", "col_block", "row_shift", "col_shift",
        "described", "accumulate", "tf32", "parts", "shared",
    }  # fmt: skip
    single = replace(PLAIN, itemsize=4, out_itemsize=4)
    found = table(tmp_path, (single, SLOW, 1.5))
    assert found.find(single, H100) is not None
    assert found.find(replace(single, tf32=True), H100) is None
    assert table(tmp_path, (PLAIN, SLOW, 1.5)).find(replace(PLAIN, tf32=True), H100) is not None
    # any start that is no multiple of 8 is as bad as any other
    shifted = table(tmp_path, (replace(PLAIN, row_shift=3), SLOW, 1.5))
    assert shifted.find(replace(PLAIN, row_shift=5), H100) is not None


def test_of_several_measurements_of_a_bucket_the_least_counts(tmp_path):
    near = replace(PLAIN, rows=520)
    for order in ([(PLAIN, FAST, 1.4), (near, SLOW, 0.8)], [(near, SLOW, 0.8), (PLAIN, FAST, 1.4)]):
        assert table(tmp_path, *order).find(PLAIN, H100) == (SLOW, 0.8)


def test_between_two_measurements_the_smaller_counts(tmp_path):
    few, many = replace(PLAIN, tokens=1024), replace(PLAIN, tokens=4096)
    found = table(tmp_path, (few, FAST, 1.4), (many, SLOW, 1.2))
    for tokens in (1500, 2048, 3000):
        assert found.find(replace(PLAIN, tokens=tokens), H100) == (SLOW, 1.2)
    for tokens in (512, 8192):
        assert found.find(replace(PLAIN, tokens=tokens), H100) is None
    # only along one dimension, and not across more than a factor of 4
    assert found.find(replace(PLAIN, tokens=2048, rows=1000), H100) is None
    apart = table(tmp_path, (few, FAST, 1.4), (replace(PLAIN, tokens=16384), FAST, 1.4))
    assert apart.find(replace(PLAIN, tokens=4096), H100) is None


def test_of_pairs_along_several_dimensions_the_smallest_counts(tmp_path):
    along = [
        (replace(PLAIN, tokens=2048), FAST, 1.4),
        (replace(PLAIN, tokens=8192), FAST, 1.3),
        (replace(PLAIN, cols=2048), SLOW, 0.9),
        (replace(PLAIN, cols=8192), FAST, 1.2),
    ]
    assert table(tmp_path, *along).find(PLAIN, H100) == (SLOW, 0.9)
    assert table(tmp_path, *along[:3]).find(PLAIN, H100) == (FAST, 1.3)


def test_groups_are_found_by_the_sizes_of_their_slices(tmp_path):
    group = Problem(4096, 192, 4096, described=False, parts=(128, 32, 32), shared=True)
    found = table(tmp_path, (group, SLOW, 1.5), (replace(group, tokens=1024), SLOW, 1.4))
    assert found.find(replace(group, parts=(32, 128, 32)), H100) == (SLOW, 1.5)
    assert found.find(replace(group, tokens=2048), H100) == (SLOW, 1.4)
    assert found.find(replace(group, parts=(64, 64, 64)), H100) is None
    assert found.find(replace(group, shared=False), H100) is None


def test_an_illegal_configuration_is_not_handed_out(tmp_path):
    wide = Config(128, 128, 64, 8, 5)  # 5 stages fit into 9.0's shared memory, with fp32 results they do not
    gathered = replace(PLAIN, row_block=64)
    assert table(tmp_path, (gathered, replace(wide, tma=True), 1.5)).find(gathered, H100) == (None, 1.5)


def test_speed_ups_are_rounded_down_to_the_margin(tmp_path):
    assert measured.entry(PLAIN, FAST, 1.02999)["speedup"] == 1.029


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2, "entries": []}',
        '{"format": 3, "family": 90, "entries": []}',
        '{"format": 2, "family": 90, "entries": [{"problem": {"tokens": 1}, "config": {}, "speedup": 1}]}',
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json is not a table of kernel configurations of format 2"):
        measured.load(path)


@pytest.mark.parametrize("speedup", [float("nan"), float("inf"), -1.0])
def test_speed_ups_that_are_none_are_refused(tmp_path, speedup):
    path = write(tmp_path, [(PLAIN, FAST, 1.0)])
    path.write_text(path.read_text().replace('"speedup": 1.0', f'"speedup": {json.dumps(speedup)}'))
    with pytest.raises(ValueError, match="is not a finite number from 0 on"):
        measured.load(path)


def test_the_first_format_is_refused_with_its_reason(tmp_path):
    path = write(tmp_path, [], version=1)
    with pytest.raises(ValueError, match="format 1 mixed aligned with misaligned slices; measure anew with"):
        measured.load(path)


def test_the_environment_names_a_table(tmp_path, monkeypatch):
    measured.for_capability.cache_clear()
    assert measured.for_capability(90) is None
    monkeypatch.setenv(measured.VARIABLE, str(write(tmp_path, [(PLAIN, FAST, 2.0)])))
    measured.for_capability.cache_clear()
    assert measured.for_capability(90).find(PLAIN, H100) == (FAST, 2.0)
    measured.for_capability.cache_clear()
