"""Deep models from two shallow ones: where layers repeat, what a step holds and does grows evenly with their number.

At the same moment of the step (a layer's forward or backward pass, the head, the optimizer's step), counted from the
first layer or from the last, memory is a linear function of the depth; so are arithmetic and bytes. Two depths give it
exactly. In between, it is a linear function of the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from tokenseek.config import RunConfig
from tokenseek.decoder.find import find_decoder
from tokenseek.launching.engine import Engine
from tokenseek.planning.fake import Done, TakenStep, build
from tokenseek.planning.ledger import Stretch
from tokenseek.planning.method import Method


@dataclass(frozen=True)
class Depths:
    """Numbers of layers: `of` two shallow models, which end as the `whole` does.

    Attributes:
        period: layers after which a model repeats itself.
    """

    of: tuple[int, int]
    whole: int
    period: int

    @property
    def more(self) -> int:
        """How many more periods the whole model has than the deeper one."""
        return (self.whole - self.of[1]) // self.period


def depths_that_tell(config: RunConfig, engine: Engine, model_config: PreTrainedConfig) -> Depths | None:
    """The depths of two models that tell of the one of `model_config`; None where they would save nothing, or where its
    layers do not repeat."""
    precision = engine.kind, config.training.mixed_precision
    settings = config.model.model_dump_json(), config.peft and config.peft.model_dump_json(), *precision
    layers = _layers_of(_Key((model_config.to_json_string(False), *settings), config, model_config, engine))
    whole = len(layers)
    period = next((p for p in range(1, whole // 3 + 1) if layers[p:] == layers[:-p]), None)
    if period is None:
        return None
    # Two periods are counted from the first layer, and two from the last; more, where the last layers are scored, or
    # trained whole: then the one below them is unlike the others too.
    fewest = 3 * period + max(config.scoring.gradient_layer - 1, config.selection.wanted_exact_layers)
    shallow = fewest + (whole - fewest) % period
    deeper = shallow + period
    if shallow + deeper >= whole:
        return None
    if engine.is_deepspeed:  # buckets are no larger than all gradients together
        bucket = engine.reduce_bucket or model_config.get_text_config().hidden_size ** 2
        if sum(_trained_numbers(layer) for layer in layers[:shallow]) < bucket:
            return None
    for depth in (shallow, deeper):
        small = with_layers(model_config, depth)
        key = _Key((small.to_json_string(False), *settings), config, small, engine)
        if _layers_of(key) != layers[:depth]:
            return None
    return Depths((shallow, deeper), whole, period)


def with_layers(model_config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The configuration of a model of the first `depth` layers."""
    small = deepcopy(model_config)
    text = small.get_text_config()
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return small


class _Key:
    """Arguments of a cached function, of which `name` tells them apart."""

    def __init__(self, name: Hashable, *values: Any):
        self.name, self.values = name, values

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.name == other.name


@lru_cache(maxsize=64)
def _layers_of(key: _Key) -> list[Hashable]:
    """What tells layers apart: the types, numbers and weights of their modules."""
    config, model_config, engine = key.values
    model = build(config, model_config, Method(), engine)
    return [_description(layer) for layer in find_decoder(model).layers]


def _trained_numbers(description: Any) -> int:
    return sum(shape.numel() for _, shape, _, is_trained in description[1] if is_trained)


def _description(layer: nn.Module) -> Hashable:
    modules = tuple((name, type(module), _numbers(module)) for name, module in layer.named_modules())
    weights = tuple((name, w.shape, w.dtype, w.requires_grad) for name, w in layer.named_parameters())
    return modules, weights


def _numbers(module: nn.Module) -> tuple:
    """Its settings, without the layer's own number."""
    settings = {name: x for name, x in vars(module).items() if x is None or isinstance(x, (bool, int, float, str))}
    return tuple(sorted((name, repr(x)) for name, x in settings.items() if "layer_i" not in name))


