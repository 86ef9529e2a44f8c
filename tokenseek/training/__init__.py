"""Train on selected tokens: the collator, and the Trainer around it."""

from tokenseek.training.collator import PaddingCollator, TokenSeekCollator
from tokenseek.training.groups import GroupTrainer
from tokenseek.training.trainer import TokenSeekTrainer

__all__ = ["GroupTrainer", "PaddingCollator", "TokenSeekCollator", "TokenSeekTrainer"]
