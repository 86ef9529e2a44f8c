"""Things several tests need: a tokenizer made in-process, and rows written to files."""

import json
from functools import cache
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(bos: bool = False, chat_template: str | None = CHAT_TEMPLATE):
    """A byte-level BPE tokenizer of 400 tokens with EOS, padding, a ChatML template and, if asked for, a BOS."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(bos),
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=100_000,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@cache
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from tokenseek.data.toy import make_word_problems

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for problem in make_word_problems(50) for text in problem.values()]
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def _backend(bos: bool):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(_trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return backend


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
