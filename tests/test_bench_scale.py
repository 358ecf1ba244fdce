"""The benchmark of many processes: what is counted, what is held against the model, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import plain_llama, scale, scale_setup, scale_table, wire
from bench.scale_setup import Case

SIZE = plain_llama.Shape(96, 3, 144, 4, 2, 200)
GROUP = SimpleNamespace(size=lambda: 4, rank=lambda: 1)


@pytest.mark.parametrize(
    ("method", "arguments", "sent"),
    [
        ("all_to_all_single", (torch.empty(3), torch.ones(10), [1, 0, 2, 0], [4, 3, 2, 1]), 4 * 7),
        ("all_to_all_single", (torch.empty(8), torch.ones(8), [], []), 4 * 6),
        ("alltoall", ([], [torch.ones(i) for i in range(4)]), 4 * (6 - 1)),
        ("all_gather_single", (torch.empty(20), torch.ones(5)), 4 * 5 * 3),
        ("allgather", ([[torch.empty(5)] * 4], [torch.ones(5)]), 4 * 5 * 3),
        ("reduce_scatter_single", (torch.empty(2), torch.ones(8, dtype=torch.bfloat16)), 2 * 6),
        ("allreduce", ([torch.ones(8)],), 2 * 4 * 6),
        ("broadcast", ([torch.ones(2)], SimpleNamespace(rootRank=1)), 8 * 3),
        ("broadcast", ([torch.ones(2)], SimpleNamespace(rootRank=0)), 0),
        ("send", ([torch.ones(2)], 3, 0), 8),
    ],
)
def test_bytes_that_a_collective_makes_a_rank_send(method, arguments, sent):
    _, size_of = wire.METHODS[method]
    assert size_of(GROUP, *arguments) == sent


def test_small_sums_and_gathers_are_control_and_taken_begins_anew():
    found = wire.Wire()
    found.add("sum", 16)
    found.add("gather", wire.SMALL)
    found.add("exchange", 16)
    assert found.taken() == {"control": 16, "gather": wire.SMALL, "exchange": 16}
    assert found.taken() == {}
    assert wire.mean_over_ranks([{"a": 2}, {"b": 4}]) == {"a": 1, "b": 2}


def test_torch_is_left_as_it_was(tmp_path):
    kept = dict(vars(torch.distributed.ProcessGroup))
    with pytest.raises(KeyError), wire.counted():
        raise KeyError
    assert dict(vars(torch.distributed.ProcessGroup)) == kept
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rank", rank=0, world_size=1)
    try:
        torch.distributed.all_reduce(torch.ones(2))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every method with two processes, on a model whose rows are odd; its lines and its file."""
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    before = scale.SIZE
    scale.SIZE = SIZE
    try:
        scale.main(["--ranks", "2", "--chunks", "3", "--out", str(out)])
    finally:
        scale.SIZE = before
    return json.loads(out.read_text())


def test_every_method_sends_what_the_model_says_and_trains_as_one_process(measured):
    names = [found["name"] for found in measured["cases"]]
    assert names == [
        "replicas K=3 float32 W=2",
        "replicas K=3 bfloat16 W=2",
        "fsdp2 K=3 float32 W=2",
        "fsdp2 K=3 bfloat16 W=2",
        "ddp float32 W=2",
        "zero3 float32 W=2",
    ]
    for found in measured["cases"]:
        assert not scale.faults(found)
    assert {"device", "versions", "commit", "seed"} <= measured.keys()
    table = scale.table(measured)
    assert table.count("\n") == 2 + len(names)


def test_what_is_not_as_the_model_says_is_named(measured):
    found = json.loads(json.dumps(measured["cases"][0]))
    found["gaps"]["weights"] = -0.02
    found["state"]["ranks"][0] *= 2
    found["losses"]["worst"] = float("nan")
    found["of_bound"] = 1.03
    assert scale.faults(found) == [
        "replicas K=3 float32 W=2: weights -2.00% beside the model",
        next(text for text in scale.faults(found) if "bytes of state a rank, the model has" in text),
        "replicas K=3 float32 W=2: losses differ by nan from those of one process",
        "replicas K=3 float32 W=2: 1.030 of the bytes that are promised at most",
    ]


def test_a_counter_that_sees_less_is_noticed(measured):
    """Half of the gradients of one rank are left out."""
    case = Case("ddp", 2)
    setting = scale_setup.setting_of(case, SIZE)
    sent = scale.scale_model.traffic(setting).gradients
    state = scale.scale_model.memory(setting).state * 2 / 3
    records = [
        {"losses": [1.0] * 8, "wire": {"sum": size}, "said": {}, "memory": {"state_active": state}}
        for size in (sent, sent / 2)
    ]
    found = scale.judged(case, records, SIZE)
    assert found["gaps"] == {"gradients": pytest.approx(-0.25)}
    assert any("gradients -25.00% beside the model" in text for text in scale.faults(found))


def test_ranks_that_do_not_divide_the_batch_are_refused(capsys):
    with pytest.raises(SystemExit):
        scale.main(["--ranks", "3"])
    assert "--ranks 3 is not allowed; needs a divisor of 8 from 2 on" in capsys.readouterr().err


def test_processes_that_take_too_long_are_ended():
    with pytest.raises(TimeoutError, match="2 processes were not done after 0 s"):
        scale.run(2, [Case("ddp", 2)], SIZE, limit=0)


def test_the_command_of_predictions_writes_every_case(tmp_path, capsys):
    out = tmp_path / "predicted.json"
    scale_table.main(["--models", "8B", "--ranks", "1", "2", "8", "64", "1024", "--out", str(out)])
    result = json.loads(out.read_text())
    assert len(result["cases"]) == 7 * 5 - 3
    assert len(capsys.readouterr().out.splitlines()) == 33
    for table in (scale_table.bytes_table, scale_table.memory_table, scale_table.limits_table):
        assert "8B" in table(result)
    assert "| in host memory | 328.5 |" in scale_table.cards_table(result)
