"""The schema of a run: its sections, and what has to hold between them.

Nothing heavy is imported here (no torch, no transformers), so every mistake in a configuration is reported, all of them
at once and each with its dotted path, before a model is loaded.
"""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, create_model, field_validator, model_validator
from typing_extensions import Self

from tokenseek.config.data import DataConfig
from tokenseek.config.section import Fraction, NonNegativeInt, PositiveInt, Section
from tokenseek.config.training import TrainingConfig
from tokenseek.errors import UserError
from tokenseek.selection import SelectionRule, rule_named
from tokenseek.spelling import did_you_mean

SectionT = TypeVar("SectionT", bound=Section)


class ModelConfig(Section):
    """Which model, and in which numbers it is held."""

    name_or_path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = False
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _check_double_quantization(self) -> Self:
        if self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise ValueError("double_quantization needs quantization: nf4 or fp4")
        return self


class ScoringConfig(Section):
    """Seeking: context and gradient score of every token (Eq. 3 and 4).

    With `mode: index` all data is scored once, by the model as it is before training, and the scores are stored apart
    in an index. With `mode: online` every training step scores its own tokens with the present model; there is no stage
    before training and no index. `auto` is `online` for a rule that weighs what it draws (`sampled`, the default), and
    for `reduction: error`; `index`, as in the paper, for the others, and where `index` or `loss_scope: sequence` is
    set.

    `reduction: error` is the norm of p - y (predicted probabilities less the target) in place of Eq. 4's gradient; it
    comes from the forward pass alone, and only online.
    `gradient_layer` counts from the end: 1 is layer N-1, the last one (Table S14 compares N-1, N-2 and N-3).
    `cpu_threads` fixes torch's threads while scoring on a CPU: float sums depend on how they are split over threads,
    and the bytes of an index must not depend on the machine's cores or the number of processes.
    """

    gradient_layer: Literal[1, 2, 3] = 1
    mode: Literal["auto", "index", "online"] = "auto"
    reduction: Literal["abs", "signed", "l2", "error"] = "abs"
    loss_scope: Literal["response", "sequence"] = "response"
    tokens_per_batch: PositiveInt = 8192
    tokens_per_shard: PositiveInt = 65536
    index: str | None = None
    cpu_threads: PositiveInt = 1

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "online" and self.index is not None:
            raise ValueError("scoring.index is for scoring.mode: index; online, no index is written or read")
        if self.mode == "online" and self.loss_scope == "sequence":
            raise ValueError("scoring.loss_scope: sequence is for scoring.mode: index; online, labels decide")
        if self.mode == "index" and self.reduction == "error":
            raise ValueError("scoring.reduction: error is for scoring.mode: online; an index takes abs, signed or l2")
        return self


_fields: dict[str, Any] = {field.name: (field.type, field.default) for field in fields(SelectionRule)}
_SelectionFields: Any = create_model("_SelectionFields", __base__=Section, **_fields)


class SelectionConfig(_SelectionFields):  # type: ignore[misc]  # made above of fields that are written once
    """The tokens that keep their gradient: the fields and defaults of `SelectionRule`, which checks the values.

    `ratio: auto` is the largest share with which a training step fits into `training.memory_budget`; online, the rule's
    default or as much of it as fits. It is settled when training starts, and saved with the run.

    `exact_layers` top layers and the head are trained on all tokens; below them, selected tokens are seeded with their
    gradient over their probability. It needs `scoring.mode: online` and rule `sampled` by the gradient alone. `auto` is
    1 with these, and 0 without.
    """

    ratio: float | Literal["auto"] = None  # type: ignore[assignment]  # the rule's own, as all that is left out
    bands: list[list[float]] | None = None
    exact_layers: NonNegativeInt | Literal["auto"] = "auto"

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in(cls, values: Any, handler: Callable[[Any], Self]) -> Self:
        """What is left out is the rule's own, and remains unset, so that another rule can be put in its place."""
        try:
            defaults = rule_named(values.get("rule", SelectionRule.rule)).defaults
        except (AttributeError, UserError):
            return handler(values)  # no mapping, or no rule, which is told there
        said = {name for name, value in values.items() if value is not None}
        section = handler({**values, **{name: value for name, value in defaults.items() if name not in said}})
        section.model_fields_set.intersection_update(said)
        return section

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ratio == "auto" and not self.takes_ratio:
            raise ValueError(f"selection.ratio is auto, but rule {self.rule!r} takes no ratio; leave one of them out")
        self._at_any_ratio()
        return self

    @property
    def takes_ratio(self) -> bool:
        """Whether the rule selects a share that is given."""
        return "ratio" in rule_named(self.rule).reads

    @property
    def draws_by_gradient(self) -> bool:
        """As of the rule, see :class:`tokenseek.SelectionRule`."""
        return self._at_any_ratio().draws_by_gradient

    def _at_any_ratio(self) -> SelectionRule:
        """The rule, at its default share where that is still to be settled."""
        return self.model_copy(update={"ratio": None}).to_rule() if self.ratio == "auto" else self.to_rule()

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

    @property
    def wanted_exact_layers(self) -> int:
        """`exact_layers`; what is still `auto`, where the model has a say, is 1: it teaches most (docs/evidence.md)."""
        return 1 if self.exact_layers == "auto" else self.exact_layers


