"""Arguments that are not allowed are named with their value and what is; the model stays as it was."""

import os
import re
from functools import partial

import pytest
import torch
from torch import nn
from weight_rigs import loss_of, places, streamed, tower, train

import chunkft
from chunkft.weights import WeightStream, find_units, stream_of

STREAM = {
    "device-unknown": ({"device": "gpu0"}, ValueError, "device='gpu0'.*'cpu', 'cuda' and 'cuda:N'"),
    "device-meta": ({"device": "meta"}, ValueError, "device='meta'.*'cpu', 'cuda'"),
    "device-type": ({"device": 3.5}, ValueError, "device=3.5.*'cpu', 'cuda'"),
    "device-none": ({"device": None}, ValueError, "device=None.*'cpu', 'cuda'"),
    "slots-1": ({"slots": 1}, ValueError, "slots=1.*>= 2"),
    "slots-text": ({"slots": "3"}, ValueError, "slots='3'.*integer"),
    "slots-true": ({"slots": True}, ValueError, "slots=True.*integer"),
    "resident-negative": ({"resident_blocks": -1}, ValueError, "resident_blocks=-1.*>= 0"),
    "resident-many": ({"resident_blocks": 5}, ValueError, "resident_blocks=5.*4 blocks"),
    "resident-float": ({"resident_blocks": 1.0}, ValueError, "resident_blocks=1.0.*integer"),
    "tile-zero": ({"tile_bytes": 0}, ValueError, "tile_bytes=0.*>= 1"),
    "tile-text": ({"tile_bytes": "1MiB"}, ValueError, "tile_bytes='1MiB'.*integer"),
    "weights-dir": ({"weights_dir": 7}, TypeError, "weights_dir=7.*directory"),
    "pin": ({"pin": "yes"}, ValueError, "pin='yes'.*True, False or 'auto'"),
    "pin-cpu": ({"pin": True}, ValueError, "pin=True.*device='cpu'"),
    "poison": ({"poison": 1}, ValueError, "poison=1.*True or False"),
    "blocks-name": ({"blocks": "layers"}, ValueError, "blocks='layers'.*'blocks'"),
    "blocks-type": ({"blocks": 4}, TypeError, "blocks=4.*name"),
    "blocks-entry": ({"blocks": ["blocks.0", 1]}, TypeError, "blocks=.*names"),
    "blocks-nested": ({"blocks": ["blocks", "blocks.0"]}, ValueError, "blocks=.*part of another"),
    "blocks-twice": ({"blocks": ["blocks.0", "blocks.0"]}, ValueError, "blocks=.*twice"),
    "blocks-none": ({"blocks": []}, ValueError, r"blocks=\[\]"),
    "blocks-norm": ({"blocks": ["norm"]}, ValueError, "blocks=.*can stream"),
}


@pytest.mark.parametrize("name", STREAM)
def test_arguments_of_a_stream(name):
    options, kind, message = STREAM[name]
    model = tower()
    before = places(model)
    with pytest.raises(kind, match=f"(?s){message}"):
        WeightStream(model, **{"device": "cpu"} | options)
    assert places(model) == before
    assert stream_of(model) is None


