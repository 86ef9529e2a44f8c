"""The planner's peaks against those of real training steps on the CPU, over methods and architectures.

    python -m benchmarks.plan

Both count the storages alive, by two counters that share no code: the planner's on a step without data, and
benchmarks/memory.py on the real one. "Above states" leaves out parameters, gradients and optimizer states. FLOPs are
those of torch's counter.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.distributed as dist
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.memory import LiveStorages, storage_bytes
from tokenseek.config import RunConfig, load_config
from tokenseek.decoder.names import enable_checkpointing
from tokenseek.ditching import Seeking, enable_token_ditching
from tokenseek.models.adapters import add_adapter
from tokenseek.parallel import enable_sequence_parallelism
from tokenseek.planning import Engine, Method, plan_memory
from tokenseek.planning.work import Work

# Gloo's threads let go of a buffer a moment late now and then; the lowest of some peaks is one of a step without that.
STEPS_OF_A_GROUP = 3
LORA = ("peft.method=lora", "peft.r=8")
ACCUMULATED, BF16 = "training.gradient_accumulation_steps=2", "training.mixed_precision=bf16"
TILES = "training.tile_rows=48"
DRAWN = ("selection.rule=sampled", "selection.scope=all", "selection.ratio=0.2", "selection.exact_layers=0")
ONLINE = ("scoring.mode=online", *DRAWN)
# name -> (model_type, method, settings)
CASES: dict[str, tuple[str, Method, tuple[str, ...]]] = {
    "llama, all tokens": ("llama", Method(), ()),
    "llama, all tokens, LoRA, recomputed": ("llama", Method(recompute=True), LORA),
    "gpt2, all tokens, 2 micro batches": ("gpt2", Method(), (ACCUMULATED,)),
    "llama, all tokens, bf16 autocast": ("llama", Method(), (BF16,)),
    "llama, r = 0.1, LoRA": ("llama", Method(0.1), LORA),
    "qwen2, r = 0.5, LoRA, B = 2": ("qwen2", Method(0.5), (*LORA, "training.per_device_train_batch_size=2")),
    "qwen3, r = 0.3, LoRA, recomputed": ("qwen3", Method(0.3, recompute=True), LORA),
    "llama, r = 0.2, 2 micro batches": ("llama", Method(0.2), (ACCUMULATED,)),
    "gpt2, r = 0.2": ("gpt2", Method(0.2), ()),
    "llama, r = 0.2, LoRA, bf16 autocast": ("llama", Method(0.2), (*LORA, BF16)),
    "llama, r = 0.1, LoRA, 8-bit keys and values": ("llama", Method(0.1), (*LORA, "training.kv_storage=int8")),
    "llama, r = 1, LoRA": ("llama", Method(1.0), LORA),
    "llama, r = 0.2, LoRA, online by error": ("llama", Method(0.2), (*LORA, *ONLINE, "scoring.reduction=error")),
    "llama, r = 0.1, LoRA, recomputed, tiles": ("llama", Method(0.1, recompute=True), (*LORA, TILES)),
    "gpt2, r = 0.2, online by error, tiles": ("gpt2", Method(0.2), (*ONLINE, "scoring.reduction=error", TILES)),
    "llama, r = 0.2, LoRA, online, tiles": ("llama", Method(0.2, recompute=True), (*LORA, *ONLINE, TILES)),
    "gpt2, r = 0.2, online by gradient": ("gpt2", Method(0.2), ONLINE),
    "llama, r = 0.2, online, 1 exact layer": ("llama", Method(0.2), (*ONLINE, "selection.exact_layers=1")),
    "llama, r = 0.2, LoRA, online, 1 exact layer": ("llama", Method(0.2), (*LORA, *ONLINE, "selection.exact_layers=1")),
}


def model_config(kind: str, *, hidden: int, layers: int, vocab: int, tokens: int) -> PreTrainedConfig:
    if kind == "gpt2":
        values = dict(n_embd=hidden, n_layer=layers, n_head=4, n_positions=tokens)
    else:
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4)
        sizes = dict(hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers)
        values = heads | sizes | dict(max_position_embeddings=tokens, tie_word_embeddings=True)
    return AutoConfig.for_model(kind, vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **values)


def run_config(tokens: int, *settings: str) -> RunConfig:
    needed = ["model.name_or_path=none", "model.dtype=float32", "data.sources.0.path=none", "output_dir=none"]
    return load_config(None, [*needed, "selection.rule=top", f"data.max_length={tokens}", *settings])


def measured_peak(
    config: RunConfig,
    method: Method,
    shape: PreTrainedConfig,
    model: nn.Module | None = None,
    group: dist.ProcessGroup | None = None,
    selected: torch.Tensor | None = None,
) -> int:
    """Bytes of all storages alive at the peak of a real optimizer step, taken as Trainer takes it.

    Args:
        group: ranks that share each text.
        selected: positions [B, S]; drawn by default.
    """
    step, kept, inputs = _real_step(config, method, shape, model, group, selected)
    step()  # which makes the optimizer's states
    kept = kept()
    peaks = []
    for _ in range(1 if group is None else STEPS_OF_A_GROUP):
        with LiveStorages().ignore([*kept, *inputs]) as live:
            step()
        peaks.append(live.peak)
    return storage_bytes(kept) + min(peaks)


def measured_average(config: RunConfig, method: Method, shape: PreTrainedConfig) -> float:
    """Bytes alive on average over a real optimizer step, in which operations take the planner's estimates of time."""
    step, kept, inputs = _real_step(config, method, shape, None, None)
    step()
    kept = kept()
    byte_seconds, work = 0.0, Work()

    class Weighing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal byte_seconds
            before = work.seconds
            result = func(*args, **(kwargs or {}))
            byte_seconds += live.bytes * (work.seconds - before)
            return result

    with LiveStorages().ignore([*kept, *inputs]) as live, work, Weighing():
        step()
    return storage_bytes(kept) + byte_seconds / work.seconds


