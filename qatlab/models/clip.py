"""A CLIP with its preprocessing, tokenizer and the activation function its weights were trained with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from qatlab.config import ModelConfig
from qatlab.config.weight_files import LOCAL, named_weights
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.data.preprocess import Preprocess
from qatlab.data.texttable import TextTable, load_text_table
from qatlab.models.architecture import HUB, architecture, open_clip_name
from qatlab.models.checkpoint import read_state
from qatlab.models.preprocessing import known, shown, tag_record
from qatlab.models.tokenizer_files import hugging_face
from qatlab.models.tokenizers import Tokenizer, require_transformers, tokenizer_of
from qatlab.towers import open_clip_vit
from qatlab.towers.registry import tower_of
from qatlab.towers.structure import activation

# The logit scale of every OpenAI model, where the learned value was clipped (Radford et al. 2021, section 2.5). It stands in for
# the scale of a checkpoint with the image tower alone, which holds none.
DEFAULT_LOGIT_SCALE = 100.0

# The sizes of the text tower that stands where none is needed.
_NO_TEXT = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}


@dataclass
class Clip:
    """A CLIP with everything that it takes to compute features and logits with it.

    ``visual`` maps normalised images (B, 3, S, S) to features (B, D), no unit vectors; ``model`` is the whole open_clip
    model, or None when only the image tower is there; ``text_table`` holds class embeddings that stand in for the text
    tower. ``make_tokenizer`` is called when texts are encoded for the first time, and None without a text tower.
    ``logit_bias`` is what a model that was trained with a sigmoid, such as SigLIP, adds to its scaled cosines, else None.
    ``facts`` (model, pretrained, activations, ...) are stored with the results of a run.
    """

    visual: nn.Module
    model: nn.Module | None
    make_tokenizer: Callable[[], Tokenizer] | None
    preprocess: Preprocess
    logit_scale: float
    text_table: TextTable | None
    facts: dict[str, Any]
    logit_bias: float | None = None
    text_calls: int = 0  # how often texts were encoded: tests see by it that a cache was used

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """What makes tokens (N, context) int64 of N texts; None without a text tower."""
        return None if self.make_tokenizer is None else self.make_tokenizer()


def load(config: ModelConfig, from_scratch: bool = False) -> Clip:
    """Return the CLIP that ``config`` names, in eval mode on the CPU; ``from_scratch`` leaves its weights random.

    Raises UserError for an unknown architecture or tag, weights that cannot be downloaded, a checkpoint that does not fit,
    a checkpoint whose activation function or preprocessing no tag, file or option tells, and a text tower without its
    tokenizer.
    """
    told, state, resized = _told(config, from_scratch), None, None
    if not from_scratch:
        path = user_path(named_weights(config) or (_tiny_weights() if config.name == "tiny" else _download(config)))
        state = _state(path)
    both_towers = state is None or _has_text(state)
    model, preprocess = _built(told, both_towers)
    if state is not None:
        resized = (_load_both if both_towers else _load_visual)(model, state, path)
        # The weights are checked now, because NaN would pass through every stage and give an accuracy of chance hours later.
        require_finite((model if both_towers else model.visual).state_dict(), path)
    model.eval()
    table = text_table_for(model.visual, config.text_features) if config.text_features else None
    clip = Clip(
        model.visual,
        model if both_towers else None,
        cache(partial(tokenizer_of, config)) if both_towers else None,
        preprocess,
        float(model.logit_scale.detach().exp()) if both_towers else DEFAULT_LOGIT_SCALE,
        table,
        _facts(config, from_scratch, model, both_towers, preprocess, resized),
        logit_bias(model) if both_towers else None,
    )
    if table is None:
        # Made now, because prompts will be encoded: what is wrong with it is told before hours of images. Beside a table of
        # texts it may never be needed.
        _ = clip.tokenizer
    return clip


def logit_bias(model: Any) -> float | None:
    """Return the learned bias of a model's logits, None for a model without one."""
    bias = getattr(model, "logit_bias", None)
    return None if bias is None else float(bias.detach())


def _facts(
    config: ModelConfig, from_scratch: bool, model: Any, both_towers: bool, preprocess: Preprocess, resized: str | None
) -> dict[str, Any]:
    """Return what rows say of the model."""
    return {
        "model": config.name,
        "pretrained": "random"
        if from_scratch
        else config.pretrained or (config.name if not config.checkpoint else None),
        "weights": config.checkpoint,
        "activation": activation(model.visual),
        "text_activation": activation(model, without=model.visual) if both_towers else None,
        "preprocessing": f"{preprocess.size} px, {shown(vars(preprocess))}",
        "resized": resized,
        # Rows of models without a bias, which are all that earlier releases loaded, stay as they were.
        **({"logit_bias": bias} if both_towers and (bias := logit_bias(model)) is not None else {}),
    }


