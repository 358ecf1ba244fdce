"""Accelerate and transformers' Trainer on two ranks train as one process does on the joined batch."""

import json
from collections.abc import Iterator

import accelerate_rigs
import pytest
import rigs
import torch
from pool import Pool, fresh_pool
from rigs import Case

from chunkft.integrations.transformers import ChunkTrainer


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """Two processes whose default group has no others, which is the one that accelerate takes."""
    with fresh_pool(2) as pool:
        yield pool


BY_BLOCK = {"auto_wrap_policy": "transformer_based_wrap"}
FSDP2 = BY_BLOCK
SLOW = {"timeout": 120.0}  # a process imports Trainer first
RUNS = [
    (Case("llama", 2, 4, clip=0.5, accumulate=2, steps=16), FSDP2),
    (
        Case("gpt2", 2, 4, clip=0.5, steps=16, changes={"use_cache": False}),
        {"activation_checkpointing": True, **BY_BLOCK},
    ),
    (Case("llama", 2, 4, clip=0.5, steps=16), {"cpu_ram_efficient_loading": True}),
    (Case("llama", 2, 4, clip=0.5, accumulate=2, steps=16), None),
]


@pytest.mark.parametrize(
    ("case", "plugin"), RUNS, ids=["fsdp2", "activation-checkpointing", "loaded-by-rank-0", "ddp"]
)
def test_accelerate_trains_as_one_process(two, case, plugin):
    ranks = two.run(2, accelerate_rigs.train_accelerated, case, plugin, **SLOW)
    # a checkpoint_wrapper is in the names of parameters, and not in the model of one process
    plan = json.loads(json.dumps(ranks[0].plan).replace("._checkpoint_wrapped_module", ""))
    rigs.assert_same_run(case, ranks, two.run(1, rigs.train_alone, case, plan))


def test_bf16_by_accelerate_is_bf16_by_hand(two):
    case = Case("llama", 2, 4, clip=0.5, steps=12)
    ranks = two.run(2, accelerate_rigs.train_accelerated, case, FSDP2, "bf16", **SLOW)
    by_hand = two.run(2, accelerate_rigs.train_sharded_bf16, case, **SLOW)
    rigs.assert_same_run(case, ranks, by_hand)


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_state_saved_by_two_ranks_resumes_to_the_same_bits(two, kind, tmp_path):
    case = Case("llama", 2, 3, clip=0.5, steps=12)
    plugin = {"state_dict_type": kind}
    whole = two.run(2, accelerate_rigs.train_accelerated, case, plugin, **SLOW)
    place = str(tmp_path / "state")
    first = two.run(2, accelerate_rigs.train_accelerated, case, plugin, "no", place, (0, 7), **SLOW)
    rest = two.run(2, accelerate_rigs.train_accelerated, case, plugin, "no", place, (7, 12), **SLOW)
    for one, before, after in zip(whole, first, rest, strict=True):
        assert one.losses == before.losses + after.losses
        assert one.weights == after.weights != before.weights


def test_a_scheduler_that_is_older_than_the_shards_sets_their_learning_rate(two):
    (rates, other) = two.run(2, accelerate_rigs.scheduled, **SLOW)
    assert rates == other
    assert rates == [0.5, 0.625, 0.75, 0.875, 1.0]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("fsdp1", "fsdp_version=2"),
        ("early", "call accelerator.prepare"),
        ("saved", "chunkft.integrations.accelerate.save_state"),
    ],
)
def test_what_cannot_be_is_refused_by_accelerate(two, what, sentence, tmp_path):
    for said in two.run(2, accelerate_rigs.refused, what, str(tmp_path / "saved"), **SLOW):
        assert sentence in said


TRAINERS = {
    "fsdp2": {"fsdp": True},
    "sharded-state": {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "ddp": {},
}


@pytest.mark.parametrize("changes", [TRAINERS["fsdp2"], TRAINERS["ddp"]], ids=["fsdp2", "ddp"])
def test_trainer_trains_as_one_process(two, changes, tmp_path):
    ranks = two.run(2, by_trainer, str(tmp_path), changes, **SLOW)
    logs, weights, plan, groups = ranks[0]
    assert groups == 2  # with and without decay
    ((expected, joined, _, _),) = two.run(1, by_trainer, str(tmp_path), {"plan": plan, "rows": 4}, **SLOW)
    assert ranks[1][0] == logs
    for one, other in zip(logs, expected, strict=True):
        for name, tolerance in (("loss", 2e-4), ("grad_norm", 2e-5), ("learning_rate", 0.0)):
            assert one[name] == pytest.approx(other[name], rel=tolerance), name
    assert [entry["chunk"] for entry in logs] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert max(entry["grad_norm"] for entry in logs) > accelerate_rigs.SHARED["max_grad_norm"]
    for name, value in joined.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def by_trainer(group, place, changes):
    return accelerate_rigs.train_by_trainer(group, place, **changes)


@pytest.mark.parametrize("changes", TRAINERS.values(), ids=TRAINERS)
def test_a_checkpoint_of_trainer_resumes_to_the_same_bits(two, changes, tmp_path):
    changes = {**changes, "kind": ChunkTrainer}
    saving = {**changes, "save_strategy": "steps", "save_steps": 7}
    whole = two.run(2, by_trainer, str(tmp_path), saving, **SLOW)
    place = tmp_path / "checkpoint-7"
    assert {path.name for path in tmp_path.glob("*")} == {"checkpoint-7", "checkpoint-10"}
    assert (place / "optimizer.safetensors").is_file()
    rest = two.run(2, by_trainer, str(tmp_path), {**changes, "resume": str(place)}, **SLOW)
    for (logs, weights, _, _), (all_logs, resumed, _, _) in zip(whole, rest, strict=True):
        assert [entry["loss"] for entry in all_logs] == [entry["loss"] for entry in logs]
        assert all(torch.equal(weights[name], value) for name, value in resumed.items())


def test_what_one_rank_cannot_write_is_an_error_of_all_and_leaves_nothing(two, tmp_path):
    said = two.run(2, accelerate_rigs.fail_to_save, str(tmp_path), **SLOW)
    assert all("checkpoint-3 could not be written: OSError: no space left" in text for text, _ in said)
    assert said[0][1] == ["rank 1 of the group had this error"]
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_trainer_cannot_write_are_refused_before_it_trains(two, tmp_path):
    changes = {"fsdp": True, "save_strategy": "steps"}
    for said in two.run(2, refused_by_trainer, str(tmp_path), changes, **SLOW):
        assert "use chunkft.integrations.transformers.ChunkTrainer" in said


def refused_by_trainer(group, place, changes):
    return accelerate_rigs.refused_by_trainer(group, place, **changes)
