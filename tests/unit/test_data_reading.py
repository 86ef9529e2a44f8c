"""Text reaches the model as its file has it: cells, numbers, encodings, huge rows, BOS and EOS."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny_tokenizer, write_jsonl
from prepared_data import answers, prepare, refusal, texts, write

from tokenseek.data import require_supervised
from tokenseek.data.encoding import Encoder
from tokenseek.data.reading import arrow_rows, parse_row
from tokenseek.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def write_csv(tmp_path, *cells):
    return write(tmp_path / "rows.csv", "instruction,response\n" + "".join(f"q,{cell}\n" for cell in cells))


@pytest.mark.parametrize(
    "cell",
    [
        "00501",
        "3.10",
        "NA",
        "null",
        "None",
        "True",
        "nan",
        "N/A",
        "12345678901234567890123",
        "1e5",
        "1_000",
        " x ",
        "-0",
    ],
    ids=lambda cell: f"rows 1 and 2: {cell}",
)
def test_csv_cells_are_text(tmp_path, cell):
    assert answers(write_csv(tmp_path, cell, "7")) == [f"{cell}</s>", "7</s>"]


def test_row_1_a_blank_cell_changes_no_other(tmp_path):
    path = write(tmp_path / "rows.csv", "instruction,input,response\na,18,1\nb,,2\nc,NA,3\nd,null,4\n")
    assert texts(path) == ["a\n\n18\n\n1</s>", "b\n\n2</s>", "c\n\nNA\n\n3</s>", "d\n\nnull\n\n4</s>"]


def test_a_blank_csv_answer_is_a_missing_value(tmp_path):
    message = refusal(write_csv(tmp_path, "1", ""))
    assert "rows.csv, line 3: column 'response' holds nothing" in message
    assert answers(tmp_path / "rows.csv", source={"drop": {"response": [None]}}) == ["1</s>"]


def test_a_csv_with_the_index_of_a_table(tmp_path):
    """pandas writes it without a name."""
    path = write(tmp_path / "rows.csv", ",instruction,response\n0,a,b\n1,c,d\n")
    assert texts(path) == ["a\n\nb</s>", "c\n\nd</s>"]


def test_csv_quotes_lines_and_tabs(tmp_path):
    path = write(tmp_path / "rows.csv", '\ufeffinstruction,response\r\n"a, ""b""","two\nlines"\r\n')
    assert texts(path) == ['a, "b"\n\ntwo\nlines</s>']
    path = write(tmp_path / "rows.tsv", "instruction\tresponse\na, b\tc\n")
    assert texts(path) == ["a, b\n\nc</s>"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("instruction,response\na,b\nq,x,y\n", "rows.csv, line 3: 3 cells in a table of 2 columns"),
        ('instruction,response\nq,"never closed\n', "rows.csv, line 2: not valid CSV"),
        ("response,response\na,b\n", "columns ['response'] stand in the header more than once"),
    ],
)
def test_unusable_csv(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path / "rows.csv", content))


@pytest.mark.parametrize("value", [1, "1"])
def test_filters_compare_texts_where_a_cell_is_text(tmp_path, value):
    path = write(tmp_path / "rows.csv", "instruction,response,keep\na,b,1\nc,d,0\n")
    assert answers(path, source={"keep": {"keep": [value]}}) == ["b</s>"]
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b", "keep": k} for k in (1, 0, True)]
    )
    assert answers(path, source={"keep": {"keep": [value]}}) == ["b</s>"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("5", "5"),
        ("2.5", "2.5"),
        ("3.10", "3.10"),
        ("1e5", "1e5"),
        ("-0", "-0"),
        ("9" * 5000, "9" * 5000),
        ("0.1", "0.1"),
    ],
    ids=lambda value: f"row 3: {value[:12]}",
)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_json_numbers_are_as_written(tmp_path, written, text, kind):
    rows = [f'{{"instruction": "a", "response": {written}}}', '{"instruction": "b", "response": 2.5}']
    content = "\n".join(rows) if kind == "jsonl" else "[" + ",\n ".join(rows) + "]"
    path = write(tmp_path / f"rows.{kind}", content)
    assert answers(path, max_length=8000) == [f"{text}</s>", "2.5</s>"]


