"""Optimizers on several ranks: what is whole stays local, shards meet at an owner.

For DTensors nothing is to be called before training: an optimizer reads their placements. Copies
under DDP are updated by every rank, unless `share_work` is called.

local: whole matrices on every rank (Replicate, an expert stack sharded along its stack, `heads`
    whose rows are shared out between them), and rules that act on every entry alone: no
    communication.
owner: matrices that are cut (FSDP2, HSDP, tensor parallel, both at once). Momentum and decay work
    on shards; the momentum's shards travel to one rank a matrix, which computes the direction, and
    the direction's travel back: two `all_to_all_single` a bucket, the one of a bucket under way
    while another computes. Owners are balanced by the cost of Newton-Schulz, over replicas too. Of
    rules that need more than updates and state (Conda, SOAP, Shampoo, ...), and of constraints and
    clipped decay, everything travels to the owner, parameters, gradients and all state. The results
    are those of one process, bit for bit.
gram: Muon, Scion, NorMuon, Conda and SOAP (whose long sides must be beyond max_precond_dim: their
    factor needs the whole matrix) with method="gram", where a matrix is cut along its long side and
    less is sent so: n x n Gram matrices are summed, updates travel nowhere. Every rank then
    computes for every such matrix, so this is for slow networks; results are within the rounding of
    one process's. `orthonorm.monitor` measures sigma_1 of cut matrices in the same way.

share_work: under DDP, `share_work(optimizer)` once, after which each direction is computed by one
    rank in place of all. Momentum, state and decay stay with every rank, directions come by an
    all-gather a bucket, one under way while another bucket computes. The same planner balances
    owners as for matrices that are cut and replicated (HSDP), which are shared out without a call.
    Worth it where Newton-Schulz takes longer than to send its result: 2 ranks halve the one, and
    every rank receives (ranks - 1) / ranks of all directions.

    optimizer = Muon(split_params(model))
    share_work(optimizer)  # model = DistributedDataParallel(model), before or after

Before an optimizer's first step ranks compare what they hold (a few bytes in the store), and at
each step that exchanges anything what they are to update (a gather of 8 bytes): where they differ,
all raise with the parameter's name, and nothing is written. What ranks compare passes from host to
host (over gloo, also beside nccl), so no host waits for its GPU. A host waits for numbers of the
GPU only where it must decide by them: nonfinite="skip" and "error", GradScaler's skipped steps, and
inside decompositions (Conda, SOAP and their like, at refreshes).
"""

from .. import optim  # noqa: F401  (first: its step loop imports the modules below)
from .company import share_work
from .report import Communication, comm_report
from .scaler import GradScaler

__all__ = ["Communication", "GradScaler", "comm_report", "share_work"]
