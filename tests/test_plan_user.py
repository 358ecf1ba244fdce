"""A user's own partition, and what is refused with an error that names it."""

import json

import pytest
from helpers import assert_covers_once
from torch import nn

import chunkft
from chunkft import Chunk, ChunkPlan, Slice


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False))


def a_slice(name: str, dim: int | None, start: int, stop: int, shape: tuple[int, ...] = (8, 3)) -> Slice:
    return Slice(name, dim, start, stop, shape)


REST = ["0.bias", "1.*", "2.weight"]


def test_own_partition_takes_patterns_slices_and_callables():
    model = pair()
    groups = [[a_slice("0.weight", 0, 0, 3), "1.*"], [a_slice("0.weight", 0, 3, 8), "0.bias"], ["2.*"]]
    plan = chunkft.partition(model, None, groups)
    assert_covers_once(model, plan)
    assert [str(piece) for piece in plan.chunks[0].slices] == ["0.weight[0:3]", "1.weight", "1.bias"]
    assert chunkft.partition(model, 3, lambda specs: groups) == plan
    assert chunkft.partition(model, None, plan) == plan
    by_size = chunkft.partition(
        model, None, lambda specs: [[s.name] for s in sorted(specs, key=lambda s: s.nbytes)]
    )
    assert_covers_once(model, by_size)
    assert by_size.chunks[-1].slices[0].name == "2.weight"
    columns = chunkft.partition(
        model, None, [[a_slice("0.weight", 1, 0, 2)], [a_slice("0.weight", 1, 2, 3), *REST]]
    )
    assert_covers_once(model, columns)


BAD_GROUPS = [
    ([["0.*"], ["2.*"]], r"leaves out '1\.weight'"),
    ([["*"], ["0.bias"]], r"covers '0\.bias' \[0:8\) twice"),
    ([["*"], ["3.*"]], r"partition group 1: '3\.\*' matches no trainable parameter"),
    ([["*"], []], "chunk 1 of the plan is empty"),
    ([[a_slice("0.weight", 0, 0, 3)], REST], r"covers '0\.weight' only up to 3 of 8"),
    ([[a_slice("0.weight", 0, 2, 8)], REST], r"covers '0\.weight' \[0:2\) not at all"),
    ([[a_slice("0.weight", 0, 0, 9)], REST], "0 <= start < stop <= 8"),
    ([[a_slice("0.weight", 0, 4, 4)], ["0.weight"], REST], "0 <= start < stop <= 8"),
    ([[a_slice("0.weight", 0, 0, 5)], [a_slice("0.weight", 0, 4, 8), *REST]], r"'0\.weight' \[4:5\) twice"),
    ([[a_slice("0.weight", 0, 0, 4)], [a_slice("0.weight", 1, 0, 3), *REST]], "several dimensions"),
    ([[a_slice("0.weight", 2, 0, 1)], REST], r"cuts '0\.weight' along dim=2; allowed is dim in \(0, 1\)"),
    ([["0.weight"], [a_slice("1.weight", 0, 0, 8, (8,)), "0.bias", "1.bias", "2.weight"]], "it is atomic"),
    ([[a_slice("7.weight", 0, 0, 8)], ["*"]], r"slice of '7\.weight', which is not a trainable parameter"),
    ("*", "partition='\\*' is not known; allowed are 'bytes', 'layers', 'interleaved'"),
    ([], "partition must be one of"),
    (["0.*", "1.*"], "partition group 0 must be a list of names or Slices, got '0"),
    (7, "partition must be one of .* got 7"),
]


@pytest.mark.parametrize(("groups", "message"), BAD_GROUPS, ids=[message[:30] for _, message in BAD_GROUPS])
def test_own_partition_that_does_not_fit_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        chunkft.partition(pair(), None, groups)


