"""The files of a tokenizer of Hugging Face, where they lie beside the weights of the text tower that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatlab.config import ModelConfig
from qatlab.core.hashing import digest, file_digest
from qatlab.models.architecture import architecture
from qatlab.models.preprocessing import folder_of_weights

# A folder with one of the first files holds a tokenizer, as save_pretrained of transformers leaves it; the others belong to it.
_WHOLE = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json")
_PARTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Return the options of a text tower whose architecture names a tokenizer of Hugging Face, {} for CLIP's own one."""
    text = (architecture(config.name.removesuffix("-quickgelu")) or {}).get("text_cfg", {})
    return dict(text) if "hf_tokenizer_name" in text else {}


def tokenizer_files(config: ModelConfig) -> list[Path]:
    """Return the files of the tokenizer that lies in the folder of the weights; [] where it holds none."""
    folder = folder_of_weights(config)
    if folder is None or not any((folder / name).is_file() for name in _WHOLE):
        return []
    return [folder / name for name in (*_WHOLE, *_PARTS) if (folder / name).is_file()]


def told_by_tokenizer(config: ModelConfig) -> dict[str, str]:
    """Return {"tokenizer": a hash of its files} where the text tower's tokenizer lies beside its weights, else {}.

    It belongs to the id of a run, as the weights themselves do.
    """
    files = tokenizer_files(config) if hugging_face(config) else []
    return {"tokenizer": digest(*(f"{file.name} {file_digest(file)} " for file in files))} if files else {}
