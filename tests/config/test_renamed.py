"""quant.first and quant.last are also known as quant.patch_conv and quant.final_proj, under which runs store them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from qatlab.config import Config, compose, load, save, told_options
from qatlab.config.explain import explain
from qatlab.config.help import help_text
from qatlab.core.errors import UserError
from qatlab.results.identity import identity, run_id
from qatlab.sweeps.compositions import Composition, alike, initialized

NAMES = {"quant.patch_conv": "quant.first", "quant.final_proj": "quant.last"}
# As release 93c67d1 computed them, which knew the earlier names alone.
IDS = {"": "1218da52", "quant.patch_conv=true": "a7872142"}


def mistake(*overrides: str) -> str | None:
    try:
        compose("recipe=ptq", *overrides)
    except Exception as error:  # Hydra's errors have no base class of their own
        return explain(error)
    return None


@pytest.mark.parametrize(("earlier", "name"), NAMES.items())
def test_both_names_are_one_option(earlier: str, name: str) -> None:
    for value in ("true", "false", "yes", "0"):
        given = [compose("recipe=ptq", f"{key}={value}") for key in (earlier, name)]
        given.append(compose("recipe=ptq", f"quant={{{earlier.removeprefix('quant.')}: {value}}}"))
        assert given[0] == given[1] == given[2]
        assert {run_id(config) for config in given} == {run_id(given[0])}
        assert not hasattr(given[0].quant, earlier.removeprefix("quant."))


def test_ids_are_those_of_the_earlier_names() -> None:
    for override, known in IDS.items():
        assert run_id(compose("recipe=ptq", *filter(None, [override]))) == known
    config = compose("recipe=ptq", "quant.first=true")
    assert identity(config)["quant.patch_conv"] is True
    assert identity(config)["quant.final_proj"] is False
    assert not {"quant.first", "quant.last"} & {*identity(config)}


def test_a_run_stores_the_earlier_names_and_either_is_read(tmp_path: Path) -> None:
    config, file = compose("recipe=ptq", "quant.last=true"), tmp_path / "config.yaml"
    save(config, "ptq", "00000000", file)
    stored = yaml.safe_load(file.read_text())["quant"]
    assert (stored["patch_conv"], stored["final_proj"]) == (False, True)
    assert not {"first", "last"} & stored.keys()
    assert load(file)[0].quant == config.quant
    # The order of the options is that of earlier releases too: config.yaml is the same to the letter.
    assert [*told_options(config)["quant"]][6:9] == ["rules", "patch_conv", "final_proj"]
    text = file.read_text().partition("\n# checksum")[0]
    file.write_text(text.replace("patch_conv: false", "first: true").replace("final_proj", "last"))
    assert (load(file)[0].quant.first, load(file)[0].quant.last) == (True, True)
    file.write_text(text.replace("patch_conv: false", "first: true\n  patch_conv: false"))
    with pytest.raises(UserError, match=r"quant\.first=true and quant\.patch_conv=false contradict each other"):
        load(file)


@pytest.mark.parametrize(("earlier", "name"), NAMES.items())
def test_different_values_under_both_names_are_told(earlier: str, name: str) -> None:
    for given in itertools.permutations((f"{earlier}=true", f"{name}=false")):
        sentence = mistake(*given)
        assert sentence is not None
        assert sentence.startswith(" and ".join(given))
        assert sentence.endswith(f"contradict each other, being one option: give {name} alone.")
        assert mistake(*given, "quant.weight.bits=4") == sentence
        with pytest.raises(UserError, match="contradict"):
            [*alike([given])]
    assert mistake(f"{earlier}=true", f"{name}=yes") is None
    # In a mapping, false cannot be told from the default.
    assert "contradict" in (mistake(f"quant={{{earlier.removeprefix('quant.')}: false}}", f"{name}=true") or "")


def test_a_sweep_reads_both_names() -> None:
    lines = [
        ("recipe=ptq", f"{key}={value}") for key in ("quant.last", "quant.final_proj") for value in ("true", "false")
    ]
    with initialized(None):
        (group,) = alike(lines)
        composition = Composition(group.common)
        found: list[Config] = [composition.with_values(values) for values in group.values]
    assert [config.quant.last for config in found] == [True, False, True, False]
    assert found[0] == found[2] == compose(*lines[0])


def test_a_mistake_under_an_earlier_name_is_told_like_any() -> None:
    assert mistake("quant.patch_conv=maybe") == "quant.patch_conv=maybe: it takes true or false."
    assert "quant.first=false" in help_text("fit", None, "", "quant")
    assert not any(earlier.partition(".")[2] in help_text("fit") for earlier in NAMES)
