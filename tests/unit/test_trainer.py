"""What TokenSeekTrainer adds to Trainer: epochs of random selections, evaluation on all tokens, refusals."""

from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset, write_index
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

import tokenseek
from tokenseek import PaddingCollator, TokenSeekCollator, TokenSeekTrainer, UserError
from tokenseek.ditching import ditching_of

EPOCHS, BATCHES = 3, 4


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset()


@pytest.fixture(scope="module")
def path(dataset, tmp_path_factory):
    return write_index(tmp_path_factory.mktemp("index") / "index.arrow", dataset)


class Recording(TokenSeekTrainer):
    """Keeps the selected positions of every batch that is trained on."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append(inputs["selected_positions"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def trained(dataset, path, folder, resume=None, **options):
    """A trainer after three epochs of shuffled batches with half of the selection drawn at random."""
    options = {"num_train_epochs": EPOCHS, "train_sampling_strategy": "random", **options}
    collator = TokenSeekCollator(path, 0.3, "top_random", explore=0.5)
    trainer = Recording(
        tiny_model("llama"), tiny_arguments(folder, **options), data_collator=collator, train_dataset=dataset
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole_run(dataset, path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return trained(dataset, path, folder, save_strategy="steps", save_steps=1)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_random_selections_are_new_in_every_epoch(dataset, path, tmp_path):
    batches = trained(dataset, path, tmp_path, train_sampling_strategy="sequential").batches
    epochs = [batches[i : i + BATCHES] for i in range(0, len(batches), BATCHES)]
    assert len(epochs) == EPOCHS and epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_workers_draw_the_same_selections(whole_run, dataset, path, tmp_path):
    for persistent in (False, True):
        options = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
        trainer = trained(dataset, path, tmp_path, **options)
        assert trainer.batches == whole_run.batches
        assert torch.equal(weights(trainer), weights(whole_run))


@pytest.mark.parametrize("step", [1, 2, 3, 4], ids=["within-epoch-1", "end-of-1", "within-2", "end-of-2"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_what_the_whole_run_drew(step, workers, whole_run, dataset, path, tmp_path):
    assert get_last_checkpoint(whole_run.args.output_dir).endswith("checkpoint-6")
    checkpoint = f"{whole_run.args.output_dir}/checkpoint-{step}"
    trainer = trained(dataset, path, tmp_path, resume=checkpoint, dataloader_num_workers=workers)
    assert trainer.batches == whole_run.batches[2 * step :]
    assert_close(weights(trainer), weights(whole_run))


def evaluated(cls, model, dataset, folder, collator):
    arguments = tiny_arguments(folder, per_device_eval_batch_size=3)
    return cls(model, arguments, data_collator=collator, train_dataset=dataset, eval_dataset=dataset)


def test_evaluation_is_that_of_the_model_without_ditching(dataset, path, tmp_path):
    collator = TokenSeekCollator(path, 0.3, "top")
    ours = evaluated(TokenSeekTrainer, tiny_model("llama"), dataset, tmp_path, collator)
    plain = evaluated(Trainer, tiny_model("llama"), dataset, tmp_path, PaddingCollator())
    expected = plain.evaluate()["eval_loss"]
    assert ours.evaluate()["eval_loss"] == ours.predict(dataset).metrics["test_loss"] == expected
    selected = evaluated(Trainer, tokenseek.enable_token_ditching(tiny_model("llama")), dataset, tmp_path, collator)
    assert selected.evaluate()["eval_loss"] != pytest.approx(expected, rel=1e-3)  # the two can be told apart
    assert ours.data_collator is collator


def test_predictions_are_the_logits_of_all_tokens(dataset, path, tmp_path):
    model = tiny_model("llama")
    trainer = evaluated(TokenSeekTrainer, model, dataset, tmp_path, TokenSeekCollator(path, 0.3, "top"))
    trainer.args.prediction_loss_only = False
    predictions = trainer.predict(dataset).predictions
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([dataset[1]["input_ids"]])).logits[0]
    assert_close(predictions[1][: len(expected)], expected)


def test_evaluation_between_steps_changes_nothing(whole_run, dataset, path, tmp_path):
    collator = TokenSeekCollator(path, 0.3, "top_random", explore=0.5)
    arguments = tiny_arguments(
        tmp_path, num_train_epochs=EPOCHS, train_sampling_strategy="random", eval_strategy="steps", eval_steps=1
    )
    trainer = Recording(
        tiny_model("llama"), arguments, data_collator=collator, train_dataset=dataset, eval_dataset=dataset
    )
    trainer.train()
    assert trainer.batches == whole_run.batches
    assert torch.equal(weights(trainer), weights(whole_run))


def test_only_our_collator_is_taken(dataset, tmp_path):
    with pytest.raises(UserError, match="needs a TokenSeekCollator.*got PaddingCollator"):
        evaluated(TokenSeekTrainer, tiny_model("llama"), dataset, tmp_path, PaddingCollator())


@pytest.mark.parametrize("where", ["label_smoothing_factor", "compute_loss_func"])
def test_other_losses_are_refused(where, path, dataset, tmp_path):
    arguments = tiny_arguments(tmp_path, **({where: 0.1} if where == "label_smoothing_factor" else {}))
    options = {where: lambda *_: 0} if where == "compute_loss_func" else {}
    with pytest.raises(UserError, match="computes the loss itself"):
        TokenSeekTrainer(
            tiny_model("llama"),
            arguments,
            data_collator=TokenSeekCollator(path, rule="top"),
            train_dataset=dataset,
            **options,
        )


@pytest.mark.parametrize("given,found", [(None, False), (True, True)])
def test_ddp_looks_for_parameters_without_gradient_where_it_is_told_to(given, found, path, dataset, tmp_path):
    arguments = tiny_arguments(tmp_path, ddp_find_unused_parameters=given)
    trainer = TokenSeekTrainer(tiny_model("llama"), arguments, data_collator=TokenSeekCollator(path, 0.5, "top"))
    assert trainer.args.ddp_find_unused_parameters is found


def test_zero3_fetches_a_layer_ahead(monkeypatch, path, dataset, tmp_path):
    class Reached(Exception):
        pass

    def fetch(decoder, zero):
        raise Reached(len(decoder.layers), zero)

    monkeypatch.setattr("tokenseek.training.trainer.fetch_a_layer_ahead", fetch)
    arguments, zero = tiny_arguments(tmp_path), {"stage3_prefetch_bucket_size": "auto"}
    config = SimpleNamespace(config={"zero_optimization": zero})
    arguments.deepspeed_plugin = SimpleNamespace(hf_ds_config=config)
    with pytest.raises(Reached) as reached:
        TokenSeekTrainer(
            tiny_model("llama"), arguments, data_collator=TokenSeekCollator(path, rule="top"), train_dataset=dataset
        )
    assert reached.value.args == (4, zero)


def test_ditching_that_is_enabled_already_is_kept(path, dataset, tmp_path):
    model = tokenseek.enable_token_ditching(tiny_model("llama"), recompute=True)
    TokenSeekTrainer(
        model, tiny_arguments(tmp_path), data_collator=TokenSeekCollator(path, rule="top"), train_dataset=dataset
    )
    assert ditching_of(model).recompute