BAD_ARGUMENTS = [
    ({"chunks": 0}, "chunks=0 is not allowed; needs an integer >= 1"),
    ({"chunks": True}, "chunks=True is not allowed"),
    ({"chunks": 2.0}, r"chunks=2\.0 is not allowed"),
    ({"chunks": 17}, r"chunks=17 is not allowed: .* 1 <= chunks <= 16"),
    ({"chunks": None}, "chunks=None is not allowed with partition='bytes'"),
    ({"chunks": 9, "by": "layers"}, "needs 1 <= chunks <= 3, or None"),
    ({"chunks": 9, "by": "interleaved"}, "chunks would be empty"),
    ({"chunks": 3, "by": [["*"]]}, "chunks=3 disagrees with the partition, which has 1"),
    ({"chunks": 3, "slice_dim": 2}, "slice_dim=2 is not allowed; needs 0"),
    ({"chunks": 3, "slice_dim": None}, "slice_dim=None is not allowed"),
    ({"chunks": 3, "row_multiple": 0}, "row_multiple=0 is not allowed; needs an integer >= 1"),
    ({"chunks": 3, "state_bytes": -1}, "state_bytes=-1 is not allowed; needs an integer >= 0"),
    ({"chunks": 3, "always_active": "4.*"}, r"always_active='4\.\*' matches no trainable parameter"),
    ({"chunks": 3, "always_active": "*"}, "takes every trainable parameter"),
    ({"chunks": 3, "always_active": "head"}, "found no parameters after the last block"),
    ({"chunks": 3, "atomic": ["0.*", "9.*"]}, r"atomic='9\.\*' matches no trainable parameter"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[str(a) for a, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        chunkft.partition(pair(), **arguments)


def test_a_plan_with_other_arguments_that_contradict_it_is_refused():
    model = pair()
    plan = chunkft.partition(model, 3, always_active="1.*")
    with pytest.raises(ValueError, match="chunks=4 disagrees with the plan, which has 3"):
        chunkft.partition(model, 4, plan)
    with pytest.raises(ValueError, match=r"always_active='2\.\*' cannot be combined with a ChunkPlan"):
        chunkft.partition(model, 3, plan, always_active="2.*")


def test_a_plan_of_another_model_is_refused():
    plan = chunkft.partition(pair(), 3)
    with pytest.raises(ValueError, match=r"'2\.weight' of shape \(5, 8\), the model has \(6, 8\)"):
        chunkft.partition(
            nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False)), 3, plan
        )
    with pytest.raises(ValueError, match="needs at least one"):
        chunkft.partition(pair(), None, ChunkPlan(()))
    with pytest.raises(ValueError, match="chunk 0 of the plan is empty"):
        chunkft.partition(pair(), None, ChunkPlan((Chunk(0, ()),)))


def test_models_that_cannot_be_planned_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        chunkft.partition({}, 3)
    with pytest.raises(ValueError, match="no trainable parameter"):
        chunkft.partition(pair().requires_grad_(False), 3)
    with pytest.raises(ValueError, match="no trainable parameter"):
        chunkft.partition(nn.Linear(0, 4, bias=False), 1)
    model = pair()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    with pytest.raises(ValueError, match=r"attached to an optimizer of chunkft; use optimizer\.plan"):
        chunkft.partition(model, 3)
    optimizer.detach()
    assert len(chunkft.partition(model, 3)) == 3


def damaged(change) -> str:
    data = chunkft.partition(pair(), 2).to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a plan"),
        ("{", "is not a plan"),
        ("[]", "format 'list'"),
        ('{"format": "chunkft-plan-0"}', "format 'chunkft-plan-0'; allowed is 'chunkft-plan-1'"),
        ('{"format": "chunkft-plan-1"}', "lacks 'always', 'by', 'chunks'"),
        (damaged(lambda d: d.update(chunks=3)), "3 where it needs a list"),
        (
            damaged(lambda d: d["chunks"][0][0].pop()),
            "needs \\[name, dim, start, stop, shape, element_bytes\\]",
        ),
        (damaged(lambda d: d["chunks"][0][0].__setitem__(2, "0")), "plan has slice entry"),
        (damaged(lambda d: d["always"].append(5)), "5 where it needs a list"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ChunkPlan.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        ChunkPlan.load(tmp_path / "missing.json")
