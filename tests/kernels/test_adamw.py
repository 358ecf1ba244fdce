"""AdamW on the CPU: the bits of torch.optim.AdamW, and every kind of master as its definition says."""

import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from thorough import ASKED
from torch import nn

from chunkft.kernels import apply_residual, gpu, split_residual, stochastic_round
from chunkft.kernels.adamw import adamw

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPES = [(3, 5), (64, 33), (1,), (), (0, 4), (2, 3, 4), (2047,)]


class Chunk:
    """Tensors of some slices, all of different step counts."""

    def __init__(self, shapes, dtype=torch.float32, grad_dtype=None, state_dtype=None, master="none"):
        state_dtype = state_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
        self.master = master
        self.params = [torch.randn(shape).to(dtype) for shape in shapes]
        self.exp_avgs = [torch.zeros(shape, dtype=state_dtype) for shape in shapes]
        self.exp_avg_sqs = [torch.zeros(shape, dtype=state_dtype) for shape in shapes]
        self.steps = torch.arange(len(shapes), dtype=torch.float32)
        self.grad_dtype = grad_dtype or dtype
        self.extra = {}
        if master == "residual":
            self.extra = {"residuals": [torch.zeros(shape, dtype=torch.int16) for shape in shapes]}
        if master == "fp32":
            self.extra = {"masters": [param.float() for param in self.params]}

    def gradients(self):
        return [torch.randn(param.shape).to(self.grad_dtype) for param in self.params]

    def update(self, grads, **options):
        options = {"lr": 1e-2, "master": self.master, **self.extra, **options}
        adamw(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.steps, **options)

    def tensors(self):
        kept = [entry for entries in self.extra.values() for entry in entries]
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, self.steps, *kept]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.tensors(), right.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("betas", "weight_decay", "eps"),
    [((0.9, 0.999), 0.01, 1e-8), ((0.3, 0.5), 0.0, 1e-3), ((0.0, 0.99), 0.3, 0.0)],
)
def test_the_bits_of_torch_adamw(dtype, betas, weight_decay, eps):
    chunk = Chunk(SHAPES, dtype)
    chunk.steps.zero_()
    theirs = [nn.Parameter(param.clone()) for param in chunk.params]
    optimizer = torch.optim.AdamW(
        theirs, lr=3e-3, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False
    )
    for _ in range(7):
        grads = chunk.gradients()
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        chunk.update(grads, lr=3e-3, betas=betas, eps=eps, weight_decay=weight_decay)
    for j, parameter in enumerate(theirs):
        state = optimizer.state[parameter]
        assert torch.equal(chunk.params[j], parameter)
        assert torch.equal(chunk.exp_avgs[j], state["exp_avg"])
        assert torch.equal(chunk.exp_avg_sqs[j], state["exp_avg_sq"])
        assert chunk.steps[j] == 7


def test_each_slice_has_a_step_count_a_rate_and_a_decay_of_its_own():
    chunk = Chunk([(40,), (40,)])
    chunk.params[1].copy_(chunk.params[0])
    alone = copy.deepcopy(chunk)
    grads = [torch.randn(40)] * 2
    chunk.update(grads, lr=[0.1, 0.2], weight_decay=[0.0, 0.5])
    for j, (lr, weight_decay) in enumerate([(0.1, 0.0), (0.2, 0.5)]):
        adamw(alone.params[j : j + 1], grads[:1], alone.exp_avgs[j : j + 1], alone.exp_avg_sqs[j : j + 1],
              [alone.steps[j : j + 1]], lr=lr, weight_decay=weight_decay)  # fmt: skip
    assert same(chunk, alone)
    assert not torch.equal(chunk.params[0], chunk.params[1])


def test_rows_and_columns_of_a_weight_are_updated_in_place():
    weight = torch.randn(20, 30)
    kept = weight.clone()
    pieces = [weight[3:9], weight[9:, 4:17]]
    chunk = Chunk([piece.shape for piece in pieces])
    alone = copy.deepcopy(chunk)
    chunk.params, alone.params = pieces, [piece.clone() for piece in pieces]
    grads = chunk.gradients()
    chunk.update(grads)
    alone.update(grads)
    assert same(chunk, alone)
    outside = torch.ones(20, 30, dtype=torch.bool)
    outside[3:9] = outside[9:, 4:17] = False
    assert torch.equal(weight[outside], kept[outside])
    assert not (weight[~outside] == kept[~outside]).any()


