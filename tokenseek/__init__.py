"""TokenSeek: fine-tune large language models on the tokens that matter, at a fraction of the memory and time.

Names are imported when they are first used, so that ``tokenseek --help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_WHERE`
    from tokenseek.config import DataConfig as DataConfig
    from tokenseek.config import load_config as load_config
    from tokenseek.data import prepare_dataset as prepare_dataset
    from tokenseek.ditching import disable_token_ditching as disable_token_ditching
    from tokenseek.ditching import enable_token_ditching as enable_token_ditching
    from tokenseek.errors import UserError as UserError
    from tokenseek.index import TokenIndex as TokenIndex
    from tokenseek.runs.one_line import finetune as finetune
    from tokenseek.seeking import TokenScorer as TokenScorer
    from tokenseek.selection import SelectionRule as SelectionRule
    from tokenseek.training import PaddingCollator as PaddingCollator
    from tokenseek.training import TokenSeekCollator as TokenSeekCollator
    from tokenseek.training import TokenSeekTrainer as TokenSeekTrainer

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
