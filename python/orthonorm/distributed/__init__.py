"""Optimizers on several ranks: whole matrices are updated locally, cut ones at an owner rank.

DTensors need no call before training: an optimizer reads their placements. Copies under DDP are
updated by every rank, unless `share_work` is called.

local: no communication. This serves matrices that are whole on a rank (Replicate, an expert stack
    sharded along its stack, `heads` cut between heads). It also serves rules that act on every
    entry alone.
owner: matrices that are cut (FSDP2, HSDP, tensor parallel, both at once). Momentum and decay work
    on shards. The momentum's shards travel to one rank per matrix, its owner. The owner computes
    the direction, whose shards travel back: two `all_to_all_single` a bucket. The exchange of one
    bucket runs while another bucket computes. Owners are balanced by the cost of Newton-Schulz,
    over replicas too. Some rules need more than updates and state (Conda, SOAP, Shampoo, ...). For
    these, for constraints and for clipped decay, everything travels to the owner: parameters,
    gradients and all state. Results are those of one process, bit for bit; of 16-bit weights, up to
    the rounding of the direction that travels.
gram: method="gram" of Muon, Scion, NorMuon, Conda and SOAP. It serves matrices that are cut along
    their long side, if it sends less than an owner would. n x n Gram matrices are summed, and
    updates travel nowhere. Every rank then computes for every such matrix, so this is for slow
    networks. Results differ from one process's by rounding. SOAP's long side must be beyond
    max_precond_dim, because a factor of that side needs the whole matrix. `orthonorm.monitor`
    measures sigma_1 of cut matrices in the same way.

share_work: for DDP. After one call of `share_work(optimizer)`, one rank computes each direction
    instead of all. Momentum, state and decay stay with every rank. Directions come by one
    all-gather a bucket, which runs while another bucket computes. One planner balances the owners
    of these and of cut matrices; replicas of the latter (HSDP) share work without a call. It pays
    where Newton-Schulz takes longer than sending its result. Two ranks halve the computation, and
    every rank receives (ranks - 1) / ranks of all directions.

    optimizer = Muon(split_params(model))
    share_work(optimizer)  # model = DistributedDataParallel(model), before or after

Before an optimizer's first step, ranks compare their parameters through the store. At each step
that exchanges anything, they compare what they are to update (a gather of 8 bytes). If they differ,
all raise with the parameter's name, and nothing is written. Hosts compare directly (over gloo, also
beside nccl), so no host waits for its GPU. A host waits for the GPU only where it must decide by
the GPU's numbers: nonfinite="skip" and "error", GradScaler's skipped steps, and decompositions
(Conda, SOAP and their like, at refreshes).
"""

from .. import optim  # noqa: F401  (first: its step loop imports the modules below)
from .company import share_work
from .report import Communication, comm_report
from .scaler import GradScaler

__all__ = ["Communication", "GradScaler", "comm_report", "share_work"]
