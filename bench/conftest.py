"""What the kernel benches share."""

import pytest
import torch
from measure import machine


@pytest.fixture(params=[1, None], ids=["1thread", "all_threads"])
def threads(request):
    """One thread, then all; the machine is printed above each report."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    print(f"\n{machine()}")
    yield torch.get_num_threads()
    torch.set_num_threads(before)
