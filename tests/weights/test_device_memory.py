"""What of a streamed model is on the device, counted from storages; heads in several tiles."""

import gc

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_exact
from tiny_transformers import batch, build
from torch import nn
from weight_rigs import loss_of, streamed, tower, train

import chunkft
from chunkft.autograd import sliced_linear_cross_entropy
from chunkft.kernels.linear_cross_entropy import linear_cross_entropy
from chunkft.weights import WeightStream


def storages(tensors):
    """Bytes of memory behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def on_device(model):
    """Bytes of slots, and of parameters whose memory is no page."""
    stream = model._chunkft_weights
    pagers = [stream.ring.pager]
    if stream._tables.pages is not None:
        pagers.append(stream._tables.pages.pager)
    slots = storages([slot for pager in pagers for slot in pager._slots])
    stay = storages([p for name, p in model.named_parameters() if not stream.streams(name)])
    return slots, stay


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_device_memory_does_not_grow_with_depth(tied):
    found = []
    for layers in (4, 8, 16, 32):
        model = build("llama", num_hidden_layers=layers, tie_word_embeddings=tied)
        stream = WeightStream(model, device="cpu", tile_bytes=4096)  # else so small a head stays
        optimizer = chunkft.ChunkAdamW(model, chunks=4, weights=stream, update_on="host")
        model(**batch("llama")).loss.backward()
        slots, stay = on_device(model)
        block = sum(m.weight.numel() * 4 for m in model.model.layers[0].modules() if isinstance(m, nn.Linear))
        norms = sum(p.numel() * 4 for n, p in model.named_parameters() if "norm" in n)
        # three blocks, and two tiles of half a block at most; pages are aligned to 256 bytes a weight
        assert slots <= 3 * (block + 7 * 256) + 2 * (block + 7 * 256) // 2
        assert stay == norms
        assert optimizer.memory()["weights"] == slots + stay
        found.append(slots)
        optimizer.detach()
        stream.detach()
    assert len(set(found)) == 1


def test_blocks_that_stay_are_counted_and_spread():
    model = tower(8)
    WeightStream(model, device="cpu", resident_blocks=2)
    held = [
        sum(p.numel() * 4 for n, p in b.named_parameters() if n.endswith("weight") and p.dim() == 2)
        for b in model.blocks
    ]
    stream = model._chunkft_weights
    resident = [i for i in range(8) if not stream.streams(f"blocks.{i}.up.weight")]
    assert resident[1:] == [resident[0] + 4]
    _, stay = on_device(model)
    small = sum(p.numel() * 4 for n, p in model.named_parameters() if p.dim() == 1)
    assert stay == small + sum(held[i] for i in resident)


def test_device_leaves_are_beside_the_ring_and_no_more_than_the_chunk():
    model = tower(8)
    optimizer = streamed(model, "device", chunks=4)
    train([(model, optimizer)], range(2))
    slots, stay = on_device(model)
    cut = [leaf for piece, leaf in optimizer.active_parameters() if piece.dim is not None]
    pages = {home.untyped_storage().data_ptr() for home in model._chunkft_weights.ring.homes.values()}
    assert not pages & {leaf.untyped_storage().data_ptr() for leaf in cut}
    assert optimizer.memory()["weights"] == slots + stay + storages(cut)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("update", ["host", "device"])
def test_a_head_in_several_tiles_is_dense_within_its_rounding(update, tied):
    """Only the sum over tiles differs: the tolerance rule against fp64, for every gradient."""
    nets = [tower(tied=tied), tower(tied=tied).double()]
    plain = tower(tied=tied)
    optimizer = streamed(nets[0], update, stream={"tile_bytes": 640}, chunks=1)
    assert len(nets[0]._chunkft_weights.units.tables[-1].tiles) > 3
    for net in (*nets, plain):
        loss_of(net).backward()
    exact = {n: p.grad for n, p in nets[1].named_parameters()}
    theirs = {n: p.grad for n, p in plain.named_parameters()}
    seen = 0
    for piece, leaf in optimizer.active_parameters():
        part = (lambda t, piece=piece: t) if piece.dim is None else (lambda t, piece=piece: piece.of(t))
        assert_close_to_exact(leaf.grad, part(theirs[piece.name]), part(exact[piece.name]))
        seen += 1
    assert seen > 10


class Rows:
    """Tiles of a weight that is resident, with the bounds of those of a stream."""

    def __init__(self, weight, step):
        self.weight, self.step = weight, step
        self.shape, self.device = tuple(weight.shape), weight.device
        self.count = -(-self.shape[0] // step)

    def holds(self, weight):
        return True

    def walk(self, *, backward=False):
        starts = list(range(0, self.shape[0], self.step))
        for start in reversed(starts) if backward else starts:
            stop = min(self.shape[0], start + self.step)
            yield start, stop, self.weight.detach()[start:stop]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tiles_that_stream_have_the_bits_of_the_same_tiles_resident(tied):
    from chunkft.autograd import TiledForward, put_tiles

    streams, resident = tower(tied=tied), tower(tied=tied)
    optimizer = streamed(streams, "host", stream={"tile_bytes": 640}, chunks=1)
    step = streams._chunkft_weights.units.tables[-1].tile_rows
    rows = Rows(resident.head.weight, step)
    put_tiles(resident.head.weight, rows)
    resident.head.__dict__["forward"] = TiledForward(resident.head, resident.head.forward, rows)
    reference = chunkft.ChunkAdamW(resident, lr=1e-2, chunks=1, interval=1)
    for number in range(3):
        train([(streams, optimizer), (resident, reference)], [number])
    for name, value in streams.state_dict().items():
        assert torch.equal(value, resident.state_dict()[name]), name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loss_of_a_head_that_streams_has_the_bits_of_vocabulary_tiles(tied, reduction):
    """By the tiles of the stream and by the same rows of a resident weight, which ``chunk`` makes parts of."""
    model = tower(tied=tied)
    optimizer = streamed(model, "host", stream={"tile_bytes": 640}, chunks=1)
    table = model._chunkft_weights.units.tables[-1]
    pairs = [(piece, leaf) for piece, leaf in optimizer.active_parameters() if piece.name == table.name]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 31, (7,), generator=generator)
    options = {"reduction": reduction, "chunk": table.tile_rows}
    loss = sliced_linear_cross_entropy(hidden, model.head.weight, targets, pairs, **options)
    loss.sum().backward()
    weight = model.head.weight.detach().clone()
    windows = [(piece.dim, piece.start, piece.stop) for piece, _ in pairs]
    losses, dx, dw = linear_cross_entropy(
        hidden.detach(), weight, targets, windows, by="vocabulary", chunk=table.tile_rows
    )
    scale = 1 / 7 if reduction == "mean" else 1.0
    total = {"mean": losses.sum() / 7, "sum": losses.sum(), "none": losses}[reduction]
    assert torch.equal(loss.detach(), total)
    torch.testing.assert_close(hidden.grad, dx * scale, rtol=1e-6, atol=1e-7)
    for (_, leaf), gradient in zip(pairs, dw, strict=True):
        torch.testing.assert_close(leaf.grad, gradient * scale, rtol=1e-6, atol=1e-7)
    dense = F.cross_entropy(hidden.detach() @ weight.t(), targets, reduction=reduction)
    torch.testing.assert_close(loss.detach(), dense)


def test_a_model_and_its_optimizer_that_are_dropped_free_everything():
    import threading
    import weakref

    before = threading.active_count()
    model = tower()
    optimizer = streamed(model, "host", chunks=3)
    leaves = [weakref.ref(leaf) for piece, leaf in optimizer.active_parameters() if piece.dim is not None]
    train([(model, optimizer)], range(1))
    gc.collect()
    assert not any(leaf() is not None for leaf in leaves)  # of a chunk that is not active any more
    gone = [
        weakref.ref(one)
        for one in (model, optimizer, model._chunkft_weights, model._chunkft_weights.ring.pager)
    ]
    del model, optimizer
    gc.collect()
    assert not any(one() is not None for one in gone)
    assert threading.active_count() <= before


def test_a_file_tier_that_is_dropped_ends_its_threads(tmp_path):
    import threading

    before = threading.active_count()
    model = tower()
    optimizer = streamed(model, "host", stream={"weights_dir": tmp_path})
    train([(model, optimizer)], range(2))
    assert threading.active_count() > before
    del model, optimizer
    gc.collect()
    assert threading.active_count() <= before
