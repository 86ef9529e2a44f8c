"""Warnings that a user can do nothing about: their causes are mended, or exactly they are hidden."""

import logging
import warnings

import pytest
from tiny_models import tiny_model
from transformers import TrainingArguments

from tokenseek.config import PeftSettings
from tokenseek.models.adapters import add_adapter
from tokenseek.quiet import hide_known_warnings
from tokenseek.training import GroupTrainer


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_added_without_a_warning(kind):
    """PEFT would name a layer's transposed weight (GPT-2), and asks Transformers by a deprecated name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hide_known_warnings()
        adapted = add_adapter(tiny_model(kind), PeftSettings(method="lora", r=2, target_modules="feed_forward"))
    assert adapted.peft_config["default"].fan_in_fan_out is (kind == "gpt2")


def test_other_warnings_of_the_same_kind_are_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_known_warnings()
        warnings.warn("`something_else` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["`something_else` is deprecated"]


def test_other_words_of_the_same_logger_are_shown(caplog):
    hide_known_warnings()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_nothing_is_pinned_without_an_accelerator(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    GroupTrainer(tiny_model("llama"), arguments)
    assert not arguments.dataloader_pin_memory
