"""Which tokens are selected: a pure function of scores, rule, row and visit."""

import dataclasses
import math
import random

import numpy as np
import pytest
from closeness import assert_close

from tokenseek.errors import UserError
from tokenseek.selection import (
    SelectionRule,
    combine_scores,
    select_positions,
    select_weighted,
    supervised_positions,
)

RULES = {
    "top": SelectionRule("top"),
    "random": SelectionRule("random"),
    "all": SelectionRule("all"),
    "bands": SelectionRule("bands", bands=((0, 0.1), (0.4, 0.5))),
    "top_random": SelectionRule("top_random", explore=0.3),
    "sampled": SelectionRule("sampled", alpha=5, beta=5, scope="all"),
}


def scores(num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(num_tokens, np.float32), rng.standard_normal(num_tokens, np.float32)


def ranked(order: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Scores under which the positions rank in the given order, best first."""
    context = np.empty(len(order), np.float32)
    context[order] = np.arange(len(order), 0, -1)
    return context, np.zeros(len(order), np.float32)


# Eq. 5


def test_scores_are_eq_5():
    context, gradient = np.array([0.5, 1.0, 2.0], np.float32), np.array([-1.0, 3.0, 0.0], np.float32)
    expected = [2 * math.log(0.51) + 0, 2 * math.log(1.01) + 3, 2 * math.log(2.01) + 3 * 0.25]
    combined = combine_scores(context, gradient, alpha=2, beta=3, log_offset=0.01)
    assert combined.dtype == np.float64
    assert_close(combined, np.array(expected))


def test_a_term_of_weight_zero_is_left_out():
    context, gradient = np.array([0.0, 1.0]), np.array([5.0, 7.0])
    np.testing.assert_array_equal(combine_scores(context, gradient, alpha=0, beta=2, log_offset=0), [0, 2])
    np.testing.assert_array_equal(combine_scores(context + 1, gradient, alpha=1, beta=0, log_offset=0), np.log([1, 2]))


def test_constant_gradients_count_zero():
    context = np.array([1.0, 2.0, 4.0])
    for constant in (0.0, 3.0):
        combined = combine_scores(context, np.full(3, constant), alpha=1, beta=5, log_offset=0)
        np.testing.assert_array_equal(combined, np.log(context))


def test_zero_context_is_finite_with_the_offset_and_last_without():
    context, gradient = np.array([0.0, 1e-3, 1.0]), np.zeros(3)
    combined = combine_scores(context, gradient, alpha=1, log_offset=1e-6)
    assert combined[0] == math.log(1e-6)
    assert np.isneginf(combine_scores(context, gradient, log_offset=0)[0])
    rule = SelectionRule("top", ratio=0.6, log_offset=0)
    np.testing.assert_array_equal(select_positions(rule, context, gradient, row=0), [1, 2])


@pytest.mark.parametrize(
    ("context", "gradient", "message"),
    [
        ([1.0, np.nan], [0.0, 0.0], "finite"),
        ([1.0, 1.0], [0.0, np.inf], "finite"),
        ([1.0, -0.1], [0.0, 0.0], "not negative"),
        ([1.0], [0.0, 0.0], r"shape \(1,\) .* \(2,\)"),
        ([[1.0]], [[0.0]], "T >= 1"),
        ([], [], "T >= 1"),
    ],
)
def test_unusable_scores_are_refused(context, gradient, message):
    with pytest.raises(UserError, match=message):
        combine_scores(np.array(context), np.array(gradient))


# What every rule promises


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scope", ["all", "supervised"])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 64, 255])
@pytest.mark.parametrize("ratio", [1e-9, 0.1, 0.5, 1.0])
def test_positions_are_ascending_unique_real_tokens_and_one_at_least(name, scope, num_tokens, ratio):
    rule = dataclasses.replace(RULES[name], ratio=ratio, scope=scope)
    padded_context, padded_gradient = scores(num_tokens + 5)
    padded_context[num_tokens:] = 1e9  # padding that would win
    supervised = np.arange(num_tokens + 5) % 3 == 0
    positions = select_positions(
        rule, padded_context, padded_gradient, row=3, supervised=supervised, num_tokens=num_tokens
    )
    assert positions.dtype == np.int64
    assert len(positions) >= 1
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0 and positions[-1] < num_tokens
    unpadded = select_positions(
        rule, padded_context[:num_tokens], padded_gradient[:num_tokens], row=3, supervised=supervised[:num_tokens]
    )
    np.testing.assert_array_equal(positions, unpadded)


@pytest.mark.parametrize(
    ("ratio", "num_tokens", "expected"),
    [(0.1, 4, 1), (0.1, 14, 1), (0.1, 15, 2), (0.5, 3, 2), (0.5, 5, 3), (0.25, 10, 3), (1.0, 10, 10), (0.999, 10, 10)],
)
@pytest.mark.parametrize("name", ["top", "random", "top_random", "sampled"])
def test_budget_is_rounded_half_up(name, ratio, num_tokens, expected):
    rule = dataclasses.replace(RULES[name], ratio=ratio)
    assert len(select_positions(rule, *scores(num_tokens), row=0)) == expected


@pytest.mark.parametrize("name", ["top", "random", "top_random", "sampled"])
def test_ratio_one_is_every_token(name):
    rule = dataclasses.replace(RULES[name], ratio=1.0)
    np.testing.assert_array_equal(select_positions(rule, *scores(37), row=0), np.arange(37))


def test_all_is_every_token_and_needs_no_scores():
    np.testing.assert_array_equal(select_positions(RULES["all"], None, None, row=0, num_tokens=9), np.arange(9))


@pytest.mark.parametrize("name", RULES)
def test_rules_say_whether_they_need_scores(name):
    if RULES[name].needs_scores:
        with pytest.raises(UserError, match="'context' of row 0 is not given"):
            select_positions(RULES[name], None, None, row=0, num_tokens=9)
    else:
        assert len(select_positions(RULES[name], None, None, row=0, num_tokens=9))


# top


def test_top_takes_the_best_in_ascending_order():
    assert select_positions(SelectionRule("top", ratio=0.5), *ranked([4, 1, 5, 0, 2, 3]), row=0).tolist() == [1, 4, 5]


def test_top_weighs_context_against_gradient():
    context, gradient = np.array([9.0, 1.0, 1.0]), np.array([0.0, 0.0, 1.0])
    for alpha, beta, best in ((5, 0.1, 0), (0.1, 5, 2)):
        rule = SelectionRule("top", ratio=0.1, alpha=alpha, beta=beta)
        assert select_positions(rule, context, gradient, row=0).tolist() == [best]


def test_of_tied_tokens_the_earlier_ones_are_taken():
    context = np.array([1, 2, 1, 2, 1, 2], np.float32)
    assert select_positions(SelectionRule("top", ratio=0.5), context, np.zeros(6), row=0).tolist() == [1, 3, 5]
    assert select_positions(SelectionRule("top", ratio=4 / 6), context, np.zeros(6), row=0).tolist() == [0, 1, 3, 5]
    assert select_positions(SelectionRule("top", ratio=0.3), np.ones(100), np.ones(100), row=0).tolist() == list(
        range(30)
    )


def test_top_does_not_depend_on_the_visit():
    np.testing.assert_array_equal(
        *(select_positions(SelectionRule("top"), *scores(90), row=2, visit=v) for v in (0, 1))
    )


# bands (Table S11)


def test_bands_of_table_s11():
    order = random.Random(0).sample(range(100), 100)
    positions = select_positions(RULES["bands"], *ranked(order), row=0)
    assert positions.tolist() == sorted(order[:10] + order[40:50])


def test_bands_in_any_order_of_any_sequence_type():
    assert SelectionRule("bands", bands=[[0.4, 0.5], [0, 0.1]]).bands == ((0.0, 0.1), (0.4, 0.5))
    assert SelectionRule("bands", bands=[[0, 0.1], [0.1, 1]]).bands == ((0.0, 0.1), (0.1, 1.0))


def test_bands_narrower_than_a_token_give_one_token():
    order = [2, 0, 3, 1]
    assert select_positions(RULES["bands"], *ranked(order), row=0).tolist() == [2]
    rule = SelectionRule("bands", bands=((0.5, 0.51),))
    assert select_positions(rule, *ranked(order), row=0).tolist() == [3]


# random


def test_random_is_reproducible_and_redrawn_for_every_visit_row_and_seed():
    def draw(row=0, visit=0, seed=0):
        return tuple(
            select_positions(SelectionRule("random", seed=seed), None, None, row=row, visit=visit, num_tokens=200)
        )

    assert draw() == draw()
    variants = [
        draw(),
        draw(visit=1),
        draw(visit=2),
        draw(row=1),
        draw(seed=1),
        draw(seed=2**64 - 1),
        draw(row=1, visit=1),
    ]
    assert len(set(variants)) == len(variants)


def test_random_does_not_depend_on_the_order_of_calls_or_on_global_state():
    rule = SelectionRule("random", ratio=0.3)
    keys = [(row, visit) for row in range(5) for visit in range(3)]

    def draw(keys):
        return {
            key: select_positions(rule, None, None, row=key[0], visit=key[1], num_tokens=40).tolist() for key in keys
        }

    expected = draw(keys)
    np.random.seed(1)
    assert draw(random.Random(2).sample(keys, len(keys))) == expected


def test_random_draws_never_change_between_releases():
    """A resumed run must redraw what the interrupted one drew."""
    rule = SelectionRule("random", ratio=0.25, seed=7)
    assert select_positions(rule, None, None, row=11, visit=2, num_tokens=20).tolist() == [7, 8, 9, 12, 17]


def test_random_takes_every_position_equally_often():
    rule, draws = SelectionRule("random", ratio=0.2), 3000
    counts = np.zeros(20)
    for visit in range(draws):
        counts[select_positions(rule, None, None, row=0, visit=visit, num_tokens=20)] += 1
    # A share of 0.2 in 3000 draws has a standard deviation of 22; 5 of them.
    assert np.abs(counts - 0.2 * draws).max() < 110


# top_random


def test_explore_gives_its_share_of_the_budget_to_random_others():
    order = random.Random(1).sample(range(200), 200)
    rule = SelectionRule("top_random", ratio=0.2, explore=0.25)
    drawn = []
    for visit in range(40):
        positions = set(select_positions(rule, *ranked(order), row=0, visit=visit).tolist())
        assert len(positions) == 40
        assert set(order[:30]) <= positions
        drawn.append(frozenset(positions - set(order[:30])))
    assert len(set(drawn)) == len(drawn), "redrawn per visit"
    assert len(frozenset.union(*drawn)) > 140, "from all of the rest"


def test_explore_all_is_random():
    explore, plain = SelectionRule("top_random", explore=1.0), SelectionRule("random")
    shares = [
        len(np.intersect1d(*(select_positions(r, *scores(400), row=v) for r in (explore, plain)))) for v in range(9)
    ]
    assert max(shares) < 20, "drawn from the ranking, so independent of position"


# scope


def test_supervised_positions_are_those_that_predict_a_label():
    assert supervised_positions([-100, -100, 7, -100, 8]).tolist() == [False, True, False, True, False]
    assert supervised_positions([3]).tolist() == [False]


@pytest.mark.parametrize("name", ["top", "random", "top_random", "bands", "all"])
def test_supervised_scope_selects_supervised_positions_only(name):
    supervised = np.arange(60) >= 45
    rule = dataclasses.replace(RULES[name], scope="supervised", ratio=0.1)
    positions = select_positions(rule, *scores(60), row=0, supervised=supervised)
    assert supervised[positions].all()
    expected = {"all": 15, "bands": 4}.get(name, 6)  # bands of the 15: ranks 0-2 and 6-8, rounded half up
    assert len(positions) == expected


def test_supervised_scope_takes_no_more_than_there_is():
    rule = SelectionRule("top", ratio=0.5, scope="supervised")
    supervised = np.isin(np.arange(10), [2, 8])
    assert select_positions(rule, *scores(10), row=0, supervised=supervised).tolist() == [2, 8]


def test_supervised_scope_of_an_example_without_a_loss_is_all():
    nothing = np.zeros(30, bool)
    expected = select_positions(SelectionRule("top"), *scores(30), row=0)
    positions = select_positions(SelectionRule("top", scope="supervised"), *scores(30), row=0, supervised=nothing)
    np.testing.assert_array_equal(positions, expected)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"ratio": ratio}, r"selection.ratio is .*\(0, 1\]") for ratio in (0, -0.1, 1.0001, 10, math.nan, math.inf)],
        ({"rule": "best"}, "selection.rule is 'best'; accepted is one of top, random, all, bands, top_random"),
        ({"scope": "prompt"}, "selection.scope is 'prompt'; accepted is one of all, supervised"),
        ({"alpha": -1}, "selection.alpha"),
        ({"beta": math.inf}, "selection.beta"),
        ({"alpha": 0, "beta": 0}, "both 0"),
        ({"log_offset": -1e-6}, "selection.log_offset"),
        ({"rule": "top", "explore": 0.1}, "only 'top_random' and 'sampled' explore"),
        ({"rule": "top_random"}, "selection.explore is 0.0"),
        ({"rule": "top_random", "explore": 1.5}, "selection.explore is 1.5"),
        ({"seed": -1}, "selection.seed"),
        ({"seed": 2**64}, "selection.seed"),
        ({"rule": "bands"}, "needs .low, high. fractions"),
        ({"rule": "bands", "bands": ()}, "needs .low, high. fractions"),
        ({"bands": ((0, 0.1),)}, "other rules take none"),
        *[
            ({"rule": "bands", "bands": bands}, "selection.bands is .*without overlap")
            for bands in (
                ((0, 0.2), (0.1, 0.3)),
                ((0.2, 0.1),),
                ((0.1, 0.1),),
                ((-0.1, 0.1),),
                ((0.5, 1.1),),
                ((0.5,),),
            )
        ],
    ],
)
def test_bad_rules_are_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        SelectionRule(**options)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (SelectionRule("top"), {"context": None, "gradient": None}, "num_tokens or scores"),
        (SelectionRule("top"), {"context": None, "gradient": None, "num_tokens": 3}, "'context' of row 5 is not given"),
        (SelectionRule("top"), {"context": np.ones(3), "gradient": np.ones(2)}, "'gradient' of row 5 is of length 2"),
        (
            SelectionRule("top"),
            {"context": np.ones(3), "gradient": np.ones(3), "num_tokens": 4},
            "'context' .*length 3",
        ),
        (SelectionRule("top"), {"context": np.ones(0), "gradient": np.ones(0)}, "row 5 has 0 tokens"),
        (RULES["all"], {"context": None, "gradient": None, "num_tokens": 0}, "row 5 has 0 tokens"),
        (
            SelectionRule("top", scope="supervised"),
            {"context": np.ones(3), "gradient": np.ones(3)},
            "'supervised' .*not given",
        ),
    ],
)
def test_missing_or_short_arguments_are_refused(rule, arguments, message):
    with pytest.raises(UserError, match=message):
        select_positions(rule, row=5, **arguments)


def test_sampled_weights_make_sums_unbiased():
    generator = np.random.default_rng(0)
    context, gradient, values = generator.random(23), generator.random(23) ** 4, generator.random(23)
    supervised = np.arange(23) >= 7
    for scope, candidates in (("all", np.ones(23, bool)), ("supervised", supervised)):
        rule = SelectionRule("sampled", ratio=0.3, alpha=0, beta=1, explore=0.2, scope=scope)
        sums, counts = [], np.zeros(23)
        for visit in range(4000):
            positions, weights = select_weighted(rule, context, gradient, row=5, visit=visit, supervised=supervised)
            assert len(positions) == len(weights) == 7 and (np.diff(positions) > 0).all()
            assert candidates[positions].all() and (weights >= 1 - 1e-12).all()
            assert (weights <= candidates.sum() / (7 * rule.explore) + 1e-9).all()
            sums.append(weights @ values[positions])
            counts[positions] += 1
        assert np.mean(sums) == pytest.approx(values[candidates].sum(), abs=4 * np.std(sums) / 4000**0.5)
        lower_half = candidates & (gradient < np.median(gradient[candidates]))
        assert counts[np.where(candidates, gradient, 0).argmax()] > 2 * counts[lower_half].mean()


def test_sampled_takes_all_where_the_budget_is_all():
    rule = SelectionRule("sampled", ratio=1.0, scope="all")
    positions, weights = select_weighted(rule, np.ones(6), np.arange(6.0), row=0)
    assert positions.tolist() == list(range(6)) and weights.tolist() == [1.0] * 6


def test_sampled_never_draws_above_certainty():
    # One score dwarfs the others: it is certain, and the rest of the budget is spread over the others.
    gradient = np.array([1e6, 1, 1, 1, 1, 1, 1, 1])
    rule = SelectionRule("sampled", ratio=0.5, explore=0.1, scope="all")
    for visit in range(50):
        positions, weights = select_weighted(rule, np.ones(8), gradient, row=1, visit=visit)
        assert positions[0] == 0 and weights[0] == 1 and len(positions) == 4
        assert_close(weights[1:], np.full(3, 7 / 3))


def test_other_rules_weigh_nothing():
    for rule in (SelectionRule("top"), SelectionRule("random"), SelectionRule("all")):
        positions, weights = select_weighted(rule, np.ones(20), np.arange(20.0), row=0)
        assert weights.tolist() == [1.0] * len(positions)
