"""Keys and values of all tokens, recorded in a pass without gradient, to which a pass with gradient attends.

The second pass computes the keys and values of its own rows anew. They are written over the recorded ones, which hold
the same numbers: nothing is stored twice, and gradient reaches these rows alone.

Shapes: B batch, T tokens, R rows of a pass, N key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tokenseek.decoder.device import alone, share_memory, start_of_graph
from tokenseek.decoder.find import Decoder, forward_replaced
from tokenseek.decoder.head import is_partitioned
from tokenseek.ditching.cache import JoiningCache
from tokenseek.ditching.reach import PlainReach, Reach
from tokenseek.ditching.rows import written
from tokenseek.ditching.storage import Kept, Shelf
from tokenseek.ditching.top import Top
from tokenseek.errors import UserError
from tokenseek.tiling.cache import OnceCache
from tokenseek.tiling.whole import TiledPass

# A block in which the weights of a module are whole.
Gathered: TypeAlias = Callable[[nn.Module], AbstractContextManager[None]]


class Recording:
    """Keys and values [B, N, T, H] of a model's layers, from one forward pass over all tokens.

    Args:
        storage: where they wait for the second pass, "device" or "host".
        unrecorded: layers that the second pass leaves out.
        scored: the last layers, through which a gradient is taken before the second pass.
        top: the scored layers, where the second pass runs them once more over all tokens.
        tiled: how the other layers run in tiles, if they do.
        watched: a layer more that runs as it is.
        whole: in which the weights of a scored module are whole on this process; :func:`gathered` by default.
        few: the rows that the last layer runs over, beside the others' keys and values; None where it runs over all.

    Attributes:
        returns_tuple: whether layers return their hidden states in a tuple.
        current: the cache of the layer that runs; None of one that has none.
        border: what reaches the first of the layers left out in the second pass, [B, S, D].
    """

    def __init__(
        self,
        storage: str,
        unrecorded: tuple[nn.Module, ...] = (),
        scored: tuple[nn.Module, ...] = (),
        top: Top | None = None,
        tiled: TiledPass | None = None,
        watched: nn.Module | None = None,
        whole: Gathered | None = None,
        few: PlainReach | None = None,
    ) -> None:
        self.tiled, self.watched, self.whole, self.few = tiled, watched, whole or gathered, few
        self.top = top
        self.storage, self.unrecorded, self.scored = storage, unrecorded, scored
        self.current: RecordingCache | None = None
        self._graphs: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self._kept: dict[nn.Module, tuple[Kept, ...]] = {}
        self._shelf = Shelf(last_first=False)
        self.returns_tuple = False
        self.border: torch.Tensor | None = None

    def put(self, layer: nn.Module, *tensors: torch.Tensor) -> None:
        """Keep a layer's keys and values, or what its mixer was given."""
        if layer not in self.unrecorded:
            board = self._shelf.board()
            self._kept[layer] = tuple(Kept(alone(tensor.detach()), self.storage, board) for tensor in tensors)

    def see(self, keys_BNTH: torch.Tensor, values_BNTH: torch.Tensor) -> None:
        """Keys and values of all tokens, as the attention of the layer that runs sees them."""
        if self.current is not None:
            self.current.keys, self.current.values = keys_BNTH, values_BNTH

    def in_tiles(self, layer: nn.Module) -> TiledPass | None:
        """How this layer runs in tiles; None where it runs at once."""
        if self.tiled is None or layer is self.watched or layer in self.scored or not self.tiled.takes(layer):
            return None
        return self.tiled

    def take(self, layer: nn.Module) -> tuple[torch.Tensor, ...]:
        """What was kept of a layer, which is removed: it belongs to the caller. Nothing of one that shares keys."""
        return tuple(kept.restore() for kept in self._kept.pop(layer, ()))

    def run_scored(
        self, layer: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
    ) -> torch.Tensor:
        """Run a scored layer's forward with a graph of its own, and return its hidden states without.

        Whatever watches the layer from outside (hooks of FSDP2 and ZeRO-3) sees a pass without gradient.

        Raises:
            UserError: `hidden` is not what the module before returned, so that the graphs cannot be joined.
        """
        if self._graphs and not share_memory(self._graphs[-1][2], hidden):
            raise UserError(
                f"between {type(self._graphs[-1][0]).__name__} and {type(layer).__name__} this model changes its "
                "hidden states in code of its own, through which no gradient is taken: use scoring.reduction=error."
            )
        with torch.enable_grad():
            leaf, entering = start_of_graph(hidden)
            output = run(entering)
        self._graphs.append((layer, leaf, output))
        return output.detach()

    @contextmanager
    def scoring_beyond_layers(self, decoder: Decoder) -> Iterator[None]:
        """In the block, what the body runs after its layers (the final norm) is scored through as the layers are.

        Needed where an engine watches these modules as well, as ZeRO-3 does.
        """
        embeddings = decoder.causal_lm.get_input_embeddings()
        others = [m for m in decoder.body.children() if m is not decoder.layers and m is not embeddings]
        with ExitStack() as stack:
            for module in others:
                stack.enter_context(forward_replaced(module, partial(self._run_beyond, module, module.forward)))
            yield

    def _run_beyond(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._graphs:
            return forward(*args, **kwargs)
        return self.run_scored(module, lambda leaf: forward(leaf, *args[1:], **kwargs), args[0])

    def gradient_through_scored(self, gradient_BTD: torch.Tensor) -> torch.Tensor:
        """From the gradient at the output of the last scored module to that at the input of the first; once."""
        while self._graphs:
            layer, leaf, output = self._graphs.pop()
            with self.whole(layer):
                (gradient_BTD,) = torch.autograd.grad(output, leaf, gradient_BTD.to(output.dtype))
        return gradient_BTD

    def beyond_border(self, hidden_BSD: torch.Tensor) -> Any:
        """The output of a layer that is left out."""
        if self.border is None:
            self.border = hidden_BSD
        return (hidden_BSD,) if self.returns_tuple else hidden_BSD


class RecordingCache(OnceCache):
    """Hands a layer its keys and values back as they are, and keeps those of all tokens.

    Where ranks share a text, these are known in attention, which gives them to :meth:`Recording.see`.
    """

    def _update(self, keys_BNRH: torch.Tensor, values_BNRH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._record(keys_BNRH, values_BNRH)


class RecordedCache(JoiningCache):
    """Returns the recorded keys and values, with those of the selected rows, which carry gradient, in their places."""

    def __init__(self, reach: Reach, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(reach)
        self.recorded = keys, values

    def join(self, keys_BNSH: torch.Tensor, values_BNSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, (keys, values) = self.reach.whole.selected, self.recorded
        return self._record(written(keys, keys_BNSH, rows), written(values, values_BNSH, rows))


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """In the block, the layer's weights are whole on this process, which FSDP2 and ZeRO-3 free after its forward."""
    units = [module for module in layer.modules() if isinstance(module, FSDPModule)]
    with ExitStack() as stack:
        if is_partitioned(layer):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(layer.parameters())))
        for unit in units:
            if not any(isinstance(parameter, DTensor) for parameter in unit.parameters()):
                continue  # not let go, and so not ours to let go
            unit.unshard()
            stack.callback(unit.reshard)
        yield
