"""The configuration of a CLIP from the files beside transformers' weights, converted to the form of open_clip's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError
from qatlab.models.transformers_siglip import KINDS as SIGLIP
from qatlab.models.transformers_siglip import siglip_model

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
_CLIP = ("clip", "clip_vision_model")
# transformers' own defaults, which its files leave out (CLIPVisionConfig, CLIPTextConfig).
_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 32}
_TEXT = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77}
_PILLOW = {2: "bilinear", 3: "bicubic"}


def read_beside(folder: Path) -> dict[str, Any]:
    """Return {"model_cfg", "preprocess_cfg"} by the files of transformers in a folder, {} where they are of no CLIP or SigLIP.

    Raises UserError for a CLIP that open_clip cannot compute as transformers does.
    """
    config = _json(folder / CONFIG)
    if config.get("model_type") not in (*_CLIP, *SIGLIP):
        return {}
    read = siglip_model if config["model_type"] in SIGLIP else _model
    found: dict[str, Any] = {"model_cfg": read(config, folder / CONFIG)}
    image = _json(folder / PREPROCESSOR) or _json(folder / PROCESSOR).get("image_processor") or {}
    if image:
        found["preprocess_cfg"] = _preprocess(image, folder)
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): correct it, or take it away.") from error
    return found if isinstance(found, dict) else {}


def _model(config: dict[str, Any], file: Path) -> dict[str, Any]:
    towers = [config] if config["model_type"] == "clip_vision_model" else []
    towers = towers or [config.get("vision_config") or {}, config.get("text_config") or {}]
    acts = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    if len(acts) > 1 or not acts <= {"quick_gelu", "gelu"}:
        raise UserError(
            f"{file} says hidden_act: {', '.join(sorted(acts))}; open_clip has quick_gelu or gelu, for both towers."
        )
    if other := [tower["layer_norm_eps"] for tower in towers if tower.get("layer_norm_eps", 1e-5) != 1e-5]:
        raise UserError(f"{file} says layer_norm_eps: {other[0]}; open_clip's layers have 1e-05, and other features.")
    vision = _VISION | towers[0]
    width = vision["hidden_size"]
    found: dict[str, Any] = {
        "quick_gelu": acts == {"quick_gelu"},
        "embed_dim": config.get("projection_dim", 512),
        "vision_cfg": {
            "width": width,
            "layers": vision["num_hidden_layers"],
            "head_width": width // vision["num_attention_heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    }
    if len(towers) > 1:
        text = _TEXT | towers[1]
        found["text_cfg"] = {
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
        }
    return found


def _preprocess(image: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return open_clip's preprocess_cfg of transformers' image processor; raises UserError where that does something else."""
    size = image.get("size", 224)
    squash = isinstance(size, dict) and "height" in size
    # SigLIP's processor has no crop: it resizes both sides to the model's.
    crop = image.get("crop_size", size if squash and not image.get("do_center_crop") else 224)
    sides = {*crop.values()} if isinstance(crop, dict) else {crop}
    resized = {size["height"], size["width"]} if squash else {size["shortest_edge"] if isinstance(size, dict) else size}
    interpolation = _PILLOW.get(image.get("resample", 3))
    # One size for both, because open_clip crops to the size that it resizes to.
    if len(sides) > 1 or sides != resized or interpolation is None or not image.get("do_normalize", True):
        raise UserError(
            f"{folder / PREPROCESSOR} resizes or crops as open_clip does not (size {size}, crop {crop}, resample "
            f"{image.get('resample')}): say model.preprocess= yourself."
        )
    return {
        "size": sides.pop(),
        "mean": image.get("image_mean"),
        "std": image.get("image_std"),
        "interpolation": interpolation,
        "resize_mode": "squash" if squash else "shortest",
    }
