"""Gradients of slices of weights that FSDP2 shards are the rows of dense gradients, and it reduces none by itself."""

import leaf_rigs
import pytest
from leaf_rigs import Setting

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 1}

SETTINGS = [
    Setting("llama", 2),
    Setting("llama", 3),
    Setting("gpt2", 2),
    Setting("gpt2", 3),
    Setting("mixtral", 2, changes=EXPERTS),
    Setting("mixtral", 3, changes={"experts_implementation": "eager"}),
    Setting("t5", 2),
    Setting("t5", 3),
    Setting("bert", 2, double=True),
    Setting("bert", 3, double=True),
    Setting("bert", 4, double=True),
    Setting("mixtral", 4),
    Setting("llama-tied", 2, reshard=False),
    Setting("llama", 2, offload=True),
    Setting("llama", 2, checkpointing="library"),
    Setting("llama", 3, checkpointing="wrapped", changes={"use_cache": False}),
    Setting("llama", 4, hybrid=True),
    Setting("gpt2", 4, reshard=2),
    Setting("llama", 2, compiled="eager"),
    Setting("gpt2", 2, compiled="aot_eager"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_of_windows_are_rows_of_the_dense_gradient(pool, setting):
    assert max(pool.run(setting.world, leaf_rigs.worst_error, setting)) < 1e-5


@pytest.mark.parametrize("reshard", [True, False])
def test_the_next_forward_pass_sees_updated_rows(pool, reshard):
    for before, after, expected in pool.run(
        3, leaf_rigs.losses_around_an_update, Setting("llama", 3, reshard=reshard)
    ):
        assert after == pytest.approx(expected, rel=1e-6)
        assert after != pytest.approx(before, rel=1e-3)


def test_ranks_that_use_other_layers_of_a_block_gather_it_all_the_same(pool):
    for found in pool.run(2, leaf_rigs.chosen_layers):
        assert max(error for _, error in found) < 1e-12


def test_weights_that_are_read_beside_their_modules(pool):
    for found, said in pool.run(2, leaf_rigs.read_weights):
        assert max(error for _, error in found) < 1e-12
        assert {name.split("[")[0] for name, _ in found} >= {"0.scale", "0.attention.in_proj_weight"}
        # nothing of what has no sliced operator anyway
        assert len(said) == 1
        assert "'0.layer.weight'" in said[0]


def test_backward_stops_below_the_lowest_block_with_active_weights(pool):
    first, *_, last = pool.run(2, leaf_rigs.reach_of_backward)[0]
    assert first == [True] * 4
    assert last == [False, False, False, True]


def test_gradients_are_computed_and_handed_on_in_the_dtypes_of_the_policy(pool):
    for error, dtypes in pool.run(2, leaf_rigs.precision):
        assert error < 0.05
        assert {str(dtype) for dtype in dtypes} == {"torch.float32"}


@pytest.mark.parametrize("assign", [False, True])
def test_weights_may_be_loaded_between_steps(pool, assign):
    for generations, loss, expected, flows, others in pool.run(3, leaf_rigs.loaded_weights, assign):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert flows
        assert others == []
        assert (generations > 0) == assign


def test_an_evaluation_before_and_between(pool):
    for error, recorded in pool.run(2, leaf_rigs.evaluation_between):
        assert error < 1e-4
        assert recorded > 0


def test_what_cannot_be_trained_in_slices_of_shards_is_refused_by_name(pool):
    for found in pool.run(4, leaf_rigs.refusals):
        assert "parameter '0.weight' is sharded by Shard(1); needs Shard(0)" in found["columns"]
        assert "parameter '1.weight' is trainable and not sharded by fully_shard" in found["part"]
        assert "parameter '0.weight' is sharded by tensor parallelism too" in found["tensor"]
        assert "FSDP1" in found["first"]
