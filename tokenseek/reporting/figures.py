"""The paper's figures, from maps of examples and from metrics of runs. Needs matplotlib (the extra `report`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml

from tokenseek.config import SelectionConfig
from tokenseek.errors import UserError
from tokenseek.reporting.maps import TokenMaps
from tokenseek.selection import rule_named

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise UserError("figures need matplotlib: pip install 'tokenseek[report]'.") from error

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9741a", "#2e8b57", "#8a929c"
_LAYER_COLOURS = (BLUE, ORANGE, GREEN)

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write ``path`` as PNG and as SVG; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=160, bbox_inches="tight")
    return written


def figure_case(maps: TokenMaps, gradient_columns: int = 256) -> Figure:
    """Fig. 4: the attention map, the gradient map and, under them, the scores that add up their columns and rows.

    The first token is left out of the context curve's scale, as it takes most of the attention.
    """
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (attention, gradient), (context, size) = figure.subplots(2, 2, height_ratios=(1.7, 1))
    _attention(attention, maps, figure)
    attention.set_title("(b) attention of the last layer, mean of heads")
    picture = _pooled(maps.gradient, gradient_columns)
    image = gradient.imshow(picture, aspect="auto", cmap="magma", norm=PowerNorm(0.35), interpolation="nearest")
    gradient.set(xlabel="hidden dimension", ylabel="token", title="(c) |gradient| at the input of the last layer")
    dimensions = maps.gradient.shape[1]
    ticks = np.linspace(0, picture.shape[1] - 1, 5)
    gradient.set_xticks(ticks, [f"{tick * dimensions / picture.shape[1]:.0f}" for tick in ticks])
    figure.colorbar(image, ax=gradient, shrink=0.85, ticks=MaxNLocator(4))
    _context(context, maps)
    context.set_title("(d) context score (Eq. 3)")
    _curve(size, maps.by_layer[0], ORANGE, "gradient score")
    size.set_title("(e) gradient score (Eq. 4)")
    return figure


def figure_layers(maps: TokenMaps) -> Figure:
    """Fig. S1: the gradient scores at the inputs of layers N-1, N-2 and N-3, each over its maximum."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for k, (scores, colour) in enumerate(zip(maps.by_layer, _LAYER_COLOURS, strict=True), start=1):
        axes.plot(scores / max(scores.max(), np.finfo(np.float32).tiny), color=colour, lw=1, label=f"layer N-{k}")
    axes.set(xlabel="token", ylabel="gradient score / its maximum", xlim=(0, maps.by_layer.shape[1] - 1))
    axes.legend(frameon=False, ncols=3)
    return _plain(figure)


def figure_examples(examples: Mapping[str, TokenMaps]) -> Figure:
    """Fig. S2: attention map, context and gradient scores of several examples, one row each."""
    figure = Figure(figsize=(11, 2.6 * len(examples)), layout="constrained")
    grid = figure.subplots(len(examples), 3, squeeze=False, width_ratios=(1, 1.4, 1.4))
    for (attention, context, gradient), (name, maps) in zip(grid, examples.items(), strict=True):
        _attention(attention, maps, figure)
        attention.set_title(f"{name}: attention", fontsize=10)
        _context(context, maps)
        context.set_title("context score", fontsize=10)
        context.set_ylabel("")
        _curve(gradient, maps.by_layer[0], ORANGE, "")
        gradient.set_title("gradient score", fontsize=10)
    return figure


class RunMetrics:
    """A finished or running training run: its configuration and the lines of its ``metrics.jsonl``.

    Raises:
        UserError: the folder is not one that ``tokenseek train`` wrote to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} holds no config.yaml and metrics.jsonl; give the output_dir of a training run.")
        self.config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        # A run that is being written may end in half a line.
        self.lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def ratio(self) -> float:
        """The share of the tokens that the run selects: 1 where it trains on all."""
        if not self.config["training"]["ditching"]:
            return 1.0
        return SelectionConfig.model_validate(self.config["selection"]).to_rule().share

    @property
    def kind(self) -> str:
        """What sets the run apart, but for its ratio and seed."""
        selection, peft, quantization = (
            self.config["selection"],
            self.config["peft"],
            self.config["model"]["quantization"],
        )
        adapter = peft["method"] if peft else "all weights"
        ditching = self.config["training"]["ditching"]
        how = selection["rule"] if ditching else "all tokens"
        if ditching and rule_named(selection["rule"]).needs_scores:
            how += f" \u03b1={selection['alpha']:g} \u03b2={selection['beta']:g}"
        return f"{how}, {adapter}" + (f", {quantization}" if quantization else "")

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one entry of the metrics."""
        found = [(line["step"], line[key]) for line in self.lines if key in line]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The last value that was logged under `key`; None where there is none."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)


