"""Random programs train like masked dense training, and the fuzzer that says so can fail."""

import json

import pytest
import torch
from fuzz.__main__ import main
from fuzz.programs import FEATURES, Seeded, program
from fuzz.rig import Difference
from fuzz.runner import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thorough import ASKED

import chunkft

# Faults that are known and not repaired yet.
WITHOUT: tuple[str, ...] = ()
SHARDS = 10
SEEDS = 40 if ASKED else 20  # of a shard


class Drawn:
    """Choices that hypothesis makes, and makes smaller when a program fails."""

    def __init__(self, draw):
        self._draw = draw

    def choice(self, options):
        return self._draw(st.sampled_from(options))


@st.composite
def programs(draw):
    return program(Drawn(draw), WITHOUT)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_programs_train_like_masked_dense_training(shard):
    for seed in range(shard * 40, shard * 40 + SEEDS):
        try:
            run(program(Seeded(seed), WITHOUT))
        except Exception as error:
            error.add_note(f"python -m tests.fuzz --replay {seed} --without {','.join(WITHOUT)}")
            raise


@settings(
    max_examples=100 if ASKED else 50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(programs())
def test_random_programs_that_can_be_made_smaller_train_like_masked_dense_training(candidate):
    run(candidate)


def lr_of_another(optimizer):
    optimizer.param_groups[0]["lr"] *= 1.0001


def gradient_lost(optimizer):
    next(iter(optimizer.active_parameters()))[1].grad = None


def element_touched(optimizer):
    with torch.no_grad():
        leaf = next(iter(optimizer.active_parameters()))[1]
        leaf[(0,) * leaf.dim()] += 1e-6


@pytest.mark.parametrize("fault", [lr_of_another, gradient_lost, element_touched])
def test_a_fault_in_the_optimizer_is_found(monkeypatch, fault):
    step = chunkft.ChunkOptimizer.step

    def faulty(self, closure=None):
        fault(self)
        return step(self, closure)

    monkeypatch.setattr(chunkft.ChunkOptimizer, "step", faulty)
    found = 0
    for seed in range(12):
        try:
            run(program(Seeded(seed), FEATURES))
        except Difference:
            found += 1
    assert found >= 4


def test_a_program_survives_json():
    candidate = program(Seeded(3))
    assert json.loads(json.dumps(candidate)) == candidate


def test_the_command_prints_what_failed_so_that_it_can_be_replayed(tmp_path, monkeypatch, capsys):
    assert main(["--examples", "2", "--without", ",".join(FEATURES)]) == 0
    step = chunkft.ChunkOptimizer.step

    def faulty(self, closure=None):
        element_touched(self)
        return step(self, closure)

    monkeypatch.setattr(chunkft.ChunkOptimizer, "step", faulty)
    capsys.readouterr()
    assert main(["--examples", "6", "--without", ",".join(FEATURES)]) == 1
    printed = capsys.readouterr().out
    first = next(line for line in printed.splitlines() if line.startswith("  {"))
    file = tmp_path / "program.json"
    file.write_text(first.strip())
    assert main(["--replay", str(file)]) == 1
    monkeypatch.undo()
    assert main(["--replay", str(file)]) == 0
