"""Whatever is put around sharded training, losses, norms and weights stay those of the plain run."""

import pytest
import rigs
import variant_rigs
from rigs import BACKWARD, STREAM, Case

CASE = Case("llama", 2, 4, clip=0.5, accumulate=2, steps=10)
SMALL = Case("llama", 2, 2, clip=0.5, steps=16, changes={"num_hidden_layers": 1})
SAME_BITS = ("kept gathered", "offloaded", "checkpointing", "reentrant checkpointing")
NEAR = ("compiled", "compiled replicas", "replicas in a wrapper")


@pytest.fixture(scope="module")
def plain(pool):
    """The plain runs of the comparisons, made once."""
    made = {}

    def of(case, variant="plain"):
        key = str(case), variant
        if key not in made:
            made[key] = pool.run(case.world, variant_rigs.train, case, variant)
        return made[key]

    return of


@pytest.mark.parametrize("variant", SAME_BITS)
def test_a_variant_of_sharded_training_has_the_bits_of_the_plain_one(pool, plain, variant):
    ranks = pool.run(2, variant_rigs.train, CASE, variant)
    assert ranks == plain(CASE)


def test_shards_that_stay_gathered_in_part_have_the_bits_of_the_plain_run(pool, plain):
    case = Case("llama", 4, 4, clip=0.5, steps=6)
    assert pool.run(4, variant_rigs.train, case, "gathered in part") == plain(case)


@pytest.mark.parametrize("variant", NEAR)
def test_a_variant_trains_as_the_plain_one(pool, plain, variant):
    ranks = pool.run(2, variant_rigs.train, SMALL, variant, timeout=120.0)  # compiling takes long
    rigs.assert_same_run(SMALL, ranks, plain(SMALL, "plain" if variant == "compiled" else "replicas"))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_two_replicas_of_two_shards_train_as_one_process(pool, family):
    case = Case(family, 4, 4, clip=0.5, accumulate=2, steps=16)
    ranks = pool.run(4, variant_rigs.train, case, "hybrid")
    assert ranks[0].weights == ranks[2].weights != ranks[1].weights == ranks[3].weights
    rigs.assert_same_run(case, ranks, pool.run(1, rigs.train_alone, case, ranks[0].plan))


@pytest.mark.parametrize("options", [STREAM, BACKWARD], ids=["stream", "backward"])
@pytest.mark.parametrize("variant", ["offloaded", "hybrid", "checkpointing"])
def test_pages_pass_in_variants(pool, plain, options, variant):
    world = 4 if variant == "hybrid" else 2
    case = Case("llama-tied", world, 3, options=options, steps=10)
    ranks = pool.run(world, variant_rigs.train, case, variant)
    if variant == "hybrid":
        rigs.assert_same_run(case, ranks, pool.run(1, rigs.train_alone, case, ranks[0].plan))
    else:
        assert ranks == plain(case)
