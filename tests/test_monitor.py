"""Monitor: what it records, when, and that nothing that fails in it reaches the training loop."""

from __future__ import annotations

import csv
import gc
import json
import math
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from orthonorm import monitor
from orthonorm.monitor import Monitor, MonitorWarning, Row
from orthonorm.optim import Muon, split_params
from torch import Tensor, nn
from torch.optim import optimizer as torchs


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4))


def step(net: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    net(torch.randn(40, 6)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_rows_are_the_metrics_of_the_step() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Monitor(net, every=2, budget=None, metrics=("sigma_1", "soft_rank")) as watch:
        step(net, optimizer)
        assert not watch.rows and watch.due
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        step(net, optimizer)
        assert watch.steps == 2 and not watch.due and not watch.failures
        change = {n: p.detach() - before[n] for n, p in net.named_parameters()}
        for name in ("0.weight", "2.weight", "4.weight"):
            found = {"weights": before[name], "updates": change[name]}
            found["gradients"] = change[name] / -0.1
            for kind, X in found.items():
                steps, values = watch.series("sigma_1", kind, name)
                assert steps == [2]
                assert values[0] == pytest.approx(torch.linalg.matrix_norm(X, 2).item(), rel=1e-3)
                _, values = watch.series("soft_rank", kind, name)
                assert values[0] == pytest.approx(monitor.soft_rank(X).item(), rel=1e-3)
        names = {(r.kind, r.name) for r in watch.rows}
        assert ("activations", "2") in names and ("weights", "0.bias") not in names
        assert {r.metric for r in watch.rows if r.kind == "activations"} == {
            "sigma_1", "soft_rank", "sign_diversity", "mean_alignment"
        }  # fmt: skip
    step(net, optimizer)
    step(net, optimizer)
    assert watch.steps == 2  # closed


def test_two_optimizers_of_one_model_and_others_of_another() -> None:
    net, other = model(), model()
    first = Muon(split_params(net[:3]), lr=0.01)
    second, foreign = torch.optim.Adam(net[4].parameters()), torch.optim.Adam(other.parameters())
    with Monitor(net, every=1, budget=None) as watch:
        for _ in range(3):
            step(other, foreign)
            step(net, first, second)
        assert watch.steps == 3 and not watch.failures
        for kind in ("weights", "gradients", "updates"):
            for name in ("0.weight", "4.weight"):
                assert watch.series("frobenius", kind, name)[0] == [1, 2, 3]


def test_one_row_per_step_and_name_whichever_optimizers_step_and_how_often() -> None:
    """A foreign optimizer after the forward pass, as of a discriminator; one that steps thrice."""
    net, other = model(), model()
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (net[:3], net[4]))
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with Monitor(net, every=1, budget=None) as watch:
        for _ in range(3):
            step(net, foreign, first, second, second, second)
        for kind in ("weights", "updates"):
            for name in ("0.weight", "4.weight"):
                assert watch.series("frobenius", kind, name)[0] == [1, 2, 3]
        step(net, first)
        step(net, second, first)  # has no rows of step 4 yet, and does not take the inputs of 5
        assert watch.series("sign_diversity", "activations", "2")[0] == [1, 2, 3, 4, 5]
        assert not watch.failures


def test_loops_without_an_optimizer_and_user_fed_tensors() -> None:
    net = model()
    cache = torch.randn(2, 3, 10, 4)
    with Monitor(net, every=2, budget=None) as watch:
        for _ in range(4):
            watch.observe("layer0.k", cache)
            step(net)
            watch.step()
        assert watch.series("sigma_1", "weights", "0.weight")[0] == [2, 4]
        assert not [r for r in watch.rows if r.kind == "updates"]
        steps, values = watch.series("frobenius", "caches", "layer0.k[4]")
        assert steps == [2, 4] and values[0] == pytest.approx(cache[1, 1].norm().item())
        assert not watch.failures


def test_convolutions_stacks_and_patterns() -> None:
    net = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 5), "head": nn.Linear(4, 2)})
    net.experts = nn.Parameter(torch.randn(2, 5, 6))
    with Monitor(
        net, every=1, budget=None, exclude=["head*"], metrics={"weights": ["frobenius"]}
    ) as watch:
        watch.step()
        found = {r.name: r.value for r in watch.rows}
    assert set(found) == {"conv.weight", "experts[0]", "experts[1]"}
    assert found["conv.weight"] == pytest.approx(net["conv"].weight.norm().item())


