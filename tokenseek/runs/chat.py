"""`tokenseek chat`: a conversation with a trained model, in the template that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from tokenseek.config import DataConfig, load_config
from tokenseek.data.templates import TEMPLATES
from tokenseek.errors import UserError, first_line
from tokenseek.evaluation.run import load_network
from tokenseek.evaluation.subject import Subject
from tokenseek.models.checks import learned_positions
from tokenseek.models.loading import load_tokenizer, require_decoder


@dataclass
class Conversation:
    """A model, and what was said to it.

    Attributes:
        template: "chat", the tokenizer's; "alpaca" or "plain", of instructions, which know no earlier turns; or "none".
        template_options: further variables of a chat template.
        temperature: None for the model's own settings.
    """

    model: Any  # a PreTrainedModel, or a PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    template: str
    template_options: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    temperature: float | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def open(
        cls, subject: Subject, *, template: str | None = None, system: str | None = None, **options: Any
    ) -> Conversation:
        """Load the model of `subject`.

        Args:
            template: by default that of the run, else the tokenizer's chat template where it has one, else none.

        Raises:
            UserError: there is no such model, or no chat template, or a system message for another template.
        """
        require_decoder(subject.model, ditching=False)
        tokenizer = _tokenizer(subject)
        data = load_config(subject.run / "config.yaml").data if subject.run else None
        template = template or _template_of(data, tokenizer)
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("--template chat: the tokenizer has no chat template; give --template none.")
        if system and template != "chat":
            raise UserError(f"--system is for the template chat, and this is {template}; put it into the prompt.")
        model: Any = load_network(subject.model, subject.adapter, PartialState())
        messages = [{"role": "system", "content": system}] if system else []
        rendered_with = data.template_options if data else {}
        return cls(model, tokenizer, template, rendered_with, messages=messages, **options)

    def answer(self, text: str) -> str:
        """The model's answer, which is printed as it comes.

        Raises:
            UserError: prompt and answer have more tokens than the model has learned positions.
        """
        ids, is_chat = self._ids(text), self.template == "chat"
        room = (learned_positions(self.model) or float("inf")) - ids.shape[1]
        if room < 1:
            raise UserError(f"the conversation has {ids.shape[1]:,} tokens, and the model has no position for another.")
        sampling: dict[str, Any] = {}
        if self.temperature is not None:
            sampling = {"do_sample": self.temperature > 0}
            sampling |= {"temperature": self.temperature} if self.temperature > 0 else {}
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(min(room, self.max_new_tokens)),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
        answer = str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
        if is_chat:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return answer

    def forget(self) -> None:
        """Start over, with the same system message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _ids(self, text: str) -> torch.Tensor:
        if self.template == "chat":
            said = [*self.messages, {"role": "user", "content": text}]
            try:
                prompt = self.tokenizer.apply_chat_template(
                    said, add_generation_prompt=True, tokenize=False, **self.template_options
                )
            except Exception as error:  # templates raise what they like
                reason = first_line(error)
                raise UserError(f"the chat template does not take this conversation: {reason}") from error
            adds_special_tokens = False
        else:
            prompt = text
            if self.template != "none":
                prompt = TEMPLATES[self.template]["without_input"].format(instruction=text)
            adds_special_tokens = True
        ids = self.tokenizer(prompt, add_special_tokens=adds_special_tokens, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)


def _tokenizer(subject: Subject) -> PreTrainedTokenizerBase:
    folder = subject.adapter
    if folder and (Path(folder) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    return load_tokenizer(subject.model)


def _template_of(data: DataConfig | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """How a run's data were rendered."""
    has_chat = bool(tokenizer.chat_template)
    if data is None or data.sources[0].kind == "chat":
        return "chat" if has_chat else "none"
    if data.sources[0].kind in ("text", "completion"):
        return "none"
    if data.template == "auto":
        return "chat" if has_chat else "alpaca"
    return data.template
