"""`auto` of the micro batch, of recomputation and of the share: what the planner fits into memory."""

import json
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from tiny_preset import tiny_preset

from tokenseek.config import load_config, save_resolved
from tokenseek.errors import UserError
from tokenseek.launching import memory
from tokenseek.planning import Engine, method_of, plan_memory
from tokenseek.runs import fit
from tokenseek.runs.fit import Planner, settle_memory, with_batch
from tokenseek.runs.train import train

TOKENS = 64
AUTO = ("training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=12", "selection.rule=random")
ONLINE = ("scoring.mode=online", "selection.rule=sampled", "selection.explore=0.3")
ALL_AUTO = (*AUTO[:2], *ONLINE, "selection.ratio=auto", "training.recompute=auto")


def settle(config, settled_by=None):
    return settle_memory(config, settled_by, TOKENS, PartialState(cpu=True))


def peak_of(config):
    return plan_memory(config, method_of(config), Engine(on_cpu=True), tokens=TOKENS).peak


def chosen(config):
    training = config.training
    return training.per_device_train_batch_size, training.recompute, config.selection.ratio


def test_the_largest_batch_that_fits_is_taken_and_a_step_keeps_its_rows(tmp_path, capsys):
    budget = peak_of(with_batch(tiny_preset(tmp_path, *AUTO), 4))
    settled, plan = settle(tiny_preset(tmp_path, *AUTO, f"training.memory_budget='{budget}'"))
    training = settled.training
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 3)
    assert training.memory_budget is None and plan.peak == budget and plan.tokens == (4, TOKENS)
    printed = capsys.readouterr().out
    assert "auto: training.per_device_train_batch_size=4 (x 3 a step). " in printed
    assert "(training.memory_budget) may be used. 12 rows at once would need" in printed
    assert settle(settled) == (settled, None)


def test_few_sizes_are_planned(tmp_path, monkeypatch):
    """A plan of a large model takes ten seconds. Memory that is not linear in the rows is met all the same."""
    planned = []

    def plan(of_size, *_, **__):
        planned.append(size := of_size.training.micro_batch)
        assert size * of_size.training.gradient_accumulation_steps == 12
        return SimpleNamespace(peak=peaks[size])

    def largest(budget):
        planned.clear()
        return Planner(config, budget, Engine(), TOKENS).largest_batch(None, False)

    config = tiny_preset(tmp_path, *AUTO)
    monkeypatch.setattr(fit, "plan_memory", plan)
    peaks = {size: 100 + 10 * size for size in (1, 2, 3, 4, 6, 12)}
    for budget, size, plans in ((220, 12, 1), (219, 6, 3), (130, 3, 4), (129, 2, 4), (110, 1, 3), (109, None, 2)):
        assert largest(budget) == size
        assert len(planned) == len(set(planned)) == plans
    peaks |= {12: 300, 6: 200}  # above the line in between
    assert largest(190) == 4
    peaks |= {6: 115, 4: 114, 3: 113, 2: 112}  # below it
    assert largest(190) == 6


def test_a_run_that_goes_on_keeps_what_it_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "plan_memory", None)
    run = tmp_path / "run"
    run.mkdir()
    config = tiny_preset(tmp_path, *ALL_AUTO)
    save_resolved(tiny_preset(tmp_path, *ONLINE, *numbers(3, True, 0.07)), run / "config.yaml")
    settled, plan = settle(config, str(run / "checkpoint-5"))
    assert chosen(settled) == (3, True, 0.07) and settled.training.gradient_accumulation_steps == 4
    assert plan is None and f"selection.ratio=0.07, as before in {run}/checkpoint-5." in capsys.readouterr().out
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="config.yaml, which would give the share.*holds none"):
        settle(config, str(run / "checkpoint-5"))
    one = tiny_preset(tmp_path, *AUTO, "training.gradient_accumulation_steps=1")
    assert settle(one)[0].training.micro_batch == 1


def numbers(size, recompute, ratio):
    return (
        f"training.per_device_train_batch_size={size}",
        f"training.gradient_accumulation_steps={12 // size}",
        f"training.recompute={str(recompute).lower()}",
        f"selection.ratio={ratio}",
    )


def test_a_run_trains_with_it_and_goes_on(tmp_path, capsys):
    settings = (*AUTO, "training.gradient_accumulation_steps=4", "training.memory_budget=64GiB")
    assert train(tiny_preset(tmp_path, *settings)).steps == 2
    assert "auto: training.per_device_train_batch_size=4 (x 1 a step)" in capsys.readouterr().out
    saved = load_config(tmp_path / "run" / "config.yaml").training
    assert (saved.per_device_train_batch_size, saved.gradient_accumulation_steps) == (4, 1)
    assert train(tiny_preset(tmp_path, *settings)).steps == 2
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("expected", [(12, False, 0.3), (2, False, 0.3), (1, True, 0.3)])
def test_first_the_usual_share_then_recomputing(tmp_path, capsys, expected):
    tiny_preset(tmp_path)
    file = tmp_path / "model" / "config.json"  # deep enough for what is kept of each layer to matter
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 12}))
    config = tiny_preset(tmp_path, *ONLINE, *numbers(*expected))
    budget = plan_memory(config, method_of(config), Engine(on_cpu=True), tokens=512).peak
    config = tiny_preset(tmp_path, *ALL_AUTO, f"training.memory_budget='{budget}'")
    settled, plan = settle_memory(config, None, 512, PartialState(cpu=True))
    assert chosen(settled) == expected and plan.peak == budget
    size, recompute, _ = expected
    told = f"auto: training.per_device_train_batch_size={size} (x {12 // size} a step), training.recompute="
    printed = capsys.readouterr().out
    assert f"{told}{str(recompute).lower()}, selection.ratio=0.3. " in printed
    assert ("1 x 512 tokens with r = 0.3, not recomputed, would need" in printed) == recompute
    assert ("12 rows at once would need" in printed) == (size == 2)


