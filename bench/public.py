"""The table of orthonorm.nn and orthonorm.monitor: a row for every public item."""

from __future__ import annotations

from .items import Item
from .items_layers import LAYERS
from .items_maps import MAPS
from .items_monitor import MONITOR

ITEMS: dict[str, Item] = {**MAPS, **LAYERS, **MONITOR}

# Public names that compute nothing: types of results, a warning and a table.
RESULTS = (
    "nn.LipschitzReport", "monitor.Alignment", "monitor.Eigen", "monitor.METRICS",
    "monitor.MonitorWarning", "monitor.Projected", "monitor.Row", "monitor.SymmetricRankOnes",
    "monitor.WidthMatch",
)  # fmt: skip
