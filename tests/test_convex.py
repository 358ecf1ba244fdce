"""A convex problem: every partition and schedule reaches the optimum that AdamW reaches."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_models import PARTITIONS

import chunkft

STEPS = 450
FAST = {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.0}


class Sum(nn.Module):
    """Linear maps of two inputs and an embedding, added up, so that a convex loss is convex in all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(6, 5), nn.Linear(4, 5, bias=False)])
        self.table = nn.Embedding(7, 5)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.parts[0](x[:, :6]) + self.parts[1](x[:, 6:]) + self.table(ids)


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(150, 10, generator=generator, dtype=torch.float64)
    noise = torch.randn(150, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 7, (150,), generator=generator), x[:, 2:7] + 2 * noise


def loss_of(kind: str, model: nn.Module) -> Tensor:
    x, ids, target = data()
    y = model(x, ids)
    return F.mse_loss(y, target) if kind == "squares" else F.cross_entropy(y, target.argmax(1))


def solve(kind: str, build: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[float, Tensor]:
    """Loss at the end, and what the solution says of the data (which is unique, as the weights are not)."""
    torch.manual_seed(1)
    model = Sum().double()
    optimizer = build(model)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 - n / STEPS) ** 2)
    for _ in range(STEPS):
        loss_of(kind, model).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    return reached(kind, model)


@torch.no_grad()
def reached(kind: str, model: nn.Module) -> tuple[float, Tensor]:
    y = model(*data()[:2])
    return float(loss_of(kind, model)), y if kind == "squares" else y.softmax(1)


@pytest.fixture(scope="module")
def optimum() -> dict[str, tuple[float, Tensor]]:
    """The exact solution, by a method of second order."""
    found = {}
    for kind in ("squares", "logistic"):
        model = Sum().double()
        newton = torch.optim.LBFGS(
            model.parameters(),
            max_iter=500,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )

        def closure(kind: str = kind, model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = loss_of(kind, model)
            loss.backward()
            return loss

        newton.step(closure)
        found[kind] = reached(kind, model)
    return found


@pytest.mark.parametrize("kind", ["squares", "logistic"])
def test_adamw_reaches_the_optimum(kind, optimum):
    value, fitted = solve(kind, lambda m: torch.optim.AdamW(m.parameters(), **FAST))
    assert value == pytest.approx(optimum[kind][0], rel=1e-7)
    torch.testing.assert_close(fitted, optimum[kind][1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["squares", "logistic"])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("schedule", ["cyclic", "reverse", "random"])
def test_chunks_reach_the_optimum(kind, partition, schedule, optimum):
    options = {"chunks": 3, "interval": 2, "partition": partition, "schedule": schedule}
    value, fitted = solve(kind, lambda m: chunkft.ChunkAdamW(m, **FAST, **options))
    assert value == pytest.approx(optimum[kind][0], rel=1e-4)
    torch.testing.assert_close(fitted, optimum[kind][1], rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "options", [{"slice_dim": 1}, {"keep_state": False, "interval": 10}, {"always_active": "table*"}]
)
def test_columns_forgotten_moments_and_an_always_active_part_reach_it_too(options, optimum):
    options = {"chunks": 3, "interval": 2, **options}
    value, fitted = solve("squares", lambda m: chunkft.ChunkAdamW(m, **FAST, **options))
    assert value == pytest.approx(optimum["squares"][0], rel=1e-4)
    torch.testing.assert_close(fitted, optimum["squares"][1], rtol=0, atol=2e-2)
