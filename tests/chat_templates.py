"""Chat templates of well-known models, each with a tiny tokenizer that has its special tokens.

Most come from TRL's wheel, which carries the models' own. The others are written here after the models' public formats.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import pytest
from helpers import tiny_tokenizer


class ChatModel(NamedTuple):
    """`template` is the name of a file of TRL's, or the template itself; `words` are added but not special."""

    template: str
    eos: str
    bos: str = ""
    specials: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
_DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
             "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>",
             "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>")  # fmt: skip
_THINK = ("<think>", "</think>")

MODELS = {
    "llama 2": ChatModel(
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>",
    ),
    "llama 3": ChatModel("llama3.jinja", "<|eot_id|>", "<|begin_of_text|>", _LLAMA_3),
    "llama 3.1": ChatModel("llama3_1.jinja", "<|eot_id|>", "<|begin_of_text|>", _LLAMA_3),
    "llama 3.2": ChatModel("llama3_2.jinja", "<|eot_id|>", "<|begin_of_text|>", _LLAMA_3),
    "qwen 2.5": ChatModel("qwen2_5.jinja", "<|im_end|>", "", _CHATML, ("<tool_call>", "</tool_call>")),
    "qwen 3": ChatModel("qwen3.jinja", "<|im_end|>", "", _CHATML, _THINK),
    "qwen 3 instruct 2507": ChatModel("qwen3_instruct_2507.jinja", "<|im_end|>", "", _CHATML),
    "qwen 3.5 think": ChatModel("qwen3_5_think.jinja", "<|im_end|>", "", _CHATML, _THINK),
    "qwen 3.5 no think": ChatModel("qwen3_5_nothink.jinja", "<|im_end|>", "", _CHATML, _THINK),
    "qwen 3.6": ChatModel("qwen3_6.jinja", "<|im_end|>", "", _CHATML, _THINK),
    "qwen 3 with marks": ChatModel("qwen3_training.jinja", "<|im_end|>", "", _CHATML, _THINK),
    "gemma 2": ChatModel("gemma.jinja", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma 3": ChatModel("gemma3.jinja", "<eos>", "<bos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi 3": ChatModel("phi3.jinja", "<|endoftext|>", "<s>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi 3.5": ChatModel(
        "phi3_5.jinja", "<|endoftext|>", "<s>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    ),
    "phi 4": ChatModel(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
        "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|endoftext|>",
        "",
        (*_CHATML, "<|im_sep|>"),
    ),
    "mistral": ChatModel(
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "<s>",
    ),
    "deepseek v3": ChatModel(
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        _DEEPSEEK,
    ),
    "deepseek v3, thinking": ChatModel(
        "deepseekv3.jinja", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _DEEPSEEK, _THINK
    ),
    "deepseek r1": ChatModel(
        "deepseek_r1_distill.jinja", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", _DEEPSEEK, _THINK
    ),
    "gpt-oss": ChatModel(
        "gptoss.jinja",
        "<|return|>",
        "<|startoftext|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>"),
    ),
    "smollm 2": ChatModel(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        "<|im_start|>",
        _CHATML,
    ),
    # Without reasoning, SmolLM 3 writes an empty block of thought into the generation prompt and each turn.
    "smollm 3": ChatModel(
        "{% for message in messages %}"
        "{% if message.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + ('' if enable_thinking | default(false) else '<think>\n\n</think>\n') "
        "+ message.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if not (enable_thinking | default(false)) %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}",
        "<|im_end|>",
        "",
        _CHATML,
        _THINK,
    ),
}


def chat_tokenizer(name: str):
    """A tiny tokenizer with the chat template of a model."""
    model = MODELS[name]
    template = model.template
    if template.endswith(".jinja"):
        pytest.importorskip("trl")
        file = files("trl") / "chat_templates" / template
        if not file.is_file():
            pytest.skip(f"this version of TRL has no {template}")
        template = file.read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(bos=False, chat_template=template)
    special = [token for token in (model.eos, model.bos, *model.specials) if token]
    tokenizer.add_tokens(list(model.words))
    tokenizer.add_special_tokens({"eos_token": model.eos, **({"bos_token": model.bos} if model.bos else {})})
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    return tokenizer
