"""Which tests may run beside each other, when pytest-xdist runs them on several workers (`--dist loadgroup`)."""

from pathlib import Path

import pytest

# Tests that start processes of their own take turns.
STARTING_PROCESSES = ("launch", "distributed")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        # A file stays together, so that its fixtures are made once.
        item.add_marker(pytest.mark.xdist_group("processes" if folder in STARTING_PROCESSES else item.path.name))
