"""The metrics that a Monitor knows by name, and the quantities that several of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from . import norms, ranks
from .norms import SPECTRUM_LIMIT, singular_values

STACKED = 1 << 22  # most entries of a batch into which matrices of one shape are copied


class Known(NamedTuple):
    """Matrices X (b, m, n), their sigma_1 and |X|_F, (b,) each, and singular values if needed."""

    X: Tensor
    top: Tensor
    size: Tensor
    sigma: Tensor | None


class Metric(NamedTuple):
    """The function of a metric; `spectrum` is True if it needs all singular values.

    Such a metric is computed for small matrices only.
    """

    compute: Callable[[Known], Tensor]
    spectrum: bool = False


METRICS: dict[str, Metric] = {
    "sigma_1": Metric(lambda k: k.top),
    "frobenius": Metric(lambda k: k.size),
    "stable_rank": Metric(lambda k: ranks.stable_rank(k.X, k.top, k.size)),
    "hard_rank": Metric(lambda k: ranks.hard_rank(k.X, k.size)),
    "rms_to_rms": Metric(lambda k: norms.rms_to_rms(k.X, k.top)),
    "one_to_rms": Metric(lambda k: norms.one_to_rms(k.X)),
    "rms_to_inf": Metric(lambda k: norms.rms_to_inf(k.X)),
    "matrix_nuclear_norm": Metric(lambda k: ranks.matrix_nuclear_norm(k.X)),
    "nuclear_norm": Metric(lambda k: norms.nuclear_norm(k.X, k.sigma)),
    "farms_alpha": Metric(lambda k: ranks.farms_alpha(k.X)),
    "soft_rank": Metric(lambda k: ranks.soft_rank(k.X, k.sigma), spectrum=True),
    "effective_rank": Metric(lambda k: ranks.effective_rank(k.X, k.sigma), spectrum=True),
    "rankme": Metric(lambda k: ranks.rankme(k.X, k.sigma), spectrum=True),
    "alpha_req": Metric(lambda k: ranks.alpha_req(k.X, k.sigma), spectrum=True),
    "spectral_concentration": Metric(
        lambda k: ranks.spectral_concentration(k.X, 1, k.sigma), spectrum=True
    ),
}


NORMS = ("sigma_1", "frobenius", "stable_rank")
DEFAULTS: dict[str, tuple[str, ...]] = {
    "weights": (*NORMS, "hard_rank", "rms_to_rms", "one_to_rms", "rms_to_inf"),
    "gradients": (*NORMS, "hard_rank"),
    "updates": (*NORMS, "rms_to_rms"),
    "activations": ("stable_rank", "hard_rank", "matrix_nuclear_norm"),
    "caches": NORMS,
}

ALIGNED = ("sign_diversity", "mean_alignment")  # `spectral_alignment` gives these, not METRICS

Named = list[tuple[str, Tensor]]


def known(matrices: list[Tensor], tops: list[Tensor], names: Sequence[str]) -> Known:
    """Compute, for matrices of one shape, the quantities that the metrics `names` share."""
    X = together(matrices)
    reads = any(METRICS[name].spectrum or name == "nuclear_norm" for name in names)
    sigma = singular_values(X) if reads and serves("rankme", X) else None
    return Known(X, together(tops), norms.frobenius(X), sigma)


def serves(name: str, X: Tensor) -> bool:
    """True unless the metric needs all singular values and the short side is too long for that."""
    return not METRICS[name].spectrum or min(X.shape[-2:]) <= SPECTRUM_LIMIT


def batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield lists of indices of matrices that share shape, dtype and device.

    A list is limited to STACKED entries, so a large matrix comes alone.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, X in enumerate(matrices):
        groups.setdefault((tuple(X.shape), X.dtype, X.device), []).append(i)
    for members in groups.values():
        size = max(1, STACKED // max(1, matrices[members[0]].numel()))
        yield from (members[i : i + size] for i in range(0, len(members), size))


def together(tensors: list[Tensor]) -> Tensor:
    """Stack tensors into a batch; a single tensor becomes a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def choose(given: Sequence[str] | Mapping[str, Sequence[str]] | None) -> dict[str, Sequence[str]]:
    """Return {kind: names of METRICS} from a Monitor's argument; raise for unknown names."""
    if given is None or isinstance(given, Mapping):
        chosen: dict[str, Sequence[str]] = {**DEFAULTS, **(given or {})}
    else:
        chosen = dict.fromkeys(DEFAULTS, given)
    for kind, names in chosen.items():
        for name in names:
            check.choice("monitor", f"metrics of {kind}", name, METRICS)
    return chosen


def check_rules(rules: object, metrics: Mapping[str, Sequence[str]]) -> dict[Any, Any]:
    """Check alarm rules {(kind, metric): function} and return them as a dict.

    `metrics` must list the metric under the kind, also for a kind of the caller's own (`observe`).
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"monitor: rules must be a mapping, got {type(rules).__name__}")
    for key, rule in rules.items():
        kind, metric = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        check.choice("monitor", "kind of rules", kind, metrics)
        known = {*metrics[kind], *(ALIGNED if kind == "activations" else ())}
        if metric not in known:
            raise ValueError(f"monitor: rules must be of (kind, metric) measured, got {key!r}")
        if not callable(rule):
            raise TypeError(f"monitor: rules[{key!r}] must be callable, got {rule!r}")
    return dict(rules)


def stack(name: str, t: Tensor, flatten: bool) -> Named:
    """Return a tensor of two or more dimensions as named matrices.

    `flatten` gives one matrix (first, rest); otherwise there is one per leading index.
    """
    if flatten or t.dim() == 2:
        return [(name, t.flatten(1))]
    return [(f"{name}[{i}]", X) for i, X in enumerate(t.flatten(0, -3))]
