"""Data: sources, filters, mixing, templates, tokens, labels, ids, fingerprints, and what is said about bad data."""

import csv
import json

import numpy as np
import pytest
from helpers import tiny_tokenizer, write_jsonl

from tokenseek.config import DataConfig
from tokenseek.data import prepare_dataset
from tokenseek.data.chat import ChatRenderer
from tokenseek.data.encoding import tokenizer_fingerprint
from tokenseek.data.templates import Ends, render_instruction
from tokenseek.data.toy import make_word_problems
from tokenseek.errors import UserError

ROWS = [
    {"instruction": "Add 1 and 2.", "input": "", "response": "3", "source": "math"},
    {"instruction": "Name the capital.", "input": "France", "response": "Paris", "source": "geo"},
    {"instruction": "Say nothing.", "input": None, "response": "...", "source": None},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def rows_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def data_config(*sources, **options) -> DataConfig:
    return DataConfig.model_validate({"sources": list(sources), **options})


def prepare(*sources, tokenizer=None, **options):
    return prepare_dataset(data_config(*sources, **options), tokenizer or tiny_tokenizer())


def supervised_text(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def refusal(*sources, tokenizer=None, **options) -> str:
    with pytest.raises(UserError) as error:
        prepare(*sources, tokenizer=tokenizer, **options)
    return str(error.value)


def test_alpaca_template_of_the_paper(rows_file):
    """Section S1.1: with input, and Stanford's form without."""
    tokenizer = tiny_tokenizer()
    dataset = prepare({"path": str(rows_file)}).dataset
    assert dataset.column_names == ["example_id", "input_ids", "labels"]
    without, with_input, missing = (tokenizer.decode(ids) for ids in dataset["input_ids"])
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:\n3</s>"
    )
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\nParis</s>"
    )
    assert "### Input" not in missing
    assert [supervised_text(tokenizer, row) for row in dataset] == ["3</s>", "Paris</s>", "...</s>"]


@pytest.mark.parametrize("bos", [False, True])
def test_tokens_are_those_of_the_whole_text(bos, rows_file):
    tokenizer = tiny_tokenizer(bos)
    for row, example in zip(ROWS, prepare({"path": str(rows_file)}, tokenizer=tokenizer).dataset, strict=True):
        text = render_instruction(
            "alpaca", row["instruction"], row["input"] or "", row["response"], Ends(eos="</s>")
        ).text
        assert example["input_ids"] == tokenizer(text)["input_ids"]
        assert (example["input_ids"][0] == tokenizer.bos_token_id) == bos
        assert example["labels"][0] == -100
        kept = [(i, t) for i, t in zip(example["labels"], example["input_ids"], strict=True) if i != -100]
        assert all(label == token for label, token in kept)  # not shifted


def test_eos_is_optional_and_never_doubled(rows_file):
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    plain = prepare({"path": str(rows_file)}, append_eos=False).dataset[0]
    assert supervised_text(tokenizer, plain) == "3"
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    adds_itself = prepare({"path": str(rows_file)}, tokenizer=tokenizer).dataset[0]
    assert supervised_text(tokenizer, adds_itself) == "3</s>"
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert "data.append_eos: the tokenizer has no end-of-sequence token" in refusal(
        {"path": str(rows_file)}, tokenizer=tokenizer
    )


def test_labels_of_the_sequence(rows_file):
    for example in prepare({"path": str(rows_file)}, labels="sequence").dataset:
        assert example["labels"] == example["input_ids"]


def test_plain_text_carries_the_loss(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", [{"body": "one two"}, {"body": "three"}])
    tokenizer = tiny_tokenizer(bos=True)
    dataset = prepare({"path": str(path), "kind": "text", "columns": {"text": "body"}}, tokenizer=tokenizer).dataset
    assert tokenizer.decode(dataset[0]["input_ids"]) == "<s>one two</s>"
    assert supervised_text(tokenizer, dataset[0]) == "one two</s>"


def test_chat_supervises_every_assistant_turn(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": CHAT[1:3]}])
    tokenizer = tiny_tokenizer(bos=True)
    dataset = prepare({"path": str(path), "kind": "chat"}, tokenizer=tokenizer).dataset
    assert tokenizer.decode(dataset[0]["input_ids"]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert supervised_text(tokenizer, dataset[0]) == "2<|im_end|>\nIt is 4.<|im_end|>\n"
    assert supervised_text(tokenizer, dataset[1]) == "2<|im_end|>\n"


def test_chat_template_with_a_date_gives_the_same_text_every_day():
    tokenizer = tiny_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}" + tiny_tokenizer().chat_template)
    [rendered] = ChatRenderer(tokenizer).render(CHAT)
    assert rendered.text.startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "hi"}], "no message of role assistant"),
        (
            [{"who": "user", "says": "hi"}],
            "chat.jsonl, line 1: column 'messages': message 0 has the keys ['says', 'who']",
        ),
        (None, "holds no list of messages"),
    ],
)
def test_bad_conversations(tmp_path, messages, expected):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages, "n": 1}])
    assert expected in refusal({"path": str(path), "kind": "chat"})


