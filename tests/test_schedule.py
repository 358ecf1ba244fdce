"""The schedule: which chunk is active in which interval."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft.partitions import partition
from chunkft.plan import ChunkPlan
from chunkft.schedule import SCHEDULES, active_chunk, seldom


def sweep(schedule, number, chunks, seed=0):
    return [active_chunk(schedule, number * chunks + i, chunks, seed) for i in range(chunks)]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEDULES), st.integers(0, 1000), st.integers(1, 70), st.integers(-5, 2**40))
def test_every_chunk_is_active_once_a_sweep(schedule, number, chunks, seed):
    assert sorted(sweep(schedule, number, chunks, seed)) == list(range(chunks))


def test_cyclic_goes_up_and_reverse_comes_down():
    assert [active_chunk("cyclic", n, 3) for n in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [active_chunk("reverse", n, 3) for n in range(7)] == [2, 1, 0, 2, 1, 0, 2]


def test_random_order_differs_between_sweeps_and_seeds():
    orders = {tuple(sweep("random", number, 9, seed)) for number in range(20) for seed in range(20)}
    assert len(orders) > 390


def test_random_order_is_a_pure_function_and_leaves_the_global_generator_alone():
    expected = [active_chunk("random", n, 7, 3) for n in range(70)]
    state = random.getstate()
    shuffled = list(range(70))
    random.Random(1).shuffle(shuffled)
    assert {n: active_chunk("random", n, 7, 3) for n in shuffled} == dict(enumerate(expected))
    assert random.getstate() == state


def test_random_order_is_the_same_in_every_version_of_this_package():
    # A checkpoint stores where the run stands, not the order: these may never change.
    assert sweep("random", 0, 6, seed=0) == [0, 5, 1, 4, 3, 2]
    assert sweep("random", 5, 6, seed=11) == [0, 2, 3, 1, 5, 4]


def test_random_order_favours_no_position():
    counts = [0] * 5
    for number in range(2000):
        counts[sweep("random", number, 5)[0]] += 1
    # binomial with n=2000, p=1/5: five standard deviations are 90
    assert all(abs(count - 400) < 90 for count in counts)


def test_a_callable_is_asked_for_every_interval():
    asked = []

    def lowest_twice(interval, chunks):
        asked.append((interval, chunks))
        return 0 if interval % (chunks + 1) == chunks else interval % (chunks + 1)

    assert [active_chunk(lowest_twice, n, 3) for n in range(5)] == [0, 1, 2, 0, 0]
    assert asked == [(n, 3) for n in range(5)]


@pytest.mark.parametrize("result", [-1, 4, 1.0, None, True, "0"])
def test_a_callable_that_gives_no_chunk_is_refused(result):
    with pytest.raises(ValueError, match=r"schedule returned .* for interval 7; .* 0 <= chunk < 4"):
        active_chunk(lambda interval, chunks: result, 7, 4)


@pytest.mark.parametrize("schedule", ["Cyclic", "", None, 3, ["cyclic"]])
def test_an_unknown_schedule_is_refused(schedule):
    with pytest.raises(
        ValueError,
        match=r"schedule=.* is not known; allowed are 'cyclic', 'reverse', 'random' and a callable",
    ):
        active_chunk(schedule, 0, 4)


class TestSeldom:
    def plan(self) -> ChunkPlan:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(96, 8), torch.nn.Linear(8, 64), torch.nn.Linear(64, 8))
        return partition(model, 6, row_multiple=1)

    def test_every_chunk_is_visited_and_rare_ones_once_a_round(self) -> None:
        plan = self.plan()
        rare = {chunk.index for chunk in plan if all(piece.name == "0.weight" for piece in chunk.slices)}
        often = set(range(6)) - rare
        assert len(rare) >= 2
        visit = seldom(plan, "0.*", seed=3)
        rounds = [
            [visit(turn * (len(often) + 1) + i, 6) for i in range(len(often) + 1)]
            for turn in range(2 * len(rare))
        ]
        for visited in rounds:
            assert set(visited[:-1]) == often
            assert visited[-1] in rare
        assert {visited[-1] for visited in rounds} == rare
        assert len({tuple(visited[:-1]) for visited in rounds}) > 1, "the order is drawn anew in each round"

    @pytest.mark.parametrize(
        ("pattern", "order", "words"),
        [
            ("nothing*", "random", "takes 0 of 6"),
            ("*", "random", "takes 6 of 6"),
            ("0.*", "up", "order='up'"),
        ],
    )
    def test_refuses_what_leaves_nothing_to_visit(self, pattern: str, order: str, words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            seldom(self.plan(), pattern, order)

    def test_refuses_another_number_of_chunks(self) -> None:
        with pytest.raises(ValueError, match="plan of 6 chunks, the optimizer has 5"):
            seldom(self.plan(), "0.*")(0, 5)
