"""Metrics of matrices of which ranks have parts, without gathering them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .metrics import METRICS, Known
from .shards import FROM_PARTS, cut_among, part_norms


class Parts:
    """Measures cut matrices, from the vectors at which it ended the last time."""

    def __init__(self) -> None:
        self._vectors: dict[tuple[str, str], Tensor] = {}

    def measured(
        self, kind: str, tensors: Mapping[str, Tensor], metrics: Sequence[str], steps: int
    ) -> Iterator[tuple[str, str, float]]:
        """(name, metric, value) of the matrices that are cut; none where parts do not give all.

        steps: power steps for sigma_1.
        """
        if not set(metrics) <= set(FROM_PARTS):
            return
        for (spread, _), names in cut_among(tensors).items():
            some, keys = [tensors[n] for n in names], [(kind, n) for n in names]
            found = part_norms(some, spread, steps, [self._vectors.get(key) for key in keys])
            self._vectors.update(zip(keys, found.v, strict=True))
            for n, t, top, size in zip(names, some, found.top, found.size, strict=True):
                X = torch.empty(1, *t.shape, device="meta")  # its shape is all they read
                for metric in metrics:
                    value = METRICS[metric].compute(Known(X, top, size, None))
                    yield n, metric, value.item()
