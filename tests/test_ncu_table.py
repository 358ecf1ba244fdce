"""The table of Nsight Compute's CSV. The samples have the form of what ncu writes; their figures are made up."""

import json
import re
import sys
from pathlib import Path

import pytest
from nsight import METRICS

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import ncu_table  # noqa: E402

DATA = Path(__file__).parent / "data"
RAW = (DATA / "ncu-raw.csv").read_text()
DETAILS = (DATA / "ncu-details.csv").read_text()
HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'


def rows(text, **options):
    return ncu_table.rows_of(ncu_table.read(text, "sample.csv"), **options)


def one(name, unit, value):
    """What the table has for a report of one metric."""
    launch = ncu_table.read(f'{HEAD}"0","1","kernel","","{name}","{unit}","{value}"\n', "sample.csv")
    return launch[0].metrics.get(name)


def test_a_launch_of_the_raw_page_has_all_that_was_collected():
    first = rows(RAW)[0]
    assert first.target == "wgrad-tma q K=32 T=1024"
    assert first.kernel == "wgrad_kernel"
    assert first.time_us == pytest.approx(8.192)
    assert first.tensor_pct == 30.75  # of all multiprocessors, not of the busy ones
    assert (first.read_bytes, first.written_bytes) == (8650752, 1048576)
    assert first.gbytes_per_s == pytest.approx((8650752 + 1048576) / 8192)
    assert (first.memory_pct, first.l2_pct) == (24.5, 31.25)
    assert (first.registers, first.occupancy_pct) == (154, 6.25)
    assert list(first.stalls.items()) == [("long_scoreboard", 2.5), ("gmma", 1.2), ("wait", 0.75)]


def test_what_ncu_did_not_collect_is_not_available_and_no_zero():
    cublas = rows(RAW)[1]
    assert cublas.occupancy_pct is None
    assert ncu_table.cells(cublas)[ncu_table.COLUMNS.index("occupancy")] == "n/a"
    bare = rows(f'{HEAD}"0","1","kernel","","launch__grid_size","","132"\n')[0]
    assert ncu_table.cells(bare)[2:] == ["n/a"] * (len(ncu_table.COLUMNS) - 2)


def test_launches_of_a_range_are_shown_one_by_one_and_together():
    found = rows(RAW)
    assert [row.kernel for row in found[4:]] == ["all 2 launches"]
    fill, product, both = found[2:]
    assert fill.target == product.target == both.target == "wgrad-split q K=32 T=1024"
    assert both.time_us == pytest.approx(8.192)
    assert both.read_bytes == 8650752 + 512
    assert both.tensor_pct == pytest.approx(40 * 7168 / 8192)  # each by its time
    assert both.memory_pct == pytest.approx((28 * 7168 + 0.1 * 1024) / 8192)
    assert both.registers is None
    assert ncu_table.short(fill.kernel) == "at::native::vectorized_elementwise_kernel..."
    assert ncu_table.short("void reduce<(int)4, float>(float const*, int)") == "reduce<(int)4, float>"


def test_a_sum_over_launches_needs_all_of_them():
    damaged = RAW.replace('"8,650,752","1,048,576","28.00"', '"n/a","1,048,576","28.00"')
    assert damaged != RAW
    both = rows(damaged)[-1]
    assert (both.read_bytes, both.gbytes_per_s) == (None, None)
    assert both.written_bytes == 1048576


def test_the_page_of_details_is_read_by_its_labels_and_in_scaled_units():
    first, second = rows(DETAILS)
    assert first.time_us == pytest.approx(1370)
    assert first.read_bytes == pytest.approx(2.95e9)
    assert first.written_bytes == pytest.approx(2.53e9)
    assert first.gbytes_per_s == pytest.approx(5.48e9 / 1370 / 1e3)
    assert (first.registers, first.occupancy_pct) == (40, 58.25)
    assert first.stalls == {"long_scoreboard": 31.5, "wait": 1.5}
    assert second.time_us == pytest.approx(980.5)
    assert second.read_bytes is None


@pytest.mark.parametrize(
    ("unit", "text", "microseconds"),
    [
        ("nsecond", "1,234,567", 1234.567),
        ("ns", "500", 0.5),
        ("usecond", "12.25", 12.25),
        ("us", "1,000.5", 1000.5),
        ("msecond", "1.5", 1500),
        ("ms", "0.25", 250),
        ("second", "2", 2e6),
        ("s", "1e-3", 1e3),
    ],
)
def test_times_of_every_unit(unit, text, microseconds):
    assert one(ncu_table.TIME, unit, text) == pytest.approx(microseconds)


