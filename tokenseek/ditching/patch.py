"""Token ditching (Algorithm 1 of the paper) for any causal LM of Transformers, switched on in place.

Each decoder layer runs its untouched code twice: over the unselected rows without gradient and, in the middle of that,
over the selected rows with gradient. A row is computed once and only selected rows store activations. Between layers,
the selected rows travel the model's own path (so that hooks of DDP, ZeRO and FSDP2 see a usual graph) and the
unselected rows wait aside.

Shapes: B batch, T tokens, S selected, U unselected, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenseek.decoder.attention import has_attention_interface, require_masked_backend
from tokenseek.decoder.find import Decoder, find_decoder, keep_4bit_differentiable
from tokenseek.decoder.head import head_logits, next_token_labels
from tokenseek.decoder.masks import makes_masks_by_utils, whole_masks
from tokenseek.decoder.names import CACHE_ARGUMENTS, OUTPUTS_OF_ALL_TOKENS, checkpoints, without_checkpointing
from tokenseek.ditching.attention import selected_attention, unselected_attention
from tokenseek.ditching.autocast import autocast_cache
from tokenseek.ditching.cache import KeysAndValuesSeen, SelectedCache, UnselectedCache
from tokenseek.ditching.embedding import forget_tied_weights, one_gradient_of_tied_weights
from tokenseek.ditching.loss import most_chunks, selected_loss, supervised_loss
from tokenseek.ditching.online import OnlineOutput, Seeking, see_all_tokens
from tokenseek.ditching.packing import MaskedPartition, PackedPartition, partition_by_example
from tokenseek.ditching.planned import PlannedRows
from tokenseek.ditching.recorded import RecordedCache, Recording, RecordingCache
from tokenseek.ditching.rows import Partition, Rows, partition
from tokenseek.ditching.storage import STORAGES, TakenOnce, saved_as_kept
from tokenseek.ditching.zero3 import gather_layers_once, ungather_layers
from tokenseek.errors import UserError
from tokenseek.labels import IGNORED
from tokenseek.selection import SelectionRule
from tokenseek.versions import tell_of_untested, what_to_install


def enable_token_ditching(
    model: nn.Module, *, recompute: bool = False, kv_storage: str = "device", seeking: Seeking | None = None
) -> nn.Module:
    """Let `model` train on selected tokens only; patches it in place and returns it.

    Afterwards ``model(input_ids=..., attention_mask=..., labels=..., selected_positions=...)`` back-propagates through
    the selected positions alone (Eq. 6) and its ``.loss`` is the mean cross-entropy over selected supervised positions:
    position t predicts token t + 1 and counts if it is selected and ``labels[t + 1]`` is not -100. With
    ``num_items_in_batch`` the sum is divided by that instead, as Transformers' own losses do; ``selected_weights``
    [B, S] makes sum and mean weighted ones. ``.logits`` is None, or [B, S, V] when no labels are given. Without
    ``selected_positions`` the model is what it was.

    ``model(input_ids=..., labels=..., selection=rule, selection_keys=...)`` needs no index: it runs all tokens without
    gradient, scores them, selects by `rule`, a :class:`tokenseek.SelectionRule`, with draws keyed by one int64 for each
    example, and back-propagates through what it selected. The output also has ``.loss_all``, the mean loss of all
    supervised tokens, ``.selected_positions`` and ``.selected_weights``. ``.loss`` is the weighted sum over selected
    supervised positions divided by the number of all supervised ones, or by ``num_items_in_batch``.

    Args:
        model: a causal LM, plain or PEFT-wrapped, before or after it is wrapped for data parallelism.
        recompute: run the selected rows of each layer once more in the backward pass instead of storing their
            activations; keys and values are then all that a layer stores. ``activation_checkpointing_enable()``
            means the same.
        kv_storage: where the keys and values of all tokens wait for the backward pass: "device"; "host", copied to and
            from pinned memory; or "int8", 8 bits a number and a scale for each token and head, with which gradients are
            no longer exact (docs/performance.md says by how much).
        seeking: how tokens are scored with ``selection``; by the gradient at the last layer's input by default.

    Raises:
        UserError: for models that token ditching cannot serve, saying why.

    Example:
        >>> model = tokenseek.enable_token_ditching(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"))
        >>> model(input_ids=ids, labels=ids, selected_positions=torch.tensor([[3, 7, 9]])).loss.backward()
    """
    if kv_storage not in STORAGES:
        raise UserError(f"kv_storage is {kv_storage!r}; it must be one of {', '.join(STORAGES)}.")
    tell_of_untested(partial(warnings.warn, stacklevel=3))
    decoder = find_decoder(model)
    require_masked_backend(decoder.causal_lm)
    sequence = None
    if hasattr(decoder.causal_lm, "_token_ditching"):
        sequence = decoder.causal_lm._token_ditching.sequence
        disable_token_ditching(model)
    keep_4bit_differentiable(model)  # an evaluation before or during training would repack them
    ditching = Ditching(decoder, recompute, kv_storage, seeking or Seeking())
    ditching.sequence = sequence
    _replace_forward(decoder.causal_lm, ditching, _causal_lm_forward(decoder.causal_lm))
    _replace_forward(decoder.body, ditching, _body_forward)
    for layer in decoder.layers:
        _replace_forward(layer, ditching, _layer_forward)
    gather_layers_once(decoder)
    return model


def disable_token_ditching(model: nn.Module) -> nn.Module:
    """Undo :func:`enable_token_ditching`; the model is then exactly as it was before. Returns it."""
    decoder = find_decoder(model)
    if not hasattr(decoder.causal_lm, "_token_ditching"):
        raise UserError(f"token ditching is not enabled on this {decoder.name}.")
    patched = (decoder.causal_lm, decoder.body, *decoder.layers)
    for module in patched:
        if getattr(module.__dict__.get("forward"), "__func__", None) is not module._token_ditching_forward:
            raise UserError(
                f"{type(module).__name__}.forward was replaced again after token ditching was enabled (mixed precision "
                "of accelerate does that); call accelerator.unwrap_model(model, keep_fp32_wrapper=False) first."
            )
    for module in patched:
        del module.forward
        if module._forward_before_ditching is not None:
            module.forward = module._forward_before_ditching
        del module._token_ditching, module._token_ditching_forward, module._forward_before_ditching
    ungather_layers(decoder)
    forget_tied_weights(decoder)
    return model


def _replace_forward(module: nn.Module, ditching: Ditching, forward) -> None:
    module._forward_before_ditching = module.__dict__.get("forward")
    module._token_ditching, module._token_ditching_forward = ditching, forward
    # A bound method, unlike a closure, follows the module when it is copied.
    module.forward = MethodType(forward, module)


def _original_forward(module: nn.Module):
    return module._forward_before_ditching or MethodType(type(module).forward, module)


class Ditching:
    """What the patched modules of one model share; `step` is set while a forward pass with selected tokens runs."""

    def __init__(self, decoder: Decoder, recompute: bool, kv_storage: str, seeking: Seeking):
        self.decoder = decoder
        self.recompute = recompute
        self.kv_storage = kv_storage
        self.seeking = seeking
        self.step: Step | None = None
        # Keys and values of all tokens: set while they are recorded, and while the selected rows attend to them.
        self.recorder: Recording | None = None
        self.recorded: Recording | None = None
        # Set where ranks share a text (`tokenseek.parallel`).
        self.sequence = None
        # Old decoders give their output the shape of their input ids by a view, which only all T rows fit.
        source = inspect.getsource(inspect.unwrap(type(decoder.body).forward))
        self.returns_all_rows = "view(output_shape)" in source
        self.has_interface = has_attention_interface(decoder)

    def recomputes(self, layer: nn.Module) -> bool:
        return self.recompute or checkpoints(layer)

    @contextmanager
    def recording(self, recording: Recording) -> Iterator[None]:
        """In the block, layers run over all tokens and leave their keys and values in `recording`."""
        self.recorder = recording
        try:
            with autocast_cache(False), without_checkpointing(self.decoder.body, *self.decoder.layers):
                yield
        finally:
            self.recorder = None

    @contextmanager
    def replaying(self, recording: Recording) -> Iterator[None]:
        """In the block, selected rows attend to the keys and values of `recording`."""
        self.recorded = recording
        try:
            yield
        finally:
            self.recorded = None

    def even_chunks(self, own: int) -> int:
        """How many chunks of the head all processes run, where each has to gather its weights with the others."""
        head = self.decoder.causal_lm.get_output_embeddings()
        return most_chunks(head, own)

    @property
    def attention_is_ours(self) -> bool:
        """Whether the model looks its attention function up, and finds one of ours: its backend is sdpa."""
        return self.has_interface and self.decoder.causal_lm.config.get_text_config()._attn_implementation == "sdpa"


class Step:
    """One forward pass: the partition of its tokens and, between layers, the unselected rows.

    Where these have run before, their keys and values are in `recording`.
    """

    def __init__(self, parts: Partition, recomputed: set[nn.Module], recording: Recording | None):
        self.partition = parts
        # Layers whose selected rows run once more in the backward pass.
        self.recomputed = recomputed
        self.recording = recording
        self.unselected_BUD: torch.Tensor | None = None
        self.started = False


def _causal_lm_forward(causal_lm: nn.Module):
    names = list(inspect.signature(causal_lm.forward).parameters)

    def forward(
        self,
        *args,
        selected_positions=None,
        selected_weights=None,
        selection=None,
        selection_keys=None,
        labels=None,
        num_items_in_batch=None,
        shift_labels=None,
        **kwargs,
    ):
        ditching: Ditching = self._token_ditching
        decoder, sequence = ditching.decoder, ditching.sequence
        arguments = dict(zip(names, args, strict=False)) | kwargs
        has_labels = any(given is not None for given in (labels, shift_labels, arguments.get("labels")))
        if selection is not None:
            if selected_positions is not None or selected_weights is not None:
                raise UserError(
                    "selection and selected_positions are both given: give a rule, by which the model selects, or "
                    "positions that were selected before."
                )
            labels = arguments.pop("labels", labels)
            if labels is None:
                raise UserError("selection is given without labels, which decide what the tokens are scored by.")
            output = _online_forward(ditching, arguments, selection, selection_keys, labels, num_items_in_batch)
            return output.to_tuple() if arguments.get("return_dict") is False else output
        if selected_positions is None and not (sequence and has_labels):
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return _original_forward(self)(*args, **kwargs)
        labels = arguments.pop("labels", labels)
        return_dict = arguments.pop("return_dict", None)
        arguments.pop("logits_to_keep", None)
        if sequence:
            selected_positions = sequence.agreed_positions(arguments, selected_positions, labels, shift_labels)
        planned = selected_positions if isinstance(selected_positions, PlannedRows) else None
        parts = planned.partition if planned else _partition(ditching, arguments, selected_positions)
        labels_BS = _labels_of(parts.selected, labels, shift_labels) if has_labels and not planned else None
        if sequence:
            if num_items_in_batch is None:
                counts_BS = labels_BS.ne(IGNORED)
                num_items_in_batch = (counts_BS if selected_weights is None else counts_BS * selected_weights).sum()
            arguments, parts, labels_BS, selected_weights = sequence.share(
                decoder, arguments, parts, labels_BS, selected_weights
            )
        with one_gradient_of_tied_weights(decoder):
            body_output = decoder.body(**arguments, selected_positions=parts)
        hidden_BSD = body_output.last_hidden_state

        loss = logits = None
        if has_labels:
            # A loss of rows that the host knows, or of those that the labels tell.
            rows = (planned.supervised_R, planned.targets_R) if planned else (labels_BS,)
            loss = (supervised_loss if planned else selected_loss)(
                decoder,
                body_output,
                hidden_BSD,
                *rows,
                num_items_in_batch,
                recompute=ditching.recomputes(decoder.layers[-1]),
                weights_BS=selected_weights,
            )
            loss = sequence.total(loss) if sequence else loss
        else:
            logits = head_logits(decoder, body_output, hidden_BSD.flatten(0, 1))
            logits = logits.view(*hidden_BSD.shape[:2], -1)
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    # Trainers read the signature to learn which columns the model takes and whether it normalises its loss itself.
    parameters = list(inspect.signature(type(causal_lm).forward).parameters.values())
    names_added = ("selected_positions", "selected_weights", "selection", "selection_keys")
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names_added]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*parameters[:at], *added, *parameters[at:]])
    return forward


def _online_forward(
    ditching: Ditching,
    arguments: dict,
    rule: SelectionRule,
    selection_keys: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
) -> OnlineOutput:
    """Both passes of :mod:`tokenseek.ditching.online`, and the loss of the selected rows."""
    decoder, recompute = ditching.decoder, ditching.recomputes(ditching.decoder.layers[-1])
    arguments = {name: value for name, value in arguments.items() if name not in ("return_dict", "logits_to_keep")}
    sequence = ditching.sequence

    def all_tokens_loss(body_output, hidden_BTD, targets_BT):
        return selected_loss(decoder, body_output, hidden_BTD, targets_BT, 1, recompute)

    seen = see_all_tokens(ditching, arguments, labels, rule, selection_keys, all_tokens_loss)
    parts = _partition(ditching, arguments, seen.selection.positions, recorded=True)
    labels_BS, weights_BS = _labels_of(parts.selected, labels, None), seen.selection.weights
    if sequence:
        arguments, parts, labels_BS, weights_BS = sequence.share(decoder, arguments, parts, labels_BS, weights_BS)
    with one_gradient_of_tied_weights(decoder), ditching.replaying(seen.recording):
        body_output = decoder.body(**arguments, selected_positions=parts)
    if num_items_in_batch is None:
        num_items_in_batch = max(1, seen.supervised)
    if seen.border is None:
        loss = selected_loss(
            decoder,
            body_output,
            body_output.last_hidden_state,
            labels_BS,
            num_items_in_batch,
            recompute,
            weights_BS,
        )
        loss = sequence.total(loss) if sequence else loss
    else:
        surrogate = seen.surrogate(seen.recording.border, parts.selected)
        loss = (seen.loss_sum + (surrogate - surrogate.detach())) / num_items_in_batch
    return OnlineOutput(
        loss=loss,
        loss_all=seen.loss_sum.detach() / max(1, seen.supervised),
        selected_positions=seen.selection.positions,
        selected_weights=seen.selection.weights,
    )


def _labels_of(rows: Rows, labels: torch.Tensor | None, shift_labels: torch.Tensor | None) -> torch.Tensor:
    """[B, S]: the token that each selected row has to predict. `shift_labels` may be [B, T] or already [B, S]."""
    if shift_labels is None:
        shift_labels = next_token_labels(labels)
    if shift_labels.shape != rows.index_BR.shape:
        shift_labels = rows.take(shift_labels, 1)
    return shift_labels.masked_fill(~rows.valid_BR, IGNORED)


def _partition(
    ditching: Ditching, arguments: dict, selected_positions: torch.Tensor | Partition, recorded: bool = False
) -> Partition:
    if isinstance(selected_positions, Partition):  # made before, where its positions could be read (see planning)
        return selected_positions
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"] if tokens is None else tokens
    selected_positions = selected_positions.to(tokens.device)
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is None and position_ids is not None and not ditching.sequence:
        return partition_by_example(
            ditching.decoder, selected_positions, position_ids, ditching.attention_is_ours, recorded
        )
    return partition(selected_positions, mask, tokens.shape[1], recorded)


def _body_forward(self, *args, selected_positions: torch.Tensor | Partition | None = None, **kwargs):
    """The body's output with hidden states of the selected rows, [B, S, D]; of all rows, [B, T, D], without them."""
    ditching: Ditching = self._token_ditching
    if selected_positions is None:
        return _original_forward(self)(*args, **kwargs)
    arguments = dict(zip(_argument_names(type(self)), args, strict=False)) | kwargs
    for name in (*CACHE_ARGUMENTS, *OUTPUTS_OF_ALL_TOKENS):
        if arguments.pop(name, None) or getattr(self.config, name, None):
            raise UserError(f"{name} cannot be had together with selected_positions: leave it out, in the config too.")
    arguments["use_cache"] = False
    parts = selected_positions
    if not isinstance(parts, Partition):
        if ditching.sequence:
            raise UserError("under sequence parallelism call the causal LM with labels: hidden states stay apart.")
        parts = _partition(ditching, arguments, selected_positions)
    masks = parts.masks(ditching.decoder)
    if parts.right_padded and arguments.get("position_ids") is None:
        # No token looks at padding behind it: causality is all the mask that is needed.
        arguments.pop("attention_mask", None)
        if type(parts) is Partition and makes_masks_by_utils(ditching.decoder):
            # Without a mask, Transformers would look for packed examples, for which the host waits for the device.
            arguments["attention_mask"] = _ones(parts)
            masks = whole_masks(ditching.decoder, parts.tokens, None, None)
    if isinstance(parts, MaskedPartition | PackedPartition):
        # Its masks are made by example; with a mask of its own the model does not do so once more.
        arguments["attention_mask"] = _ones(parts)

    layers = ditching.decoder.layers
    ditching.step = Step(parts, {layer for layer in layers if ditching.recomputes(layer)}, ditching.recorded)
    try:
        # Until 5.22, Transformers recomputes a layer from outside its forward.
        with masks, without_checkpointing(self, *layers):
            output = _original_forward(self)(**{name: value for name, value in arguments.items() if value is not None})
    finally:
        ditching.step = None
    rows = parts.selected
    if ditching.returns_all_rows:
        output.last_hidden_state = rows.take(output.last_hidden_state, 1)
    if (shape := output.last_hidden_state.shape[:2]) != rows.index_BR.shape:
        raise UserError(
            f"{ditching.decoder.name} returned hidden states of {list(shape)} rows for {list(rows.index_BR.shape)} "
            "selected ones: it changes the token axis after its layers; this model is not served."
        )
    return output


def _ones(parts: Partition) -> torch.Tensor:
    index_BR = parts.selected.index_BR
    return index_BR.new_ones(len(index_BR), parts.tokens)


def _layer_forward(self, *args, **kwargs):
    ditching: Ditching = self._token_ditching
    if ditching.recorder is not None:
        return _recorded_layer(self, ditching, args, kwargs)
    if ditching.step is None:
        return _original_forward(self)(*args, **kwargs)
    names = _argument_names(type(self))
    arguments = dict(zip(names, args, strict=False)) | kwargs
    hidden = arguments.pop(names[0])
    arguments.pop(ditching.decoder.cache_argument, None)

    step, parts = ditching.step, ditching.step.partition
    if not step.started:
        step.started = True
        step.unselected_BUD = parts.unselected and parts.unselected.take(hidden.detach(), 1)
        hidden = parts.selected.take(hidden, 1)
    else:
        hidden = parts.enter_layer(parts.selected, hidden)
        if parts.unselected is not None:
            step.unselected_BUD = parts.enter_layer(parts.unselected, step.unselected_BUD)
    is_last = self is ditching.decoder.layers[-1]
    if step.recording is not None and self in step.recording.unrecorded:
        output = step.recording.beyond_border(hidden)
    else:
        output = _run_both_passes(self, ditching, hidden, arguments, is_last)
    hidden = _hidden_states(output)
    if not is_last:
        hidden = parts.leave_layer(parts.selected, hidden)
        if parts.unselected is not None:
            step.unselected_BUD = parts.leave_layer(parts.unselected, step.unselected_BUD)
    elif ditching.returns_all_rows:
        hidden = parts.assemble(None, hidden[:, None])[:, 0]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _recorded_layer(layer: nn.Module, ditching: Ditching, args: tuple, kwargs: dict):
    """The layer over all tokens, as it is; its keys and values are kept."""
    names, recorder = _argument_names(type(layer)), ditching.recorder
    arguments = dict(zip(names, args, strict=False)) | kwargs
    cache = RecordingCache(recorder.exchange)
    arguments[ditching.decoder.cache_argument] = cache

    if layer in recorder.scored:
        outputs = []

        def run(leaf: torch.Tensor) -> torch.Tensor:
            outputs.append(_original_forward(layer)(**{**arguments, names[0]: leaf}))
            return _hidden_states(outputs[0])

        hidden = recorder.run_scored(layer, run, arguments[names[0]])
        output = (hidden, *outputs[0][1:]) if isinstance(outputs[0], tuple) else hidden
    else:
        output = _original_forward(layer)(**arguments)
    _require_updated(cache, layer, ditching)
    recorder.put(layer, cache.keys, cache.values)
    recorder.returns_tuple = isinstance(output, tuple)
    return output


def _run_both_passes(layer: nn.Module, ditching: Ditching, selected_BSD: torch.Tensor, arguments: dict, is_last: bool):
    """The layer's output for the selected rows; moves ``step.unselected_BUD`` through the layer too."""
    step, parts = ditching.step, ditching.step.partition
    with_gradient, caches_casts = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
    checkpointing, attention_is_ours = layer in step.recomputed, ditching.attention_is_ours

    def run(hidden, rows, cache, replace):
        # Only an attention function of ours knows the rows; a model that has its own needs the mask in full.
        shrunk = {name: rows.shrink(name, value, attention_is_ours) for name, value in arguments.items()}
        attention = parts.attention(ditching.decoder, replace if attention_is_ours else None)
        with without_checkpointing(layer), attention:
            return _original_forward(layer)(hidden, **shrunk, **{ditching.decoder.cache_argument: cache})

    def run_selected(hidden, keys=None, values=None):
        cache = (SelectedCache if step.recording is None else RecordedCache)(parts, keys, values)
        replace = parts.replacement(parts.whole.selected, selected_attention)
        # What is recomputed saves nothing until then.
        is_put_away = ditching.kv_storage != "device" and with_gradient and not checkpointing
        with saved_as_kept(lambda: (cache.keys, cache.values), ditching.kv_storage) if is_put_away else nullcontext():
            output = run(hidden, parts.selected, cache, replace)
        _require_updated(cache, layer, ditching)
        return output, cache.keys, cache.values

    def selected_pass(*keys_and_values):
        with torch.set_grad_enabled(with_gradient), autocast_cache(caches_casts):
            if not (checkpointing and with_gradient):
                return run_selected(selected_BSD, *keys_and_values)
            kept = [TakenOnce(rows, ditching.kv_storage) for rows in keys_and_values]
            return checkpoint(
                lambda hidden: run_selected(hidden, *(rows.take() for rows in kept)), selected_BSD, use_reentrant=False
            )

    if step.recording is not None:
        return selected_pass(*step.recording.take(layer))[0]
    if parts.unselected is None:
        return selected_pass()[0]
    seam = UnselectedCache(lambda *rows: selected_pass(*parts.exchange(*rows)), stop=is_last)
    # An engine that casts what enters a layer does not see the rows that wait aside.
    unselected_BUD = step.unselected_BUD.to(selected_BSD)
    with torch.no_grad(), autocast_cache(False):
        try:
            calls: list[nn.Module] = []
            attend = partial(unselected_attention, on_call=lambda: calls.append(layer))
            replace = parts.replacement(parts.whole.unselected, attend)
            step.unselected_BUD = _hidden_states(run(unselected_BUD, parts.unselected, seam, replace))
            _require_updated(seam, layer, ditching)
            if attention_is_ours and not calls:
                raise UserError(
                    f"{type(layer).__name__} in {ditching.decoder.name} does not attend by Transformers' "
                    "AttentionInterface, as its file makes believe: load the model with attn_implementation='eager'."
                )
        except KeysAndValuesSeen:
            step.unselected_BUD = None
        except (RuntimeError, AttributeError, LookupError, TypeError):
            # The likelier cause: attention over the wrong shapes, or a use of caches that is not known here.
            _require_updated(seam, layer, ditching)
            raise
    return seam.selected_output


def _require_updated(
    seam: SelectedCache | UnselectedCache | RecordingCache, layer: nn.Module, ditching: Ditching
) -> None:
    if seam.keys is None:
        raise UserError(
            f"{type(layer).__name__} in {ditching.decoder.name} does not pass its keys and values through its cache; "
            f"this model is not served. {what_to_install('transformers')}"
        )


@cache
def _argument_names(layer_class: type) -> list[str]:
    return list(inspect.signature(layer_class.forward).parameters)[1:]


def _hidden_states(layer_output) -> torch.Tensor:
    return layer_output[0] if isinstance(layer_output, tuple) else layer_output
