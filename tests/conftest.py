"""What the tests of several scripts share as fixtures."""

import pytest
import torch


@pytest.fixture
def float64():
    """Double precision by default, for the test that asks for it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
