"""TokenSeek: fine-tune large language models on the tokens that matter, at a fraction of the memory and time."""

from tokenseek.ditching import disable_token_ditching, enable_token_ditching

__all__ = ["disable_token_ditching", "enable_token_ditching"]