def test_alarm_before_and_never_twice() -> None:
    net = nn.Linear(6, 4, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    told: list[Row] = []
    v = torch.linalg.svd(net.weight.detach()).Vh[0]
    with Monitor(net, every=1, budget=None, on_alarm=told.append) as watch:
        for offset in (0, 0, 9, 9, 9, 9):
            net(torch.randn(64, 6) + offset * v).sum().backward()
            optimizer.step()
    assert [(r.step, r.metric, r.value) for r in told] == [(4, "sign_diversity", 0.0)]
    assert watch.alarms == told


def test_failures_are_counted_reported_once_and_stop_nothing() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def broken(*_: object) -> bool:
        raise RuntimeError("no alarm today")

    rules = {("activations", "sign_diversity"): broken}
    watch = Monitor(net, every=1, budget=None, rules=rules, tensorboard=object())
    with pytest.warns(MonitorWarning) as told:
        for _ in range(3):
            step(net, optimizer)
    watch.close()
    of = "alarm on sign_diversity of 0"
    assert watch.failures[of] == 3 and watch.failures["records"] > 3
    texts = [str(w.message) for w in told]
    assert len(texts) == len(set(texts)) == 4
    assert any("no alarm today" in t for t in texts)
    with warnings.catch_warnings(), Monitor(net, every=1, budget=None, rules=rules) as watch:
        warnings.simplefilter("error")
        step(net, optimizer)  # a warning that is an error is logged instead
    assert watch.failures[of] == 1


PARTS = (
    "_begin", "_end", "_arm", "_disarm", "_held", "_matrices", "_measure", "_measure_before",
    "_tops", "_align", "_record",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_whatever_raises_inside_training_goes_on(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of a monitor in turn: counted at each measured step, reported once, weights as
    without a monitor."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"{part} broke")

    nets = model(), model()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
    watch = Monitor(nets[0], every=1, budget=None)
    monkeypatch.setattr(watch, part, broken)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for net, optimizer in zip(nets, optimizers, strict=True):
            torch.manual_seed(1)
            for _ in range(3):
                step(net, optimizer)
            if net is nets[0]:
                watch.observe("cache", torch.randn(4, 3))
                watch.close()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
    texts = [str(w.message) for w in told if "broke" in str(w.message)]
    assert len(texts) == len(set(texts)) >= 1 and sum(watch.failures.values()) >= 3


def test_hooks_themselves_are_guarded() -> None:
    """What torch calls: no argument of theirs, however odd, reaches the training loop."""
    net = model()
    with Monitor(net, every=1, budget=None) as watch, pytest.warns(MonitorWarning):
        watch._pre_step(None)  # type: ignore[arg-type]
        watch._post_step(object())  # type: ignore[arg-type]
        watch._capture("0")(net[0], ())
        watch.observe("cache", None)  # type: ignore[arg-type]
    assert {"step", "activations of 0"} <= set(watch.failures)


def test_nonfinite_weights_are_rows_and_leave_others_alone(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan
    names = [m for m in monitor.METRICS if m != "farms_alpha"]
    with Monitor(net, every=1, budget=None, kinds=["weights"], metrics=names) as watch:
        watch.step()
    assert not watch.failures
    values = {(r.name, r.metric): r.value for r in watch.rows}
    for metric in names:
        assert math.isnan(values["2.weight", metric]) and math.isfinite(values["0.weight", metric])
    watch.to_json(tmp_path / "rows.json")
    assert any(r["value"] is None for r in json.loads((tmp_path / "rows.json").read_text()))


def test_budget_puts_measurements_off() -> None:
    net = model()
    with Monitor(net, every=1, budget=0.0) as watch, pytest.warns(MonitorWarning, match="put off"):
        for _ in range(5):
            watch.step()
    assert watch.series("sigma_1", "weights", "0.weight")[0] == [1] and watch.put_off == 5


@pytest.mark.parametrize("every", [1, 3])  # with hooks on layers, and without
def test_it_keeps_no_model_alive(every: int) -> None:
    """Without close(): model and hooks go with the last reference to them."""
    hooks = (torchs._global_optimizer_pre_hooks, torchs._global_optimizer_post_hooks)
    before = [dict(h) for h in hooks]
    net = model()
    watch = Monitor(net, every=every, budget=None)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        step(net, sgd)
    assert watch.steps == 3 and watch.rows and not watch.failures
    alive = [weakref.ref(x) for x in (net, watch)]
    del net, watch, sgd
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert [dict(h) for h in hooks] == before


def test_one_that_nobody_keeps_says_so_and_leaves_the_model_alone() -> None:
    net = model()
    with pytest.warns(MonitorWarning, match="keep the object"):
        Monitor(net, every=1, out=None)
        gc.collect()
    assert not any(m._forward_pre_hooks for m in net.modules())
    step(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_files(tmp_path: Path) -> None:
    net = model()
    for suffix in ("csv", "jsonl"):
        out = tmp_path / f"all.{suffix}"
        with Monitor(net, every=1, budget=None, keep=10, out=out, kinds=["weights"]) as watch:
            watch.step()
            watch.step()
        assert len(watch.rows) == 10
        lines = out.read_text().splitlines()
        assert len(lines) == 2 * 3 * 7 + (suffix == "csv")
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [str(x) for x in watch.rows[-1]] == list(rows[-1].values())
    watch.to_csv(tmp_path / "kept.csv")
    assert len((tmp_path / "kept.csv").read_text().splitlines()) == 11
    pytest.importorskip("matplotlib")
    plots = watch.plot(tmp_path / "plots")
    assert plots and all(p.stat().st_size > 1000 for p in plots)


def test_tensorboard_gets_scalars() -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    writer = Writer()
    with Monitor(model(), every=1, budget=None, kinds=["weights"], tensorboard=writer) as watch:
        watch.step()
    assert [t for t, _, _ in writer.seen] == [f"{r.metric}/{r.kind}/{r.name}" for r in watch.rows]


def test_training_is_the_same_with_and_without() -> None:
    def trained(watched: bool) -> list[Tensor]:
        net = model()
        optimizer = torch.optim.Adam(net.parameters())
        watch = Monitor(net, every=1, budget=None) if watched else None
        for _ in range(3):
            step(net, optimizer)
        if watch:
            watch.close()
        return list(net.parameters())

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"every": 0}, "every must be at least 1, got 0"), ({"kinds": ["biases"]}, "kinds must be"),
     ({"metrics": ["sigma"]}, "metrics of weights must be one of"), ({"budget": 2.0}, "budget"),
     ({"rules": {("weights", "rankme"): bool}}, "rules must be of"),
     ({"rules": {("weigths", "frobenius"): bool}}, "kind of rules must be one of 'weights', 'grad"),
     ({"include": ["x*"]}, "include must match"), ({"out": "rows.txt"}, "out must end in")],
)  # fmt: skip
def test_bad_arguments(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=f"monitor: .*{text}|monitor: {text}"):
        Monitor(model(), **options)


def test_the_example_sees_the_alarm_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A smaller run of it: status 0 says that the alarm came first, and only there."""
    from orthonorm.examples.watch_spectra import main

    arguments = ["--steps", "600", "--every", "20", "--drift", "0.02", "--batch", "64",
                 "--ramp", "0.013"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("before the loss exploded") == 2
    assert (tmp_path / "rows.csv").exists()
