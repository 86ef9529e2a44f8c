"""Evaluation through the launcher: the same scores from one process and from two."""

import json

import torch
from closeness import assert_close
from eval_files import write_eval_files

TASKS = "arc_challenge:3,hellaswag:2,mmlu:1,winogrande,gsm8k:1,translation,held_out_loss"


def test_scores_do_not_depend_on_the_number_of_processes(workspace, script):
    data = write_eval_files(workspace.folder / "eval")
    held_out = "eval_data={max_length: 512, sources: [{path: %s}]}" % (workspace.folder / "heldout.jsonl")
    columns = "eval_data.sources.0.columns={instruction: question, response: answer}"
    settings = ["--set", "model.dtype=float32", "--set", held_out, "--set", columns]
    words = [str(workspace.model), "--data", str(data), "--tasks", TASKS, "--batch-size", "3", *settings]
    one, two = workspace.folder / "one.json", workspace.folder / "two.json"
    alone = script("evaluate", *words, "--json", one, "--samples", workspace.folder / "alone")
    assert alone.status == 0, alone
    shared = workspace.tokenseek(
        "evaluate", *words, "--json", two, "--samples", workspace.folder / "shared",
        "--accelerate-config", "ddp_cpu", "--num-processes", "2",
    )  # fmt: skip
    assert shared.status == 0, shared

    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (one, two))
    assert (first["settings"].pop("processes"), second["settings"].pop("processes")) == (1, 2)
    assert first["settings"] == second["settings"] and first["model"] == second["model"]
    assert list(first["scores"]) == [task.partition(":")[0] for task in TASKS.split(",")]
    for name, score in first["scores"].items():
        other = second["scores"][name]
        assert other["examples"] == score["examples"] > 0
        assert_close(other["value"], score["value"], torch.float32)
        if name != "translation":  # bootstrapped
            assert_close(other["stderr"], score["stderr"], torch.float32)
    assert first["scores"]["held_out_loss"]["value"] > 1
    # One table, with the scores that were written, from the main process alone.
    rows = [line for line in shared.out.splitlines() if line.startswith(f"| {workspace.model} |")]
    assert rows == [line for line in alone.out.splitlines() if line.startswith(f"| {workspace.model} |")]
    assert len(rows) == 1 and f"{100 * first['scores']['hellaswag']['value']:.2f}" in rows[0]
    # Every question with the same solved examples before it.
    for task in ("arc_challenge", "hellaswag", "gsm8k"):
        prompts = [_prompts(workspace.folder / folder / f"{task}.jsonl") for folder in ("alone", "shared")]
        assert prompts[0] == prompts[1], task


def _prompts(path):
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(sample["doc_id"], sample["filter"]): sample["arguments"] for sample in samples}
