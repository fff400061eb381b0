"""The tokenizer of a text tower: CLIP's own, or one of Hugging Face, from beside the weights or from the hub."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import open_clip
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer
from torch import Tensor

from qatlab.config import ModelConfig
from qatlab.core.errors import UserError
from qatlab.data.embedded.vocabulary import tokenize
from qatlab.models.architecture import open_clip_name
from qatlab.models.tokenizer_files import hugging_face, tokenizer_files

Tokenizer = Callable[[list[str]], Tensor]


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """Return what makes tokens (N, context) int64 of N texts for the text tower of ``config``.

    Where the architecture names a tokenizer of Hugging Face, that is read from the folder of the weights if it holds one,
    else from the hub or its cache. Raises UserError where it cannot be had, and without transformers.
    """
    if config.name == "tiny":
        return tokenize
    text = hugging_face(config)
    if not text:
        return open_clip.get_tokenizer(open_clip_name(config.name))
    require_transformers(config, "its tokenizer", "leave texts to model.text_features=FILE.safetensors:TABLE")
    beside = tokenizer_files(config)
    try:
        return HFTokenizer(
            str(beside[0].parent) if beside else text["hf_tokenizer_name"],
            context_length=text.get("context_length", DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    except Exception as error:  # transformers, the hub and the network raise errors of many classes
        source = beside[0].parent if beside else f"https://huggingface.co/{text['hf_tokenizer_name']}"
        raise UserError(
            f"model.name={config.name}: its tokenizer could not be read from {source} ({type(error).__name__}). Put the files "
            "of the tokenizer (tokenizer.json ...) into the folder of model.checkpoint=, or fill HF_HOME on a machine with "
            "internet and copy it here."
        ) from error


def require_transformers(config: ModelConfig, part: str, remedy: str) -> None:
    """Raise UserError where transformers, which a ``part`` of the model needs, is not installed."""
    if find_spec("transformers") is None:
        raise UserError(
            f"model.name={config.name}: {part} needs transformers, which is not installed: pip install 'qatlab[hf]', or {remedy}."
        )
