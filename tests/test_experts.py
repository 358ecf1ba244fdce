"""Mixtures of experts train expert by expert, with the gradients and results of dense training."""

import copy
import functools

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from helpers import (
    assert_close_to_exact,
    assert_slices_equal_dense,
    chunk_gradients,
    dense_gradients,
    window,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chunkft
from chunkft.autograd import (
    SlicedOperator,
    compilable,
    operator_for,
    operators,
    register_operator,
    sliced_linear,
)

FAMILIES = ["mixtral", "qwen3-moe", "gpt-oss"]
IMPLEMENTATIONS = ["eager", "grouped_mm"]
UPDATES = {
    "step": {},
    "backward": {"residency": "stream", "update": "backward", "page_bytes": 3000},
}

pytestmark = [
    pytest.mark.filterwarnings("error:the weight .* is used without a call:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*RoPE scaling factor"),
]


def build(family, implementation, **changes):
    return tiny_transformers.build(family, experts_implementation=implementation, **changes)


def experts(plan):
    return [piece for piece in plan.slices() if ".experts." in piece.name and len(piece.parameter_shape) == 3]


def expert_modules(model):
    return [module for module in model.modules() if "gate_up_proj" in module._parameters]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunks", [7, 14])
def test_slice_gradients_are_the_rows_of_the_dense_ones(family, implementation, chunks):
    model = build(family, implementation)
    plan = chunkft.partition(model, chunks, row_multiple=1)
    assert {piece.dim for piece in experts(plan)} == {0}
    assert len(experts(plan)) > 4
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of(family))


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("by", ["bytes", "interleaved"])
def test_one_expert_is_a_row_group_whatever_the_row_multiple(by, slice_dim):
    model = build("qwen3-moe", "eager", num_experts=70, moe_intermediate_size=3)
    plan = chunkft.partition(model, 9, by=by, slice_dim=slice_dim, row_multiple=64)
    starts = {piece.start for piece in experts(plan)}
    assert {piece.dim for piece in experts(plan)} == {0}
    assert any(start % 64 for start in starts), starts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_keeps_its_bits(family, implementation):
    model = build(family, implementation)
    arguments = tiny_transformers.batch(family)
    expected = model(**arguments).logits
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in chunkft.partition(copy.deepcopy(model), 5, row_multiple=1):
        attachment.activate(chunk.slices)
        assert torch.equal(model(**arguments).logits, expected)
        with torch.no_grad():
            assert torch.equal(model(**arguments).logits, expected)
    attachment.detach()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_tokens_get_zeros_and_the_input_its_exact_gradient(implementation):
    model = build("qwen3-moe", implementation, num_experts=6)
    layer = expert_modules(model)[0]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(7, 36, generator=generator)
    index = torch.tensor([[0, 4], [4, 0], [0, 4], [4, 2], [0, 2], [2, 0], [4, 0]])
    weights = torch.rand(7, 2, generator=generator)

    def run(module):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        module(x, index, w).square().sum().backward()
        return x.grad, w.grad

    dense = copy.deepcopy(layer)
    expected = run(dense)
    attachment = chunkft.attach(layer)
    attachment.freeze()
    for name in ("gate_up_proj", "down_proj"):
        spec = next(spec for spec in attachment.specs if spec.name == name)
        windows = [(0, 1), (1, 2), (2, 5), (5, 6)]
        pairs = attachment.activate([spec.slice(0, *window) for window in windows])
        for ours, theirs in zip(run(layer), expected, strict=True):
            assert torch.equal(ours, theirs)
        for (start, stop), (_, leaf) in zip(windows, pairs, strict=True):
            rows = getattr(dense, name).grad[start:stop]
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, rows)
        assert not pairs[1][1].grad.any()
        assert not pairs[3][1].grad.any()
        assert pairs[0][1].grad.any()
    attachment.detach()


