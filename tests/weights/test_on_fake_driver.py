"""The ring over the fake CUDA driver: nothing waits in a steady step, pages come once, and every access is ordered.

Slots are CPU tensors that the driver takes for device memory, so that layers compute on them; its checker is told of
that computation as a kernel on the caller's stream.
"""

import ctypes
import gc
from contextlib import contextmanager

import pytest
import torch
from pager_rigs import _Range, missing, opened
from weight_rigs import assert_at_rest, assert_same, loss_of, streamed, tower, train

import chunkft
from chunkft.weights import stream_of
from chunkft.weights.ring import Ring
from chunkft.weights.tables import TilePages

LAYERS = 7
EAGER = 2  # what is ready runs at once: the CPU, which stands in for the GPU's kernels, finds copies done
CREATED = (b"cuEventCreate", b"cuStreamCreate", b"cuMemAlloc_v2", b"cuMemHostRegister_v2")


@pytest.fixture
def rig(tmp_path, monkeypatch):
    why = missing("fakecuda")
    if why:
        pytest.skip(why)
    with opened("fakecuda", tmp_path, monkeypatch) as rig:
        rig.driver.fakecuda_policy(EAGER)
        rig.driver.fakecuda_calls.restype = rig.driver.fakecuda_host_syncs.restype = ctypes.c_uint64
        yield rig
        while made:  # before the driver is asked what it saw
            model, optimizer = made.pop()
            optimizer.detach()
            stream_of(model).detach()
            del model, optimizer
        gc.collect()


made = []


def build(update, mode="none", *, tied=True, tile_bytes=1 << 20, layers=LAYERS, **options):
    model = tower(layers, mode, tied)
    stream = {"poison": False, "tile_bytes": tile_bytes}
    made.append((model, streamed(model, update, stream=stream, **options)))
    return made[-1]


def loaded(model):
    stream = model._chunkft_weights
    pages = stream._tables.pages
    return stream.ring.stats.loaded_bytes, 0 if pages is None else pages.pager.stats().loaded_bytes


def lowest_block(optimizer):
    """The lowest block that a backward pass reaches; LAYERS if none, by the names of what is trained."""
    names = [piece.name for piece, _ in optimizer.active_parameters()]
    if any(name.startswith("table") for name in names):
        return 0
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    return min(blocks, default=LAYERS)


@pytest.mark.parametrize("update", ["host", "device"])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("mode", ["none", "non-reentrant"])
def test_steady_steps_wait_for_nothing_and_bring_each_page_as_often_as_needed(rig, mode, chunks, update):
    driver = rig.driver
    model, optimizer = build(update, mode, chunks=chunks)
    plain = tower(LAYERS, mode)
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=chunks, interval=1)
    train([(model, optimizer), (plain, reference)], range(chunks))
    page = model._chunkft_weights.units.blocks[0].nbytes
    slots = 3
    for step in range(chunks, 2 * chunks):
        low = lowest_block(optimizer)
        before = loaded(model)
        driver.fakecuda_reset_counters()
        loss_of(model, step).backward()
        waits = driver.fakecuda_host_syncs()
        created = [driver.fakecuda_calls(name) for name in CREATED]
        after = loaded(model)
        # all blocks on the way up; on the way down those that are not in a slot still
        pages = LAYERS + max(0, LAYERS - slots - low)
        assert after[0] - before[0] == pages * page, (step, low)
        assert (
            after[1] - before[1] == model.table.weight.nbytes
        )  # one tile, which stays until the backward pass
        assert waits == 0
        assert created == [0] * len(CREATED)
        loss_of(plain, step).backward()
        assert_same([(model, optimizer), (plain, reference)])
        optimizer.step()
        reference.step()
    rig.settle()
    assert driver.fakecuda_host_syncs() == 1  # the count sees a wait
    assert_at_rest(model)


def test_a_head_in_several_tiles_brings_the_last_ones_once(rig):
    model, optimizer = build("host", tied=False, tile_bytes=640, chunks=1)
    train([(model, optimizer)], range(1))
    tiles = model._chunkft_weights.units.tables[-1].tiles
    assert len(tiles) > 3
    before = loaded(model)[1]
    loss_of(model).backward()
    assert loaded(model)[1] - before == sum(tiles) + sum(tiles[:-2])


