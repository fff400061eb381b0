"""The configurations of open_clip's architectures, read from its JSON files without loading open_clip or torch."""

from __future__ import annotations

import json
import logging
import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qatlab.config.weight_files import LOCAL, snapshot
from qatlab.core.errors import UserError
from qatlab.core.files import user_path

_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")  # open_clip takes a JSON file with these keys for an architecture
HUB = "hf-hub:"
"""The prefix of open_clip's names for models on the Hugging Face hub."""
BESIDE = "open_clip_config.json"
"""The file in which open_clip says a model's architecture and preprocessing, beside its weights."""


def architecture(name: str) -> dict[str, Any] | None:
    """Return the configuration of an architecture (embed_dim, vision_cfg, text_cfg and more), None for an unknown name.

    It is equal to ``open_clip.get_model_config(name)``, which is called if open_clip is already loaded, because this
    process may have added architectures to it.
    """
    if name.startswith((HUB, LOCAL)):
        return _of_file(config_file(name))
    if "open_clip" in sys.modules:
        found: dict[str, Any] | None = import_module("open_clip").get_model_config(name)
        return found
    return _stored(name)


def open_clip_name(name: str) -> str:
    """Return the name by which open_clip builds an architecture: with the folder that a local-dir: stands for."""
    # open_clip's "-quickgelu" names differ in the activation alone, which is decided and passed explicitly.
    name = name.removesuffix("-quickgelu")
    return f"{LOCAL}{config_file(name).parent}" if name.startswith(LOCAL) else name


def config_file(name: str) -> Path:
    """Return the file that tells the architecture of a name that begins with hf-hub: or local-dir:.

    Raises UserError where it is not there, or cannot be fetched.
    """
    if name.startswith(HUB):
        return _hub_file(name)
    folder = snapshot(user_path(name.removeprefix(LOCAL)))
    if (folder / BESIDE).is_file():
        return folder / BESIDE
    if not folder.is_dir():
        raise UserError(f"model.name={name}: there is no folder {folder}.")
    raise UserError(
        f"model.name={name}: the folder has no {BESIDE}, by which open_clip knows its architecture: give "
        f"model.name=<architecture> (ViT-B-32, ...) and model.checkpoint={folder}."
    )


@lru_cache
def _hub_file(name: str) -> Path:
    """Return where the cache of the hub holds the file of a repository, which is fetched where it is missing."""
    download = import_module("open_clip.pretrained").download_pretrained_from_hf
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # without a network it logs every retry, for a minute, before the error below
    try:
        return Path(download(name.removeprefix(HUB), filename=BESIDE))
    except Exception as error:  # the hub and the network raise errors of many classes
        repository = f"https://huggingface.co/{name.removeprefix(HUB)}"
        raise UserError(
            f"model.name={name}: {BESIDE} of {repository} could not be fetched ({type(error).__name__}). If the repository has "
            "none, it is not open_clip's: fetch its folder, and give model.checkpoint=<folder> with "
            "model.name=<architecture>; without a network give model.name=local-dir:<folder>, or fill HF_HOME elsewhere."
        ) from error
    finally:
        hub.setLevel(level)


def _of_file(file: Path) -> dict[str, Any]:
    """Return the architecture in open_clip's file; raises UserError for a file of another form."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): correct it, or fetch it again.") from error
    model = found.get("model_cfg") if isinstance(found, dict) else None
    if not isinstance(model, dict) or any(key not in model for key in _NEEDED):
        raise UserError(f"{file} tells no architecture of open_clip (a model_cfg with {', '.join(_NEEDED)}).")
    return model


def architectures() -> list[str]:
    """Return the names of the architectures that open_clip comes with."""
    return [name for name in sorted(_files()) if _stored(name)]


def has_linear_head(name: str) -> bool:
    """Return whether the final projection of an architecture's image tower is an nn.Linear, as those of timm's towers are."""
    vision = (architecture(name) or {}).get("vision_cfg", {})
    return "timm_model_name" in vision and vision.get("timm_proj") != "none"


def has_convolutions(name: str) -> bool:
    """Return whether the image tower of an architecture may have convolutions behind the one that reads the image."""
    vision = (architecture(name) or {}).get("vision_cfg", {})
    trunk = vision.get("timm_model_name")
    if trunk is None:
        return isinstance(
            vision.get("layers"), list
        )  # open_clip's ResNets have a number of layers for each of four stages
    return trunk.startswith("vit_base_mci") or not trunk.startswith(("vit_", "eva", "swin"))


def _stored(name: str) -> dict[str, Any] | None:
    """Return the configuration in open_clip's file of that name, None where there is none or it is no architecture."""
    file = _files().get(name)
    found = json.loads(file.read_text("utf-8")) if file else None
    return found if found and all(key in found for key in _NEEDED) else None


@lru_cache(1)
def _files() -> dict[str, Path]:
    """Return {name: file} of the JSON files that open_clip comes with."""
    # Found without importing the package, which takes seconds because it imports torch.
    package = find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    return {path.stem: path for path in (Path(package.origin).parent / "model_configs").glob("*.json")}
