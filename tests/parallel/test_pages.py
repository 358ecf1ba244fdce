"""Blocks of the pages that want several processes (those marked py) run on two."""

import re
from pathlib import Path
from unittest import mock

import accelerate_rigs
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from pool import fresh_pool
from rigs import Case
from tiny_transformers import VOCABULARY

PAGES = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(code, id=page.stem)
    for page in PAGES
    for code in re.findall(r"^```py\n(.*?)^```", page.read_text(), re.S | re.M)
]


def run_block(group, code, place):
    def on_cpu(state):
        state.device = torch.device("cpu")

    ids = torch.randint(3, VOCABULARY, (3, 2, 9), generator=torch.Generator().manual_seed(group.rank()))
    names = {"model": Case("llama", 2, 4).model(), "loader": [{"input_ids": i, "labels": i} for i in ids]}
    with (
        pytest.MonkeyPatch.context() as patch,
        accelerate_rigs.launched(group),
        mock.patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.MULTI_GPU)),
        mock.patch.object(PartialState, "set_device", on_cpu),
    ):
        patch.chdir(place)
        exec(compile(code, "page", "exec"), names)
        return names["model"].__class__.__name__


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs_on_two_processes(code, tmp_path):
    with fresh_pool(2) as pool:
        assert pool.run(2, run_block, code, str(tmp_path), timeout=120.0) == ["FSDPLlamaForCausalLM"] * 2
    saved = {path.name for path in tmp_path.rglob("*")}
    assert saved & {"chunkft.safetensors", "optimizer.safetensors"}


def test_there_are_blocks_for_accelerate_and_trainer():
    assert [block.id for block in BLOCKS] == ["accelerate", "transformers"]
