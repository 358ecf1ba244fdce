"""``weight.grad`` reads and changes as the dense gradient that is zero outside of the active slices."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers import small, small_loss, window
from residencies import MODES
from torch import nn

import chunkft
from chunkft.autograd import GradientView, SliceGradients

SHAPE = (33, 12)
NAME = "1.weight"
PLANS = {
    "rows": {"chunks": 3},
    "columns": {"chunks": 5, "slice_dim": 1},
    "several slices": {"chunks": 3, "partition": "interleaved"},
    "whole": {"chunks": 1},
}


def noise(*shape, seed=5):
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


MASK = noise() > 0


def build(plan):
    """A model with gradients, until the chunk that has slices of the weight is active."""
    model = small().eval()
    optimizer = chunkft.ChunkAdamW(model, lr=0.0, weight_decay=0.0, interval=1, **PLANS[plan])
    for _ in range(len(optimizer.plan)):
        small_loss(model).backward()
        pieces = [(piece, leaf) for piece, leaf in optimizer.active_parameters() if piece.name == NAME]
        if pieces and isinstance(model.get_parameter(NAME).grad, GradientView):
            return model, optimizer, pieces
        optimizer.step()
    raise AssertionError("no chunk has slices of the weight")


def masked(pieces):
    dense = torch.zeros(SHAPE)
    for piece, leaf in pieces:
        window(piece, dense).copy_(leaf.grad)
    return dense


def set_rows(g, value=0.0):
    g[:4] = value


def set_where(g):
    g[MASK] = 0.25


def set_rows_of(g):
    g[torch.tensor([1, 5, 30])] = noise(3, 12)


def add_to_a_row(g):
    g[2] += 1.5


def assign_data(g):
    g.data = g.data * MASK


def into_out(g):
    torch.add(noise(), noise(seed=6), out=g)


def random(operation):
    def change(g):
        torch.manual_seed(3)
        operation(g)

    return change


CHANGES = {
    "mul mask": lambda g: g.mul_(MASK),
    "mul row mask": lambda g: g.mul_(noise(33, 1)),
    "mul number": lambda g: g.mul_(0.5),
    "div tensor": lambda g: g.div_(noise()),
    "div mode": lambda g: g.div_(0.3, rounding_mode="floor"),
    "add number": lambda g: g.add_(0.5),
    "add number alpha": lambda g: g.add_(0.5, alpha=3),
    "add": lambda g: g.add_(noise()),
    "add alpha": lambda g: g.add_(noise(), alpha=0.1),
    "sub alpha": lambda g: g.sub_(noise(12), alpha=0.1),
    "addcmul": lambda g: g.addcmul_(noise(), noise(seed=6), value=0.2),
    "addcdiv": lambda g: g.addcdiv_(noise(), noise(seed=6), value=0.2),
    "lerp": lambda g: g.lerp_(noise(), 0.3),
    "lerp tensor": lambda g: g.lerp_(noise(), noise(seed=6)),
    "addmm": lambda g: g.addmm_(noise(33, 2), noise(2, 12), beta=0.5, alpha=2),
    "copy": lambda g: g.copy_(noise()),
    "copy double": lambda g: g.copy_(noise().double()),
    "fill": lambda g: g.fill_(0.5),
    "zero": lambda g: g.zero_(),
    "masked fill": lambda g: g.masked_fill_(MASK, 0.0),
    "masked scatter": lambda g: g.masked_scatter_(MASK, noise()),
    "clamp": lambda g: g.clamp_(-0.01, 0.02),
    "clamp tensors": lambda g: g.clamp_(-noise().abs(), noise().abs()),
    "clamp min tensor": lambda g: g.clamp_min_(noise()),
    "clip": lambda g: g.clip_(max=0.01),
    "sign": lambda g: g.sign_(),
    "neg": lambda g: g.neg_(),
    "abs": lambda g: g.abs_(),
    "pow": lambda g: g.pow_(2),
    "exp": lambda g: g.exp_(),
    "tanh": lambda g: g.tanh_(),
    "cumsum": lambda g: g.cumsum_(0),
    "tril": lambda g: g.tril_(),
    "renorm": lambda g: g.renorm_(2, 0, 0.01),
    "nan to num": lambda g: g.nan_to_num_(0.0),
    "compare": lambda g: g.gt_(0.0),
    "normal": random(lambda g: g.normal_()),
    "uniform": random(lambda g: g.uniform_(-1, 1)),
    "dropout": random(lambda g: torch.nn.functional.dropout(g, 0.5, inplace=True)),
    "index fill": lambda g: g.index_fill_(0, torch.tensor([0, 9, 32]), 0.0),
    "index add": lambda g: g.index_add_(0, torch.tensor([0, 9]), noise(2, 12), alpha=2),
    "index copy": lambda g: g.index_copy_(1, torch.tensor([0, 9]), noise(33, 2)),
    "index put": lambda g: g.index_put_((torch.tensor([1, 1]),), noise(2, 12), accumulate=True),
    "scatter": lambda g: g.scatter_(0, torch.zeros(1, 12, dtype=torch.long), 0.0),
    "with itself": lambda g: g.mul_(g),
    "with a part of itself": lambda g: g.div_(g[1, 1].abs() + 1),
    "centralise": lambda g: g.sub_(g.mean(dim=1, keepdim=True)),
    "rows": set_rows,
    "rows of a tensor": lambda g: set_rows(g, noise(12)),
    "where": set_where,
    "rows by index": set_rows_of,
    "a row in place": add_to_a_row,
    "view of rows": lambda g: g[:4].zero_(),
    "flat": lambda g: g.view(-1).mul_(2),
    "flat part": lambda g: g.view(-1)[7:200].add_(noise(193), alpha=2),
    "transposed": lambda g: g.t().mul_(noise(12, 33)),
    "reshaped": lambda g: g.reshape(11, 36)[1::2].fill_(1.0),
    "split": lambda g: [part.mul_(n) for n, part in enumerate(g.split(10))],
    "unbind": lambda g: [row.div_(row.norm() + 1) for row in g],
    "diagonal": lambda g: g.diagonal().fill_(3.0),
    "narrow": lambda g: g.narrow(1, 2, 5).copy_(noise(33, 5)),
    "expanded": lambda g: g[None].squeeze(0).permute(1, 0).unsqueeze(-1).neg_(),
    "data": lambda g: g.data.mul_(MASK),
    "data part": lambda g: g.data[3:20].mul_(0.1),
    "data assigned": assign_data,
    "detach": lambda g: g.detach().add_(noise(), alpha=0.5),
    "detach in place": lambda g: g.detach_().zero_(),
    "bits": lambda g: g.view(torch.int32).bitwise_and_(-65536),
    "out": into_out,
    "out of itself": lambda g: torch.mul(g, MASK, out=g),
    "foreach add": lambda g: torch._foreach_add_([g], [noise()], alpha=0.5),
    "foreach mul tensors": lambda g: torch._foreach_mul_([g], [noise()]),
    "foreach numbers": lambda g: torch._foreach_mul_([g], [0.3]),
    "foreach add number": lambda g: torch._foreach_add_([g], 0.5),
    "foreach copy": lambda g: torch._foreach_copy_([g], [noise()]),
    "foreach parts": lambda g: torch._foreach_mul_([g[:20], g[20:]], [2.0, 3.0]),
    "foreach parts by one number": lambda g: torch._foreach_mul_([g[:20], g[20:]], 2.0),
    "foreach lerp": lambda g: torch._foreach_lerp_([g], [noise()], 0.5),
    "foreach addcmul": lambda g: torch._foreach_addcmul_([g], [noise()], [noise(seed=6)], 0.5),
    "unscale": lambda g: torch._amp_foreach_non_finite_check_and_unscale_(
        [g], torch.zeros(1), torch.full((1,), 0.5)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_change_is_that_of_the_dense_gradient_in_the_slices(change, plan):
    model, _, pieces = build(plan)
    dense = masked(pieces)
    before = dense.clone()
    CHANGES[change](model.get_parameter(NAME).grad)
    CHANGES[change](dense)
    inside = torch.zeros(SHAPE)
    for piece, leaf in pieces:
        torch.testing.assert_close(leaf.grad, window(piece, dense), rtol=0, atol=0, equal_nan=True)
        window(piece, inside).fill_(1)
    if plan == "whole" and change not in ("nan to num", "normal", "uniform", "dropout"):
        assert not torch.equal(dense, before)
    shown = model.get_parameter(NAME).grad.clone()
    torch.testing.assert_close(shown, masked(pieces), rtol=0, atol=0, equal_nan=True)
    assert not shown[inside == 0].any()


def autocast(g):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return g @ noise(12, 3)


def filled(g):
    other = noise()
    other.copy_(g)
    other.add_(g, alpha=2)
    return other


READS = {
    "isnan": lambda g: torch.isnan(g).any(),
    "isfinite": lambda g: g.isfinite().all(),
    "largest": lambda g: g.abs().max(),
    "std": lambda g: g.std(),
    "squares": lambda g: (g**2).sum(),
    "sum of a dtype": lambda g: g.sum(dtype=torch.float64),
    "histogram": lambda g: torch.histc(g, bins=7),
    "zeros": lambda g: (g == 0).sum(),
    "norms of rows": lambda g: g.norm(dim=1),
    "norm with dimensions": lambda g: torch.linalg.vector_norm(g, keepdim=True),
    "norm of a dtype": lambda g: torch.linalg.vector_norm(g, 2, dtype=torch.float64),
    "smallest": lambda g: torch.linalg.vector_norm(g, -float("inf")),
    "smallest of a list": lambda g: torch._foreach_norm([g], -1.0)[0],
    "norm of a part": lambda g: g[3:17].norm(),
    "norms of parts": lambda g: torch.stack(torch._foreach_norm([g[3:17], g[:, 2]])),
    "nuclear": lambda g: torch.linalg.matrix_norm(g, "nuc"),
    "topk": lambda g: g.flatten().topk(5).values,
    "flat": lambda g: g.view(-1),
    "part": lambda g: g[3:17, ::2],
    "indexed": lambda g: g[torch.tensor([2, 30, 4])],
    "where": lambda g: g[MASK],
    "second": lambda g: torch.add(noise(), g),
    "minus": lambda g: 1 - g,
    "comparison": lambda g: noise() > g,
    "into another": filled,
    "stack": lambda g: torch.stack([g, g]),
    "cat": lambda g: torch.cat([g, noise(), g.t().reshape(33, 12)]),
    "product": lambda g: g @ g.t(),
    "cosine": lambda g: torch.nn.functional.cosine_similarity(g.flatten(), noise().flatten(), dim=0),
    "einsum": lambda g: torch.einsum("ij,ij->i", g, noise()),
    "autocast": autocast,
    "bfloat16": lambda g: g.bfloat16(),
    "to": lambda g: g.to("cpu", torch.float64),
    "clone": lambda g: g.clone(),
    "numpy": lambda g: torch.tensor(g.detach().cpu().numpy()),
    "asarray": lambda g: torch.tensor(np.asarray(g, dtype=np.float64)),
    "list": lambda g: torch.tensor(g.tolist()),
    "item": lambda g: torch.tensor([g[3, 4].item(), float(g[30, 1])]),
    "deepcopy": lambda g: copy.deepcopy([g, g])[1],
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "torch.save": lambda g: saved_and_loaded(g),
    "foreach": lambda g: torch._foreach_mul([g], 2.0)[0],
    "parameters_to_vector": lambda g: nn.utils.parameters_to_vector([g]),
    "allclose": lambda g: torch.tensor(torch.allclose(g, g.clone())),
    "like": lambda g: torch.zeros_like(g),
    "what it is": lambda g: torch.tensor(
        [g.is_sparse, g.shape == SHAPE, g.is_contiguous(), g.requires_grad, g.numel() == 396, len(g) == 33]
    ),
}


def saved_and_loaded(g):
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_read_is_that_of_the_masked_dense_gradient(read, plan):
    model, _, pieces = build(plan)
    dense = masked(pieces)
    # copies of a view are plain tensors, views of it may stay ones
    found = torch.clone(READS[read](model.get_parameter(NAME).grad))
    torch.testing.assert_close(found, READS[read](dense), equal_nan=True)
    torch.testing.assert_close(masked(pieces), dense, rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied",
    [
        lambda g: g.double(),
        lambda g: g.to(torch.bfloat16),
        lambda g: g.clone(),
        lambda g: g.to("cpu", copy=True),
        lambda g: copy.deepcopy(g),
        lambda g: g.detach().clone(),
        lambda g: g + 0,
        lambda g: g[:5].half(),
        lambda g: torch.empty_like(g).copy_(g),
    ],
)
def test_work_on_a_copy_leaves_the_gradients_alone(copied):
    model, _, pieces = build("rows")
    before = masked(pieces)
    assert before.any()
    copy_of = copied(model.get_parameter(NAME).grad)
    assert type(copy_of) is torch.Tensor
    copy_of.mul_(0.0)
    assert torch.equal(masked(pieces), before)


def test_memory_that_would_lose_what_is_written_cannot_be_written_to():
    model, _, _ = build("rows")
    g = model.get_parameter(NAME).grad
    for array in (g.numpy(), g[2:].numpy(), np.asarray(g), g.data.cpu().numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for change in (
        lambda: g.t_(),
        lambda: g.resize_(3),
        lambda: g.set_(noise()),
        lambda: g.squeeze_(),
        lambda: torch.from_dlpack(g),
        lambda: g[1:].unsqueeze_(0),
    ):
        with pytest.raises(RuntimeError, match=r"is not possible on the \.grad of a weight that is trained"):
            change()
    with pytest.raises(RuntimeError, match=r"must keep the shape \(33, 12\), got \(2,\)"):
        g.data = noise(2)
    with pytest.warns(UserWarning, match="resized"), pytest.raises(RuntimeError, match=r"out= must have"):
        torch.add(noise(2), noise(2), out=g)


def test_a_model_that_moves_to_another_dtype_and_back_keeps_its_gradients():
    model, _, pieces = build("rows")
    before = masked(pieces)
    model.double().float()
    small_loss(model)
    assert torch.equal(model.get_parameter(NAME).grad.clone(), before)


def test_a_view_prints_its_values():
    model, _, pieces = build("rows")
    assert repr(masked(pieces)) in repr(model.get_parameter(NAME).grad)


@pytest.mark.parametrize(
    "use",
    [
        lambda g: g.clone(),
        lambda g: g.isfinite().all(),
        lambda g: g.abs().max(),
        lambda g: g.add_(noise(*g.shape)),
        lambda g: g.add_(noise(*g.shape), alpha=0.1),
        lambda g: g.copy_(noise(*g.shape)),
        lambda g: g.add_(1.0),
        lambda g: g[:2].zero_(),
        lambda g: set_rows(g),
        lambda g: g.numpy(),
        lambda g: g.norm(dim=0),
        lambda g: torch._foreach_add_([g], [noise(*g.shape)]),
    ],
)
def test_gradients_that_were_used_up_say_so(use):
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, **MODES["backward"])
    small_loss(model).backward()
    carrier = next(p for p in model.parameters() if isinstance(p.grad, GradientView))
    assert "GradientView(shape=" in repr(carrier.grad)
    with pytest.raises(RuntimeError, match=r"with update='backward', which has used them to update"):
        use(carrier.grad)
    model.double().float()
    optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_makes_no_dense_gradient(foreach, monkeypatch):
    model, _, _ = build("several slices")

    def fill(*args):
        raise AssertionError("a dense gradient was made")

    monkeypatch.setattr(SliceGradients, "fill", fill)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01, foreach=foreach)
    nn.utils.clip_grad_value_(model.parameters(), 0.001, foreach=foreach)
    nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=foreach)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_().data.mul_(0.5).div_(torch.tensor(2.0)).pow_(2).add_(0.1, alpha=2)
    model.zero_grad(set_to_none=False)
