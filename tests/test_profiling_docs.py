"""The page on profiling: its figures are those of the committed run, its lines for Nsight have options that exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import small, walk
from nsight import check_nsight, included
from torch.profiler import ProfilerActivity, profile

import chunkft
from chunkft import tracing
from chunkft.cli.arguments import parse
from chunkft.optim.report import human_bytes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "profiling.md"


def lines():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    found = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in found if line.split()[0] in ("nsys", "ncu")]


def test_both_programs_have_recipes_that_start_chunkft_profile():
    started = [check_nsight(words) for words in lines()]
    programs = [words[0] for words in lines()]
    assert programs.count("nsys") >= 2
    assert programs.count("ncu") >= 2
    for words in filter(None, started):
        assert words[:2] == ["chunkft", "profile"]
        command = parse(words[1:])
        assert command.profile.nsight


def test_what_they_start_can_be_run(capsys):
    for words in filter(None, map(check_nsight, lines())):
        with pytest.raises(SystemExit) as ended:
            parse([*words[1:], "--help"])
        assert ended.value.code == 0
    assert "--nsight" in capsys.readouterr().out


def test_the_figures_of_the_page_are_those_of_the_run():
    peak = json.loads((ROOT / "bench" / "results" / "profile-cpu.json").read_text())["peak"]
    quoted = re.search(
        r"The peak is (.+?), in the (\w+) pass of step (\d+)\.", re.sub(r"<!--.*?-->", "", PAGE.read_text())
    )
    assert quoted is not None
    assert quoted.groups() == (human_bytes(peak["nbytes"]), peak["phase"], str(peak["step"]))


def test_the_filters_of_ncu_take_in_ranges_that_a_run_emits():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    with tracing.enabled(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        walk(optimizer, model, 3)
    names = {event.name for event in profiler.events() if event.name.startswith("chunkft/")}
    filters = [words[words.index("--nvtx-include") + 1] for words in lines() if "--nvtx-include" in words]
    taken = [{name for name in names if included(configuration, name)} for configuration in filters]
    backward = {name for name in names if name.startswith("chunkft/backward ")}
    assert backward in taken
    assert {"chunkft/step"} in taken


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nsys profile --tracee=cuda chunkft profile", "--tracee is not known"),
        ("nsys profile --trace=cuda,gpu chunkft profile", "--trace does not take 'cuda,gpu'"),
        ("nsys profile --trace cuda chunkft profile", "--trace does not take None"),
        ("nsys profile --sample=none", "without a program"),
        ("nsys stats --report kernels steps.nsys-rep", "--report does not take 'kernels'"),
        ("nsys analyse steps.nsys-rep", "'nsys analyse' is not known"),
        ("ncu --set everything chunkft profile", "--set does not take 'everything'"),
        ("ncu --nvtx --nvtx-include chunkft/step/ chunkft profile", "--nvtx-include does not take"),
        ("ncu --nvtx --nvtx-include step chunkft profile", "--nvtx-include does not take"),
    ],
)
def test_the_check_names_what_is_wrong(line, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_nsight(shlex.split(line))


def test_nvtx_is_that_of_torch():
    # what the fake of the other tests stands for
    assert callable(torch.cuda.nvtx.range_push)
    assert callable(torch.cuda.nvtx.range_pop)
