"""What scoring and training of a run begin with: its processes, its tokenizer and its data, checked and made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenseek.config import ModelConfig, RunConfig
from tokenseek.data import PreparedData, prepare_dataset
from tokenseek.launching.processes import first_on_main
from tokenseek.models.checks import require_fitting_data, require_unquantized
from tokenseek.models.files import fingerprint_model, model_folder
from tokenseek.models.loading import load_tokenizer, require_decoder


@dataclass(frozen=True)
class RunInputs:
    """The checked inputs of a run; no weight is loaded yet.

    Attributes:
        state: the processes of the launch.
        group: the sequence-parallel ranks that share texts with this one, if any.
        skeleton: the model on the meta device, without weights.
        data: the whole data set, before anything is held out; an index has a row for each of its examples.
    """

    model: ModelConfig
    state: PartialState
    group: dist.ProcessGroup | None
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData

    @cached_property
    def fingerprints(self) -> dict[str, str | int]:
        """What an index has to agree with to serve the run."""
        return run_fingerprints(self.model, self.data)


def read_inputs(
    config: RunConfig,
    state: PartialState,
    group: dist.ProcessGroup | None,
    *,
    packing: bool = False,
    ditching: bool = True,
) -> RunInputs:
    """Check the model by its configuration, then load the tokenizer and prepare the data; every process calls this.

    Raises:
        UserError: for a model, a tokenizer or data that does not fit.
    """
    skeleton = require_decoder(config.model, packing=packing, group=group, ditching=ditching)
    require_unquantized(skeleton, config.model)
    tokenizer = load_tokenizer(config.model)
    data = first_on_main(state, lambda: prepare_dataset(config.data, tokenizer))
    require_fitting_data(skeleton, tokenizer, data.dataset)
    return RunInputs(config.model, state, group, skeleton, tokenizer, data)


def run_fingerprints(model: ModelConfig, data: PreparedData) -> dict[str, str | int]:
    """What an index of this data, scored by this model, is recognised by."""
    return {"model": fingerprint_model(model_folder(model)), **data.fingerprints}
