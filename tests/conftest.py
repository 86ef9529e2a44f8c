import pytest
import torch


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention takes its softmax in float32; with this it takes it in float64, as everything around it."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
