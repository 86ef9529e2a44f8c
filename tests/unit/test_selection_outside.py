"""A selection rule from outside, by its import path."""

import numpy as np
import pytest

import tokenseek
from tokenseek.errors import UserError
from tokenseek.selection import SelectionRule, select_positions, select_weighted

# The example of docs/extending.md, and more.
MODULE = """
import numpy as np

def every_other(candidates, settings):
    return candidates.positions[::2][: candidates.budget]

class Luck:
    "Every candidate with the probability `explore`, and the first in any case."
    needs_scores, weighs, reads = False, True, {"explore", "seed"}

    def share(self, settings):
        return settings.explore

    def pick(self, candidates, settings):
        drawn = candidates.draws(len(candidates.positions)) / 2**64 < settings.explore
        drawn[0] = True
        weights = np.full(drawn.sum(), 1 / settings.explore)
        return candidates.positions[drawn][::-1], weights

class OwnDefaults(Luck):
    defaults = {"explore": 0.25, "ratio": 0.2}

class WrongDefaults(Luck):
    defaults = {"rule": "top"}

best = type("Best", (), {"pick": lambda self, c, settings: c.positions[[c.scores.argmax()]]})()

class NeedsAnArgument:
    def __init__(self, argument):
        pass

class BadReads:
    reads = {"tokens"}
    def pick(self, candidates, settings): ...

class BadShare:
    def pick(self, candidates, settings): ...
    def share(self, settings): return 2

number = 3
returned = None

def nonsense(candidates, settings):
    return returned(candidates)

class WeighedNonsense:
    weighs = True
    def pick(self, candidates, settings):
        return returned(candidates)
"""


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "rules_from_outside.py").write_text(MODULE)
    (folder / "broken_rules.py").write_text("import no_such_module_of_ours\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield __import__("rules_from_outside")


def test_a_function_is_a_rule():
    rule = SelectionRule("rules_from_outside:every_other", ratio=0.4)
    assert (rule.needs_scores, rule.has_weights, rule.share) == (True, False, 0.4)
    assert select_positions(rule, np.ones(10), np.arange(10.0), row=0).tolist() == [0, 2, 4, 6]


def test_it_has_the_papers_defaults_or_its_own():
    assert SelectionRule("rules_from_outside:every_other") == SelectionRule(
        "rules_from_outside:every_other", ratio=0.1, alpha=5, beta=5, explore=0, scope="all"
    )
    rule = SelectionRule("rules_from_outside:OwnDefaults")
    assert (rule.explore, rule.ratio, rule.alpha) == (0.25, 0.2, 5)
    with pytest.raises(UserError, match="WrongDefaults: defaults is {'rule': 'top'}; it must be a dict with values of"):
        SelectionRule("rules_from_outside:WrongDefaults")


def test_a_class_says_of_itself_what_it_needs():
    rule = SelectionRule("rules_from_outside:Luck", explore=0.5)
    assert (rule.needs_scores, rule.has_weights, rule.share) == (False, True, 0.5)
    positions, weights = select_weighted(rule, None, None, row=3, num_tokens=50)
    assert 10 < len(positions) < 40 and (np.diff(positions) > 0).all() and (weights == 2).all()
    np.testing.assert_array_equal(positions, select_positions(rule, None, None, row=3, num_tokens=50))
    assert positions.tolist() != select_positions(rule, None, None, row=3, visit=1, num_tokens=50).tolist()


def test_weights_stay_with_their_positions(outside, monkeypatch):
    monkeypatch.setattr(outside, "returned", lambda candidates: (np.array([5, 1, 3]), np.array([50.0, 10.0, 30.0])))
    positions, weights = select_weighted(
        SelectionRule("rules_from_outside:WeighedNonsense"), np.ones(9), np.ones(9), row=0
    )
    assert positions.tolist() == [1, 3, 5] and weights.tolist() == [10, 30, 50]


def test_an_object_is_a_rule_and_gets_the_scores():
    rule = SelectionRule("rules_from_outside:best", alpha=0, beta=1)
    assert select_positions(rule, np.ones(4), np.array([0.0, 2, 1, 0]), row=0).tolist() == [1]


def test_it_trains_from_a_preset_and_from_the_library():
    path = "rules_from_outside:Luck"
    config = tokenseek.load_config(
        "gsm8k", [f"selection.rule={path}", "selection.explore=0.25", "data.sources.0.path=x.jsonl"]
    )
    assert config.selection.to_rule().share == 0.25
    batch = tokenseek.TokenSeekCollator(None, rule=path, explore=0.5)(
        [{"example_id": "a", "input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}]
    )
    assert (batch["selected_weights"] == 2).all()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("no_such_module_of_ours:rule", "importing no_such_module_of_ours fails.*ModuleNotFoundError.*PYTHONPATH"),
        ("broken_rules:rule", "importing broken_rules fails.*no_such_module_of_ours"),
        ("rules_from_outside:every_othr", "has no every_othr.*every_other"),
        ("rules_from_outside:", "written my_package.my_module:my_rule"),
        (":best", "written my_package.my_module:my_rule"),
        ("rules_from_outside:number", "number is 3. Expected is a function"),
        ("rules_from_outside:NeedsAnArgument", r"NeedsAnArgument\(\) fails.*class without arguments"),
        ("rules_from_outside:BadReads", "reads is .*must be a set of alpha, bands"),
        ("rules_from_outside:BadShare", r"share returned 2; it must be a share of the tokens, in \(0, 1\]"),
        ("rules_from_outside", "accepted is one of top, .*import path"),
    ],
)
def test_a_wrong_path_says_what_is_expected(rule, message):
    with pytest.raises(UserError, match=message):
        SelectionRule(rule)
    with pytest.raises(UserError, match=message):
        tokenseek.load_config("gsm8k", [f"selection.rule='{rule}'", "data.sources.0.path=x.jsonl"])


def test_settings_that_a_rule_does_not_read_are_refused():
    with pytest.raises(UserError, match="selection.explore is 0.1; accepted is 0 for 'rules_from_outside:best'"):
        SelectionRule("rules_from_outside:best", explore=0.1)
    with pytest.raises(UserError, match="selection.ratio is auto, but rule 'rules_from_outside:Luck' takes no ratio"):
        tokenseek.load_config(
            "gsm8k",
            ["selection.rule='rules_from_outside:Luck'", "selection.explore=0.5", "selection.ratio=auto"],
        )


@pytest.mark.parametrize(
    ("picked", "problem"),
    [
        (lambda c: None, "a NoneType"),
        (lambda c: [0, 1], "a list"),
        (lambda c: np.array([0.0, 1.0]), "float64"),
        (lambda c: np.array([True, False]), "bool"),
        (lambda c: np.array([[0], [1]]), r"shape \(2, 1\)"),
        (lambda c: np.array([], int), "no position"),
        (lambda c: np.array([0, 9]), "position 9, which is no candidate"),
        (lambda c: np.array([-1]), "position -1, which is no candidate"),
        (lambda c: np.array([1, 2, 1]), "a position twice"),
        (lambda c: (c.positions, np.ones(9)), "weights, though it does not say weighs"),
    ],
)
def test_positions_that_are_nonsense_are_refused(picked, problem, outside, monkeypatch):
    monkeypatch.setattr(outside, "returned", picked)
    with pytest.raises(UserError, match=f"nonsense returned .*{problem}.*row 4.*distinct and out of"):
        select_positions(SelectionRule("rules_from_outside:nonsense"), np.ones(9), np.ones(9), row=4)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        (lambda n: np.ones(n + 1), r"weights of float64 and shape \(10,\) for 9 positions"),
        (lambda n: np.array(["1"] * n), "weights of <U1"),
        (lambda n: np.full(n, np.nan), "not all finite and above 0"),
        (lambda n: np.zeros(n), "not all finite and above 0"),
    ],
)
def test_weights_that_are_nonsense_are_refused(weights, problem, outside, monkeypatch):
    monkeypatch.setattr(outside, "returned", lambda c: (c.positions, weights(len(c.positions))))
    with pytest.raises(UserError, match=f"{problem}.*as .positions, weights"):
        select_positions(SelectionRule("rules_from_outside:WeighedNonsense"), np.ones(9), np.ones(9), row=4)
    monkeypatch.setattr(outside, "returned", lambda c: c.positions)
    with pytest.raises(UserError, match="no weights"):
        select_positions(SelectionRule("rules_from_outside:WeighedNonsense"), np.ones(9), np.ones(9), row=4)


def test_scopes_bound_what_may_be_picked(outside, monkeypatch):
    monkeypatch.setattr(outside, "returned", lambda c: np.array([0]))
    with pytest.raises(UserError, match="position 0, which is no candidate"):
        select_positions(
            SelectionRule("rules_from_outside:nonsense", scope="supervised"),
            np.ones(9),
            np.ones(9),
            row=4,
            supervised=np.arange(9) > 4,
        )
