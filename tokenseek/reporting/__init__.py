"""Looking at scores and selections."""

from tokenseek.reporting.html import ShownExample, render_page, shown_example
from tokenseek.reporting.maps import TokenMaps, token_maps
from tokenseek.reporting.terminal import describe_index, render_example, render_labels

__all__ = [
    "ShownExample",
    "TokenMaps",
    "describe_index",
    "render_example",
    "render_labels",
    "render_page",
    "shown_example",
    "token_maps",
]
