"""Checkpoints of many processes: resumed bit by bit, carried to other numbers of them, safe when something fails."""

import os
import re
import shutil

import checkpoint_rigs as rigs
import pytest
import torch
from checkpoint_rigs import WAYS, joined_losses, rows
from pool import Failure, fresh_pool
from rigs import BACKWARD, STREAM, Case

import chunkft
from chunkft import Chunk, ChunkPlan, Slice
from chunkft.optim.recut import merged

EIGHT = {"state_bits": 8}
BF16 = {"master": "residual"}
BEFORE, AFTER = 7, 6  # intervals are of two steps: the seventh is the first of one

SAME = [
    ("replicas", Case("llama-tied", 2, 3, clip=0.5), WAYS),
    ("replicas", Case("llama", 3, 2, accumulate=2, options=EIGHT), ("file", "directory")),
    ("replicas", Case("llama", 2, 3, options=BF16, dtype=torch.bfloat16), ("file", "part")),
    ("replicas", Case("llama", 2, 3, options=STREAM), ("file", "later")),
    ("sharded", Case("gpt2", 3, 3, options={"always_active": "head"}), ("file", "with model")),
    ("sharded", Case("llama", 2, 2, options={**BACKWARD, **EIGHT}), ("merged", "directory")),
]


@pytest.mark.parametrize(("kind", "case", "ways"), SAME, ids=str)
def test_the_same_ranks_go_on_with_the_same_bits(pool, tmp_path, kind, case, ways):
    undisturbed = pool.run(case.world, rigs.run, case, kind, tmp_path, BEFORE, AFTER)
    resumed = pool.run(case.world, rigs.resume, case, kind, tmp_path, ways, BEFORE, AFTER, case.world)
    for way in ways:
        for rank, expected in enumerate(undisturbed):
            found = resumed[rank][way]
            assert found.losses == expected.losses, (way, rank)
            assert found.weights == expected.weights, (way, rank)
            assert found.kept == expected.kept
        assert_same_rows(resumed[0][way].whole, undisturbed[0].whole)
    total = sum(run.kept for run in undisturbed)
    assert max(run.kept for run in undisturbed) < 0.7 * total, "ranks hold more than a share"


def assert_same_rows(found, expected):
    found, expected = rows(found), rows(expected)
    assert found.keys() == expected.keys()
    assert any(tensor.any() for tensor in expected.values())
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


MOVES = [
    # (saved by, world, loaded by, world, chunks, ways)
    ("replicas", 2, "alone", 1, 3, ("file", "directory", "merged")),
    ("replicas", 2, "replicas", 3, 3, ("file", "directory", "with model")),
    ("replicas", 2, "replicas", 4, 5, ("directory",)),
    ("replicas", 2, "sharded", 3, 3, ("file",)),
    ("alone", 1, "replicas", 3, 3, ("file", "directory")),
    ("alone", 1, "sharded", 2, 2, ("file",)),
    ("sharded", 3, "alone", 1, 3, ("file", "with model")),
    ("sharded", 3, "sharded", 2, 4, ("directory", "merged")),
    ("sharded", 3, "replicas", 2, 3, ("file",)),
]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """Of each kind and number of ranks the folder of a run with three chunks, and the run."""
    known = {}

    def run(kind, world):
        if (kind, world) not in known:
            folder = tmp_path_factory.mktemp("saved")
            case = Case("llama", world, 3)
            known[kind, world] = folder, pool.run(world, rigs.run, case, kind, folder, BEFORE, AFTER)
        return known[kind, world]

    return run


