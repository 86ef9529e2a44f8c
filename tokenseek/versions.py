"""Which versions of its dependencies TokenSeek is tested with, and what it says of others."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package -> (lowest, newest) tested; newest is read to as many places as it has: "5.24" is any 5.24.x.
# `tests/versions.sh` runs the core with both ends; `tests/unit/test_versions.py` holds them to pyproject.toml and
# constraints.txt.
TESTED = {
    "torch": ("2.8", "2.14"),
    "transformers": ("5.5.4", "5.24"),
    "accelerate": ("1.12", "1.15"),
    "peft": ("0.18.1", "0.21"),
    "datasets": ("4.7", "5"),
    "trl": ("1.8", "1.16"),
    "deepspeed": ("0.18", "0.19"),
    "bitsandbytes": ("0.48", "0.50"),
    "numpy": ("1.26", "2"),
    "pyarrow": ("21", "26"),
    "pydantic": ("2.7", "2"),
}


_TOLD = "TOKENSEEK_VERSIONS_TOLD"


def what_to_install(package: str) -> str:
    """A sentence: the version that is installed, those that are tested, and the command that brings one."""
    lowest, newest = TESTED[package]
    return (
        f"Installed is {package} {version(package)}; TokenSeek is tested with {lowest} to {newest}: "
        f"pip install '{package}=={newest}.*'"
    )


def untested() -> list[str]:
    """One line for each installed dependency that is older or newer than what is tested."""
    found = []
    for package, (lowest, newest) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:  # an extra that is not installed; what is required is missed by its import
            continue
        if Version(installed) < Version(lowest) or _places(installed, newest) > _places(newest, newest):
            found.append(f"{package} {installed} (tested: {lowest} to {newest})")
    return found


def _places(given: str, like: str) -> tuple[int, ...]:
    """The release numbers of a version, to as many places as another has."""
    places = len(Version(like).release)
    return (*Version(given).release, *[0] * places)[:places]


def tell_of_untested(tell: Callable[[str], object]) -> None:
    """Call `tell` with a warning if a dependency is older or newer than tested; once for a process and all it starts.

    Of several ranks the first one tells.
    """
    if os.environ.get(_TOLD) or os.environ.get("RANK", "0") != "0":
        return
    os.environ[_TOLD] = "1"
    if found := untested():
        tell(
            f"TokenSeek is not tested with {', '.join(found)}. It refuses what it does not recognise; to be safe, "
            "install tested versions."
        )
