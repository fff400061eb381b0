"""A CLIP with its preprocessing, tokenizer and the activation function its weights were trained with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qatlab.config import ModelConfig
from qatlab.data.texttable import TextTable, load_text_table
from qatlab.data.transforms import Preprocess
from qatlab.data.vocabulary import tokenize
from qatlab.errors import UserError, nearest

# Logit scale of every OpenAI model (exp of the learned 4.6052, where it was clipped): what an image tower alone cannot tell.
DEFAULT_LOGIT_SCALE = 100.0

Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Clip:
    """One loaded CLIP.

    ``visual`` maps normalised images (B, 3, S, S) to features (B, D) of any length; ``model`` is the whole open_clip model,
    or None when only the image tower is there; ``text_table`` holds class embeddings that stand in for the text tower.
    ``facts`` (model, pretrained, activation) goes into every row.
    """

    visual: nn.Module
    model: nn.Module | None
    tokenizer: Tokenizer | None
    preprocess: Preprocess
    logit_scale: float
    text_table: TextTable | None
    facts: dict[str, Any]
    text_calls: int = 0  # how often texts were encoded


def load(config: ModelConfig, from_scratch: bool = False) -> Clip:
    """Return the CLIP that ``config`` names, in eval mode on the CPU; ``from_scratch`` leaves its weights random.

    Raises UserError for an unknown architecture or tag, weights that cannot be downloaded, a checkpoint that does not fit,
    and a checkpoint whose activation function nobody tells.
    """
    model, preprocess, tokenizer = untrained(config, from_scratch)
    both_towers = True
    if not from_scratch:
        path = config.checkpoint or (_tiny_weights() if config.name == "tiny" else _download(config))
        both_towers = _load_weights(model, Path(path))
    model.eval()
    table = text_table_for(model.visual, config.text_features) if config.text_features else None
    facts = {
        "model": config.name,
        "pretrained": "random"
        if from_scratch
        else config.pretrained or (config.name if not config.checkpoint else None),
        "weights": config.checkpoint,
        "activation": activation(model.visual),
    }
    scale = float(model.logit_scale.detach().exp()) if both_towers else DEFAULT_LOGIT_SCALE
    return Clip(model.visual, model if both_towers else None, tokenizer, preprocess, scale, table, facts)


def untrained(config: ModelConfig, from_scratch: bool = True) -> tuple[Any, Preprocess, Tokenizer]:
    """Return the open_clip model of ``config`` with random weights, its preprocessing and its tokenizer.

    ``from_scratch`` false says that a checkpoint follows: raises UserError when nobody tells its activation function.
    """
    return _tiny() if config.name == "tiny" else _architecture(config, from_scratch)


def text_table_for(visual: nn.Module, spec: str) -> TextTable:
    """Return the table that ``spec`` names; raises UserError when its texts are not of the width of the tower's features."""
    table = load_text_table(spec)
    width = getattr(visual, "output_dim", None)  # timm's towers do not tell
    if width is not None and table.features.shape[1] != width:
        raise UserError(
            f"the texts of {spec} have {table.features.shape[1]} dimensions, the images {width}: give the table that was made "
            "with this model's text tower."
        )
    return table


def activation(visual: nn.Module) -> str:
    """Return 'quick_gelu' or 'gelu': the activation modules that are really in the tower."""
    return "quick_gelu" if any(isinstance(module, QuickGELU) for module in visual.modules()) else "gelu"


def _tiny() -> tuple[Any, Preprocess, Tokenizer]:
    assets = json.loads((files("qatlab") / "assets" / "tiny.json").read_text())
    return open_clip.CLIP(**assets["model_cfg"]), Preprocess(**assets["preprocess_cfg"]), tokenize


def _tiny_weights() -> str:
    return str(files("qatlab") / "assets" / "tiny.safetensors")


def _architecture(config: ModelConfig, from_scratch: bool) -> tuple[Any, Preprocess, Tokenizer]:
    """Build the model with random weights and the activation function of its tag."""
    name = config.name.removesuffix("-quickgelu")
    if open_clip.get_model_config(name) is None:
        raise UserError(
            f"model.name={config.name} is unknown{nearest(name, open_clip.list_models())}; `open_clip.list_models()` lists them."
        )
    tag = _tag(config)
    quick = _quick_gelu(config, tag, from_scratch)
    look = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if tag.get(key) is not None}
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random; they are filled in a moment
    try:
        model = open_clip.create_model(name, pretrained=None, force_quick_gelu=quick, force_preprocess_cfg=look)
    finally:
        logging.disable(logging.NOTSET)
    return model, Preprocess.from_open_clip(model.visual), open_clip.get_tokenizer(name)


