"""What `make ncu` launches: named so that ncu can find it, the same product by every kernel, tried without a GPU."""

import re
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import ncu_targets  # noqa: E402
from bench.kernel_cases import cases  # noqa: E402
from bench.kernels import problem_of  # noqa: E402
from bench.ncu_targets import Job, Place, chosen, jobs, small  # noqa: E402
from chunkft.kernels.heuristics import broken_limits  # noqa: E402
from chunkft.kernels.targets import target_of  # noqa: E402

HOPPER = target_of(90)
CPU = Place("cpu", False)


def of(reduced=False, forms=ncu_targets.FORMS, target=HOPPER):
    return jobs("llama-2-7b", 32, 1024, forms, target, reduced)


def tensors(result):
    return list(result) if isinstance(result, (list, tuple)) else list(result.split(result.shape[0]))


def test_every_kernel_and_its_rival_has_a_range_of_its_own():
    names = [job.name for job in of()]
    assert len(set(names)) == len(names)
    kinds = {name.split()[0] for name in names}
    assert kinds == {
        *("wgrad-plain", "wgrad-tma", "wgrad-split", "wgrad-group", "cublas", "cublas-joined"),
        *("adamw-triton", "adamw-torch", "embedding-triton", "embedding-torch"),
    }
    for weight in ("q", "o", "gate", "down"):
        assert {name.split()[0] for name in names if f" {weight} K=32" in name} == {
            *("wgrad-plain", "wgrad-tma", "wgrad-split", "cublas")
        }


def test_configurations_are_of_their_kind_and_legal_for_the_case():
    by_name = {job.name: job.config for job in of()}
    for case in cases(("llama-2-7b",), (32,), (1024,), ("slice",)):
        plain, tma, split = (
            by_name[f"wgrad-{kind} {case.name} K=32 T=1024"] for kind in ("plain", "tma", "split")
        )
        assert (plain.tma, plain.splits) == (False, 1)
        assert (tma.tma, tma.splits) == (True, 1)
        assert split.splits > 1
        for config in (plain, tma, split):
            assert broken_limits(config, problem_of(case), HOPPER) == []


def test_a_device_without_descriptors_has_no_range_for_them():
    names = {job.name.split()[0] for job in of(target=target_of(80))}
    assert "wgrad-tma" not in names
    assert {"wgrad-plain", "wgrad-split", "cublas"} <= names


def test_small_shapes_fit_their_weights_and_have_tails():
    for case in cases(("llama-2-7b",), (8, 32, 128), (1024,), ncu_targets.FORMS):
        less = small(case)
        assert less.tokens % 64 != 0
        for rows, (whole, cols) in zip(less.rows, less.weights, strict=True):
            assert 0 < rows <= whole - less.start
            assert cols <= 2048
            assert rows % 8 != 0
        assert less.start % 8 == case.start % 8


@pytest.mark.parametrize("weights", ["q", "q misaligned", "gate", "q+k+v", "gate+up"])
def test_all_kernels_of_a_shape_compute_the_same_product(weights):
    results = {}
    for job in of(reduced=True):
        if job.name.split(maxsplit=1)[1] == f"{weights} small":
            torch.manual_seed(3)
            results[job.name.split()[0]] = torch.cat(tensors(job.make(CPU)())).float()
    assert len(results) >= 3
    wanted = results.pop("cublas")
    for name, result in results.items():
        torch.testing.assert_close(result, wanted, rtol=0.02, atol=0.3, msg=name)


def test_the_update_and_the_lookup_change_what_they_should():
    by_kind = {job.name.split()[0]: job for job in of(reduced=True)}
    torch.manual_seed(3)
    update = by_kind["adamw-triton"].make(CPU)
    cells = dict(zip(update.__code__.co_freevars, (c.cell_contents for c in update.__closure__), strict=True))
    before = [p.clone() for p in cells["params"]]
    update()
    assert cells["steps"].tolist() == [1.0] * len(before)
    assert all(moment.all() for moment in cells["first"])
    assert any(
        (a != b).any() for a, b in zip(before, cells["params"], strict=True)
    )  # small steps round to none
    torch.manual_seed(3)
    ours = by_kind["embedding-triton"].make(CPU)()
    torch.manual_seed(3)
    theirs = by_kind["embedding-torch"].make(CPU)()
    assert ours.shape[0] == 320 // 32 + 1
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)


def test_rehearsal_runs_every_target(capsys):
    ncu_targets.main(["--rehearse", "--forms", *ncu_targets.FORMS])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == [f"ncu {job.name}" for job in of(reduced=True)]


def test_the_list_names_what_would_be_launched(capsys):
    ncu_targets.main(["--list", "--only", "adamw", "q"])
    kinds = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert kinds.count("wgrad-plain") == 1  # q
    assert kinds.count("wgrad-group") == 1  # q+k+v begins so too
    assert kinds.count("adamw-triton") == 1
    assert "embedding-triton" not in kinds


def test_a_range_is_around_the_second_call_only(monkeypatch):
    events = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            events.append(f"push {self.name}")

        def __exit__(self, *_):
            events.append("pop")

    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("settled"))
    job = Job("kernel q", lambda place: lambda: events.append("call"))
    ncu_targets.launch(job, Place("cuda", True))
    assert events == ["call", "settled", "push ncu kernel q", "call", "pop", "settled"]


@pytest.mark.parametrize("name", ["a:b", "a/b", 'a"b', "a\\b"])
def test_names_that_ncu_would_take_apart_are_refused(name):
    with pytest.raises(ValueError, match="name is"):
        Job(name, lambda place: lambda: None)


def test_words_that_fit_nothing_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("--only flash fits none of the names; they begin with adamw-")
    ):
        chosen(of(), ["flash"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would launch here")
def test_without_a_gpu_the_command_says_what_it_can_do(capsys):
    for arguments, words in (
        ([], "torch sees no GPU; --list and --rehearse need none"),
        (["--list", "--chunks", "0"], "--chunks is 0, expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            ncu_targets.main(arguments)
        assert words in capsys.readouterr().err
