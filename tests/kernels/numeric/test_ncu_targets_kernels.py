"""The kernels that `make ncu` and `make sanitize-gpu` launch give what PyTorch gives, at the small shapes."""

from dataclasses import replace

import pytest
import torch

from bench import ncu_targets
from bench.kernel_cases import cases
from bench.ncu_targets import Place
from chunkft.kernels.targets import target_of

TARGET = target_of(90)
# Made here and not in the test, where poisoned memory is real memory also for a model on the meta device.
OTHERS = [
    *ncu_targets.updates("llama-2-7b", 512, True),
    *ncu_targets.lookups("llama-2-7b", 32, 64, True, "small"),
]


def reduced(case):
    """Smaller still: the interpreter takes seconds for a tile."""
    less = ncu_targets.small(case)
    return replace(less, weights=tuple((rows, 72) for rows, _ in less.weights))


@pytest.mark.parametrize("form", ["slice", "misaligned", "group"])
def test_products_of_every_kind(form, device):
    case = reduced(next(cases(("llama-2-7b",), (32,), (1024,), (form,))))
    results = {}
    for job in ncu_targets.products(case, TARGET, "small"):
        torch.manual_seed(3)
        result = job.make(Place(device, True))()
        results[job.name.split()[0]] = torch.cat(
            list(result) if isinstance(result, list) else [result]
        ).float()
    wanted = results.pop("cublas")
    assert set(results) >= (
        {"wgrad-group"} if form == "group" else {"wgrad-plain", "wgrad-tma", "wgrad-split"}
    )
    for name, result in results.items():
        torch.testing.assert_close(result, wanted, rtol=0.02, atol=0.3, msg=name)


def test_update_and_lookup(device):
    by_kind = {job.name.split()[0]: job for job in OTHERS}
    results = {}
    for backend in (True, False):
        torch.manual_seed(3)
        call = by_kind["adamw-triton"].make(Place(device, backend))
        call()
        cells = dict(zip(call.__code__.co_freevars, (c.cell_contents for c in call.__closure__), strict=True))
        results[backend] = cells["params"]
    for ours, theirs in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(3)
    rows = by_kind["embedding-triton"].make(Place(device, True))()
    torch.manual_seed(3)
    torch.testing.assert_close(
        rows, by_kind["embedding-torch"].make(Place(device, True))(), rtol=0.02, atol=0.05
    )