@pytest.mark.parametrize(("kind", "world", "other", "others", "chunks", "ways"), MOVES, ids=str)
def test_state_moves_to_other_ranks_and_chunks(pool, saved, kind, world, other, others, chunks, ways):
    folder, undisturbed = saved(kind, world)
    case = Case("llama", others, chunks)
    resumed = pool.run(others, rigs.resume, case, other, folder, ways, BEFORE, AFTER, world)
    for way in ways:
        assert_same_rows(resumed[0][way].whole, undisturbed[0].whole)
        found = joined_losses([rank[way] for rank in resumed])
        if "sharded" in (kind, other) or chunks != 3:
            # chunks are other ones: the run goes on at the beginning of the sweep
            assert resumed[0][way].position == (3 // 3 * chunks, 0, 0)
            assert all(loss < joined_losses(undisturbed)[0] * 1.05 for loss in found)
        else:
            assert resumed[0][way].position == (3, 1, 0)
            assert found == pytest.approx(joined_losses(undisturbed), rel=1e-6)


def test_hybrid_shards_are_written_once_and_go_on_with_the_same_bits(pool, tmp_path):
    case = Case("llama", 4, 3)
    undisturbed = pool.run(4, rigs.run, case, "hybrid", tmp_path, 5, 4)
    ways = ("file", "later", "with model")
    resumed = pool.run(4, rigs.resume, case, "hybrid", tmp_path, ways, 5, 4, 4)
    for way in ways:
        for rank, expected in enumerate(undisturbed):
            assert (resumed[rank][way].losses, resumed[rank][way].weights) == (
                expected.losses,
                expected.weights,
            )
    # the two ranks of one group of shards write, the two with the same shards do not
    assert sorted(os.listdir(tmp_path / "directory")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    (alone,) = pool.run(
        1, rigs.resume, Case("llama", 1, 3), "alone", tmp_path, ("file", "directory"), 5, 1, 4
    )
    for run in alone.values():
        assert_same_rows(run.whole, undisturbed[0].whole)


@pytest.mark.parametrize(("kind", "world", "blocks"), [("replicas", 3, 32 << 20), ("sharded", 2, 1 << 10)])
def test_a_full_disk_on_the_writing_rank_is_an_error_on_all(pool, tmp_path, kind, world, blocks):
    errors = pool.run(world, rigs.fill_disk, Case("llama", world, 2), kind, tmp_path, blocks)
    assert len(errors[0]) > 8
    for found in errors[0][:-1]:
        assert found[0] == "OSError"
        assert "cannot be written: No space left" in found[1]
        assert str(tmp_path / "file") in found[1]
    assert errors[0][-1] == ("nothing", "")
    assert all(found == errors[0] for found in errors)


def test_a_rank_that_cannot_read_its_state_is_an_error_on_all(pool, tmp_path):
    errors = pool.run(3, rigs.lose_state, Case("llama", 3, 2), tmp_path)
    for rank, found in enumerate(errors):
        kind = "MemoryError" if rank == 1 else "RuntimeError"
        for name, message in found:
            assert name == kind
            assert "no page can be read" in message


def test_what_does_not_fit_on_one_rank_is_refused_on_all_and_training_goes_on(pool, tmp_path):
    ranks = pool.run(3, rigs.refusals, Case("llama", 3, 2), tmp_path)
    expected = {
        "gradients": ("RuntimeError", r"save right after step\(\)"),
        "gradients in parts": ("RuntimeError", r"save right after step\(\)"),
        "gradients in a directory": ("RuntimeError", r"save right after step\(\)"),
        "other part": ("ValueError", r"is the part of rank \d of 3.*merge_states.*save_sharded"),
        "absent": ("FileNotFoundError", "absent' does not exist"),
        "broken": ("ValueError", "broken' is not a whole safetensors file"),
        "no checkpoint": ("FileNotFoundError", "does not exist, or is no checkpoint"),
        "files": ("FileExistsError", "is no checkpoint of torch"),
        "no directory": ("ValueError", r"ShardedState\(optimizer, directory\)"),
        "missing parts": ("ValueError", r"parts of ranks \[1, 2\]; needs each rank of one group of 3"),
        "mixed parts": ("ValueError", "differ in 'cursor'"),
        "different": ("ValueError", "the ranks read different checkpoints"),
    }
    for found in ranks:
        assert found.keys() == expected.keys()
        for what, (kind, message) in expected.items():
            assert found[what][0] == kind, (what, found[what])
            assert re.search(message, found[what][1]), (what, found[what])


@pytest.mark.parametrize("where", ["rank 0, file", "rank 1, file", "rank 0, directory", "rank 1, directory"])
def test_a_rank_that_is_killed_while_it_saves_leaves_the_old_checkpoint(tmp_path, where):
    case = Case("llama", 2, 2)
    with fresh_pool(2, collective_timeout=5) as pool:
        ranks = pool.outcomes(2, rigs.die_in, case, tmp_path, where, timeout=30)
    victim = int(where[5])
    assert isinstance(ranks[victim], Failure)
    kind, message = ranks[1 - victim]
    assert kind in ("RuntimeError", "OSError"), message
    assert message
    saved = tmp_path / ("file" if "file" in where else "directory")
    optimizer = chunkft.ChunkAdamW(case.model(), **case.keywords())
    load = chunkft.load_checkpoint if "file" in where else chunkft.load_sharded
    load(optimizer, saved)
    assert optimizer.updates == 5
    if "directory" in where:
        # what was left half-written goes with the next checkpoint
        chunkft.save_sharded(optimizer, saved)
        assert sorted(os.listdir(tmp_path)) == ["directory", "weights"]
        chunkft.load_sharded(optimizer, saved)


def test_windows_of_shards_that_make_up_a_parameter_count_as_the_parameter():
    whole = ChunkPlan((Chunk(0, (Slice("w", 0, 0, 4, (7, 3)), Slice("b", None, 0, 5, (5,)))),))
    windows = [Slice("b", 0, 0, 2, (5,)), Slice("w", 0, 0, 4, (7, 3)), Slice("b", 0, 2, 5, (5,))]
    assert merged(ChunkPlan((Chunk(0, tuple(windows)),))) == merged(whole)
    assert merged(ChunkPlan((Chunk(0, tuple(windows[:2])),))) != merged(whole)


def test_a_damaged_directory_is_refused_and_changes_nothing(saved, tmp_path):
    folder, _ = saved("replicas", 2)
    case = Case("llama", 1, 3)
    optimizer = chunkft.ChunkAdamW(case.model(), **case.keywords())
    before = optimizer.state_dict()
    for path in sorted((folder / "directory").iterdir()):
        copy = tmp_path / path.name
        shutil.copytree(folder / "directory", copy)
        data = path.read_bytes()
        for damage in (data[: len(data) // 2], b""):
            (copy / path.name).write_bytes(damage)
            with pytest.raises(ValueError, match="is damaged"):
                chunkft.load_sharded(optimizer, copy)
        (copy / path.name).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=r"is damaged|has no file"):
            chunkft.load_sharded(optimizer, copy)
    assert optimizer.state_dict()["cursor"] == before["cursor"]
    assert not optimizer.state_dict()["state"]