def _tag(config: ModelConfig) -> dict[str, Any]:
    """Return open_clip's record of the weight tag, {} without one."""
    if config.pretrained is None:
        return {}
    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained)
    if not tag:
        known = open_clip.list_pretrained_tags_by_model(config.name)
        raise UserError(
            f"model.pretrained={config.pretrained} is no tag of {config.name}{nearest(config.pretrained, known)}; "
            f"there are {', '.join(known) or 'none'}."
        )
    return dict(tag)


def _quick_gelu(config: ModelConfig, tag: dict[str, Any], from_scratch: bool) -> bool:
    """Decide the activation function from the tag, the name or the option: never by default for weights of unknown origin."""
    named = bool((open_clip.get_model_config(config.name) or {}).get("quick_gelu", False))
    if tag:
        quick = bool(tag.get("quick_gelu", False))
        if config.quick_gelu is not None and config.quick_gelu != quick:
            raise UserError(
                f"model.quick_gelu={str(config.quick_gelu).lower()} contradicts model.pretrained={config.pretrained}, "
                f"which was trained with {'QuickGELU' if quick else 'GELU'}; drop the option."
            )
        return quick
    if named and config.quick_gelu is False:
        raise UserError(
            f"model.quick_gelu=false contradicts model.name={config.name}; drop the option or the name's ending."
        )
    if config.quick_gelu is None and config.checkpoint and not named and not from_scratch:
        raise UserError(
            f"model.checkpoint={config.checkpoint} does not tell its activation function: add model.pretrained=<tag it was "
            "trained as> (openai: QuickGELU) or model.quick_gelu=true|false."
        )
    return named if config.quick_gelu is None else config.quick_gelu


def _download(config: ModelConfig) -> str:
    """Return the path of the tag's weights, downloaded or cached."""
    tag = _tag(config)
    if not tag:
        raise UserError(
            f"model.name={config.name} has no weights: give model.pretrained=<tag> or model.checkpoint=<file>."
        )
    source = f"https://huggingface.co/{tag['hf_hub'].rstrip('/')}" if tag.get("hf_hub") else tag.get("url")
    print(f"weights of {config.name} {config.pretrained} from {source}, or the cache", flush=True)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # it tells of each of its retries, for a minute, where there is no network
    try:
        return open_clip.download_pretrained(tag)
    except Exception as error:  # whatever hub, network or disk raise, the remedies are the same
        raise UserError(
            f"the weights of {config.name} {config.pretrained} could not be downloaded from {source} ({type(error).__name__}). "
            "Fetch open_clip_model.safetensors there and give model.checkpoint=<file>, or fill HF_HOME on a machine with "
            "internet and copy it here."
        ) from error
    finally:
        hub.setLevel(level)


def _load_weights(model: Any, path: Path) -> bool:
    """Fill ``model`` from a state dict of both towers or of the image tower alone; returns whether both were there."""
    if not path.exists():
        raise UserError(f"model.checkpoint={path} does not exist.")
    state = read_state(path)
    if any(key in state for key in ("token_embedding.weight", "text.token_embedding.weight")) or any(
        key.startswith("text.") for key in state
    ):
        try:
            open_clip.load_checkpoint(model, str(path))
        except (RuntimeError, KeyError) as error:
            want = model.state_dict()
            other = next((k for k in sorted(want) if k in state and state[k].shape != want[k].shape), None)
            reason = str(error).splitlines()[-1].strip()
            if other:  # what open_clip stumbles over on its way there says less
                reason = f"{other} is {_shape(state, other)} there and {_shape(want, other)} here"
            raise UserError(f"{path} does not fit the architecture: {reason}; check model.name.") from error
        return True
    visual = {key.removeprefix("visual."): value.float() for key, value in state.items()}
    want = model.visual.state_dict()
    wrong = sorted({k for k in want if k not in visual or visual[k].shape != want[k].shape} | (set(visual) - set(want)))
    if wrong:
        raise UserError(
            f"{path} is no image tower of this architecture: {len(wrong)} of {len(want)} tensors differ, first {wrong[0]} "
            f"(found {_shape(visual, wrong[0])}, expected {_shape(want, wrong[0])}); check model.name."
        )
    model.visual.load_state_dict(visual)
    return False


def _shape(state: dict[str, Tensor], key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "nothing"


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or weights-only .pt file, without 'module.' prefixes.

    Raises UserError when the file is damaged, holds more than tensors, or something else than a state dict.
    """
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it is cut short or no such file."
        ) from error
    except Exception as error:  # pickle.UnpicklingError and its kin: a file with code in it
        raise UserError(
            f"{path} holds more than tensors and is not loaded; save its state dict as .safetensors."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (tensors by name); save one, best as .safetensors.")
    return {key.removeprefix("module."): value for key, value in state.items()}
