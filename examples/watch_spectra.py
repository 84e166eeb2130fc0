"""Watch training runs whose loss is made to explode, and show that the alarms come first.

    python -m orthonorm.examples.watch_spectra                      # a minute on a CPU
    python -m orthonorm.examples.watch_spectra --out runs/spectra   # also rows.csv and plots

The same residual network learns the same function three times. The first run is healthy. In the
second a bug in the data pipeline adds an offset to the inputs, which grows a little every step. The
network adapts and the loss stays the same. But in layer after layer the inputs move to one side of
the top singular vector (Spectral Alignment, arXiv:2510.04202). The curvature of the loss grows with
the square of the offset, until it is too steep for the learning rate. In the third run the learning
rate grows instead. Spectral Alignment does not detect this; the norm of the updates does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from orthonorm.monitor import AlignmentAlarm, GrowthAlarm, Monitor, Row
from torch import Tensor, nn

DIM, WIDTH, BLOCKS, OUT = 32, 128, 4, 8
ALIGNMENT, GROWTH = ("activations", "sign_diversity"), ("updates", "frobenius")


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
    """Make the network, which maps (batch, DIM) to (batch, OUT)."""
    blocks = [Block() for _ in range(BLOCKS)]
    return nn.Sequential(nn.Linear(DIM, WIDTH), *blocks, nn.Linear(WIDTH, OUT, bias=False))


@dataclass
class Outcome:
    """The results of one run."""

    losses: list[float]
    alarms: list[Row]
    exploded: int | None  # first step with a loss above 100 times its best, or not finite
    seconds: float
    monitor: Monitor

    def first(self, rule: tuple[str, str]) -> Row | None:
        """Return the first alarm of a rule (kind, metric), or None."""
        return next((row for row in self.alarms if (row.kind, row.metric) == rule), None)

    def lead(self, rule: tuple[str, str]) -> int:
        """Return the steps from the first alarm of a rule to the explosion; 0 if one is missing."""
        row = self.first(rule)
        return max(0, self.exploded - row.step) if row and self.exploded else 0


def train(steps: int, every: int, batch: int, drift: float = 0.0, ramp: float = 0.0) -> Outcome:
    """Train by SGD on a fixed random function.

    Each step adds `drift` to the offset of the inputs and multiplies the learning rate by 1 + ramp.
    """
    torch.manual_seed(0)
    model, teacher = network(), nn.Sequential(nn.Linear(DIM, 64), nn.Tanh(), nn.Linear(64, OUT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses: list[float] = []
    exploded = None
    alarms: list[Row] = []
    rules = {ALIGNMENT: AlignmentAlarm(), GROWTH: GrowthAlarm()}
    options = {"every": every, "budget": None, "rules": rules, "on_alarm": alarms.append}
    with Monitor(model, **options) as monitor:
        started = time.perf_counter()
        for step in range(1, steps + 1):
            x = torch.randn(batch, DIM)
            with torch.no_grad():
                target = 4 * teacher(x)
            loss = (model(x + drift * step) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 1 + ramp
            losses.append(loss.item())
            if not losses[-1] <= 100 * min(losses):
                exploded = step
                break
        seconds = time.perf_counter() - started
    return Outcome(losses, alarms, exploded, seconds, monitor)


def report(name: str, outcome: Outcome, rule: tuple[str, str], every: int) -> None:
    """Print loss, sign diversity and update norm of one layer over the run, alarms and cost."""
    row = outcome.first(rule)
    layer = row.name.removesuffix(".weight") if row else "2.up"
    _, diversity = outcome.monitor.series("sign_diversity", "activations", layer)
    steps, norms = outcome.monitor.series("frobenius", "updates", f"{layer}.weight")
    print(f"\n{name}\n{'step':>6} {'loss':>9} {'sign diversity':>15} {'|update|':>9}   of {layer}")
    for step, d, size in zip(steps, diversity, norms, strict=True):
        print(f"{step:6} {outcome.losses[step - 1]:9.4f} {d:15.2f} {size:9.4f}")
    for alarm in outcome.alarms:
        print(f"ALARM at step {alarm.step}: {alarm.metric} of {alarm.name} is {alarm.value:.3g}")
    if not outcome.alarms:
        print("no alarm")
    if outcome.exploded:
        print(f"LOSS EXPLODED at step {outcome.exploded}: {outcome.losses[-1]:.4g}")
        print(f"The alarm came {outcome.lead(rule)} steps before the loss exploded.")
    spent, total = outcome.monitor.seconds, outcome.seconds
    print(
        f"monitor: {spent:.3f} s of {total:.1f} s, {spent / total:.2%} of the time, every={every}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Do all runs; return 0 if the first has no alarm and the others have one before exploding."""
    parser = argparse.ArgumentParser(
        prog="python -m orthonorm.examples.watch_spectra", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=1600, help="most steps of a run (1600)")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements (100)")
    parser.add_argument("--batch", type=int, default=768, help="inputs in a step (768)")
    parser.add_argument("--drift", type=float, default=0.006, help="offset added a step (0.006)")
    parser.add_argument("--ramp", type=float, default=0.004, help="growth of the rate (0.004)")
    parser.add_argument("--out", type=Path, help="folder for rows.csv, plots of the second run")
    args = parser.parse_args(argv)
    every, batch = args.every, args.batch
    healthy = train(args.steps // 2, every, batch)
    drifting = train(args.steps, every, batch, drift=args.drift)
    ramped = train(args.steps, every, batch, ramp=args.ramp)
    report("Healthy run", healthy, ALIGNMENT, every)
    report("The same with drifting inputs", drifting, ALIGNMENT, every)
    report("The same with a learning rate that grows", ramped, GROWTH, every)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        drifting.monitor.to_csv(args.out / "rows.csv")
        try:
            print(f"{len(drifting.monitor.plot(args.out))} plots and rows.csv in {args.out}")
        except ImportError:
            print(f"rows.csv in {args.out}; plots need matplotlib (pip install matplotlib)")
    early = drifting.lead(ALIGNMENT) > 0 and ramped.lead(GROWTH) > 0
    return 0 if early and not healthy.alarms else 1


if __name__ == "__main__":
    raise SystemExit(main())
