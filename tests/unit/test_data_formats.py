"""Which format rows are in is recognised from the rows, and read as such."""

import json

import pytest
from helpers import tiny_tokenizer, write_jsonl

from tokenseek.config import DataConfig, SourceConfig
from tokenseek.data import prepare_dataset, recognise
from tokenseek.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
TASK, PAIR, SPLIT = {"instruction": "Hi"}, "instruction and response", "prompt and completion"
ANSWER = "Hi\n\n⟦Yo</s>⟧"
CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>\n⟧"


def marked(tokenizer, example) -> str:
    prompt = [token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label == -100]
    learned = [label for label in example["labels"] if label != -100]
    assert example["labels"] == [-100] * len(prompt) + learned
    return f"{tokenizer.decode(prompt)}⟦{tokenizer.decode(learned)}⟧"


@pytest.mark.parametrize(
    ("row", "name", "columns", "unread", "text"),
    [
        ({**TASK, "input": "", "output": "Yo"}, "Alpaca", ["instruction", "input", "output"], [], ANSWER),
        ({**TASK, "input": "you", "output": "Yo"}, "Alpaca", [*TASK, "input", "output"], [], f"Hi\n\nyou{ANSWER[2:]}"),
        ({"id": 1, "question": "Hi", "answer": "Yo"}, PAIR, ["question", "answer"], ["id"], ANSWER),
        ({"Question": "Hi", "Answer": 7}, PAIR, ["Question", "Answer"], [], "Hi\n\n⟦7</s>⟧"),
        ({"prompt": "Hi", "response": "Yo"}, PAIR, ["prompt", "response"], [], ANSWER),
        ({"input": "Hi", "output": "Yo"}, PAIR, ["input", "output"], [], ANSWER),
        ({"prompt": "Hi", "completion": " Yo"}, SPLIT, ["prompt", "completion"], [], "Hi⟦ Yo</s>⟧"),
        ({"prompt": [MESSAGES[0]], "completion": [MESSAGES[1]]}, SPLIT, ["prompt", "completion"], [], CHATML),
        ({"messages": MESSAGES, "prompt": "Hi", "n": 1}, "chat messages", ["messages"], ["prompt", "n"], CHATML),
        ({"messages": json.dumps(MESSAGES)}, "chat messages", ["messages"], [], CHATML),
        ({"conversation": MESSAGES}, "chat messages", ["conversation"], [], CHATML),
        ({"conversations": SHAREGPT, "tools": None}, "ShareGPT conversations", ["conversations", "tools"], [], CHATML),
        ({"text": "Hi Yo", "meta": {"a": 1}}, "plain text", ["text"], ["meta"], "⟦Hi Yo</s>⟧"),
        ({"body": "Hi Yo"}, "plain text", ["body"], [], "⟦Hi Yo</s>⟧"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else None,
)  # fmt: skip
def test_formats(tmp_path, row, name, columns, unread, text):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    recognised = recognise(SourceConfig(path=str(path)))
    assert (recognised.name, list(recognised.columns.values()), list(recognised.unread)) == (name, columns, unread)
    tokenizer = tiny_tokenizer()
    data = {"sources": [{"path": str(path), "kind": "auto"}], "template": "plain"}
    prepared = prepare_dataset(DataConfig.model_validate(data), tokenizer)
    assert marked(tokenizer, prepared.dataset[0]) == text
    [line] = prepared.report.sources
    assert line.startswith(f"{path}: 1 rows, {name} (")
    # The same settings, written out.
    source = recognised.of(SourceConfig(path=str(path))).model_dump()
    again = prepare_dataset(DataConfig.model_validate({"sources": [source], "template": "plain"}), tokenizer)
    assert again.fingerprints == prepared.fingerprints


def test_loss_in_conversational_prompts_is_on_the_completion(tmp_path):
    prompt = [*MESSAGES, {"role": "user", "content": "And?"}]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": [{"role": "assistant", "content": "Go"}]}]
    )
    tokenizer = tiny_tokenizer()
    data = DataConfig.model_validate({"sources": [{"path": str(path), "kind": "completion"}]})
    assert marked(tokenizer, prepare_dataset(data, tokenizer).dataset[0]) == (
        CHATML.replace("⟦", "").replace("⟧", "") + CHATML.replace("Hi", "And?").replace("Yo", "Go")
    )


def test_the_first_rows_may_lack_cells(tmp_path):
    rows = [{"text": None, "question": None, "answer": None}, {"text": None, "question": "a", "answer": "b"}]
    assert recognise(SourceConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))).kind == "instruction"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["preference", "{prompt: prompt, completion: chosen}"]),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, ["preference pairs", "kind=chat", "columns={messages: chosen}"]),
        ({"prompt": "Hi", "completion": "a", "label": True}, ["judged answers", "KTO", "keep={label: [true]}"]),
        ({"a": "x", "b": "y"}, ["rows.jsonl, line 1", "none of the formats", "a, b", "{instruction: a, response: b}"]),
        ({"messages": [1, 2], "x": 1}, ["none of the formats"]),
    ],
)  # fmt: skip
def test_what_is_no_training_data_is_refused(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        recognise(SourceConfig(path=str(path)))
    assert str(error.value).startswith("data.sources.0:") and all(part in str(error.value) for part in expected)


def test_the_advice_of_a_refusal_works(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hi", "chosen": " Yo", "rejected": "b"}])
    source = {"path": str(path), "kind": "completion", "columns": {"prompt": "prompt", "completion": "chosen"}}
    tokenizer = tiny_tokenizer()
    dataset = prepare_dataset(DataConfig.model_validate({"sources": [source]}), tokenizer).dataset
    assert marked(tokenizer, dataset[0]) == "Hi⟦ Yo</s>⟧"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a", "answer": "b"}, "response (instruction from 'question', response from 'answer'): set data."),
        ({"messages": MESSAGES}, "look like chat messages (messages): set data.sources.0.kind=auto"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the rows are preference pairs"),
    ],
)  # fmt: skip
def test_a_missing_column_says_what_the_rows_look_like(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(UserError) as error:
        prepare_dataset(DataConfig.model_validate({"sources": [{"path": str(path)}]}), tiny_tokenizer())
    assert "data.sources.0.columns.instruction: the data has no column 'instruction'" in str(error.value)
    assert expected in str(error.value)


def test_columns_that_are_not_read_are_told(tmp_path):
    row = {"instruction": "a", "response": "b", "history": [["c", "d"]], "system": "e"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    report = prepare_dataset(DataConfig.model_validate({"sources": [{"path": str(path)}]}), tiny_tokenizer()).report
    first, second = str(report).splitlines()[:2]
    assert first == f"{path}: 1 rows, instruction (instruction, response; not read: history, system)"
    assert second.startswith("template: alpaca (data.template); loss on ")


def test_columns_belong_to_a_kind():
    with pytest.raises(ValueError, match="are not read by kind auto; name the kind"):
        SourceConfig(path="x.jsonl", kind="auto", columns={"messages": "m"})
    with pytest.raises(ValueError, match=r"columns \['messages'\] are not read by kind completion; it reads"):
        SourceConfig(path="x.jsonl", kind="completion", columns={"messages": "m"})


@pytest.mark.parametrize("template", ["chat", "auto"])
def test_instructions_by_the_chat_template(tmp_path, template):
    row = {"instruction": "Hi", "input": "you", "response": "Yo"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "input": ""}])
    data = DataConfig.model_validate({"sources": [{"path": str(path)}], "template": template})
    tokenizer = tiny_tokenizer()
    prepared = prepare_dataset(data, tokenizer)
    assert [marked(tokenizer, example) for example in prepared.dataset] == [CHATML.replace("Hi", "Hi\n\nyou"), CHATML]
    base = tiny_tokenizer(chat_template=None)
    if template == "auto":
        assert "### Instruction:" in base.decode(prepare_dataset(data, base).dataset[0]["input_ids"])
    else:
        with pytest.raises(UserError, match="need a tokenizer with a chat template.*data.template=alpaca"):
            prepare_dataset(data, base)


def test_hold_out_keeps_the_turns_of_a_conversation_together(tmp_path):
    from tokenseek.data import hold_out

    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}!{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [{"messages": [*MESSAGES, {"role": "user", "content": str(n)}, MESSAGES[1]]} for n in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"sources": [{"path": str(path), "kind": "chat"}], "rewritten_turns": "separate", "limit": 5}
    dataset = prepare_dataset(DataConfig.model_validate(data), tiny_tokenizer(chat_template=template)).dataset
    assert len(dataset) == 10  # of 5 conversations
    kept, held = (part["example_id"][:] for part in hold_out(dataset, 2, seed=0))
    assert (len(kept), len(held)) == (6, 4)
    assert {example_id[:8] for example_id in kept}.isdisjoint({example_id[:8] for example_id in held})
