"""Every test on one thread, from the same seed; tests of threads choose their number.

Under TRITON_INTERPRET=1, which `test_triton.py` sets, Triton's interpreter is repaired first.
"""

import os

import pytest

# Before torch reads it, and for the processes that tests start. Two test processes with two threads
# each on two cores wait for threads that are not running: they took four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()


LONG = ("test_triton.py", "test_launched.py", "test_distributed.py", "test_cuda_on_cpu.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of minutes first: of two processes none then waits for the other's last one."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def alike() -> None:
    """The same numbers in every test, in whatever order and process it runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
