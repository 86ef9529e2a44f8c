"""The tests themselves."""

from collections import Counter
from pathlib import Path


def test_no_two_test_files_have_the_same_name():
    """Their folders are no packages, so pytest would refuse to collect both (`tests/run.sh -m slow` collects all)."""
    names = Counter(path.name for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
