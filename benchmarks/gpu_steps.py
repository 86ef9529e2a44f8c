"""Optimizer steps of several methods in one process: with the same batch in every step, and with a new one.

A GPU's caches of plans, its allocator and its compiler like what they have seen before. Real steps have other positions
and other lengths each time, so both are measured: "same" is one batch whose examples have all T tokens, "new" draws
positions, and lengths between three quarters of T and T, in every step.

Shapes: B batch, T tokens, S selected.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu_kernels import kernels_of, synchronize
from benchmarks.launches import Launches
from benchmarks.memory import LiveStorages, storage_bytes
from benchmarks.methods import Method, build
from benchmarks.step import DTYPES
from tokenseek.decoder.find import find_decoder
from tokenseek.decoder.head import next_token_labels
from tokenseek.ditching import ditching_of
from tokenseek.ditching.planned import PlannedRows
from tokenseek.labels import IGNORED

SHORTEST = 0.75
NEEDS = {"qlora": ("bitsandbytes", "peft"), "lora": ("peft",), "liger": ("liger_kernel",)}


def step_rows(
    methods: list[str], shape: str, batch: int, tokens: int, device: str, dtype: str, *, steps: int, seconds: float
) -> Iterator[dict]:
    """A row for every method and kind of batch; one that fails, or lacks a package, is a row that says so.

    Args:
        steps: timed ones of a row; where they take more than `seconds`, fewer, but three.
    """
    about = dict(shape=shape, batch=batch, tokens=tokens, dtype=dtype)
    for method in methods:
        row = about | dict(method=method)
        if missing := missing_package(method):
            yield row | dict(skipped=f"{missing} is not installed")
            continue
        if device == "cpu" and method.endswith(("+compile", "+liger")):
            yield row | dict(skipped="is not rehearsed: it is for GPUs")
            continue
        try:
            trained = Trained(method, shape, device, dtype)
            for lengths in ("same", "new"):
                yield row | dict(lengths=lengths, **trained.measure(batch, tokens, lengths, steps, seconds))
        except Exception as error:
            yield row | dict(error=reason(error))
        trained = None  # before the next method's model is made
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def missing_package(method: str) -> str | None:
    options = Method.parse(method).options
    wanted = [package for option, packages in NEEDS.items() if option in options for package in packages]
    return next((package for package in wanted if find_spec(package) is None), None)


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


class Trained:
    """A model with an optimizer, set up for one method."""

    def __init__(self, method: str, shape: str, device: str, dtype: str):
        self.method, self.device = Method.parse(method), device
        self.model, self.loss_of = build(method, shape, DTYPES[dtype], device)
        self.vocab = find_decoder(self.model).causal_lm.config.vocab_size
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)

    def measure(self, batch: int, tokens: int, lengths: str, steps: int, seconds: float) -> dict:
        """Of the timed steps the median in ms, with and without waiting for the device; the rest of one step more.

        Raises:
            ArithmeticError: a loss is not finite.
        """
        make = partial(self._batch, batch, tokens, lengths == "new")
        fewest = min(3, steps)
        for step in range(fewest):  # makes the optimizer's states
            self._finish(make(step))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        walls, hosts, losses, counts = [], [], [], []
        while len(walls) < fewest or (len(walls) < steps and sum(walls) < 1e3 * seconds):
            given = make(fewest + len(walls))
            counts.append(int(given["labels"].ne(IGNORED).sum()))
            synchronize(self.device)
            began = time.perf_counter()
            loss = self._finish(given)
            hosts.append(1e3 * (time.perf_counter() - began))
            synchronize(self.device)
            walls.append(1e3 * (time.perf_counter() - began))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise ArithmeticError(f"the loss of step {len(losses)} with {lengths} batches is {losses[-1]}")
        row = dict(
            ms=statistics.median(walls),
            host_ms=statistics.median(hosts),
            all_ms=[round(ms, 2) for ms in walls],
            tokens_per_s=1e3 * sum(counts) / sum(walls),
            losses=[losses[0], losses[-1]],
        )
        return row | self._counted(partial(self._finish, make(fewest + len(walls))))

    def _counted(self, step) -> dict:
        """Launches, ms of kernels and bytes at the peak; on a CPU operations that would launch, and no kernels."""
        if self.device == "cuda":
            memory = dict(peak=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
            kernels = kernels_of(step, self.device)
            return memory | dict(launches=len(kernels), kernel_ms=sum(us for _, us in kernels) / 1e3)
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        with LiveStorages().ignore(kept) as live, Launches() as launches:
            step()
        return dict(peak=storage_bytes(kept) + live.peak, reserved=None, launches=launches.count, kernel_ms=None)

    def _finish(self, given: dict) -> torch.Tensor:
        """One step, as Trainer takes it: the batch goes to the device, and nothing waits for it."""
        loss = self.loss_of(**{name: x.to(self.device, non_blocking=True) for name, x in given.items()})
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _batch(self, batch: int, tokens: int, new: bool, step: int) -> dict:
        """On the host, as a collator makes it."""
        generator = torch.Generator().manual_seed(step if new else 0)
        shortest = math.ceil(SHORTEST * tokens) if new else tokens
        lengths = torch.randint(shortest, tokens + 1, (batch,), generator=generator).tolist()
        ids = [torch.randint(self.vocab, (length,), generator=generator) for length in lengths]
        chosen = [
            torch.randperm(length, generator=generator)[: max(1, round(self.method.ratio * length))].sort().values
            for length in lengths
        ]
        made = dict(
            input_ids=pad_sequence(ids, batch_first=True),
            labels=pad_sequence(ids, batch_first=True, padding_value=IGNORED),
            selected_positions=pad_sequence(chosen, batch_first=True, padding_value=-1),
        )
        if len(set(lengths)) > 1:
            made["attention_mask"] = made["labels"].ne(IGNORED).long()
        if self.method.base == "tokenseek":
            targets = next_token_labels(made["labels"]).gather(1, made["selected_positions"].clamp(min=0))
            made["shift_labels"] = targets.masked_fill(made["selected_positions"] < 0, IGNORED)
            made["planned_rows"] = PlannedRows.of(made, ditching_of(self.model).attention_is_ours)
        return {name: x.pin_memory() for name, x in made.items()} if self.device == "cuda" else made
