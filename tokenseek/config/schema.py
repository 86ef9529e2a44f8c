"""The configuration of a run: presets composed from small files, overrides, and one strict schema.

Nothing heavy is imported here (no torch, no transformers), so every mistake in a configuration is reported, all of them
at once and each with its dotted path, before a model is loaded.
"""

import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from tokenseek.config.resources import find_resource, folder_of
from tokenseek.config.sizes import parse_size
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError
from tokenseek.selection import SelectionRule, rule_named
from tokenseek.spelling import did_you_mean

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Files that a source reads (`tokenseek.data.reading`).
_DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
CellValue = str | int | float | bool | None
SchemaT = TypeVar("SchemaT", bound=BaseModel)


class _Section(BaseModel):
    # Strict: "3" is not a number and 1 is not a flag. YAML has types of its own; a guess would hide a mistake.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelConfig(_Section):
    """Which model, and in which numbers it is held."""

    name_or_path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_double_quantization(self):
        if self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise ValueError("double_quantization needs quantization: nf4 or fp4")
        return self


class Columns(_Section):
    """The data's own name of each column that the kind of source reads.

    `input`, `tools` and `system` left out are read from columns of these names where the data has them; an empty name
    reads none.
    """

    instruction: str = "instruction"
    input: str | None = None
    response: str = "response"
    messages: str = "messages"
    tools: str | None = None
    system: str | None = None
    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"


_COLUMNS_OF_KIND = {
    "auto": set(),
    "instruction": {"instruction", "input", "response"},
    "chat": {"messages", "tools", "system"},
    "completion": {"prompt", "completion", "tools"},
    "text": {"text"},
}


class SourceConfig(_Section):
    """One data set: a local file or folder (`path`) or a data set of the hub (`name`).

    `drop` and `keep` filter rows by the values of a column. A source adds all its rows; or `rows` of them; or, among
    the sources that have a `weight`, the largest share that keeps the proportion of the weights without repeating a
    row. Drawn rows are chosen with `seed` and stay in the data's order.

    `kind` says what a row is: an `instruction` (with an input or without) and its response; a `chat`, as messages or in
    ShareGPT's form; a prompt and its `completion`, of text or of messages; or `text`. With `auto`, kind and columns are
    recognised from the first rows.
    """

    path: str | None = None
    name: str | None = None
    config_name: str | None = None
    split: str = "train"
    kind: Literal["auto", "instruction", "chat", "completion", "text"] = "instruction"
    columns: Columns = Columns()
    drop: dict[str, list[CellValue]] = {}
    keep: dict[str, list[CellValue]] = {}
    weight: Annotated[float, Field(gt=0)] | None = None
    rows: PositiveInt | None = None
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self):
        if (self.path is None) == (self.name is None):
            raise ValueError(
                "give either path (a local file or folder) or name (a data set of the hub) and set the other to null, "
                f"got path={self.path!r} and name={self.name!r}"
            )
        if self.weight is not None and self.rows is not None:
            raise ValueError("give either weight or rows, not both")
        if self.config_name is not None and self.name is None:
            raise ValueError("config_name belongs to a data set of the hub; a local path has none")
        read = _COLUMNS_OF_KIND[self.kind]
        if surplus := [
            name for name, column in self.columns if name not in read and column != getattr(Columns(), name)
        ]:
            reads = f"it reads {sorted(read)}" if read else "name the kind that the columns belong to"
            raise ValueError(f"columns {surplus} are not read by kind {self.kind}; {reads}")
        return self


