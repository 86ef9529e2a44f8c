"""Ditch: fine-tune with back-propagation through selected tokens only."""

from tokenseek.ditching.patch import disable_token_ditching, enable_token_ditching

__all__ = ["disable_token_ditching", "enable_token_ditching"]
