"""What the benchmark compares is the same product, and its check refuses a wrong one."""

import pytest
import torch

from bench.kernel_cases import EXPERTS, Case
from bench.kernel_setup import Setup
from chunkft.kernels.heuristics import Config

SMALL = Config(32, 64, 16, 4, 2)
CASES = [
    Case("slice", "tiny", "o", 4, 40, ((64, 48),), (24,), 16),
    Case("misaligned", "tiny", "o", 4, 40, ((64, 48),), (19,), 19),
    Case("blocks", "tiny", "o", 4, 40, ((256, 48),), (128,)),
    Case("accumulate", "tiny", "o", 4, 40, ((64, 48),), (24,), 16),
    Case("group", "tiny", "q+k", 4, 40, ((64, 48), (32, 48)), (24, 8)),
    Case("experts", "tiny", "experts", 4, 48, ((32, 48),), (16,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.form)
def test_both_sides_compute_the_same(case, device):
    setup = Setup(case, torch.device(device))
    assert setup.check(lambda: setup.chunkft("triton", SMALL)) == ""
    assert setup.check(lambda: setup.chunkft("auto")) == ""
    for run in setup.torch().values():
        for theirs in setup.theirs:
            theirs.fill_(0)
        for ours in setup.ours:
            ours.fill_(0)
        run()
        setup.chunkft("triton", SMALL)
        for ours, theirs in zip(setup.ours, setup.theirs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.3)
    assert setup.ours[0].shape[0] == (EXPERTS if case.form == "experts" else case.rows[0])
    assert "off by" in setup.check(lambda: None)


def test_sums_of_tensor_cores_are_no_faults_and_a_missing_token_is(device):
    """They are cut off after each 16 products; who splits the tokens is nearer to the exact sum."""
    setup = Setup(Case("accumulate", "tiny", "o", 4, 4096, ((64, 48),), (24,), 16), torch.device(device))
    dy, x = setup.dys[0][:, 16:40].double(), setup.x.double()

    def cut_off(tokens=4096):
        total = torch.full((24, 48), 1.5, dtype=torch.float64, device=device)
        for at in range(0, tokens, 16):
            stop = min(at + 16, tokens)
            exact = total + dy[at:stop].t() @ x[at:stop]
            single = exact.float()
            beyond = single.double().abs() > exact.abs()
            total = torch.where(beyond, torch.nextafter(single, torch.zeros_like(single)), single).double()
        setup.ours[0].copy_(total)

    assert setup.check(cut_off) == ""
    assert "off by" in setup.check(lambda: cut_off(4095))
