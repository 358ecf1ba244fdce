"""Checkpoints that are damaged, foreign or cannot be written: refused, and nothing is lost."""

import errno
import json
import os
import resource
import signal
import struct
import zlib
from pathlib import Path

import pytest
import torch
from toy_models import WAYS, assert_same_state, assert_same_weights, mlp, tiny_loss, tiny_net, train, weights

import chunkft
from chunkft.optim import checkpoint as checkpoint_module


@pytest.fixture
def saved(tmp_path):
    """A trained optimizer in the middle of an interval, and its checkpoint."""
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=4)
    train(model, optimizer, tiny_loss, range(10))
    path = tmp_path / "old.safetensors"
    chunkft.save_checkpoint(optimizer, path)
    return model, optimizer, path


def refused(optimizer, model, load, match, kind=ValueError):
    """Loading raises, and afterwards the run goes on as if nothing had been tried."""
    before, state = weights(model), optimizer.state_dict()
    slices = [leaf for _, leaf in optimizer.active_parameters()]
    with pytest.raises(kind, match=match):
        load()
    assert_same_weights(model, before)
    assert_same_state(optimizer.state_dict(), state)
    assert all(a is b for a, (_, b) in zip(slices, optimizer.active_parameters(), strict=True))


def foreign(name):
    if name == "model":
        return chunkft.ChunkAdamW(mlp(), chunks=3)
    if name == "shape":
        net = tiny_net()
        net.head = torch.nn.Linear(11, 6)
        optimizer = chunkft.ChunkAdamW(net, chunks=1)
        ids = torch.randint(0, 19, (4, 7))
        net(ids).sum().backward()
        optimizer.step()
        return optimizer
    if name == "base":
        return chunkft.ChunkOptimizer(tiny_net(), torch.optim.SGD, lr=0.1, chunks=3)
    if name == "master":
        return chunkft.ChunkAdamW(tiny_net(dtype=torch.bfloat16), chunks=3)
    if name == "groups":
        net = tiny_net()
        chunkft.attach(net)
        parameters = list(net.parameters())
        return chunkft.ChunkAdamW([{"params": parameters[:3]}, {"params": parameters[3:]}], chunks=3)
    net = tiny_net()
    net.table.weight.requires_grad_(False)
    return chunkft.ChunkAdamW(net, chunks=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model", "another model"),
        ("shape", r"'head\.bias' of shape \(6,\), the model has \(5,\)"),
        ("base", "base 'SGD', this optimizer has 'AdamW'"),
        ("master", "master='residual'"),
        ("groups", "other groups"),
        ("frozen", r"'table\.weight' is trained in the model only"),
    ],
)
def test_state_of_something_else_is_refused_and_changes_nothing(way, name, match, saved, tmp_path):
    model, optimizer, _ = saved
    refused(optimizer, model, lambda: WAYS[way](foreign(name), optimizer, tmp_path / "c"), match)