class Sizes(TorchDispatchMode):
    """Notes the shapes of what operations make."""

    def __init__(self, shapes):
        super().__init__()
        self.wanted = shapes
        self.made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {
            one.untyped_storage().data_ptr() for one in tree_leaves(args) if isinstance(one, torch.Tensor)
        }
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and sorted(one.shape) in self.wanted:
                self.made += one.untyped_storage().data_ptr() not in known
        return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_of_a_whole_expert_weight_exists(implementation):
    model = build("qwen3-moe", implementation)
    whole = [sorted(p.shape) for p in expert_modules(model)[0].parameters()]
    loss = tiny_transformers.loss_of("qwen3-moe")
    with Sizes(whole) as dense:
        loss(copy.deepcopy(model)).backward()
    assert dense.made >= 4  # otherwise this test sees nothing
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in chunkft.partition(copy.deepcopy(model), 9, row_multiple=1):
        pairs = attachment.activate(chunk.slices)
        with Sizes(whole) as sliced:
            loss(model).backward()
        assert sliced.made == 0
        assert all(leaf.grad.shape == piece.shape for piece, leaf in pairs)
        assert all(p.grad is None for module in expert_modules(model) for p in module.parameters())
    attachment.detach()


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_sweeps_change_every_parameter_and_leave_no_trace(family, implementation, update):
    model = build(family, implementation)
    trained = {
        name
        for name, gradient in dense_gradients(copy.deepcopy(model), tiny_transformers.loss_of(family)).items()
        if gradient is not None and bool(gradient.any())
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = [dict(module.__dict__) for module in expert_modules(model)]
    optimizer = chunkft.ChunkAdamW(model, lr=3e-3, weight_decay=0.0, chunks=9, interval=1, **UPDATES[update])
    for _ in range(3 * 9):
        tiny_transformers.loss_of(family)(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.sweep == 3
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    optimizer.detach()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert [module.__dict__.keys() for module in expert_modules(model)] == [one.keys() for one in kept]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_chunk_is_adamw_bit_for_bit_also_with_checkpointing(implementation):
    dense = build("mixtral", implementation)
    chunked = copy.deepcopy(dense)
    chunked.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-3, chunks=1, interval=2)
    for step in range(3):
        loss = tiny_transformers.loss_of("mixtral", step)
        for model, stepper in ((dense, reference), (chunked, optimizer)):
            loss(model).backward()
            stepper.step()
            stepper.zero_grad()
    for (name, p), q in zip(dense.named_parameters(), chunked.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointing_changes_no_gradient(implementation):
    model = build("qwen3-moe", implementation)
    plan = chunkft.partition(model, 6, row_multiple=1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of("qwen3-moe"))


@pytest.mark.parametrize("update", UPDATES)
def test_a_run_goes_on_from_a_checkpoint_and_with_another_number_of_chunks(update):
    def train(model, optimizer, first, last):
        for step in range(first, last):
            tiny_transformers.loss_of("qwen3-moe", step)(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start(model, chunks):
        return chunkft.ChunkAdamW(model, lr=1e-3, chunks=chunks, interval=1, **UPDATES[update])

    model = build("qwen3-moe", "grouped_mm")
    optimizer = start(model, 6)
    train(model, optimizer, 0, 12)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 12, 18)

    same = build("qwen3-moe", "grouped_mm")
    same.load_state_dict(weights)
    resumed = start(same, 6)
    resumed.load_state_dict(state)
    train(same, resumed, 12, 18)
    for (name, p), q in zip(model.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q), name

    other = build("qwen3-moe", "grouped_mm")
    other.load_state_dict(weights)
    recut = start(other, 4)
    recut.load_state_dict(state)
    assert len(recut.plan) == 4
    name = "model.layers.1.mlp.experts.down_proj"
    moved = [piece for piece in recut.plan.slices() if piece.name == name]
    assert {piece.dim for piece in moved} == {0}
    train(other, recut, 12, 20)
    assert not torch.equal(other.get_parameter(name), weights[name])


def test_weights_of_one_module_come_and_go_apart():
    model = build("mixtral", "eager")
    layer = expert_modules(model)[0]
    attachment = chunkft.attach(layer)
    attachment.freeze()
    up, down = (
        next(spec for spec in attachment.specs if spec.name == name) for name in ("gate_up_proj", "down_proj")
    )
    arguments = torch.randn(5, 36), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]), torch.ones(5, 2)
    pairs = attachment.activate([up.slice(0, 0, 1), down.slice(0, 1, 3), up.slice(0, 2, 3)])
    layer(*arguments).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for _, leaf in pairs)
    layer.down_proj.data = layer.down_proj.data.clone()  # moved: its leaves are bound anew, the others stay
    layer(*arguments).square().sum().backward()
    moved = dict(attachment.active())
    assert moved[pairs[1][0]].data_ptr() == layer.down_proj[1].data_ptr()
    for piece, leaf in attachment.active():
        doubled, leaf.grad = leaf.grad, None
        assert doubled is not None, piece
    layer.down_proj = torch.nn.Parameter(layer.down_proj.detach().clone())  # replaced
    layer(*arguments).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for _, leaf in attachment.active())
    attachment.detach()
    assert "forward" not in layer.__dict__


