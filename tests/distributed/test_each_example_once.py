"""An epoch on two processes trains each example once, whatever orders or packs them."""

import torch.distributed as dist
from distributed.spawn import spawn
from tiny_models import tiny_model
from tiny_run import tiny_arguments, tiny_dataset

from tokenseek import TokenSeekCollator, TokenSeekTrainer
from tokenseek.data.packing import PackedDataset

CASES = (("group_by_length", None), ("group_by_length", 24), ("random", 24), ("sequential", 24))


def trained(rank, folder):
    """The ids of the examples that this process learned from, in each of the cases."""
    dataset = tiny_dataset((9, 21, 14), (2, 3, 1))
    return [_learned(PackedDataset(dataset, row) if row else dataset, strategy, folder) for strategy, row in CASES]


def _learned(data, strategy, folder):
    seen = []

    class Recording(TokenSeekTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if (inputs["labels"] != -100).any():
                seen.extend(inputs["example_ids"])
            return super().training_step(model, inputs, *args, **kwargs)

    options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=1, train_sampling_strategy=strategy)
    trainer = Recording(
        tiny_model("llama"),
        tiny_arguments(folder, learning_rate=0.01, **options),
        data_collator=TokenSeekCollator(None, rule="all", packing=isinstance(data, PackedDataset)),
        train_dataset=data,
    )
    assert trainer.num_groups == dist.get_world_size() == 2
    trainer.train()
    return seen


def test_row_27_each_example_is_trained_once(tmp_path):
    """Three examples on two processes: the fourth place is a blank one's."""
    for (strategy, row), ours, theirs in zip(CASES, *spawn(2, trained, tmp_path), strict=True):
        assert sorted(ours + theirs) == ["00000000-x", "00000001-x", "00000002-x"], (strategy, row)
        assert ours and theirs


def counted(rank, folder):
    """What is logged as trained on, of one example for two processes: padded, in one row, and of a packed data set."""
    dataset = tiny_dataset((9,), (2,))
    return [_counted(data, packing, folder) for data, packing in
            ((dataset, False), (dataset, True), (PackedDataset(dataset, 24), True))]  # fmt: skip


def _counted(data, packing, folder):
    options = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=0.01)
    options["include_num_input_tokens_seen"] = "all" if packing else "non_padding"
    trainer = TokenSeekTrainer(
        tiny_model("llama"),
        tiny_arguments(folder, **options),
        data_collator=TokenSeekCollator(None, rule="all", packing=packing),
        train_dataset=data,
    )
    trainer.train()
    return trainer.state.num_input_tokens_seen


def test_row_29_blank_examples_are_not_counted(tmp_path):
    assert spawn(2, counted, tmp_path) == [[9, 9, 9]] * 2