@pytest.mark.parametrize("way", WAYS)
def test_factored_moments_are_not_cut_for_another_plan(way, tmp_path):
    model = tiny_net()
    source = chunkft.ChunkOptimizer(model, torch.optim.Adafactor, lr=1e-2, chunks=3, interval=1)
    train(model, source, tiny_loss, range(4))
    other = tiny_net()
    target = chunkft.ChunkOptimizer(other, torch.optim.Adafactor, lr=1e-2, chunks=4, interval=1)
    train(other, target, tiny_loss, range(2))
    refused(
        target, other, lambda: WAYS[way](source, target, tmp_path / "c"), "cannot be cut for another plan"
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "change", [{"chunks": 2}, {"schedule": "reverse"}, {"partition": "interleaved"}, {"slice_dim": 1}]
)
def test_pending_gradients_are_refused_where_other_slices_would_be_active(way, change, tmp_path):
    model = tiny_net()
    source = chunkft.ChunkAdamW(model, chunks=3, interval=4)
    train(model, source, tiny_loss, range(2))
    tiny_loss(model, 2).backward()
    other = tiny_net()
    target = chunkft.ChunkAdamW(other, **{"chunks": 3, "interval": 4, **change})
    refused(target, other, lambda: WAYS[way](source, target, tmp_path / "c"), "accumulation window|slice_dim")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda s: s.pop("format"), "format None"),
        (lambda s: s.update(format="chunkft-state-99"), "chunkft-state-99"),
        (lambda s: s.pop("cursor"), "damaged.*cursor"),
        (lambda s: s["cursor"].update(updates="many"), "updates='many'"),
        (lambda s: s["cursor"].update(interval_index=-1), "interval_index=-1"),
        (lambda s: s.pop("plan"), "damaged.*plan"),
        (lambda s: s["plan"].update(chunks=[]), "plan|damaged"),
        (lambda s: s["state"]["table.weight"].pop("ranges"), "damaged.*ranges"),
        (lambda s: s["state"]["table.weight"]["tensors"].pop("exp_avg"), "damaged.*exp_avg"),
        (lambda s: s["state"]["table.weight"]["tensors"].update(exp_avg=torch.zeros(19, 12)), r"\(19, 12\)"),
        (lambda s: s["param_groups"].clear(), "another model"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr=nan"),
        (lambda s: s["master"].pop("table.weight"), "damaged"),
        (lambda s: s.update(state=3), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_state_dict_is_refused_and_changes_nothing(damage, match, saved):
    model, optimizer, _ = saved
    state = optimizer.state_dict()
    damage(state)
    refused(optimizer, model, lambda: optimizer.load_state_dict(state), match)


@pytest.mark.parametrize("state", [None, [], "x", {}, {"state": {}, "param_groups": []}])
def test_what_is_no_state_dict_of_chunkft_is_refused(state, saved):
    model, optimizer, _ = saved
    refused(optimizer, model, lambda: optimizer.load_state_dict(state), "format")


def test_a_truncated_file_is_refused_and_changes_nothing(saved, tmp_path):
    model, optimizer, path = saved
    data = path.read_bytes()
    broken = tmp_path / "broken"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:length])
        refused(
            optimizer, model, lambda: chunkft.load_checkpoint(optimizer, broken), "broken.*whole safetensors"
        )


def test_a_flipped_bit_anywhere_in_the_header_is_refused_or_harmless(saved, tmp_path):
    model, optimizer, path = saved
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    state = optimizer.state_dict()
    broken = tmp_path / "broken"
    before = weights(model)
    positions = [*range(80), *range(80, header - 30, 11), *range(header - 30, header)]
    refusals = 0
    for position in positions:
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position * 5 + 3) % 8
        broken.write_bytes(flipped)
        try:
            chunkft.load_checkpoint(optimizer, broken)
        except ValueError:
            refusals += 1
        if position % 20 == 0 or position >= header - 30:
            assert_same_state(optimizer.state_dict(), state)
    assert_same_state(optimizer.state_dict(), state)
    assert_same_weights(model, before)
    # harmless are spaces between the tokens of JSON that became other white space
    assert refusals > 0.8 * len(positions)


def test_other_files_are_refused(saved, tmp_path):
    from safetensors.torch import save_file

    model, optimizer, _ = saved
    foreign_file = tmp_path / "foreign"
    save_file({"x": torch.zeros(3)}, foreign_file)
    refused(
        optimizer, model, lambda: chunkft.load_checkpoint(optimizer, foreign_file), "foreign.*format None"
    )
    foreign_file.write_text(json.dumps({"a": 1}))
    refused(optimizer, model, lambda: chunkft.load_checkpoint(optimizer, foreign_file), "foreign")
    torch.save(optimizer.state_dict(), foreign_file)
    refused(optimizer, model, lambda: chunkft.load_checkpoint(optimizer, foreign_file), "foreign")
    absent = tmp_path / "no" / "such"
    refused(optimizer, model, lambda: chunkft.load_checkpoint(optimizer, absent), "such", FileNotFoundError)
    refused(
        optimizer, model, lambda: chunkft.load_checkpoint(optimizer, tmp_path), "exist", FileNotFoundError
    )


