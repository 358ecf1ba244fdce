"""AdamW of slices in host memory: the bits of the torch backend, for any number of threads."""

import math
import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn

from chunkft.kernels import apply_residual
from chunkft.kernels.adamw import adamw
from chunkft.kernels.companding import BLOCK
from chunkft.kernels.host_adamw import HostSlice, host_adamw

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MASTERS = [("none", FP32), ("none", BF16), ("none", FP16), ("fp32", BF16), ("fp32", FP16), ("residual", BF16)]
MASTERS += [("stochastic", BF16)]
# of one element, of no whole vector, tile or block, of more than one part of a thread
SHAPES = [(1,), (), (0, 4), (3, 5), (129,), (2, 3, 4), (1031,), (33, 65)]
LONG = (3 * 65536 + 777,)


@pytest.fixture
def rounded_roots(monkeypatch):
    """The torch backend with roots rounded to nearest, which MKL's are not always."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda self: self.double().pow(0.5).to(self.dtype))


class Chunk:
    """Tensors of some slices, all of different step counts."""

    def __init__(self, shapes, dtype=FP32, grad_dtype=None, first=FP32, second=FP32, master="none"):
        self.master = master
        self.params = [torch.randn(shape).to(dtype) for shape in shapes]
        self.grads = [torch.randn(shape).to(grad_dtype or dtype) for shape in shapes]
        self.exp_avgs = [torch.randn(shape).to(first) for shape in shapes]
        self.exp_avg_sqs = [torch.rand(shape).to(second) for shape in shapes]
        self.steps = torch.arange(len(shapes), dtype=FP32)
        self.extra = {}
        if master == "residual":
            self.extra = {"residuals": [torch.randint(-(2**15), 2**15, shape).short() for shape in shapes]}
        if master == "fp32":
            # some weights were changed by others since
            self.extra = {
                "masters": [p + (torch.rand(p.shape) < 0.5) for p in map(torch.Tensor.float, self.params)]
            }

    def tensors(self):
        kept = [entry for entries in self.extra.values() for entry in entries]
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *kept, self.steps]

    def copy(self):
        other = object.__new__(Chunk)
        other.__dict__ = {
            key: [tensor.clone() for tensor in value] if isinstance(value, list) else value
            for key, value in self.__dict__.items()
        }
        other.steps = self.steps.clone()
        other.extra = {key: [tensor.clone() for tensor in value] for key, value in self.extra.items()}
        return other

    def update(self, backend, **options):
        options = {"lr": 1e-2, "master": self.master, "seed": 5, **self.extra, **options}
        adamw(
            self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps, backend=backend, **options
        )


def assert_same(left, right):
    for a, b in zip(left.tensors(), right.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("moments", [(FP32, FP32), (BF16, FP32), (FP16, BF16)], ids=str)
@pytest.mark.parametrize(("master", "dtype"), MASTERS, ids=str)
def test_the_bits_of_the_torch_backend(master, dtype, moments, rounded_roots):
    for grad_dtype in (FP32, BF16, FP16):
        ours = Chunk(SHAPES, dtype, grad_dtype, *moments, master=master)
        theirs = ours.copy()
        for betas, weight_decay in [((0.9, 0.999), 0.01), ((0.3, 0.5), 0.0)]:
            options = {
                "betas": betas,
                "weight_decay": weight_decay,
                "lr": [0.1 * j for j in range(len(SHAPES))],
            }
            ours.update("host", **options)
            theirs.update("torch", **options)
            assert_same(ours, theirs)


def test_scaled_and_clipped_gradients(rounded_roots):
    ours = Chunk(SHAPES, BF16, FP16, master="residual")
    theirs = ours.copy()
    options = {"grad_scale": torch.tensor(3.0), "clip_factor": torch.tensor(0.7)}
    ours.update("host", **options)
    theirs.update("torch", **options)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("master", "dtype"), MASTERS, ids=str)
def test_any_number_of_threads_gives_the_same_bits(master, dtype, rounded_roots):
    alone = Chunk([(7,), LONG, (3, 5)], dtype, BF16, BF16, master=master)
    reference, before = alone.copy(), torch.get_num_threads()
    shared = [alone.copy() for _ in range(3)]
    try:
        for threads, chunk in enumerate([alone, *shared], 1):
            torch.set_num_threads(threads)
            chunk.update("host")
    finally:
        torch.set_num_threads(before)
    for chunk in shared:
        assert_same(chunk, alone)
    reference.update("torch")
    assert_same(reference, alone)


@pytest.mark.parametrize(("master", "dtype"), MASTERS, ids=str)
def test_rows_and_columns_are_updated_in_place_and_nothing_beside_them(master, dtype, rounded_roots):
    weight = torch.randn(40, 700).to(dtype)
    kept = weight.clone()
    pieces = [weight[3:9], weight[9:, 4:517], weight[0:1, 600:]]
    ours = Chunk([piece.shape for piece in pieces], dtype, master=master)
    theirs = ours.copy()
    if master == "fp32":
        ours.extra["masters"] = [piece.float() for piece in pieces]
        theirs.extra["masters"] = [piece.float() for piece in pieces]
    ours.params, theirs.params = pieces, [piece.clone() for piece in pieces]
    ours.grads = [torch.empty(g.shape[::-1]).t().copy_(g) for g in ours.grads]  # of other strides
    theirs.grads = [g.float().contiguous() for g in ours.grads]
    ours.update("host")
    theirs.update("torch")
    assert_same(ours, theirs)
    outside = torch.ones(40, 700, dtype=torch.bool)
    for rows, columns in [
        (slice(3, 9), slice(None)),
        (slice(9, None), slice(4, 517)),
        (slice(0, 1), slice(600, None)),
    ]:
        outside[rows, columns] = False
    assert torch.equal(weight[outside], kept[outside])


def test_dense_strides_of_another_order(rounded_roots):
    ours = Chunk([(2, 3, 4, 5)], BF16, master="residual")
    for tensors in (ours.params, ours.exp_avgs, ours.exp_avg_sqs, ours.extra["residuals"]):
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    theirs = ours.copy()
    ours.update("host")
    theirs.update("torch")
    assert_same(ours, theirs)


def test_non_finite_gradients_reach_weight_and_moments(rounded_roots):
    ours = Chunk([(300,)], BF16, FP32, master="residual")
    ours.grads[0][5], ours.grads[0][77], ours.grads[0][299] = math.nan, math.inf, -math.inf
    theirs = ours.copy()
    for _ in range(2):
        ours.update("host")
        theirs.update("torch")
        assert_same(ours, theirs)
    assert ours.params[0].isnan().nonzero().flatten().tolist() == [5, 77, 299]


def test_found_inf_leaves_everything_as_it_is():
    chunk = Chunk([(300,)])
    kept = chunk.copy()
    chunk.update("host", found_inf=torch.ones(()))
    assert_same(chunk, kept)
    chunk.update("host", found_inf=torch.zeros(()))
    assert chunk.steps.tolist() == [1]


def test_of_torch_adamw_the_moments_have_the_bits_and_the_weights_are_not_nearer_to_fp64():
    """Roots of MKL are not always the nearest: err(ours against fp64) < 2 err(torch against fp64) + tiny."""
    chunk = Chunk([LONG])
    chunk.exp_avgs[0].zero_()
    chunk.exp_avg_sqs[0].zero_()
    theirs = nn.Parameter(chunk.params[0].clone())
    exact = nn.Parameter(chunk.params[0].double())
    options = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([parameter], foreach=False, **options) for parameter in (theirs, exact)]
    for _ in range(5):
        grad = chunk.grads[0].copy_(torch.randn(LONG))
        theirs.grad, exact.grad = grad.clone(), grad.double()
        for optimizer in optimizers:
            optimizer.step()
        chunk.update("host", **options)
    state = optimizers[0].state[theirs]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":  # which has no fused multiply-adds
        assert torch.equal(chunk.exp_avgs[0], state["exp_avg"])
        assert torch.equal(chunk.exp_avg_sqs[0], state["exp_avg_sq"])
    assert (chunk.params[0] != theirs).float().mean() < 0.01
    tiny = 2.0**-24 * exact.detach().abs().max()
    for largest in (torch.amax, torch.sum):
        errors = [largest((p.detach() - exact.detach()).abs()) for p in (chunk.params[0], theirs)]
        assert errors[0] < 2 * errors[1] + tiny


def decoded(first, second, scales):
    """Moments of 8-bit codes by the definition of the format, in fp64."""
    n = first.numel()
    spread = [scale.double().repeat_interleave(BLOCK)[:n].view(first.shape) for scale in scales]
    y = first.double().abs() / 127
    return first.sign() * y / (2 - y) * spread[0], (second.double() / 255) ** 2 * spread[1]


def encoded(m, v):
    """Positions of the codes, not yet rounded, and scales, in fp64."""
    pad = (0, -m.numel() % BLOCK)
    blocks = [torch.nn.functional.pad(moment.reshape(-1), pad).view(-1, BLOCK) for moment in (m, v)]
    scales = [block.abs().amax(1) for block in blocks]
    u, w = (block / scale[:, None].clamp(min=1e-300) for block, scale in zip(blocks, scales, strict=True))
    places = u.sign() * 127 * 2 * u.abs() / (1 + u.abs()), 255 * w.sqrt()
    return *(place.reshape(-1)[: m.numel()].view(m.shape) for place in places), scales


@pytest.mark.parametrize("shape", [(1,), (127,), (129,), (3, 50), (70000,), (0, 3)], ids=str)
@pytest.mark.parametrize("master", ["none", "residual"])
def test_8_bit_moments(master, shape):
    dtype = BF16 if master == "residual" else FP32
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    param, grad = torch.randn(shape).to(dtype), torch.randn(shape)
    first = torch.randint(-127, 128, shape, dtype=torch.int8)
    second = torch.randint(0, 256, shape, dtype=torch.uint8)
    scales = torch.rand(blocks) + 0.1, torch.rand(blocks) + 0.1
    if n > 1000:
        for tensor in (grad, first, second):
            tensor[256:384] = 0  # a block without anything
        grad[400], first[400], second[400] = 1e-12, 0, 0  # tiny beside others
    extra = torch.zeros(shape, dtype=torch.int16) if master == "residual" else None
    m, v = decoded(first, second, scales)
    m = m + 0.1 * (grad.double() - m)
    v = 0.999 * v + 0.001 * grad.double() ** 2
    root = math.sqrt(1 - 0.999**3)
    weight = param.double() * (1 - 1e-2 * 0.1) - 1e-2 / (1 - 0.9**3) * m / (v.sqrt() / root + 1e-8)
    copies = []
    for threads in (1, 3):
        tensors = [t.clone() for t in (param, first, second, *scales)]
        kept = None if extra is None else extra.clone()
        piece = HostSlice(
            tensors[0], grad, *tensors[1:3], 3.0, 1e-2, 0.1, extra=kept, scales=tuple(tensors[3:])
        )
        host_adamw([piece], master=master, threads=threads)
        copies.append([*tensors, *([] if kept is None else [kept])])
    assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))
    new_param, new_first, new_second, *new_scales = copies[0][:5]
    value = new_param if extra is None else apply_residual(new_param, copies[0][5])
    torch.testing.assert_close(value.double(), weight, rtol=1e-6, atol=1e-7)
    m_places, v_places, expected = encoded(m, v)
    for new, old in zip(new_scales, expected, strict=True):
        torch.testing.assert_close(new.double(), old, rtol=1e-6, atol=0)
    # what lies between two codes may become either
    assert ((new_first.double() - m_places).abs() < 0.5 + 1e-3).all()
    lifted = (v > 0) & (v_places < 0.5)
    assert ((new_second.double() - v_places).abs() < 0.5 + 1e-3)[~lifted].all()
    assert (new_second[lifted] == 1).all()
    assert ((new_second == 0) == (v == 0)).all()


def test_a_saved_weight_that_was_updated_is_noticed():
    weight = torch.randn(4, requires_grad=True)
    loss = (weight * weight).sum()
    chunk = Chunk([(4,)])
    chunk.params = [weight.detach()]
    chunk.update("host")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_threads_run_meanwhile(monkeypatch):
    # a thread gives the lock away by itself only where it is released
    before = sys.getswitchinterval()
    running, seen = [], []
    core = host_adamw.__globals__["_core"].host_adamw

    def watched(*arguments, **options):
        running.append(True)
        core(*arguments, **options)
        running.clear()

    monkeypatch.setattr(host_adamw.__globals__["_core"], "host_adamw", watched)
    chunk = Chunk([(1 << 21,)])
    thread = threading.Thread(target=lambda: [chunk.update("host") for _ in range(5)])
    sys.setswitchinterval(60)
    try:
        thread.start()
        while thread.is_alive():
            time.sleep(0)
            seen += running
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert chunk.steps.tolist() == [5]
    assert seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_updates_as_well():
    n = 300_000
    piece = HostSlice(*(torch.zeros(n) for _ in range(4)), step=1.0, lr=1e-3)
    host_adamw([piece], threads=4)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that hangs
        host_adamw([piece], threads=4)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"param": torch.zeros(3, dtype=torch.float64)},
            r"slice 0: param must be a CPU tensor of shape \(3,\)",
        ),
        ({"grad": torch.zeros(4)}, r"slice 0: grad must be .* of shape \(3,\)"),
        ({"exp_avg": torch.zeros(6)[::2]}, r"slice 0: exp_avg must be contiguous, got strides \(2,\)"),
        ({"exp_avg": torch.zeros(3, dtype=torch.int8)}, "slice 0: exp_avg must be .* got torch.int8"),
        ({"extra": torch.zeros(3)}, "slice 0: master='none' takes no extra"),
        ({"scales": (torch.zeros(1), torch.zeros(1))}, "exp_avg must be .* one of torch.int8"),
        ({"param": torch.zeros(3, device="meta")}, "param must be a CPU tensor .* on meta"),
        ({"param": torch.zeros(1).expand(3)}, "rows of 1 elements, 0 apart; needs 0 < row <= pitch"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {name: torch.zeros(3) for name in ("param", "grad", "exp_avg", "exp_avg_sq")} | change
    with pytest.raises(ValueError, match=message):
        host_adamw([HostSlice(**given, step=1.0, lr=0.1)])


def test_arguments_are_refused_before_anything_is_changed():
    chunk = Chunk([(3,), (4,)])
    kept = chunk.copy()
    chunk.params[1] = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="slice 1: param must be a CPU tensor"):
        chunk.update("host")
    chunk.params[1] = kept.params[1]
    assert_same(chunk, kept)
    piece = HostSlice(*(torch.zeros(3) for _ in range(4)), step=1.0, lr=0.1)
    for threads in (0, 1025):
        with pytest.raises(ValueError, match=f"threads must be an integer from 1 to 1024, got {threads}"):
            host_adamw([piece], threads=threads)
    with pytest.raises(ValueError, match="master='fp8' is not known"):
        host_adamw([piece], master="fp8")
    codes = [torch.zeros(300, dtype=dtype) for dtype in (FP32, FP32, torch.int8, torch.uint8)]
    for scales in [(torch.zeros(2), torch.zeros(3)), (torch.zeros(3), torch.zeros(6)[::2])]:
        with pytest.raises(ValueError, match=r"scales must be"):
            host_adamw([HostSlice(*codes, step=1.0, lr=0.1, scales=scales)])


@pytest.mark.parametrize("shape", [(3, 43), (128,), (5, 128), (1,)], ids=str)
def test_codes_are_those_of_the_reference(shape):
    """The same moments, so that a run may go from one implementation to the other."""
    torch.manual_seed(1)
    found = []
    start, gradients = torch.randn(shape).bfloat16(), [torch.randn(shape).bfloat16() for _ in range(4)]
    for backend in ("host", "torch"):
        count = -(-start.numel() // BLOCK)
        param, residual = start.clone(), torch.zeros(shape, dtype=torch.int16)
        moments = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.uint8)
        scales = torch.zeros(count), torch.zeros(count)
        step = torch.zeros(())
        for gradient in gradients:
            adamw(
                *([param], [gradient], [moments[0]], [moments[1]], [step]),
                lr=1e-2,
                residuals=[residual],
                master="residual",
                exp_avg_scales=[scales[0]],
                exp_avg_sq_scales=[scales[1]],
                backend=backend,
            )
        found.append((*moments, *scales, param))
    for mine, theirs in zip(found[0][:4], found[1][:4], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(found[0][4], found[1][4])
