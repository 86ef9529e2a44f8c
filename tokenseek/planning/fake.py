"""A step on fake tensors: they have shapes and no data, so any model's step fits anywhere, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils
from transformers.initialization import no_init_weights

from tokenseek.config import RunConfig
from tokenseek.decoder.device import planned_for
from tokenseek.decoder.find import Decoder, find_decoder
from tokenseek.decoder.head import next_token_labels
from tokenseek.decoder.names import enable_checkpointing
from tokenseek.ditching import enable_token_ditching, storage, tiles
from tokenseek.ditching.loss import chunks_run_by, selected_loss
from tokenseek.ditching.reach import PlainReach
from tokenseek.ditching.rows import partition
from tokenseek.ditching.state import require_ditching
from tokenseek.errors import UserError
from tokenseek.launching.engine import Engine
from tokenseek.models.adapters import add_adapter
from tokenseek.parallel import measured
from tokenseek.planning.few import FewChunks, some_of
from tokenseek.planning.ledger import HOST, Ledger, Stretch, nbytes_of
from tokenseek.planning.method import Method
from tokenseek.planning.online import decided, is_online, seeking_of
from tokenseek.planning.optimizer import count_as_one, is_fused, optimizer_of
from tokenseek.planning.packed import pack_linear_layers
from tokenseek.planning.sequence import plan_as_first_rank
from tokenseek.planning.sharding import ShardedState
from tokenseek.planning.work import Work
from tokenseek.tiling.visits import visited_by

_CPU = torch.device("cpu")
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Done:
    """What operations computed and moved: see :class:`~tokenseek.planning.work.Work`."""

    flops: int
    operations: Counter[tuple[float, int, bool]]


@dataclass(frozen=True)
class TakenStep:
    """What a step held and did.

    Attributes:
        layers: of the model.
        stretches: of the ledger, in the order of time.
        host: the most bytes that were in host memory at once.
        micro_batch: forward and backward pass of one.
        optimizer: the optimizer's step.
        weights, trained: bytes of all weights and of those that are trained.
        scales: bytes of the scales of packed weights, and of other buffers.
        exchanged: bytes that ranks that share a text send in a micro batch.
        gathered_more: bytes of the weights that a micro batch gathers besides those of one forward and one backward
            pass, where an engine splits them: for the pass over all tokens, and for the gradients that it takes.
    """

    layers: int
    stretches: list[Stretch]
    host: int
    micro_batch: Done
    optimizer: Done
    weights: int
    trained: int
    scales: int
    exchanged: int
    gathered_more: int


def take_step(
    config: RunConfig, method: Method, engine: Engine, shape: tuple[int, int], model_config: PreTrainedConfig
) -> TakenStep:
    """An optimizer step of the model's own code with one micro batch of `shape` (examples, tokens of each).

    Raises:
        UserError: the run cannot be planned.
    """
    make_optimizer = optimizer_of(config, engine)
    # Which rows are selected is decided on real positions: the sizes of what follows depend on them.
    positions_BS = None
    if method.ratio is not None:
        positions_BS = _spread_positions(method.ratio, *shape)
    elif engine.sp_size > 1:  # ranks that share a text select all of it
        positions_BS = _spread_positions(1.0, *shape)
    online = is_online(config, method)
    reach = None if positions_BS is None else PlainReach(partition(positions_BS, None, shape[1], recorded=online))
    device = None if engine.on_cpu else "cuda"  # tensors say that they are on a CPU
    model = build(config, model_config, method, engine)
    with planned_for(device):
        if reach:
            parts = reach.parts
            _ = parts.unselected and parts.unselected.on_host  # while its tensors can be read
            if engine.sp_size > 1:
                plan_as_first_rank(model, engine.sp_size, config.training.sequence_layout, parts, method.recompute)
            else:
                tiles.tiles_of(reach, config.training.tile_rows, method.recompute)
    decoder, work = find_decoder(model), Work()
    try:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with (
            planned_for(device),
            nullcontext() if reach is None or online else require_ditching(model).handing(reach),
            fake,
            Ledger(clock=lambda: work.seconds) as ledger,
            work,
            _LargestBatch(ledger),
            _masks_as_of_real_tensors(),
            storage.copies_watched(partial(_track_stored, ledger)),
            visited_by(partial(some_of, work)),
            chunks_run_by(FewChunks(work)),
        ):
            _materialise(model)
            state = ShardedState(model, decoder, engine, ledger, config.training.mixed_precision, make_optimizer)
            if reach and online:
                gathered = state.gathered if engine.shards_parameters else None
                require_ditching(model).decided = decided(reach, gathered)
            if config.training.gradient_accumulation_steps > 1:
                state.accumulate_before()
            ledger.reset_peak("embedding")
            work.reset()
            with measured(lambda: work.times) as traffic:
                _train_pass(model, decoder, state, ledger, config, method, engine, shape, positions_BS)
            micro_batch = Done(work.flops, work.operations)
            work.reset()
            if not engine.on_cpu and is_fused(config):
                count_as_one(state.optimizer, work)
            ledger.region = "workspace"
            ledger.mark("optimizer")
            state.step()
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{type(decoder.causal_lm).__name__} with training.optim={config.training.optim} cannot be planned: the "
            f"sizes of its tensors depend on the data ({error.func})."
        ) from error
    return TakenStep(
        len(decoder.layers),
        ledger.stretches,
        ledger.host_peak,
        micro_batch,
        Done(work.flops, work.operations),
        nbytes_of(state.parameters),
        nbytes_of(state.trained),
        nbytes_of(model.buffers()),
        sum([*traffic.forward.values(), *traffic.backward.values()]),
        nbytes_of(state.parameters) + state.gathered_again if online else 0,
    )


def kv_storage_of(config: RunConfig, method: Method) -> str:
    return method.kv_storage or config.training.kv_storage


def _spread_positions(ratio: float, batch: int, tokens: int) -> torch.Tensor:
    """[B, S]: as many positions as a rule selects, spread evenly up to the last token: none can be left out then."""
    count = max(1, int(ratio * tokens + 0.5))
    positions = np.arange(1, count + 1, dtype=np.int64) * tokens // count - 1
    return torch.from_numpy(positions).expand(batch, count).contiguous()


def build(config: RunConfig, model_config: PreTrainedConfig, method: Method, engine: Engine) -> nn.Module:
    """The model of a run with its adapter, on the meta device.

    Raises:
        UserError: Transformers makes no such model, or not with this attention.
    """
    with torch.device("meta"), no_init_weights():
        attention = config.model.attn_implementation
        try:
            model: Any = AutoModelForCausalLM.from_config(
                model_config,
                dtype=getattr(torch, config.model.dtype),
                attn_implementation=attention,
                trust_remote_code=config.model.trust_remote_code,
            )
        except ValueError as error:
            other = {"sdpa": "eager", "eager": "sdpa"}[attention]
            raise UserError(
                f"{config.model.name_or_path} cannot be made with model.attn_implementation={attention} "
                f"({str(error).strip().splitlines()[0]}); try --set model.attn_implementation={other}."
            ) from error
        model.tie_weights()
        if config.model.quantization:
            pack_linear_layers(model, config.model)
        if config.peft:
            model = add_adapter(model, config.peft)
    precision = _PRECISIONS.get(config.training.mixed_precision)
    if precision and (engine.is_deepspeed or engine.kind == "fsdp2"):  # these run the model itself in 16 bits
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(precision)
    if method.ratio is not None:
        enable_token_ditching(
            model,
            recompute=method.recompute,
            kv_storage=kv_storage_of(config, method),
            tile_rows=config.training.tile_rows,
            seeking=seeking_of(config),
        )
    elif method.recompute:
        enable_checkpointing(model)
    return model.train()


def _materialise(model: nn.Module) -> None:
    """Replace meta tensors by tensors of the mode in force."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    new = torch.empty_like(tensor, device="cpu")
                    made[tensor] = nn.Parameter(new, tensor.requires_grad) if tensors is tables[0] else new
                tensors[name] = made[tensor]