@pytest.mark.parametrize(("unit", "by"), [("byte", 1), ("Kbyte", 1e3), ("Mbyte", 1e6), ("Gbyte", 1e9)])
def test_sizes_of_every_unit(unit, by):
    assert one(ncu_table.READ, unit, "1,024.5") == pytest.approx(1024.5 * by)


@pytest.mark.parametrize("text", ["", "n/a", "N/A", "nan", "-nan", "inf", "(!) n/a", "(!) nan"])
def test_values_that_are_none(text):
    assert one(ncu_table.TIME, "ns", text) is None


def test_instances_after_a_value_are_not_part_of_it():
    assert one(ncu_table.READ, "byte", "96 (32; 64)") == 96


@pytest.mark.parametrize("text", ["1.234,5", "65,77", "27.595.520", "12,34", "0x10", "fast"])
def test_a_number_of_another_locale_is_refused_and_not_guessed(text):
    with pytest.raises(ValueError, match=r"sample\.csv, line 2: gpu__time_duration\.sum is .*LC_ALL=C"):
        one(ncu_table.TIME, "ns", text)


@pytest.mark.parametrize(
    ("name", "unit"), [(ncu_table.TIME, "cycle"), (ncu_table.READ, "KiB"), (ncu_table.L2, "")]
)
def test_an_unknown_unit_is_refused(name, unit):
    with pytest.raises(ValueError, match=re.escape(f"{name} is in {unit!r}; known are")):
        one(name, unit, "12")


def test_rate_by_the_speed_that_is_given():
    assert rows(RAW, peak=4800)[0].memory_pct == pytest.approx(100 * 9699328 / 8.192e-6 / 4.8e12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no CSV of ncu"),
        ("time,speed\n1,2\n", "is no CSV of ncu"),
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n",
            "ncu said: ==ERROR== ERR_NVGPUCTRPERM",
        ),
        (HEAD, "holds no launch"),
        (RAW.splitlines()[4] + "\n", "no row of units"),
        ("\n".join(RAW.splitlines()[:6]), "holds no launch"),
        ("\n".join(RAW.splitlines()[4:5] + RAW.splitlines()[6:]), "no row of units"),
        (RAW[: RAW.index('"168"')], "cells, but the header has 30"),
        (
            RAW[: RAW.rindex("8,650,752") + 3],
            "cut off or damaged",
        ),
        (HEAD + '"x","1","kernel","","a__b","","1"\n', "ID is 'x'"),
        (HEAD + '"0","1","kernel","","a__b","","1","2"\n', "8 cells, but the header has 7"),
        (HEAD + '"0","1","kernel",""\n', "4 cells, but the header has 7"),
    ],
)
def test_what_is_no_report_or_a_damaged_one_is_refused(text, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        rows(text)
    assert "sample.csv" in str(raised.value)


def test_without_ranges_the_kernels_stand_alone():
    text = RAW.replace("Push/Pop_Range", "Something")
    found = rows(text)
    assert len(found) == 4
    assert {row.target for row in found} == {""}


def test_the_command_prints_the_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    ncu_table.main([str(DATA / "ncu-raw.csv"), "--json", str(out)])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + 5 + 1
    assert re.match(r"wgrad-tma q K=32 T=1024 +wgrad_kernel +8\.2 +30\.8 % ", printed[1])
    result = json.loads(out.read_text())
    assert result["kind"] == "profiled"
    assert result["versions"]["torch"]
    assert [row["kernel"] for row in result["rows"]][-1] == "all 2 launches"
    assert result["rows"][0]["time_us"] == pytest.approx(8.192)


def test_the_markdown_has_a_cell_for_every_column(capsys):
    ncu_table.main([str(DATA / "ncu-details.csv"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2
    assert {line.count("|") for line in lines} == {len(ncu_table.COLUMNS) + 1}
    assert "1370.0" in lines[2]


def test_errors_are_one_sentence(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    for arguments in ([str(other)], [str(tmp_path / "absent.csv")]):
        with pytest.raises(SystemExit) as ended:
            ncu_table.main(arguments)
        assert str(ended.value).startswith("error: ")
        assert str(tmp_path) in str(ended.value)
    for arguments, words in (([], "--metrics is needed"), ([str(other), "--peak", "0"], "--peak is 0.0")):
        with pytest.raises(SystemExit):
            ncu_table.main(arguments)
        assert words in capsys.readouterr().err


def test_the_metrics_that_are_asked_for_exist_and_are_read(capsys):
    ncu_table.main(["--metrics"])
    assert capsys.readouterr().out.strip().split(",") == list(METRICS)
    assert set(METRICS) <= {*ncu_table.UNITS, ncu_table.REGISTERS}