class DataConfig(_Section):
    """Sources, and how a row becomes tokens and labels.

    `labels: response` puts the loss on responses (assistant turns) only, `sequence` on every token. `limit` keeps the
    first rows after mixing and shuffling. `hold_out` rows of training data, drawn with `seed`, are kept out of
    training and are its `eval_data`; they are scored like the others, so that an index serves with and without them.

    `template` renders instructions: as `alpaca`, `plain`, by the tokenizer's `chat` template, or with `auto` by that if
    there is one and else as `alpaca`. Conversations always take the chat template, with `template_options` as its
    further variables (`{enable_thinking: false}`). In them `loss_on: last` puts the loss on the last turn of the
    assistant only; the fields `train` and `weight` of a message win. Some templates render a turn differently once
    others follow: `rewritten_turns: refuse` such conversations, or train these turns in examples of their own
    (`separate`).
    """

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    template: Literal["auto", "alpaca", "plain", "chat"] = "alpaca"
    template_options: dict[str, Any] = {}
    loss_on: Literal["all", "last"] = "all"
    rewritten_turns: Literal["refuse", "separate"] = "refuse"
    max_length: Annotated[int, Field(ge=2)] = 2048
    labels: Literal["response", "sequence"] = "response"
    append_eos: bool = True
    limit: PositiveInt | None = None
    shuffle: bool = False
    hold_out: PositiveInt | None = None
    seed: NonNegativeInt = 0
    num_proc: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_mixing(self):
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(w or s.rows is not None for w, s in zip(weighted, self.sources, strict=True)):
            raise ValueError("one source has a weight, so every source needs a weight or rows")
        return self


class ScoringConfig(_Section):
    """Seeking: context and gradient score of every token (Eq. 3 and 4).

    With `mode: index` all data is scored once, by the model as it is before training, and the scores are stored apart
    in an index. With `mode: online` every training step scores its own tokens with the present model; there is no stage
    before training and no index.

    `reduction: error` is the norm of p - y (predicted probabilities less the target) in place of Eq. 4's gradient; it
    comes from the forward pass alone, and only online.
    `gradient_layer` counts from the end: 1 is layer N-1, the last one (Table S14 compares N-1, N-2 and N-3).
    `cpu_threads` fixes torch's threads while scoring on a CPU: float sums depend on how they are split over threads,
    and the bytes of an index must not depend on the machine's cores or the number of processes.
    """

    gradient_layer: Literal[1, 2, 3] = 1
    mode: Literal["index", "online"] = "index"
    reduction: Literal["abs", "signed", "l2", "error"] = "abs"
    loss_scope: Literal["response", "sequence"] = "response"
    tokens_per_batch: PositiveInt = 8192
    tokens_per_shard: PositiveInt = 65536
    index: str | None = None
    cpu_threads: PositiveInt = 1

    @model_validator(mode="after")
    def _check_mode(self):
        if self.mode == "online" and self.index is not None:
            raise ValueError("scoring.index is for scoring.mode: index; online, no index is written or read")
        if self.mode == "online" and self.loss_scope == "sequence":
            raise ValueError("scoring.loss_scope: sequence is for scoring.mode: index; online, labels decide")
        if self.mode == "index" and self.reduction == "error":
            raise ValueError("scoring.reduction: error is for scoring.mode: online; an index takes abs, signed or l2")
        return self


_SelectionFields: Any = create_model(
    "_SelectionFields", __base__=_Section, **{f.name: (f.type, f.default) for f in fields(SelectionRule)}
)


class SelectionConfig(_SelectionFields):
    """The tokens that keep their gradient: the fields and defaults of `SelectionRule`, which checks the values.

    `ratio: auto` is the largest share with which a training step fits into `training.memory_budget`; it is settled when
    training starts, and saved with the run.

    `exact_layers` top layers and the head are trained on all tokens; below them, selected tokens are seeded with their
    gradient over their probability. It needs `scoring.mode: online` and rule `sampled` by the gradient alone. `auto` is
    1, but 0 where the launch splits layers (ZeRO-3, FSDP) or has ranks share texts; it is settled when training starts.
    """

    ratio: float | Literal["auto"] = SelectionRule.ratio
    bands: list[list[float]] | None = None
    exact_layers: NonNegativeInt | Literal["auto"] = 0

    @model_validator(mode="after")
    def _check(self):
        if self.ratio == "auto" and "ratio" not in rule_named(self.rule).reads:
            raise ValueError(f"selection.ratio is auto, but rule {self.rule!r} takes no ratio; leave one of them out")
        self.model_copy(update={"ratio": SelectionRule.ratio if self.ratio == "auto" else self.ratio}).to_rule()
        return self

    def to_rule(self) -> SelectionRule:
        """
        Raises:
            UserError: `ratio` is still to be settled.
        """
        if self.ratio == "auto":
            raise UserError(
                "selection.ratio is auto, which is settled when training starts and saved in the run's config.yaml. "
                "Give that file, or a number (--set selection.ratio=0.1)."
            )
        return SelectionRule(**self.model_dump(exclude={"exact_layers"}))


# Settings of TrainingArguments that another section or file owns: no setting has two owners.
_OWNED_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "resume_from_checkpoint": "training.resume",
    "deepspeed": "the accelerate config",
    "fsdp": "the accelerate config",
    "fsdp_config": "the accelerate config",
    "parallelism_config": "the accelerate config",
    "remove_unused_columns": "TokenSeekTrainer",
    "label_names": "TokenSeekTrainer",
}


class DitchingSettings(_Section):
    """The settings of training that are no fields of `transformers.TrainingArguments`.

    - `ditching`: false is ordinary fine-tuning on all tokens.
    - `recompute`: the selected pass once more in the backward pass.
    - `kv_storage`: where keys and values wait for it: on the `device`, on the `host`, or in 8 bits (`int8`, not exact).
    - `on_nan`: whether a loss or gradient that is not finite ends the run (`stop`) or not (`continue`).
    - `packing`: `true` lays the examples of a micro batch in one row instead of padding them; losses and gradients are
      the same. `bins` packs the whole data set into rows of `data.max_length` tokens first, by first-fit decreasing: a
      micro batch then is `per_device_train_batch_size` rows full of examples, and an epoch has fewer steps.
    - `sequence_layout`: which tokens of a text each rank holds where the accelerate config has ranks share texts
      (`sp_size`): `balanced`; `contiguous`, as stock Ulysses; or `regroup`, contiguous and regrouped in each layer as
      in the paper. Losses are the same in all three.
    - `memory_budget`: what a process may take on its device with `selection.ratio: auto`, such as `8GiB`; left out,
      nine tenths of what is free there.
    - `resume`: `auto` (from the newest checkpoint in output_dir, if any), `never`, or the path of a checkpoint.
    """

    ditching: bool = True
    recompute: bool = False
    kv_storage: Literal["device", "host", "int8"] = "device"
    packing: bool | Literal["bins"] = False
    sequence_layout: Literal["balanced", "contiguous", "regroup"] = "balanced"
    memory_budget: str | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    on_nan: Literal["stop", "continue"] = "stop"
    resume: str = "auto"
    extra: dict[str, Any] = {}


class TrainingConfig(DitchingSettings):
    """Training, in the names of `transformers.TrainingArguments`; `extra` forwards any other of its fields."""

    per_device_train_batch_size: PositiveInt = 1
    per_device_eval_batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: NonNegativeFloat = 4e-4
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "warmup_stable_decay",
    ] = "cosine"
    warmup_steps: NonNegativeFloat = 0
    weight_decay: NonNegativeFloat = 0.01
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: Annotated[int, Field(ge=-1)] = -1
    max_grad_norm: NonNegativeFloat = 1.0
    optim: str = "adamw_torch"
    logging_steps: Annotated[float, Field(gt=0)] = 10
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: Annotated[float, Field(gt=0)] = 500
    save_total_limit: PositiveInt | None = 2
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: Annotated[float, Field(gt=0)] | None = None
    dataloader_num_workers: NonNegativeInt = 0
    report_to: list[str] = ["tensorboard"]

    @field_validator("memory_budget")
    @classmethod
    def _check_memory_budget(cls, budget):
        if budget is not None:
            parse_size(budget)
        return budget

    @model_validator(mode="after")
    def _check_packing(self):
        if self.packing and not self.ditching:
            raise ValueError(
                f"packing: {self.packing if self.packing == 'bins' else 'true'} needs ditching: true; ordinary "
                "fine-tuning pads its batches. To train on all tokens of packed rows, set selection.rule: all"
            )
        return self

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra):
        own = set(cls.model_fields) - {"extra"}
        for name in extra:
            if name in own or name in _OWNED_ELSEWHERE:
                raise ValueError(f"{name} is set as {_OWNED_ELSEWHERE.get(name, f'training.{name}')}, not in extra")
        if extra:
            # late: only a preset that uses `extra` pays for the import of Transformers
            from tokenseek.decoder.names import trainer_field, trainer_fields

            accepted = trainer_fields()
            for name in extra:
                if trainer_field(name) not in accepted:
                    raise ValueError(
                        f"{name} is not a field of transformers.TrainingArguments{did_you_mean(name, accepted)}"
                    )
        return extra


class PeftSettings(_Section):
    """A PEFT adapter. `method` is any PEFT type in lower case; fields left out keep PEFT's own defaults.

    `target_modules` is `feed_forward`, `attention`, `all-linear`, or a list of module names. `extra` goes to the
    method's PEFT config as it is.
    """

    method: str = "lora"
    r: PositiveInt | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Fraction | None = None
    target_modules: str | list[str] = "feed_forward"
    extra: dict[str, Any] = {}

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, target):
        groups = ["feed_forward", "attention", "all-linear"]
        names = isinstance(target, list) and target and all(isinstance(name, str) for name in target)
        if target not in groups and not names:
            raise ValueError(
                f"accepted are {', '.join(groups)} or a list of module names, got {target!r}"
                f"{did_you_mean(target, groups)}"
            )
        return target

    @field_validator("method")
    @classmethod
    def _check_method(cls, method):
        if method not in ("lora", "loha", "lokr", "ia3"):  # the common ones need no import
            from peft import PeftType

            methods = [member.value.lower() for member in PeftType]
            if method not in methods:
                raise ValueError(
                    f"unknown PEFT method {method!r}{did_you_mean(method, methods)}; accepted: {', '.join(methods)}"
                )
        return method


class RunConfig(_Section):
    """Everything that decides what a run learns. Where it runs (processes, ZeRO, FSDP) is the accelerate config's."""

    model: ModelConfig
    data: DataConfig
    eval_data: DataConfig | None = None
    scoring: ScoringConfig = ScoringConfig()
    selection: SelectionConfig = SelectionConfig()
    training: TrainingConfig = TrainingConfig()
    peft: PeftSettings | None = None
    output_dir: str
    seed: NonNegativeInt = 42

    @property
    def index_path(self) -> Path:
        """Where the token-position index is written and read."""
        return Path(self.scoring.index) if self.scoring.index else Path(self.output_dir) / "index.arrow"

    @model_validator(mode="after")
    def _check(self):
        if self.training.eval_strategy != "no" and self.eval_data is None and self.data.hold_out is None:
            raise ValueError(
                f"training.eval_strategy is {self.training.eval_strategy}, but there is no eval_data section and no "
                "data.hold_out"
            )
        auto = self.selection.ratio == "auto"
        if auto and not self.training.ditching:
            raise ValueError("selection.ratio is auto and training.ditching false, which trains on all tokens")
        if self.scoring.mode == "online":
            if not self.training.ditching:
                raise ValueError("scoring.mode is online and training.ditching false, which selects no tokens")
            if auto:
                raise ValueError("selection.ratio: auto is for scoring.mode: index; online, give a share such as 0.1")
        if self.selection.exact_layers:
            rule = self.selection
            if self.scoring.mode != "online" or self.scoring.reduction == "error":
                raise ValueError(
                    "selection.exact_layers needs scoring.mode: online and scoring.reduction: l2, abs or signed"
                )
            if not rule_named(rule.rule).weighs or rule.alpha != 0:
                raise ValueError(
                    f"selection.exact_layers draws by the gradient and weighs: set selection.rule: sampled, alpha: 0 "
                    f"and beta: 1 (got rule {rule.rule}, alpha {rule.alpha:g})"
                )
        if self.training.memory_budget and not auto:
            raise ValueError("training.memory_budget is for selection.ratio: auto; leave it out or set that")
        if self.eval_data is not None and (self.data.hold_out or self.eval_data.hold_out):
            raise ValueError("data.hold_out keeps evaluation data back from training; with eval_data, set it to null")
        return self

    @property
    def needs_index(self) -> bool:
        """Whether training selects by scores that were stored before."""
        return self.training.ditching and self.scoring.mode == "index" and self.selection.to_rule().needs_scores

    def require_trainable(self) -> None:
        """Refuses models that can be scored but not trained.

        Raises:
            UserError: quantised weights without an adapter, or float16 weights under the fp16 gradient scaler.
        """
        if self.peft is None and self.model.quantization:
            raise UserError(
                f"model.quantization: {self.model.quantization} weights cannot be trained; add a peft section "
                "(--set peft.method=lora) or set model.quantization to null"
            )
        if self.peft is None and self.model.dtype == "float16" and self.training.mixed_precision == "fp16":
            raise UserError(
                "model.dtype: float16 weights cannot be trained under training.mixed_precision: fp16; set model.dtype "
                "to float32"
            )


