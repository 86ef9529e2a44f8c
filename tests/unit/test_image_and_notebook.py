"""The notebook's cells run, and the image is made by the commands that the documentation gives, of files that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, with lines that go on joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def pip_installs(text: str) -> list[list[str]]:
    """The words behind every `pip install`, without quiet and cache options."""
    found = [shlex.split(line) for line in re.findall(r"^\s*(?:RUN )?pip install (.+)$", text, re.MULTILINE)]
    return [[word for word in words if word not in ("--no-cache-dir", "--quiet")] for words in found]


def test_the_image_installs_as_the_documentation_does():
    image = pip_installs((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    by_hand = pip_installs((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert image[0] == by_hand[0] == ["-c", "constraints.txt", "torch"]
    assert [words[:3] for words in (image[1], by_hand[1])] == [["-c", "constraints.txt", "-e"]] * 2
    readme = pip_installs((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["-c", "constraints.txt", "-e", "."] in readme
    extras = re.fullmatch(r"\.\[(.+)\]", image[1][3])[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert len(image) == 2


def test_the_image_has_what_the_package_needs():
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY"]
    sources = {source for words in copied for source in words}
    assert all((ROOT / source).exists() for source in sources)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], PROJECT["project"]["readme"], "pyproject.toml"}
    assert needed | {"constraints.txt"} | set(PROJECT["project"]["license-files"]) <= sources


def test_the_image_starts_the_command():
    entry = [words for name, words in instructions() if name == "ENTRYPOINT"]
    assert json.loads(entry[0])[0] in PROJECT["project"]["scripts"]


def test_the_image_has_the_python_of_the_pinned_versions():
    version = re.search(r"FROM python:(\d+\.\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))[1]
    assert f"Python {version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs belong to the machine that made them"
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "[[" in printed
    assert namespace["summary"].steps == 4 and namespace["summary"].loss_after < namespace["summary"].loss_before
