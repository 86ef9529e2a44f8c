"""What a launch's `parallelism_config` is taken for, and what it is refused for."""

import os
from types import SimpleNamespace

import pytest
from accelerate import Accelerator, ParallelismConfig
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset

from tokenseek import enable_token_ditching
from tokenseek.ditching import ditching_of
from tokenseek.errors import UserError
from tokenseek.launching.sequence import launched_sp_size, unseen_by_accelerate
from tokenseek.parallel import sequence_group, shared_by
from tokenseek.training import GroupTrainer, PaddingCollator


@pytest.fixture
def launched(monkeypatch):
    """Sets what `accelerate launch` exports, in a group of several (pretended) processes."""

    def launch(processes=1, **sizes):
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        for name, size in sizes.items():
            monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", str(size))
        monkeypatch.setattr("tokenseek.launching.sequence.dist.is_initialized", lambda: True)
        monkeypatch.setattr("tokenseek.launching.sequence.dist.get_world_size", lambda: processes)

    return launch


def test_no_processes_share_texts_unless_asked_to(launched):
    assert launched_sp_size() == 1 and sequence_group("cpu") is None
    launched(4, dp_shard_size=2, dp_replicate_size=2)  # hybrid sharding, which is accelerate's business
    assert launched_sp_size() == 1 and sequence_group("cpu") is None
    with unseen_by_accelerate():
        assert os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"


@pytest.mark.parametrize(
    "processes, sizes, message",
    [
        (4, dict(sp_size=3), "sp_size 3 does not divide the 4 process.*: 1, 2, 4"),
        (1, dict(sp_size=2), "sp_size 2 does not divide the 1 process"),
        (8, dict(sp_size=2, dp_shard_size=2), "dp_shard_size is 2, but 8 processes in groups of 2.*leave 4"),
        (4, dict(sp_size=2, tp_size=2), "sp_size 2 and tp_size 2 cannot be combined"),
        (4, dict(sp_size=2, cp_size=2), "parallelism_config of the accelerate config: .*mutually exclusive"),
        (4, dict(sp_size=0), "parallelism_config of the accelerate config: sp_size must be at least 1"),
        (4, dict(sp_size=2, sp_attn_implementation="flash_attention_2"), "model.attn_implementation"),
    ],
)
def test_layouts_that_cannot_be_had_are_refused(launched, processes, sizes, message):
    launched(processes, **sizes)
    with pytest.raises(UserError, match=message):
        sequence_group("cpu")


def test_fsdp_is_refused(launched, monkeypatch):
    launched(2, sp_size=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="together with FSDP.*sp_zero3.yaml"):
        sequence_group("cpu")


def test_accelerate_does_not_see_the_setting(launched):
    launched(2, sp_size=2)
    with unseen_by_accelerate():
        assert Accelerator(cpu=True).parallelism_config is None
    assert ParallelismConfig().sp_size == launched_sp_size() == 2


def trainer(tmp_path, model, arguments=None):
    arguments = arguments or tiny_arguments(tmp_path)
    return GroupTrainer(model, arguments, data_collator=PaddingCollator(), train_dataset=tiny_dataset())


def test_a_model_that_shares_no_texts_is_refused_where_the_launch_says_it_should(launched, tmp_path):
    launched(2, sp_size=2)
    with pytest.raises(UserError, match="has sp_size 2, but 1 rank.*enable_sequence_parallelism"):
        trainer(tmp_path, tiny_model("llama"))


def test_accelerates_own_sequence_parallelism_is_refused(tmp_path):
    arguments = tiny_arguments(tmp_path)
    arguments.parallelism_config = ParallelismConfig(sp_size=2)
    with pytest.raises(UserError, match="accelerate's own sequence parallelism"):
        trainer(tmp_path, tiny_model("llama"), arguments)


@pytest.mark.parametrize("ranks", [[1, 2], [0, 2]])
def test_ranks_of_a_trainers_group_are_neighbours(ranks, tmp_path, monkeypatch):
    model = tiny_model("llama")
    enable_token_ditching(model)
    assert shared_by(model) is None
    group = SimpleNamespace(size=lambda: 2)
    ditching_of(model).sequence = SimpleNamespace(group=group)
    assert shared_by(model) is group
    monkeypatch.setattr("tokenseek.training.groups.dist.get_process_group_ranks", lambda group: ranks)
    with pytest.raises(UserError, match="needs neighbours, such as .0, 1."):
        trainer(tmp_path, model)