@contextmanager
def declared(rig, monkeypatch):
    """The checker learns of each use of a slot: reads, on the caller's stream, between ``hold`` and ``leave``."""
    hold, leave, tile = Ring.hold, Ring.leave, TilePages.tile

    def launch(slot, name):
        touched = _Range(slot.data_ptr(), slot.nbytes, 0)
        code = rig.driver.fakecuda_launch(
            rig.stream, name, ctypes.byref(touched), ctypes.c_size_t(1), None, None, ctypes.c_double(5)
        )
        assert code == 0

    def holding(ring, number):
        hold(ring, number)
        launch(ring._held[number], b"block")

    def leaving(ring, number):
        if number in ring._held:
            launch(ring._held[number], b"block")
        leave(ring, number)

    @contextmanager
    def tiling(pages, page, following):
        with tile(pages, page, following) as slot:
            launch(slot, b"tile")
            yield slot

    monkeypatch.setattr(Ring, "hold", holding)
    monkeypatch.setattr(Ring, "leave", leaving)
    monkeypatch.setattr(TilePages, "tile", tiling)
    yield


def violations(rig):
    driver = rig.driver
    found = [driver.fakecuda_violation(i).decode() for i in range(driver.fakecuda_violations())]
    driver.fakecuda_forget_violations()
    return found


@pytest.mark.parametrize("update", ["host", "device"])
@pytest.mark.parametrize("mode", ["none", "non-reentrant", "reentrant"])
def test_every_use_of_a_slot_is_ordered_with_its_copies(rig, monkeypatch, mode, update):
    with declared(rig, monkeypatch):
        chunks = 1 if mode == "reentrant" else 2  # which needs an input that requires grad
        model, optimizer = build(update, mode, tied=False, tile_bytes=640, chunks=chunks)
        train([(model, optimizer)], range(4))
    assert not violations(rig)


def other_stream(rig):
    stream = ctypes.c_void_p()
    rig.call("cuStreamCreate", ctypes.byref(stream), 1)
    return stream.value


class Elsewhere:
    """In one method of a pager the current stream is another one than that of the computation."""

    def __init__(self, rig, method):
        self.stream, self.method = other_stream(rig), method

    def __call__(self, monkeypatch, kind=chunkft.streaming.Pager):
        method, stream = getattr(kind, self.method), self.stream

        def called(pager, *args, **kwargs):
            place = pager._place
            pager._place = type(place)(
                place.device, place.backend, place.empty, lambda: stream, place.synchronize, place.fence
            )
            try:
                return method(pager, *args, **kwargs)
            finally:
                pager._place = place

        monkeypatch.setattr(kind, self.method, called)


@pytest.mark.parametrize("method", ["acquire", "release"])
def test_the_checker_sees_a_ring_that_does_not_wait(rig, monkeypatch, method):
    """A control: the computation reads before the copy is done, or the slot is taken before the computation is."""
    with declared(rig, monkeypatch):
        model, _ = build("host", chunks=1)
        Elsewhere(rig, method)(monkeypatch)
        rig.driver.fakecuda_policy(1)  # nothing runs before somebody waits for it
        with torch.no_grad():
            loss_of(model)
    assert any("block" in found for found in violations(rig))
    rig.driver.fakecuda_policy(EAGER)


def test_the_checker_sees_a_release_before_the_work(rig, monkeypatch):
    with declared(rig, monkeypatch):
        model, _ = build("host", chunks=1)
        leave = Ring.leave

        def early(ring, number):
            slot = ring._held.get(number)
            leave(ring, number)
            if slot is not None:
                touched = _Range(slot.data_ptr(), slot.nbytes, 0)
                rig.driver.fakecuda_launch(
                    rig.stream,
                    b"late",
                    ctypes.byref(touched),
                    ctypes.c_size_t(1),
                    None,
                    None,
                    ctypes.c_double(5),
                )

        monkeypatch.setattr(Ring, "leave", early)
        with torch.no_grad():
            loss_of(model)
    assert any("late" in found for found in violations(rig))


@pytest.mark.parametrize("forgets", ["refresh", "changed"])
def test_a_page_that_is_not_fetched_anew_is_found_out(rig, monkeypatch, forgets):
    """A control: without ``refresh`` and ``changed`` a forward pass computes with weights from before the update."""
    model, optimizer = build("host", chunks=1, layers=3)  # all of them stay in slots
    plain = tower(3)
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=1, interval=1)
    train([(model, optimizer), (plain, reference)], range(1))
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(plain))
    monkeypatch.setattr(Ring, "refresh", lambda *_: None)
    if forgets == "changed":
        monkeypatch.setattr(Ring, "changed", lambda *_: None)
        loss_of(model, 1).backward()
        loss_of(plain, 1).backward()
        optimizer.step()
        reference.step()
    else:
        for net in (model, plain):
            for parameter in net.parameters():
                parameter.data.mul_(1.5)  # which nobody is told of
    with torch.no_grad():
        assert not torch.equal(loss_of(model), loss_of(plain))
