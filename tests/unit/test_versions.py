"""The range of versions that is promised is the range that is tested; what lies outside is said once."""

from __future__ import annotations

import os
import re
import warnings

import pytest
import torch
from packaging.version import Version
from tiny_models import tiny_model
from versions import ROOT, lowest, pins

import tokenseek
from tokenseek import cli, versions
from tokenseek.decoder import names
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.masks import whole_masks
from tokenseek.errors import UserError

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def requirements(table: str) -> list[str]:
    """What pyproject.toml requires, with its extras."""
    (block,) = re.findall(
        rf"^{table} = \[\n(.*?)^\]|^\[project\.{table}\]\n(.*?)^\[", PYPROJECT, re.MULTILINE | re.DOTALL
    )
    return re.findall(r'"([a-z][\w-]*[<>=][^"]*)"', "".join(block))


def test_the_lowest_tested_versions_are_the_lowest_that_are_allowed():
    allowed = lowest(requirements("dependencies")) | lowest(requirements("optional-dependencies"))
    assert {name: low for name, (low, _) in versions.TESTED.items()}.items() <= allowed.items()


def test_the_newest_tested_versions_are_the_pinned_ones():
    pinned = pins()
    for package, (low, newest) in versions.TESTED.items():
        if package == "torch":  # whose newest, with CUDA, is tested by tests/versions.sh alone
            continue
        places = len(Version(newest).release)
        assert Version(pinned[package]).release[:places] == Version(newest).release, package
        assert Version(pinned[package]) >= Version(low), package


@pytest.fixture
def installed(monkeypatch):
    """Makes packages seem to be of other versions."""
    monkeypatch.delenv(versions._TOLD, raising=False)

    def pretend(**others):
        real = versions.version
        monkeypatch.setattr(versions, "version", lambda package: others.get(package) or real(package))

    yield pretend
    os.environ.pop(versions._TOLD, None)


def test_one_warning_names_the_range(installed):
    low, newest = versions.TESTED["transformers"]
    installed(transformers="5.99.1", peft="0.17.0", accelerate=versions.TESTED["accelerate"][1] + ".7")
    with pytest.warns(
        UserWarning, match=rf"transformers 5\.99\.1 \(tested: {low} to {newest}\), peft 0\.17\.0"
    ) as record:
        tokenseek.enable_token_ditching(tiny_model("llama"))
        tokenseek.enable_token_ditching(tiny_model("llama"))
    assert len([w for w in record if "TokenSeek" in str(w.message)]) == 1
    assert "accelerate" not in str(record[0].message)  # 1.15.7 is 1.15


def test_the_command_line_says_it_on_one_line(installed, capsys):
    installed(transformers="5.99.1")
    assert cli.main(["presets"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "5.99.1" in line]
    assert line.startswith("tokenseek: warning: ") and "5.5.4 to 5.24" in line


def test_tested_versions_pass_without_a_word(installed, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: versions.TESTED[package][0])
    assert versions.untested() == []
    versions.tell_of_untested(pytest.fail)


def test_a_layer_whose_cache_has_an_unknown_name_is_refused_with_the_version(installed, monkeypatch):
    model = tiny_model("llama")
    installed(transformers="5.99.1")
    monkeypatch.setattr(names, "CACHE_ARGUMENTS", ("memory",))
    with pytest.raises(
        UserError, match=r"no key/value cache.*transformers 5\.99\.1.*pip install 'transformers==5\.24\.\*'"
    ):
        find_decoder(model)


def test_masks_whose_function_is_told_other_things_are_refused_with_the_version(installed, monkeypatch):
    decoder = find_decoder(tiny_model("llama"))
    installed(transformers="5.99.1")
    monkeypatch.setitem(
        __import__("transformers").masking_utils.ALL_MASK_ATTENTION_FUNCTIONS, "sdpa", lambda batch_size, rows: None
    )
    with pytest.raises(UserError, match=r"no q_length and no kv_length.*transformers 5\.99\.1"):
        with whole_masks(decoder, 4, None, None):
            pass


@pytest.mark.parametrize("given", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("known", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_spelling_of_a_trainers_field_is_understood(given, known, monkeypatch):
    monkeypatch.setattr(names, "trainer_fields", lambda: frozenset([known, f"{known}_kwargs", "optim"]))
    asked = {given: True, f"{given}_kwargs": {"use_reentrant": False}, "optim": "sgd"}
    assert names.spelled_for_trainer(asked) == {
        known: True,
        f"{known}_kwargs": {"use_reentrant": False},
        "optim": "sgd",
    }
    assert names.asks_for_checkpointing(asked) and not names.asks_for_checkpointing({given: False})
    with pytest.raises(UserError, match="two names of one field"):
        names.spelled_for_trainer({"gradient_checkpointing": True, "activation_checkpointing": True})


@pytest.mark.parametrize("known", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_switched_by_the_method_that_there_is(known):
    class Model:
        pass

    called = []
    model = Model()
    setattr(model, f"{known}_enable", lambda options: called.append(options))
    setattr(model, f"{known}_disable", lambda: called.append(None))
    names.enable_checkpointing(model)
    names.disable_checkpointing(model)
    assert called == [{"use_reentrant": False}, None]
    with pytest.raises(UserError, match="Model has neither activation_checkpointing_enable nor gradient"):
        names.enable_checkpointing(Model())


def test_no_deprecated_name_of_transformers_is_used():
    model = tiny_model("llama").train()
    ids = torch.arange(3, 10)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        names.enable_checkpointing(model)
        tokenseek.enable_token_ditching(model)
        model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[1, 4]])).loss.backward()
        names.disable_checkpointing(model)
