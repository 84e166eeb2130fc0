"""Watches a training run whose loss is made to explode, and shows that the alarm comes first.

    python -m orthonorm.examples.watch_spectra                      # half a minute on a CPU
    python -m orthonorm.examples.watch_spectra --out runs/spectra   # also rows.csv and plots

The same residual network learns the same function twice. In the second run a bug in the data
pipeline adds an offset to the inputs that grows a little every step. The network follows it, and
the loss stays where it was; but inside, the inputs of layer after layer move to one side of its top
singular vector (Spectral Alignment, arXiv:2510.04202), while the curvature of the loss grows with
the square of the offset, until it is too steep for the learning rate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from orthonorm.monitor import Monitor, Row
from torch import Tensor, nn

DIM, WIDTH, BLOCKS, OUT = 32, 128, 4, 8


class Block(nn.Module):
    """x + down(tanh(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


def network() -> nn.Sequential:
    """Inputs (batch, DIM) to outputs (batch, OUT)."""
    blocks = [Block() for _ in range(BLOCKS)]
    return nn.Sequential(nn.Linear(DIM, WIDTH), *blocks, nn.Linear(WIDTH, OUT, bias=False))


@dataclass
class Outcome:
    """What one run showed."""

    losses: list[float]
    alarms: list[Row]
    exploded: int | None  # the step at which the loss was 100 times its best, or not finite
    seconds: float
    monitor: Monitor


def train(steps: int, drift: float, every: int, batch: int) -> Outcome:
    """SGD on a fixed random function; the inputs get an offset of drift x step."""
    torch.manual_seed(0)
    model, teacher = network(), nn.Sequential(nn.Linear(DIM, 64), nn.Tanh(), nn.Linear(64, OUT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses: list[float] = []
    exploded = None
    alarms: list[Row] = []
    with Monitor(model, every=every, budget=None, on_alarm=alarms.append) as monitor:
        started = time.perf_counter()
        for step in range(1, steps + 1):
            x = torch.randn(batch, DIM)
            with torch.no_grad():
                target = 4 * teacher(x)
            loss = (model(x + drift * step) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if not losses[-1] <= 100 * min(losses):
                exploded = step
                break
        seconds = time.perf_counter() - started
    return Outcome(losses, alarms, exploded, seconds, monitor)


def report(name: str, outcome: Outcome, layer: str, every: int) -> None:
    """Prints the loss, one layer's alignment and norm over the run, the alarms and the cost."""
    print(f"\n{name}\n{'step':>6} {'loss':>9} {'sign diversity':>15} {'sigma_1':>9}   of {layer}")
    steps, diversity = outcome.monitor.series("sign_diversity", "activations", layer)
    _, sigma = outcome.monitor.series("sigma_1", "weights", f"{layer}.weight")
    for step, d, s in zip(steps, diversity, sigma, strict=True):
        print(f"{step:6} {outcome.losses[step - 1]:9.4f} {d:15.2f} {s:9.3f}")
    for alarm in outcome.alarms:
        print(f"ALARM at step {alarm.step}: layer {alarm.name}, {alarm.metric} {alarm.value:.2f}")
    if not outcome.alarms:
        print("no alarm")
    if outcome.exploded:
        print(f"LOSS EXPLODED at step {outcome.exploded}: {outcome.losses[-1]:.4g}")
    spent, total = outcome.monitor.seconds, outcome.seconds
    print(
        f"monitor: {spent:.3f} s of {total:.1f} s, {spent / total:.2%} of the time, every={every}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Both runs (the healthy one is shorter); 0 if the alarm came first, and only in the second."""
    parser = argparse.ArgumentParser(
        prog="orthonorm.examples.watch_spectra", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=1600, help="steps of the second run (1600)")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements (100)")
    parser.add_argument("--batch", type=int, default=768, help="inputs in a step (768)")
    parser.add_argument("--drift", type=float, default=0.006, help="offset added a step (0.006)")
    parser.add_argument("--out", type=Path, help="folder for rows.csv and plots")
    args = parser.parse_args(argv)
    healthy = train(args.steps // 4, 0.0, args.every, args.batch)
    sick = train(args.steps, args.drift, args.every, args.batch)
    layer = sick.alarms[0].name if sick.alarms else "0"
    report("Healthy run", healthy, layer, args.every)
    report("The same with drifting inputs", sick, layer, args.every)
    first = sick.alarms[0].step if sick.alarms else None
    early = first is not None and sick.exploded is not None and first < sick.exploded
    if early and sick.exploded and first:
        print(f"\nThe alarm came {sick.exploded - first} steps before the loss exploded.")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        sick.monitor.to_csv(args.out / "rows.csv")
        try:
            print(f"{len(sick.monitor.plot(args.out))} plots and rows.csv in {args.out}")
        except ImportError:
            print(f"rows.csv in {args.out}; plots need matplotlib (pip install matplotlib)")
    return 0 if early and not healthy.alarms else 1


if __name__ == "__main__":
    raise SystemExit(main())
