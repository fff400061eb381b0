"""A quantized copy of an encoder: built from the options of a run, or read back from the file that a run left."""

from __future__ import annotations

import copy
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from torch import Tensor, nn

from qatlab.config import QUANT_BLOCKS, ModelConfig, QuantConfig, flat, is_quantized
from qatlab.config.blocks import check_block, factory
from qatlab.config.renamed import EARLIER, with_earlier_names, with_present_names
from qatlab.config.trust import require_known
from qatlab.core.checksums import read_tensors, write_tensors
from qatlab.core.damage import DAMAGES, reason, whole
from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.models.clip import require_finite, untrained
from qatlab.models.text_tower import TextTower, of_image, of_text
from qatlab.quant import QuantLayer, calibrate, quantize
from qatlab.quant.layers.walk import attention_products
from qatlab.quant.rewrites.choose import least_error
from qatlab.towers.batch_norms import fold_batch_norms, has_batch_norms
from qatlab.towers.registry import final_projections
from qatlab.towers.structure import is_plain_convolution, reads_image

QUANTIZED, TRAINED, TEXT = "quantized.safetensors", "model.safetensors", "text.safetensors"
_ENTRY = "qatlab"  # the key in a file's metadata under which stands how the module of its tensors is built
_OF_LAYERS = ("weight", "act", "adapter", "attention")  # the slots of which each layer or attention gets its own
_NAMED = 5  # the layers that a line names
# What a file says in its metadata where convolutions were quantized like linear layers; earlier releases did not say it.
_CONVOLUTIONS = "convolutions"
# What the file of a text tower says where the rewrite and quant.last were meant for it too. In files of earlier
# releases they were meant for the image tower alone.
_TEXT_LIKE_IMAGES = "text like images"
# Options that a method's name leaves out: rows have the bits and the seed in columns of their own, and log s is how a scale is
# learned, not what is rounded.
_UNTOLD = ("_target_", "bits", "seed", "log_scale")


Say = Callable[[str], None]


def _unheard(line: str) -> None:
    """Take a line of progress that nobody reads."""


def method(config: QuantConfig) -> str:
    """Return the name of the method in the results: "weight=RaanA act=MinMax(symmetric=False)".

    It names only options that do not have their default value. Bits are left out, because rows have the bits of the
    layers.
    """
    slots = [f"{slot}={_named(block)}" for slot, block in _blocks(config).items() if block]
    if not slots:
        return ""
    tower = [] if config.tower == "visual" else [f"tower={config.tower}"]
    layers = [earlier for option, earlier in EARLIER.items() if getattr(config, option)]
    exceptions = flat(config.rules) if config.rules else ()
    rules = ", ".join(f"{name}={'null' if value is None else value}" for name, value in exceptions)
    return " ".join([*slots, *tower, *layers, *([f"rules({rules})"] if rules else [])])


def tower_files(config: QuantConfig) -> list[str]:
    """Return the names of the files that hold the quantized towers of a run, one for each."""
    return [name for name, tower in ((QUANTIZED, "visual"), (TEXT, "text")) if is_quantized(config, tower)]


def planner(config: QuantConfig) -> Any:
    """Return the object that chooses the bits of every layer, None without one; raises UserError for options that do not fit."""
    return _built(config.plan)


def quantized_copy(visual: nn.Module, config: QuantConfig, folded: bool = True) -> nn.Module:
    """Return a copy of ``visual`` with all modules that ``config`` asks for, their values not yet fitted.

    The state of a fitted encoder with the same options can be loaded into it. Encoders of earlier releases need
    ``folded=False``, because their batch norms were not folded into convolutions.
    """
    model = copy.deepcopy(visual)
    if folded:
        fold_batch_norms(model)
    if config.registers is not None:
        model = _built(config.registers).prepare(model)
    if config.rewrite is not None:
        # A rewrite may add modules and change weights; the state to load has the values of both.
        model = _rewrite(config).prepare(model)
    return _prepared(_converted(model, _options_of(model, config)), config)


