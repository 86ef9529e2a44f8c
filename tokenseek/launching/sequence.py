"""The sequence-parallel groups of a launch, as its accelerate config asks for them.

`accelerate launch` hands the config's ``parallelism_config`` to its processes. Accelerate's own answer to an
``sp_size`` in it is stock Ulysses: batches are cut into contiguous shards and labels renamed on their way to the model,
whatever a Trainer has planned for its loss. The setting is the same here, the answer another: see
:func:`tokenseek.parallel.enable_sequence_parallelism`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch.distributed as dist
from accelerate import ParallelismConfig

from tokenseek.errors import UserError
from tokenseek.launching import environment

PARALLEL_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")


def launched_sp_size() -> int:
    """How many processes share a text in this launch: ``sp_size`` of its ``parallelism_config``, 1 without one.

    Raises:
        UserError: the ``parallelism_config`` is none, or asks for what is incompatible with ``sp_size``.
    """
    if not environment.has_parallelism_config():
        return 1
    config = served_parallelism(environment.uses_fsdp())
    if config.sp_size > 1 and (attention := environment.sequence_attention()) != "sdpa":
        raise UserError(
            f"parallelism_config: sp_attn_implementation is {attention}; which attention a model uses is "
            "the preset's business (model.attn_implementation). Leave it out."
        )
    return config.sp_size


def served_parallelism(fsdp: bool, **sizes: int) -> ParallelismConfig:
    """An accelerate config's ``parallelism_config``, if its ``sp_size`` is compatible with the rest of it.

    Args:
        fsdp: whether the config asks for FSDP.
        sizes: by the names in PARALLEL_SIZES; what is not given is that of this launch.

    Raises:
        UserError: it is none, or asks for what is incompatible with ``sp_size``.
    """
    try:
        config = ParallelismConfig(**sizes)
    except ValueError as error:
        raise UserError(f"parallelism_config of the accelerate config: {error}") from error
    if config.sp_size == 1:
        return config
    for name in ("tp_size", "cp_size"):
        if getattr(config, name) > 1:
            raise UserError(
                f"parallelism_config: sp_size {config.sp_size} and {name} {getattr(config, name)} cannot be "
                f"combined; set {name} to 1."
            )
    if fsdp:
        raise UserError(
            f"parallelism_config: sp_size {config.sp_size} together with FSDP is not supported. Launch with sp2.yaml, "
            "sp4.yaml (DDP) or sp_zero3.yaml, which splits parameters over all processes as FSDP does."
        )
    return config


def sequence_group(device_type: str) -> dist.ProcessGroup | None:
    """This process's group of ``sp_size`` neighbours; None where every process has texts of its own.

    All processes of a launch have to call it, after they have joined.

    Args:
        device_type: "cuda" or "cpu", say.

    Raises:
        UserError: ``sp_size`` does not divide the number of processes, or does not leave the data-parallel sizes that
            are given beside it.

    Example:
        >>> group = tokenseek.parallel.sequence_group("cuda")  # in an `accelerate launch` with sp4.yaml
        >>> if group is not None:
        ...     tokenseek.parallel.enable_sequence_parallelism(model, group)
    """
    size = launched_sp_size()
    if size == 1:
        return None
    require_groups(ParallelismConfig(), dist.get_world_size() if dist.is_initialized() else 1)
    return _mesh(dist.group.WORLD, device_type, size)["sp"].get_group()


def require_groups(config: ParallelismConfig, processes: int) -> None:
    """Raise UserError unless that many processes make whole groups of ``sp_size``, as many as ``config`` says."""
    size = config.sp_size
    if size == 1:
        return
    if processes % size:
        accepted = [str(d) for d in range(1, processes + 1) if processes % d == 0]
        raise UserError(
            f"parallelism_config: sp_size {size} does not divide the {processes} process(es) of this launch; sizes "
            f"that do: {', '.join(accepted)}. Or change --num_processes."
        )
    given = config.data_parallel_size
    if given not in (1, processes // size):
        raise UserError(
            f"parallelism_config: dp_replicate_size x dp_shard_size is {given}, but {processes} processes in groups of "
            f"{size} (sp_size) leave {processes // size}. Leave both out: they follow from the other two."
        )


@cache
def _mesh(world: dist.ProcessGroup, device_type: str, size: int) -> dist.DeviceMesh:
    """Made once for all who ask: on GPUs every group costs memory."""
    return dist.init_device_mesh(device_type, (world.size() // size, size), mesh_dim_names=("dp", "sp"))


@contextmanager
def unseen_by_accelerate() -> Iterator[None]:
    """An ``Accelerator`` that is made inside knows nothing of ``sp_size`` and leaves batches as they are."""
    with environment.without_parallelism_config() if launched_sp_size() > 1 else nullcontext():
        yield
