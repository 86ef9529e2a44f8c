"""The methods that are compared, by a name such as ``full+checkpoint``, ``tokenseek@0.1+lora`` or ``algorithm1@0.1``.

Shapes: B batch, T tokens, S selected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.algorithm1 import algorithm1_loss
from benchmarks.shapes import make_model
from tokenseek.decoder.find import find_decoder, keep_4bit_differentiable
from tokenseek.decoder.head import next_token_labels
from tokenseek.decoder.names import enable_checkpointing
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.ditching.loss import selected_loss
from tokenseek.models.kernels import apply_liger, compile_regions
from tokenseek.selection import SelectionRule

_OPTIONS = {
    "full": {"checkpoint", "chunked-ce", "lora", "qlora", "compile", "liger"},
    "algorithm1": {"lora", "qlora"},
    "tokenseek": {"recompute", "kv-host", "kv-int8", "lora", "qlora", "packed", "compile", "liger"},
    "online": {"error", "exact", "recompute", "kv-host", "lora", "qlora", "compile", "liger"},
}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]  # where the paper puts its adapters (section S1.7)

DEFAULT_METHODS = (
    "full,full+checkpoint,full+checkpoint+chunked-ce,algorithm1@0.1,"
    + ",".join(f"tokenseek@{r}{option}" for r in ("0.05", "0.1", "0.2", "0.5", "1.0") for option in ("", "+recompute"))
    + ",online@0.1,online@0.1+error,online@0.1+exact,full+lora,full+lora+checkpoint,tokenseek@0.1+lora"
    + ",full+qlora,full+qlora+checkpoint,tokenseek@0.1+qlora,tokenseek@0.1+qlora+recompute"
)


@dataclass(frozen=True)
class Method:
    base: str
    ratio: float
    options: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> Method:
        """``BASE[@RATIO][+OPTION...]``; a ratio is for all but ``full``."""
        head, *options = name.split("+")
        base, _, ratio = head.partition("@")
        if base not in _OPTIONS or not _OPTIONS[base].issuperset(options) or bool(ratio) == (base == "full"):
            accepted = "; ".join(
                base + ("" if base == "full" else "@RATIO") + "".join(f"[+{o}]" for o in sorted(options))
                for base, options in _OPTIONS.items()
            )
            raise SystemExit(f"--methods: {name!r} is not one of: {accepted}.")
        return cls(base, float(ratio or 1), frozenset(options))


def build(name: str, shape: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """The model set up for a method and its loss, a function of what `make_batch` returns."""
    method = Method.parse(name)
    model = make_model(shape, dtype=dtype, device=device)
    if "qlora" in method.options:
        _quantize(model, dtype, device)
    if method.options & {"lora", "qlora"}:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=FEED_FORWARD)).train()
    if "checkpoint" in method.options:
        enable_checkpointing(find_decoder(model).causal_lm)

    if "liger" in method.options:
        apply_liger(find_decoder(model).causal_lm)
    if "compile" in method.options:
        compile_regions(model)

    if method.base == "tokenseek":
        kv_storage = next((s for s in ("host", "int8") if f"kv-{s}" in method.options), "device")
        enable_token_ditching(model, recompute="recompute" in method.options, kv_storage=kv_storage)
        return model, lambda **batch: model(**batch).loss
    if method.base == "online":
        reduction, exact_layers = "error" if "error" in method.options else "l2", int("exact" in method.options)
        seeking = Seeking(reduction, exact_layers=exact_layers)
        kv_storage = "host" if "kv-host" in method.options else "device"
        enable_token_ditching(model, recompute="recompute" in method.options, kv_storage=kv_storage, seeking=seeking)
        rule = SelectionRule("sampled", method.ratio, alpha=0, beta=1, explore=0.3, scope="supervised")

        def loss_online(selected_positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
            return model(**batch, selection=rule, selection_keys=torch.arange(len(selected_positions))).loss

        return model, loss_online
    if method.base == "algorithm1":
        return model, lambda **batch: algorithm1_loss(model, **batch)
    if "chunked-ce" in method.options:
        return model, lambda selected_positions, **batch: _fused_head_loss(model, **batch)
    return model, lambda selected_positions, **batch: model(**batch, use_cache=False).loss


def make_batch(
    ratio: float, batch: int, tokens: int, vocab: int, device: str, seed: int = 0, supervised: float = 1.0
) -> dict[str, torch.Tensor]:
    """Random input_ids, the same as labels [B, T], and random selected_positions, ascending [B, S].

    Args:
        supervised: share of the tokens, at the end, that carry a loss.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (batch, tokens), generator=generator)
    count = max(1, int(ratio * tokens + 0.5))
    selected = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :count].sort(1).values
    labels = ids.clone()
    labels[:, : tokens - round(supervised * tokens)] = -100
    return {name: x.to(device) for name, x in dict(input_ids=ids, labels=labels, selected_positions=selected).items()}


def make_ragged_batch(
    method: Method, lengths: list[int], vocab: int, device: str, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random examples of these lengths, padded or packed, with random selected positions; all tokens carry a loss."""
    from tokenseek.training import PaddingCollator, TokenSeekCollator  # late: they need the data libraries

    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]
    examples = [{"example_id": str(row), "input_ids": row_ids, "labels": row_ids} for row, row_ids in enumerate(ids)]
    batch = TokenSeekCollator(None, method.ratio, "random", packing="packed" in method.options)(examples)
    del batch["shift_labels"]
    if method.base == "full":
        batch["labels"] = PaddingCollator()(examples)["labels"]
    return {name: x.to(device) for name, x in batch.items()}


def _fused_head_loss(
    model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Ordinary training's loss, without ever holding the logits of all tokens: Liger's kernel on CUDA, else our own."""
    decoder = find_decoder(model)
    output = decoder.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden_BTD, targets_BT = output.last_hidden_state, next_token_labels(labels)
    if input_ids.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        head = decoder.causal_lm.get_output_embeddings()
        return LigerFusedLinearCrossEntropyLoss()(head.weight, hidden_BTD.flatten(0, 1), targets_BT.flatten())
    return selected_loss(decoder, output, hidden_BTD, targets_BT, None, recompute=True)


def _quantize(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """The layers' linear weights to NF4 with double quantisation, in place, as Transformers does when it loads them."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in find_decoder(model).layers:
        for parent in list(layer.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                quantized = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    dtype,
                    quant_type="nf4",
                    device="meta",
                )
                # Quantised by moving it to its device, which for a CPU too is a move from where it is not yet packed.
                weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                quantized.weight, quantized.bias = weight.to(device), linear.bias
                setattr(parent, name, quantized)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.is_loaded_in_4bit = True  # tells PEFT which kind of LoRA layer to use
    keep_4bit_differentiable(model)