def test_row_3_parquet_numbers(tmp_path):
    table = pa.table(
        {
            "instruction": ["a", "b", "c"],
            "response": pa.array([0.1, 3, 1e20], pa.float32()),
            "input": pa.array([float("nan"), 2.5, None], pa.float64()),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == ["a\n\n0.1</s>", "b\n\n2.5\n\n3.0</s>", "c\n\n1e+20</s>"]


def test_row_3_nan_is_a_missing_value(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"instruction": "a", "response": NaN}\n')
    assert "rows.jsonl, line 1: column 'response' holds nothing" in refusal(path)
    assert "Infinity is not a JSON value" in refusal(write(path, '{"instruction": "a", "response": Infinity}\n'))


def test_arrow_cells_of_every_type():
    import datetime
    import decimal

    table = pa.table(
        {
            "half": pa.array([0.1], pa.float16()),
            "date": pa.array([datetime.date(2024, 2, 3)]),
            "time": pa.array([datetime.datetime(2024, 2, 3, 4, 5)]),
            "decimal": pa.array([decimal.Decimal("3.10")]),
            "words": pa.array(["a"]).dictionary_encode(),
            "binary": pa.array([b"text"]),
            "image": pa.array([b"\xff\xfe"]),
            "lists": pa.array([[[0.1], None, []]], pa.list_(pa.list_(pa.float32()))),
            "calls": pa.array([[{"name": "f", "x": None, "y": {"z": None}}, None]]),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "none": pa.nulls(1),
        }
    )
    [row] = [parse_row(text) for text in arrow_rows(table)]
    assert row == {
        "half": 0.1,
        "date": "2024-02-03",
        "time": "2024-02-03T04:05:00",
        "decimal": "3.10",
        "words": "a",
        "binary": "text",
        "image": {"bytes": 2},
        "lists": [[0.1], None, []],
        "calls": [{"name": "f", "y": {}}, None],
        "map": {"k": 1},
        "none": None,
    }
    sliced = pa.table({"x": pa.array([[1], [2, 3], None, [4]])}).slice(1)
    assert [parse_row(text)["x"] for text in arrow_rows(sliced)] == [[2, 3], None, [4]]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_row_4_another_encoding_is_named(tmp_path, kind):
    rows = ['{"instruction": "a", "response": "b"}', '{"instruction": "café", "response": "b"}']
    content = {
        "json": "[" + ",\n".join(rows) + "]",
        "jsonl": "\n".join(rows),
        "csv": "instruction,response\ncafé,b\n",
    }[kind]
    message = refusal(write(tmp_path / f"rows.{kind}", content.encode("cp1252")))
    assert f"rows.{kind}, line 2: not UTF-8 (byte 0xe9" in message and "iconv -f cp1252 -t utf-8" in message
    message = refusal(write(tmp_path / f"wide.{kind}", content.encode("utf-16")))
    assert f"wide.{kind}, line 1: not UTF-8" in message and "it looks like utf-16" in message


def test_bom_and_line_separators_are_no_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", '\ufeff{"instruction": "a\u2028b", "response": "c"}\r\n\r\n')
    assert texts(path) == ["a\u2028b\n\nc</s>"]


def test_row_5_dates_are_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "2024-01-02", "response": "2024-01-02T03:04:05"}])
    assert texts(path) == ["2024-01-02\n\n2024-01-02T03:04:05</s>"]


def test_row_5_a_column_may_change_its_type_anywhere(tmp_path):
    """The JSON reader of `datasets` infers types from its first 10 MB."""
    filler = {"instruction": "x" * 200_000, "response": "y"}
    rows = [{"instruction": "2024-01-02", "response": 1}, *[filler] * 60, {"instruction": "z", "response": "one"}]
    rows.append({"instruction": "z", "response": 1.5, "input": {"a": 1}})
    big = write_jsonl(tmp_path / "big.jsonl", rows)
    assert big.stat().st_size > 12e6
    message = refusal(big, max_length=64)
    assert "big.jsonl, line 63: column 'input' holds {'a': 1}, a dict; accepted is text" in message
    small = write_jsonl(tmp_path / "small.jsonl", [rows[0], *rows[-2:-1]])
    big = write_jsonl(tmp_path / "big.jsonl", rows[:-1])
    whole = prepare(big, max_length=64).dataset["input_ids"]
    assert [whole[0], whole[-1]] == list(prepare(small, max_length=64).dataset["input_ids"])


def test_row_6_a_huge_row(tmp_path, monkeypatch):
    words = " ".join(f"word{number % 977}" for number in range(3_500_000))
    assert len(words) > 25e6
    path = write_jsonl(tmp_path / "huge.jsonl", [{"text": words}, {"text": "short"}])
    tokenise, handed = Encoder._tokenise, []

    def counted(encoder, texts, add_special_tokens):
        handed.extend(map(len, texts))
        return tokenise(encoder, texts, add_special_tokens)

    monkeypatch.setattr(Encoder, "_tokenise", counted)
    prepared = prepare(path, source={"kind": "text"}, max_length=64)
    assert sum(handed) < 100_000  # tokens that are cut off took 87 s
    tokenizer = tiny_tokenizer()
    assert prepared.dataset[0]["input_ids"] == tokenizer(words[:2000])["input_ids"][:64]
    report = prepared.report
    assert report.truncated_examples == 1 and report.characters_cut > 25e6
    assert f"{report.characters_cut:,} characters that were not tokenised" in str(report)


