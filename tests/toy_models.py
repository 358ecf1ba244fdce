"""Small models and batches of odd shapes, and AdamW over masked dense gradients to compare with."""

import io
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import chunkft

PARTITIONS = ("bytes", "layers", "interleaved")


class TinyNet(nn.Module):
    """Embedding, two blocks with norms and biases, and a head; all sizes are odd on purpose."""

    def __init__(self, vocabulary: int = 19, width: int = 11, classes: int = 5) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 23), nn.GELU(), nn.Linear(23, width))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x.mean(1)))


def tiny_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet().to(dtype)


def tiny_batch(number: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    return (
        torch.randint(0, 19, (size, 7), generator=generator),
        torch.randint(0, 5, (size,), generator=generator),
    )


def tiny_loss(model: nn.Module, number: int) -> Tensor:
    ids, labels = tiny_batch(number)
    return F.cross_entropy(model(ids).float() if model.head.weight.dtype.itemsize < 4 else model(ids), labels)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 37), nn.ReLU(), nn.LayerNorm(37), nn.Linear(37, 9, bias=False)).to(
        dtype
    )


def mlp_loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(2000 + number)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 13, generator=generator).to(dtype)
    return F.mse_loss(model(x), torch.randn(8, 9, generator=generator).to(dtype))


def tiny_llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def llama_loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(3000 + number)
    ids = torch.randint(0, 53, (3, 9), generator=generator)
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].reshape(-1, 53), ids[:, 1:].reshape(-1))


Loss = Callable[[nn.Module, int], Tensor]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, steps: Iterable[int], accumulate: int = 1
) -> None:
    """Plain loop; batch numbers follow from the step, so that any step can be repeated."""
    for step in steps:
        for micro in range(accumulate):
            (loss(model, step * accumulate + micro) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    a = weights(a) if isinstance(a, nn.Module) else a
    b = weights(b) if isinstance(b, nn.Module) else b
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(view), b.detach().contiguous().view(view))


def assert_same_weights(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> None:
    a = weights(a) if isinstance(a, nn.Module) else a
    b = weights(b) if isinstance(b, nn.Module) else b
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different, f"weights differ: {different}"
    assert a.keys() == b.keys()


def flat_state(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists by path, to compare two state_dicts."""
    if isinstance(value, dict):
        entries: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, (list, tuple)):
        entries = enumerate(value)
    else:
        return {path: value}
    result: dict[str, object] = {f"{path}/": type(value).__name__}
    for key, entry in entries:
        result.update(flat_state(entry, f"{path}/{key}"))
    return result


def assert_same_state(a: object, b: object) -> None:
    left, right = flat_state(a), flat_state(b)
    assert left.keys() == right.keys()
    for path, value in left.items():
        other = right[path]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor), path
            assert same_bits(value, other), path
        else:
            assert value == other, path


def leaves(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts and lists, with their paths."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(entry, f"{path}/{key}")


def through_file(source, target, path):
    chunkft.save_checkpoint(source, path)
    chunkft.load_checkpoint(target, path)


def through_dict(source, target, path):
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))


WAYS = {"file": through_file, "dict": through_dict}


class Allocations(TorchDispatchMode):
    """Notes the size of the largest storage that an operation made, leaving out views and mapped files."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in flat_tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten.set_.source_Storage
        ):  # memory that exists: of an arena, or mapped from a file
            return result
        for tensor in flat_tensors(result):
            if tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def flat_tensors(value):
    return [entry for _, entry in leaves(value)]


class MaskedAdamW:
    """AdamW written out, over dense gradients of which only the active slices of a plan are used.

    It knows a plan and an order of chunks, but shares no code with chunkft's optimizers: moments are full-shape
    tensors, and each slice counts its own steps.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: chunkft.ChunkPlan,
        order: Callable[[int], int],
        interval: int,
        hyper: Callable[[str], dict[str, float]] | None = None,
        keep_state: bool = True,
        max_grad_norm: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.model, self.plan, self.order, self.interval = model, plan, order, interval
        self.hyper = hyper or (lambda name: {"lr": 1e-3, "weight_decay": 0.01})
        self.keep_state, self.max_grad_norm, self.betas, self.eps = keep_state, max_grad_norm, betas, eps
        self.parameters = dict(model.named_parameters())
        self.m = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.counts: dict[chunkft.Slice, int] = {}
        self.steps = 0

    @property
    def active(self) -> list[chunkft.Slice]:
        chunk = self.plan.chunks[self.order(self.steps // self.interval)]
        return [*self.plan.always, *chunk.slices]

    @torch.no_grad()
    def step(self) -> None:
        pieces = [p for p in self.active if self.parameters[p.name].grad is not None]
        grads = {piece: window(piece, self.parameters[piece.name].grad).clone() for piece in pieces}
        if self.max_grad_norm is not None:
            norm = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
            for g in grads.values():
                g.mul_(min(1.0, self.max_grad_norm / (norm + 1e-6)))
        for piece in pieces:
            self._update(piece, grads[piece])
        self.steps += 1
        if self.steps % self.interval == 0 and not self.keep_state:
            for piece in pieces:
                if piece not in self.plan.always:
                    self.counts.pop(piece, None)
                    window(piece, self.m[piece.name]).zero_()
                    window(piece, self.v[piece.name]).zero_()

    def _update(self, piece: chunkft.Slice, grad: Tensor) -> None:
        hyper = self.hyper(piece.name)
        count = self.counts[piece] = self.counts.get(piece, 0) + 1
        p, m, v = (window(piece, t[piece.name]) for t in (self.parameters, self.m, self.v))
        beta1, beta2 = self.betas
        p.mul_(1 - hyper["lr"] * hyper["weight_decay"])
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        corrected_m = m / (1 - beta1**count)
        corrected_v = v / (1 - beta2**count)
        p.sub_(hyper["lr"] * corrected_m / (corrected_v.sqrt() + self.eps))

    def zero_grad(self) -> None:
        self.model.zero_grad()


def window(piece: chunkft.Slice, tensor: Tensor) -> Tensor:
    """The slice of a whole-parameter tensor, by plain indexing."""
    if piece.dim is None:
        return tensor
    rows = slice(piece.start, piece.stop)
    return tensor[rows] if piece.dim == 0 else tensor[:, rows]


def order_of(schedule: str, chunks: int, seed: int = 0) -> Callable[[int], int]:
    """Chunk of each interval; the random order is read from the public function, the others are written out."""
    if schedule == "cyclic":
        return lambda n: n % chunks
    if schedule == "reverse":
        return lambda n: chunks - 1 - n % chunks
    from chunkft.schedule import active_chunk

    return lambda n: active_chunk("random", n, chunks, seed)
