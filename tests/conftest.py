import gc

import pytest
import torch

from tokenseek.commands.terminal import log_to_terminal


def pytest_collection_finish():
    """The million objects of imported libraries stay: no collection of garbage looks at them again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def logged_to_terminal():
    """What the library logs is on the terminal, as in a command."""
    log_to_terminal()


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention takes its softmax in float32; with this it takes it in float64, as everything around it."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


@pytest.fixture
def uninitialized_is_nan():
    """Memory that nothing has written to reads as NaN, rather than as whatever was there before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
