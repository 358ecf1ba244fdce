"""Operations belong to the stream, and to the device, of their tensors; what they borrow is theirs until they end."""

import pytest
import torch
from gpu_machine import Machine
from gpu_operations import OPERATIONS, lacks
from helpers import assert_close_to_exact

from chunkft.kernels import adamw, apply_residual, embedding_grad, split_residual, stochastic_round, wgrad
from chunkft.kernels.heuristics import Config
from chunkft.kernels.rounding import noise_bits

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture(params=OPERATIONS)
def name(request, machine):
    why = lacks(machine, request.param)
    if why:
        pytest.skip(why)
    return request.param


def assert_right(operation, found):
    own = operation.on_cpu()
    for got, theirs, exact in zip(found, operation.theirs(own), operation.exact(own), strict=True):
        assert_close_to_exact(got.cpu(), theirs, exact)


def test_an_operation_is_right_after_whatever_made_its_inputs(machine, name):
    operation = OPERATIONS[name](machine)
    for seed in (1, 2):
        operation.renew(seed)
        assert_right(operation, operation.work())


def test_an_operation_waits_for_its_own_stream_and_for_no_other(machine, name):
    """Inputs come late on a side stream: a kernel on another stream would read what was there before."""
    operation = OPERATIONS[name](machine)
    operation.work()  # compiled
    fresh = [torch.randn(tensor.shape).to(tensor) for tensor in operation.inputs]
    for tensor in operation.inputs:
        tensor.fill_(float("nan"))
    machine.synchronize()
    side = machine.stream()
    with machine.on(side):
        machine.hold()
        for tensor, late in zip(operation.inputs, fresh, strict=True):
            tensor.copy_(late)
        found = operation.work()
        behind = machine.mark()
    before = machine.mark()
    before.synchronize()
    assert machine.pick(not behind.query(), True), (
        "the host, or the default stream, waited for the side stream"
    )
    behind.synchronize()
    assert_right(operation, found)


def test_memory_that_an_operation_borrowed_is_not_given_away_too_early(machine, name):
    """Work space of split-K, sorted ids, copies of gradients: freed by the host while the device still reads them."""
    operation = OPERATIONS[name](machine)
    wanted = [part.clone() for part in operation.work()]
    machine.synchronize()
    side = machine.stream()
    with machine.on(side):
        machine.hold(20)
        for _ in range(machine.pick(20, 2)):
            found = operation.work()
            for size in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
                # whoever gets memory that was just freed writes into it at once
                torch.full((size,), 0xA5, dtype=torch.uint8, device=machine.device)
        machine.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_strided_gradients_are_copied_and_the_copies_live_long_enough(machine):
    """The update reads through addresses in a table, which torch knows nothing of."""
    params = [machine.randn(129, 64) for _ in range(3)]
    grads = [machine.randn(64, 129).t() for _ in range(3)]
    wanted = [param.clone() for param in params]
    state = [[torch.zeros_like(param) for param in params] for _ in range(4)]
    for own, moments in ((wanted, state[:2]), (params, state[2:])):
        given = grads if own is params else [grad.contiguous() for grad in grads]
        steps = [torch.zeros(()) for _ in own]
        machine.hold(20)
        adamw(own, given, *moments, steps, lr=1e-2, **machine.kernel())
        for _ in range(8):
            torch.full((129, 64), float("nan"), device=machine.device)
    assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))
    assert all(bool(param.isfinite().all()) for param in params)


def test_a_device_that_is_not_the_current_one(second, name):
    """Kernels go to the tensors' device, and to its current stream."""
    operation = OPERATIONS[name](second)
    assert_right(operation, operation.work())  # the current device is another one
    for tensor in operation.inputs:
        tensor.fill_(float("nan"))
    second.synchronize()
    with second.on(second.stream()):
        second.hold()
        operation.renew(5)
        found = operation.work()
        second.synchronize()
    if second.real:
        assert torch.cuda.current_device() == 0
    assert_right(operation, found)


