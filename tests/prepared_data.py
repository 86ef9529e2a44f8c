"""What becomes of a data file: its texts, its answers, or the refusal."""

import pytest
from helpers import tiny_tokenizer

from tokenseek.config import DataConfig
from tokenseek.data import prepare_dataset
from tokenseek.errors import UserError


def prepare(path, tokenizer=None, source=(), **options):
    data = {"sources": [{"path": str(path), **dict(source)}], "template": "plain", **options}
    return prepare_dataset(DataConfig.model_validate(data), tokenizer or tiny_tokenizer())


def texts(path, **options):
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    return [tokenizer.decode(ids) for ids in prepare(path, tokenizer, **options).dataset["input_ids"]]


def answers(path, **options):
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    labels = prepare(path, tokenizer, **options).dataset["labels"]
    return [tokenizer.decode([label for label in row if label != -100]) for row in labels]


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as error:
        prepare(path, **options)
    return str(error.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
