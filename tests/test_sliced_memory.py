"""What sliced operators allocate and keep: nothing dense, and inputs of active slices only."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import chunkft
from chunkft import Slice
from chunkft.autograd import sliced_conv1d, sliced_linear


class Allocations(TorchDispatchMode):
    """Sizes of all tensors with new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_no_dense_gradient_is_ever_made(kind, slice_dim):
    module = {"linear": nn.Linear(512, 768), "conv1d": Conv1D(512, 768), "embedding": nn.Embedding(768, 512)}[
        kind
    ]
    plan = chunkft.partition(module, 12, slice_dim=slice_dim)
    x = (
        torch.randint(0, 768, (5,))
        if kind == "embedding"
        else torch.randn(5, module.weight.shape[kind == "linear"])
    )
    attachment = chunkft.attach(module)
    attachment.freeze()
    for chunk in plan:
        attachment.activate(chunk.slices)
        loss = module(x).square().sum()
        with Allocations() as allocations:
            loss.backward()
        assert allocations.sizes
        # a chunk, the batch, and a block of 32 on either side of the slice
        assert max(allocations.sizes) <= max(piece.numel for piece in chunk.slices) + 2 * 32 * 768
        assert max(allocations.sizes) < module.weight.numel() // 2


def saved_by(call) -> list[torch.Tensor]:
    """What a forward pass keeps for the backward pass."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result.requires_grad
    return saved


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_of_a_column_slice_only_its_columns_are_kept(kind):
    shape = (50, 320) if kind == "linear" else (320, 50)
    sliced, dim = (sliced_linear, 1) if kind == "linear" else (sliced_conv1d, 0)
    weight = torch.randn(shape)
    for dtype, kept in [(torch.float32, 64), (torch.bfloat16, 35)]:
        piece = Slice("w", dim, 100, 135, shape)
        leaf = piece.of(weight.to(dtype)).detach().requires_grad_(True)
        x = torch.randn(7, 320).to(dtype)
        (saved,) = saved_by(
            lambda x=x, leaf=leaf, piece=piece: sliced(x, weight.to(x.dtype), None, [(piece, leaf)])
        )
        assert saved.shape == (7, kept)
        assert saved.untyped_storage().nbytes() == 7 * kept * dtype.itemsize


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_of_an_output_slice_the_input_is_kept_once(kind):
    shape = (50, 320) if kind == "linear" else (320, 50)
    sliced, dim = (sliced_linear, 0) if kind == "linear" else (sliced_conv1d, 1)
    weight, x = torch.randn(shape), torch.randn(7, 320)
    pieces = [Slice("w", dim, a, a + 7, shape) for a in (0, 7, 33)]
    active = [(piece, piece.of(weight).detach().requires_grad_(True)) for piece in pieces]
    (saved,) = saved_by(lambda: sliced(x, weight, None, active))
    assert saved.data_ptr() == x.data_ptr()


def test_inputs_are_kept_for_active_slices_only():
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(5)))
    plan = chunkft.partition(model, 5, row_multiple=1)
    x = torch.randn(11, 40)
    attachment = chunkft.attach(model)
    attachment.freeze()
    for active, chunk in enumerate(plan):
        attachment.activate(chunk.slices)
        with chunkft.saved_activations(model) as saved:
            y = model(x)
        # only the input of the active layer; weights above it are parameters
        assert saved.peak_bytes == 11 * 40 * 4, active
        y.sum().backward()
        assert [p.grad is None for p in model.parameters()] == [True] * 5


def test_no_gradient_of_the_input_is_computed_below_the_active_module():
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    attachment = chunkft.attach(model)
    attachment.freeze()
    piece = Slice("2.weight", 0, 3, 9, (12, 12))
    attachment.activate([piece])
    outputs = []
    hooks = [layer.register_forward_hook(lambda m, a, y: outputs.append(y.requires_grad)) for layer in model]
    model(torch.randn(3, 12))
    for hook in hooks:
        hook.remove()
    assert outputs == [False, False, True, True]


def test_saved_tensors_go_through_hooks_and_are_released_by_backward():
    model = nn.Sequential(nn.Embedding(9, 40), nn.Linear(40, 33), Conv1D(5, 33))
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    alive: list[weakref.ref] = []

    def pack(tensor):
        copied = tensor.clone()
        alive.append(weakref.ref(copied))
        return copied

    outputs: list[weakref.ref] = []
    for layer in model:
        layer.register_forward_hook(lambda m, a, y: outputs.append(weakref.ref(y)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randint(0, 9, (4, 3))).square().sum()
    assert len(alive) >= 3
    gc.collect()
    # packing replaced the inputs: nothing else may hold them
    assert [reference() for reference in outputs] == [None] * 3
    loss.backward()
    assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_step_between_forward_and_backward_is_noticed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = chunkft.ChunkAdamW(model, chunks=1, interval=9)
    x = torch.randn(2, 4)
    first, second = model(x).sum(), model(x).sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
