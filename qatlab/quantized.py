"""A quantized copy of an encoder: built from the options of a run, or read back from the file that a run left."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qatlab.clip import untrained
from qatlab.config import QUANT_SLOTS, ModelConfig, QuantConfig
from qatlab.errors import UserError, nearest
from qatlab.quant import calibrate, quantize
from qatlab.text import TextTower, of_image, of_text

QUANTIZED, TRAINED, TEXT = "quantized.safetensors", "model.safetensors", "text.safetensors"
TOWERS = ("visual", "text", "both")
_ENTRY = "qatlab"  # the metadata of a file that says how the module around its tensors is built
_UNTOLD = ("_target_", "bits", "seed", "log_scale")  # what a method's name leaves out


def is_quantized(config: QuantConfig, tower: str = "both") -> bool:
    """Return whether anything of ``tower`` (visual, text, or both for either) is rounded."""
    if config.tower not in TOWERS:
        raise UserError(
            f"quant.tower={config.tower} is unknown{nearest(config.tower, TOWERS)}; there are {', '.join(TOWERS)}."
        )
    return (config.weight is not None or config.act is not None) and (
        "both" in (tower, config.tower) or tower == config.tower
    )


def method(config: QuantConfig) -> str:
    """Return what the results call the method: "weight=RaanA act=MinMax(symmetric=False)", options that are no defaults shown."""
    return " ".join(f"{slot}={_named(block)}" for slot in QUANT_SLOTS if (block := getattr(config, slot)))


def tower_files(config: QuantConfig) -> list[str]:
    """Return the names of the files, one a tower, that a run leaves what it quantized in."""
    return [name for name, tower in ((QUANTIZED, "visual"), (TEXT, "text")) if is_quantized(config, tower)]


def planner(config: QuantConfig) -> Any:
    """Return what chooses the bits of every layer, if anything does; raises UserError for options that do not fit."""
    return config.plan and _factory(config.plan)()


def quantized_copy(visual: nn.Module, config: QuantConfig) -> nn.Module:
    """Return a copy of ``visual`` with everything of ``config`` in place, into which the state of a fitted one loads."""
    model = copy.deepcopy(visual)
    if config.rewrite is not None:
        model = _rewrite(config).prepare(model)
    return _converted(model, config, of_image(config))


def check_quantizers(config: QuantConfig) -> None:
    """Raise UserError for options that no quantizer, adapter, rewrite or plan can be made with, before a model is loaded."""
    weight, act, adapter = (_factory(block) for block in (config.weight, config.act, config.adapter))
    if is_quantized(config):
        width = 12 * ((config.weight or {}).get("group_size") or 64)  # whether groups divide the model's is found later
        quantize(nn.Sequential(nn.Linear(width, 768)), weight, act, adapter=adapter)
    if config.rewrite is not None:
        _rewrite(config)
    planner(config)


def fitted_copy(
    visual: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]]
) -> tuple[nn.Module, QuantConfig]:
    """Return a copy of ``visual``, rewritten, quantized and calibrated on ``batches()``, and ``config`` with the bits planned.

    ``batches`` gives the calibration images anew, normalised (B, 3, S, S) on the device of ``visual``, to each step that
    reads them.
    """
    model = copy.deepcopy(visual)
    if config.rewrite is not None:
        model = _rewrite(config)(model, batches())
    if config.plan is not None:

        def make(rules: dict[str, Any], **slots: Any) -> nn.Module:
            return _converted(copy.deepcopy(model), replace(config, **slots), rules)

        planned = planner(config)(make, of_image(config), batches)
        config = replace(config, rules={**config.rules, **planned})
    model = _converted(model, config, of_image(config))
    calibrate(model, batches())
    return model, config


def quantized_text(model: nn.Module, config: QuantConfig) -> TextTower:
    """Return a copy of the text tower of the open_clip ``model`` with quantizers, scales not yet filled.

    Raises UserError for options of the image tower where that is not quantized.
    """
    for option in ("rewrite", "adapter", "plan", "patch_conv", "final_proj"):
        if config.tower == "text" and getattr(config, option):
            raise UserError(
                f"quant.{option} is for the image tower, which quant.tower=text leaves as it is: leave it out, or set "
                "quant.tower=both."
            )
    tower = TextTower(model)
    weight, act = (_factory(block) for block in (config.weight, config.act))
    quantize(tower, weight, act, of_text(tower, config))
    return tower


def save_quantized(module: nn.Module, path: Path, model: ModelConfig, config: QuantConfig) -> None:
    """Write the tensors of ``module``, and how it is built where it is quantized, as one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    if not is_quantized(config):
        save_file(tensors, path)
        return
    architecture = asdict(replace(model, checkpoint=None, text_features=None))
    tower = "text" if isinstance(module, TextTower) else "visual"
    about = {"tower": tower, "model": architecture, "quant": asdict(config)}
    save_file(tensors, path, {_ENTRY: json.dumps(about)})


def load_quantized(path: str | Path) -> nn.Module:
    """Return the encoder that a run left, on the CPU, in eval mode, its outputs equal bit for bit to the run's.

    ``path`` is a run folder (its trained model, else its quantized one) or one of its files model.safetensors,
    quantized.safetensors and text.safetensors. An image encoder maps normalised images (B, 3, S, S) to features (B, D)
    of any length, a text encoder tokens (B, L). Nothing else is read: neither config.yaml nor the weights that the run
    started from. Raises UserError for a file that is missing, damaged, or was not quantized by qatlab.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in (TRAINED, QUANTIZED, TEXT) if (path / name).exists()), path / QUANTIZED)
    tensors, about = read_quantized(path)
    config = QuantConfig(**about["quant"])
    clip, _, _ = untrained(ModelConfig(**about["model"]))
    module = quantized_text(clip, config) if about["tower"] == "text" else quantized_copy(clip.visual, config)
    module.load_state_dict(tensors)
    return module.eval()


def read_quantized(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file of ``save_quantized`` and how the module around them is built."""
    if not path.exists():
        raise UserError(f"{path} is not there: give the folder of a finished run, or a .safetensors file in it.")
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get(_ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is cut short, or no .safetensors file.") from error
    if about is None:
        raise UserError(
            f"{path} does not say how it was quantized: it is no file that a quantizing run of qatlab wrote."
        )
    return tensors, json.loads(about)


def _converted(model: nn.Module, config: QuantConfig, rules: dict[str, Any]) -> nn.Module:
    weight, act, adapter = (_factory(block) for block in (config.weight, config.act, config.adapter))
    return quantize(model, weight, act, rules, config.patch_conv, config.final_proj, adapter)


def _factory(block: Any) -> Any:
    return block and instantiate(block, _partial_=True)


def _rewrite(config: QuantConfig) -> Any:
    """The rewrite; one that searches is given the quantizers to search with."""
    given = {"weight": _factory(config.weight), "act": _factory(config.act)}
    takes = inspect.signature(get_object(config.rewrite["_target_"])).parameters
    return _factory(config.rewrite)(**{name: factory for name, factory in given.items() if name in takes})


def _named(block: dict[str, Any]) -> str:
    built = get_object(block["_target_"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(built).parameters.items()}
    told = [
        name if value is True else f"{name}={value}"
        for name, value in block.items()
        if name not in _UNTOLD and value != defaults.get(name)
    ]
    return f"{built.__name__}({', '.join(told)})" if told else built.__name__