def test_chat_needs_a_chat_template(tmp_path):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    message = refusal({"path": str(path), "kind": "chat"}, tokenizer=tiny_tokenizer(chat_template=None))
    assert "rows of kind chat need a tokenizer with a chat template" in message


def test_truncation_keeps_the_first_tokens_and_counts(rows_file):
    whole = prepare({"path": str(rows_file)})
    lengths = [len(ids) for ids in whole.dataset["input_ids"]]
    limit = sorted(lengths)[1]
    cut = prepare({"path": str(rows_file)}, max_length=limit)
    for before, after in zip(whole.dataset, cut.dataset, strict=True):
        assert after["input_ids"] == before["input_ids"][:limit]
        assert after["labels"] == before["labels"][:limit]
    assert (cut.report.truncated_examples, cut.report.tokens_cut) == (1, max(lengths) - limit)
    assert cut.report.tokens == sum(min(length, limit) for length in lengths)
    assert (whole.report.truncated_examples, whole.report.tokens_cut) == (0, 0)


def test_examples_without_a_supervised_token_are_kept_and_counted(rows_file):
    prepared = prepare({"path": str(rows_file)}, max_length=10)
    assert len(prepared.dataset) == 3
    assert (prepared.report.unsupervised_examples, prepared.report.supervised_tokens) == (3, 0)
    assert "3 examples have no token with a loss" in str(prepared.report)


def test_ids_are_stable_unique_and_follow_content_and_order(rows_file, tmp_path):
    first = prepare({"path": str(rows_file)}).dataset["example_id"]
    again = prepare({"path": str(write_jsonl(tmp_path / "copy.jsonl", ROWS))}).dataset["example_id"]
    assert list(first) == list(again)
    assert [example_id[:9] for example_id in first] == ["00000000-", "00000001-", "00000002-"]
    swapped = prepare({"path": str(write_jsonl(tmp_path / "swapped.jsonl", ROWS[::-1]))}).dataset["example_id"]
    assert [x[9:] for x in swapped] == [x[9:] for x in first][::-1]
    twice = prepare({"path": str(rows_file)}, {"path": str(rows_file)}).dataset["example_id"]
    assert len(set(twice)) == 6


def test_fingerprints_change_with_their_own_field_only(rows_file, tmp_path):
    source = {"path": str(rows_file)}
    base = prepare(source).fingerprints
    assert set(base) == {"tokenizer", "template", "data", "max_length", "labels"}

    def changed(**fingerprints):
        return {key for key in base if base[key] != fingerprints[key]}

    assert changed(**prepare(source, max_length=99).fingerprints) == {"max_length"}
    assert changed(**prepare(source, labels="sequence").fingerprints) == {"labels"}
    assert changed(**prepare(source, template="plain").fingerprints) == {"template", "data"}
    assert changed(**prepare(source, append_eos=False).fingerprints) == {"template", "data"}
    assert changed(**prepare(source, limit=2).fingerprints) == {"data"}
    assert changed(**prepare(source, tokenizer=tiny_tokenizer(bos=True)).fingerprints) == {"tokenizer"}
    assert changed(**prepare(source, num_proc=2).fingerprints) == set()


def test_tokenizer_fingerprint_ignores_the_last_calls_padding():
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before


def test_chat_template_is_part_of_the_template_fingerprint(tmp_path):
    source = {"path": str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])), "kind": "chat"}
    other = tiny_tokenizer(chat_template=tiny_tokenizer().chat_template + "{# same text #}")
    first, second = prepare(source).fingerprints, prepare(source, tokenizer=other).fingerprints
    assert {key for key in first if first[key] != second[key]} == {"template"}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder"])