def measured_flops(config: RunConfig, method: Method, shape: PreTrainedConfig) -> int:
    """Floating-point operations of a real optimizer step, by torch's counter."""
    step, _, _ = _real_step(config, method, shape)
    formulas = {
        torch.ops.aten.addmm_: addmm_flop,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    step()  # in which token ditching learns about the model
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


def _attention_flops(query, key, *args, **kwargs) -> int:
    """Two products, of all queries with all keys, by all query heads."""
    return 4 * math.prod(query[:-1]) * key[-2] * query[-1]


def _attention_backward_flops(gradient, query, key, *args, **kwargs) -> int:
    """Five products; the scores are computed once more."""
    return 5 * _attention_flops(query, key) // 2


def _real_step(config: RunConfig, method: Method, shape: PreTrainedConfig, model=None, group=None, selected=None):
    """A real optimizer step as a function; what stays between steps, as a function, and its input tensors."""
    torch.manual_seed(0)
    training = config.training
    if model is None:
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="sdpa")
    if config.peft:
        model = add_adapter(model, config.peft)
    model.train()
    if method.ratio is not None:
        selection, scoring = config.selection, config.scoring
        seeking = Seeking(scoring.reduction, scoring.gradient_layer, selection.exact_layers)
        options: dict = dict(kv_storage=training.kv_storage, tile_rows=training.tile_rows, seeking=seeking)
        enable_token_ditching(model, recompute=method.recompute, **options)
    elif method.recompute:
        enable_checkpointing(model)
    if group is not None:
        enable_sequence_parallelism(model, group, layout=training.sequence_layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    inputs = _inputs(training.micro_batch, config.data.max_length, shape.vocab_size, method.ratio)
    if selected is not None:
        inputs["selected_positions"] = selected
    if method.ratio is not None and config.scoring.mode == "online":
        del inputs["selected_positions"]
        keys = torch.arange(training.micro_batch)
        inputs |= {"selection": selection.to_rule(), "selection_keys": keys}
    bf16 = training.mixed_precision == "bf16"

    def step():
        for _ in range(training.gradient_accumulation_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model(**inputs)
            loss = (convert_to_fp32(output) if bf16 else output)["loss"]  # as accelerate does
            del output
            loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def kept() -> list[torch.Tensor]:
        states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        return [*model.parameters(), *model.buffers(), *states]

    return step, kept, [x for x in inputs.values() if torch.is_tensor(x)]


def _inputs(batch: int, tokens: int, vocab: int, ratio: float | None) -> dict:
    ids = torch.randint(0, vocab, (batch, tokens))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_items_in_batch=ids.numel())
    if ratio is not None:
        # The last token among them: those behind the last selected one are left out, and the plan counts on none.
        others = torch.randperm(tokens - 1)[: round(ratio * tokens) - 1]
        selected = torch.cat([others, torch.tensor([tokens - 1])]).sort().values
        inputs["selected_positions"] = selected.expand(batch, -1).contiguous()
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(hidden=256, layers=6, vocab=8192, tokens=512).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    sizes = vars(parser.parse_args())
    print("| | planned MiB | measured MiB | planned / measured | the same above states | of FLOPs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (kind, method, settings) in CASES.items():
        config, shape = run_config(sizes["tokens"], *settings), model_config(kind, **sizes)
        plan = plan_memory(config, method, Engine(on_cpu=True), model_config=shape)
        measured = measured_peak(config, method, shape)
        above = (plan.peak - plan.states) / (measured - plan.states)
        flops = plan.work.flops / measured_flops(config, method, shape)
        sizes_mib = f"{plan.peak / 2**20:.1f} | {measured / 2**20:.1f}"
        print(f"| {name} | {sizes_mib} | {plan.peak / measured:.4f} | {above:.4f} | {flops:.4f} |", flush=True)


if __name__ == "__main__":
    main()
