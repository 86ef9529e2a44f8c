"""What cannot work is refused before anything is scored or loaded; the ids name the row of the table of situations."""

import json
import resource
import shutil

import pytest
from helpers import tiny_tokenizer, write_jsonl
from tiny_models import tiny_model
from tiny_preset import tiny_preset
from transformers import AutoConfig, AutoModelForCausalLM

from tokenseek.data.toy import make_word_problems
from tokenseek.errors import UserError
from tokenseek.runs.score import score
from tokenseek.runs.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks")
    tiny_preset(folder)
    return folder


@pytest.fixture
def refused(folder, tmp_path, monkeypatch):
    """The message with which training is refused; no model is loaded for it, and nothing scored."""

    def no_model(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("tokenseek.runs.score.load_model", no_model)
    monkeypatch.setattr("tokenseek.runs.train.load_model", no_model)

    def run(*settings, work=train):
        with pytest.raises(UserError) as error:
            work(tiny_preset(folder, f"output_dir={tmp_path / 'run'}", *settings))
        assert not (tmp_path / "run" / "index.arrow.shards").exists()
        return str(error.value)

    return run


@pytest.mark.parametrize(
    "settings,expected",
    [
        pytest.param(["training.optim=adamv"], ["training.optim: 'adamv'", "adamw_torch"], id="row17-optim"),
        pytest.param(["training.optim=galore_adamw"], ["training.optim: galore_adamw"], id="row17-optim-needs"),
        pytest.param(["training.report_to=[wandb]"], ["training.report_to: wandb", "report_to=[]"], id="row17-wandb"),
        pytest.param(["training.report_to=[wanbd]"], ["did you mean wandb"], id="row17-reports"),
        pytest.param(
            ["training.lr_scheduler_type=warmup_stable_decay"],
            ["training.lr_scheduler_type: warmup_stable_decay", "num_decay_steps"],
            id="row17-wsd",
        ),
        pytest.param(
            ["training.lr_scheduler_type=cosine_with_min_lr"],
            ["training.lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs"],
            id="row17-min-lr",
        ),
        pytest.param(
            ["training.lr_scheduler_type=reduce_lr_on_plateau"],
            ["reduce_lr_on_plateau", "training.eval_strategy=steps"],
            id="row17-plateau",
        ),
        pytest.param(
            ["training.save_strategy=best"], ["save_strategy=best", "training.eval_strategy=steps"], id="row17-best"
        ),
        pytest.param(
            ["training.extra={dataloader_drop_last: true}", "training.per_device_train_batch_size=16"],
            ["dataloader_drop_last: 12 examples make no whole batch of 16"],
            id="row17-drop-last",
        ),
        pytest.param(
            ["training.extra={label_smoothing_factor: 0.1}"],
            ["label_smoothing_factor is"],
            id="row17-smoothing",
        ),
        pytest.param(["peft.target_modules=[up_porj]"], ["peft: lora does not fit", "up_porj"], id="row17-modules"),
        pytest.param(["peft.extra={use_dorra: true}"], ["peft.extra: lora takes no", "use_dorra"], id="row17-peft"),
        pytest.param(["training.extra={adam_beta1: yes}"], ["training.optim: adamw_torch"], id="row17-kind-betas"),
    ],
)
def test_settings_of_training(settings, expected, refused):
    message = refused(*settings)
    assert all(words in message for words in expected), message


@pytest.mark.parametrize(
    "settings",
    [
        ["training.lr_scheduler_type=warmup_stable_decay", "training.extra.lr_scheduler_kwargs={num_decay_steps: 1}"],
        ["training.optim=adafactor"],
        ["training.save_strategy=best", "data.hold_out=2", "training.eval_strategy=steps", "training.eval_steps=1"],
        [
            "training.lr_scheduler_type=reduce_lr_on_plateau",
            "data.hold_out=2",
            "training.eval_strategy=steps",
            "training.eval_steps=1",
        ],
    ],
    ids=["wsd", "adafactor", "best", "plateau"],
)
def test_the_same_settings_with_what_they_need_train(settings, folder, tmp_path):
    summary = train(tiny_preset(folder, f"output_dir={tmp_path}", "selection.rule=random", *settings))
    assert summary.steps == 2


@pytest.fixture
def model_with(folder, tmp_path):
    """A copy of the model's folder with another model or tokenizer in it."""

    def make(model=None, tokenizer=None, **options):
        copied = shutil.copytree(folder / "model", tmp_path / "model")
        if model is not None:
            for file in copied.glob("model*"):
                file.unlink()
            model.save_pretrained(copied, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(copied)
        return copied

    return make


@pytest.mark.parametrize("work", [train, score])
@pytest.mark.parametrize("kind,names", [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
def test_row22_learned_positions(kind, names, work, refused, model_with):
    made = model_with(tiny_model(kind, vocab_size=400, **{names: 16}))
    message = refused(f"model.name_or_path={made}", work=work)
    assert "data.max_length: the longest example has" in message and "learned 16 positions" in message


def test_computed_positions_reach_further(folder, model_with, tmp_path):
    made = model_with(tiny_model("llama", vocab_size=400, max_position_embeddings=16))
    assert score(tiny_preset(folder, f"model.name_or_path={made}", f"output_dir={tmp_path / 'run'}")).exists()


@pytest.mark.parametrize("work", [train, score])
def test_row22_a_token_without_an_embedding(work, refused, model_with, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<answer>"])
    problems = make_word_problems(4)
    problems[2]["question"] += "<answer>"
    data = write_jsonl(tmp_path / "data.jsonl", problems)
    settings = [f"model.name_or_path={model_with(tokenizer=tokenizer)}", f"data.sources.0.path={data}"]
    message = refused(*settings, work=work)
    assert "'<answer>' with the id 400" in message and "resize_token_embeddings" in message


@pytest.mark.parametrize("work", [train, score])
def test_row23_a_file_of_weights_is_missing(work, refused, model_with):
    made = model_with(tiny_model("llama_tied", vocab_size=400), max_shard_size="40KB")
    gone = sorted(made.glob("model-*.safetensors"))[1]
    gone.unlink()
    message = refused(f"model.name_or_path={made}", work=work)
    assert gone.name in message and "Fetch the model again" in message


def test_row23_a_tensor_is_missing(folder, model_with, tmp_path):
    from safetensors.torch import load_file, save_file

    made = model_with()
    tensors = load_file(made / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no weights for 1 parameters of LlamaForCausalLM: model.layers.1.mlp.up_proj"):
        score(tiny_preset(folder, f"model.name_or_path={made}", f"output_dir={tmp_path / 'run'}"))


def shared_keys_model():
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=400, vocab_size_per_layer_input=400, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4, sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("settings", [[], ["selection.rule=random"]], ids=["scores", "random"])
def test_row28_layers_that_share_keys_and_values(settings, refused, model_with):
    message = refused(f"model.name_or_path={model_with(shared_keys_model())}", *settings)
    assert "passes 4 hidden states per token from layer to layer (Gemma 3n)" in message
    assert "Ordinary training (training.ditching: false) takes it" in message


@pytest.mark.parametrize("settings", [[], ["selection.rule=random"], ["training.ditching=false"]])
def test_row28_gemma_4_is_served(settings, folder, model_with, tmp_path):
    made = model_with(tiny_model("gemma4", vocab_size=400, vocab_size_per_layer_input=400))
    assert (
        train(tiny_preset(folder, f"model.name_or_path={made}", f"output_dir={tmp_path / 'run'}", *settings)).steps == 2
    )


ONLINE = [
    "scoring.mode=online", "selection.rule=sampled", "selection.alpha=0", "selection.beta=1", "selection.explore=0.3",
]  # fmt: skip


def test_row28_exact_layers_of_gemma_4(refused, folder, model_with, tmp_path, capsys):
    made = model_with(tiny_model("gemma4", vocab_size=400, vocab_size_per_layer_input=400))
    model = f"model.name_or_path={made}"
    assert "selection.exact_layers: 2, and Gemma4ForCausalLM" in refused(model, *ONLINE, "selection.exact_layers=2")


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1", "gemma3n_text"])
def test_what_cannot_be_ditched_trains_ordinarily(kind, folder, model_with, tmp_path):
    small = dict(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    ssm = dict(state_size=4, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=4, mamba_n_groups=1)
    if kind == "gemma3n_text":
        model = shared_keys_model()
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **small, **ssm, intermediate_size=64))
    settings = [f"model.name_or_path={model_with(model)}", f"output_dir={tmp_path / 'run'}", "training.ditching=false"]
    if kind == "mamba":  # it has neither attention nor feed-forward layers
        settings += ["model.attn_implementation=eager", "peft.target_modules=[in_proj]"]
    summary = train(tiny_preset(folder, *settings))
    assert summary.steps == 2 and summary.loss_before is None


def test_row26_a_file_in_the_place_of_the_output(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"output_dir: {tmp_path / 'file'} is a file" in refused(f"output_dir={tmp_path / 'file'}")
    assert f"output_dir: {tmp_path / 'file'} is a file" in refused(f"output_dir={tmp_path / 'file' / 'run'}")


def test_row26_a_folder_that_cannot_be_written_to(refused):
    assert "output_dir: /proc/self/run cannot be written to" in refused("output_dir=/proc/self/run")


@pytest.mark.parametrize("too_large", ["weights", "optimizer states"])
def test_row26_no_room_for_a_checkpoint(too_large, folder, tmp_path):
    settings = ["selection.rule=random", "training.save_strategy=steps", "training.save_steps=1"]
    settings += ["training.max_steps=3", "training.extra={disable_tqdm: true, logging_strategy: no}"]
    train(tiny_preset(folder, *settings, f"output_dir={tmp_path / 'whole'}", "training.max_steps=1"))
    adapter = (tmp_path / "whole" / "final" / "adapter_model.safetensors").stat().st_size
    room = int(adapter * (0.5 if too_large == "weights" else 1.5))  # the optimizer has two numbers for each weight
    config = tiny_preset(folder, *settings, f"output_dir={tmp_path / 'run'}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UserError, match=f"output_dir: {tmp_path}/run.* cannot be written: .*command continues"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert train(config).steps == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    "values,expected",
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "already (bitsandbytes, by"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already (gptq, by the quantization_config"),
        ({"dtype": "strange"}, "config.json has a value that Transformers cannot use: "),
        ({"max_position_embeddings": "512"}, "has a value that Transformers cannot use: Validation error for field"),
    ],
    ids=["bitsandbytes", "gptq", "dtype", "positions"],
)
@pytest.mark.parametrize("work", [train, score])
def test_configurations_that_cannot_be_trained(work, values, expected, refused, model_with):
    made = model_with()
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | values))
    assert expected in refused(f"model.name_or_path={made}", work=work)


def test_an_output_in_the_home_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "a home"))
    monkeypatch.chdir(tmp_path)
    train(tiny_preset(folder, "output_dir=~/runs/mine", "selection.rule=random"))
    assert (tmp_path / "a home/runs/mine/final").is_dir() and not (tmp_path / "~").exists()
    assert tiny_preset(folder, "scoring.index=~/x.arrow").index_path == tmp_path / "a home/x.arrow"
