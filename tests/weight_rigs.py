"""A small tower of blocks whose weights stream, its resident twin, and what both are compared by."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import chunkft
from chunkft.weights import WeightStream, stream_of

VOCABULARY = 31
WIDTH = 16


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 48)
        self.down = nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Embedding, blocks, norm and head; ``mode`` says how blocks are checkpointed."""

    def __init__(self, layers: int = 4, mode: str = "none", tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.table.weight
        self.mode = mode
        self.order = list(range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for number in self.order:
            block = self.blocks[number]
            if self.mode == "none" or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.mode == "reentrant")
        return self.head(self.norm(x))


def tower(layers: int = 4, mode: str = "none", tied: bool = True, seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower(layers, mode, tied)


def batch(number: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int = 0) -> Tensor:
    ids = batch(number)
    return F.cross_entropy(model(ids).flatten(0, -2), ids.flatten())


def streamed(
    model: nn.Module, place: str = "host", *, stream: dict[str, Any] | None = None, **options: Any
) -> Any:
    """An optimizer of a model whose weights stream, with poisoned pages and, for its bits, one tile."""
    weights = WeightStream(model, device="cpu", **{"poison": True, "tile_bytes": 1 << 20} | (stream or {}))
    return chunkft.ChunkAdamW(
        model, **{"lr": 1e-2, "chunks": 3, "interval": 1} | options, weights=weights, update_on=place
    )


def pair(
    place: str = "host",
    stream: dict[str, Any] | None = None,
    make: Callable[[], nn.Module] = tower,
    **options: Any,
) -> list[tuple[Any, Any]]:
    """A streamed model with its optimizer, and the same resident."""
    models = make(), make()
    resident = chunkft.ChunkAdamW(models[1], **{"lr": 1e-2, "chunks": 3, "interval": 1} | options)
    return [(models[0], streamed(models[0], place, stream=stream, **options)), (models[1], resident)]


def train(
    pairs: Iterable[tuple[Any, Any]], steps: Iterable[int], loss: Callable[[Any, int], Tensor] = loss_of
) -> None:
    for step in steps:
        for model, optimizer in pairs:
            loss(model, step).backward()
            optimizer.step()


def gradients(optimizer: Any) -> dict[str, Tensor]:
    return {str(p): leaf.grad.clone() for p, leaf in optimizer.active_parameters() if leaf.grad is not None}


def assert_same(pairs: list[tuple[Any, Any]]) -> None:
    """The same gradients of active slices and the same weights."""
    (mine, my_optimizer), (theirs, their_optimizer) = pairs
    left, right = gradients(my_optimizer), gradients(their_optimizer)
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert torch.equal(gradient, right[name]), name
    assert_same_state(mine, theirs)


def assert_same_state(mine: nn.Module, theirs: nn.Module) -> None:
    left, right = mine.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_at_rest(model: nn.Module) -> None:
    """No block is held, by the ring or by anybody's visit, and every slot can be had."""
    stream = stream_of(model)
    assert stream is not None
    assert stream.ring is not None
    ring = stream.ring
    visits = stream._visits
    assert not any((ring._held, visits._users, visits._tasks, visits._passes))
    states = [ring.pager.state(number) for number in range(len(ring.blocks))]
    assert "IN_USE" not in states, states
    for name, home in ring.homes.items():
        assert model.get_parameter(name).data_ptr() == home.data_ptr(), name
    pages = stream._tables.pages
    if pages is not None:
        assert not any((pages._slots, pages._users))


def places(model: nn.Module) -> dict[str, Any]:
    """Where every parameter is, and what is in the modules besides: to be compared before and after."""
    found: dict[str, Any] = {name: p.data_ptr() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        held = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        found["module " + name] = {k: dict(v) if isinstance(v, dict) else v for k, v in held.items()}
    for name, p in model.named_parameters():
        found["parameter " + name] = (type(p), dict(p.__dict__), p._backward_hooks, p.requires_grad, p.grad)
    return found