def test_local_files_of_every_kind(tmp_path, kind):
    rows = [{key: row[key] for key in ("instruction", "response")} for row in ROWS]
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "response"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.mkdir()
        write_jsonl(path / "b.jsonl", rows[1:])
        write_jsonl(path / "a.jsonl", rows[:1])
        (path / "README.md").write_text("not data")
    expected = prepare({"path": str(write_jsonl(tmp_path / "reference.jsonl", rows))}).dataset
    assert prepare({"path": str(path)}).dataset.to_list() == expected.to_list()


def test_filters(rows_file, caplog):
    source = {"path": str(rows_file)}
    dropped = prepare({**source, "drop": {"source": ["geo"]}})
    assert (dropped.report.rows_read, dropped.report.rows_filtered, dropped.report.examples) == (3, 1, 2)
    assert len(prepare({**source, "drop": {"source": [None]}}).dataset) == 2
    assert len(prepare({**source, "keep": {"source": ["geo", "math"]}}).dataset) == 2
    assert "no row" in refusal({**source, "drop": {"source": ["geo", "math", None]}})
    assert "data.sources.0.drop: the data has no column 'sorce'; did you mean source?" in refusal(
        {**source, "drop": {"sorce": ["geo"]}}
    )


def test_rows_weights_limit_and_shuffle(tmp_path):
    paths = []
    for name, count in (("a", 40), ("b", 10)):
        rows = [{"text": f"{name} {number}"} for number in range(count)]
        paths.append(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)))
    a, b = ({"path": path, "kind": "text"} for path in paths)
    tokenizer = tiny_tokenizer()

    def texts(*sources, **options):
        dataset = prepare(*sources, append_eos=False, **options).dataset
        return [tokenizer.decode(ids) for ids in dataset["input_ids"]]

    def counts(*sources):
        names = [text[0] for text in texts(*sources)]
        return names.count("a"), names.count("b")

    assert counts(a, b) == (40, 10)
    assert counts({**a, "rows": 7}, b) == (7, 10)
    assert counts({**a, "weight": 1}, {**b, "weight": 1}) == (10, 10)
    assert counts({**a, "weight": 2}, {**b, "weight": 1}) == (20, 10)
    assert counts({**a, "weight": 8}, {**b, "weight": 1}) == (40, 5)
    assert counts({**a, "weight": 1}, {**b, "rows": 3}) == (40, 3)
    drawn = texts({**a, "rows": 7})
    assert drawn == texts({**a, "rows": 7}) != texts({**a, "rows": 7, "seed": 1})
    assert len(set(drawn)) == 7
    assert drawn == sorted(drawn, key=lambda text: int(text[2:]))
    assert texts(a, b, limit=3) == ["a 0", "a 1", "a 2"]
    shuffled = texts(a, b, shuffle=True)
    assert sorted(shuffled) == sorted(texts(a, b)) and shuffled != texts(a, b)
    assert texts(a, b, shuffle=True, limit=3) == shuffled[:3] != texts(a, b, shuffle=True, limit=3, seed=1)
    assert "data.sources.1.rows: 11 rows asked for, but the source has 10" in refusal(a, {**b, "rows": 11})


def test_kinds_can_be_mixed(rows_file, tmp_path):
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "free"}])
    tokenizer = tiny_tokenizer(bos=True)
    dataset = prepare(
        {"path": str(rows_file)},
        {"path": str(chat), "kind": "chat"},
        {"path": str(text), "kind": "text"},
        tokenizer=tokenizer,
    ).dataset
    starts_with_bos = [ids[0] == tokenizer.bos_token_id for ids in dataset["input_ids"]]
    assert starts_with_bos == [True, True, True, False, True]  # a chat template writes its own


def test_missing_column_lists_the_columns(rows_file):
    message = refusal({"path": str(rows_file), "columns": {"response": "respnse"}})
    assert "data.sources.0.columns.response: the data has no column 'respnse'; did you mean response?" in message
    assert "instruction, input, response, source" in message
    assert "columns.input" in refusal({"path": str(rows_file), "columns": {"input": "context"}})


def test_a_column_that_no_other_setting_names_was_meant(tmp_path):
    problems = write_jsonl(tmp_path / "problems.jsonl", make_word_problems(2))
    source = {"path": str(problems), "columns": {"instruction": "question", "response": "solution"}}
    assert "no column 'solution'; did you mean answer?; its columns are question, answer" in refusal(source)