def untrained(config: ModelConfig, text: bool = True) -> tuple[Any, Preprocess]:
    """Return the open_clip model of ``config`` with random weights, and its preprocessing.

    Without ``text`` only the image tower is needed: a text tower of transformers is left out, and the hub not asked.
    """
    return _built(_told(config, from_scratch=True), text)


def _told(config: ModelConfig, from_scratch: bool) -> ModelConfig:
    """Return ``config`` with preprocessing and activation written out; UserError where nobody tells them of a checkpoint."""
    config = known(config, from_scratch)
    if config.name == "tiny":
        return config
    return replace(config, quick_gelu=_quick_gelu(config, tag_record(config), from_scratch))


def text_table_for(visual: nn.Module, spec: str) -> TextTable:
    """Return the text table that ``spec`` names; raises UserError when its width is not that of the tower's features."""
    table = load_text_table(spec)
    # The width of a tower of an unknown family is not known before its first forward.
    tower = tower_of(visual)
    width = None if tower is None else tower.output_dim
    if width is not None and table.features.shape[1] != width:
        raise UserError(
            f"the texts of {spec} have {table.features.shape[1]} dimensions, the images {width}: give the table that was made "
            "with this model's text tower."
        )
    return table


def _tiny() -> tuple[Any, Preprocess]:
    """Return the embedded model with random weights, and its preprocessing."""
    assets = json.loads((files("qatlab") / "assets" / "tiny.json").read_text())
    return open_clip.CLIP(**assets["model_cfg"]), Preprocess(**assets["preprocess_cfg"])


def _tiny_weights() -> str:
    return str(files("qatlab") / "assets" / "tiny.safetensors")


