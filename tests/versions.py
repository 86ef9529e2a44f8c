"""What tests/versions.sh asks: the lowest versions that a wheel allows, and how far an environment is from the pins.

python tests/versions.py lowest WHEEL EXTRA ...   name==version, one a line
python tests/versions.py differences              of this environment to constraints.txt, in one line
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # an environment that holds nothing yet
    from pip._vendor.packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def lowest(requirements: Sequence[str], extras: Sequence[str] = ()) -> dict[str, str]:
    """The lowest version of every package that these requirements, of the package itself and of `extras`, allow."""
    found = {}
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        bounds = [part.version for part in requirement.specifier if part.operator in (">=", "==")]
        if len(bounds) != 1:
            raise SystemExit(f"{requirement}: no lowest version")
        found[requirement.name] = bounds[0]
    return found


def requirements_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])


def pins() -> dict[str, str]:
    """package -> version of constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def differences() -> list[str]:
    found = []
    for package, pinned in pins().items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if installed.partition("+")[0] != pinned:
            found.append(f"{package} {installed} (pinned: {pinned})")
    return found


if __name__ == "__main__":
    if sys.argv[1] == "lowest":
        found = lowest(requirements_of(Path(sys.argv[2])), sys.argv[3:])
        print("\n".join(f"{package}=={number}" for package, number in found.items()))
    else:
        print(", ".join(differences()) or "none: all is as pinned in constraints.txt")
