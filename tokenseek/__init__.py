"""TokenSeek: fine-tune large language models on the tokens that matter, at a fraction of the memory and time.

Names are imported when they are first used, so that ``tokenseek --help`` does not wait for torch.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "DataConfig": "tokenseek.config",
    "PaddingCollator": "tokenseek.training",
    "SelectionRule": "tokenseek.selection",
    "TokenIndex": "tokenseek.index",
    "TokenScorer": "tokenseek.seeking",
    "TokenSeekCollator": "tokenseek.training",
    "TokenSeekTrainer": "tokenseek.training",
    "UserError": "tokenseek.errors",
    "disable_token_ditching": "tokenseek.ditching",
    "enable_token_ditching": "tokenseek.ditching",
    "finetune": "tokenseek.runs.one_line",
    "load_config": "tokenseek.config",
    "prepare_dataset": "tokenseek.data",
}
__all__ = sorted(_WHERE)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tokenseek' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