def test_dense_strides_of_another_order():
    chunk = Chunk([(2, 3, 4, 5)])
    alone = copy.deepcopy(chunk)
    for tensors in (chunk.params, chunk.exp_avgs, chunk.exp_avg_sqs):
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    grads = chunk.gradients()
    for _ in range(3):
        chunk.update([grads[0].to(memory_format=torch.channels_last)])
        alone.update(grads)
    assert same(chunk, alone)
    assert chunk.params[0].stride() == (60, 1, 15, 3)


def test_residual_is_an_fp32_master_bit_for_bit_over_thousands_of_steps():
    chunk = Chunk([(131,)], torch.bfloat16, torch.float32, master="residual")
    reference = Chunk([(131,)])
    reference.params = [chunk.params[0].float()]
    reference.steps = chunk.steps.clone()
    for _ in range(10_000 if ASKED else 2_000):
        grads = [torch.randn(131) + 0.05]
        chunk.update(grads, lr=1e-4)
        reference.update(grads, lr=1e-4)
    assert torch.equal(apply_residual(chunk.params[0], chunk.extra["residuals"][0]), reference.params[0])
    assert torch.equal(chunk.exp_avg_sqs[0], reference.exp_avg_sqs[0])
    assert (chunk.params[0].float() != reference.params[0]).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_fp32_master_keeps_what_the_weight_cannot(dtype):
    chunk = Chunk([(50, 3)], dtype, master="fp32")
    reference = Chunk([(50, 3)])
    reference.params = [chunk.params[0].float()]
    for _ in range(40):
        grads = chunk.gradients()
        chunk.update(grads, lr=1e-5)
        reference.update([grad.float() for grad in grads], lr=1e-5)
    assert torch.equal(chunk.extra["masters"][0], reference.params[0])
    assert torch.equal(chunk.params[0], reference.params[0].to(dtype))


def test_a_weight_that_others_changed_wins_over_its_master():
    for master in ("fp32", "residual"):
        chunk = Chunk([(8,)], torch.bfloat16, master=master)
        for _ in range(3):
            chunk.update(chunk.gradients())
        before = (
            apply_residual(chunk.params[0], chunk.extra["residuals"][0]) if master == "residual" else None
        )
        chunk.params[0][2:5] = 0
        chunk.update([torch.zeros(8)], lr=0.0)
        assert (chunk.params[0][2:5] == 0).all()
        assert chunk.params[0].isfinite().all()
        if before is not None:
            after = apply_residual(chunk.params[0], chunk.extra["residuals"][0])
            assert torch.equal(after[5:], before[5:])


def test_stochastic_rounds_the_fp32_update_by_seed_and_place():
    chunk = Chunk([(400,), (30, 7)], torch.bfloat16, torch.float32, master="stochastic")
    exact = Chunk([(400,), (30, 7)])
    exact.params = [param.float() for param in chunk.params]
    start = [param.clone() for param in chunk.params]
    grads = exact.gradients()
    exact.update(grads)
    again, other = copy.deepcopy(chunk), copy.deepcopy(chunk)
    chunk.update(grads, seed=[17, (17 + 0x9E3779B97F4A7C15) % 2**63])
    again.update(grads, seed=17)
    other.update(grads, seed=18)
    assert same(chunk, again)
    assert not same(chunk, other)
    assert torch.equal(chunk.params[0], stochastic_round(exact.params[0], 17))
    assert all(not torch.equal(a, b) for a, b in zip(start, chunk.params, strict=True))


def test_stochastic_is_unbiased():
    # One update of 4,000 equal weights: the mean has the standard deviation sqrt(p(1-p)/4000) of a gap of 2^-8.
    # Ten seeds within 4.5 of these: by chance one run in 15,000 would fail.
    for seed in range(10):
        chunk = Chunk([(4000,)], torch.bfloat16, torch.float32, master="stochastic")
        chunk.params[0].fill_(0.75)
        exact = Chunk([(1,)])
        exact.params[0].fill_(0.75)
        exact.steps = chunk.steps.clone()
        chunk.update([torch.ones(4000)], seed=seed, lr=1e-3)
        exact.update([torch.ones(1)], lr=1e-3)
        value = exact.params[0].double()
        upper, _ = split_residual(exact.params[0] + 2**-9)
        p = 1 - (upper.double() - value) / 2**-8
        deviation = math.sqrt(float(p * (1 - p)) / 4000) * 2**-8
        assert abs(float(chunk.params[0].double().mean() - value)) < 4.5 * deviation


def test_gradients_are_unscaled_and_clipped_but_not_changed():
    chunk, plain = Chunk([(33, 3)]), Chunk([(33, 3)])
    plain.params = [param.clone() for param in chunk.params]
    grads = chunk.gradients()
    kept = grads[0].clone()
    chunk.update(grads, grad_scale=torch.tensor([3.0]), clip_factor=torch.tensor(0.3))
    plain.update([kept * (torch.tensor(3.0).double().reciprocal().float()) * 0.3])
    assert same(chunk, plain)
    assert torch.equal(grads[0], kept)


def test_found_inf_leaves_everything_as_it_is():
    chunk = Chunk(SHAPES, torch.bfloat16, master="residual")
    before = copy.deepcopy(chunk)
    grads = [torch.full_like(param, math.inf) for param in chunk.params]
    chunk.update(grads, found_inf=torch.tensor(1.0))
    assert same(chunk, before)
    chunk.update(chunk.gradients(), found_inf=torch.tensor(0.0))
    assert torch.equal(chunk.steps, before.steps + 1)
    assert not same(chunk, before)


def test_no_slices_is_nothing_to_do():
    adamw([], [], [], [], [], lr=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, r"backend='cuda' is not known; allowed are 'auto', 'triton', 'torch' and 'host'"),
        ({"backend": "triton"}, r"on a CPU it works only with TRITON_INTERPRET=1"),
        ({"master": "fp16"}, r"master='fp16' is not known"),
        ({"master": "residual"}, r"master='residual' needs residuals"),
        ({"residuals": [torch.zeros(3).short()]}, r"master='none' takes no residuals"),
        ({"master": "stochastic"}, r"params\[0\] is torch\.float32; master='stochastic' needs one of torch\.bfl"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\) is not allowed"),
        ({"eps": -1.0}, r"eps=-1\.0 is not allowed"),
        ({"lr": math.nan}, r"lr=nan is not allowed"),
        ({"lr": [0.1, 0.2]}, r"lr must have one entry for each of the 1 params, got 2"),
        ({"weight_decay": math.inf}, r"weight_decay=inf is not allowed"),
        ({"seed": -1}, r"seed=-1 is not allowed"),
        ({"seed": 2**63}, r"seed=9223372036854775808 is not allowed"),
        ({"clip_factor": torch.ones(2)}, r"clip_factor must be a float32 tensor of one element on cpu"),
        ({"found_inf": torch.tensor(1)}, r"found_inf must be a float32 tensor of one element on cpu, got torch.int64"),
        ({"steps": torch.zeros(2)}, r"steps must be a tensor of shape \(1,\), got \(2,\)"),
        ({"steps": [torch.tensor(1)]}, r"steps\[0\] must be a float32 tensor of one element"),
        ({"grads": []}, r"grads must have one entry for each of the 1 params, got 0"),
        ({"grads": [torch.zeros(4)]}, r"slice 0: all tensors must be of the parameter's shape \(3,\) on cpu"),
        ({"exp_avgs": [torch.zeros(3).int()]}, r"slice 0: gradient and moments must be floating"),
        ({"exp_avgs": [torch.zeros(6)[::2]]}, r"slice 0: exp_avg, exp_avg_sq, master and residual must be contig"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_and_change_nothing(changes, message):
    step, param = torch.zeros(1), torch.ones(3)
    arguments = {
        "params": [param],
        "grads": [torch.ones(3)],
        "exp_avgs": [torch.zeros(3)],
        "exp_avg_sqs": [torch.zeros(3)],
        "steps": [step],
        "lr": 0.1,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        adamw(**arguments)
    assert step == 0
    assert (param == 1).all()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_an_update_is_not_captured_in_a_cuda_graph(monkeypatch, backend):
    """A replay would repeat rate and step count, and copy a table from memory that somebody else has by then."""
    monkeypatch.setattr(gpu, "is_captured", lambda tensor: True)
    tensors = [torch.ones(4) for _ in range(4)]
    steps = torch.zeros(1)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        adamw(*([t] for t in tensors), steps, lr=0.1, backend=backend)
    assert all(torch.equal(t, torch.ones(4)) for t in tensors)
    assert not steps.any()
    monkeypatch.undo()
    adamw(*([t] for t in tensors), steps, lr=0.1, backend=backend)
    assert not torch.equal(tensors[0], torch.ones(4))


def test_a_capture_is_seen_on_the_device_of_the_tensors(monkeypatch):
    """Another device's stream may be captured, or not, at the same time."""
    devices = []

    @contextlib.contextmanager
    def on(device):
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: devices == ["cuda:1"])
    told = [gpu.is_captured(SimpleNamespace(is_cuda=True, device=f"cuda:{i}")) for i in range(2)]
    assert told == [False, True]
    assert not gpu.is_captured(torch.ones(1))
