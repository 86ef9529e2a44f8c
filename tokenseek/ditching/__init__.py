"""Ditch: fine-tune with back-propagation through selected tokens only."""

from tokenseek.ditching.patch import disable_token_ditching, enable_token_ditching
from tokenseek.ditching.seeking import Seeking
from tokenseek.ditching.state import ditching_of

__all__ = ["Seeking", "disable_token_ditching", "ditching_of", "enable_token_ditching"]
