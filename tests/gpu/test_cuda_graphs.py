"""Operations in a CUDA graph: recorded once, replayed with other inputs; and what cannot be recorded says so."""

import pytest
import torch
from gpu_machine import assert_ends_fine
from gpu_operations import OPERATIONS, lacks
from helpers import assert_close_to_exact

pytestmark = [pytest.mark.timeout(60)]
# The update reads a table that the host makes for every call.
RECORDED = [name for name in OPERATIONS if name != "adamw"]
FAILED_CAPTURE = """
import sys
import torch

def refused(work):
    # what a capture in which a call failed leaves behind is not for the process that tests
    torch.cuda.synchronize()
    graph, told = torch.cuda.CUDAGraph(), None
    try:
        with torch.cuda.graph(graph):
            try:
                work()
            except Exception as error:
                told = error
                raise
    except Exception as error:
        return graph, told or error
    return graph, None
"""


@pytest.mark.parametrize("name", RECORDED)
def test_a_graph_replays_with_other_inputs(machine, name):
    why = lacks(machine, name)
    if why:
        pytest.skip(why)
    operation = OPERATIONS[name](machine)
    results = [torch.zeros_like(part) for part in operation.work()]

    def work():
        for result, part in zip(results, operation.work(), strict=True):
            result.copy_(part)

    replay = machine.captured(work)
    for seed in range(machine.pick(4, 2)):
        operation.renew(seed)
        for result in results:
            result.fill_(7)
        replay()
        own = operation.on_cpu()
        for got, theirs, exact in zip(results, operation.theirs(own), operation.exact(own), strict=True):
            assert_close_to_exact(got.cpu(), theirs, exact)
    # split-K counts its parts: a counter that a replay left behind would make the next one add too early
    kept = [result.clone() for result in results]
    for _ in range(machine.pick(50, 2)):
        replay()
        assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))


def test_an_update_in_a_graph_is_refused_or_right(machine):
    """A replay must not read a table that is gone: either the update cannot be recorded, or it does what eager does."""
    assert_ends_fine(machine, "a CUDA graph", FAILED_CAPTURE + """
from chunkft.kernels import adamw

def made():
    torch.manual_seed(0)
    return [torch.randn(70, 33, device="cuda") for _ in range(2)] + [torch.zeros(70, 33, device="cuda") for _ in "mv"]

steps, own = torch.zeros(1, device="cuda"), made()
work = lambda: adamw([own[0]], [own[1]], [own[2]], [own[3]], steps, lr=1e-2)
work()
graph, error = refused(work)
if error is not None:
    assert "captur" in str(error).lower(), repr(error)
else:
    noise = [torch.full((1 << 14,), 7, dtype=torch.int64).pin_memory() for _ in range(64)]
    del noise
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    other, counts = made(), torch.zeros(1, device="cuda")
    for _ in range(4):
        adamw([other[0]], [other[1]], [other[2]], [other[3]], counts, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(own, other)), "a replay is not the update"
print("fine")
""")  # fmt: skip


def test_a_step_of_the_optimizer_in_a_graph_is_refused(machine):
    """It asks the device whether gradients are finite, which no graph can do; the model is left as it was."""
    assert_ends_fine(machine, "a CUDA graph", FAILED_CAPTURE + """
import chunkft

model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 8)).cuda()
optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, interval=2, state_device="device")
x = torch.randn(5, 64, device="cuda")

def step():
    model(x).square().mean().backward()
    optimizer.step()

for _ in range(4):
    step()
model(x).square().mean().backward()
before = [p.detach().clone() for p in model.parameters()]
_, error = refused(optimizer.step)
assert error is not None and "captur" in str(error).lower(), repr(error)
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
print("fine")
""")  # fmt: skip


def test_a_page_is_not_acquired_in_a_graph(machine):
    """Pages come by streams that are not recorded: that is said at once, and the pager works on afterwards."""
    assert_ends_fine(machine, "a CUDA graph", FAILED_CAPTURE + """
from chunkft.streaming import Pager

with Pager([4096] * 3, device="cuda") as pager:
    for page in range(3):
        pager.acquire(page, load=False).fill_(10 + page)
        pager.release(page)
    pager.flush()
    _, error = refused(lambda: pager.acquire(1))
    assert isinstance(error, RuntimeError) and "page 1" in str(error), repr(error)
    assert "captur" in str(error).lower(), str(error)
    for page in range(3):
        assert int(pager.acquire(page)[4095]) == 10 + page
        pager.release(page, dirty=False)
print("fine")
""")  # fmt: skip
