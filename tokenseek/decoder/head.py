"""The head of a decoder, which is its widest part, taken a few rows at a time.

Shapes: B batch, T tokens, R rows handed to the head, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad

from tokenseek.decoder.device import kind_of
from tokenseek.decoder.find import Decoder, forward_replaced
from tokenseek.labels import IGNORED

# Logits of one chunk of rows in float32; bounds the head's memory whatever the vocabulary. Every chunk reads all of the
# head's weights, and few rows keep a GPU from its peak: there a chunk takes a fortieth of the memory, up to 256 MiB.
# With a vocabulary of 128,000 these are 500 rows, so 500 operations to a byte of weights; an H100 has 300 to a byte.
CHUNK_BYTES = 64 * 2**20
MOST_CHUNK_BYTES, CHUNKS_IN_MEMORY = 2**28, 40

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class BodyOutput(Protocol):
    """What a decoder's body returns, a ``ModelOutput`` of Transformers: hidden states [B, T, D] and what it may add."""

    last_hidden_state: torch.Tensor


def next_token_labels(labels_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: the target of every position; the last one predicts nothing."""
    return pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]


def rows_per_chunk(decoder: Decoder, device: torch.device) -> int:
    """How many rows of logits are held at once."""
    nbytes = CHUNK_BYTES
    if kind_of(device) == "cuda" and device.type != "cuda":  # a plan, of a GPU with room for the largest
        nbytes = MOST_CHUNK_BYTES
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        nbytes = max(nbytes, min(memory // CHUNKS_IN_MEMORY, MOST_CHUNK_BYTES))
    return max(1, nbytes // (4 * decoder.causal_lm.config.get_text_config().vocab_size))


def head_logits(decoder: Decoder, body_output: BodyOutput, hidden_RD: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] of R rows of final hidden states: see :func:`head_logits_of_batch`."""
    return head_logits_of_batch(decoder, body_output, hidden_RD).squeeze(0)  # unlike [0], no copy among zeros backwards


def head_logits_of_batch(decoder: Decoder, body_output: BodyOutput, hidden_RD: torch.Tensor) -> torch.Tensor:
    """Logits [1, R, V] of R rows of final hidden states, by the model's own head code.

    The causal LM's forward runs with its body standing still, so that soft-capping, logit scaling and whatever else the
    model does after its head is done here too, without a line of model-specific code.

    Args:
        body_output: what the body returned; its hidden states are replaced by `hidden_RD`.
    """
    hidden_1RD = hidden_RD[None]
    fields: Any = body_output
    of_rows = type(body_output)(**{**fields, "last_hidden_state": hidden_1RD})
    # Engines that watch the body would take this for one of its calls.
    with unwatched(decoder.body), forward_replaced(decoder.body, lambda *args, **kwargs: of_rows):
        output = type(decoder.causal_lm).forward(decoder.causal_lm, inputs_embeds=hidden_1RD, use_cache=False)
    return output.logits


def in_one_call(head: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], hidden_RD: torch.Tensor) -> torch.Tensor:
    """``run(hidden_RD)``, which calls the head once for each chunk of rows, inside of one call of the head.

    ZeRO-3 and FSDP2 watch the head from outside and gather its weights with the other ranks, which may have another
    number of chunks: they see one call. What `run` puts off to the backward pass has to be :func:`unwatched` itself.
    """
    if not _is_split(head):
        return run(hidden_RD)
    forward = head.forward

    def run_inside(hidden_RD: torch.Tensor) -> torch.Tensor:
        with forward_replaced(head, forward), unwatched(head):
            return run(hidden_RD)

    with forward_replaced(head, run_inside):
        return head(hidden_RD)


@contextmanager
def unwatched(module: nn.Module) -> Iterator[None]:
    """In the block, calls of `module` run none of its hooks."""
    before = {name: module.__dict__[name] for name in _HOOKS}
    module.__dict__.update({name: type(hooks)() for name, hooks in before.items()})
    try:
        yield
    finally:
        module.__dict__.update(before)


def _is_split(module: nn.Module) -> bool:
    """By ZeRO-3 or FSDP2, whose hooks gather its weights for the length of a call."""
    return isinstance(module, FSDPModule) or is_partitioned(module)


def is_partitioned(module: nn.Module) -> bool:
    """By ZeRO-3, which gathers the parameters of a module for the length of each call."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is where it has more bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
