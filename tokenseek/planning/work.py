"""What a step computes and moves, counted in its operations, and how long that takes on a named GPU: an estimate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from tokenseek.errors import UserError
from tokenseek.launching.engine import Engine
from tokenseek.spelling import did_you_mean

_aten = torch.ops.aten
# torch counts the attention kernels of GPUs; on a CPU, where steps are planned, another one stands for them. Nor does
# it count a product that is added in place, by which the gradient of a trained head is made.
FLOP_FORMULAS = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
# These read the rows that they return, or write the rows that they are given, and not all of a table.
_OF_ROWS = {_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.index_copy_, _aten.scatter_}
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU, from its vendor's data sheet, dense.

    Attributes:
        flops, flops_float32: per second, in bfloat16 with float32 sums, and in float32 outside tensor cores.
        bandwidth: bytes per second of its memory.
        link: bytes per second that it sends to its neighbours, one way (NVLink, or PCIe x16).
        memory: bytes, as its driver reports them.
        launch: seconds that its host takes to launch an operation, in eager mode.
    """

    flops: float
    flops_float32: float
    bandwidth: float
    link: float
    memory: int = 0
    launch: float = 7.5e-6


GPUS = {
    "H200": Gpu(989e12, 67e12, 4.8e12, 450e9, 143771 * 2**20),
    "H100": Gpu(989e12, 67e12, 3.35e12, 450e9, 81559 * 2**20),
    "A100-80": Gpu(312e12, 19.5e12, 2.039e12, 300e9, 81920 * 2**20),
    "A100-40": Gpu(312e12, 19.5e12, 1.555e12, 300e9, 40536 * 2**20),
    "L40S": Gpu(362e12, 91.6e12, 864e9, 32e9, 46068 * 2**20),
    "L4": Gpu(121e12, 30.3e12, 300e9, 32e9, 23034 * 2**20),
    "A10": Gpu(125e12, 31.2e12, 600e9, 32e9, 23028 * 2**20),
    "RTX4090": Gpu(165e12, 82.6e12, 1.008e12, 32e9, 24564 * 2**20),
    "RTX3090": Gpu(71e12, 35.6e12, 936e9, 32e9, 24576 * 2**20),
}
# The GPU of the paper, whose times weigh the moments of a step where memory is averaged over them.
REFERENCE = "A100-40"
# The share of every one of these peaks that real kernels and collectives are taken to reach.
EFFICIENCY = 0.6


def find_gpu(name: str, launch_us: float | None = None) -> Gpu:
    """
    Args:
        launch_us: microseconds of :attr:`Gpu.launch`, in the place of its own.

    Raises:
        UserError: no such GPU, with the names there are.
    """
    if name not in GPUS:
        raise UserError(f"--gpu {name}: accepted are {', '.join(GPUS)}{did_you_mean(name, GPUS)}")
    gpu = GPUS[name]
    return gpu if launch_us is None else replace(gpu, launch=1e-6 * launch_us)


@dataclass(frozen=True)
class StepWork:
    """An optimizer step of one process, with all its micro batches.

    Attributes:
        flops: floating-point operations of its matrix products and attention, by torch's formulas.
        sent: bytes that leave the process.
        operations: number of those with the same (arithmetic, bytes read and written, whether in float32).
    """

    flops: int
    sent: int
    operations: Counter[tuple[float, int, bool]]

    def seconds(self, gpu: Gpu) -> float:
        """Each operation takes as long as its arithmetic or its traffic, whichever is longer."""
        return sum(count * operation_seconds(*operation, gpu) for operation, count in self.operations.items())

    @property
    def launches(self) -> int:
        """Operations that the host launches, one after the other."""
        return self.operations.total()

    def step_seconds(self, gpu: Gpu) -> float:
        """The GPU computes while its host launches what follows: the longer of the two."""
        return max(self.seconds(gpu), self.launches * gpu.launch)

    def sending_seconds(self, gpu: Gpu) -> float:
        """All or most of it at the same time as the computing."""
        return self.sent / gpu.link / EFFICIENCY


def operation_seconds(flops: float, nbytes: int, is_float32: bool, gpu: Gpu) -> float:
    """The time of its arithmetic or of its traffic, whichever is longer."""
    arithmetic = flops / (gpu.flops_float32 if is_float32 else gpu.flops)
    return max(arithmetic, nbytes / gpu.bandwidth) / EFFICIENCY


def sent_bytes(engine: Engine, weights: int, trained: int, gathered_more: int, micro_batches: int) -> int:
    """Bytes that leave a process in an optimizer step, by rings (docs/distributed.md, "What is sent").

    Args:
        weights, trained: bytes of all weights and of those that are trained, in the dtype in which they travel.
        gathered_more: bytes that a micro batch gathers besides those of one forward and one backward pass.
    """
    times = {
        "single": 0,
        "ddp": 2 * trained,
        "zero1": 2 * trained,
        "zero2": micro_batches * trained + trained,
        "zero3": micro_batches * (2 * weights + gathered_more + trained),
        "fsdp2": micro_batches * (2 * weights + gathered_more + trained),
    }
    return times[engine.kind] * (engine.processes - 1) // engine.processes


class Work(TorchDispatchMode):
    """Counts, for every operation in the block, its floating-point operations and the bytes it reads and writes.

    Matrix products and attention count by torch's formulas (``torch.utils.flop_counter``); everything else is bytes.

    Attributes:
        seconds: of all operations since the beginning of the block, on the GPU :data:`REFERENCE`.

    Example:
        >>> with Work() as work:
        ...     _ = torch.ones(8, 16) @ torch.ones(16, 4)
        >>> work.flops
        1024
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin to count again."""
        self.times = 1  # what an operation stands for
        self.flops = 0
        self.operations: Counter[tuple[float, int, bool]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = func._overloadpacket
        if operation in _ALLOCATIONS:
            return result
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        returned = list(tensors_in((result,)))
        if not returned and func._schema.is_mutable:  # of many tensors at once, written over
            returned = list(tensors_in(args[:1]))
        if not returned or (not func._schema.is_mutable and _is_view(given, returned)):
            return result
        work: float = 0
        flops = 0
        if formula := FLOP_FORMULAS.get(operation):
            flops = formula(*args, **kwargs, out_val=result)
            work = flops / 2 if _is_causal(func, args, kwargs) else flops
        if operation in _OF_ROWS:
            rows = given[-1:] if func._schema.is_mutable else returned
            nbytes = 2 * sum(map(_nbytes, rows))
        else:
            nbytes = sum(map(_nbytes, given)) + sum(map(_nbytes, returned))
        self.flops += self.times * flops
        operation_key = work, nbytes, returned[0].dtype == torch.float32
        self.operations[operation_key] += self.times
        self.seconds += self.times * operation_seconds(*operation_key, GPUS[REFERENCE])
        return result


def tensors_in(values: Iterable) -> Iterator[torch.Tensor]:
    """As torch's tree_leaves of what operations take and return, at a fraction of its time."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def _nbytes(tensor: torch.Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # an expanded tensor is read over and over


def _is_view(given: list[torch.Tensor], returned: list[torch.Tensor]) -> bool:
    storages = {id(x.untyped_storage()) for x in given}
    return all(id(x.untyped_storage()) in storages for x in returned)


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Attention that leaves out what lies above the diagonal, which torch's formulas do not."""
    names = [argument.name for argument in func._schema.arguments]
    return bool(dict(zip(names, args, strict=False)).get("is_causal", kwargs.get("is_causal", False)))
