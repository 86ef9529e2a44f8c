"""Tokens and labels of conversations under the chat templates of well-known models, each written out by hand.

What carries a loss stands between ⟦ and ⟧.
"""

import pytest
from chat_templates import MODELS, chat_tokenizer
from helpers import tiny_tokenizer, write_jsonl

from tokenseek.config import DataConfig
from tokenseek.data import prepare_dataset
from tokenseek.data.chat import ChatRenderer
from tokenseek.data.messages import read_messages, read_tools
from tokenseek.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def called(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ONE = [user("Hi"), assistant("Yo")]
TWO = [*ONE, user("And?"), assistant("Go")]
THOUGHT = [user("Hi"), assistant("<think>\nhm\n</think>\n\nYo")]
THOUGHTS = [*THOUGHT, user("And?"), assistant("<think>\nok\n</think>\n\nGo")]
CALL = [
    user("1 + 2?"),
    assistant(None, tool_calls=[called(a=1, b=2)]),
    {"role": "tool", "content": "3"},
    assistant("3."),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def prepared(tmp_path, tokenizer, row, **options):
    path = write_jsonl(tmp_path / "chat.jsonl", [row])
    data = {"sources": [{"path": str(path), "kind": "chat"}], **options}
    return prepare_dataset(DataConfig.model_validate(data), tokenizer)


def marked_tokens(tokenizer, example) -> str:
    """Text of the tokens, with ⟦ and ⟧ around runs of tokens that carry a loss."""
    pieces, runs = [], []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
        if not runs or runs[-1] != (label != -100):
            runs.append(label != -100)
            pieces.append([])
        pieces[-1].append(token)
    texts = [tokenizer.decode(piece) for piece in pieces]
    return "".join(f"⟦{text}⟧" if loss else text for text, loss in zip(texts, runs, strict=True))


def examples_of(tmp_path, name, messages, **options):
    tokenizer = chat_tokenizer(name)
    dataset = prepared(tmp_path, tokenizer, {"messages": messages}, **options).dataset
    for example in dataset:
        ids = example["input_ids"]
        if tokenizer.bos_token and name != "smollm 2":  # whose BOS begins every turn
            begins = ids.count(tokenizer.bos_token_id)
            assert begins == (len(messages) // 2 if name == "llama 2" else 0 if "phi" in name or "gpt" in name else 1)
    return [marked_tokens(tokenizer, example) for example in dataset]


LLAMA_2 = "<s>[INST] Hi [/INST]⟦ Yo </s>⟧"
LLAMA_3 = "<|begin_of_text|>{system}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
LLAMA_3 += "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yo<|eot_id|>⟧"
LLAMA_3_AND = "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
LLAMA_3_AND += "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Go<|eot_id|>⟧"
LLAMA_31_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
LLAMA_31_SYSTEM += "Today Date: 26 Jul 2024\n\n<|eot_id|>"
HI, AND = (
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n",
)
QWEN_25 = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
GEMMA = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yo<end_of_turn>\n⟧"
GEMMA_AND = "<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n⟦Go<end_of_turn>\n⟧"
PHI_3 = "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Yo<|end|>\n"
PHI_3_AND = "⟧<|user|>\nAnd?<|end|>\n<|assistant|>\n⟦Go<|end|>\n<|endoftext|>⟧"
PHI_4 = "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>⟦Yo<|im_end|>⟧"
DEEPSEEK = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>⟦Yo<｜end▁of▁sentence｜>⟧"
DEEPSEEK_AND = "<｜User｜>And?<｜Assistant｜>⟦Go<｜end▁of▁sentence｜>⟧"
GPT_OSS = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 26 Jul 2024\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
    "⟦<|channel|>final<|message|>Yo"
)
SMOLLM_2 = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
# SmolLM 3 marks the whole turn as generated.
SMOLLM_3 = ["<|im_start|>user\nHi<|im_end|>\n⟦<|im_start|>assistant\n<think>\n\n</think>\nYo<|im_end|>\n⟧"]
SMOLLM_3 += ["<|im_start|>user\nAnd?<|im_end|>\n⟦<|im_start|>assistant\n<think>\n\n</think>\nGo<|im_end|>\n⟧"]

# One turn, and two where the template leaves the first one as it was.
PLAIN = {
    "llama 2": (LLAMA_2, LLAMA_2 + "<s>[INST] And? [/INST]⟦ Go </s>⟧"),
    "llama 3": (LLAMA_3.format(system=""), LLAMA_3.format(system="") + LLAMA_3_AND),
    "llama 3.1": (LLAMA_3.format(system=LLAMA_31_SYSTEM), LLAMA_3.format(system=LLAMA_31_SYSTEM) + LLAMA_3_AND),
    "llama 3.2": (LLAMA_3.format(system=LLAMA_31_SYSTEM), LLAMA_3.format(system=LLAMA_31_SYSTEM) + LLAMA_3_AND),
    "qwen 2.5": (QWEN_25 + HI + "⟦Yo<|im_end|>\n⟧", QWEN_25 + HI + "⟦Yo<|im_end|>\n⟧" + AND + "⟦Go<|im_end|>\n⟧"),
    "qwen 3 instruct 2507": (HI + "⟦Yo<|im_end|>\n⟧", HI + "⟦Yo<|im_end|>\n⟧" + AND + "⟦Go<|im_end|>\n⟧"),
    "qwen 3 with marks": (
        HI + "⟦<think>\n\n</think>\n\nYo<|im_end|>\n⟧",
        HI + "⟦<think>\n\n</think>\n\nYo<|im_end|>\n⟧" + AND + "⟦<think>\n\n</think>\n\nGo<|im_end|>\n⟧",
    ),
    "gemma 2": (GEMMA, GEMMA + GEMMA_AND),
    "gemma 3": (GEMMA, GEMMA + GEMMA_AND),
    "phi 3": (PHI_3 + "<|endoftext|>⟧", PHI_3 + PHI_3_AND),
    "phi 3.5": (PHI_3 + "<|endoftext|>⟧", PHI_3 + PHI_3_AND),
    "phi 4": (PHI_4, PHI_4 + PHI_4.replace("Hi", "And?").replace("Yo", "Go")),
    "mistral": ("<s>[INST] Hi [/INST]⟦Yo</s>⟧", "<s>[INST] Hi [/INST]⟦Yo</s>⟧[INST] And? [/INST]⟦Go</s>⟧"),
    "deepseek v3": (DEEPSEEK, DEEPSEEK + DEEPSEEK_AND),
    "deepseek v3, thinking": (DEEPSEEK, DEEPSEEK + DEEPSEEK_AND),
    "deepseek r1": (DEEPSEEK, DEEPSEEK + DEEPSEEK_AND),
    # A history ends answers with <|end|>, the assistant with <|return|>: only the latter may be learned.
    "gpt-oss": (
        GPT_OSS + "<|return|>⟧",
        GPT_OSS + "⟧<|end|><|start|>user<|message|>And?<|end|><|start|>assistant"
        "⟦<|channel|>final<|message|>Go<|return|>⟧",
    ),
    "smollm 2": (SMOLLM_2 + HI + "⟦Yo<|im_end|>\n⟧", SMOLLM_2 + HI + "⟦Yo<|im_end|>\n⟧" + AND + "⟦Go<|im_end|>\n⟧"),
    "smollm 3": (SMOLLM_3[0], "".join(SMOLLM_3)),
}
# (the generation prompt's part, what is generated) of turns without reasoning and with it.
NO_THOUGHT, A_THOUGHT = "<think>\n\n</think>\n\n", "<think>\n{}\n</think>\n\n"
REWRITING = {
    "qwen 3": (("", NO_THOUGHT), ("", A_THOUGHT)),
    "qwen 3.5 think": (("<think>\n", "\n</think>\n\n"), ("<think>\n", "{}\n</think>\n\n")),
    "qwen 3.5 no think": ((NO_THOUGHT, ""), ("<think>\n", "{}\n</think>\n\n")),
    "qwen 3.6": (("<think>\n", "\n</think>\n\n"), ("<think>\n", "{}\n</think>\n\n")),
}


def test_every_model_is_checked():
    assert PLAIN.keys() | REWRITING.keys() == MODELS.keys()


@pytest.mark.parametrize("name", PLAIN, ids=lambda name: f"rows 7 and 8: {name}")
def test_templates_that_keep_history(tmp_path, name):
    one, two = PLAIN[name]
    assert examples_of(tmp_path, name, ONE) == [one]
    assert examples_of(tmp_path, name, TWO) == [two]
    # The last turn only: the first loses its marks.
    if name != "smollm 3":  # marks its header too, where a turn alone is told apart by the generation prompt
        head, _, last = two.rpartition("⟦")
        assert examples_of(tmp_path, name, TWO, loss_on="last") == [head.replace("⟦", "").replace("⟧", "") + "⟦" + last]


@pytest.mark.parametrize("name", REWRITING, ids=lambda name: f"rows 7 and 8: {name}")
def test_templates_that_rewrite_history(tmp_path, name):
    """An earlier turn is trained with all that the assistant generates, in an example that ends with it."""
    for (prompt, generated), one, two in zip(REWRITING[name], (ONE, THOUGHT), (TWO, THOUGHTS), strict=True):
        first = HI + prompt + "⟦" + generated.format("hm") + "Yo<|im_end|>\n⟧"
        history = HI + "Yo<|im_end|>\n"
        second = history + AND + prompt + "⟦" + generated.format("ok") + "Go<|im_end|>\n⟧"
        assert examples_of(tmp_path, name, one) == [first]
        with pytest.raises(UserError) as error:
            examples_of(tmp_path, name, two)
        assert "chat.jsonl, line 1" in str(error.value) and "message 1 differently" in str(error.value)
        assert "data.rewritten_turns=separate" in str(error.value) and "data.loss_on=last" in str(error.value)
        assert examples_of(tmp_path, name, two, loss_on="last") == [second]
        assert examples_of(tmp_path, name, two, rewritten_turns="separate") == [first, second]


def test_a_separate_turn_is_told_and_has_an_id_of_its_own(tmp_path):
    data = prepared(tmp_path, chat_tokenizer("qwen 3"), {"messages": TWO}, rewritten_turns="separate")
    assert [example_id[:10] for example_id in data.dataset["example_id"]] == [
        "00000000-" + data.dataset[0]["example_id"][9],
        "00000000.1",
    ]
    assert "1 examples were added" in str(data.report)


def test_only_rewritten_turns_are_trained_separately(tmp_path):
    """Qwen 3 keeps thoughts behind the last question: a call and the answer to it share an example."""
    thoughts = {"reasoning_content": "sum"}
    messages = [*ONE, user("1 + 2?"), {**CALL[1], **thoughts}, CALL[2], {**CALL[3], "reasoning_content": "so"}]
    first, second = examples_of(tmp_path, "qwen 3", messages, rewritten_turns="separate")
    assert first == HI + "⟦<think>\n\n</think>\n\nYo<|im_end|>\n⟧"
    assert second == (
        HI + "Yo<|im_end|>\n<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<think>\nsum\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
        "<|im_end|>\n⟧"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nso\n</think>\n\n3.<|im_end|>\n⟧"
    )


def test_template_options_are_given_to_the_template(tmp_path):
    without = examples_of(tmp_path, "qwen 3.5 think", ONE, template_options={"enable_thinking": False})
    assert without == [HI + "<think>\n\n</think>\n\n⟦Yo<|im_end|>\n⟧"]


CALLS = {
    "llama 3.1": '⟦{"name": "add", "parameters": {"a": 1, "b": 2}}<|eot_id|>⟧',
    "qwen 2.5": '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n⟧',
    "qwen 3 instruct 2507": '⟦<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n⟧',
    "qwen 3.5 no think": "⟦<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n"
    "</parameter>\n</function>\n</tool_call><|im_end|>\n⟧",
    # These want the arguments as text, and R1 a content that is null.
    "deepseek v3, thinking": "⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 1, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧',
    "deepseek r1": "⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    '{"a": 1, "b": 2}\n```<｜tool▁call▁end｜>⟧',
    "gpt-oss": '⟦ to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>⟧',
}


@pytest.mark.parametrize("name", CALLS, ids=lambda name: f"row 9: {name}")
@pytest.mark.parametrize("arguments", [{"a": 1, "b": 2}, '{"a": 1, "b": 2}'], ids=["object", "text"])
def test_calls_carry_the_loss_as_they_are_rendered(tmp_path, name, arguments):
    call = {"type": "function", "id": None, "function": {"name": "add", "arguments": arguments}}
    for message in ({"content": None}, {}, {"content": ""}):
        messages = [CALL[0], {"role": "assistant", **message, "tool_calls": [call]}, *CALL[2:]]
        [example] = examples_of(tmp_path, name, messages)
        assert example.count("⟦") == 2 and CALLS[name] in example


@pytest.mark.parametrize("name", ["llama 3", "phi 3", "smollm 2", "deepseek v3"])
def test_calls_that_a_template_does_not_render_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="line 1: the chat template does not render the tool calls of message 1"):
        examples_of(tmp_path, name, CALL)


@pytest.mark.parametrize("tools", [[TOOL], "json", TOOL], ids=lambda tools: f"row 10: {type(tools).__name__}")
def test_tools_are_given_to_the_template(tmp_path, tools):
    import json

    tokenizer = chat_tokenizer("qwen 2.5")
    row = {"messages": ONE, "tools": json.dumps([TOOL]) if tools == "json" else tools}
    data = prepared(tmp_path, tokenizer, row)
    text = tokenizer.decode(data.dataset[0]["input_ids"])
    assert text == tokenizer.apply_chat_template(ONE, tools=[TOOL], tokenize=False) and '"description": "Adds."' in text
    for nothing in (None, [], "[]", ""):
        data = prepared(tmp_path, tokenizer, {"messages": ONE, "tools": nothing})
        assert marked_tokens(tokenizer, data.dataset[0]) == PLAIN["qwen 2.5"][0]


def test_tools_that_a_template_does_not_render_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not render tools.*columns.tools: ''"):
        prepared(tmp_path, chat_tokenizer("phi 3"), {"messages": ONE, "tools": [TOOL]})
    source = {"path": str(tmp_path / "chat.jsonl"), "kind": "chat", "columns": {"tools": ""}}
    data = DataConfig.model_validate({"sources": [source]})
    assert len(prepare_dataset(data, chat_tokenizer("phi 3")).dataset) == 1


def test_parquet_adds_no_fields_to_messages_and_tools(tmp_path):
    """Arrow gives every struct of a column all fields that one of them has; the others are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = {
        "type": "function",
        "function": {"name": "say", "parameters": {"properties": {"text": {"type": "string"}}}},
    }
    row = {"messages": CALL, "tools": [TOOL, other]}
    pq.write_table(pa.Table.from_pylist([row, {"messages": ONE, "tools": None}]), tmp_path / "chat.parquet")
    tokenizer = chat_tokenizer("qwen 2.5")
    path = write_jsonl(tmp_path / "chat.jsonl", [row, {"messages": ONE}])
    from_json, from_arrow = (
        prepare_dataset(
            DataConfig.model_validate({"sources": [{"path": str(file), "kind": "chat"}]}), tokenizer
        ).dataset
        for file in (path, tmp_path / "chat.parquet")
    )
    assert from_json["labels"][:] == from_arrow["labels"][:] and from_json["input_ids"][:] == from_arrow["input_ids"][:]
    assert "null" not in tokenizer.decode(from_arrow[0]["input_ids"])


def test_row_11_parts_of_text(tmp_path):
    messages = [
        user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]),
        assistant([{"type": "text", "text": "Yo"}]),
    ]
    for name in ("qwen 2.5", "gemma 3", "llama 3"):
        assert examples_of(tmp_path, name, messages) == [PLAIN[name][0]]
    messages[0]["content"].append({"type": "image_url", "image_url": "x"})
    with pytest.raises(
        UserError, match=r"line 1: column 'messages': message 0 \(user\) has a part of type 'image_url'"
    ):
        examples_of(tmp_path, "qwen 2.5", messages)


def test_row_12_a_conversation_brings_its_own_ends(tmp_path):
    own = [user("<|begin_of_text|>Hi"), assistant("Yo<|eot_id|>")]
    assert examples_of(tmp_path, "llama 3", own) == [PLAIN["llama 3"][0]]
    assert examples_of(tmp_path, "mistral", [user("<s>Hi"), assistant("Yo</s>")]) == [PLAIN["mistral"][0]]
    chatml = tiny_tokenizer()  # whose template writes no EOS: the data's own stays
    [example] = ChatRenderer(chatml).render([user("Hi"), assistant("Yo</s>")])
    assert example.text.endswith("Yo</s><|im_end|>\n")


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_row_13_sharegpt(tmp_path, system):
    conversation = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    expected = [*ONE] if system is None else [{"role": "system", "content": system}, *ONE]
    if system:
        conversation.insert(0, {"from": "system", "value": system})
    tokenizer = chat_tokenizer("qwen 2.5")
    path = write_jsonl(tmp_path / "chat.jsonl", [{"id": 1, "conversations": conversation}])
    named = {"path": str(path), "kind": "chat", "columns": {"messages": "conversations"}}
    for source in (named, {"path": str(path), "kind": "auto"}):
        data = prepare_dataset(DataConfig.model_validate({"sources": [source]}), tokenizer)
        assert tokenizer.decode(data.dataset[0]["input_ids"]) == tokenizer.apply_chat_template(expected, tokenize=False)
    if system:
        write_jsonl(path, [{"conversations": conversation[1:], "system": system}])
        data = prepare_dataset(DataConfig.model_validate({"sources": [named]}), tokenizer)
        assert tokenizer.decode(data.dataset[0]["input_ids"]) == tokenizer.apply_chat_template(expected, tokenize=False)


def test_sharegpt_calls():
    messages = read_messages(
        [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3."},
        ]
    )
    assert messages == [CALL[0], {**CALL[1]}, CALL[2], CALL[3]]


@pytest.mark.parametrize(
    ("fields", "loss_on", "expected"),
    [
        ([{"train": False}, {}], "all", ["Go"]),
        ([{"weight": 0}, {"weight": 1}], "all", ["Go"]),
        ([{"train": True}, {"train": False}], "all", ["Yo"]),
        ([{}, {"weight": 0.0}], "all", ["Yo"]),
        ([{"train": False}, {"train": False}], "all", []),
        ([{}, {}], "last", ["Go"]),
        ([{"train": True}, {}], "last", ["Go"]),
        ([{}, {"train": False}], "last", []),
    ],
)
@pytest.mark.parametrize("name", ["qwen 2.5", "qwen 3 with marks"])
def test_a_message_says_whether_it_is_trained(tmp_path, fields, loss_on, expected, name):
    messages = [TWO[0], {**TWO[1], **fields[0]}, TWO[2], {**TWO[3], **fields[1]}]
    [example] = examples_of(tmp_path, name, messages, loss_on=loss_on)
    learned = [part.partition("⟧")[0] for part in example.split("⟦")[1:]]
    thought = "" if name == "qwen 2.5" else "<think>\n\n</think>\n\n"
    assert learned == [f"{thought}{text}<|im_end|>\n" for text in expected]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{**user("Hi"), "train": True}, assistant("Yo")], r"message 0 \(user\) asks for a loss"),
        ([user("Hi"), assistant("Yo", weight=0.5)], "message 1: train or weight is 0.5"),
        ([user("Hi"), assistant(None)], r"message 1 \(assistant\) has no content"),
        ([user("Hi"), {"from": "robot", "value": "x"}], "message 1 is from 'robot'; accepted are human"),
        ([user("Hi"), {"role": "assistant", "from": "gpt", "content": "x"}], "message 1 has the keys"),
        ([user("Hi"), assistant({"a": 1})], r"message 1 \(assistant\): content is \{'a': 1\}"),
        ([user("Hi"), assistant(None, tool_calls=[{"x": 1}])], "a tool call has a function with name and arguments"),
        ([user("Hi"), "Yo"], "message 1 is 'Yo'; accepted are messages"),
        ([], "accepted is a list of messages"),
        ("no JSON", "accepted is a list of messages"),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, expected):
    with pytest.raises(UserError, match=f"data.sources.0: chat.jsonl, line 1: .*{expected}"):
        prepared(tmp_path, chat_tokenizer("qwen 2.5"), {"messages": messages})


def test_bad_tools_are_named():
    with pytest.raises(UserError, match="accepted as tools is a list of JSON schemas, got .'add'"):
        read_tools(["add"])


def test_text_that_a_template_leaves_out_is_told(tmp_path):
    report = prepared(tmp_path, chat_tokenizer("deepseek r1"), {"messages": THOUGHT}).report
    assert "WARNING: in 1 of 1 conversations the chat template leaves out text" in str(report)
    assert "chat.jsonl, line 1: message 1 (assistant)" in str(report)
    tool = [*ONE[:1], {"role": "tool", "content": "a fact"}, ONE[1]]
    assert "message 1 (tool)" in str(prepared(tmp_path, chat_tokenizer("phi 3"), {"messages": tool}).report)
    for name, messages in (("qwen 3", THOUGHT), ("llama 3.1", CALL), ("qwen 3.5 think", THOUGHT), ("gpt-oss", TWO)):
        assert "WARNING" not in str(prepared(tmp_path, chat_tokenizer(name), {"messages": messages}).report)


def test_an_answer_that_begins_like_the_generation_prompt():
    """The prompt opens `<think>`, which is no token of its own here; the answer begins with another `<`."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n<think>\n{% endif %}"
    )
    [example] = ChatRenderer(tiny_tokenizer(chat_template=template)).render([user("Hi"), assistant("<b>Yo</b>")])
    [(start, end)] = example.spans
    assert example.text[start:end] == "<b>Yo</b></s>"


def test_a_template_that_rewrites_the_question_is_refused():
    template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="renders the messages before message 1 differently once it follows"):
        ChatRenderer(tiny_tokenizer(chat_template=template)).render(ONE)


def test_a_loss_on_every_token_needs_no_turns(tmp_path):
    [example] = examples_of(tmp_path, "qwen 3", TWO, labels="sequence")
    assert example == f"⟦{HI}Yo<|im_end|>\n{AND}<think>\n\n</think>\n\nGo<|im_end|>\n⟧"
    [example] = examples_of(tmp_path, "qwen 2.5", ONE[:1], labels="sequence")
    assert example == f"⟦{QWEN_25}<|im_start|>user\nHi<|im_end|>\n⟧"
    assert examples_of(tmp_path, "qwen 2.5", ONE) == [PLAIN["qwen 2.5"][0]]  # not the other's cache
    with pytest.raises(
        ValueError, match="labels: sequence puts the loss on every token, and loss_on: last on one turn"
    ):
        examples_of(tmp_path, "qwen 3", TWO, labels="sequence", loss_on="last")
