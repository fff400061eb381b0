from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from qatlab.config import (
    GROUPS,
    QUANT_SLOTS,
    Config,
    SetConfig,
    as_config,
    compose,
    default_callbacks,
    load,
    recipe_files,
    save,
)
from qatlab.config.blocks import check_blocks
from qatlab.config.recipes import section_of
from qatlab.core.errors import UserError
from qatlab.metrics.ood import SCORES
from qatlab.results.identity import evaluation_id, run_id

ROOT = Path(__file__).resolve().parents[2]
CHOICES = [(group, name) for group in GROUPS for name in recipe_files(group)]
LSQ = "qatlab.quant.LSQ"
MINMAX = "qatlab.quant.MinMax"


def test_every_yaml_file_below_recipes_is_a_choice():
    known = {path for group in ["", "sweep", *GROUPS] for path in recipe_files(group).values()}
    assert known == set((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_begins_with_a_comment_that_says_what_it_is(path):
    line = path.read_text().splitlines()[0]
    assert line.startswith("# ")
    assert line.endswith(".")


@pytest.mark.parametrize("recipe", recipe_files())
def test_every_recipe_composes_and_names_what_exists(recipe):
    config = compose(f"recipe={recipe}")
    check_blocks(config)
    written = OmegaConf.load(recipe_files()[recipe])
    for section in ("fit", "objective"):
        for key, value in written.get(section, {}).items():
            assert getattr(getattr(config, section), key) == value


@pytest.mark.parametrize("recipe", recipe_files())
def test_a_recipe_writes_no_values_into_a_group(recipe):
    # they would beat the choice of the command line
    written = OmegaConf.to_container(OmegaConf.load(recipe_files()[recipe]))
    # A slot of quant is a group. What is no slot has no choice that could be beaten, and bits are no choice: they go with any.
    for slot, value in written.pop("quant", {}).items():
        assert slot not in QUANT_SLOTS or set(value) == {"bits"}
    groups = {group.split("/")[0] for group in GROUPS}
    assert not groups & set(written)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_over_a_recipe(group, choice):
    config = compose("recipe=light_qat", f"{group}={choice}")
    check_blocks(config)
    chosen, file = config, recipe_files(group)[choice]
    for part in (section_of(file) or group.replace("/", ".")).split("."):
        chosen = getattr(chosen, part)
    for key, value in OmegaConf.to_container(OmegaConf.load(file)).items():
        found = chosen[key] if isinstance(chosen, dict) else getattr(chosen, key)
        if key == "sets":
            assert {name: (entry.path, entry.role) for name, entry in found.items()} == {
                name: (entry["path"], entry["role"]) for name, entry in value.items()
            }
        elif "${" not in str(value):
            assert found == (tuple(value) if isinstance(found, tuple) else value)


def test_the_command_line_beats_the_recipe():
    config = compose("recipe=pretrain_tiny", "model=vit_b32_openai", "trainer=default", "fit.steps=7")
    assert (config.model.name, config.model.pretrained) == ("ViT-B-32", "openai")
    assert config.trainer.precision == "32-true"
    assert config.fit.steps == 7
    assert config.data["steps"] == 7
    assert config.fit.from_scratch
    assert config.quant.weight is None


def test_a_choice_of_the_command_line_replaces_the_block_and_its_options_are_reached():
    config = compose("recipe=light_qat", "quant/weight=lsq", "quant.weight.bits=4", "optim=paper")
    assert config.quant.weight == {
        "_target_": LSQ, "bits": 4, "per_channel": False, "init": "absmax", "log_scale": False,
    }  # fmt: skip
    assert config.quant.act == {"_target_": MINMAX, "bits": 8}
    assert config.optim.scale_lr == 1e-7


def test_a_recipe_builds_on_another():
    distill, base = compose("recipe=light_qat_distill"), compose("recipe=light_qat")
    assert distill.fit == base.fit
    assert (distill.objective.contrastive, distill.objective.kl) == (0.5, 0.5)
    assert distill.quant.weight["_target_"] == distill.quant.act["_target_"] == LSQ
    assert distill.quant.weight["per_channel"]


def test_light_qat_has_the_hyper_parameters_of_table_5():
    fit = compose("recipe=light_qat").fit
    assert (fit.steps, fit.batch_size, fit.unique_samples, fit.lr) == (100, 100, 100, 1e-6)


@pytest.mark.parametrize("overrides", [["recipe=fp32"], ["recipe=ptq", "quant={weight: null, act: null}"],
                                       ["recipe=ptq", "~quant/weight", "~quant/act"]])  # fmt: skip
def test_null_quantizers_are_full_precision(overrides):
    config = compose(*overrides)
    assert (config.quant.weight, config.quant.act) == (None, None)


def test_a_callback_is_removed_tuned_and_added():
    config = compose(
        "recipe=ptq",
        "callbacks.ood=null",
        "callbacks.temperature.source=proxy",
        "+callbacks.mine={_target_: qatlab.callbacks.Calibration}",
    )
    assert config.callbacks["ood"] is None
    assert config.callbacks["temperature"]["source"] == "proxy"
    assert list(config.callbacks) == [*default_callbacks(), "mine"]
    check_blocks(config)


@pytest.mark.parametrize("name", default_callbacks())
def test_the_options_written_out_for_a_callback_are_its_own_defaults(name):
    block = default_callbacks()[name]
    parameters = inspect.signature(get_object(block["_target_"])).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    shown = {key: tuple(value) if isinstance(value, list) else value for key, value in block.items() if key[0] != "_"}
    assert shown == defaults
    if "scores" in shown:
        assert shown["scores"] == tuple(SCORES)


def test_interpolations_are_resolved_and_typed():
    config = compose("recipe=pretrain_tiny")
    assert isinstance(config, Config)
    assert config.data["batch_size"] == config.fit.batch_size == 128
    assert list(config.optim.betas) == [0.9, 0.98]


def test_an_option_added_with_plus_that_nothing_reads_is_refused():
    with pytest.raises(UserError, match=r"^fit\.stepz is not an option \(did you mean 'fit\.steps'\?\)"):
        compose("recipe=ptq", "+fit.stepz=3")


@pytest.mark.parametrize("recipe", recipe_files())
def test_saved_options_come_back_as_the_same_run(recipe, tmp_path):
    config = compose(f"recipe={recipe}", "seed=5", "+quant.rules={*mlp*: null, b: {act: null}}")
    save(config, recipe, "0a1b2c3d", tmp_path / "config.yaml")
    stored, name, known = load(tmp_path / "config.yaml")
    assert known == "0a1b2c3d"
    assert name == recipe
    assert run_id(stored) == run_id(config)
    assert stored.suite == config.suite
    assert list(stored.quant.rules) == list(config.quant.rules)


def test_a_run_folder_without_options_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml is not there: checkpoint= wants the folder of a run"):
        load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "option",
    [
        *(
            "fit.lr=-1",
            "fit.lr=nan",
            "fit.lr=inf",
            "fit.grad_clip=-1",
            "optim.scale_lr=-1",
            "optim.weight_decay=-0.1",
        ),
        *("optim.betas=[2,3]", "optim.betas=[0.9,1]", "fit.warmup=-2", "seed=-1"),
        *("trainer.devices=0", "trainer.num_nodes=0", "fit.micro_batch=0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(option):
    with pytest.raises(UserError, match=re.escape(option.partition("=")[0])):
        compose("recipe=light_qat", option)


def test_using_b5_a_set_is_added_on_the_command_line_as_in_a_file(tmp_path: Path) -> None:
    line = compose("suite=folders", "suite.root=photos", "+suite.sets.products={path: products, role: id}")
    entry = line.suite.sets["products"]
    assert (type(entry), entry.path, entry.role, entry.pick) == (SetConfig, "products", "id", "0::1")
    # The id is that of the same set in a file: no option knows how it was given.
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "mine.yaml").write_text("root: photos\nsets: {products: {path: products, role: id}}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        file = as_config(hydra_compose("qatlab", overrides=["suite=mine"]))
    assert evaluation_id(line) == evaluation_id(file)
    # Options of a set that its file leaves out need no plus.
    assert compose("suite=cifar10", "suite.sets.cifar100.pick='0::2'").suite.sets["cifar100"].pick == "0::2"
