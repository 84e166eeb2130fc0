"""examples/train_lm.py: a run end to end, exact resume, the data order, sentences for mistakes."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from orthonorm.examples import train_lm
from orthonorm.examples.config import PRESETS, Config, UsageError, make_config
from orthonorm.examples.data import TrainBatches, load_corpus, validation_windows
from orthonorm.examples.model import Llama, hidden_matrices
from orthonorm.examples.optimizers import BUILDERS, build_optimizer, default_settings
from orthonorm.examples.ranks import check_ranks
from orthonorm.examples.report import Finished, table
from orthonorm.examples.sweep import GRIDS, sweep, write_settings
from orthonorm.examples.training import CSV_COLUMNS, Run, Trainer, cosine, tensors_in
from orthonorm.examples.workspace import Workspace
from orthonorm.optim import split_params

UNIFORM = math.log(256)  # nats per byte of a model that knows nothing
ALL = tuple(BUILDERS)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A prepared folder of the smoke preset: text, configuration, nothing trained."""
    return Workspace.create(tmp_path_factory.mktemp("smoke"), "smoke", {}, ALL)


def trainer(work: Workspace, name: str, folder: Path) -> Trainer:
    run = Run(work.config, name, default_settings(name, "smoke"))
    new = Trainer(run, folder, work.out / "tokens.pt")
    new.resume()
    return new


def rows(folder: Path) -> list[dict[str, str]]:
    """The log without its times."""
    with (folder / "log.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        del row["seconds"], row["optimizer_seconds"]
    return found


def test_smoke_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One command: every optimizer trains in its own process; log, table, curves, checkpoints."""
    out = tmp_path / "run"
    argv = ["--preset", "smoke", "--out", str(out)]
    assert train_lm.main(argv) == 0
    printed = capfd.readouterr().out
    assert (out / "table.md").read_text() in printed
    text = (out / "table.md").read_text()
    first = set()
    for name in ("adamw", "muon", "conda"):
        log = Finished.read(out / name)
        assert tuple(log.rows[0]) == CSV_COLUMNS
        assert [row["step"] for row in log.rows] == [0, 10, 20, 30, 40]
        assert log.rows[-1]["tokens"] == 40 * 8 * 64
        assert log.rows[-1]["val_loss"] < UNIFORM - 1.2
        assert log.rows[-1]["train_loss"] < UNIFORM - 1.2
        assert 0 < log.rows[-1]["optimizer_seconds"] < log.rows[-1]["seconds"] < 60
        assert log.result["state_bytes"] >= 4 * log.result["parameters"] * 0.9
        assert log.result["peak_bytes"] is None or 5e7 < log.result["peak_bytes"] < 5e9
        assert f"| {name} " in text and f"{log.result['val_loss']:.4f}" in text
        torch.load(out / name / "checkpoint.pt", weights_only=True)
        first.add(log.rows[0]["val_loss"])
    assert len(first) == 1, "every optimizer starts from the same weights"
    if "curves.png" in printed:
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.part"))
    # A finished run is not trained again, and not replaced by accident.
    assert train_lm.main(["--out", str(out), "--resume"]) == 0
    assert "step     40/40" not in capfd.readouterr().out
    assert train_lm.main(argv) == 2
    assert "--resume continues it, --overwrite replaces it" in capfd.readouterr().err
    assert train_lm.main(["--out", str(out), "--resume", "--steps", "50"]) == 2
    assert "with steps 40, got 50" in capfd.readouterr().err


@pytest.mark.parametrize("name", ALL)
def test_resume_is_bitwise(work: Workspace, tmp_path: Path, name: str) -> None:
    """Stopped at 20 of 40 and continued by a new trainer: every bit as without the stop."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir(), halves.mkdir()
    trainer(work, name, whole).train()
    trainer(work, name, halves).train(stop_after=15)
    assert rows(halves)[-1]["step"] == "20" and not (halves / "result.json").exists()
    with (halves / "log.csv").open("a") as file:
        file.write("30,1,1.0,1.0,1.0,1.0,1.0\n")  # written by a run killed before its checkpoint
    torch.manual_seed(12345)
    trainer(work, name, halves).train()
    assert rows(halves) == rows(whole)
    saved = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (whole, halves)]
    for key in ("model", "optimizer", "schedule", "rng", "step"):
        for a, b in zip(*(list(tensors_in(s[key])) for s in saved), strict=True):
            assert torch.equal(a, b), key
        assert numbers(saved[0][key]) == numbers(saved[1][key])


