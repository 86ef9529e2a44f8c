"""The section `training`: what Transformers' trainer takes, in its names, and what ditching adds."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from tokenseek.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section
from tokenseek.config.sizes import parse_size
from tokenseek.errors import UserError
from tokenseek.spelling import did_you_mean

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


class DitchingSettings(Section):
    """The settings of training that are no fields of `transformers.TrainingArguments`.

    - `ditching`: false is ordinary fine-tuning on all tokens.
    - `recompute`: the selected pass once more in the backward pass. `auto` does so where a step (of one row, if the
      batch size is `auto` too) does not fit into `memory_budget` otherwise, by its plan.
    - `kv_storage`: where keys and values wait for it: on the `device`, on the `host`, or in 8 bits (`int8`, not exact),
      there or on the host (`int8_host`).
    - `compile`: norms and feed-forward blocks compiled by torch, for fewer and larger kernels on a GPU.
    - `liger`: Liger's kernels for norms, rotary embeddings and gated feed-forward blocks, on a GPU.
    - `tile_rows`: how many tokens without gradient go through a layer at once (unselected ones; all, where a step
      selects, and in scoring and evaluation): a number, or `auto`, 2048 where there are 4096 or more. Losses and
      gradients are the same.
    - `on_nan`: whether a loss or gradient that is not finite ends the run (`stop`) or not (`continue`).
    - `packing`: `true` lays the examples of a micro batch in one row instead of padding them; losses and gradients are
      the same. `bins` packs the whole data set into rows of `data.max_length` tokens first, by first-fit decreasing: a
      micro batch then is `per_device_train_batch_size` rows full of examples, and an epoch has fewer steps.
    - `sequence_layout`: which tokens of a text each rank holds where the accelerate config has ranks share texts
      (`sp_size`): `balanced`; `contiguous`, as stock Ulysses; or `regroup`, contiguous and regrouped in each layer as
      in the paper. Losses are the same in all three.
    - `memory_budget`: what a process may take on its device where `selection.ratio`, `per_device_train_batch_size` or
      `recompute` is `auto`, such as `8GiB`; left out, nine tenths of what is free there.
    - `early_stopping_patience`: end the run after so many evaluations in a row without a lower held-out loss.
    - `load_best`: `final/` is the checkpoint with the least held-out loss, and not the last.
    - `sample_prompts`: at each evaluation the model continues these, into `metrics.jsonl` and the terminal. They are
      rendered as instructions of the training data are; for data of kind `text` and `completion` they are texts.
    - `push_to_hub`: upload the finished model, its card and the configuration to `hub_model_id`, a name on the hub like
      `me/my-model`, which is made before training.
    - `resume`: `auto` (from the newest checkpoint in output_dir, if any), `never` (what output_dir holds is moved to
      `earlier-1` in it), or the path of a checkpoint.
    """

    ditching: bool = True
    recompute: bool | Literal["auto"] = False
    kv_storage: Literal["device", "host", "int8", "int8_host"] = "device"
    tile_rows: Literal["auto"] | PositiveInt = "auto"
    packing: bool | Literal["bins"] = False
    sequence_layout: Literal["balanced", "contiguous", "regroup"] = "balanced"
    memory_budget: str | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    liger: bool = False
    on_nan: Literal["stop", "continue"] = "stop"
    early_stopping_patience: PositiveInt | None = None
    load_best: bool = False
    sample_prompts: list[str] = []
    push_to_hub: bool = False
    hub_model_id: str | None = None
    resume: str = "auto"
    extra: dict[str, Any] = {}


class TrainingConfig(DitchingSettings):
    """Training, in the names of `transformers.TrainingArguments`; `extra` forwards any other of its fields.

    `per_device_train_batch_size: auto` is the largest micro batch that fits into memory, by the planner's word.
    `gradient_accumulation_steps` then says how many rows of a step are each process's, and is divided by it.
    """

    per_device_train_batch_size: PositiveInt | Literal["auto"] = 1
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

    @property
    def micro_batch(self) -> int:
        """Rows of a micro batch.

        Raises:
            UserError: they are still to be settled.
        """
        if self.per_device_train_batch_size == "auto":
            raise UserError(
                "training.per_device_train_batch_size is auto, which is settled when training starts and saved in the "
                "run's config.yaml. Give that file, or a number (--set training.per_device_train_batch_size=1)."
            )
        return self.per_device_train_batch_size

    @field_validator("memory_budget")
    @classmethod
    def _check_memory_budget(cls, budget: Any) -> Any:
        if budget is not None:
            parse_size(budget)
        return budget

    @model_validator(mode="after")
    def _check_hub(self) -> Self:
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, a name on the hub such as me/my-model")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError("hub_model_id is for push_to_hub: true; set that, or leave it out")
        return self

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        if self.packing and not self.ditching:
            raise ValueError(
                f"packing: {self.packing if self.packing == 'bins' else 'true'} needs ditching: true; ordinary "
                "fine-tuning pads its batches. To train on all tokens of packed rows, set selection.rule: all"
            )
        return self

    @field_validator("extra")
    @classmethod
    def _check_extra(cls, extra: Any) -> Any:
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
