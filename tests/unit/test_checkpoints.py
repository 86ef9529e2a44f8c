"""Checkpoints of another engine or another number of processes."""

from types import SimpleNamespace

import pytest

from tokenseek.errors import UserError
from tokenseek.training.checkpoints import fit_checkpoint

TWO = SimpleNamespace(num_processes=2, is_main_process=True, is_local_main_process=True)


def arguments(deepspeed: bool):
    config = {"zero_optimization": {"stage": 2}}
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config)) if deepspeed else None
    return SimpleNamespace(deepspeed_plugin=plugin)


def checkpoint(folder, parts: int):
    """As DeepSpeed with so many processes leaves it; with none, as other engines do."""
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    if parts:
        (folder / "latest").write_text("global_step4")
        (folder / "global_step4").mkdir()
        for part in range(parts):
            (folder / "global_step4" / f"zero_pp_rank_{part}_mp_rank_00_optim_states.pt").write_bytes(b"no pickle")
    return folder


def test_as_many_processes_load_their_own_parts(tmp_path):
    for parts in (2, 0):
        args = arguments(deepspeed=parts > 0)
        fit_checkpoint(checkpoint(tmp_path / str(parts), parts), args, TWO)
        assert not parts or "checkpoint" not in args.deepspeed_plugin.hf_ds_config.config


def test_another_engine_is_refused(tmp_path):
    with pytest.raises(UserError, match="written with DeepSpeed.*continues without it.*resume=never"):
        fit_checkpoint(checkpoint(tmp_path / "zero", 2), arguments(False), TWO)
    with pytest.raises(UserError, match="written without DeepSpeed.*continues with it"):
        fit_checkpoint(checkpoint(tmp_path / "ddp", 0), arguments(True), TWO)


def test_what_cannot_be_converted_is_told(tmp_path):
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match="(?s)cannot be converted.*Resume with as many as wrote it"):
        fit_checkpoint(checkpoint(tmp_path / "damaged", 3), arguments(True), TWO)
    assert not (tmp_path / "damaged" / "latest_universal").exists()


def test_a_converted_checkpoint_is_taken(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-4", 3)
    (folder / "latest_universal").write_text("global_step4_universal")
    args = arguments(True)
    fit_checkpoint(folder, args, TWO)
    assert args.deepspeed_plugin.hf_ds_config.config["checkpoint"] == {"load_universal": True}
