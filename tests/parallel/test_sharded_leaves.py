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
    Setting("mixtral", 3),
    Setting("t5", 2),
    Setting("t5", 3),
    Setting("bert", 2, double=True),
    Setting("bert", 3, double=True),
    Setting("llama-tied", 2, reshard=False),
    Setting("llama", 2, offload=True),
    Setting("llama", 2, checkpointing="library"),
    Setting("llama", 3, checkpointing="wrapped", changes={"use_cache": False}),
    Setting("llama", 4, hybrid=True),
    Setting("gpt2", 4, reshard=2),
    Setting("llama", 2, compiled="eager"),
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