def test_then_fewer_tokens(tmp_path, monkeypatch, capsys):
    """Where the peak is in what is scored, a smaller share saves nothing; here it is in what is selected."""

    def plan(config, method, *_, **__):
        of_row = 10 + 900 * method.ratio * (0.5 if method.recompute else 1)
        return SimpleNamespace(
            peak=int(config.training.micro_batch * of_row * 2**20), method=method, tokens=(1, TOKENS)
        )

    monkeypatch.setattr(fit, "plan_memory", plan)
    monkeypatch.setattr("tokenseek.planning.budget.plan_memory", plan)
    settled, _ = settle(tiny_preset(tmp_path, *ALL_AUTO, "training.memory_budget=30MiB"))
    assert chosen(settled) == (1, True, 0.04)
    printed = capsys.readouterr().out
    assert "selection.ratio=0.04. 28.0 MiB planned at the peak of a step with 64 tokens in a row" in printed
    assert "1 x 64 tokens with r = 0.3, not recomputed, would need 280.0 MiB." in printed
    assert "1 x 64 tokens with r = 0.3, recomputed, would need 145.0 MiB." in printed


def test_a_share_that_is_given_stays(tmp_path):
    settings = (*ALL_AUTO, "selection.ratio=0.5")
    budget = peak_of(tiny_preset(tmp_path, *ONLINE, *numbers(1, True, 0.5)))
    settled, _ = settle(tiny_preset(tmp_path, *settings, f"training.memory_budget='{budget}'"))
    assert settled.selection.ratio == 0.5
    with pytest.raises(UserError, match="auto: one row of 64 tokens needs .* may be used. Lower selection.ratio or"):
        settle(tiny_preset(tmp_path, *settings, "training.memory_budget=1KiB"))


def test_where_nothing_fits_it_is_told_what_would_help_and_how_to_try(tmp_path):
    config = tiny_preset(tmp_path, *ALL_AUTO, "training.memory_budget=1KiB")
    with pytest.raises(
        UserError, match=r"(?s)in 0.0 MiB: nothing fits; .*To try all the same, give numbers: --set sel"
    ):
        settle(config)


@pytest.mark.parametrize("spare, expected", [(0, False), (-1, True)])
def test_what_does_not_fit_is_recomputed(tmp_path, capsys, spare, expected):
    budget = peak_of(tiny_preset(tmp_path, "selection.ratio=0.3")) + spare
    settings = ("selection.ratio=0.3", "training.recompute=auto", f"training.memory_budget='{budget}'")
    settled, _ = settle(tiny_preset(tmp_path, *settings))
    assert settled == tiny_preset(tmp_path, "selection.ratio=0.3", f"training.recompute={str(expected).lower()}")
    assert f"auto: training.recompute={str(expected).lower()}. " in capsys.readouterr().out


def test_what_cannot_be_planned_is_trained_unless_there_is_a_budget(tmp_path, monkeypatch, capsys):
    def unplanned(*_, **__):
        raise RuntimeError("its sizes depend on the data.\nand more")

    monkeypatch.setattr(fit, "plan_memory", unplanned)
    settled, plan = settle(tiny_preset(tmp_path, *ALL_AUTO))
    assert chosen(settled) == (1, False, 0.3) and plan is None
    assert "The memory of a step cannot be planned (its sizes depend on the data.)." in capsys.readouterr().out
    with pytest.raises(UserError, match=r"memory_budget: 1GiB cannot be kept to.*depend on the data\.\. Leave it out"):
        settle(tiny_preset(tmp_path, *ALL_AUTO, "training.memory_budget=1GiB"))


def test_what_excludes_each_other(tmp_path):
    index = "with scoring.mode: index the share takes all the memory"
    for other in (AUTO[0], "training.recompute=auto"):
        with pytest.raises(UserError, match=index):
            tiny_preset(tmp_path, "selection.rule=top", "selection.ratio=auto", other)
    with pytest.raises(UserError, match="memory_budget is for selection.ratio: auto and training.per_device"):
        tiny_preset(tmp_path, "training.memory_budget=8GiB")
    with pytest.raises(UserError, match="per_device_train_batch_size is auto, which is settled when training starts"):
        plan_memory(tiny_preset(tmp_path, *AUTO))


def test_memory_of_a_container_is_what_its_group_has_left(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    files = [tmp_path / name for name in ("limit", "used", "stat")]
    for path, text in zip(files, ("600000000\n", "500000000\n", "anon 1\ninactive_file 200000000\nx 1\n"), strict=True):
        path.write_text(text)
    monkeypatch.setattr(memory, "_CONTAINER_FILES", [files, [tmp_path / "none"] * 3])
    state = PartialState(cpu=True)
    assert memory.free_memory_bytes(state) == 300_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free_memory_bytes(state) == 150_000_000
    files[0].write_text("max\n")
    assert memory.free_memory_bytes(state) == 500_000_000
