"""A target and its tokenizer, as the command line loads them: what is wrong with a folder is said with its name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .names import existing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_target(option: str, name: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model.

    Args:
        option: how the name was given, such as `--target`. name: a folder, or a name on the Hub.
        dtype: its precision; "auto" for its checkpoint's.

    Raises:
        ValueError: if there can be no such model.
        OSError: if its files are missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(existing(option, name), dtype=dtype)
    except SafetensorError as error:
        raise OSError(f"{option}: the weights in {name} are damaged ({error}); copy or download them again") from error


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; arguments as of `load_target`.

    Raises:
        ValueError: if it has none.
        OSError: if the Hub cannot be asked.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if not os.path.isdir(name):
            raise
        what = str(error).splitlines()[0]
        raise ValueError(
            f"{option}: {name} holds no tokenizer that can be loaded ({what}); put the model's tokenizer.json and "
            "tokenizer_config.json there"
        ) from error
