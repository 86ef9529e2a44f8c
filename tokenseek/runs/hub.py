"""A finished model on the hub: its repository is made before training, and filled after it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from tokenseek.config import RunConfig
from tokenseek.errors import UserError, first_line


def require_hub(config: RunConfig) -> None:
    """Make the repository of a run that ends on the hub, so that it is known before training that it can.

    Raises:
        UserError: there is no login, or the repository cannot be made.
    """
    training = config.training
    if not training.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError("training.push_to_hub: HF_HUB_OFFLINE is set; unset it, or set training.push_to_hub=false.")
    if get_token() is None:
        raise UserError("training.push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN.")
    try:
        HfApi().create_repo(str(training.hub_model_id), exist_ok=True)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"training.hub_model_id: {training.hub_model_id!r} cannot be made on the hub: {first_line(error)}"
        ) from error


def push(config: RunConfig, final: Path) -> str:
    """Upload the files of `final`, with the model card and the run's configuration; returns the address.

    Raises:
        UserError: it cannot be uploaded; the model is in `final` all the same.
    """
    api, name = HfApi(), str(config.training.hub_model_id)
    try:
        api.upload_file(
            path_or_fileobj=final.parent / "config.yaml", path_in_repo="tokenseek.yaml", repo_id=name,
            commit_message="Configuration of the run",
        )  # fmt: skip
        return str(api.upload_folder(folder_path=final, repo_id=name, commit_message="Model trained with TokenSeek"))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(
            f"training.push_to_hub: {name} could not be uploaded ({first_line(error)}). The model is in {final}: "
            f"`hf upload {name} {final}`."
        ) from error
