"""The tensors of a checkpoint that any of several programs wrote, under open_clip's names; other files get a clear error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qatlab.config.weight_files import weight_files
from qatlab.core.errors import UserError
from qatlab.models.torchscript import archive_state, is_archive
from qatlab.models.transformers_names import from_transformers, is_transformers

# Keys under which training checkpoints hold the model (Lightning, open_clip, DeepSpeed, many scripts), and keys under
# which they hold an averaged model.
_MODELS = ("state_dict", "model", "model_state_dict", "module", "model_state", "net")
_AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict")
# Prefixes that DataParallel, torch.compile and LightningModules put in front of every name.
_PREFIXES = ("module.", "model.", "_orig_mod.", "clip.", "clip_model.", "net.")
# Entries of archives that are no weights: the sizes in OpenAI's files, and the attention mask of a text tower.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def read_state(path: Path) -> dict[str, Tensor]:
    """Return {name: tensor of any shape and dtype} of the CLIP, or the image tower, in a file or in a folder of weights.

    Nothing in the file is run: safetensors, pickles of tensors alone, and TorchScript archives are read. Raises UserError
    for a file that is damaged, is something else, or holds more than tensors.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state |= _model_of(_read(file), file)
    state = _without_prefixes(state)
    if quantized := next((name for name in state if ".weight_quantizer." in name or ".act_quantizer." in name), None):
        raise UserError(
            f"{path} is the quantized model of a run ({quantized}): it is scored with checkpoint=<the folder of the run>, "
            "and model.checkpoint takes the weights that it was made of."
        )
    _refuse_part(state, path)
    state = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}
    if is_transformers(state):
        return from_transformers(state, path)
    if "blocks.0.attn.qkv.weight" in state:
        raise UserError(
            f"{path} is a tower of timm (blocks.0.attn.qkv.weight), without the projection to the space of texts: give the CLIP "
            "that it is a part of, in open_clip's format."
        )
    return state


def _read(file: Path) -> Any:
    """Return the content of a file: tensors by name, or the object of a pickle that was read without running code."""
    start = _start(file)
    if what := _no_checkpoint(start):
        raise UserError(f"{file} is {what}.")
    try:
        # The content decides and not the name, because safetensors files are also called .bin or .pt.
        if start[8:9] == b"{":
            return load_file(file)
        if is_archive(file):
            return archive_state(file)
        # weights_only: a pickle without it runs whatever code the file holds.
        return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({str(error).splitlines()[0]}); it is cut short or no such file."
        ) from error
    except Exception as error:  # torch refuses a pickle that asks for code by errors of several classes
        raise UserError(
            f"{file} holds more than tensors and is not loaded; save its state dict as .safetensors."
        ) from error


def _start(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(64)


def _no_checkpoint(start: bytes) -> str:
    """Return what a file that begins with ``start`` is, in words and with the remedy; "" if it may be a checkpoint."""
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file: fetch that with `git lfs pull`"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "a web page that was saved in place of the file: download the file itself"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as TensorFlow writes them: give the weights of PyTorch, best as .safetensors"
    if start.startswith(b"GGUF"):
        return "a GGUF file, whose weights are rounded already: give those it was made of, best as .safetensors"
    if start.startswith(b"PK") and b".npy" in start:
        return "an archive of numpy, as big_vision writes them: give open_clip's release of the model"
    return ""


def _model_of(loaded: Any, file: Path) -> dict[str, Tensor]:
    """Return the state dict in what was loaded: the whole of it, or the model of a training checkpoint."""
    if isinstance(loaded, dict):
        if loaded and _is_state(loaded):
            return loaded
        models = [key for key in _MODELS if _is_state(loaded.get(key))]
        averaged = [key for key in _AVERAGED if _is_state(loaded.get(key))]
        if len(found := [*models, *averaged]) > 1:
            raise UserError(
                f"{file} holds several models ({', '.join(found)}): save the state dict of the one that is meant."
            )
        if found:
            return dict(loaded[found[0]])
    raise UserError(f"{file} holds no state dict (tensors by name); save one, best as .safetensors.")


def _is_state(found: Any) -> bool:
    return isinstance(found, Mapping) and bool(found) and all(isinstance(value, Tensor) for value in found.values())


def _refuse_part(state: dict[str, Tensor], path: Path) -> None:
    """Raise UserError where a CLIP is a part of something larger, such as a student beside its teacher."""
    inside = sorted({name.partition(".visual.")[0] for name in state if ".visual." in name})
    if inside and not any(name.startswith("visual.") for name in state):
        raise UserError(
            f"{path} holds a CLIP as {' and as '.join(inside)}, among other parts: save the state dict of that part alone, best "
            "as .safetensors."
        )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names without the prefixes of wrappers and without the parts that torch.compile inserts."""
    state = {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}
    while prefix := _prefix(state):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _prefix(state: Mapping[str, Tensor]) -> str:
    """Return the first of _PREFIXES with which all names begin, "" without one."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return prefix
    return ""
