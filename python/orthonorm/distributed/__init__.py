"""Optimizers on DTensor parameters: what is whole stays local, shards meet at an owner.

Nothing is to be called before training: an optimizer reads the placements of its parameters.

local: whole matrices on every rank (Replicate, or an expert stack sharded along its stack): no
    communication.
owner: matrices sharded along one mesh dimension (FSDP2, the inner dimension of HSDP, tensor
    parallel). Momentum and decay work on shards; the momentum's shards travel to one rank a
    matrix, which computes the direction, and the direction's travel back: two `all_to_all_single`
    a bucket. Owners are balanced by the cost of Newton-Schulz. The results are those of one
    process, bit for bit.
"""

from .report import Communication, comm_report

__all__ = ["Communication", "comm_report"]
