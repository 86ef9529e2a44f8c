"""Evaluation: prompts, log-likelihoods and scores against computations of their own, and what is refused."""

import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import sacrebleu
import torch
from closeness import assert_close
from eval_files import write_eval_files
from helpers import tiny_tokenizer, write_jsonl
from lm_eval.api.model import LM
from lm_eval.api.samplers import ContextSampler
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from tokenseek import cli
from tokenseek.config import ModelConfig, load_config, load_evaluated, save_resolved
from tokenseek.data import prepare_dataset
from tokenseek.errors import UserError
from tokenseek.evaluation import EvaluationResult, Score, evaluate
from tokenseek.evaluation.benchmarks import TABLE_1, choose, split_tasks
from tokenseek.evaluation.harness import load_tasks, run_tasks
from tokenseek.evaluation.programs import passes
from tokenseek.evaluation.shots import SharedDraws
from tokenseek.evaluation.subject import find_subject
from tokenseek.launching import launcher


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of random weights and files of every local benchmark."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_eval_files(folder / "data")
    return folder


@pytest.fixture(scope="module")
def config(world):
    return ModelConfig(name_or_path=str(world / "model"), dtype="float32")


@pytest.fixture(scope="module")
def scored(world, config):
    """The five tasks of Table 1 with few solved examples, and all prompts and answers."""
    tasks = "arc_challenge:15,hellaswag:2,mmlu,truthfulqa,winogrande"
    return evaluate(config, tasks=tasks, data=[world / "data"], samples=True)


def log_likelihood(model, tokenizer, context, continuation):
    """Of a continuation: one prompt alone, without anything of the harness."""
    before = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    with torch.no_grad():
        log_probs = model(ids).logits[0].log_softmax(-1)
    return sum(log_probs[at - 1, ids[0, at]].item() for at in range(before, ids.shape[1]))


def correct(name, doc, lls):
    """A question's score by the definition of the benchmark's metric."""
    if name in ("arc_challenge", "hellaswag"):  # per character of the choice
        choices = doc["choices"]["text"] if name == "arc_challenge" else doc["choices"]
        gold = "ABCD".index(doc["answerKey"]) if name == "arc_challenge" else doc["label"]
        return float(np.argmax([ll / len(choice) for ll, choice in zip(lls, choices, strict=True)]) == gold)
    if name == "truthfulqa":
        labels = doc["mc2_targets"]["labels"]
        true = sum(math.exp(ll) for ll, label in zip(lls, labels, strict=True) if label)
        return true / sum(map(math.exp, lls))
    return float(np.argmax(lls) == (doc["answer"] if name == "mmlu" else int(doc["answer"]) - 1))


@pytest.mark.parametrize("name", TABLE_1)
def test_scores_by_an_own_computation(name, scored, world):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2048)
    model = type(model).from_pretrained(world / "model", dtype=torch.float64).eval()
    results = []
    for sample in scored.samples[name]:
        own = [log_likelihood(model, tokenizer, *arguments) for arguments in sample["arguments"]]
        assert_close(own, [answer[0][0] for answer in sample["resps"]], torch.float32)
        results.append(correct(name, sample["doc"], own))
    score = scored.scores[name]
    assert score.examples == len(results) == {"arc_challenge": 17, "mmlu": 9}.get(name, 16)
    assert_close(score.value, np.mean(results), torch.float32)
    if name != "mmlu":  # pooled over its subjects
        assert_close(score.stderr, np.std(results, ddof=1) / math.sqrt(len(results)), torch.float32)
        assert 0 < score.value


def prompts(result, name, row=0):
    return [sample["arguments"] for sample in result.samples[name] if sample["doc_id"] == row]


