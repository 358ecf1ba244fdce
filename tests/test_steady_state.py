"""In the steady state an optimizer waits for no device: counted in the calls that reach the fake driver."""

import ctypes

import pytest
from pager_rigs import missing, opened
from toy_models import assert_same_weights, tiny_loss, tiny_net

import chunkft

EAGER = 2  # what is ready runs at once, so that the CPU, which stands in for the GPU's kernels, finds it done
OPTIONS = {
    "paged": {"state_device": "paged"},
    "stream": {"residency": "stream", "page_bytes": 1024},
    "backward": {"residency": "stream", "page_bytes": 1024, "update": "backward"},
}


@pytest.fixture
def rig(tmp_path, monkeypatch):
    why = missing("fakecuda")
    if why:
        pytest.skip(why)
    with opened("fakecuda", tmp_path, monkeypatch) as rig:
        driver = rig.driver
        driver.fakecuda_policy(EAGER)
        driver.fakecuda_calls.restype = driver.fakecuda_host_syncs.restype = ctypes.c_uint64
        yield rig


@pytest.mark.parametrize("name", OPTIONS)
def test_no_step_of_a_sweep_waits_for_the_device_or_makes_events(rig, name):
    driver = rig.driver
    model, plain = tiny_net(), tiny_net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=2, **OPTIONS[name])
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=None, partition=optimizer.plan, interval=2)

    def train(steps):
        for number in steps:
            for net, by in ((model, optimizer), (plain, reference)):
                tiny_loss(net, number).backward()
                by.step()

    train(range(6))  # the first sweep makes the state
    driver.fakecuda_reset_counters()
    train(range(6, 12))
    assert driver.fakecuda_calls(b"cuMemcpyHtoDAsync_v2") > 0  # state did move
    assert driver.fakecuda_calls(b"cuMemcpyDtoHAsync_v2") > 0
    assert driver.fakecuda_host_syncs() == 0
    for made in (b"cuEventCreate", b"cuStreamCreate", b"cuMemAlloc_v2", b"cuMemHostRegister_v2"):
        assert driver.fakecuda_calls(made) == 0
    assert_same_weights(model, plain)
    rig.settle()
    assert driver.fakecuda_host_syncs() == 1  # the count sees a wait
    optimizer.detach()
