"""`tokenseek export-positions`: the selection of a run as bits, without its scores."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from tokenseek.config import RunConfig
from tokenseek.data import prepare_dataset
from tokenseek.index import TokenIndex
from tokenseek.index.positions import SelectedPositions
from tokenseek.models.loading import load_tokenizer
from tokenseek.runs.inputs import run_fingerprints
from tokenseek.training import TokenSeekCollator

_log = logging.getLogger(__name__)


def export_positions(config: RunConfig, output: Path | None = None) -> SelectedPositions:
    """Write which tokens of every example training would select, in the order of the index's rows.

    Args:
        config: its rule must not draw at random, as such a selection changes with every epoch.
        output: the file; ``positions.npz`` in the run's folder where none is given.

    Raises:
        UserError: there is no index, or it does not belong to the run.
    """
    index = TokenIndex.open(config.index_path)
    rule = config.selection.to_rule()
    prepared = prepare_dataset(config.data, load_tokenizer(config.model))
    fingerprints = run_fingerprints(config.model, prepared)
    index.require(fingerprints)
    collator = TokenSeekCollator(index, rule=rule)
    lengths = [index.num_tokens(row) for row in range(len(index))]
    chosen = (collator.select(example) for example in prepared.dataset)
    facts = {"selection": asdict(rule), "ratio": rule.share, "fingerprints": index.header.fingerprints}
    positions = SelectedPositions.of(lengths, chosen, facts)
    path = output or Path(config.output_dir) / "positions.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    positions.save(path)
    _log.info(f"{len(positions):,} examples, {sum(lengths):,} tokens, {positions.nbytes:,} bytes of bits: {path}")
    return positions