def check_quantizers(config: QuantConfig) -> None:
    """Raise UserError for options that no quantizer, adapter, rewrite or plan can be made with, before a model is loaded."""
    # Quantizers check some options only when a layer is made with them, so one layer is quantized here for its errors.
    weight, act, adapter, attention = (_factory(getattr(config, slot)) for slot in _OF_LAYERS)
    if attention is not None:
        attention(heads=12)
    compensation = _built(config.compensate)
    if is_quantized(config):
        # A multiple of the group size. Whether groups divide the layers of the real model shows once that model is loaded.
        width = 12 * ((config.weight or {}).get("group_size") or 64)
        # By this name an error tells of the layer.
        layer = quantize(nn.Sequential(OrderedDict({"a layer": nn.Linear(width, 768)})), weight, act, adapter=adapter)
        if compensation is not None:
            compensation.prepare(layer)
    if config.rewrite is not None:
        _rewrite(config)
    _built(config.outliers)
    _built(config.registers)
    planner(config)


def fitted_copy(
    visual: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]], say: Say = _unheard
) -> tuple[nn.Module, QuantConfig]:
    """Return a copy of ``visual``, rewritten, quantized and calibrated on ``batches()``, and ``config`` with the bits planned.

    ``batches`` is called by each step that reads the calibration images, and gives them from the first one on: normalised,
    (B, 3, S, S), on the device of ``visual``. ``say`` is told how far a search has come that takes long.
    """
    return _fitted(fold_batch_norms(copy.deepcopy(visual)), config, batches, say)


def left_alone(visual: nn.Module, layers: Iterable[str], config: QuantConfig) -> list[str]:
    """Return a line on which of ``layers`` the rewrite leaves as they are, in a list that is empty without a rewrite.

    ``layers`` are the names of the layers that are quantized, ``visual`` is the tower in full precision. A rewrite that has
    no method ``rewritten``, as one of the user's own may, is not told of.
    """
    rewrite = None if config.rewrite is None else _rewrite(config)
    if rewrite is None or not hasattr(rewrite, "rewritten"):
        return []
    # Names are those of a tower without batch norms; a tower that has none need not be copied to be looked at.
    done = rewrite.rewritten(fold_batch_norms(copy.deepcopy(visual)) if has_batch_norms(visual) else visual)
    names = list(layers)
    left = [name for name in names if name not in done]
    of_text = " of the text tower" if isinstance(visual, TextTower) else ""
    what = f"{type(rewrite).__name__} rewrites the inputs of {len(names) - len(left)} of {len(names)} layers{of_text}"
    if not left:
        return [what]
    return [f"{what}; it leaves alone {_some(left)}"]


def products_left(model: nn.Module) -> list[str]:
    """Return a line on which attentions of ``model`` have quantized products, in a list that is empty where none has."""
    products = attention_products(model)
    if not products:
        return []
    done = [name.rpartition(".")[0] for name in products]
    # Classes of other packages are known as attentions by their names only, the innermost where one holds another.
    named = [*done, *(name for name, of in model.named_modules() if "ttention" in type(of).__name__)]
    holding = {name for name in named for other in named if other.startswith(f"{name}.")}
    left = [name for name in named if name not in {*done, *products, *holding}]
    what = f"QK^T and PV are quantized in {len(done)} of {len(done) + len(left)} attentions"
    return [f"{what}; in full precision stay those of {_some(left)}" if left else what]


def unadapted(layers: Mapping[str, QuantLayer]) -> list[str]:
    """Return a line on which of ``layers`` have no adapter where others have one, convolutions for example; else []."""
    without = [name for name, layer in layers.items() if layer.adapter is None]
    if not without or len(without) == len(layers):
        return []
    return [
        f"{len(layers) - len(without)} of {len(layers)} quantized layers have an adapter; the weights of the others stay "
        f"as they are: {_some(without)}"
    ]


