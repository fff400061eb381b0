"""The trust in stored options: the classes that they may name, and the commands in them that would run code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qatlab.config import QUANT_BLOCKS, Config, SetConfig, SuiteConfig, chosen_loggers
from qatlab.core.errors import UserError

TARGET = "_target_"
BLOCKS = frozenset(
    {
        *(f"qatlab.quant.{name}" for name in ("DynamicMinMax", "GPTQ", "LRQAT", "LSQ", "LSQPlus", "LoRA", "MinMax")),
        *(f"qatlab.quant.{name}" for name in ("FP8", "MX", "NVFP4")),
        *(f"qatlab.quant.{name}" for name in ("MixedPrecision", "OutlierChannels", "RaanA", "Rotation", "SmoothQuant")),
        *(f"qatlab.quant.{name}" for name in ("AttentionProducts", "CachedRegisters", "RepQ", "Ridge")),
        *(f"qatlab.callbacks.{name}" for name in ("Calibration", "OOD", "Predictions", "Refits", "Spurious")),
        "qatlab.callbacks.Temperature",
        "qatlab.data.CaptionShards",
        "qatlab.data.ImageFolder",
        "qatlab.data.rendered.RenderedShards",
        "qatlab.data.rendered.RenderedStream",
    }
)
"""The classes of qatlab that a ``_target_`` of a stored file may name, by full name."""

_COMMAND = "pipe:"  # webdataset hands what follows to a shell
# It is a context variable, because it is set where the command line is read, and needed deep inside of a stage.
_named: ContextVar[frozenset[str]] = ContextVar("named", default=frozenset())


def name_targets(arguments: Sequence[str], config_dir: Path | None) -> None:
    """Note the classes that the user's own call names: on the command line, and in the files of ``config_dir``."""
    texts = [*arguments]
    if config_dir is not None:
        texts += [file.read_text(encoding="utf-8", errors="replace") for file in config_dir.rglob("*.yaml")]
    # A pattern is searched instead of parsing the texts: it finds the classes in overrides
    # ("quant.act._target_=my.Act") and in YAML of any layout. Hydra reports a file that is no YAML later.
    pattern = re.compile(rf"""{TARGET}["']?\s*[:=]\s*["']?([\w.]+)""")
    _named.set(frozenset(target for text in texts for target in pattern.findall(text)))


def require_trusted(config: Config, where: Path, trust: bool) -> None:
    """Raise UserError for stored options, read from ``where``, that name a class or command that is not to be trusted."""
    require_known(blocks_of(config), where, trust)
    command = next((text for text in _texts(config.data) if text.startswith(_COMMAND)), None)
    if command is not None and not trust:
        raise UserError(
            f"{where} names the command '{command[:80]}', which reading its data would run: look at it, and add trust=true to "
            "the command line if it may."
        )


def require_known(blocks: Mapping[str, Any], where: Path, trust: bool, also: Iterable[str] = ()) -> None:
    """Raise UserError for a stored block of a class that is neither qatlab's own nor named by this call.

    ``blocks`` are {dotted key: block}, read from the file ``where``. ``also`` are further classes that may be built, and
    ``trust`` says that all may. Nothing is imported.
    """
    # Names are compared as texts. Importing a module to look whether it is harmless would run its code.
    known = BLOCKS | _named.get() | set(also)
    for key, block in blocks.items():
        target = str(block.get(TARGET)) if isinstance(block, Mapping) else None
        if block is not None and target not in known and not trust:
            raise UserError(
                f"{where} asks for the class {target} as {key}, which is none of qatlab's own: building it runs its code. "
                "Name it on the command line or in a file of --config-dir, or add trust=true to the command line "
                "(trust=True in Python), if you trust that file."
            )


def blocks_of(config: Config) -> dict[str, Any]:
    """Return {dotted key: block} of every _target_ block of the options; an empty slot has None for a block."""
    callbacks = {f"callbacks.{name}": block for name, block in config.callbacks.items()}
    quant = {f"quant.{slot}": getattr(config.quant, slot) for slot in QUANT_BLOCKS}
    objectives = {f"objective.extra.{name}": block for name, block in config.objective.extra.items()}
    loggers = {key: choice for key, choice in chosen_loggers(config.logger).items() if isinstance(choice, Mapping)}
    return {"data": config.data, **quant, **objectives, **callbacks, **loggers}


def layouts_of(suite: SuiteConfig) -> dict[str, Any]:
    """Return {dotted key: block} of the user's own layout classes in the sets of a suite."""
    own = {name: entry.layout for name, entry in suite.sets.items() if is_own_layout(entry)}
    return {f"suite.sets.{name}.layout": {TARGET: layout} for name, layout in own.items()}


def is_own_layout(entry: SetConfig) -> bool:
    """Return whether a user's own class reads a set: then the layout is a full name, which has a dot."""
    return "." in entry.layout


def targets(config: Config) -> set[str]:
    """Return the full names of the classes that the options' blocks name."""
    return {
        str(block[TARGET]) for block in blocks_of(config).values() if isinstance(block, Mapping) and TARGET in block
    }


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)
