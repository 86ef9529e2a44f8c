"""Configuration: the settings of a run, checked before anything is loaded."""

from tokenseek.config.data import NEEDED_COLUMNS, Columns, DataConfig, SourceConfig
from tokenseek.config.first_row import may_lack_columns
from tokenseek.config.loading import (
    load_config,
    load_data_of_model,
    load_evaluated,
    override_config,
    recognised_data,
    save_resolved,
)
from tokenseek.config.one_line import OneLine, list_methods, load_one_line
from tokenseek.config.schema import (
    DataOfModel,
    EvaluatedConfig,
    ModelConfig,
    PeftSettings,
    RunConfig,
    ScoringConfig,
    SelectionConfig,
)
from tokenseek.config.training import DitchingSettings, TrainingConfig

__all__ = [
    "Columns",
    "DataConfig",
    "DataOfModel",
    "DitchingSettings",
    "EvaluatedConfig",
    "ModelConfig",
    "NEEDED_COLUMNS",
    "OneLine",
    "PeftSettings",
    "RunConfig",
    "ScoringConfig",
    "SelectionConfig",
    "SourceConfig",
    "TrainingConfig",
    "list_methods",
    "load_config",
    "load_data_of_model",
    "load_evaluated",
    "load_one_line",
    "may_lack_columns",
    "override_config",
    "recognised_data",
    "save_resolved",
]