def _some(names: Sequence[str]) -> str:
    """Return the first of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def quantized_text(model: nn.Module, config: QuantConfig) -> TextTower:
    """Return a copy of the text tower of the open_clip ``model`` with quantizers whose scales are not yet filled.

    The state of a fitted text tower with the same options loads into it. Raises UserError for options of the image tower
    where quant.tower=text leaves the image tower as it is.
    """
    tower = TextTower(model)
    own = _options_of(tower, config)
    if config.rewrite is not None:
        tower = _rewrite(config).prepare(tower)
    return _prepared(_converted(tower, own), config)


def fitted_text(
    model: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]], say: Say = _unheard
) -> tuple[TextTower, QuantConfig]:
    """Return a copy of the text tower of the open_clip ``model``, rewritten, quantized and calibrated, and its ``config``.

    ``config`` is returned with the bits planned. ``batches`` is that of ``fitted_copy``, but gives tokens (B, L) int64, on
    the device of ``model``. Raises UserError as ``quantized_text`` does.
    """
    return _fitted(TextTower(model), config, batches, say)


def _fitted(
    model: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]], say: Say
) -> tuple[Any, QuantConfig]:
    """Return ``model``, a copy of a tower that is changed in place, fitted on ``batches()``, and the planned ``config``."""
    own = _options_of(model, config)
    # In this order: registers are found in the neurons of the checkpoint, a rewrite changes the ranges that bits are planned
    # for, and scales are those of the planned bits.
    if own.registers is not None:
        model = _built(own.registers)(model, batches())
    if config.rewrite is not None:
        model = _chosen_rewrite(model, config, batches, say)(model, batches())
    if config.plan is not None:

        def make(rules: dict[str, Any], **slots: Any) -> nn.Module:
            # Bits are planned for weights alone: the grids of attention are not yet filled, and no layer is corrected.
            alone = replace(own, rules=rules, attention=None, compensate=None, **slots)
            return _converted(copy.deepcopy(model), alone)

        planned = planner(config)(make, own.rules, batches)
        # As rules: the file of the run then says which bits each layer has, and whoever reads it needs no planner.
        config = replace(config, rules={**config.rules, **planned})
    return _calibrated(model, config, batches), config


def _calibrated(model: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]]) -> nn.Module:
    """Return ``model``, a rewritten tower that is changed in place, quantized and calibrated on ``batches()``."""
    model = _converted(model, _options_of(model, config))
    if config.outliers is not None:
        # The ranges that scales are found for are those without the channels that stay in full precision.
        model = _built(config.outliers)(model, batches())
    calibrate(model, batches(), _built(config.compensate))
    return model


def _chosen_rewrite(
    model: nn.Module, config: QuantConfig, batches: Callable[[], Iterable[Tensor]], say: Say
) -> Callable[[Any, Iterable[Tensor]], Any]:
    """Return the rewrite of ``config``; of several candidates, such as rotations of several seeds, the one of least error."""
    rewrite = _rewrite(config)
    candidates = rewrite.candidates() if hasattr(rewrite, "candidates") else [rewrite]
    if len(candidates) == 1:
        chosen: Callable[[Any, Iterable[Tensor]], Any] = candidates[0]
        return chosen
    return least_error(model, candidates, lambda tower: _calibrated(tower, config, batches), batches, say)


def _options_of(model: nn.Module, config: QuantConfig) -> QuantConfig:
    """Return the options that concern ``model``, one of the two towers.

    Raises UserError for options that concern the image tower alone where quant.tower=text leaves that tower as it is.
    """
    if not isinstance(model, TextTower):
        return replace(config, rules=of_image(config))
    for option in ("adapter", "first", "registers"):
        if config.tower == "text" and getattr(config, option):
            raise UserError(
                f"quant.{option} is for the image tower, which quant.tower=text leaves as it is: leave it out, or set "
                "quant.tower=both."
            )
    # A text tower reads no image, and is not trained, so that an adapter in it would stay without effect.
    return replace(config, rules=of_text(model, config), adapter=None, first=False, registers=None)


def save_quantized(module: nn.Module, path: Path, model: ModelConfig, config: QuantConfig) -> None:
    """Write the tensors of ``module`` to one safetensors file; for a quantized module it also describes how to build it."""
    # An unquantized module is plain open_clip, which anybody can build.
    if not is_quantized(config):
        write_tensors(path, module.state_dict())
        return
    # Paths of this machine are left out: the file holds all weights, and is read elsewhere too.
    architecture = asdict(replace(model, checkpoint=None, text_features=None))
    tower = "text" if isinstance(module, TextTower) else "visual"
    about = {"tower": tower, "model": architecture, "quant": with_earlier_names(asdict(config)), _CONVOLUTIONS: True}
    if tower == "text":
        about[_TEXT_LIKE_IMAGES] = True
    write_tensors(path, module.state_dict(), {_ENTRY: json.dumps(about)})


def load_quantized(path: str | Path, trust: bool = False) -> nn.Module:
    """Return the encoder that a run left, on the CPU, in eval mode, its outputs equal bit for bit to the run's.

    ``path`` is a run folder (its trained model, else its quantized one) or one of its files model.safetensors,
    quantized.safetensors and text.safetensors. An image encoder maps normalised images (B, 3, S, S) to features (B, D)
    of any length, a text encoder tokens (B, L). Nothing else is read: neither config.yaml nor the weights that the run
    started from. ``trust`` lets the file name quantizers that are not qatlab's own, whose code then runs. Raises UserError
    for a file that is missing, damaged, or was not quantized by qatlab, and for one that names other classes.
    """
    path = user_path(path)
    if path.is_dir():
        path = next((path / name for name in (TRAINED, QUANTIZED, TEXT) if (path / name).exists()), path / QUANTIZED)
    tensors, about = read_quantized(path, trust)
    of_text = about["tower"] == "text"
    clip, _ = untrained(ModelConfig(**about["model"]), text=of_text)
    module: nn.Module
    if of_text:
        module = stored_text(clip, about)
    else:
        module = stored_copy(clip.visual, stored_options(about, clip.visual, tensors), about)
    fill(module, tensors, path)
    return module.eval()


def read_quantized(
    path: Path, trust: bool = False, also: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return ({name: tensor of any shape}, description of the module) from a file that ``save_quantized`` has written.

    The description is {"tower", "model", "quant"}. Raises UserError for a file that is missing or damaged, and for one
    whose blocks name classes that are neither qatlab's nor in ``also``, unless ``trust`` is given.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: give the folder of a finished run, or a .safetensors file in it.")
    try:
        tensors, about = _read(path)
    except (*DAMAGES, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({reason(error)}): it is damaged, or no .safetensors file. The run's own command makes "
            "that of a run again."
        ) from error
    if about is None:
        raise UserError(
            f"{path} does not say how it was quantized: it is no file that a quantizing run of qatlab wrote."
        )
    require_finite(tensors, path)
    return tensors, _checked(about, path, trust, also)


def _checked(about: Any, path: Path, trust: bool, also: Iterable[str]) -> dict[str, Any]:
    """Return the description ``about`` of a file; raises UserError where its options or classes may not be built."""
    # The dataclasses are made only for their errors: a key that this release does not know, or a missing one.
    try:
        quant = QuantConfig(**with_present_names(about["quant"]))
        ModelConfig(**about["model"])
        if about["tower"] not in ("visual", "text"):
            raise ValueError(f"tower is {about['tower']!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} does not say how it was quantized in words of this release ({error}): it was changed, or a later "
            "release of qatlab wrote it."
        ) from error
    blocks = {f"quant.{slot}": block for slot, block in _blocks(quant).items()}
    # In this order: ``check_block`` imports a class, which runs code that ``require_known`` has to allow first.
    require_known(blocks, path, trust, also)
    for key, block in blocks.items():
        check_block(key, block)
    return dict(about)


def stored_options(about: dict[str, Any], visual: nn.Module, tensors: Iterable[str]) -> QuantConfig:
    """Return the options of quantization that fit the tensors of a file; ``visual`` is a tower of its architecture.

    ``tensors`` are the names in the file. They decide about quant.last, because earlier releases rounded the
    heads of timm towers even if this option was false. Earlier releases also left all convolutions except the patch
    convolution in full precision: for their files rules are added that leave these layers out.
    """
    config = QuantConfig(**with_present_names(about["quant"]))
    if not about.get(_CONVOLUTIONS):
        left = [
            name for name, module in visual.named_modules() if is_plain_convolution(module) and not reads_image(module)
        ]
        config = replace(config, rules={**dict.fromkeys(left), **config.rules})
    slots = tuple(
        f"{name}.{slot}."
        for name in final_projections(visual)
        for slot in ("weight_quantizer", "act_quantizer", "adapter")
    )
    return replace(config, last=True) if any(name.startswith(slots) for name in tensors) else config


def stored_copy(visual: nn.Module, config: QuantConfig, about: dict[str, Any]) -> nn.Module:
    """Return a copy of ``visual`` into which the tensors of a file can be loaded; ``config`` are its ``stored_options``."""
    # Files of earlier releases still have batch norms, because these releases did not round convolutions.
    return quantized_copy(visual, config, folded=bool(about.get(_CONVOLUTIONS)))


def stored_text(model: nn.Module, about: dict[str, Any]) -> TextTower:
    """Return a copy of the text tower of the open_clip ``model`` that the tensors of a file load into.

    ``about`` is how the file says that its tower was built.
    """
    config = QuantConfig(**with_present_names(about["quant"]))
    if not about.get(_TEXT_LIKE_IMAGES):
        config = replace(config, rewrite=None, last=False)
    return quantized_text(model, config)


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a file and its description of the module around them, None where it has none."""
    tensors, metadata = read_tensors(path)
    return tensors, json.loads(metadata[_ENTRY]) if _ENTRY in metadata else None