def numbers(value: Any) -> Any:
    """`value` without its tensors, and without the key that torch adds to a loaded group."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items() if key != "differentiable"}
    if isinstance(value, (list, tuple)):
        return [numbers(item) for item in value]
    return None if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_ours_follow_torch(work: Workspace, tmp_path: Path, rule: str) -> None:
    """The same settings give torch's losses; Muon's differ by the rounding of its iteration."""
    losses = []
    for name in (rule, f"torch-{rule}"):
        (tmp_path / name).mkdir()
        trainer(work, name, tmp_path / name).train()
        losses.append([float(row["val_loss"]) for row in rows(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4 if rule == "adamw" else 5e-3)


def test_same_seed_same_losses_other_seed_others(work: Workspace, tmp_path: Path) -> None:
    logs = []
    for seed in (0, 0, 1):
        config = make_config("smoke", {"steps": 10, "warmup": 1, "seed": seed})
        folder = tmp_path / str(len(logs))
        folder.mkdir()
        run = Run(config, "torch-adamw", {"lr": 0.004})
        new = Trainer(run, folder, work.out / "tokens.pt")
        new.resume()
        new.train()
        logs.append(rows(folder))
    assert logs[0] == logs[1]
    assert logs[0][-1]["val_loss"] != logs[2][-1]["val_loss"]


def test_options_of_the_step(work: Workspace, tmp_path: Path) -> None:
    """Micro-batches give the same gradient; clipping bounds it; bf16 stays near fp32."""
    gradients = {}
    for label, given in {"whole": {}, "micro": {"micro_batch": 3}, "bf16": {"bf16": True}}.items():
        run = Run(make_config("smoke", given), "torch-adamw", {"lr": 0.004})
        new = Trainer(run, tmp_path, work.out / "tokens.pt")
        new.forward_backward(new.batches[0])
        gradients[label] = torch.cat([p.grad.flatten() for p in new.model.parameters()])
    scale = gradients["whole"].norm()
    assert (gradients["micro"] - gradients["whole"]).norm() < 1e-5 * scale
    assert 1e-5 * scale < (gradients["bf16"] - gradients["whole"]).norm() < 0.1 * scale
    run = Run(make_config("smoke", {"clip": 1e-3, "steps": 5}), "torch-adamw", {"lr": 0.004})
    new = Trainer(run, tmp_path, work.out / "tokens.pt")
    norms: list[torch.Tensor] = []
    new.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.cat([p.grad.flatten() for p in new.model.parameters()]).norm()
        )
    )
    new.train()
    assert len(norms) == 5 and all(norm <= 1.001e-3 for norm in norms)


def test_divergence_ends_the_run_and_is_said(work: Workspace, tmp_path: Path) -> None:
    run = Run(work.config, "torch-adamw", {"lr": 1e30})
    new = Trainer(run, tmp_path, work.out / "tokens.pt")
    new.resume()
    new.train()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["diverged"] and result["val_loss"] is None and result["steps"] < 40
    assert "diverged at step" in table([Finished.read(tmp_path)], "cpu")


def test_cosine() -> None:
    config = Config(steps=100, warmup=10, min_lr_ratio=0.1)
    shares = [cosine(config, step) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == 1.0 and shares[-1] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_batches_cover_the_text_once_per_pass() -> None:
    config = make_config("smoke", {"context": 8, "batch": 4})
    tokens = torch.arange(8 * 41 + 3, dtype=torch.int32)
    batches = TrainBatches(tokens, config)
    first_pass = torch.cat([batches[i] for i in range(10)])
    assert first_pass.shape == (40, 9)
    assert torch.equal(first_pass[:, 1:], first_pass[:, :-1] + 1)
    starts = first_pass[:, 0].sort().values
    assert torch.equal(starts.diff(), torch.full((39,), 8))
    again = TrainBatches(tokens, config)
    assert torch.equal(again[17], batches[17]) and torch.equal(again[3], batches[3])
    assert not torch.equal(batches[10], batches[0])
    shortest = TrainBatches(torch.arange(9), config)
    assert torch.equal(shortest[5], torch.arange(9).expand(4, 9))
    assert torch.equal(validation_windows(torch.arange(9), config), torch.arange(9)[None])


def test_text_of_this_python_is_split_by_file() -> None:
    corpus = load_corpus(make_config("smoke", {}))
    assert 290_000 < len(corpus.train) + len(corpus.val) < 310_000
    assert 0.005 < len(corpus.val) / len(corpus.train) < 0.5
    assert torch.equal(corpus.train, load_corpus(make_config("smoke", {})).train)


def test_own_text(tmp_path: Path) -> None:
    """A folder is split by file; one file by position; any bytes serve; byte pairs are shorter."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for index in range(40):
        (folder / "deep" / f"{index}.txt").write_text(f"{index:02} is a number. " * 30)
    (folder / "empty.txt").touch()
    config = make_config("smoke", {"data": str(folder), "corpus_bytes": 0})
    corpus = load_corpus(config)
    names = [
        {int(word) for word in bytes(part.tolist()).split() if word.isdigit()}
        for part in (corpus.train, corpus.val)
    ]
    assert names[0] | names[1] == set(range(40)) and not names[0] & names[1] and names[1]
    garbage = tmp_path / "garbage.bin"
    garbage.write_bytes(bytes(range(256)) * 20)
    corpus = load_corpus(make_config("smoke", {"data": str(garbage)}))
    assert (len(corpus.train), len(corpus.val)) == (4608, 512)
    pytest.importorskip("tokenizers")
    pairs = load_corpus(make_config("smoke", {"data": str(folder), "vocab": 300}))
    assert 256 < pairs.train.max() < 300 and len(pairs.train) < 0.6 * 40 * 510


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data", "nowhere"], "must name a file or folder that exists, got nowhere"),
        (["--data", "empty"], "must not be empty"),
        (["--data", "short"], "must be longer than --context 64"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--warmup", "40"], "--warmup must be below steps=40, got 40"),
        (["--heads", "5"], "multiple of 2 x heads"),
        (["--vocab", "10"], "--vocab must be at least 256"),
        (["--device", "tpu"], "--device must be one that torch can use here, got tpu"),
        (["--lr", "muon"], "--lr must be NAME=NUMBER, got muon"),
        (["--lr", "muon=-1"], "--lr must be positive and finite, got muon=-1"),
        (["--lr", "sgd=1"], "--lr must name one of adamw, muon, conda, got sgd=1"),
        (["--lr", "conda.adamw=1"], "exists for Muon only, got conda.adamw=1"),
        (["--tuned", "short"], "--tuned must be a file written by --sweep"),
        (["--out", "short"], "--out must be a folder"),
        (["--preset", "60m"], "--preset 60m needs --data"),
    ],
)
def test_bad_requests_are_sentences(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("short").write_text("too short")
    assert train_lm.main(["--preset", "smoke", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("orthonorm train: ") and sentence in error
    assert not Path("runs").exists(), "a refused request leaves nothing behind"


def test_as_a_script_without_a_terminal(tmp_path: Path) -> None:
    """`python examples/train_lm.py` works as well; argparse's errors have exit code 2 too."""
    script = Path(train_lm.__file__)
    command = [sys.executable, str(script), "--optimizers", "sgd"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_sweep_extends_a_grid_whose_end_is_best_and_gives_muon_the_adamw_rate(
    tmp_path: Path,
) -> None:
    def measure(name: str, settings: dict[str, Any]) -> float | None:
        lr = settings["lr"]
        if name == "muon":
            assert settings["adamw_lr"] == 0.008
        return None if lr > 0.05 else abs(math.log(lr / {"adamw": 0.008, "muon": 0.02}[name]))

    best, losses = sweep(["muon", "adamw"], lambda name: default_settings(name, "demo"), measure)
    assert best["adamw"]["lr"] == 0.008 and best["muon"]["lr"] == 0.02
    assert [point["lr"] for point in losses["adamw"]] == [*GRIDS["adamw"], 0.016]
    path = tmp_path / "tuned.json"
    write_settings(path, make_config("demo", {}), "command", ["adamw"], "text", best, losses)
    assert default_settings("torch-muon", "demo", path) == best["muon"]
    assert json.loads(path.read_text())["how"]["config"]["steps"] == Config().steps


def test_routing_and_presets() -> None:
    """Every 2-D weight of attention and MLP is hidden, nothing else; every preset is valid."""
    for preset in PRESETS:
        make_config(preset, {"data": "x"})
        for name in ALL:
            default_settings(name, preset)
    model = Llama(make_config("smoke", {}).shape())
    assert len(hidden_matrices(model)) == 2 * 7
    groups = {group["rule"]: [name for name, _ in group["params"]] for group in split_params(model)}
    assert groups["matrix"] == list(hidden_matrices(model))
    assert sum(p.ndim == 2 for p in model.parameters()) == 2 * 7 + 2
    tied = Llama(make_config("smoke", {"tied": True}).shape())
    assert tied.head.weight is tied.embed.weight
    optimizer = build_optimizer("torch-muon", model, **default_settings("torch-muon", "smoke"))
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(model.parameters()))


def test_unreadable_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tuned must be a file written by --sweep"):
        default_settings("muon", "demo", tmp_path)


def test_two_ranks_train_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ... train --parallel fsdp2: rank 0 prints; the losses of one process; --resume."""
    sizes = ["--preset", "smoke", "--steps", "4", "--warmup", "1", "--eval-every", "2"]
    sizes += ["--eval-windows", "8", "--optimizers", "muon", "--micro-batch", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [
        "--nproc-per-node",
        "2",
        "-m",
        "orthonorm",
        "train",
        *sizes,
        "--out",
        "two",
        "--parallel",
        "fsdp2",
    ]
    stopped = subprocess.run(
        [*command, "--stop-after", "2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("step      2/4") == 1 and "Stopped early" in stopped.stdout
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step      2/4" not in done.stdout
    for line in ("4 steps of 8 x 64 tokens", "step      4/4", "| muon"):
        assert done.stdout.count(line) == 1, done.stdout
    monkeypatch.chdir(tmp_path)
    assert train_lm.main([*sizes, "--out", "one"]) == 0
    ours, theirs = (Finished.read(tmp_path / name / "muon") for name in ("two", "one"))
    assert [row["val_loss"] for row in ours.rows] == pytest.approx(
        [row["val_loss"] for row in theirs.rows], rel=1e-12
    ), "two halves of a batch are added as two micro-batches are"
    assert ours.result["parameters"] == theirs.result["parameters"]


@pytest.mark.parametrize(
    ("size", "argv", "sentence"),
    [
        (None, ["--parallel", "fsdp2"], "--parallel fsdp2 needs torchrun: torchrun"),
        (2, ["--parallel", "zero"], "--parallel must be one of ('ddp', 'fsdp2', 'hsdp'), got zero"),
        (2, [], "--parallel must say what 2 ranks do"),
        (3, ["--parallel", "ddp"], "--batch must be a multiple of the 3 ranks, got 8"),
        (2, ["--parallel", "hsdp"], "needs 2 replicas of at least 2 ranks each, got 2 ranks"),
    ],
)
def test_ranks_that_cannot_share_a_step(
    size: int | None, argv: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(UsageError) as error:
        check_ranks(make_config("smoke", {"parallel": argv[1]} if argv else {}))
    assert sentence in str(error.value)
