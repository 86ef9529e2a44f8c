"""Data formats from outside, by their import path."""

import pytest
from helpers import write_jsonl

from tokenseek.config import SourceConfig, load_config
from tokenseek.data import recognise
from tokenseek.data.reading import parse_row
from tokenseek.data.sources import load_source
from tokenseek.errors import UserError

MODULE = """
number = 3
def shout(row):
    return {"text": row["line"].upper(), "of": row}
def fails(row):
    return row["nothing"]
def nonsense(row):
    return "text"
def unspeakable(row):
    return {"text": {1, 2}}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    (tmp_path / "formats_from_outside.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = write_jsonl(tmp_path / "lines.jsonl", [{"line": "a"}, {"line": "b \u20ac"}])

    def make(name, **more):
        return SourceConfig(path=str(path), **more).model_copy(update={"convert": f"formats_from_outside:{name}"})

    return make


def test_rows_are_what_the_function_returns(source):
    loaded = load_source(source("shout", kind="text"), "data.sources.0")
    assert [parse_row(row)["text"] for row in loaded.rows["row"]] == ["A", "B \u20ac"]
    assert loaded.columns == ("text", "of") and loaded.rows_read == 2
    assert recognise(source("shout", kind="auto")).kind == "text"


def test_filters_see_the_rows_of_the_data(source):
    loaded = load_source(source("shout", kind="text", drop={"line": ["a"]}), "data.sources.0")
    assert [parse_row(row)["text"] for row in loaded.rows["row"]] == ["B \u20ac"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shuot", "has no shuot; did you mean shout"),
        ("number", "is 3; it must be a function of a row"),
        ("fails", "line 1.*fails: KeyError: 'nothing'"),
        ("nonsense", "line 1.*returned 'text'; it must return a dict"),
        ("unspeakable", "line 1.*returned what JSON cannot hold"),
    ],
)
def test_what_is_no_format_is_refused_by_its_row(source, name, problem):
    with pytest.raises(UserError, match=f"^data.sources.0.*{problem}"):
        load_source(source(name), "data.sources.0")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("formats_from_outside", "is written my_package.my_module:my_convert"),
        ("nowhere_to_be_found:f", "importing nowhere_to_be_found fails"),
    ],
)
def test_a_path_is_checked_with_the_configuration(path, problem):
    with pytest.raises(UserError, match=f"data.sources.0.*{problem}"):
        load_config("gsm8k", [f"data.sources.0.convert={path}"])
