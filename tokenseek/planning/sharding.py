"""What an engine allocates and frees around a training step, done on fake tensors of one process.

The engines' own code needs their processes; this repeats what they hold: shards, the layer that is gathered and the one
fetched ahead of it, buckets of gradients, master weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from tokenseek.decoder.find import Decoder
from tokenseek.launching.engine import Engine
from tokenseek.planning.ledger import Ledger


class ShardedState:
    """Parameters, gradients and optimizer states of one process, in the ledger, while the model runs unsharded.

    Args:
        mixed_precision: "no", "bf16" or "fp16"; the engines hold master weights by it.
        make_optimizer: takes a list of parameters.

    Attributes:
        gathered_again: bytes of the blocks of :meth:`gathered`.
    """

    def __init__(
        self,
        model: nn.Module,
        decoder: Decoder,
        engine: Engine,
        ledger: Ledger,
        mixed_precision: str,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.engine, self.ledger = engine, ledger
        self.parameters = list(model.parameters())
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.in_backward = False
        self.gathered_again = 0
        self._gathered: dict[nn.Module, int] = {}
        self._reduced: set[nn.Parameter] = set()
        self._waiting: dict[nn.Module, list[nn.Parameter]] = {}
        ledger.track(model.buffers(), "parameters")
        ledger.track(self.parameters, None if engine.shards_parameters else "parameters")

        # The dtype in which an engine keeps and updates what it shards.
        keeps_float32 = engine.is_deepspeed or (engine.kind == "fsdp2" and mixed_precision != "no")
        self.shards = self.trained
        if engine.shards_optimizer:
            self.shards = [
                nn.Parameter(torch.empty(self._share(p), dtype=torch.float32 if keeps_float32 else p.dtype))
                for p in self.trained
            ]
        if engine.shards_parameters and not engine.offload_parameters:
            of_trained = self.shards if engine.kind == "fsdp2" else self.trained
            kept = {p: s.element_size() for p, s in zip(self.trained, of_trained, strict=True)}
            shares = sum(self._share(p) * kept.get(p, p.element_size()) for p in self.parameters)
            ledger.add("parameters", shares)
        # FSDP2's shards are the parameters, counted above; DeepSpeed's are copies of them for the optimizer.
        separate = engine.is_deepspeed and not engine.offload_optimizer
        if self.shards is not self.trained:
            ledger.track(self.shards, "optimizer" if separate else None)
        self._add_buckets(decoder)
        self.optimizer = self._with_states(make_optimizer)
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        if engine.shards_parameters:
            self._hook_units(model, decoder)

    def _share(self, parameter: nn.Parameter) -> int:
        return -(-parameter.numel() // self.engine.processes)

    def _add_buckets(self, decoder: Decoder) -> None:
        if self.engine.kind == "ddp":  # a bucket has room for every gradient, all the time
            self.ledger.add("gradients", sum(p.nbytes for p in self.trained))
        elif self.engine.is_deepspeed and self.trained:
            hidden = decoder.causal_lm.config.get_text_config().hidden_size
            largest = max(p.element_size() for p in self.trained)
            everything = sum(p.numel() for p in self.trained)
            # Two of them: one is filled while the other travels.
            self.ledger.add("gradients", 2 * min(self.engine.reduce_bucket or hidden**2, everything) * largest)

    def _with_states(
        self, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        """The optimizer as it is after a first step, which makes its states."""
        optimizer = make_optimizer(self.shards)
        for shard in self.shards:
            shard.grad = torch.empty_like(shard)
        optimizer.step()
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        self.ledger.track(states, None if self.engine.offload_optimizer else "optimizer")
        for shard in self.shards:
            shard.grad = None
        return optimizer

    def accumulate_before(self) -> None:
        """Gradients as earlier micro batches of the optimizer step have left them."""
        for parameter in self.trained:
            self._accumulated(parameter, torch.empty_like(parameter))

    def _accumulated(self, parameter: nn.Parameter, gradient: torch.Tensor | None = None) -> None:
        if gradient is not None and not self.engine.shards_gradients:
            parameter.grad = gradient
        if not self.engine.shards_gradients:
            self.ledger.track([cast(torch.Tensor, parameter.grad)], "gradients")
            return
        if parameter not in self._reduced:
            self._reduced.add(parameter)
            wide = self.engine.kind == "fsdp2"
            itemsize = self._shard_of(parameter).element_size() if wide else parameter.element_size()
            if not self.engine.offload_optimizer:
                self.ledger.add("gradients", self._share(parameter) * itemsize)
        if gradient is not None:
            return
        unit = self._unit_of.get(parameter) if self.engine.kind == "fsdp2" else None
        if unit is None:
            parameter.grad = None  # copied into a bucket
        else:  # FSDP2 reduces the gradients of a unit together
            self.ledger.track([cast(torch.Tensor, parameter.grad)], "gradients")
            self._waiting.setdefault(unit, []).append(parameter)

    def _shard_of(self, parameter: nn.Parameter) -> nn.Parameter:
        return self.shards[next(i for i, p in enumerate(self.trained) if p is parameter)]

    def _hook_units(self, model: nn.Module, decoder: Decoder) -> None:
        """Gather a unit when its forward or backward pass begins, and let it go when the pass ends."""
        self._layers = layers = set(decoder.layers)
        inside = {module for layer in layers for module in layer.modules()}
        self._unit_of: dict[nn.Parameter, nn.Module | None] = {p: layer for layer in layers for p in layer.parameters()}
        outside = [
            m for m in model.modules() if m not in inside and next(m.parameters(recurse=False), None) is not None
        ]
        if self.engine.kind == "fsdp2":  # what is in no layer is the root's, which stays gathered
            of_root = {p for module in outside for p in module.parameters(recurse=False)}
            self._gather(model, sum(p.nbytes for p in of_root))
            self._unit_of |= dict.fromkeys(of_root)
        else:
            for module in outside:
                self._hook(module, self._bytes(module, recurse=False))
        for layer in decoder.layers:
            self._hook(layer, 2 * self._bytes(layer, recurse=True))  # and the next one is on its way

    def _bytes(self, module: nn.Module, recurse: bool) -> int:
        return sum(p.nbytes for p in module.parameters(recurse=recurse))

    def _hook(self, unit: nn.Module, nbytes: int) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._gather(unit, nbytes)
            hidden = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
            if hidden is not None and hidden.requires_grad and not self.in_backward:
                hidden.register_hook(lambda gradient: self._release(unit))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.in_backward:  # recomputed: its backward pass comes now
                return
            self._release(unit)
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._gather_next(unit, nbytes))

        unit.register_forward_pre_hook(before, with_kwargs=True)
        unit.register_forward_hook(after)

    def _gather(self, unit: nn.Module, nbytes: int) -> None:
        if unit not in self._gathered:
            self._gathered[unit] = nbytes
            self.ledger.add("parameters", nbytes)

    def _gather_next(self, unit: nn.Module, nbytes: int) -> None:
        """In the backward pass: the gradient of a layer's input, which is that of the output below it, is the last."""
        for layer in self._layers & set(self._gathered):
            self._release(layer)
        self._gather(unit, nbytes)

    def _release(self, unit: nn.Module) -> None:
        self.ledger.add("parameters", -self._gathered.pop(unit, 0))
        if waiting := self._waiting.pop(unit, None):
            copied = sum(p.numel() * self._shard_of(p).element_size() for p in waiting)
            self.ledger.add("gradients", copied)
            self.ledger.add("gradients", -copied)
            for parameter in waiting:
                parameter.grad = None

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """In the block, the weights of `module` are whole, outside of a call of it."""
        is_kept = self.engine.kind == "fsdp2" and module not in self._layers  # the root's, which stays gathered
        nbytes = 0 if is_kept else self._bytes(module, recurse=True)
        self.gathered_again += nbytes
        self.ledger.add("parameters", nbytes)
        yield
        self.ledger.add("parameters", -nbytes)

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """In the block, gradients are made; weights that are sharded are let go after it."""
        self.in_backward = True
        yield
        self.in_backward = False
        if self.engine.shards_parameters:
            for layer in {unit for unit in self._unit_of.values() if unit is not None}:
                self._release(layer)

    def step(self) -> None:
        """The optimizer's step, with the gradients in the dtype of what it updates."""
        if self.engine.offload_optimizer:
            return
        if self.shards is not self.trained:
            for shard in self.shards:
                shard.grad = torch.empty_like(shard)
            if self.engine.kind == "fsdp2":  # these are the shards of gradients that are counted already
                self.ledger.track([cast(torch.Tensor, s.grad) for s in self.shards], None)
        # All at once on a GPU, whose choice torch does not make for the tensors of a plan.
        torch.nn.utils.clip_grad_norm_(self.shards, 1.0, foreach=not self.engine.on_cpu)
        self.optimizer.step()
