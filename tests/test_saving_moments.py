"""State may be saved at any moment between backward and step: it is that of a run that keeps it in memory."""

import copy

import pytest
import torch
from residencies import FILES, MODES, adamw, in_memory
from safetensors.torch import load_file
from slow_pages import delay
from toy_models import assert_same_state, assert_same_weights, tiny_loss, tiny_net

import chunkft
from chunkft.streaming import CorruptPageError
from chunkft.streaming.files import NAME

# Pages that the next step begins with are fetched again while they are written back.
WHOLE = {
    "stream-whole": {"residency": "stream"},
    "backward-whole": {"residency": "stream", "update": "backward"},
}


@pytest.fixture(params=[*MODES, *WHOLE, *FILES])
def mode(request, tmp_path):
    if request.param in FILES:
        return {**FILES[request.param], "state_dir": tmp_path / "state"}
    return dict({**MODES, **WHOLE}[request.param])


def assert_saves_the_same(paged, plain, directory):
    """Both ways of saving, one right behind the other, and the counters that are read beside them."""
    state = paged.state_dict()["state"]
    paged.memory(), paged.paging()
    assert_same_state(state, plain.state_dict()["state"])
    files = []
    for name, optimizer in (("paged", paged), ("plain", plain)):
        chunkft.save_checkpoint(optimizer, directory / name)
        files.append(load_file(directory / name))
    assert_same_state(*files)


@pytest.mark.parametrize(("chunks", "interval", "seed"), [(1, 1, 1), (3, 1, 2), (3, 2, 3)])
def test_state_is_saved_at_every_moment_of_a_run(mode, chunks, interval, seed, tmp_path, monkeypatch):
    delay(monkeypatch, seed)
    model, plain_model = tiny_net(), tiny_net()
    options = {"interval": interval, "schedule": "random"}
    paged = adamw(model, chunks=chunks, always_active=["norm.*"], **options, **mode)
    plain = in_memory(plain_model, paged.plan, adamw, **options)
    assert_saves_the_same(paged, plain, tmp_path)
    backward = mode.get("update") == "backward"
    for step in range(3 * interval + 1):
        for micro in range(1 if backward else 2):
            for each in (model, plain_model):
                tiny_loss(each, 2 * step + micro).backward()
            if not backward:
                assert_saves_the_same(paged, plain, tmp_path)
        for optimizer in (paged, plain):
            optimizer.step()
        assert_saves_the_same(paged, plain, tmp_path)
        for optimizer in (paged, plain):
            optimizer.zero_grad()
        if step == 2:
            for optimizer in (paged, plain):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert_saves_the_same(paged, plain, tmp_path)
    assert_same_weights(model, plain_model)


def test_saving_changes_nothing_of_the_files(tmp_path, monkeypatch):
    delay(monkeypatch, 3)
    model = tiny_net()
    optimizer = adamw(model, chunks=2, interval=1, residency="stream", page_bytes=1024, state_dir=tmp_path)
    for step in range(4):
        tiny_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    (pager,) = optimizer._store.pagers.values()
    pager.flush()
    before, written = (tmp_path / "cpu" / NAME).read_bytes(), pager.stats().file_writes
    optimizer.state_dict()
    chunkft.save_checkpoint(optimizer, tmp_path / "saved")
    assert (tmp_path / "cpu" / NAME).read_bytes() == before
    assert pager.stats().file_writes == written


def test_damaged_file_is_told_when_it_is_saved(tmp_path):
    model = tiny_net()
    optimizer = adamw(model, chunks=2, interval=1, residency="stream", page_bytes=1024, state_dir=tmp_path)
    for step in range(2):
        tiny_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    (pager,) = optimizer._store.pagers.values()
    pager.flush()
    last = len(pager.pages) - 1
    with open(tmp_path / "cpu" / NAME, "r+b") as file:
        file.seek(pager._home._file._offsets[last] + 4096)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CorruptPageError, match=rf"page {last} of .* is damaged"):
        optimizer.state_dict()
    with pytest.raises(CorruptPageError, match=rf"page {last} of .* is damaged"):
        chunkft.save_checkpoint(optimizer, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("mode", ["stream", "stream-files"], indirect=True)
def test_state_that_is_put_beside_a_page_in_a_slot_is_what_comes_next(mode):
    model = tiny_net()
    optimizer = adamw(model, chunks=1, interval=1, **mode)
    tiny_loss(model, 0).backward()
    optimizer.step()
    store = optimizer._store
    piece = next(iter(store.page_of))
    store.prefetch([piece])
    state = {key: torch.full_like(value, 7) for key, value in store.get(piece).items() if value.dim()}
    store.put({piece: state})
    leaf = dict(optimizer._attachment.active())[piece]
    opened = store.open([(piece, leaf)])[piece]
    assert opened.keys() == state.keys()
    assert all((value == 7).all() for value in opened.values())
    store.abandon([piece])
