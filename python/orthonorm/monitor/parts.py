"""Metrics of sharded matrices, computed from the parts of the ranks without gathering."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .metrics import METRICS, Known
from .shards import FROM_PARTS, cut_among, part_norms


class Parts:
    """Metrics of sharded matrices; each measurement starts from the vectors of the last one."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, str], Tensor] = {}

    def measured(
        self, kind: str, tensors: Mapping[str, Tensor], metrics: Sequence[str], steps: int
    ) -> Iterator[tuple[str, str, float]]:
        """Yield (name, metric, value) for each sharded matrix among `tensors`.

        Yield nothing if one of `metrics` does not follow from parts. `steps` is the number of power
        steps for sigma_1.
        """
        if not set(metrics) <= set(FROM_PARTS):
            return
        for (spread, _), names in cut_among(tensors).items():
            some, keys = [tensors[n] for n in names], [(kind, n) for n in names]
            made = part_norms(some, spread, steps, [self._vectors.get(key) for key in keys])
            self._vectors.update(zip(keys, made.v, strict=True))
            for n, t, top, size in zip(names, some, made.top, made.size, strict=True):
                X = torch.empty(1, *t.shape, device="meta")  # these metrics read only its shape
                for metric in metrics:
                    value = METRICS[metric].compute(Known(X, top, size, None))
                    yield n, metric, value.item()
