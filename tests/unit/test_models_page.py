"""The table of docs/models.md is what its script prints."""

import re

from transformers import __version__

from benchmarks.models import ARCHITECTURES, BEGIN, END, PAGE, page, table, try_all


def test_the_page_has_what_the_script_prints_for_some_of_its_rows():
    text = PAGE.read_text(encoding="utf-8")
    for line in table(try_all(["llama", "mamba", "deepseek_v3"])):
        assert line in text.splitlines(), line


def test_the_page_has_a_row_for_every_architecture():
    text = PAGE.read_text(encoding="utf-8")
    made = text.partition(BEGIN)[2].partition(END)[0]
    assert re.findall(r"^\| `(\w+)` \|", made, re.MULTILINE) == list(ARCHITECTURES)


def test_writing_replaces_the_table_alone():
    text = PAGE.read_text(encoding="utf-8")
    written = page(text, {"llama": ["", "", "", "", "", "it is refused"]})
    assert f"Transformers {__version__}." in written
    assert "| `llama` | Llama 2 and 3, SmolLM 2, Yi | yes | yes | yes | yes | yes | no: it is refused |" in written
    assert written.partition(BEGIN)[0] == text.partition(BEGIN)[0]
    assert written.partition(END)[2] == text.partition(END)[2]