def _texts_to_cut(random):
    words = [
        "alpha",
        "be",
        "  ",
        "\n",
        "\n\n\n",
        "é",
        "🙂",
        "x" * 70,
        "12345",
        "</s>",
        " ",
        "\t",
        "ﬁ",
        "a\u0301",
        "===",
    ]
    yield "".join(random.choice(words) for _ in range(20_000))
    yield "a" * 60_000
    yield " " * 60_000 + "end"
    yield "ab" * 30_000
    yield "".join(chr(random.integers(0x4E00, 0x9FFF)) for _ in range(20_000))


def _bpe_over_the_whole_text():
    """Llama 2's kind: no words, so that a merge may reach over any border."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["alpha be be alpha 12345 ab abab aaaa a" * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def _unigram():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁alpha", -3.0), ("be", -3.0), ("a", -4.0), ("aa", -4.5)]
    pieces += [("aaa", -4.9), ("ab", -4.2), ("ba", -4.1), ("b", -5.0), ("x", -5.0), ("xx", -6.0), ("1", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def _wordpiece():
    """Collapses spaces, and makes one token of a word that is too long."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        word: n for n, word in enumerate(["[UNK]", "</s>", "alpha", "be", "##be", "a", "##a", "1", "x", "##x"])
    }
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")


@pytest.mark.parametrize(
    "make", [tiny_tokenizer, _bpe_over_the_whole_text, _unigram, _wordpiece], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("max_length", [2, 64, 300])
def test_the_first_tokens_of_a_cut_text_are_those_of_the_whole(make, max_length):
    """Tokens and labels of texts that are tokenised in part, against those of the whole text."""
    tokenizer, random = make(), np.random.default_rng(0)
    encoder, cut = Encoder(tokenizer, max_length, "response"), 0
    for text in _texts_to_cut(random):
        spans = [(17, 400), (500, len(text))]
        [encoded] = encoder.encode([text], [spans], add_special_tokens=True)
        ids, offsets = (tokenizer(text, return_offsets_mapping=True)[key] for key in ("input_ids", "offset_mapping"))
        supervised = [any(start < e and end > s for s, e in spans) for start, end in offsets]
        assert encoded.input_ids.tolist() == ids[:max_length]
        assert [label != -100 for label in encoded.labels] == supervised[:max_length]
        cut += encoded.num_unread > 0
        if not encoded.num_unread:
            assert encoded.num_cut == max(0, len(ids) - max_length)
    assert cut or make is _wordpiece


@pytest.mark.parametrize("adds_eos", [False, True])
def test_row_12_one_bos_and_one_eos(tmp_path, adds_eos):
    from tokenizers import processors

    tokenizer = tiny_tokenizer(bos=True)
    if adds_eos:
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    given = ["one two", "<s>one two", "one two</s>", "<s>one two</s>", "<s>one two</s>\n"]
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in given])
    assert texts(path, tokenizer=tokenizer, source={"kind": "text"}) == ["<s>one two</s>"] * 5
    assert answers(path, tokenizer=tokenizer, source={"kind": "text"}) == ["one two</s>"] * 5
    rows = [{"instruction": f"{bos}1 + 1", "response": f"2{eos}"} for bos in ("", "<s>") for eos in ("", "</s>")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert texts(path, tokenizer=tokenizer) == ["<s>1 + 1\n\n2</s>"] * 4
    assert answers(path, tokenizer=tokenizer) == ["2</s>"] * 4


def test_a_bos_that_the_tokenizer_does_not_add_stays(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "<s>one"}])
    assert texts(path, source={"kind": "text"}) == ["<s>one</s>"]
    assert texts(path, source={"kind": "text"}, append_eos=False) == ["<s>one"]


def test_row_14_data_without_a_label_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "word " * 50, "response": "late"}] * 3)
    with pytest.raises(UserError, match="eval_data: no token of its 3 examples carries a loss.*eval_data.max_length"):
        require_supervised(prepare(path, max_length=16).dataset, "eval_data")
    require_supervised(prepare(path).dataset, "eval_data")


@pytest.mark.parametrize("section", ["data", "eval_data"])
def test_row_14_a_run_is_refused_before_it_scores(tmp_path, section, monkeypatch):
    from tiny_preset import tiny_preset

    from tokenseek.runs import preparation, train

    monkeypatch.setattr(preparation, "score", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("loaded"))
    late = write_jsonl(tmp_path / "late.jsonl", [{"question": "word " * 50, "answer": "late"}] * 3)
    columns = "{instruction: question, response: answer}"
    settings = [
        f"{section}.sources.0.path={late}",
        f"{section}.sources.0.columns={columns}",
        f"{section}.max_length=16",
    ]
    with pytest.raises(UserError, match=f"{section}: no token of its 3 examples carries a loss"):
        train.train(tiny_preset(tmp_path, *settings))
