"""Tests that run where CHUNKFT_THOROUGH=1 asks for them: each costs much, and has cheaper relatives that always run."""

import os
from pathlib import Path

import pytest

ASKED = os.environ.get("CHUNKFT_THOROUGH") == "1"
REASON = "one of many like it: CHUNKFT_THOROUGH=1 (make thorough) runs it, too"

# By file, parts of the names.
TESTS = {
    "test_cli_torchrun.py": (
        "test_torchrun_gives_the_run_of_one_process_with_one_log",
        "bit_identical[rank 1]",
        "test_plain_adamw_on_two_ranks",
        "[fail_to_finish-",
    ),
    "parallel/test_sharded_training.py": (
        "joined_batch[gpt2-",
        "joined_batch[bert-world2-",
        "joined_batch[qwen3-moe-",
        "joined_batch[llama-world3-",
        "joined_batch[llama-world2-K4-clip0.5]",
        "joined_batch[mixtral-world2-",
        "dense_sharded_training[gpt2-",
        "dense_sharded_training[mixtral-",
        "test_dense_sharded_training_takes_the_steps_of_one_process[mixtral-",
    ),
    "parallel/test_replicas.py": (
        "joined_batch[t5-world3-",
        "joined_batch[gpt2-",
        "joined_batch[qwen3-moe-",
        "joined_batch[bert-world2-",
        "joined_batch[llama-world2-K4-clip0.5]",
        "joined_batch[mixtral-world2-",
        "data_parallel_training[gpt2-",
    ),
    "parallel/test_fsdp_variants.py": ("[compiled]", "[compiled replicas]", "as_one_process[llama]"),
    "parallel/test_sharded_leaves.py": (
        "-aot_eager]",
        "-eager]",
        "[bert-3]",
        "[bert-4]",
        "[t5-2]",
        "[mixtral-3]",
        "[gpt2-4-reshard=2]",
    ),
    "parallel/test_team_checkpoints.py": (
        "bits[sharded-gpt2-world3-",
        "bits[sharded-llama-world2-K2-",
        "bits[replicas-llama-world2-K3-residual-",
        "test_hybrid_shards_are_written_once",
    ),
    "test_interrupted_switch.py": (
        "failed[after-stream]",
        "failed[after-host]",
        "failed[after-forgetting]",
        "failed[before-forgetting]",
        "failed[before-host]",
    ),
    "test_planner_truth.py": (
        "more[gpt2, 2 blocks-torch.float32-4-chunk",
        "more[gpt2, 2 blocks-torch.float32-4-stream/True",
        "more[gpt2, 2 blocks-torch.float32-1-stream/step",
        "more[gpt2, 2 blocks-torch.float32-1-chunk",
        "more[llama, tied, 2 blocks-torch.float32-4-stream",
        "more[llama, tied, 2 blocks-torch.float32-1-",
        "more[llama, 3 blocks-torch.float32-2-",
        "more[llama, 3 blocks-torch.float32-1-stream/True",
    ),
    "test_residency.py": (
        "moments[one-page-a-slice-False-stochastic]",
        "moments[one-page-a-slice-True-stochastic]",
        "moments[one-page-a-slice-False-none]",
        "moments[one-page-a-slice-True-none]",
        "moments[one-page-a-slice-True-residual]",
        "[one-page-a-slice-rprop]",
    ),
    "test_convex.py": ("optimum[reverse-interleaved-", "optimum[random-bytes-", "optimum[reverse-bytes-"),
    "weights/test_on_fake_driver.py": (
        "needed[none-1-",
        "needed[none-4-device]",
        "needed[non-reentrant-1-host]",
        "needed[non-reentrant-4-host]",
    ),
    "test_experts.py": ("no_whole_gradient[eager]",),
    "parallel/test_accelerate_fsdp.py": ("bits[sharded-state]", "bits[FULL_STATE_DICT]"),
}


def mark(items: list[pytest.Item]) -> list[str]:
    """Skip those of the table, unless they are asked for.

    Returns:
        Entries of the table that are in the name of none of the items.
    """
    missed = []
    here = Path(__file__).parent
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        if here in item.path.parents:
            by_file.setdefault(item.path.relative_to(here).as_posix(), []).append(item)
    for file, parts in TESTS.items():
        found = by_file.get(file, [])
        for part in parts:
            named = [item for item in found if part in item.name]
            if not named:
                missed.append(f"{file}: {part}")
            for item in named if not ASKED else ():
                item.add_marker(pytest.mark.skip(reason=REASON))
    return missed