def whole_tower(
    path: Path, trust: bool = False, also: Iterable[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors, of any shape, and the description that ``read_quantized`` returns; None without a whole file.

    It is for a run that can make the file again: a damaged file is no error but is moved aside.
    """

    def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, about = _read(path)
        # A ValueError, which counts as damage: a run's own file always has the description.
        if about is None:
            raise ValueError("it does not say how it was quantized")
        require_finite(tensors, path)
        return tensors, _checked(about, path, trust, also)

    return whole(path, read)


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load into ``module`` the tensors, each of the shape and dtype of its own, that were read from ``path``.

    Raises UserError that names the first tensor that is missing, too many or of another shape.
    """
    # torch's own message lists every name, which for a tower are hundreds.
    differing = sorted(set(module.state_dict()) ^ set(tensors))
    if differing:
        found = "holds" if differing[0] in tensors else "lacks"
        raise UserError(
            f"{path} {found} the tensor {differing[0]}, and the model that its options make "
            f"{'has none of this name' if found == 'holds' else 'needs it'}: it was not written by this run, or was changed."
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the model that its options make: {str(error).splitlines()[-1].strip()}"
        ) from error


def _converted(model: Any, config: QuantConfig) -> Any:
    """Return ``model``, quantized in place by the options ``config`` of its tower."""
    weight, act, adapter, attention = (_factory(getattr(config, slot)) for slot in _OF_LAYERS)
    model = quantize(model, weight, act, config.rules, config.first, config.last, adapter, attention)
    if config.compensate is not None:
        # A compensation may give layers a bias; the state to load has its values.
        _built(config.compensate).prepare(model)
    return model


def _blocks(config: QuantConfig) -> dict[str, Any]:
    """Return {slot: block} of the slots that are not empty."""
    slots = {slot: getattr(config, slot) for slot in QUANT_BLOCKS}
    return {slot: block for slot, block in slots.items() if block is not None}


def _factory(block: Any) -> Any:
    return block and factory(block)  # an empty slot stays None


def _built(block: Any) -> Any:
    """Return the object of a slot that is one for the whole tower, None for an empty slot."""
    return block and factory(block)()


def _rewrite(config: QuantConfig) -> Any:
    """Return the rewrite; one that searches, as SmoothQuant does for alpha, gets the quantizers to search with."""
    # The signature decides what is passed, because a rewrite may be a user's own class.
    given = {"weight": _factory(config.weight), "act": _factory(config.act)}
    takes = inspect.signature(get_object(config.rewrite["_target_"])).parameters
    return _factory(config.rewrite)(**{name: factory for name, factory in given.items() if name in takes})


def _prepared(model: Any, config: QuantConfig) -> Any:
    """Return ``model``, whose layers are quantized, with the places for channels that stay in full precision."""
    return model if config.outliers is None else _built(config.outliers).prepare(model)


def _named(block: dict[str, Any]) -> str:
    """Return a block's part of the method's name: "MinMax(symmetric=False)", with the options that are no defaults."""
    built = get_object(block["_target_"])
    defaults = {name: parameter.default for name, parameter in inspect.signature(built).parameters.items()}
    told = [
        name if value is True else f"{name}={value}"
        for name, value in block.items()
        if name not in _UNTOLD and value != defaults.get(name)
    ]
    return f"{built.__name__}({', '.join(told)})" if told else built.__name__