def test_prompts_are_those_of_the_official_tasks(scored):
    ((first, *_),) = prompts(scored, "arc_challenge")
    assert first[0].endswith(" pears\n\nQuestion: How many pears has Ann?\nAnswer:") and first[1] == " 43 pears"
    assert first[0].count("Question: ") == 16 and first[0].startswith("Question: How many pears has ")

    ((first, *_, last),) = prompts(scored, "hellaswag")
    assert first[0].endswith(".\n\nCooking: Ann peels pears. The cook")
    assert (first[1], last[1]) == (" cuts them.", " runs.")

    anatomy, astronomy = (prompts(scored, "mmlu")[subject] for subject in (0, 1))
    for subject, questions in (("anatomy", anatomy), ("astronomy", astronomy)):
        solved = "".join(f"dev {subject} {n}?\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCDA'[n]}\n\n" for n in range(5))
        about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        asked = f"test {subject} 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
        assert [list(question) for question in questions] == [[about + solved + asked, f" {c}"] for c in "ABCD"]

    ((first, *_),) = prompts(scored, "truthfulqa")
    assert first[0].startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert first[0].endswith("Barcelona, Spain.\n\nQ: What does Ann eat?\nA:") and first[1] == " Pears"

    ((ann, zoe),) = prompts(scored, "winogrande")
    assert list(ann) == ["Ann gave Zoe a pear because Ann", " was hungry."]
    assert list(zoe) == ["Ann gave Zoe a pear because Zoe", " was hungry."]


def test_no_solved_example_asks_the_question(scored):
    repeated = 0
    for sample in scored.samples["arc_challenge"]:
        question = f"Question: {sample['doc']['question']}"
        assert sample["arguments"][0][0].count(question) == 1
        repeated += sample["doc"]["question"] == "How many pears has Ann?"
    assert repeated == 2  # the file has it twice, with other choices


