"""What an engine keeps on every device, from an accelerate config."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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


def require_splittable(kind: str, quantization: str | None) -> None:
    """Refuse packed weights that an engine would split and cannot.

    Args:
        kind: as :attr:`Engine.kind`; or "fsdp1".

    Raises:
        UserError: the engine splits parameters, and the packed weights are int8, or the engine is not made for them.
    """
    engine = {"zero3": "ZeRO-3", "fsdp1": "FSDP", "fsdp2": "FSDP"}.get(kind)
    if engine is None or not quantization:
        return
    if quantization == "int8":
        raise UserError(
            f"model.quantization: {engine} splits parameters over the processes, and int8 weights cannot be split: "
            "their layers keep a copy and scales of their own. Set model.quantization=nf4, half as large and split "
            "here, or launch with ddp.yaml or zero2.yaml, which keep weights whole."
        )
    if kind == "fsdp1":
        raise UserError(
            f"model.quantization: FSDP 1 joins the weights of a layer into one, {quantization} and others. Launch with "
            "fsdp2.yaml (fsdp_version: 2), which splits each by itself, or with ddp.yaml, which keeps weights whole."
        )


def require_splittable_by(accelerate_config: str | Path, quantization: str | None) -> None:
    """As :func:`require_splittable`, of an accelerate config by name or path, before any process starts."""
    if quantization:
        path = resolve_accelerate_config(accelerate_config)
        config = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        require_splittable(kind_of(config), quantization)


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


def kind_of(config: dict) -> str:
    """:attr:`Engine.kind` of an accelerate config, or what else it asks for: "fsdp1" for FSDP 1, "XLA", ...

    Args:
        config: keys as in an accelerate config.
    """
    kind = str(config.get("distributed_type", "NO")).upper()
    if kind == "FSDP":
        return f"fsdp{int((config.get('fsdp_config') or {}).get('fsdp_version', 1))}"
    if kind == "DEEPSPEED":
        stage = _zero_stage(config.get("deepspeed_config") or {})
        return f"zero{stage}" if stage else "ddp"
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp" if config.get("num_processes", 1) > 1 else "single"
    return kind


def _engine(config: dict, accelerate_config: str) -> Engine:
    """
    Args:
        config: keys as in an accelerate config.
        accelerate_config: what to call it.
    """
    kind = kind_of(config)
    engine = Engine(processes=config.get("num_processes", 1), on_cpu=bool(config.get("use_cpu")))
    if given := config.get("parallelism_config"):
        sizes = {name: int(given.get(f"parallelism_config_{name}", 1)) for name in PARALLEL_SIZES}
        parallelism = served_parallelism(kind.startswith("fsdp"), **sizes)
        if parallelism.sp_size == 1 < parallelism.total_size:
            raise UserError(
                f"{accelerate_config}: of parallelism_config, plan serves sp_size; tensor and context parallelism and "
                "hybrid sharding cannot be planned."
            )
        require_groups(parallelism, engine.processes)
        engine = replace(engine, sp_size=parallelism.sp_size)
    if str(config.get("distributed_type")).upper() == "DEEPSPEED":
        return _deepspeed(replace(engine, kind=kind), config.get("deepspeed_config") or {})
    if kind in ("single", "ddp"):
        return replace(engine, kind=kind)
    if kind.startswith("fsdp"):
        fsdp = config.get("fsdp_config") or {}
        if kind != "fsdp2" or fsdp.get("fsdp_reshard_after_forward") is False:
            raise UserError(
                f"{accelerate_config}: of FSDP, plan serves fsdp_version 2 with fsdp_reshard_after_forward true."
            )
        offload = bool(fsdp.get("fsdp_offload_params"))
        return replace(engine, kind=kind, offload_optimizer=offload, offload_parameters=offload)
    raise UserError(
        f"{accelerate_config}: distributed_type {kind} cannot be planned; accepted are NO, MULTI_GPU, DEEPSPEED "
        "and FSDP."
    )


def _zero_stage(settings: dict) -> int:
    if file := settings.get("deepspeed_config_file"):
        return int(_zero_settings(file).get("stage", 0))
    return int(settings.get("zero_stage", 2))  # accelerate's default


def _zero_settings(file: str) -> dict[str, Any]:
    return json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})


def _deepspeed(engine: Engine, settings: dict) -> Engine:
    if file := settings.get("deepspeed_config_file"):
        zero = _zero_settings(file)
        bucket = zero.get("reduce_bucket_size", 500_000_000)
        optimizer, parameters = (
            zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")
        )
    else:
        bucket = "auto"
        optimizer = settings.get("offload_optimizer_device", "none")
        parameters = settings.get("offload_param_device", "none")
    return replace(
        engine,
        offload_optimizer=optimizer != "none",
        offload_parameters=parameters != "none",
        reduce_bucket=None if bucket == "auto" else int(bucket),
    )