def deepened(shallow: TakenStep, deeper: TakenStep, depths: Depths) -> TakenStep:
    """The step of the whole model."""
    more = depths.more

    def grown(one: int, other: int) -> int:
        return other + more * (other - one)

    def done(one: Done, other: Done) -> Done:
        operations = Counter({key: (1 + more) * count for key, count in other.operations.items()})
        for key, count in one.operations.items():
            operations[key] -= more * count
        return Done(grown(one.flops, other.flops), operations)

    return TakenStep(
        depths.whole,
        _all_stretches(shallow, deeper, depths),
        grown(shallow.host, deeper.host),
        done(shallow.micro_batch, deeper.micro_batch),
        done(shallow.optimizer, deeper.optimizer),
        grown(shallow.weights, deeper.weights),
        grown(shallow.trained, deeper.trained),
        grown(shallow.scales, deeper.scales),
        grown(shallow.exchanged, deeper.exchanged),
        grown(shallow.gathered_more, deeper.gathered_more),
    )


def _all_stretches(shallow: TakenStep, deeper: TakenStep, depths: Depths) -> list[Stretch]:
    """Of every layer of the whole model, in the order of time."""
    more, period, of_end = depths.more, depths.period, depths.of[0] - depths.period
    one, other = _by_name(shallow), _by_name(deeper)
    of_layers = sorted({(what, time) for what, layer, time in other if layer is not None})

    def grown(name: Hashable, time_in_other: float, first: Stretch, second: Stretch) -> tuple[float, Stretch]:
        peak, *parts = (
            x + more * (x - y)
            for x, y in zip((second.peak, *second.parts.values()), (first.peak, *first.parts.values()), strict=True)
        )
        seconds, average = (
            getattr(second, what) + more * (getattr(second, what) - getattr(first, what))
            for what in ("seconds", "average")
        )
        return time_in_other, Stretch(name, peak, dict(zip(second.parts, parts, strict=True)), seconds, average)

    def of_layer(what: Hashable, layer: int, time: int) -> tuple[float, Stretch] | None:
        """Counted from the first layer or from the last; None where this layer has no such stretch."""
        is_early = layer < 2 * period
        keys = [(what, layer if is_early else layer - depths.whole + depth, time) for depth in depths.of]
        if keys[1] not in other:
            return None
        return grown((what, layer), other[keys[1]][0], one[keys[0]][1], other[keys[1]][1])

    def place_between(what: Hashable, layer: int, time: int, low: float, high: float) -> float:
        """Among those of all layers, of whatever kind; near `low` and `high` where the neighbours have none."""
        first, last = 2 * period - 1, depths.whole - of_end
        before, behind = of_layer(what, first, time), of_layer(what, last, time)
        start, end = before[0] if before else low, behind[0] if behind else high
        return start + (end - start) * (layer - first) / (last - first)

    found = [grown(key[0], at, one[key][1], stretch) for key, (at, stretch) in other.items() if key[1] is None]
    for what, time in of_layers:
        for layer in range(depths.whole):
            if layer < 2 * period or layer >= depths.whole - of_end:
                found += filter(None, [of_layer(what, layer, time)])
                continue
            # Between two of its kind, of which memory is a linear function.
            low = period + layer % period
            high = next(n for n in range(depths.whole - of_end, depths.whole) if n % period == layer % period)
            below, above = of_layer(what, low, time), of_layer(what, high, time)
            if below and above:
                stretch = _between(below[1], above[1], (what, layer), layer - low, high - low)
                found.append((place_between(what, layer, time, below[0], above[0]), stretch))
    return [stretch for _, stretch in sorted(found, key=lambda entry: entry[0])]


def _between(a: Stretch, b: Stretch, name: Hashable, step: int, steps: int) -> Stretch:
    """The stretch `step` of `steps` from one to another."""

    def whole(one: int, other: int) -> int:
        return one + (other - one) * step // steps

    parts = {category: whole(nbytes, b.parts[category]) for category, nbytes in a.parts.items()}
    average = a.average + step / steps * (b.average - a.average)
    return Stretch(name, whole(a.peak, b.peak), parts, a.seconds, average)


def _by_name(step: TakenStep) -> dict[tuple[Hashable, int | None, int], tuple[float, Stretch]]:
    """Stretches, with their places in the step, by (what, layer or None, how many times before)."""
    found: dict[tuple[Hashable, int | None, int], tuple[float, Stretch]] = {}
    times: Counter[Hashable] = Counter()
    for place, stretch in enumerate(step.stretches):
        what, layer = stretch.name if isinstance(stretch.name, tuple) else (stretch.name, None)
        found[what, layer, times[stretch.name]] = float(place), stretch
        times[stretch.name] += 1
    return found