def _train_pass(
    model: nn.Module,
    decoder: Decoder,
    state: ShardedState,
    ledger: Ledger,
    config: RunConfig,
    method: Method,
    engine: Engine,
    shape: tuple[int, int],
    positions_BS: torch.Tensor | None,
) -> None:
    """Forward and backward of one micro batch, as Transformers' Trainer takes them."""
    ids = torch.zeros(shape, dtype=torch.int64)
    extra: dict[str, Any] = {} if positions_BS is None else {"selected_positions": positions_BS}
    if is_online(config, method):
        extra = {"selection": config.selection.to_rule(), "selection_keys": ids[:, 0]}
    decoder.body.register_forward_pre_hook(lambda module, args: _enter_body(ledger))
    decoder.body.register_forward_hook(lambda module, args, output: _enter_head(ledger, output))
    _mark_layers(decoder, ledger)
    precision = _PRECISIONS.get(config.training.mixed_precision)
    autocasts = precision and not engine.is_deepspeed
    saved = _saved(ledger, _HostCheckpoints(ledger, decoder, shape) if method.offload else None)
    # As from the collator, with the count that Trainer hands on.
    inputs: dict[str, Any] = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, num_items_in_batch=ids.numel()
    )
    casting: AbstractContextManager[Any] = torch.autocast("cpu", precision) if autocasts else nullcontext()
    with saved, casting:
        output = {"loss": _chunked_loss(decoder, **inputs)} if method.chunked_loss else model(**inputs, **extra)
    total = (convert_to_fp32(output) if autocasts else output)["loss"]
    del output
    with state.backward_pass():
        total.backward()


