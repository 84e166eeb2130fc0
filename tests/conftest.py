"""Under TRITON_INTERPRET=1, which `test_triton.py` sets, Triton's interpreter is repaired first."""

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()


LONG = ("test_triton.py", "test_launched.py", "test_distributed.py", "test_cuda_on_cpu.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of minutes first: of two processes none then waits for the other's last one."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For files of many tiny products, where waking threads would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every test, in whatever order and process it runs."""
    torch.manual_seed(0)
