"""What sequence parallelism is compared on: models, batches and selections, and the comparison, run by every rank."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import MethodType

import peft
import torch
import torch.distributed as dist
from closeness import assert_close
from numerics.dense_reference import dense_loss
from tiny_models import VOCAB, computed_in, tiny_model

import tokenseek
from tokenseek.parallel import enable_sequence_parallelism
from tokenseek.ulysses.layout import LAYOUTS, Layout, Shards

LORA = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Case:
    """One comparison with the dense reference on one process.

    Attributes:
        lengths: of the examples of the batch.
        selected: positions by example, or None to train on all tokens without saying so.
        packed: lengths of the examples packed into one row; tells by `position_ids`.
    """

    kind: str = "llama"
    model: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (13, 9)
    selected: tuple[tuple[int, ...], ...] | None = ((1, 4, 5, 11), (0, 7))
    packed: tuple[int, ...] | None = None
    layout: str = "balanced"
    recompute: bool = False
    lora: bool = False
    left: bool = False
    num_items: int | None = None
    kv_storage: str = "device"
    tile_rows: int | str = "auto"

    @property
    def computed_in(self) -> torch.dtype:
        return computed_in(self.kind, self.model.get("attn", "sdpa"))


def in_blocks(positions_BA: torch.Tensor, ranks: int, tokens: int) -> Shards:
    """The layout of docs/extending.md."""
    padded = torch.nn.functional.pad(positions_BA, (0, -positions_BA.shape[1] % ranks), value=-1)
    return Shards(padded.unflatten(1, (ranks, -1)), interleaved=False)


LAYOUTS["blocks"] = Layout(in_blocks)


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, tokens = torch.Generator().manual_seed(seed), max(case.lengths)
    ids = torch.randint(3, VOCAB, (len(case.lengths), tokens), generator=generator)
    is_token = torch.arange(tokens) < torch.tensor(case.lengths)[:, None]
    if case.left:
        is_token = is_token.flip(1)
    labels = ids.masked_fill(~is_token, -100)
    labels[:, :2] = -100
    inputs = dict(input_ids=ids, labels=labels)
    if case.packed:
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in case.packed])[None]
    else:
        inputs["attention_mask"] = is_token.long()
        if case.left:
            inputs["position_ids"] = (is_token.cumsum(1) - 1).clamp(min=0)
    if case.num_items:
        inputs["num_items_in_batch"] = case.num_items
    return inputs


def positions(case: Case, inputs: dict) -> torch.Tensor:
    """[B, S]; all tokens where the case selects none."""
    rows = case.selected
    if rows is None:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        rows = [row.nonzero().squeeze(1).tolist() for row in mask]
    padded = torch.full((len(rows), max(map(len, rows))), -1)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row)
    return padded


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def build(case: Case, dtype=torch.float64):
    model = tiny_model(case.kind, dtype=dtype, **case.model)
    if case.lora:
        torch.manual_seed(0)
        model = peft.get_peft_model(model, LORA, autocast_adapter_dtype=False).eval()
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_rms_norm, module)
    return model


def _rms_norm(self, hidden):
    """All in float64; Transformers' own rounds to float32 in between, where last bits of float64 grow into its own."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def compare(case: Case, group: dist.ProcessGroup) -> str | None:
    """What differs between this group and one process, or None."""
    inputs = make_inputs(case)
    model = build(case)
    reference = copy.deepcopy(model)
    chosen = positions(case, inputs)
    targets = torch.nn.functional.pad(inputs["labels"], (0, 2), value=-100).gather(1, chosen + 1)
    count = int((targets.ne(-100) & chosen.ge(0)).sum())
    # Not left to the reference, which knows no better than 0 / 0 where nothing is supervised.
    items = {"num_items_in_batch": case.num_items or max(count, 1)}
    expected_loss = dense_loss(reference, **inputs | items, selected_positions=chosen)
    expected = gradients(reference, expected_loss)

    options = dict(recompute=case.recompute, kv_storage=case.kv_storage, tile_rows=case.tile_rows)
    tokenseek.enable_token_ditching(model, **options)
    enable_sequence_parallelism(model, group, layout=case.layout)
    selected = None if case.selected is None else chosen
    for _ in range(2):  # the second step knows that the attention function is ours
        loss = model(**inputs, selected_positions=selected).loss
        actual = gradients(model, loss)
    for gradient in actual.values():
        dist.all_reduce(gradient, group=group)
        gradient /= group.size()

    try:
        assert_close(loss, expected_loss, case.computed_in)
        assert_close({name: actual.get(name) for name in expected}, expected, case.computed_in)
    except AssertionError as error:
        return str(error)
    scale = max(g.norm() for g in expected.values())
    return None if (scale > 0) == (count > 0) else f"{count} supervised tokens, but gradients up to {scale}"
