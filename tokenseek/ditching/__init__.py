"""Ditch: fine-tune with back-propagation through selected tokens only."""

from tokenseek.ditching.online import Seeking
from tokenseek.ditching.patch import disable_token_ditching, enable_token_ditching

__all__ = ["Seeking", "disable_token_ditching", "enable_token_ditching"]
