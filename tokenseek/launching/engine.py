"""What an engine keeps on every device, from an accelerate config."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tokenseek.config.resources import resolve_accelerate_config
from tokenseek.config.strict_yaml import parse_yaml
from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.sequence import PARALLEL_SIZES, require_groups, served_parallelism


@dataclass(frozen=True)
class Engine:
    """How parameters, gradients and optimizer states lie on each of P processes.

    Attributes:
        kind: "single", "ddp", "zero1", "zero2", "zero3" or "fsdp2".
        processes: P.
        sp_size: how many of them share each text (sequence parallelism).
        on_cpu: the processes train on CPUs.
        offload_optimizer, offload_parameters: kept in host memory.
        reduce_bucket: elements of a bucket of gradients in DeepSpeed; None: as accelerate chooses, hidden size squared.
    """

    kind: str = "single"
    processes: int = 1
    sp_size: int = 1
    on_cpu: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int | None = None

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the steps: ZeRO of any stage."""
        return self.kind.startswith("zero")

    @property
    def shards_parameters(self) -> bool:
        """Whether each process holds a part of the weights between their uses."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def shards_gradients(self) -> bool:
        """Whether each process holds a part of the gradients."""
        return self.kind in ("zero2", "zero3", "fsdp2")

    @property
    def shards_optimizer(self) -> bool:
        """Whether each process holds a part of the optimizer's state."""
        return self.is_deepspeed or self.kind == "fsdp2"

    def __str__(self) -> str:
        offload = [name for name in ("optimizer", "parameters") if getattr(self, f"offload_{name}")]
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        processes += f", {self.sp_size} to a text" if self.sp_size > 1 else ""
        return f"{self.kind}, {processes}" + (f", {' and '.join(offload)} in host memory" if offload else "")


def require_whole_weights(engine: str, quantization: str | None) -> None:
    """Refuse quantised weights under an engine that shards parameters.

    Raises:
        UserError: the weights are quantised.
    """
    if quantization:
        raise UserError(
            f"model.quantization: {engine} splits parameters over the processes, and TokenSeek does not split packed "
            f"{quantization} weights, whose scales are no parameters. Launch with ddp.yaml or zero2.yaml, which keep "
            "the small quantised weights whole and split the optimizer's states, or set model.quantization to null."
        )


def read_engine(accelerate_config: str | Path = "single", num_processes: int | None = None) -> Engine:
    """The engine of an accelerate config, by name or path.

    Args:
        num_processes: replaces the config's number.

    Raises:
        UserError: for layouts that cannot be planned, by name.
    """
    path = resolve_accelerate_config(accelerate_config)
    config = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if num_processes:
        config["num_processes"] = num_processes
    return _engine(config, str(accelerate_config))


def launched_engine(on_cpu: bool) -> Engine:
    """The engine of the `accelerate launch` that this process is part of, from what it hands its processes.

    Raises:
        UserError: as :func:`read_engine` does.
    """
    return _engine(environment.launched_config(on_cpu), "this launch")


def _engine(config: dict, accelerate_config: str) -> Engine:
    """
    Args:
        config: keys as in an accelerate config.
        accelerate_config: what to call it.
    """
    kind = str(config.get("distributed_type", "NO")).upper()
    engine = Engine(processes=config.get("num_processes", 1), on_cpu=bool(config.get("use_cpu")))
    if given := config.get("parallelism_config"):
        sizes = {name: int(given.get(f"parallelism_config_{name}", 1)) for name in PARALLEL_SIZES}
        parallelism = served_parallelism(kind == "FSDP", **sizes)
        if parallelism.sp_size == 1 < parallelism.total_size:
            raise UserError(
                f"{accelerate_config}: of parallelism_config, plan serves sp_size; tensor and context parallelism and "
                "hybrid sharding cannot be planned."
            )
        require_groups(parallelism, engine.processes)
        engine = replace(engine, sp_size=parallelism.sp_size)
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return replace(engine, kind="ddp" if engine.processes > 1 else "single")
    if kind == "FSDP":
        fsdp = config.get("fsdp_config") or {}
        if int(fsdp.get("fsdp_version", 1)) != 2 or fsdp.get("fsdp_reshard_after_forward") is False:
            raise UserError(
                f"{accelerate_config}: of FSDP, plan serves fsdp_version 2 with fsdp_reshard_after_forward true."
            )
        offload = bool(fsdp.get("fsdp_offload_params"))
        return replace(engine, kind="fsdp2", offload_optimizer=offload, offload_parameters=offload)
    if kind == "DEEPSPEED":
        return _deepspeed(engine, config.get("deepspeed_config") or {})
    raise UserError(
        f"{accelerate_config}: distributed_type {kind} cannot be planned; accepted are NO, MULTI_GPU, DEEPSPEED "
        "and FSDP."
    )


def _deepspeed(engine: Engine, settings: dict) -> Engine:
    if file := settings.get("deepspeed_config_file"):
        zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        bucket = zero.get("reduce_bucket_size", 500_000_000)
        stage, devices = zero.get("stage", 0), [zero.get(f"offload_{what}", {}) for what in ("optimizer", "param")]
        optimizer, parameters = (device.get("device", "none") for device in devices)
    else:
        stage, bucket = int(settings.get("zero_stage", 2)), "auto"
        optimizer = settings.get("offload_optimizer_device", "none")
        parameters = settings.get("offload_param_device", "none")
    return replace(
        engine,
        kind=f"zero{stage}" if stage else "ddp",
        offload_optimizer=optimizer != "none",
        offload_parameters=parameters != "none",
        reduce_bucket=None if bucket == "auto" else int(bucket),
    )