def test_the_same_update_on_both_devices(second):
    """A scaled, watched update with step counts on the device, where every address must be of that device."""
    first = Machine(torch.device("cuda", 0) if second.real else second.device)
    found = []
    for machine in (first, second):
        torch.manual_seed(3)
        params = [machine.randn(65, 33, dtype=torch.bfloat16) for _ in range(2)]
        grads = [machine.randn(65, 33, dtype=torch.bfloat16) for _ in range(2)]
        moments = [[torch.zeros(65, 33, device=machine.device) for _ in range(2)] for _ in range(2)]
        residuals = [torch.zeros(65, 33, dtype=torch.int16, device=machine.device) for _ in range(2)]
        flag, scale = (torch.full((1,), value, device=machine.device) for value in (0.0, 2.0))
        steps = torch.zeros(2, device=machine.device)
        adamw(params, grads, *moments, steps, lr=1e-2, master="residual", residuals=residuals,
              found_inf=flag, grad_scale=scale, **machine.kernel())  # fmt: skip
        found.append([tensor.cpu() for tensor in [*params, *residuals, *moments[0], *moments[1], steps]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rounding_gives_the_bits_of_the_cpu(machine):
    bits = torch.cat([torch.randint(-(2**31), 2**31 - 1, (100_003,)), torch.arange(1 << 16) << 15])
    values = bits.to(torch.int32).view(torch.float32)
    values = values[~values.isnan()]
    there = values.to(machine.device)
    weight, residual = split_residual(there)
    for ours, theirs in zip((weight, residual), split_residual(values), strict=True):
        assert torch.equal(ours.cpu().view(torch.int16), theirs.view(torch.int16))
    assert torch.equal(apply_residual(weight, residual).cpu().view(torch.int32), values.view(torch.int32))
    assert torch.equal(noise_bits(4099, 2**62 + 5, machine.device).cpu(), noise_bits(4099, 2**62 + 5))
    for seed in (0, 2**63 - 1):
        ours = stochastic_round(there, seed).cpu()
        assert torch.equal(ours.view(torch.int16), stochastic_round(values, seed).view(torch.int16))


# Matrices whose last rows begin more than 2^31 elements behind the first; little of them is read or written.
FAR = 1 << 31


def far(machine, rows, columns):
    pitch = machine.pick(FAR // (rows - 4) // 1024 * 1024 + 1024, 1 << 10)
    memory = torch.UntypedStorage(2 * rows * pitch, device=machine.device)
    wide = torch.tensor([], dtype=torch.bfloat16, device=machine.device)
    matrix = wide.set_(memory, 0, (rows, pitch), (pitch, 1))[:, :columns]
    matrix.copy_(torch.randn(rows, columns))
    return matrix


def test_columns_far_apart_in_the_gradient_of_a_table(machine):
    dy = far(machine, 20, 70)
    ids = torch.tensor([3, 7, 7, 0] * 5, device=machine.device)
    found = embedding_grad(dy, ids, 9, (2, 9), **machine.kernel())
    exact = torch.zeros(9, 70, dtype=torch.float64).index_add_(0, ids.cpu(), dy.cpu().double())[2:9]
    if machine.triton:
        assert_close_to_exact(found.cpu(), exact.bfloat16(), exact)
    else:  # added in bf16
        torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)


def test_an_update_of_rows_far_apart(machine):
    weight = far(machine, 20, 72)
    outside = weight.as_strided((20, 8), weight.stride(), 72)
    outside.fill_(3.0)
    param = weight[1:20]
    kept = weight.cpu().clone()
    grad = machine.randn(19, 72, dtype=torch.bfloat16)
    moments = [torch.zeros(19, 72, device=machine.device) for _ in range(2)]
    residual = torch.zeros(19, 72, dtype=torch.int16, device=machine.device)
    own = [kept[1:20].clone(), grad.cpu(), torch.zeros(19, 72), torch.zeros(19, 72)]
    mode = {"lr": 1e-2, "master": "residual"}
    adamw([param], [grad], *([m] for m in moments), [torch.zeros(())], residuals=[residual], **mode,
          **machine.kernel())  # fmt: skip
    extra = torch.zeros(19, 72, dtype=torch.int16)
    adamw(*([tensor] for tensor in own), [torch.zeros(())], residuals=[extra], **mode, backend="torch")
    # PyTorch's square root on a CPU may be off by a bit
    ours = apply_residual(param.cpu(), residual.cpu())
    torch.testing.assert_close(ours, apply_residual(own[0], extra), rtol=2.4e-7, atol=2e-9)
    assert torch.equal(weight[0].cpu(), kept[0])
    assert bool((outside == 3.0).all())


def test_an_update_of_more_than_two_to_the_31_elements(machine):
    """The elements behind 2^31 are updated as those at the start, and no others twice."""
    size = machine.pick((1 << 31) + 4099, 5001)
    param = torch.ones(size, dtype=torch.bfloat16, device=machine.device)
    grad = torch.full((size,), 0.5, dtype=torch.bfloat16, device=machine.device)
    moments = [torch.zeros(size, dtype=torch.bfloat16, device=machine.device) for _ in range(2)]
    adamw([param], [grad], *([m] for m in moments), [torch.zeros(())], lr=0.25, **machine.kernel())
    for tensor in (param, *moments):
        assert float(tensor[0]) not in (0.0, 1.0)
        assert bool((tensor == tensor[0]).all())


@pytest.mark.parametrize("config", [Config(64, 64, 32, 4, 3), Config(64, 64, 32, 4, 3, splits=2)], ids=str)
def test_a_result_of_more_than_two_to_the_31_elements(machine, config):
    outputs, inputs = machine.pick((70_001, 32_768), (72, 136))
    dy = machine.randn(64, outputs, dtype=torch.bfloat16)
    x = machine.randn(64, inputs, dtype=torch.bfloat16)
    if config.splits > 1:
        outputs = machine.pick(701, 72)  # the work space of all tiles would not fit
        dy = far(machine, 64, outputs) if machine.real else dy[:, :outputs]
    found = wgrad(dy, x, **machine.kernel(config))
    for rows in (slice(0, 3), slice(outputs - 3, outputs)):
        exact = dy[:, rows].double().t() @ x.double()
        assert_close_to_exact(found[rows], dy[:, rows].t() @ x, exact)