def test_the_file_is_plain_safetensors_with_whole_parameters(saved):
    from safetensors import safe_open

    _, optimizer, path = saved
    expected = optimizer.state_dict()["state"]
    with safe_open(path, framework="pt") as file:
        names = {f"state/{name}/{key}" for name, entry in expected.items() for key in entry["tensors"]}
        assert names == set(file.keys())
        for name, entry in expected.items():
            for key, tensor in entry["tensors"].items():
                assert torch.equal(file.get_tensor(f"state/{name}/{key}"), tensor)
        metadata = file.metadata()
    assert metadata["crc32"] == f"{zlib.crc32(metadata['header'].encode()):08x}"


def test_saving_where_nothing_can_be_written_names_the_path(saved, tmp_path):
    _, optimizer, path = saved
    with pytest.raises(FileNotFoundError, match=r"absent.*cannot be written"):
        chunkft.save_checkpoint(optimizer, tmp_path / "absent" / "c")
    with pytest.raises(NotADirectoryError, match=r"old\.safetensors.*cannot be written"):
        chunkft.save_checkpoint(optimizer, path / "c")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match=r"directory.*cannot be written"):
        chunkft.save_checkpoint(optimizer, tmp_path / "directory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "old.safetensors"]


class FullDisk:
    """A file whose n-th write fails, or is cut short first as a real disk does it."""

    def __init__(self, file, counter, limit):
        self.file, self.counter, self.limit = file, counter, limit

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def write(self, data):
        self.counter.append(len(data))
        if len(self.counter) == self.limit:
            self.file.write(memoryview(data).cast("B")[: len(data) // 2] if len(data) > 1 else data)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_disk_that_is_full_at_any_write_leaves_the_old_checkpoint_whole(saved, tmp_path, monkeypatch):
    model, optimizer, path = saved
    old = path.read_bytes()
    train(model, optimizer, tiny_loss, range(10, 15))
    state = optimizer.state_dict()
    writes: list[int] = []
    failing = 0

    def opened(name, mode):
        return FullDisk(Path(name).open(mode), writes, failing)

    monkeypatch.setattr(checkpoint_module, "open", opened, raising=False)
    chunkft.save_checkpoint(optimizer, tmp_path / "count")
    total, length = len(writes), (tmp_path / "count").stat().st_size
    assert total > 10
    assert sum(writes) == length
    (tmp_path / "count").unlink()
    while failing < total:
        failing += 1
        writes.clear()
        with pytest.raises(OSError, match=r"old\.safetensors.*cannot be written: No space left") as error:
            chunkft.save_checkpoint(optimizer, path)
        assert error.value.errno == errno.ENOSPC
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["old.safetensors"]
    assert_same_state(optimizer.state_dict(), state)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_flush_or_rename_leaves_the_old_checkpoint_whole(call, saved, tmp_path, monkeypatch):
    model, optimizer, path = saved
    old = path.read_bytes()
    train(model, optimizer, tiny_loss, range(10, 15))

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_module.os, call, fail)
    with pytest.raises(OSError, match=r"old\.safetensors.*Input/output error"):
        chunkft.save_checkpoint(optimizer, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["old.safetensors"]


def test_an_interrupt_while_saving_leaves_the_old_checkpoint_whole(saved, tmp_path, monkeypatch):
    _, optimizer, path = saved
    old = path.read_bytes()

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chunkft.save_checkpoint(optimizer, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["old.safetensors"]


def test_a_file_size_limit_of_the_system_leaves_the_old_checkpoint_whole(saved, tmp_path):
    """No wrapper in between: the kernel itself refuses to write beyond so many bytes."""
    model, optimizer, path = saved
    old = path.read_bytes()
    train(model, optimizer, tiny_loss, range(10, 15))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in [0, 1, 8, 100, *range(1000, len(old), len(old) // 9), len(old) - 1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                with pytest.raises(OSError, match=r"old\.safetensors.*cannot be written") as error:
                    chunkft.save_checkpoint(optimizer, path)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert error.value.errno == errno.EFBIG
            assert path.read_bytes() == old
            assert os.listdir(tmp_path) == ["old.safetensors"]
    finally:
        signal.signal(signal.SIGXFSZ, handler)
