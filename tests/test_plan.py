"""The plan: every trainable element in exactly one chunk, in equal windows, and errors that say what is wrong."""

import copy

import pytest
import tiny_transformers
import torch
from helpers import assert_covers_once
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import chunkft
from chunkft import ChunkPlan, Slice
from chunkft.plan import parameter_specs


class Odd(nn.Module):
    """Parameters that no operator knows: a scalar, a vector, three dimensions, and an empty one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.vector = nn.Parameter(torch.randn(size))
        self.experts = nn.Parameter(torch.randn(3, size, 2))
        self.nothing = nn.Parameter(torch.empty(0, size))


sizes = st.integers(1, 90)
LAYERS = {
    "linear": lambda a, b: nn.Linear(a, b),
    "unbiased": lambda a, b: nn.Linear(a, b, bias=False),
    "embedding": lambda a, b: nn.Embedding(a, b),
    "norm": lambda a, b: nn.LayerNorm(a),
    "conv": lambda a, b: nn.Conv1d(a, b, 3),
    "attention": lambda a, b: nn.MultiheadAttention(a, 1),
    "renormed": lambda a, b: nn.Embedding(a, b, max_norm=1.0),
    "odd": lambda a, b: Odd(a),
    "block": lambda a, b: nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.Linear(b, a)),
}
layers = st.tuples(st.sampled_from(sorted(LAYERS)), sizes, sizes)


@st.composite
def models(draw):
    """A list of layers, of which some are frozen, and some weights are tied to others of the same shape."""
    described = draw(st.lists(layers, min_size=1, max_size=6))
    model = nn.ModuleList(LAYERS[kind](a, b) for kind, a, b in described)
    if draw(st.booleans()):
        a, b = draw(sizes), draw(sizes)
        model.append(nn.Embedding(a, b))
        model.append(nn.Linear(b, a, bias=draw(st.booleans())))
        model[-1].weight = model[-2].weight
    if draw(st.booleans()):
        model.append(model[0])
    parameters = list(model.parameters())
    for index in draw(st.sets(st.integers(0, len(parameters) - 1), max_size=len(parameters) - 1)):
        parameters[index].requires_grad_(False)
    if not any(p.requires_grad and p.numel() for p in parameters):
        model.append(nn.Linear(3, 5))
    return model


def units_of(model: nn.Module, slice_dim: int, multiple: int) -> list[int]:
    """Bytes of every piece between two legal cuts, written out independently of the package."""
    units = []
    for spec in parameter_specs(model):
        if not spec.dims:
            units.append(spec.nbytes)
            continue
        size = spec.shape[slice_dim]
        step = multiple if size >= multiple else 1
        units += [min(step, size - at) * (spec.nbytes // size) for at in range(0, size, step)]
    return units


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    models(),
    st.integers(1, 40),
    st.sampled_from(["bytes", "interleaved", "layers"]),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 4, 64]),
)
def test_every_trainable_element_is_in_exactly_one_chunk(model, chunks, by, slice_dim, multiple):
    def make(count):
        return chunkft.partition(model, count, by, slice_dim=slice_dim, row_multiple=multiple)

    try:
        plan = make(chunks)
    except ValueError:
        with pytest.raises(ValueError, match=rf"chunks={chunks} is not allowed"):
            make(chunks)
        chunks = 1
        plan = make(chunks)
    assert len(plan) == chunks
    assert_covers_once(model, plan)
    assert [chunk.index for chunk in plan] == list(range(len(plan)))
    assert all(chunk.slices for chunk in plan)
    assert sum(chunk.numel for chunk in plan) == sum(
        p.numel() for p in set(model.parameters()) if p.requires_grad
    )
    assert all(piece.dim in (slice_dim, None) or by == "layers" for piece in plan.slices())


@settings(max_examples=120, deadline=None, derandomize=True)
@given(models(), st.integers(1, 40), st.sampled_from([0, 1]), st.sampled_from([1, 64]))
def test_windows_of_bytes_are_equal_up_to_one_piece(model, chunks, slice_dim, multiple):
    while len(units := units_of(model, slice_dim, multiple)) < chunks and multiple > 1:
        multiple //= 2
    chunks = min(chunks, len(units))
    plan = chunkft.partition(model, chunks, slice_dim=slice_dim, row_multiple=multiple)
    share = sum(units) / chunks
    assert sum(chunk.nbytes for chunk in plan) == sum(units)
    assert max(abs(chunk.nbytes - share) for chunk in plan) <= max(units)


def test_cuts_are_the_nearest_to_equal_windows():
    plan = chunkft.partition(nn.Linear(1, 11, bias=False), 3, row_multiple=1)
    assert [piece.stop for piece in plan.slices()] == [4, 7, 11]


def test_windows_of_bytes_fall_on_groups_of_64_rows_where_there_are_as_many():
    model = nn.Sequential(nn.Linear(7, 1000, bias=False), nn.Linear(1000, 50, bias=False))
    plan = chunkft.partition(model, 15)
    cuts = {piece.stop for piece in plan.slices() if piece.name == "0.weight"} - {1000}
    assert cuts
    assert all(cut % 64 == 0 for cut in cuts)


def test_row_groups_shrink_until_there_are_enough_for_the_chunks():
    model = nn.Linear(5, 130, bias=False)
    plan = chunkft.partition(model, 100)
    assert len(plan) == 100
    assert_covers_once(model, plan)
    halved = chunkft.partition(model, 5)  # groups of 64 give 3 pieces, of 32 give 5
    assert all(piece.start % 32 == 0 for piece in halved.slices())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(models(), st.integers(1, 20))
def test_interleaved_gives_every_chunk_its_part_of_every_parameter(model, chunks):
    try:
        plan = chunkft.partition(model, chunks, "interleaved")
    except ValueError:
        return
    for spec in parameter_specs(model):
        pieces = [piece for piece in plan.slices() if piece.name == spec.name]
        if not spec.dims or spec.shape[0] < chunks:
            assert len(pieces) == 1
            continue
        step = 64 if spec.shape[0] >= 64 * chunks else 1
        assert len(pieces) == chunks
        assert all(abs((piece.stop - piece.start) - spec.shape[0] / chunks) <= step for piece in pieces)


def test_layers_are_whole_blocks_with_what_stands_before_and_after():
    model = tiny_transformers.build("llama")
    plan = chunkft.partition(model, None, "layers")
    assert_covers_once(model, plan)
    owners = [{piece.name.split(".layers.")[-1].split(".")[0] for piece in chunk.slices} for chunk in plan]
    assert owners == [{"model"}, {"0"}, {"1"}, {"model", "lm_head"}]
    assert all(piece.numel == torch.Size(piece.parameter_shape).numel() for piece in plan.slices())
    merged = chunkft.partition(model, 3, "layers")
    assert_covers_once(model, merged)
    assert len(merged) == 3


def test_tied_weights_are_planned_once_under_their_first_name():
    model = tiny_transformers.build("llama-tied")
    names = {piece.name for piece in chunkft.partition(model, 6).slices()}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_parameters_without_a_sliced_operator_are_atomic():
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(7),
            "conv": nn.Conv2d(3, 5, 3),
            "attention": nn.MultiheadAttention(6, 2),
            "linear": nn.Linear(6, 9),
            "bilinear": nn.Bilinear(3, 4, 5),
        }
    )
    dims = {spec.name: spec.dims for spec in parameter_specs(model)}
    assert dims.pop("linear.weight") == (0, 1)
    assert set(dims.values()) == {()}
    assert "attention.out_proj.weight" in dims


def test_a_weight_tied_to_a_module_that_cannot_slice_it_is_atomic():
    model = nn.ModuleList([nn.Linear(4, 6), nn.Bilinear(1, 1, 1)])
    model[1].shared = model[0].weight
    assert {spec.name: spec.dims for spec in parameter_specs(model)}["0.weight"] == ()


def test_sixteen_bit_weights_count_their_residual():
    (spec,) = parameter_specs(nn.Linear(3, 5, bias=False).to(torch.bfloat16))
    assert spec.element_bytes == 2 + 8 + 2
    (spec,) = parameter_specs(nn.Linear(3, 5, bias=False), state_bytes=4)
    assert spec.nbytes == 15 * 8


def test_partition_changes_nothing_in_the_model():
    model = tiny_transformers.build("gpt2")
    before = copy.deepcopy(model)
    chunkft.partition(model, 7, always_active="*ln_f*", slice_dim=1)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in before.named_parameters()
    ]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in before.modules()]


def test_the_table_has_a_line_for_every_chunk_and_adds_up():
    model = tiny_transformers.build("llama")
    plan = chunkft.partition(model, 5, always_active="head")
    header, *lines = str(plan).splitlines()
    assert header.split() == ["chunk", "slices", "rows", "elements", "bytes", "from", "to"]
    assert [line.split()[0] for line in lines] == ["always", "0", "1", "2", "3", "4"]
    elements = sum(int(line.split()[3].replace(",", "")) for line in lines)
    assert elements == sum(p.numel() for p in model.parameters())
    assert "model.embed_tokens.weight[0:" in lines[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(models(), st.integers(1, 9), st.sampled_from([0, 1]))
def test_a_saved_plan_loads_as_it_was(tmp_path_factory, model, chunks, slice_dim):
    chunks = min(chunks, len(units_of(model, slice_dim, 1)))
    plan = chunkft.partition(model, chunks, slice_dim=slice_dim)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    loaded = ChunkPlan.load(path)
    assert loaded == plan
    assert chunkft.partition(model, None, loaded) == plan


def test_always_active_patterns_stay_out_of_the_chunks():
    model = tiny_transformers.build("bert")
    plan = chunkft.partition(model, 4, always_active=["*.LayerNorm.*", "classifier.*"])
    always = {piece.name for piece in plan.always}
    assert always == {
        n for n, _ in model.named_parameters() if ".LayerNorm." in n or n.startswith("classifier.")
    }
    assert not always & {piece.name for chunk in plan for piece in chunk.slices}
    assert_covers_once(model, plan)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("llama", {"model.norm.weight", "lm_head.weight"}),
        ("llama-tied", {"model.norm.weight"}),
        ("gpt2", {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        (
            "bert",
            {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
        ),
        ("t5", {"decoder.final_layer_norm.weight"}),
        ("vit", {"vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias"}),
    ],
)
def test_the_head_is_what_follows_the_last_block(family, head):
    model = tiny_transformers.build(family)
    plan = chunkft.partition(model, 4, always_active="head")
    assert {piece.name for piece in plan.always} == head
    assert_covers_once(model, plan)


def test_a_head_of_several_layers_is_not_taken_for_blocks():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    model.head = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    plan = chunkft.partition(model, 2, always_active="head")
    assert {piece.name for piece in plan.always} == {
        "head.0.weight",
        "head.0.bias",
        "head.2.weight",
        "head.2.bias",
    }


def test_named_parameters_can_be_made_atomic():
    model = nn.Sequential(nn.Linear(8, 40), nn.Linear(40, 8))
    plan = chunkft.partition(model, 3, atomic="0.weight", row_multiple=1)
    assert [piece for piece in plan.slices() if piece.name == "0.weight"] == [
        Slice("0.weight", None, 0, 40, (40, 8), 12)
    ]
    assert_covers_once(model, plan)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, partition=plan)
    assert optimizer.plan == plan


def test_a_chunk_and_its_slices_count_elements_and_bytes():
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False))
    plan = chunkft.partition(model, 1, state_bytes=8)
    (chunk,) = plan
    assert chunk.numel == 24 + 8 + 16 + 40
    assert chunk.nbytes == 12 * chunk.numel
    rows, columns = Slice("0.weight", 0, 2, 5, (8, 3)), Slice("0.weight", 1, 1, 3, (8, 3))
    assert (rows.shape, columns.shape) == ((3, 3), (8, 2))
    weight = torch.arange(24).view(8, 3)
    assert torch.equal(rows.of(weight), weight[2:5])
    assert torch.equal(columns.of(weight), weight[:, 1:3])
    assert (str(rows), str(columns)) == ("0.weight[2:5]", "0.weight[:, 1:3]")
