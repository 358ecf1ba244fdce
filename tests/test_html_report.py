"""The report shows what the result files hold, needs nothing from elsewhere, and can be read on a phone."""

import html
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import WIDER_THAN_PAGE, Browser

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import common, html_parts, html_report, html_views  # noqa: E402


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page from the committed results, and what it was made from."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    return out, html_report.build(common.RESULTS, out)


def leaves(value):
    """Scalars below a JSON value that the page has to show one by one: all but those of long series of numbers."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    elif isinstance(value, list):
        if not (html_parts.is_series(value) and len(value) > html_parts.LONG_SERIES):
            for inner in value:
                yield from leaves(inner)
    else:
        yield value


@pytest.mark.parametrize("path", sorted(common.RESULTS.rglob("*.json*")), ids=lambda p: p.name)
def test_every_value_of_a_result_file_stands_in_its_section(path, committed):
    out, results = committed
    result = next(r for r in results if r.path == path)
    page = out.read_text()
    start = page.index(f'<section id="{result.anchor}">')
    words = " ".join(text_of(page[start : page.index("</section>", start)]).split())
    data = {k: v for k, v in result.data.items() if k != "commit"}
    missing = [v for v in leaves(data) if v != "" and " ".join(html_parts.number(v).split()) not in words]
    assert missing == []
    if "commit" in html_report.facts_of(result):
        assert f"git checkout {html_report.facts_of(result)['commit'].removesuffix('-dirty')}" in words


def test_bars_have_the_lengths_of_the_numbers(committed):
    page = committed[0].read_text()
    section = page[page.index('<section id="step-cpu-json">') :]
    found = re.findall(r'class="name">([^<]*)<.*?class="f0" style="width:([\d.]+)%"', section)
    widths = {name: float(width) for name, width in found[:5]}
    variants = json.loads((common.RESULTS / "step-cpu.json").read_text())["variants"]
    for name, variant in variants.items():
        ratio = variant["sweep_mean_ms"] / variants["adamw"]["sweep_mean_ms"]
        assert widths[name] / widths["adamw"] == pytest.approx(ratio, rel=1e-3)


def test_an_unknown_form_is_shown_as_tables_and_text_is_escaped(tmp_path):
    data = {
        "command": "python -m bench.<b>",
        "odd": {"<script>alert(1)</script>": {"deep": [1, {"deeper": "x & y"}]}},
        "rows": [{"a": 1, "b": None}, {"c": True}],
        "many_ms": {"first": 2.5, "second": 7.25},
        "none": [],
    }
    (tmp_path / "odd.json").write_text(json.dumps(data))
    (tmp_path / "list.json").write_text("[17, 19]")
    out = tmp_path / "out" / "report.html"
    html_report.build(tmp_path, out)
    page = out.read_text()
    assert "<script" not in page
    for word in (
        "<script>alert(1)</script>",
        "deeper",
        "x & y",
        "7.25",
        "yes",
        "17",
        "19",
        "python -m bench.<b>",
    ):
        assert word in text_of(page)


def test_a_damaged_file_is_named_and_the_others_are_shown(tmp_path):
    (tmp_path / "good.json").write_text('{"seven": 7}')
    (tmp_path / "torn.json").write_text('{"seven": ')
    out = tmp_path / "report.html"
    ran = subprocess.run(
        [sys.executable, "-m", "bench.html_report", "--results", tmp_path, "--out", out],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torn.json" in ran.stderr
    assert "cannot be read: JSONDecodeError" in out.read_text()
    assert "seven" in out.read_text()


def test_a_folder_without_results_is_refused_and_the_old_page_stays(tmp_path):
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        html_report.build(tmp_path, out)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        html_report.build([tmp_path, tmp_path / "absent"], out)
    assert out.read_text() == "old"


def test_several_folders_keep_files_of_one_name_apart(tmp_path):
    for name, value in (("one", 111), ("two", 222)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.json").write_text(json.dumps({"value": value}))
    results = html_report.build([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    assert [r.name for r in results] == ["one/same.json", "two/same.json"]
    page = (tmp_path / "report.html").read_text()
    assert {"111", "222"} <= set(re.findall(r"\d+", page))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.31, 9.44), (-3.0, 0.004), (5.0, 5.0), (62.0, 81.3)])
def test_ticks_are_round_and_span_the_range(low, high):
    marks = html_parts.ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert 3 <= len(marks) <= 8
    assert len({round(b - a, 9) for a, b in itertools.pairwise(marks)}) == 1


def test_a_form_that_only_resembles_a_known_one_is_left_to_the_tables():
    assert html_views.pictures({"variants": {"a": {"sweep_mean_ms": "fast"}}}) == ""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(tmp_path_factory.mktemp("browser"))
    yield tab
    tab.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_renders_without_errors_requests_or_sideways_scrolling(committed, browser, width, dark):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(committed[0].as_uri(), width=width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = d.textContent.length < 1e5)")
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, browser.evaluate(
        WIDER_THAN_PAGE
    )
    assert browser.evaluate(WIDER_THAN_PAGE) == []
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [committed[0].as_uri()]
    assert browser.evaluate("document.querySelectorAll('section').length") > len(committed[1])
    # one colour scheme or the other, and text that stands out from what is behind it
    shades = browser.evaluate(
        "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
    )
    text, back = (sum(channels[:3]) / 3 for channels in shades)
    assert text - back > 120 if dark else back - text > 120


def test_the_browser_sees_errors_requests_and_wide_pages(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><link rel=icon href=data:,><img src=absent.png><div style='width:900px'>wide</div>"
        "<script>console.error('spoken'); throw new Error('thrown')</script>"
    )
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page.as_uri(), width=375)
    assert browser.evaluate("document.documentElement.scrollWidth") > 375
    assert browser.evaluate(WIDER_THAN_PAGE) == ["DIV."]
    assert all(any(word in error for error in browser.errors) for word in ("spoken", "thrown", "load failed"))
    assert any(url.endswith("absent.png") for url in browser.requests)
