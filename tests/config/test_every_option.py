"""Every option is given what it may not take: the outcome follows from the domain that stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf.errors import OmegaConfBaseException

from qatlab.config import QuantConfig, options
from qatlab.config.blocks import build, check_block, check_blocks
from qatlab.config.explain import explain
from qatlab.config.help import blocks, option_hints
from qatlab.core.domains import fits, hints_of
from qatlab.core.errors import UserError
from qatlab.data.images.layouts import READERS
from qatlab.data.images.numbers import NUMBERS
from qatlab.deploy.runtimes import FORMATS
from qatlab.models.quantized import check_quantizers
from qatlab.quant.layers.fused import MATMULS
from qatlab.quant.quantizers.kernels import CHOICES
from qatlab.reports.files import SUFFIXES
from qatlab.stages.loggers import MODES
from qatlab.stages.threshold import SCORES
from qatlab.sweeps.compositions import Composition, initialized

# As it is written on the command line, and as YAML reads it in a file.
VALUES: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "0.5": 0.5,
    "nan": math.nan,
    "inf": math.inf,
    "1e30": 1e30,
    "99999999999999999999": 99999999999999999999,
    "''": "",
    "null": None,
    "[]": [],
    "[1,a]": [1, "a"],
    "no_such_choice": "no_such_choice",
}
# The set of the embedded suite whose options stand for those of any.
OPTIONS = {key.replace("<name>", "id"): hint for key, hint in option_hints()}
BLOCKS = {title: (key, block) for title, key, block in blocks() if block}
# Not given by users, but taken from other options: a stand-in that every class takes.
STAND_IN = {"${fit.steps}": 3, "${fit.batch_size}": 4, "${seed}": 0, "${optim.log_scale}": True}


def converted(value: Any, hint: Any) -> Any:
    """Return a value as OmegaConf stores it under a typed option: a text takes numbers, and true or false 0 and 1."""
    plain = [part for part in _plain(hint) if part is not type(None)]
    if isinstance(value, list):
        texts = any(get_origin(part) is list and _plain(get_args(part)[0]) == [str] for part in plain)
        return [str(each) for each in value] if texts else value
    if value is None:
        return value
    if plain == [str] and not isinstance(value, str):
        return str(value)
    return bool(value) if plain == [bool] and isinstance(value, int) else value


def _plain(hint: Any) -> list[Any]:
    """Return the types of an annotation, without marks: two where null is one of them."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if type(None) in get_args(hint):
        return [plain for part in get_args(hint) for plain in _plain(part)]
    return [hint]


@pytest.fixture(scope="module")
def composed() -> Iterator[Composition]:
    with initialized(None):
        yield Composition(["recipe=light_qat_lsq"])


def told(composed: Composition, override: str) -> str | None:
    """Return the sentence that an override ends with, None where it is taken."""
    try:
        check_blocks(composed.with_values(OverridesParser.create().parse_overrides([override])))
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return explain(error)
    return None


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_takes_its_domain_and_tells_of_the_rest(composed: Composition, key: str) -> None:
    hint = OPTIONS[key]
    for text, value in VALUES.items():
        sentence = told(composed, f"{key}={text}")
        assert (sentence is None) == fits(converted(value, hint), hint), (text, sentence)
        if sentence is not None:
            assert sentence.startswith(key), sentence
            assert sentence.endswith("."), sentence
            assert "\n" not in sentence


@pytest.mark.parametrize("title", BLOCKS)
def test_every_option_of_a_block_takes_its_domain_and_tells_of_the_rest(title: str) -> None:
    key, block = BLOCKS[title]
    block = {name: STAND_IN.get(value, value) if isinstance(value, str) else value for name, value in block.items()}
    hints = hints_of(get_object(block["_target_"]))
    for name in block.keys() - {"_target_"}:
        for text, value in VALUES.items():
            given = {**block, name: value}
            sentence = mistake(check_block, key, given)
            assert (sentence is None) == fits(value, hints[name]), (name, text, sentence)
            assert sentence is None or sentence.startswith(f"{key}.{name}="), sentence
            # What is taken has a meaning, but may not go together with the rest, which is a sentence too.
            assert sentence is not None or "\n" not in (mistake(_make, key, given) or "")


def mistake(function: Callable[..., object], *arguments: Any) -> str | None:
    """Return the sentence that a call ends with, None where it ends well."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return None


def _make(key: str, block: dict[str, Any]) -> None:
    """Make what a block names."""
    section, _, slot = key.partition(".")
    if section == "quant":
        slots = {"weight": {"_target_": "qatlab.quant.MinMax", "bits": 8}, slot: block}
        check_quantizers(QuantConfig(**slots))
    else:
        build(block)


def test_an_option_without_a_domain_is_none() -> None:
    """What any value fits is checked nowhere."""
    for key, hint in OPTIONS.items():
        assert not all(fits(value, hint) for value in VALUES.values()), key


def test_the_choices_are_those_of_the_packages_that_read_them() -> None:
    assert set(options.LAYOUTS) == {"auto", *READERS}
    assert set(options.FORMATS) == {*SUFFIXES}
    assert set(options.EXPORTS) == {*FORMATS}
    assert set(options.MATMULS) == {*MATMULS}
    assert set(options.KERNELS) == {*CHOICES}
    assert set(options.WANDB_MODES) == {*MODES}
    assert set(options.NUMBERS) == {*NUMBERS}
    assert set(options.THRESHOLD_SCORES) == {*SCORES}
