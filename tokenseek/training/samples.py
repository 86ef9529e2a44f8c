"""Samples: what the model writes after some prompts, each time it is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenseek.training.groups import GroupTrainer
from tokenseek.training.metrics import MetricsFile

_log = logging.getLogger(__name__)

_NEW_TOKENS = 64


class Samples(TrainerCallback):
    """Writes what the model generates into the metrics and the terminal; the first process does, greedily.

    Args:
        prompts: the user's words.
        texts: as the model is given them, each with whether the tokenizer adds its own special tokens.
    """

    def __init__(
        self,
        trainer: GroupTrainer,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        texts: Sequence[tuple[str, bool]],
        metrics: MetricsFile,
    ) -> None:
        self.trainer, self.tokenizer, self.metrics = trainer, tokenizer, metrics
        self.prompts, self.texts = prompts, texts

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write an answer to every prompt, on the main process, into the log and the metrics."""
        if not state.is_world_process_zero:
            return
        written = [self._write(text, adds) for text, adds in self.texts]
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(self.prompts, written, strict=True)]
        self.metrics.write(state.global_step, {"samples": samples})
        for sample in samples:
            _log.info(f"sample at step {state.global_step:,}: {sample['prompt']}\n  {sample['text']}")

    def _write(self, text: str, add_special_tokens: bool) -> str:
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        inputs = self.tokenizer(text, return_tensors="pt", add_special_tokens=add_special_tokens)
        ids, mask = (inputs[name].to(self.trainer.args.device) for name in ("input_ids", "attention_mask"))
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                written = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=_NEW_TOKENS,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
        finally:
            model.train(was_training)
        return str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
