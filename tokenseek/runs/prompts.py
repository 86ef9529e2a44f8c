"""`training.sample_prompts`: as the model is given them, and where they can be continued."""

from __future__ import annotations

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from tokenseek.config import DataConfig, RunConfig
from tokenseek.data.rows import settled_template
from tokenseek.data.templates import TEMPLATES
from tokenseek.errors import UserError
from tokenseek.launching import environment
from tokenseek.launching.engine import launched_engine


def require_samples(config: RunConfig, state: PartialState, shares_texts: bool) -> None:
    """Refuse samples where one process cannot generate alone.

    Args:
        shares_texts: ranks share texts (`sp_size`).

    Raises:
        UserError: names the launch and what to do.
    """
    if not config.training.sample_prompts:
        return
    splits = environment.uses_fsdp() or launched_engine(on_cpu=state.device.type == "cpu").shards_parameters
    if splits or shares_texts:
        what = "ZeRO-3 and FSDP split the model's weights" if splits else "ranks share texts (sp_size)"
        raise UserError(
            f"training.sample_prompts are continued by one process, and in this launch {what}. Leave them out, or "
            "launch with ddp.yaml or zero2.yaml."
        )


def render_prompts(data: DataConfig, prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Each prompt as text, and whether the tokenizer adds its own special tokens (a chat template has written them).

    They are rendered as instructions of the first source are: by the chat template, or by `data.template`. Prompts for
    data of kind `text` and `completion` are texts already.
    """
    kind, template = data.sources[0].kind, settled_template(data, tokenizer)
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "text"
    if kind == "chat" or (kind == "instruction" and template == "chat"):
        return [
            (
                str(
                    tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}],
                        tokenize=False,
                        add_generation_prompt=True,
                        **data.template_options,
                    )
                ),
                False,
            )
            for prompt in prompts
        ]
    if kind == "instruction":
        prompts = [TEMPLATES[template]["without_input"].format(instruction=prompt) for prompt in prompts]
    return [(prompt, True) for prompt in prompts]