def _track_stored(ledger: Ledger, kind: str, copies: tuple[torch.Tensor, ...]) -> None:
    """Copies of keys and values for the backward pass, and hidden states in their place, by where they are."""
    ledger.track(copies, {"host": HOST, "hidden": "activations"}.get(kind, "keys_values"))


@contextmanager
def _masks_as_of_real_tensors() -> Iterator[None]:
    """Transformers asks nothing of tensors without data, and builds the largest masks then, which no real batch has."""
    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *args: False
    try:
        yield
    finally:
        masking_utils.is_tracing = before


def _mark_layers(decoder: Decoder, ledger: Ledger) -> None:
    """A stretch for each layer, forward and backward."""

    def mark(number: int, layer: nn.Module) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: ledger.mark(("backward", number)))

        layer.register_forward_pre_hook(lambda module, args: ledger.mark(("forward", number)))
        layer.register_forward_hook(after)

    for number, layer in enumerate(decoder.layers):
        mark(number, layer)


def _enter_body(ledger: Ledger) -> None:
    ledger.region = "workspace"


def _enter_head(ledger: Ledger, body_output: Any) -> None:
    """From here to the gradient of the body's output, what is born belongs to the head."""
    ledger.region = "logits"
    ledger.mark("head")

    def leave(gradient: torch.Tensor) -> None:
        ledger.region = "workspace"

    hidden = body_output[0]
    if hidden.requires_grad:
        hidden.register_hook(leave)


def _chunked_loss(
    decoder: Decoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int,
) -> torch.Tensor:
    """As ordinary training computes it, a few rows of logits at a time."""
    output = decoder.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    hidden_BTD, targets_BT = output.last_hidden_state, next_token_labels(labels)
    return selected_loss(decoder, output, hidden_BTD, targets_BT, num_items_in_batch, recompute=True)


def _saved(ledger: Ledger, checkpoints: _HostCheckpoints | None) -> saved_tensors_hooks:
    """What autograd saves is counted as such; what enters a recomputed layer goes to the host, where that is asked."""

    def save(tensor: torch.Tensor) -> Any:
        if checkpoints and checkpoints.is_one(tensor):
            return checkpoints.put(tensor)
        if ledger.category_of(tensor) == "workspace":
            ledger.track([tensor], "activations")
        return tensor

    return saved_tensors_hooks(save, lambda saved: saved if isinstance(saved, torch.Tensor) else saved())


class _HostCheckpoints:
    """Hidden states [B, T, D] that enter recomputed layers, copied to host memory and back."""

    def __init__(self, ledger: Ledger, decoder: Decoder, shape: tuple[int, int]):
        self.ledger = ledger
        self.size = (*shape, decoder.causal_lm.config.get_text_config().hidden_size)
        self.is_in_layers = False
        decoder.layers[0].register_forward_pre_hook(lambda module, args: self._enter(True))
        decoder.body.register_forward_hook(lambda module, args, output: self._enter(False))

    def _enter(self, is_in_layers: bool) -> None:
        self.is_in_layers = is_in_layers

    def is_one(self, tensor: torch.Tensor) -> bool:
        return self.is_in_layers and tuple(tensor.shape) == self.size

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        copy = torch.empty_like(tensor)
        self.ledger.track([copy], HOST)
        return lambda: torch.empty_like(copy)


class _LargestBatch(TorchDispatchMode):
    """What code asks of a tensor's data, answered for a batch without padding in which every token carries a loss.

    Results whose size depends on data get the largest that they can have, and a question of truth ("is nothing
    padded?", "is this no packing of several examples?") is answered yes.
    """

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked more often than all else together
            return _CPU
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            for tensor in args[1:3]:
                # Keys and values may be in one; a view of something larger (queries too) is left where it is.
                if tensor.untyped_storage().nbytes() <= 2 * tensor.nbytes:
                    self.ledger.track([tensor], "keys_values")
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))