def test_a_copy_of_a_model_with_active_experts_trains_by_itself():
    model = build("mixtral", "grouped_mm")
    loss = tiny_transformers.loss_of("mixtral")
    dense = dense_gradients(copy.deepcopy(model), loss)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    twin = copy.deepcopy(model)
    loss(twin).backward()
    for name, p in twin.named_parameters():
        assert torch.equal(p.grad, dense[name]), name
    optimizer.detach()


@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_other_implementations_are_atomic_and_exact(implementation):
    model = build("mixtral", implementation)
    if implementation == "eager":  # another forward on the instance: what it computes is not known
        for module in expert_modules(model):
            module.forward = functools.partial(type(module).forward, module)
    assert all(operator_for(module) is None for module in expert_modules(model))
    plan = chunkft.partition(model, 4, row_multiple=1)
    assert {piece.dim for piece in experts(plan)} == {None}
    assert_slices_equal_dense(model, plan, tiny_transformers.loss_of("mixtral"))


@pytest.mark.filterwarnings("default:the weight .* is used without a call:UserWarning")
def test_another_implementation_after_the_plan_was_made_stays_exact():
    model = build("mixtral", "eager")
    loss = tiny_transformers.loss_of("mixtral")
    plan = chunkft.partition(model, 6, row_multiple=1)
    model.set_experts_implementation("batched_mm")
    with pytest.warns(UserWarning, match="experts.*is used without a call"):
        assert_slices_equal_dense(model, plan, loss)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bf16_gradients_have_the_bits_of_the_dense_rows(implementation):
    # grouped_mm takes 16-bit matrices only where their rows are multiples of 16 bytes
    model = build("qwen3-moe", implementation, hidden_size=48, moe_intermediate_size=24).bfloat16()
    loss = tiny_transformers.loss_of("qwen3-moe")
    dense = dense_gradients(copy.deepcopy(model), loss)
    seen = 0
    for piece, gradient in chunk_gradients(model, chunkft.partition(model, 9, row_multiple=1), loss):
        if len(piece.parameter_shape) == 3:
            assert torch.equal(gradient, window(piece, dense[piece.name])), piece
            seen += 1
    assert seen > 4


def test_gradients_are_those_of_autocast():
    model = build("mixtral", "eager")

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return tiny_transformers.loss_of("mixtral")(model)

    assert_slices_equal_dense(model, chunkft.partition(model, 6, row_multiple=1), loss)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_blocks_leave_the_experts_out_and_compute_no_whole_gradient(implementation):
    model = build("mixtral", implementation)
    plan = chunkft.partition(model, 4, row_multiple=1)
    loss = tiny_transformers.loss_of("mixtral")
    dense = dense_gradients(copy.deepcopy(model), loss)
    compilable(model)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for piece, gradient in chunk_gradients(model, plan, loss):  # a gradient of a whole weight would warn
        assert_close_to_exact(
            gradient, window(piece, dense[piece.name]), window(piece, dense[piece.name]).double()
        )
    torch.compiler.reset()


class Gated(nn.Module):
    """A module of one's own with two weights that can be sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(9, 6))
        self.down = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.up).tanh(), self.down)


def sliced_gated(module, active, x):
    hidden = sliced_linear(x, module.up, None, active.get("up", ())).tanh()
    return sliced_linear(hidden, module.down, None, active.get("down", ()))


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_an_operator_of_ones_own_may_have_several_weights(slice_dim, monkeypatch):
    monkeypatch.setattr(operators, "_OPERATORS", dict(operators._OPERATORS))
    register_operator(Gated, SlicedOperator(sliced_gated, weights=("up", "down")))
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), Gated(), Gated())
    x = torch.randn(4, 5)
    for chunks in (1, 3, 7):
        plan = chunkft.partition(model, chunks, slice_dim=slice_dim, row_multiple=1)
        assert {piece.dim for piece in plan.slices() if not piece.name.endswith("bias")} == {slice_dim}
        assert_slices_equal_dense(model, plan, lambda m: m(x).square().sum())