def test_draws_do_not_depend_on_the_processes():
    docs = [{"question": number // 2, "row": number} for number in range(20)]  # each asked twice

    def draws(rank, processes, eval_doc):
        stock = ContextSampler(docs, rnd=1234)
        sampler = SharedDraws(stock, docs, rank, processes, lambda doc: doc["question"])
        return {row: sampler.sample(5, docs[row] if eval_doc else None) for row in range(rank, 20, processes)}

    for eval_doc in (True, False):
        alone = draws(0, 1, eval_doc)
        for processes in (2, 3):
            shared = [draws(rank, processes, eval_doc) for rank in range(processes)]
            assert {row: drawn for each in shared for row, drawn in each.items()} == alone
        if eval_doc:
            assert all(doc["question"] != row // 2 for row, drawn in alone.items() for doc in drawn)
    stock = ContextSampler(docs, rnd=1234)
    assert [stock.sample(5) for _ in docs] == list(alone.values())  # those of the harness alone


class Oracle(LM):
    """Answers the first half of the questions as the files do, the others wrongly."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, []

    def generate_until(self, requests):
        self.asked += [request.args[0] for request in requests]
        right = [next(answer for ask, answer in self.answers.items() if r.args[0].endswith(ask)) for r in requests]
        return [answer if at < len(right) / 2 else " 7 Birnen" for at, answer in enumerate(right)]

    def loglikelihood(self, requests):
        raise AssertionError("not asked for")

    loglikelihood_rolling = loglikelihood


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "name,file,ask,answer",
    [
        ("humaneval", "human_eval", "{prompt}", "{canonical_solution}"),
        ("gsm8k:2", "gsm8k_test", "Question: {question}\nAnswer:", " {answer}"),
        ("translation", "translation", "German phrase: {source}\nEnglish phrase:", " {target}"),
    ],
)
def test_generated_answers(name, file, ask, answer, world):
    rows = rows_of(world / "data" / f"{file}.jsonl")
    oracle = Oracle({ask.format(**row): answer.format(**row) for row in rows})
    chosen = choose([name])
    tasks = load_tasks(chosen, [world / "data"], seed=1234)
    scores, _ = run_tasks(oracle, tasks, chosen)
    score = scores[chosen[0].benchmark.name]
    assert score.examples == len(rows) == len(oracle.asked)
    if name == "translation":
        said = [row["target"] if at < len(rows) / 2 else "7 Birnen" for at, row in enumerate(rows)]
        assert score.value == pytest.approx(sacrebleu.corpus_bleu(said, [[row["target"] for row in rows]]).score)
        assert 10 < score.value < 90
    else:
        assert score.value == 0.5
    if name == "gsm8k:2":  # solved examples are those of the training file
        assert all(prompt.count("####") == 2 for prompt in oracle.asked)
        solved = [row["question"] for row in rows_of(world / "data" / "gsm8k_train.jsonl")]
        assert all(sum(question in prompt for question in solved) == 2 for prompt in oracle.asked)


@pytest.mark.parametrize(
    "program,expected",
    [
        ("assert 1 + 1 == 2", True),
        ("print('noise', end='')", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("x = ' ' * 2**40", False),
        ("open('big', 'w').write('x' * 2**21)", False),
        ("def f(:", False),
        ("import os; assert 'HOME' not in os.environ and os.listdir('.') == ['out']", True),
    ],
)
def test_programs(program, expected):
    assert passes(program, seconds=60) is expected


def test_a_program_that_does_not_end_is_ended_with_its_children(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(6); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    assert not passes(program, seconds=4)  # it returns
    time.sleep(4)
    assert not mark.exists()


def test_held_out_loss_and_an_adapter(world, config):
    base = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(world / "adapter")
    data = load_config("gsm8k", [f"data.sources.0.path={world / 'data' / 'gsm8k_test.jsonl'}"]).data
    result = evaluate(config, world / "adapter", "held_out_loss", held_out=data, limit=5, batch_size=2)

    tokenizer = tiny_tokenizer()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), world / "adapter").eval()
    total = count = 0
    for example in prepare_dataset(data, tokenizer).dataset.select(range(5)):
        ids, labels = (torch.tensor(example[key]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        kept = labels[1:] != -100
        total -= logits.log_softmax(-1)[kept].gather(1, labels[1:][kept, None]).sum().item()
        count += int(kept.sum())
    score = result.scores["held_out_loss"]
    assert_close(score.value, total / count, torch.float32)
    assert score.examples == 5
    without = evaluate(config, None, "held_out_loss", held_out=data, limit=5)
    assert abs(without.scores["held_out_loss"].value - score.value) > 1e-3


def made_up(**values):
    scores = {name: Score("m", value, value / 10, 4, 0, {}) for name, value in values.items()}
    return EvaluationResult(scores, {"label": "us"}, {}, {}, 0.0)


def test_rows_and_averages(tmp_path):
    five = dict(winogrande=0.5, arc_challenge=0.1, hellaswag=0.2, mmlu=0.3, truthfulqa=0.4)
    result = made_up(translation=41.63, humaneval=0.25, **five, held_out_loss=1.5)
    assert result.table().splitlines() == [
        "| model | ARC | HellaSwag | MMLU | TruthfulQA | WinoGrande | Average | HumanEval | BLEU | Held-out loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| us | 10.00 | 20.00 | 30.00 | 40.00 | 50.00 | 30.00 | 25.00 | 41.63 | 1.5000 |",
        "| standard error | 1.00 | 2.00 | 3.00 | 4.00 | 5.00 | 3.00 | 2.50 | 4.16 | 0.1500 |",
    ]
    del five["mmlu"]
    assert "Average" not in made_up(**five).columns()
    assert made_up(**five, ethics=0.8).columns()["Average"] == pytest.approx(40)
    result.save(tmp_path / "a" / "b.json")
    assert json.loads((tmp_path / "a" / "b.json").read_text())["scores"]["mmlu"]["value"] == 0.3


def test_a_folder_that_is_not_there_is_told_with_the_runs_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "./mine", "/no/such/model", "a/b/c"):
        with pytest.raises(UserError, match=f"there is no folder {name}; runs here: none"):
            find_subject(name)
    for name in ("Qwen", "runs"):
        (tmp_path / name / "model-first").mkdir(parents=True)
    (tmp_path / "runs" / "model-first" / "config.yaml").write_text("")
    with pytest.raises(
        UserError, match="no folder runs/model-fist; did you mean runs/model-first.; runs here: runs/model-first. Give"
    ):
        find_subject("runs/model-fist")
    for name in ("Qwen/Qwen2.5-0.5B", "gpt2"):  # names on the hub, also beside folders and runs
        assert find_subject(name).model.name_or_path == name


def test_what_is_evaluated(tmp_path, world):
    run = tmp_path / "run"
    run.mkdir()
    overrides = ["data.sources.0.path=x", "model.dtype=float16", f"output_dir={run}", "model.name_or_path=the/base"]
    config = load_config("gsm8k", overrides)
    save_resolved(config, run / "config.yaml")
    with pytest.raises(UserError, match="training has not finished"):
        find_subject(str(run))
    (run / "final").mkdir()
    for path in (run, run / "final"):  # fully tuned
        subject = find_subject(str(path))
        assert (subject.model.name_or_path, subject.model.dtype) == (str(run / "final"), "float16")
        assert (subject.adapter, subject.run, subject.held_out) == (None, run, config.eval_data)
    (run / "final" / "adapter_config.json").write_text('{"base_model_name_or_path": "another/base"}')
    subject = find_subject(str(run), overrides=["model.dtype=float32"])
    assert (subject.model.name_or_path, subject.model.dtype) == ("the/base", "float32")
    assert subject.adapter == run / "final"
    adapter = tmp_path / "adapter"
    (run / "final").rename(adapter)
    assert find_subject(str(adapter)).model.name_or_path == "another/base"
    assert find_subject("some/model", adapter).adapter == adapter
    with pytest.raises(UserError, match="is an adapter itself"):
        find_subject(str(adapter), adapter)
    with pytest.raises(UserError, match="adapter .*holds no adapter_config.json"):
        find_subject("some/model", tmp_path)
    with pytest.raises(UserError, match="model.dtpye: unknown key.*did you mean dtype"):
        load_evaluated("some/model", ["model.dtpye=float32"])


@pytest.mark.parametrize(
    "tasks,message",
    [
        ("arc_chalenge", "unknown task 'arc_chalenge'.*did you mean arc_challenge"),
        ("mmlu,mmlu:3", "'mmlu' is given twice"),
        ("mmlu:few", "after the colon comes the number"),
    ],
)
def test_task_names(tasks, message):
    with pytest.raises(UserError, match=message):
        split_tasks(tasks)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--tasks", "winogrnade"], "did you mean winogrande"),
        (["--tasks", "humaneval"], "humaneval runs programs.*--allow-code-execution"),
        (["--tasks", "ethics"], "ethics has no layout of local files"),
        (["--tasks", "held_out_loss"], "held_out_loss needs an eval_data section"),
        (["--tasks", "gsm8k"], "gsm8k needs the file gsm8k_test.jsonl"),
        (["--data", "/no/such/folder"], "--data /no/such/folder: there is no such folder"),
        (["--set", "model.dtype=float8"], "model.dtype: should be.*got 'float8'"),
        (["--adapter", "/no/adapter"], "adapter /no/adapter: the folder holds no adapter_config.json"),
    ],
)
def test_mistakes_are_told_before_any_process_starts(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "accelerate_launch", lambda _: pytest.fail("processes were started"))
    assert cli.main(["evaluate", "some/model", "--data", str(tmp_path), *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("tokenseek: error:")
    assert re.search(message, error), error


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["evaluate", "some/model"]) == 2
    assert "pip install 'tokenseek[eval]'" in capsys.readouterr().err


def test_mistakes_are_told_before_torch_is_imported():
    code = "import sys, tokenseek.cli as cli; cli.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, "evaluate", "m", "--tasks", "x"], capture_output=True, text=True)
    assert run.returncode == 0 and "unknown task 'x'" in run.stderr, run


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if a mistake is not told before the model is loaded."""
    monkeypatch.setattr("tokenseek.evaluation.run.load_model", lambda _: pytest.fail("the model was loaded"))


def test_local_files_that_do_not_fit(world, config, tmp_path, no_model):
    write_jsonl(tmp_path / "hellaswag.jsonl", [{"query": "a", "choices": ["b"], "gold": 0}, {"query": "a"}])
    with pytest.raises(UserError, match="hellaswag.jsonl, row 2: does not have the layout of hellaswag.*'choices'"):
        evaluate(config, tasks="hellaswag", data=[tmp_path])
    (tmp_path / "hellaswag.jsonl").write_text("{")
    (tmp_path / "arc_easy.jsonl").write_text("")
    with pytest.raises(UserError, match="arc_easy.jsonl holds no row"):
        evaluate(config, tasks="arc_easy", data=[tmp_path])
    with pytest.raises(UserError, match="there are 15 others.*--tasks arc_easy:15"):
        evaluate(config, tasks="arc_easy", data=[world / "data"])  # 25 solved examples of 16 questions


def test_no_hub(config, no_model):
    with pytest.raises(UserError, match="winogrande: its data cannot be fetched from the hub.*--data"):
        evaluate(config, tasks="winogrande")


def test_more_processes_than_examples(world):
    with pytest.raises(UserError, match="16 examples of hellaswag cannot be shared by 17 processes"):
        load_tasks(choose(["hellaswag:0"]), [world / "data"], seed=1, processes=17)
    with pytest.raises(UserError, match="1 examples of hellaswag cannot be shared by 2 processes; raise --limit"):
        load_tasks(choose(["hellaswag:0"]), [world / "data"], seed=1, processes=2, limit=1)
