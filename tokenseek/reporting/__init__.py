"""Looking at scores and selections."""

from tokenseek.reporting.terminal import describe_index, render_example

__all__ = ["describe_index", "render_example"]