class PeftSettings(Section):
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
    def _check_target_modules(cls, target: Any) -> Any:
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
    def _check_method(cls, method: Any) -> Any:
        if method not in ("lora", "loha", "lokr", "ia3"):  # the common ones need no import
            from peft import PeftType

            methods = [member.value.lower() for member in PeftType]
            if method not in methods:
                raise ValueError(
                    f"unknown PEFT method {method!r}{did_you_mean(method, methods)}; accepted: {', '.join(methods)}"
                )
        return method


class RunConfig(Section):
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

    @field_validator("output_dir")
    @classmethod
    def _expand_output_dir(cls, folder: Any) -> Any:
        return str(Path(folder).expanduser()) if folder.startswith("~") else folder

    @property
    def index_path(self) -> Path:
        """Where the token-position index is written and read."""
        return Path(self.scoring.index).expanduser() if self.scoring.index else Path(self.output_dir) / "index.arrow"

    @model_validator(mode="after")
    def _settle_auto(self) -> Self:
        """What other settings decide; `selection.exact_layers: auto` stays where the model has a say."""
        scoring, selection, rule = self.scoring, self.selection, rule_named(self.selection.rule)
        if scoring.mode == "auto":
            is_online = scoring.reduction == "error" or (rule.needs_scores and rule.weighs)
            stored = scoring.index is not None or scoring.loss_scope == "sequence"
            scoring = _with_unset(scoring, mode="online" if is_online and not stored else "index")
        by_gradient = selection.draws_by_gradient and scoring.reduction != "error"
        if selection.exact_layers == "auto" and not (scoring.mode == "online" and by_gradient):
            selection = _with_unset(selection, exact_layers=0)
        return self.model_copy(update={"scoring": scoring, "selection": selection})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training.eval_strategy != "no" and self.eval_data is None and self.data.hold_out is None:
            raise ValueError(
                f"training.eval_strategy is {self.training.eval_strategy}, but there is no eval_data section and no "
                "data.hold_out"
            )
        auto = self.selection.ratio == "auto"
        if auto and not self.training.ditching:
            raise ValueError("selection.ratio is auto and training.ditching false, which trains on all tokens")
        if self.selection.exact_layers:
            rule = self.selection
            if self.scoring.mode != "online" or self.scoring.reduction == "error":
                raise ValueError(
                    "selection.exact_layers needs scoring.mode: online and scoring.reduction: l2, abs or signed"
                )
            if not rule.draws_by_gradient:
                raise ValueError(
                    f"selection.exact_layers draws by the gradient and weighs: set selection.rule: sampled, alpha: 0 "
                    f"and beta: 1 (got rule {rule.rule}, alpha {rule.alpha:g})"
                )
        auto_batch = self.training.per_device_train_batch_size == "auto"
        recompute_auto = self.training.recompute == "auto"
        if auto and self.scoring.mode == "index" and (auto_batch or recompute_auto):
            other = "per_device_train_batch_size" if auto_batch else "recompute"
            raise ValueError(
                f"selection.ratio and training.{other} are both auto, and with scoring.mode: index the share takes all "
                "the memory that is free; give a value for one of them"
            )
        if recompute_auto and not self.training.ditching:
            raise ValueError("training.recompute: auto needs ditching: true; without, set true or false")
        if self.training.memory_budget and not (auto or auto_batch or recompute_auto):
            raise ValueError(
                "training.memory_budget is for selection.ratio: auto and training.per_device_train_batch_size: auto, "
                "and for training.recompute: auto; leave it out or set one of them"
            )
        if self.eval_data is not None and self.eval_data.is_streamed:
            raise ValueError("eval_data is measured again and again and cannot be streamed: set its streaming to false")
        if self.data.is_streamed:
            self._check_streaming()
        if self.eval_data is not None and (self.data.hold_out or self.eval_data.hold_out):
            raise ValueError("data.hold_out keeps evaluation data back from training; with eval_data, set it to null")
        return self

    def _check_streaming(self) -> None:
        training = self.training
        if training.ditching and self.scoring.mode == "index" and rule_named(self.selection.rule).needs_scores:
            raise ValueError(
                "data.sources: streaming: true has no index, which is made of all data before training: set "
                "scoring.mode: online"
            )
        if training.max_steps < 1:
            raise ValueError("data.sources: streaming: true has no end: set training.max_steps")
        if training.packing == "bins":
            raise ValueError("training.packing: bins packs all data before training; with streaming: true set true")
        if training.dataloader_num_workers > 1:
            raise ValueError(
                f"data.sources: a stream is read by one worker, got training.dataloader_num_workers: "
                f"{training.dataloader_num_workers}; set 0 or 1"
            )

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


def _with_unset(section: SectionT, **values: Any) -> SectionT:
    """`section` with values that nobody has set, so that they are settled anew where others are changed."""
    settled = section.model_copy(update=values)
    settled.model_fields_set.difference_update(values)
    return settled


class EvaluatedConfig(Section):
    """The sections of a model that no run of ours made: itself, and the data of its held-out loss."""

    model: ModelConfig
    eval_data: DataConfig | None = None


class DataOfModel(Section):
    """The sections that prepare data: whose tokenizer, and what for."""

    model: ModelConfig
    data: DataConfig
