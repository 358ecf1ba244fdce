"""The memory of loading and saving: never two copies of a model, measured by bench.streamed_files."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import streamed_files


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is what Linux tells")
def test_model_is_never_in_memory_twice(capsys):
    (record,) = streamed_files.run(200, threads=1, seed=1, actions=["load_and_save"])
    assert record["model"] > 2.5 * streamed_files.ALLOWED
    assert 0 <= record["beside_model"] <= streamed_files.ALLOWED
    assert "load_and_save" in capsys.readouterr().out
