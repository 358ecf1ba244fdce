"""The pool of processes: results by rank; however a rank fails, that is told and does not reach the next run."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from pool import Failure, RanksFailed, fresh_pool


def summed(group, offset):
    value = torch.tensor([dist.get_rank(group) + offset], dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return dist.get_rank(group), group.size(), value


def raises_on(group, bad):
    if dist.get_rank(group) == bad:
        raise ValueError("this rank's own fault")
    dist.all_reduce(torch.ones(1), group=group)


def sleeps_on(group, bad):
    if dist.get_rank(group) == bad:
        sleeping_place()
    return dist.get_rank(group)


def sleeping_place():
    time.sleep(60)


def killed_on(group, bad):
    if dist.get_rank(group) == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1), group=group)


def one_more_on(group, bad):
    if dist.get_rank(group) == bad:
        dist.all_reduce(torch.ones(3), group=group, async_op=True)


def process(group):
    return os.getpid(), dist.get_world_size(), torch.get_num_threads()


def unpicklable(group):
    return lambda: None


def assert_works(pool):
    assert [value[2].item() for value in pool.run(3, summed, 1)] == [6.0] * 3


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_results_come_back_by_rank(pool, world):
    results = pool.run(world, summed, 0.5)
    assert [result[:2] for result in results] == [(rank, world) for rank in range(world)]
    assert {result[2].item() for result in results} == {sum(rank + 0.5 for rank in range(world))}


def test_processes_are_kept_between_runs(pool):
    first = pool.run(4, process)
    assert pool.run(4, process) == first
    pids, worlds, threads = zip(*first, strict=True)
    assert len(set(pids)) == 4
    assert set(worlds) == {4}
    assert set(threads) == {1}


def test_an_exception_comes_back_with_its_traceback_and_where_the_others_wait(pool):
    with pytest.raises(RanksFailed, match="this rank's own fault") as raised:
        pool.run(3, raises_on, 1, grace=0.5)
    text = str(raised.value)
    assert "raises_on failed on rank 1, 0, 2 of 3; no answer from rank 0, 2" in text
    assert "in raises_on" in raised.value.outcomes[1].details
    assert all("all_reduce" in raised.value.outcomes[rank].details for rank in (0, 2))
    assert_works(pool)


def test_a_rank_that_does_not_answer_is_killed_and_named(pool):
    began = time.monotonic()
    outcomes = pool.outcomes(2, sleeps_on, 1, timeout=1.0)
    assert time.monotonic() - began < 20
    assert outcomes[0] == 0
    assert outcomes[1].kind == "no answer"
    assert "in sleeping_place" in outcomes[1].details
    assert_works(pool)


def test_a_rank_that_dies_is_named_and_the_others_say_what_they_met(pool):
    with fresh_pool(2) as own:
        outcomes = own.outcomes(2, killed_on, 1, timeout=30)
        assert outcomes[1].kind == "died"
        assert outcomes[1].message == "exit code -9"
        assert isinstance(outcomes[0], Failure)
        assert outcomes[0].kind in ("RuntimeError", "DistBackendError")
    assert_works(pool)


def test_a_collective_that_one_rank_makes_alone_is_found(pool):
    outcomes = pool.outcomes(2, one_more_on, 0, timeout=2.0)
    assert any(isinstance(given, Failure) for given in outcomes)
    assert_works(pool)


def test_a_result_that_cannot_be_pickled_is_a_failure(pool):
    with pytest.raises(RanksFailed, match="pickle"):
        pool.run(1, unpicklable)


def test_fresh_processes_have_a_default_group_of_their_own():
    with fresh_pool(3) as own:
        pids, worlds, _ = zip(*own.run(3, process), strict=True)
    assert worlds == (3, 3, 3)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_world_that_is_too_large_is_refused(pool):
    with pytest.raises(ValueError, match="world=5 is not allowed"):
        pool.run(5, process)