def test_the_model_of_a_stream():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        WeightStream([tower()])
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        find_units({})
    with pytest.raises(ValueError, match="no list of blocks"):
        WeightStream(nn.Linear(3, 3), device="cpu")
    with pytest.raises(ValueError, match="tile_bytes=-1"):
        find_units(tower(), tile_bytes=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("make", ["stream", "optimizer"])
def test_a_gpu_that_is_not_there(make):
    model = tower()
    before = places(model)
    makers = {"stream": WeightStream, "optimizer": partial(chunkft.ChunkAdamW, weights="stream")}
    with pytest.raises(ValueError, match="device='cuda' needs a GPU"):
        makers[make](model, device="cuda")
    assert places(model) == before


OPTIMIZER = {
    "weights": ({"weights": "streamed"}, "weights='streamed'.*'auto', 'resident', 'stream'"),
    "weights-none": ({"weights": None}, "weights=None.*'auto'"),
    "update-on": ({"weights": "stream", "update_on": "gpu"}, "update_on='gpu'.*'auto', 'host', 'device'"),
    "host-resident": ({"update_on": "host"}, "update_on='host' needs weights='stream'"),
    "host-paged": (
        {"weights": "stream", "update_on": "host", "residency": "stream"},
        "residency='stream'.*update_on='device'",
    ),
    "host-device": (
        {"weights": "stream", "update_on": "host", "state_device": "device"},
        "state_device='device'.*update_on",
    ),
    "blocks-resident": ({"resident_blocks": 1}, "resident_blocks=1 belongs to weights='stream'"),
    "blocks-many": ({"weights": "stream", "resident_blocks": 9}, "resident_blocks=9.*4 blocks"),
    "blocks-text": ({"weights": "stream", "resident_blocks": "2"}, "resident_blocks='2'.*integer"),
    "dir-resident": ({"weights_dir": "here"}, "weights_dir='here' belongs to weights='stream'"),
    "device-resident": ({"device": "cpu", "weights": "resident"}, "device='cpu' belongs to weights='stream'"),
    "device": ({"weights": "stream", "device": "tpu"}, "device='tpu'.*'cuda:N'"),
    "lr": ({"weights": "stream", "lr": float("nan")}, "(?i)nan|learning rate|lr"),
    "chunks": ({"weights": "stream", "chunks": 0}, "chunks=0"),
}


@pytest.mark.parametrize("name", OPTIMIZER)
def test_arguments_of_an_optimizer(name):
    options, message = OPTIMIZER[name]
    model = tower()
    before = places(model)
    with pytest.raises(ValueError, match=message):
        chunkft.ChunkAdamW(
            model,
            **{"device": "cpu"} if options.get("weights") == "stream" and "device" not in options else {},
            **options,
        )
    assert places(model) == before
    assert stream_of(model) is None


def test_an_error_behind_the_stream_takes_it_out_again(monkeypatch):
    model = tower()
    before = places(model)

    def refuse(*_):
        raise OSError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("chunkft.optim.chunk_optimizer.build_memory", refuse)
        with pytest.raises(OSError, match="no memory"):
            chunkft.ChunkAdamW(model, weights="stream", device="cpu")
    after = places(model)
    moved = {n for n, p in model.named_parameters() if p.dim() == 2}  # which lie in host pages still
    assert {n: v for n, v in after.items() if n not in moved} == {
        n: v for n, v in before.items() if n not in moved
    }
    assert stream_of(model) is None
    train([(model, streamed(model))], range(1))


@pytest.mark.parametrize("fails", ["Pager", "HostArena"])
def test_memory_that_cannot_be_had_leaves_the_model_as_it_was(fails, monkeypatch):
    """All of it is taken before the first weight moves."""
    from chunkft.weights import tables

    def refuse(*_, **__):
        raise OSError("no memory")

    model = tower()
    before = places(model)
    with monkeypatch.context() as patch:
        patch.setattr(tables, fails, refuse)
        with pytest.raises(OSError, match="no memory"):
            WeightStream(model, device="cpu")
    assert places(model) == before
    WeightStream(model, device="cpu")


def test_streams_do_not_overlap():
    model = tower()
    whole = nn.Sequential(model)
    stream = WeightStream(model, device="cpu")
    before = places(whole)
    for other in (model, whole, model.blocks):
        with pytest.raises(ValueError, match="stream already"):
            WeightStream(other, device="cpu", blocks="Block")
    for other in (whole, model.blocks):
        with pytest.raises(ValueError, match="stream as those of a part"):
            chunkft.ChunkAdamW(other)
    with pytest.raises(ValueError, match=r"resident_blocks, weights_dir.*already"):
        chunkft.ChunkAdamW(model, weights="stream", resident_blocks=1)
    with pytest.raises(ValueError, match="weights='resident'"):
        chunkft.ChunkAdamW(model, weights="resident")
    assert places(whole) == before
    stream.detach()
    with pytest.raises(ValueError, match="another model, or detached"):
        chunkft.ChunkAdamW(model, weights=stream)
    with pytest.raises(ValueError, match="another model, or detached"):
        chunkft.ChunkAdamW(tower(), weights=WeightStream(model, device="cpu"))


def test_weights_that_are_trained_where_they_are():
    model = tower()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    before = places(model)
    with pytest.raises(ValueError, match=r"'table.weight' is trained by an optimizer"):
        WeightStream(model, device="cpu")
    assert places(model) == before
    loss_of(model).backward()
    optimizer.step()


def test_directories(tmp_path, monkeypatch):
    model = tower()
    before = places(model)
    stream = {"weights_dir": tmp_path / "pages"}
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match="file"):
        WeightStream(model, device="cpu", weights_dir=tmp_path / "file")
    other = tower()
    optimizer = streamed(other, stream=stream)
    with pytest.raises(RuntimeError, match="in use by process"):
        WeightStream(model, device="cpu", **stream)
    train([(other, optimizer)], range(2))
    optimizer.detach()
    stream_of(other).detach()
    loss_of(other)
    written = next((tmp_path / "pages").iterdir())
    written.write_bytes(b"of somebody else" * 999)
    with pytest.raises(ValueError, match="no page file"):
        WeightStream(model, device="cpu", **stream)
    assert written.read_bytes() == b"of somebody else" * 999

    def full(descriptor, *_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "full"))):
        WeightStream(model, device="cpu", weights_dir=tmp_path / "full")
    assert places(model) == before


@pytest.mark.parametrize("update", ["host", "device"])
def test_training_from_a_file_is_training_from_memory(update, tmp_path):
    models = tower(), tower()
    optimizers = [
        streamed(model, update, stream={} if number else {"weights_dir": tmp_path}, chunks=3)
        for number, model in enumerate(models)
    ]
    pairs = list(zip(models, optimizers, strict=True))
    for step in range(4):
        train(pairs, [step])
        for model in models:
            with torch.no_grad():
                model.blocks[1].up.weight.mul_(1.1)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    loss_of(models[0])
    models[0].blocks[0].up.weight.data.mul_(2)  # which nobody is told of
    with pytest.raises(RuntimeError, match=r"\.data.*weights_dir"):
        loss_of(models[0])
