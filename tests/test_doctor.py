"""`chunkft doctor` tells what there is, measures it, and works without a GPU."""

import json
import os
import resource

import pytest
import torch

from chunkft.cli import main
from chunkft.cli.arguments import parse
from chunkft.cli.doctor import examine, lines_of
from chunkft.cli.settings import DoctorSettings
from chunkft.streaming import memory_budget


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return examine(DoctorSettings(dir=str(tmp_path_factory.mktemp("disk")), mib=4))


def test_options_are_parsed():
    command = parse(["doctor", "--dir", "d", "--mib", "8", "--json", "f"])
    assert (command.name, command.doctor) == ("doctor", DoctorSettings(dir="d", mib=8, json="f"))
    assert parse(["doctor"]).doctor == DoctorSettings()


def test_facts_are_those_of_the_system(found):
    assert found["torch"] == torch.__version__
    assert found["cores"] == len(os.sched_getaffinity(0))
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    assert found["lockable_bytes"] == (None if soft == resource.RLIM_INFINITY else soft)
    budget = memory_budget()
    assert budget is not None
    assert found["memory"]["limit"] == budget["limit"]
    nodes = len(
        [name for name in os.listdir("/sys/devices/system/node") if name[:4] == "node" and name[4:].isdigit()]
    )
    assert len(found["numa_nodes"]) == nodes
    assert all(node["memory_bytes"] > 0 for node in found["numa_nodes"])
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_bandwidths_are_measured_in_bytes_per_second(found):
    # From a slow disk to the fastest memory.
    assert 1e8 < found["memcpy"] < 1e12
    assert 1e6 < found["disk"]["write"] < 1e12
    assert 1e6 < found["disk"]["read"] < 1e12
    assert found["disk"]["free_bytes"] > 0
    for gpu in found["gpus"]:
        assert 1e8 < gpu["link"]["load"] < 1e12
        assert gpu["link"]["both"] < 3 * max(gpu["link"]["load"], gpu["link"]["store"])


def test_everything_printed_is_written_too(tmp_path, capsys):
    target = tmp_path / "machine.json"
    assert main(["doctor", "--mib", "1", "--dir", str(tmp_path), "--json", str(target)]) == 0
    text = capsys.readouterr().out
    written = json.loads(target.read_text())
    assert text.splitlines() == [*lines_of(written), f"written: {target}"]
    for word in ("chunkft", "processor", "driver", "gpu", "memcpy", "memory", "lockable", "disk"):
        assert f"{word} " in text
    assert list(tmp_path.iterdir()) == [target]


def test_a_gpu_and_its_link_are_told(found):
    link = {"load": 54.2e9, "store": 53.1e9, "both": 88e9, "pageable_load": 9e9, "pageable_store": 8e9}
    gpu = {
        "name": "H200",
        "memory_bytes": 141 << 30,
        "compute_capability": "9.0",
        "numa_node": 1,
        "link": link,
    }
    driver = {"library": "libcuda.so.1", "cuda_version": "13.0"}
    text = "\n".join(lines_of(found | {"gpus": [gpu], "driver": driver, "torch_cuda": "12.8"}))
    assert "H200, 141.0 GiB, sm 9.0, NUMA node 1" in text
    assert "to the GPU 54.2 GB/s, back 53.1 GB/s, both at once 88.0 GB/s" in text
    assert "for CUDA up to 13.0" in text
    assert "none that torch can use" not in text
    broken = gpu | {"link": {"missing": "out of memory"}}
    assert "not measured: out of memory" in "\n".join(lines_of(found | {"gpus": [broken]}))


def test_unlimited_and_untold_memory_are_said(found):
    text = "\n".join(lines_of(found | {"lockable_bytes": None, "memory": None, "disk": None}))
    assert "lockable   as much as there is" in text
    assert "the system does not tell how much there is" in text
    assert "disk" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dir", "nowhere"], "--dir nowhere: not a directory"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: its directory does not exist"),
        (["--json", "."], "--json .: cannot be written: Is a directory"),
        (["--mib", "0"], "--mib: '0' is not a whole number of at least 1"),
        (["--mib", "1000000000", "--dir", "."], "OSError: "),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--mib", "1", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