def _built(config: ModelConfig, text: bool) -> tuple[Any, Preprocess]:
    """Return the model with random weights, and its preprocessing; both are written out in ``config``."""
    if config.name == "tiny":
        return _tiny()
    # The folder or repository of such a name is asked for the architecture alone: its weights are loaded afterwards, as others.
    options: dict[str, Any] = {"load_weights": False} if config.name.startswith((LOCAL, HUB)) else {}
    if "hf_model_name" in hugging_face(config):
        # Weights of its own, which open_clip would fetch, are replaced by those of the checkpoint.
        options["pretrained_text"] = False
        if text:
            require_transformers(config, "its text tower", "give the image tower alone (visual.*) as model.checkpoint=")
        else:
            # transformers asks the hub for the sizes of such a tower. Others are built all the same: without the random
            # numbers that they take, adapters that are drawn later would be others than in earlier releases.
            options |= {"text_cfg": _NO_TEXT}
    # open_clip warns that the weights are random, which is right: the caller loads the trained ones afterwards.
    logging.disable(logging.WARNING)
    try:
        model = open_clip.create_model(
            open_clip_name(config.name), pretrained=None, force_quick_gelu=config.quick_gelu,
            force_preprocess_cfg=config.preprocess, **options,
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    if config.gelu_tanh:
        _approximate(model, config)
    if open_clip_vit.matches(model.visual):
        open_clip_vit.give_features_alone(model.visual)
    return model, Preprocess.from_open_clip(model.visual)


def _approximate(model: nn.Module, config: ModelConfig) -> None:
    """Let the GELUs of ``model`` compute their tanh approximation; raises UserError where it has none."""
    exact = [module for module in model.modules() if isinstance(module, nn.GELU)]
    if not exact:
        raise UserError(f"model.gelu_tanh=true, but {config.name} has no GELU: leave the option out.")
    for module in exact:
        module.approximate = "tanh"


def _quick_gelu(config: ModelConfig, tag: dict[str, Any], from_scratch: bool) -> bool:
    """Return whether the model has QuickGELU, by the tag, the name or the option; UserError if they disagree or none says it.

    There is no default for weights of unknown origin: OpenAI's weights in a model with GELU load without an error and lose
    some points of accuracy (since its PR 970 open_clip only warns).
    """
    named = bool((architecture(config.name) or {}).get("quick_gelu", False))
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
    if config.name.startswith(HUB):
        tag = {"hf_hub": f"{config.name.removeprefix(HUB)}/"}  # with the slash: a repository, and no file in one
    elif not (tag := tag_record(config)):
        raise UserError(
            f"model.name={config.name} has no weights: give model.pretrained=<tag> or model.checkpoint=<file>."
        )
    source = f"https://huggingface.co/{tag['hf_hub'].rstrip('/')}" if tag.get("hf_hub") else tag.get("url")
    called = " ".join(filter(None, (config.name, config.pretrained)))
    print(f"weights of {called} from {source}, or the cache", flush=True)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it logs every retry, for a minute, before the error below
    try:
        return open_clip.download_pretrained(tag)
    except (
        Exception
    ) as error:  # hub, network and disk raise errors of many classes, and the remedies are the same for all
        raise UserError(
            f"the weights of {called} could not be downloaded from {source} ({type(error).__name__}). "
            "Fetch open_clip_model.safetensors there and give model.checkpoint=<file>, or fill HF_HOME on a machine with "
            "internet and copy it here."
        ) from error
    finally:
        hub.setLevel(level)


def _state(path: Path) -> dict[str, Tensor]:
    """Return the tensors, by name and of any shape, in the file or folder of a checkpoint."""
    if not path.exists():
        raise UserError(f"model.checkpoint={path} does not exist.")
    return read_state(path)


def _has_text(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict holds a text tower beside the image tower."""
    # It shows by its names: OpenAI's models hold its parts at the top, others in a module "text".
    return "token_embedding.weight" in state or any(key.startswith("text.") for key in state)


def _load_both(model: Any, state: dict[str, Tensor], path: Path) -> str | None:
    """Load the state dict of ``path`` into both towers; return in words which embeddings were resized to make them fit."""
    try:
        _fill_both(model, dict(state))
    except (RuntimeError, KeyError, AssertionError) as error:
        want = model.state_dict()
        other = next((k for k in sorted(want) if k in state and state[k].shape != want[k].shape), None)
        reason = str(error).splitlines()[-1].strip()
        if other:  # open_clip may fail earlier, in its conversion or resizing, with a message that names no tensor
            reason = f"{other} is {_shape(state, other)} there and {_shape(want, other)} here"
        raise UserError(f"{path} does not fit the architecture: {reason}; check model.name.") from error
    return _resized(state, model.state_dict())


def _load_visual(model: Any, state: dict[str, Tensor], path: Path) -> str | None:
    """Load the state dict of ``path`` into the image tower; return in words which embeddings were resized to make them fit."""
    # Files of half precision are common, and towers are computed in float32 here.
    state = {f"visual.{key.removeprefix('visual.')}": value.float() for key, value in state.items()}
    fitting = dict(state)
    # open_clip resizes positional embeddings for another resolution. It fails for embeddings of another width, or of
    # patches that form no square; the comparison of shapes below then reports the mistake.
    with suppress(RuntimeError):
        resize_pos_embed(fitting, model)
    want = {f"visual.{key}": value for key, value in model.visual.state_dict().items()}
    wrong = {key for key in want if key not in fitting or fitting[key].shape != want[key].shape} | (
        set(fitting) - set(want)
    )
    if wrong:
        first = min(wrong)
        raise UserError(
            f"{path} is no image tower of this architecture: {len(wrong)} of {len(want)} tensors differ, first "
            f"{first.removeprefix('visual.')} (found {_shape(state, first)}, expected {_shape(want, first)}); check model.name."
        )
    model.visual.load_state_dict({key.removeprefix("visual."): value for key, value in fitting.items()})
    return _resized(state, want)


def _fill_both(model: Any, state: dict[str, Tensor]) -> None:
    """Load a state dict of both towers as ``open_clip.load_checkpoint`` loads it from a file, foreign formats included."""
    state = convert_state_dict(model, state)
    # Names of OpenAI's models, for an architecture whose text tower is a module of its own.
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(model, name, None)
        if own is None:
            # A bias that is the same for all pairs changes no softmax over classes or captions.
            state.pop(name, None)
        elif name in state:
            state[name] = state[name].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(model.logit_bias)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    # Files of transformers before 4.31 count the positions of a text tower.
    state.pop("text.transformer.embeddings.position_ids", None)
    model.load_state_dict(state)


def _resized(stored: dict[str, Tensor], loaded: dict[str, Tensor]) -> str | None:
    """Return what was interpolated: "visual.positional_embedding (197, 768) -> (257, 768)", None where nothing was."""
    told = []
    for key in sorted(key for key in loaded if key.endswith("positional_embedding")):
        # Files of OpenAI's format name the text tower's tensors without "text.".
        there = key if key in stored else key.removeprefix("text.")
        if there in stored and stored[there].shape != loaded[key].shape:
            told.append(f"{key} {_shape(stored, there)} -> {_shape(loaded, key)}")
    return "; ".join(told) or None


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise UserError for tensors, of any shape and dtype, of the file ``path`` that hold NaN or infinite values."""
    broken = {name: int((~tensor.isfinite()).sum()) for name, tensor in tensors.items() if tensor.is_floating_point()}
    broken = {name: count for name, count in broken.items() if count}
    if broken:
        first, count = next(iter(broken.items()))
        raise UserError(
            f"{path} holds NaN or infinite weights in {len(broken)} of {len(tensors)} tensors: {count} in {first}, the first. "
            "Fetch or save the file anew; a training that diverged leaves such weights."
        )


def _shape(state: Mapping[str, Tensor], key: str) -> str:
    return str(tuple(state[key].shape)) if key in state else "nothing"