class EvaluatedConfig(_Section):
    """The sections of a model that no run of ours made: itself, and the data of its held-out loss."""

    model: ModelConfig
    eval_data: DataConfig | None = None


class DataOfModel(_Section):
    """The sections that prepare data: whose tokenizer, and what for."""

    model: ModelConfig
    data: DataConfig


def recognised_data(path_or_name: str) -> dict[str, Any]:
    """The `data` section for one source of which nothing else is known: its format is recognised from its rows.

    Args:
        path_or_name: an existing file or folder, or a data set of the hub.
    """
    looks_local = path_or_name.startswith((".", "/", "~")) or Path(path_or_name).suffix in _DATA_SUFFIXES
    is_local = looks_local or Path(path_or_name).exists()
    return {
        "sources": [{"path" if is_local else "name": path_or_name, "kind": "auto"}],
        "template": "auto",
        "rewritten_turns": "separate",
    }


def load_data_of_model(model: str, data: str, overrides: list[str] | tuple[str, ...] = ()) -> DataOfModel:
    """The checked sections for a model's name or folder and :func:`recognised_data`; errors as in `load_config`."""
    values = {"model": {"name_or_path": model}, "data": recognised_data(data)}
    return _checked(DataOfModel, values, overrides, "command line")


def load_config(preset: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A checked configuration from a preset (name or path) and `a.b=value` overrides, which are parsed as YAML.

    Example:
        >>> load_config("gsm8k", ["data.sources.0.path=train.jsonl", "selection.ratio=0.2"])

    Raises:
        UserError: names every violation with its dotted path, the accepted values and the nearest spelling.
    """
    values: dict[str, Any] = {}
    origin = "command line"
    if preset is not None:
        origin = str(preset)
        values = _read_preset(find_resource("preset", preset), including=())
    return _checked(RunConfig, values, overrides, origin)


def override_config(config: RunConfig, settings: Mapping[str, Any], origin: str = "settings") -> RunConfig:
    """The configuration with some settings changed, by their dotted paths.

    Example:
        >>> override_config(config, {"selection.alpha": 1, "selection.beta": 0})

    Raises:
        UserError: names every violation, as `load_config` does.
    """
    values = config.model_dump(mode="json")
    for key, value in settings.items():
        _set_dotted(values, key, value, origin)
    return _validated(RunConfig, values, origin)


def load_evaluated(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> EvaluatedConfig:
    """The checked sections of a model to evaluate; `overrides` and errors are those of :func:`load_config`."""
    return _checked(EvaluatedConfig, {"model": {"name_or_path": name_or_path}}, overrides, "command line")


def _checked(schema: type[SchemaT], values: dict[str, Any], overrides: Iterable[str], origin: str) -> SchemaT:
    for override in overrides:
        _apply_override(values, override)
    return _validated(schema, values, origin)


def _validated(schema: type[SchemaT], values: dict[str, Any], origin: str) -> SchemaT:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = _explain(error, values, schema)
        raise UserError(f"{origin}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems)) from error


def save_resolved(config: RunConfig, path: str | Path) -> None:
    """Writes every setting of a run, defaults included, as a preset that `load_config` reads back unchanged."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _read_preset(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The merged mapping of a preset and of what it includes; later files win, the preset's own keys win last."""
    if path in including:
        raise UserError("presets include each other: " + " -> ".join(str(p) for p in (*including, path)))
    own = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(own, dict):
        raise UserError(f"{path}: a preset is a mapping of sections, got a {type(own).__name__}")
    includes = own.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{path}: include: a list of file names is accepted, got {includes!r}")
    merged: dict[str, Any] = {}
    for name in includes:
        found = [folder / name for folder in (path.parent, folder_of("preset")) if (folder / name).is_file()]
        if not found:
            raise UserError(f"{path}: include: no file {name!r} beside it or in {folder_of('preset')}")
        merged = _merge(merged, _read_preset(found[0].resolve(), (*including, path)))
    return _merge(merged, own)


def _merge(base: dict[str, Any], winner: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; anything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in winner.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override}: write section.key=value, such as --set training.learning_rate=1e-4")
    _set_dotted(values, key, parse_yaml(text, f"--set {key}"), f"--set {override}")


def _set_dotted(values: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Sets one dotted key in place; numbers step into lists, and the number after the last item appends one."""
    steps = key.split(".")
    node: Any = values
    for depth, step in enumerate(steps):
        here = ".".join(steps[:depth]) or "the configuration"
        if isinstance(node, list):
            if not step.isdigit() or int(step) > len(node):
                raise UserError(
                    f"{origin}: {here} is a list; accepted are the positions 0 to {len(node)}, got {step!r}"
                )
            step = int(step)
            if step == len(node):
                node.append(None)
        elif not isinstance(node, dict):
            raise UserError(f"{origin}: {here} is the value {node!r} and has no keys")
        if depth == len(steps) - 1:
            node[step] = value
            return
        if (node[step] if isinstance(node, list) else node.get(step)) is None:
            node[step] = [] if steps[depth + 1].isdigit() else {}
        node = node[step]


def _explain(error: ValidationError, values: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    """One line per violation. The members of a union that all refuse one value share a line."""
    problems: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        loc = item["loc"]
        if item["type"] in ("extra_forbidden", "missing"):
            *parents, key = loc
            accepted = sorted(_section_at(parents, schema).model_fields)
            message = (
                f"unknown key; accepted keys: {', '.join(accepted)}{did_you_mean(key, accepted)}"
                if item["type"] == "extra_forbidden"
                else "required, but not given"
            )
        else:
            loc = _steps_in(values, loc)
            message = str(item.get("ctx", {}).get("error") or item["msg"].replace("Input should", "should"))
            if item["type"] != "value_error":
                message += f", got {item['input']!r}"
            if item["type"] == "literal_error":
                message += did_you_mean(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        problems.setdefault(".".join(map(str, loc)), []).append(message)
    return [_with_path(path, " or ".join(dict.fromkeys(messages))) for path, messages in problems.items()]


def _with_path(path: str, message: str) -> str:
    """`path: message`, where the message (of SelectionRule, say) does not open with its dotted path already."""
    return message if not path or message.startswith(f"{path}.") else f"{path}: {message}"


def _steps_in(values: Any, loc: tuple[int | str, ...]) -> list[int | str]:
    """The part of a pydantic location that exists in the data: the rest are names of union members."""
    steps: list[int | str] = []
    for step in loc:
        if not (isinstance(values, dict) and step in values or isinstance(values, list) and isinstance(step, int)):
            break
        values = values[step]
        steps.append(step)
    return steps


def _section_at(loc: list[int | str], section: type[BaseModel]) -> type[BaseModel]:
    for step in loc:
        if isinstance(step, str):
            section = _section_in(section.model_fields[step].annotation)
    return section


def _section_in(annotation: Any) -> type[BaseModel]:
    """The section class inside `Section | None` or `list[Section]`."""
    while get_origin(annotation) in (list, Annotated, Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not types.NoneType)
    return annotation
