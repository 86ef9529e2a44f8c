"""A run's folder knows what it was trained with: what goes on, what is refused, and what is moved out of the way."""

import json
import shutil

import pytest
from helpers import write_jsonl
from tiny_models import tiny_model
from tiny_preset import tiny_preset

from tokenseek.config import load_config
from tokenseek.data.toy import make_word_problems
from tokenseek.errors import UserError
from tokenseek.runs.train import train

SETTINGS = (
    "selection.rule=random",  # no index
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.logging_steps=1",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    train(tiny_preset(folder, *SETTINGS))
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """A copy of a finished run of two steps; calling it trains on in the copy."""

    class Copy:
        path = shutil.copytree(folder / "run", tmp_path / "run")

        def __call__(self, *settings):
            return train(tiny_preset(folder, *SETTINGS, f"output_dir={self.path}", *settings))

        def interrupt(self):
            """As if it had been killed after its first checkpoint."""
            for name in ("final", "checkpoint-2"):
                shutil.rmtree(self.path / name)
            (self.path / "summary.json").unlink()

        @property
        def steps(self):
            lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
            return [line["step"] for line in lines if "loss" in line]

        @property
        def state(self):
            return {path: path.read_bytes() for path in self.path.rglob("*") if path.is_file()}

    return Copy()


def test_a_finished_run_says_so(run, capsys):
    before, summary = run.state, json.loads((run.path / "summary.json").read_text())
    done = run("training.logging_steps=5", "training.report_to=[]", "training.save_total_limit=1")
    assert done.steps == 2 and done.loss_after == summary["loss_after"]
    assert f"The run in {run.path} is finished: 2 steps" in capsys.readouterr().out
    assert run.state == before  # config.yaml too, which tells what was done


CHANGES = [
    ("training.learning_rate=0.5", "training.learning_rate: 0.0004 there, 0.5 now"),
    ("peft.r=16", "peft.r: 8 there, 16 now"),
    ("peft.target_modules=[q_proj]", "peft.target_modules: feed_forward there, .'q_proj'. now"),
    ("peft=null", "peft.method: lora there, none now"),
    ("seed=1", "seed: 42 there, 1 now"),
    ("selection.ratio=0.2", "selection.ratio: 0.1 there, 0.2 now"),
    ("training.ditching=false", "training.ditching: true there, false now"),
    ("training.extra={disable_tqdm: true, adam_beta1: 0.5}", "training.extra.adam_beta1: none there, 0.5 now"),
    ("training.gradient_accumulation_steps=1", "x gradient_accumulation_steps x processes: 4 there, 2 now"),
    ("data.max_length=250", "data.max_length: 512 there, 250 now"),
    ("data.hold_out=3", "data.hold_out: none there, 3 now"),
    ("training.kv_storage=int8", "training.kv_storage: none there, int8 now"),
]


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_other_settings_are_refused_by_name(run, state):
    """Rows 15 and 16 of the table of situations."""
    if state == "interrupted":
        run.interrupt()
    before = run.state
    for setting, told in CHANGES:
        with pytest.raises(UserError, match=rf"(?s)output_dir: .*other settings:.*{told}.*training.resume=never"):
            run(setting)
        assert run.state == before


def test_other_content_is_refused(run, folder, tmp_path):
    write_jsonl(tmp_path / "other.jsonl", make_word_problems(12, seed=5))
    with pytest.raises(UserError, match="data.sources.0.path: .*train.jsonl there, .*other.jsonl now"):
        run(f"data.sources.0.path={tmp_path}/other.jsonl")
    shutil.copytree(folder / "model", tmp_path / "model")
    assert run(f"model.name_or_path={tmp_path}/model").steps == 2  # it is the same model
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    tiny_model("llama_tied", seed=9, vocab_size=config["vocab_size"], max_position_embeddings=512).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(UserError, match="model.name_or_path: .* there, .* now"):
        run(f"model.name_or_path={tmp_path}/model")
    # The same name, with something else behind it.
    names = json.loads((run.path / "fingerprint.json").read_text())
    names["names"]["model.name_or_path"] = str(tmp_path / "model")
    (run.path / "fingerprint.json").write_text(json.dumps(names))
    with pytest.raises(UserError, match=r"model: other content under the same settings \(model\)"):
        run(f"model.name_or_path={tmp_path}/model")


def test_the_same_rows_a_step_by_other_numbers_go_on(run):
    run.interrupt()
    summary = run("training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1")
    assert summary.steps == 2 and run.steps == [1, 2]


def test_a_longer_run_goes_on(run, capsys):
    assert run("training.max_steps=4").steps == 4
    assert "with training.max_steps=4 (2 before)" in capsys.readouterr().out
    assert run.steps == [1, 2, 3, 4]
    assert load_config(run.path / "config.yaml").training.max_steps == 4
    earlier = run.path / "earlier-1"
    assert {path.name for path in earlier.iterdir()} == {"final", "summary.json", "config.yaml", "fingerprint.json"}
    assert load_config(earlier / "config.yaml").training.max_steps == 2
    assert json.loads((earlier / "summary.json").read_text())["steps"] == 2


def test_no_step_left_is_refused(run):
    with pytest.raises(UserError, match="has taken 2 steps .*no step is left with training.max_steps=1 .2 before"):
        run("training.max_steps=1")
    with pytest.raises(UserError, match="no step is left with .*training.num_train_epochs=0.1 .1 before"):
        run("training.max_steps=-1", "training.num_train_epochs=0.1")
    for checkpoint in run.path.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="has kept no checkpoint to resume from with training.max_steps=9"):
        run("training.max_steps=9")


