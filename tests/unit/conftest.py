from pathlib import Path

import pytest
from index_shards import write_shards

from tokenseek.index import merge_shards


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Prepared data are kept in a folder of the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def shards(tmp_path) -> Path:
    write_shards(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def index_path(shards, tmp_path) -> Path:
    merge_shards(shards, tmp_path / "index.arrow")
    return tmp_path / "index.arrow"
