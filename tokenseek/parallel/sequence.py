"""Sequence parallelism switched on: several ranks train on one example, each on some of its tokens.

Shapes: B batch, T tokens, S selected, P ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tokenseek.decoder.find import Decoder, find_decoder
from tokenseek.ditching import ditching_of, enable_token_ditching
from tokenseek.ditching.rows import Partition
from tokenseek.ditching.state import Share, require_ditching
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.parallel.sharding import LocalPartition, SharedReach, local_arguments, shard
from tokenseek.ulysses.agreement import require_same
from tokenseek.ulysses.heads import query_heads, require_shareable
from tokenseek.ulysses.layout import LAYOUTS

ENGINES = ("averages", "sums")
# A fixed list, so that a rank that was given other arguments than the rest still takes part in the same collective.
_COMPARED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


def enable_sequence_parallelism(
    model: nn.Module, group: dist.ProcessGroup, *, layout: str = "balanced", engine: str = "averages"
) -> nn.Module:
    """Let the ranks of `group` train on the same examples together; patches `model` in place and returns it.

    Token ditching is enabled too, unless it is already. Every rank of the group then calls the model with the same
    whole batch (ids are small); each computes its share of the tokens and heads. A call with ``labels`` and without
    ``selected_positions`` trains on all tokens, or evaluates. ``.loss`` is that of the whole batch, on every rank.

    Gradients have to be combined over the group, as over data-parallel ranks; what combines them (DDP, ZeRO, FSDP)
    takes their average over all ranks and knows nothing of ours being parts. `engine` says which it is: where it
    "averages" over the group each rank's gradient is P times its part, so that the average is their sum, the
    gradient of the loss. Where it "sums" (as DeepSpeed does within the sequence-parallel group that it is told of)
    it is the part itself.

    Args:
        model: as for :func:`tokenseek.enable_token_ditching`; its attention must go through Transformers'
            AttentionInterface.
        group: the ranks that share examples; their number must divide the number of query heads. Other groups are
            other data-parallel ranks.
        layout: "balanced" deals selected and unselected tokens to the ranks in turn; "contiguous" is stock Ulysses, for
            comparison; "regroup" keeps contiguous shards between layers and deals them in each (the paper's S7.1).
        engine: "averages" or "sums".

    Raises:
        UserError: for models and group sizes that are not supported, saying why. In a forward pass, on all ranks of a
            group, if they were given different batches.

    Example:
        >>> mesh = init_device_mesh("cuda", (dp, sp), mesh_dim_names=("dp", "sp"))
        >>> tokenseek.parallel.enable_sequence_parallelism(model, mesh["sp"].get_group())
        >>> model = DistributedDataParallel(model)
        >>> model(input_ids=ids, labels=ids, selected_positions=positions).loss.backward()
    """
    for name, value, accepted in (("layout", layout, LAYOUTS), ("engine", engine, ENGINES)):
        if value not in accepted:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(accepted)}.")
    decoder = find_decoder(model)
    require_shareable(decoder, group)
    if ditching_of(model) is None:
        enable_token_ditching(model)
    require_ditching(model).sequence = SequenceParallelism(group, layout, engine)
    return model


def disable_sequence_parallelism(model: nn.Module) -> nn.Module:
    """Undo :func:`enable_sequence_parallelism`; token ditching stays enabled. Returns `model`."""
    decoder = find_decoder(model)
    if shared_by(model) is None:
        raise UserError(f"sequence parallelism is not enabled on this {decoder.name}.")
    require_ditching(model).sequence = None
    return model


def shared_by(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share the model's texts, by :func:`enable_sequence_parallelism`; None if it is not enabled."""
    ditching = ditching_of(model)
    return ditching.sequence.group if ditching and ditching.sequence else None


class SequenceParallelism:
    """What token ditching asks where examples are shared by ranks; see :func:`enable_sequence_parallelism`."""

    def __init__(self, group: dist.ProcessGroup, layout: str, engine: str) -> None:
        self.group, self.layout, self.engine = group, layout, engine

    def __deepcopy__(self, memo: object) -> SequenceParallelism:
        return self  # a process group cannot be copied, nor does a copied model need another one

    def require_same(self, **inputs: torch.Tensor | None) -> None:
        """Raise UserError on all ranks of the group, naming what differs, unless all were given the same inputs."""
        require_same(self.group, **inputs)

    def agreed_positions(
        self,
        arguments: dict,
        selected_positions: torch.Tensor | None,
        labels: torch.Tensor | None,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """`selected_positions` [B, S], all tokens where None, after making sure that all ranks were given the same.

        Raises:
            UserError: on all ranks of the group, naming what differs; or without labels, since hidden states and
                logits stay on the ranks that compute them.
        """
        require_same(
            self.group,
            **{name: arguments.get(name) for name in _COMPARED},
            selected_positions=selected_positions,
            labels=labels,
            shift_labels=shift_labels,
            gradients=int(torch.is_grad_enabled()),
        )
        if labels is None and shift_labels is None:
            raise UserError("selected_positions are given without labels; under sequence parallelism give both.")
        if selected_positions is not None:
            return selected_positions
        tokens = arguments.get("input_ids")
        tokens = arguments["inputs_embeds"] if tokens is None else tokens
        is_token_BT = arguments.get("attention_mask")
        if is_token_BT is None:
            return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        first_BT = is_token_BT.bool().long().argsort(dim=1, descending=True, stable=True)
        count_B1 = is_token_BT.bool().sum(1, keepdim=True)
        return torch.where(torch.arange(tokens.shape[1], device=tokens.device) < count_B1, first_BT, -1)

    def share(
        self,
        decoder: Decoder,
        arguments: dict,
        parts: Partition,
        labels_BS: torch.Tensor,
        weights_BS: torch.Tensor | None,
    ) -> Share:
        """The body's arguments, the partition and the selected rows' labels and weights, cut down to this rank."""
        local = self.shard(decoder, arguments, parts)
        places_BS = torch.where(parts.selected.valid_BR, parts.selected.index_BR, parts.tokens)
        mine_BR = local.selected_shards.positions_BPR[:, self.group.rank()]
        mine_BR = mine_BR.where(mine_BR >= 0, parts.tokens)

        def of_mine(values_BS: torch.Tensor, fill: float) -> torch.Tensor:
            by_position = values_BS.new_full((len(values_BS), parts.tokens + 1), fill)
            by_position.scatter_(1, places_BS, values_BS)
            return by_position.gather(1, mine_BR).masked_fill(~local.selected.valid_BR, fill)

        labels_BR = of_mine(labels_BS, IGNORED)
        weights_BR = None if weights_BS is None else of_mine(weights_BS, 0)
        return Share(local_arguments(arguments, local), SharedReach(local), labels_BR, weights_BR)

    def shard(self, decoder: Decoder, arguments: dict, parts: Partition) -> LocalPartition:
        """This rank's share of the rows of `parts`."""
        return shard(parts, self.group, query_heads(decoder), LAYOUTS[self.layout], arguments)

    def total(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum over the group of every rank's part of the loss; its gradient suits the engine."""
        return _Total.apply(loss, self.group, self.group.size() if self.engine == "averages" else 1)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, group: dist.ProcessGroup, factor: int) -> torch.Tensor:
        ctx.factor = factor
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient * ctx.factor, None, None
