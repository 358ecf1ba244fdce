"""The cases of `bench.kernels`: slices of the weights of real models, by model, number of chunks and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

# name of a weight: rows (output features), columns (input features); several that share an input stand together
MODELS: dict[str, tuple[dict[str, tuple[int, int]], ...]] = {
    "llama-2-7b": (
        {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096)},
        {"o": (4096, 4096)},
        {"gate": (11008, 4096), "up": (11008, 4096)},
        {"down": (4096, 11008)},
    ),
    "llama-3-8b": (
        {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)},
        {"gate": (14336, 4096), "up": (14336, 4096)},
        {"down": (4096, 14336)},
    ),
    "qwen3-8b": (
        {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096)},
        {"gate": (12288, 4096), "up": (12288, 4096)},
        {"down": (4096, 12288)},
    ),
    "llama-3-70b": (
        {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192)},
        {"gate": (28672, 8192), "up": (28672, 8192)},
        {"down": (8192, 28672)},
    ),
    "qwen3-30b-a3b": (
        {"q": (4096, 2048), "k": (512, 2048), "v": (512, 2048)},
        {"experts": (1536, 2048)},
    ),
}
EXPERTS, EXPERTS_A_TOKEN = 128, 8
CHUNKS = (8, 32, 128)
TOKENS = (1024, 4096, 16384)
FORMS = ("slice", "misaligned", "accumulate", "blocks", "group", "experts")


@dataclass(frozen=True)
class Case:
    """One product: `weights` of (rows of the weight, columns) with one slice each of `rows` rows from `start`."""

    form: str
    model: str
    name: str
    chunks: int
    tokens: int
    weights: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    start: int = 0
    experts: int = EXPERTS

    @property
    def cols(self) -> int:
        """Columns, which are common to all slices of a case."""
        return self.weights[0][1]

    @property
    def key(self) -> str:
        """What names the case in a file of results."""
        return f"{self.form}/{self.model}/{self.name}/K{self.chunks}/T{self.tokens}"

    @property
    def title(self) -> str:
        """One line that names the case."""
        return f"{self.form:10s} {self.model:14s} {self.name:8s} K={self.chunks:<4d} T={self.tokens:<6d}"


def slice_rows(rows: int, chunks: int) -> int:
    """Rows of 1/chunks of a weight, at least 8 and in whole 8s, as an interleaved plan cuts them."""
    return max(8, rows // chunks // 8 * 8)


def cases(
    models: tuple[str, ...] = tuple(MODELS),
    chunks: tuple[int, ...] = CHUNKS,
    tokens: tuple[int, ...] = TOKENS,
    forms: tuple[str, ...] = FORMS,
) -> Iterator[Case]:
    """All cases of the named models."""
    for model in models:
        for group in MODELS[model]:
            for k in chunks:
                for t in tokens:
                    yield from (c for c in _of_group(model, group, k, t) if c.form in forms)


def small(case: Case) -> Case:
    """The case with a few rows, columns and tokens, for a rehearsal on a CPU."""
    if case.form == "experts":
        return replace(case, tokens=8, weights=((32, 16),), rows=(16,), experts=4)
    rows = tuple(64 if case.form == "blocks" else 20 + 3 * i for i in range(len(case.rows)))
    weights = tuple((128, 40) for _ in case.weights)
    return replace(case, tokens=70, weights=weights, rows=rows, start=case.start % 8)


def _of_group(model: str, group: dict[str, tuple[int, int]], chunks: int, tokens: int) -> Iterator[Case]:
    if "experts" in group:
        rows, _ = group["experts"]
        sizes = (slice_rows(rows, chunks),)
        yield Case("experts", model, "experts", chunks, tokens, (group["experts"],), sizes)
        return
    for name, (rows, cols) in group.items():
        if name in ("k", "up") or (name == "v" and group["k"] == group["v"]):
            continue
        size = slice_rows(rows, chunks)
        start = size if 2 * size <= rows else 0
        yield Case("slice", model, name, chunks, tokens, ((rows, cols),), (size,), start)
        yield Case("accumulate", model, name, chunks, tokens, ((rows, cols),), (size,), start)
        yield Case("misaligned", model, name, chunks, tokens, ((rows, cols),), (size - 5,), start + 3)
        if size >= 64:
            yield Case("blocks", model, name, chunks, tokens, ((rows, cols),), (size // 64 * 64,))
    if len(group) > 1:
        sizes = tuple(slice_rows(rows, chunks) for rows, _ in group.values())
        yield Case("group", model, "+".join(group), chunks, tokens, tuple(group.values()), sizes)
