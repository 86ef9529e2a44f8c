"""Which kernels attention runs on, what a new shape costs, and whether gradients are numbers: with and without cuDNN.

Shapes: T tokens, S selected, N query heads, K key/value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from tokenseek.decoder.masks import aligned_mask

# With a mask, this many keys and a row whose log-sum-exp is below -88.7, cuDNN's gradient of the query has been NaN
# (https://github.com/pytorch/pytorch/issues/196678): scores of 12 * -1 * 64 / 8 = -96, less than 7 for the sum of all.
NAN_KEYS, NAN_QUERY, NAN_HEAD = 704, 12.0, 64


class Call:
    """One of the two attention calls of a layer, forward and backward.

    Args:
        kind: "causal", that of the unselected rows, or "masked", that of the selected ones.
    """

    def __init__(self, kind: str, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str):
        query_heads, key_heads, head_dim = heads
        self.mask = None
        rows, batch_heads = tokens, query_heads
        if kind == "masked":  # a tenth of the rows; the heads of a group as more rows of one
            selected_S = torch.arange(0, tokens, 10, device=device)
            seen_ST = torch.arange(tokens, device=device) <= selected_S[:, None]
            groups = query_heads // key_heads
            self.mask = aligned_mask(seen_ST[None, None], dtype, groups)
            rows, batch_heads = groups * len(selected_S), key_heads
        options = dict(dtype=dtype, device=device, requires_grad=True)
        self.query = torch.randn(1, batch_heads, rows, head_dim, **options)
        self.key, self.value = (torch.randn(1, batch_heads, tokens, head_dim, **options) for _ in range(2))

    @property
    def backend(self) -> str:
        """torch's choice."""
        chosen = torch._fused_sdp_choice(self.query, self.key, self.value, self.mask, 0.0, self.mask is None)
        return SDPBackend(chosen).name

    def __call__(self) -> list[torch.Tensor]:
        """The output and the three gradients."""
        qkv = [self.query, self.key, self.value]
        output = scaled_dot_product_attention(*qkv, attn_mask=self.mask, is_causal=self.mask is None)
        return [output, *torch.autograd.grad(output, qkv, torch.ones_like(output))]


def kernel_rows(device: str, dtype: str, tokens: int, heads: tuple[int, int, int], shapes: int) -> Iterator[dict]:
    """
    Args:
        shapes: how many lengths that were not seen before are timed.
    """
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    yield dict(check="libraries", **libraries(device))
    for cudnn in (True, False):
        with cudnn_allowed(cudnn):
            for kind in ("causal", "masked"):
                call = Call(kind, tokens, heads, precision, device)
                call()
                row = dict(check="choice", call=kind, tokens=tokens, cudnn=cudnn, backend=call.backend)
                yield row | dict(kernels=[name for name, _ in kernels_of(call, device)], ms=milliseconds(call, device))
    for cudnn in (True, False):
        with cudnn_allowed(cudnn):
            for kind in ("causal", "masked"):
                first, again = [], []
                for i in range(shapes):
                    call = Call(kind, tokens + 16 * i + 1, heads, precision, device)
                    first.append(milliseconds(call, device))
                    again.append(milliseconds(call, device))
                yield dict(check="new shape", call=kind, cudnn=cudnn, first_ms=first, again_ms=again)
    for cudnn in (True, False):
        with cudnn_allowed(cudnn):
            call = Call("masked", NAN_KEYS, (heads[0], heads[1], NAN_HEAD), precision, device)
            with torch.no_grad():
                call.query.fill_(NAN_QUERY)
                call.key.fill_(-1)
            is_finite = all(bool(x.isfinite().all()) for x in call())
            row = dict(check="finite", keys=NAN_KEYS, cudnn=cudnn, backend=call.backend, finite=is_finite)
            if not cudnn and not is_finite:
                row["error"] = "without cuDNN, a gradient of attention is not finite"
            yield row


@contextmanager
def cudnn_allowed(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def libraries(device: str) -> dict:
    import accelerate
    import transformers

    found = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        accelerate=accelerate.__version__,
        device=device_name(device),
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), memory=properties.total_memory)
        found |= dict(capability=f"{properties.major}.{properties.minor}")
    return found


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run, device: str) -> float:
    """Wall time of one call."""
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return round(1e3 * (time.perf_counter() - began), 3)


def kernels_of(run, device: str) -> list[tuple[str, float]]:
    """Names and microseconds of the kernels of one call, in the order of their launches; none on a CPU.

    Copies and fills of memory, which the GPU does beside its kernels, are not among them.
    """
    if device != "cuda":
        run()
        return []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [(event.name, event.time_range.elapsed_us()) for event in profiled.events() if _is_kernel(event)]


def _is_kernel(event: FunctionEvent) -> bool:
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    return on_device and not event.name.startswith(("Memcpy", "Memset")) and not event.is_user_annotation