def figure_ratio(runs: Sequence[RunMetrics]) -> Figure:
    """Fig. 3: final held-out loss (else training loss) against r; a line a kind, with the range of its seeds."""
    key = "held_out_loss" if all(run.last("held_out_loss") is not None for run in runs) else "loss"
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, of_kind in _by(runs, lambda run: run.kind).items():
        by_ratio = {r: [run.last(key) for run in same] for r, same in _by(of_kind, lambda run: run.ratio).items()}
        ratios = sorted(by_ratio)
        losses = [[loss for loss in by_ratio[ratio] if loss is not None] for ratio in ratios]
        if not all(losses):
            raise UserError(f"a run of {name!r} has logged no {key} yet.")
        (line,) = axes.plot([100 * r for r in ratios], [np.mean(values) for values in losses], "o-", label=name)
        low, high = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between([100 * r for r in ratios], low, high, color=line.get_color(), alpha=0.2, lw=0)
    name = "held-out" if key == "held_out_loss" else "training"
    axes.set(xlabel="selected tokens (%)", ylabel=f"{name} loss (nats per token)")
    axes.legend(frameon=False)
    return _plain(figure)


def figure_curves(runs: Sequence[RunMetrics]) -> Figure:
    """Fig. 5: training loss against the step; a colour for each kind, darker for a larger share of the tokens."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for hue, (name, of_kind) in enumerate(_by(runs, lambda run: run.kind).items()):
        for run in sorted(of_kind, key=lambda run: run.ratio):
            label = f"{name}, r = {run.ratio:g}"
            axes.plot(*run.curve("loss"), color=f"C{hue}", alpha=0.35 + 0.65 * run.ratio, lw=1.3, label=label)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    axes.legend(frameon=False, fontsize=9)
    return _plain(figure)


def figure_memory(runs: Sequence[RunMetrics]) -> Figure:
    """Fig. 6: bars of the peak memory of the main process, over runs with the same kind and ratio their mean."""
    figure = Figure(figsize=(7.5, 0.5 * len(runs) + 1.4), layout="constrained")
    axes = figure.subplots()
    groups = _by(sorted(runs, key=lambda run: (run.kind, run.ratio)), lambda run: f"{run.kind}, r = {run.ratio:g}")
    peaks = [np.mean([max(run.curve("peak_memory_bytes")[1]) for run in same]) / 2**30 for same in groups.values()]
    bars = axes.barh(list(groups), peaks, color=BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="peak memory (GiB)")
    axes.margins(x=0.12)
    return _plain(figure)


def _by(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _attention(axes: Axes, maps: TokenMaps, figure: Figure) -> None:
    visible = np.where(np.tril(np.ones_like(maps.attention)) > 0, maps.attention, np.nan)
    image = axes.imshow(visible, cmap="viridis", norm=LogNorm(vmin=1e-4, vmax=1, clip=True), interpolation="nearest")
    axes.set(xlabel="token looked at", ylabel="token")
    figure.colorbar(image, ax=axes, shrink=0.85)


def _context(axes: Axes, maps: TokenMaps) -> None:
    context = maps.context
    _curve(axes, context, BLUE, "context score")
    if len(context) > 1:
        axes.set_ylim(0, 1.1 * max(context[1:].max(), 1e-6))
        axes.annotate(f"token 0: {context[0]:.1f}", (0.98, 0.9), xycoords="axes fraction", ha="right", color=GREY)


def _curve(axes: Axes, values: np.ndarray, colour: str, label: str) -> None:
    axes.plot(values, color=colour, lw=1)
    axes.fill_between(np.arange(len(values)), values, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="token", ylabel=label, xlim=(0, max(1, len(values) - 1)))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _pooled(gradient: np.ndarray, columns: int) -> np.ndarray:
    """[T, at most `columns`]: the largest of neighbouring dimensions, so that thin lines survive the width."""
    width = -(-gradient.shape[1] // columns)
    padded = np.pad(gradient, ((0, 0), (0, -gradient.shape[1] % width)))
    return padded.reshape(len(gradient), -1, width).max(2)


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure
