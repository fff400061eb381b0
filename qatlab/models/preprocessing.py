"""The preprocessing and the activation that weights were trained with, by a tag, a file beside them, or the options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qatlab.config import ModelConfig
from qatlab.config.weight_files import LOCAL, named_weights, snapshot
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.core.resizing import INTERPOLATIONS, RESIZE_MODES
from qatlab.models.architecture import BESIDE, HUB, architecture, architectures, config_file
from qatlab.models.transformers_config import CONFIG, read_beside

Look = dict[str, Any]  # mean and std (3 floats each, on the [0, 1] scale), interpolation, resize_mode

# open_clip's defaults for keys that a record leaves out (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD); random weights use
# them.
DEFAULT: Look = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def known(config: ModelConfig, from_scratch: bool = False) -> ModelConfig:
    """Return ``config`` with the preprocessing filled in, and the activation if a file beside the checkpoint gives it.

    Later readers of these options then need no file beside the checkpoint. The preprocessing comes from
    ``model.preprocess``, from the tag, from open_clip_config.json beside the checkpoint, or from the architecture if
    all its tags agree. ``tiny`` has its own. Raises UserError for a checkpoint whose preprocessing none of these gives
    (``from_scratch`` says that there is no checkpoint), for an unknown architecture or tag, and for a file that
    contradicts the options.
    """
    if config.name == "tiny":
        if config.preprocess is not None:
            raise UserError("model.preprocess is given, but tiny has its own preprocessing: leave the option out.")
        return config
    name = config.name.removesuffix("-quickgelu")
    if architecture(name) is None:
        raise UserError(
            f"model.name={config.name} is unknown{nearest(name, architectures())}; `open_clip.list_models()` lists them."
        )
    beside = _beside(config)
    # The tag decides where there is one, also about weights that lie beside a file.
    told_tanh = config.pretrained is None and beside.get("model_cfg", {}).get("gelu_tanh", False)
    return replace(
        config,
        preprocess=_look_of(config, beside, from_scratch),
        quick_gelu=_quick_gelu(config, beside),
        gelu_tanh=config.gelu_tanh or told_tanh,
    )


def tag_record(config: ModelConfig) -> dict[str, Any]:
    """Return open_clip's record of the weight tag, {} without one."""
    if config.pretrained is None:
        return {}
    import open_clip  # late, because it loads torch; unlike architectures, tags stand in open_clip's code and in no file

    elsewhere = config.name.startswith((HUB, LOCAL))
    tag = {} if elsewhere else open_clip.get_pretrained_cfg(config.name, config.pretrained)
    # A path is looked for only if the text is no tag, because a folder may have the name of a tag, such as "openai".
    if elsewhere or (not tag and user_path(config.pretrained).exists()):
        raise UserError(
            f"model.pretrained={config.pretrained}: it takes a tag of open_clip, and a name on the hub or of a folder has none. "
            "Weights of your own are model.checkpoint=<file or folder>, beside model.pretrained=<the tag they were trained as>."
        )
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        raise UserError(
            f"model.pretrained={config.pretrained} is no tag of {config.name}{nearest(config.pretrained, tags)}; "
            f"there are {', '.join(tags) or 'none'}."
        )
    return dict(tag)


def told_by_files(config: ModelConfig) -> dict[str, Any]:
    """Return the parts of ``known(config)`` that only a file beside the checkpoint tells: preprocess, quick_gelu, gelu_tanh.

    They belong to the id of a run: two checkpoints with the same options may have different files beside them. The default
    preprocessing is left out, as runs of earlier releases were made with it and keep their ids.
    """
    if config.name == "tiny" or named_weights(config) is None or config.pretrained is not None:
        return {}
    found, told = known(config), {}
    if config.preprocess is None and found.preprocess != DEFAULT:
        told["preprocess"] = found.preprocess
    if found.quick_gelu != config.quick_gelu:
        told["quick_gelu"] = found.quick_gelu
    if found.gelu_tanh != config.gelu_tanh:
        told["gelu_tanh"] = found.gelu_tanh
    return told


def shown(look: Look) -> str:
    """Return a look in words: "bicubic, shortest, mean 0.48 0.46 0.41, std 0.27 0.26 0.28"."""
    mean, std = _numbers(look["mean"]), _numbers(look["std"])
    return f"{look['interpolation']}, {look['resize_mode']}, mean {mean}, std {std}"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _look_of(config: ModelConfig, beside: dict[str, Any], from_scratch: bool) -> Look:
    """Return the look of a model's weights; ``beside`` is the content of the file beside its checkpoint."""
    # The option comes first: it is the remedy that the errors below name.
    if config.preprocess is not None:
        given = config.preprocess
        return _of_tag(config.name, given) if isinstance(given, str) else _of_mapping(given)
    told = beside.get("preprocess_cfg")
    by_file = _complete(told, str(_file(config))) if told else None
    record = tag_record(config)
    by_tag = _complete(record, f"model.pretrained={config.pretrained}") if record else None
    if by_tag and by_file and by_tag != by_file:
        raise UserError(
            f"{_file(config)} says {shown(by_file)}, and model.pretrained={config.pretrained} {shown(by_tag)}: say which with "
            f"model.preprocess={config.pretrained} or model.preprocess={_written(by_file)}."
        )
    # Without a checkpoint the weights are those of the tag, or random; random weights take the default preprocessing.
    if from_scratch or not (config.checkpoint or by_file):
        return by_tag or DEFAULT
    if found := by_tag or by_file:
        return found
    # The last resort: a checkpoint of unknown origin is probably like the weights that open_clip knows, if those are alike.
    looks = _distinct(_tags(config.name))
    if len(looks) == 1:
        return next(iter(looks.values()))
    choices = "; ".join(f"{tag} ({shown(look)})" for tag, look in looks.items())
    reason = f"the tags of {config.name} differ" if looks else f"{config.name} has no tags"
    raise UserError(
        f"model.checkpoint={config.checkpoint} does not tell its preprocessing, and {reason}: add model.preprocess=<tag> "
        f"({choices or 'openai, or any other tag of open_clip'}) or model.preprocess={_written(DEFAULT)} with its own values, "
        f"or put its {BESIDE} beside it."
    )


def _quick_gelu(config: ModelConfig, beside: dict[str, Any]) -> bool | None:
    """Return the option quick_gelu, or what the file says where no tag, option or name says it.

    Raises UserError where the file contradicts the option or the name.
    """
    if "model_cfg" not in beside or config.pretrained is not None:
        return config.quick_gelu
    by_file = bool(beside["model_cfg"].get("quick_gelu", False))
    named = bool((architecture(config.name) or {}).get("quick_gelu", False))
    told = config.quick_gelu if config.quick_gelu is not None else named or None
    if told is not None and told != by_file:
        said = f"model.quick_gelu={str(told).lower()}" if config.quick_gelu is not None else f"model.name={config.name}"
        raise UserError(
            f"{_file(config)} says that its weights were trained with {'QuickGELU' if by_file else 'GELU'}, which {said} "
            "contradicts: correct the one that is wrong."
        )
    return config.quick_gelu if told is not None else by_file


def folder_of_weights(config: ModelConfig) -> Path | None:
    """Return the folder that a model's weights lie in, None for those of a tag."""
    if (named := named_weights(config)) is None:
        return config_file(config.name).parent if config.name.startswith(HUB) else None
    path = user_path(named)
    return snapshot(path) if path.is_dir() else path.parent


def _file(config: ModelConfig) -> Path:
    """Return the path of the file that describes the weights beside it: open_clip's if it exists, else transformers'."""
    folder = folder_of_weights(config) or Path()
    return folder / (BESIDE if (folder / BESIDE).is_file() else CONFIG)


def _beside(config: ModelConfig) -> dict[str, Any]:
    """Return the content of the file beside the weights, in open_clip's form.

    It is {} without a file, and for open_clip's file of another architecture, because a folder may hold several
    checkpoints. Raises UserError for transformers' file of another architecture, because its folder holds only one
    model.
    """
    if folder_of_weights(config) is None or not _file(config).is_file():
        return {}
    if _file(config).name == CONFIG:
        found = read_beside(_file(config).parent)
        if found and (other := _other_size(config.name, found["model_cfg"])):
            raise UserError(
                f"{_file(config)} is of another architecture than model.name={config.name} ({other}): name the one of its sizes."
            )
        return found
    try:
        found = json.loads(_file(config).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{_file(config)} is no JSON ({error}): correct it, or take it away.") from error
    # Another program may write a file of this name: nothing of it is used unless all of it has open_clip's form.
    model, preprocess = (
        found.get(key, {}) if isinstance(found, dict) else None for key in ("model_cfg", "preprocess_cfg")
    )
    if not isinstance(model, dict) or not isinstance(preprocess, dict):
        raise UserError(f"{_file(config)} is not of open_clip's form, a model_cfg and a preprocess_cfg: take it away.")
    return found if _same_architecture(config.name, model, preprocess) else {}


def _same_architecture(name: str, model: dict[str, Any], preprocess: dict[str, Any]) -> bool:
    """Return whether the sizes in a file agree with open_clip's architecture ``name``."""
    # A folder may hold the checkpoints of several models and the file of one. Sizes that either side leaves out say nothing.
    here = architecture(name) or architecture(name.removesuffix("-quickgelu")) or {}
    pairs = [(model, here), (model.get("vision_cfg") or {}, here.get("vision_cfg") or {})]
    equal = all(told[key] == of[key] for told, of in pairs for key in told.keys() & of.keys() & _SIZES)
    # open_clip writes an image size as one number or as two.
    size, here_size = preprocess.get("size"), (here.get("vision_cfg") or {}).get("image_size")
    return equal and (size is None or here_size in (None, size) or [here_size, here_size] == size)


# Keys by which open_clip's architectures differ from each other.
_SIZES = {"embed_dim", "image_size", "layers", "width", "patch_size", "timm_model_name"}


def _other_size(name: str, model: dict[str, Any]) -> str:
    """Return the first size in which transformers' model is not open_clip's architecture: "heads 8 there and 12 here"."""
    here = architecture(name) or architecture(name.removesuffix("-quickgelu")) or {}
    # open_clip's file leaves out the width of a head where it is 64.
    sides = [("", model, here), ("vision ", model["vision_cfg"], {"head_width": 64, **here.get("vision_cfg", {})})]
    sides.append(("text ", model.get("text_cfg", {}), here.get("text_cfg", {})))
    for tower, told, of in sides:
        for key in sorted(told.keys() & of.keys() - {"quick_gelu", "vision_cfg", "text_cfg"}):
            if told[key] != of[key]:
                return f"{tower}{key} {told[key]} there and {of[key]} here"
    return ""


def _tags(name: str) -> dict[str, Look]:
    """Return {tag: look} of the tags that open_clip has for an architecture."""
    import open_clip

    # A name with "-quickgelu" may have tags of its own; otherwise those of the plain name count.
    names = (name, name.removesuffix("-quickgelu"))
    of = next((of for of in names if open_clip.list_pretrained_tags_by_model(of)), name)
    tags = open_clip.list_pretrained_tags_by_model(of)
    return {tag: _complete(open_clip.get_pretrained_cfg(of, tag), f"open_clip's {tag}") for tag in tags}


def _distinct(looks: Mapping[str, Look]) -> dict[str, Look]:
    """Return the looks that differ, each under the first tag that has it."""
    found: dict[str, Look] = {}
    for tag, look in looks.items():
        if look not in found.values():
            found[tag] = look
    return found


def _of_tag(name: str, tag: str) -> Look:
    """Return the look of a tag of this architecture, or of other architectures with this tag if all their looks are equal.

    Raises UserError for an unknown tag, and for one with several looks.
    """
    own = _tags(name)
    if tag in own:
        return own[tag]
    import open_clip

    # "openai" is a tag of several architectures with one look: weights of another architecture may have been trained likewise.
    everywhere = [model for model, known_tag in open_clip.list_pretrained() if known_tag == tag]
    looks = _distinct({model: _tags(model)[tag] for model in everywhere})
    if len(looks) == 1:
        return next(iter(looks.values()))
    differ = f" ({'; '.join(f'{model}: {shown(look)}' for model, look in looks.items())})" if looks else ""
    raise UserError(
        f"model.preprocess={tag} is no tag of {name}{differ}{nearest(tag, own)}; there are {', '.join(own) or 'none'}, or write "
        f"{_written(DEFAULT)} with its own values."
    )


def _of_mapping(given: Any) -> Look:
    """Return the look in a mapping of the user; raises UserError for one that lacks or adds a key."""
    # All four keys are required, because a user who gives only two of them may not know the others.
    if not isinstance(given, Mapping) or set(given) != set(DEFAULT):
        raise UserError(f"model.preprocess={given}: it takes a tag, or {_written(DEFAULT)}, all four of them.")
    return _complete(given, "model.preprocess")


def _complete(record: Mapping[str, Any], where: str) -> Look:
    """Return the look of a record, with open_clip's defaults for missing keys; raises UserError for a value that is wrong."""
    look = {key: default if record.get(key) is None else record[key] for key, default in DEFAULT.items()}
    for key in ("mean", "std"):
        look[key] = _three(look[key], f"{where}: {key}", positive=key == "std")
    # "random" is drawn anew for each image in training; open_clip evaluates such models with bicubic interpolation.
    if look["interpolation"] == "random":
        look["interpolation"] = "bicubic"
    for key, known_values in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        if look[key] not in known_values:
            raise UserError(f"{where}: {key} is {look[key]!r}; it takes one of {', '.join(known_values)}.")
    return look


def _three(values: Any, where: str, positive: bool) -> list[float]:
    """Return three numbers as floats; raises UserError, naming ``where``, for anything else."""
    # bool is an int to Python, and a text would be taken apart into letters.
    listed = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    numbers = [value for value in listed if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(listed) != 3 or len(numbers) != 3 or (positive and min(numbers) <= 0):
        raise UserError(f"{where} is {values!r}; it takes three numbers, such as [0.5,0.5,0.5].")
    return [float(value) for value in numbers]


def _written(look: Look) -> str:
    """Return a look as it is written on the command line."""
    # Hydra's grammar wants mappings without the quotes and spaces of JSON; the outer quotes are for the shell.
    parts = (f"{key}:{json.dumps(value, separators=(',', ':'))}".replace('"', "") for key, value in look.items())
    return f"'{{{','.join(parts)}}}'"