def test_eval_data_is_named_as_such():
    with pytest.raises(UserError, match="eval_data.sources.0.path: no file or folder 'nowhere.jsonl'"):
        prepare_dataset(data_config({"path": "nowhere.jsonl"}), tiny_tokenizer(), section="eval_data")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", "is empty"),
        ("empty.csv", "instruction,response\n", "no rows in"),
        ("broken.jsonl", "{'not': json\n", "broken.jsonl, line 1: not valid JSON"),
        ("data.txt", "text", "accepted is one kind of .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_unusable_files(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    message = refusal({"path": str(tmp_path / name)})
    assert message.startswith("data.sources.0") and expected in message


def test_unusable_folders(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "holds no file of the kinds .json" in refusal({"path": str(tmp_path / "folder")})
    (tmp_path / "folder/a.csv").write_text("a\n1\n")
    write_jsonl(tmp_path / "folder/b.jsonl", [{"a": 1}])
    assert "is of kind ['.csv', '.jsonl']; accepted is one kind" in refusal({"path": str(tmp_path / "folder")})


def test_unreachable_hub_data_set(monkeypatch):
    monkeypatch.setattr(
        "tokenseek.data.sources.load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("offline"))
    )
    assert "data.sources.0.name: cannot load the data set 'no/such' (split 'train'): offline" in refusal(
        {"name": "no/such"}
    )


def test_cells_that_are_no_text(tmp_path):
    rows = [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": None}]
    message = refusal({"path": str(write_jsonl(tmp_path / "none.jsonl", rows))})
    assert "data.sources.0: none.jsonl, line 2: column 'response' holds nothing" in message
    assert "data.sources.0.drop: {response: [null]}" in message
    tokenizer = tiny_tokenizer()
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"instruction": "1 + 1", "response": 2}])
    assert supervised_text(tokenizer, prepare({"path": str(numbers)}).dataset[0]) == "2</s>"


def test_an_example_without_tokens_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}, {"text": ""}])
    assert "text.jsonl, line 2: the example has no tokens" in refusal(
        {"path": str(path), "kind": "text"}, append_eos=False
    )


def test_a_slow_tokenizer_is_refused(rows_file):
    class Slow:
        is_fast = False

    assert "Slow is a slow tokenizer" in refusal({"path": str(rows_file)}, tokenizer=Slow())


def test_template_digest_and_cache_are_read_back(rows_file):
    first, second = prepare({"path": str(rows_file)}), prepare({"path": str(rows_file)})
    assert first.fingerprints == second.fingerprints and first.report == second.report
    assert first.dataset.to_list() == second.dataset.to_list()


def test_offsets_of_characters_of_several_bytes(tmp_path):
    """A character may be split over tokens, each of which points to the whole character."""
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "héllo 🙂", "response": "🙂 ça va"}])
    example = prepare({"path": str(path)}).dataset[0]
    assert supervised_text(tokenizer, example) == "🙂 ça va</s>"
    carries_loss = np.asarray(example["labels"]) != -100
    assert (np.diff(carries_loss.astype(int)) >= 0).all()


def test_sentencepiece_style_tokenizer(rows_file):
    """Llama 2's kind: a space is put in front of the text, but never at the seam of prompt and response."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    texts = [value for row in ROWS for value in (row["instruction"], row["response"])]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    example = prepare({"path": str(rows_file)}, tokenizer=tokenizer).dataset[1]
    response = [label for label in example["labels"] if label != -100]
    assert "".join(tokenizer.convert_ids_to_tokens(response)) == "Paris</s>"
    assert tokenizer.convert_ids_to_tokens(example["input_ids"])[0].startswith("▁")


def test_word_problems_are_seeded_varied_and_correct():
    problems = make_word_problems(300, seed=7)
    assert problems == make_word_problems(300, seed=7) != make_word_problems(300, seed=8)
    assert problems[:40] == make_word_problems(40, seed=7)
    assert len({problem["question"] for problem in problems}) == 300
    assert len({" ".join(problem["question"].split()[-3:-1]) for problem in problems}) >= 8
    lengths = [len(problem["question"]) + len(problem["answer"]) for problem in problems]
    assert max(lengths) > 3 * min(lengths)
    for problem in problems:
        *steps, result = problem["answer"].split("\n")
        assert result.startswith("#### ") and result[5:] in steps[-1]
        for step in steps:  # every sum that is written out is right
            for left, right in zip(step.split(" = "), step.split(" = ")[1:], strict=False):
                expression = left[max(left.rfind(c) for c in "abcdefghijklmnopqrstuvwxyz,") + 1 :]
                if any(sign in expression for sign in "*+-/"):
                    assert eval(expression) == int(right.split()[0].rstrip(".")), step
    with pytest.raises(UserError, match="0 to 5000"):
        make_word_problems(5001)