def test_a_new_run_moves_what_is_there(run, capsys):
    names = {path.name for path in run.path.iterdir()}
    (run.path / "index.arrow").write_bytes(b"")  # knows itself what it belongs to
    old = (run.path / "summary.json").read_bytes()
    assert run("training.resume=never", "training.learning_rate=0.01", "training.max_steps=1").steps == 1
    assert f"Moved to {run.path}/earlier-1: " in capsys.readouterr().out
    earlier = run.path / "earlier-1"
    assert {path.name for path in earlier.iterdir()} == names
    assert (earlier / "summary.json").read_bytes() == old and run.steps == [1]
    assert load_config(run.path / "config.yaml").training.learning_rate == 0.01
    assert not (run.path / "checkpoint-2").exists() and (run.path / "index.arrow").exists()
    run("training.resume=never", "training.max_steps=1")
    assert (run.path / "earlier-2" / "final").exists()


def test_the_checkpoint_of_another_run_may_be_gone_on_from(run, tmp_path, capsys):
    other = f"output_dir={tmp_path}/other"
    checkpoint = f"training.resume={run.path}/checkpoint-1"
    with pytest.raises(UserError, match="(?s)peft.r: 8 there, 16 now.*cannot be loaded with these"):
        run(other, checkpoint, "peft.r=16")
    assert run(other, checkpoint, "training.learning_rate=0.01").steps == 2
    told = f"WARNING: {run.path}/checkpoint-1 was trained with other settings: training.learning_rate: 0.0004 there"
    assert told in capsys.readouterr().out


def test_what_is_unknown_or_damaged_is_told(run, capsys):
    run.interrupt()
    (run.path / "fingerprint.json").write_text('{"settings": ')
    with pytest.raises(UserError, match="fingerprint.json is damaged"):
        run()
    (run.path / "fingerprint.json").unlink()
    assert run().steps == 2
    assert "WARNING" in (out := capsys.readouterr().out) and "holds no fingerprint.json" in out
    (run.path / "summary.json").write_text('{"steps": 2}')
    with pytest.raises(UserError, match="summary.json was written by another version"):
        run()


def test_a_checkpoint_that_is_damaged_is_told(run):
    run.interrupt()
    weights = run.path / "checkpoint-1" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:50])
    for settings in ((), (f"training.resume={run.path}/checkpoint-1",)):
        with pytest.raises(
            UserError, match="checkpoint-1/adapter_model.safetensors is truncated.*Remove .*checkpoint-1"
        ):
            run(*settings)
    weights.write_bytes(whole)
    (run.path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="checkpoint-1 holds no states of the optimizer"):
        run()


def test_a_run_that_was_moved_goes_on_where_it_is(run, tmp_path):
    run.interrupt()
    run.path = run.path.rename(tmp_path / "elsewhere")
    assert run().steps == 2 and run.steps == [1, 2]


def test_an_index_of_other_scores_is_refused(tmp_path):
    """One that other batches gave is taken: its scores differ in rounding."""
    train(tiny_preset(tmp_path))
    index = f"scoring.index={tmp_path}/run/index.arrow"
    other = (index, f"output_dir={tmp_path}/other")
    train(tiny_preset(tmp_path, *other, "scoring.tokens_per_batch=512"))
    with pytest.raises(UserError, match="scored with other settings:\n  reduction: the index has 'abs', this run has"):
        train(tiny_preset(tmp_path, index, f"output_dir={tmp_path}/third", "scoring.reduction=l2"))
