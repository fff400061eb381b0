from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from qatlab import cli
from qatlab.config import ENTRIES, GROUPS, Config, recipe_files
from qatlab.config.heeded import PROGRAMS, heeds
from qatlab.config.help import help_text, known_keys, option_hints, option_sentences
from qatlab.core.domains import words
from qatlab.core.errors import UserError
from qatlab.core.signals import Stopped

ROOT = Path(__file__).resolve().parents[1]
LIGHT = "recipe=light_qat"
SHARDS = "/data/cc3m/{00000..00331}.tar"


@dataclass
class Outcome:
    """What a command line did: exit code, both streams, and the (recipe, options) it would have run."""

    code: int
    out: str
    err: str
    calls: list[tuple[str, Config]] = field(default_factory=list)

    def mistake(self, *words: str) -> None:
        """Assert that it ended with a sentence that holds ``words``, and ran nothing."""
        assert self.code == 2
        assert (self.calls, self.out) == ([], "")
        assert self.err.startswith("qatlab: ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        assert 1 <= len(re.findall(r"\.(?=\s)", self.err)) <= 2
        for word in words:
            assert word in self.err


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Command:
    """``command(*arguments, task=..., program="fit")``: a program's command line in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this takes it back
    monkeypatch.delenv("QATLAB_IN_SWEEP")  # set for all tests
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, task: Any = None, program: str = "fit") -> Outcome:
        calls: list[tuple[str, Config]] = []
        monkeypatch.setattr(sys, "argv", [f"qatlab/{program}.py", *arguments])
        code = 0
        try:
            cli.main(task or (lambda config, recipe: calls.append((recipe, config))))
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capsys.readouterr(), calls)

    return run


@pytest.fixture
def own(tmp_path) -> Callable[[str, str], str]:
    """``own(path, text)`` writes a file of the user's own; returns the option that makes Hydra look there."""

    def write(path: str, text: str) -> str:
        file = tmp_path / "my" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return f"--config-dir={tmp_path / 'my'}"

    return write


# -- mistakes on the command line ----------------------------------------------------------------------------------------

MISTAKES = {
    "recipe=light_qatt": ["recipe=light_qatt is unknown", "(did you mean 'light_qat'?)", "ptq"],
    "recipe=": ["recipe= is unknown", "light_qat"],
    "recipe=null": ["recipe=null", "name a choice"],
    "recipe=ptq,fp32": ["recipe=ptq,fp32 names several choices", "-m"],
    f"{LIGHT} +recipe=ptq": ["recipe is given twice"],
    f"{LIGHT} modell=tiny": ["modell is not an option (did you mean 'model'?)"],
    f"{LIGHT} model=tinny": ["model=tinny is unknown (did you mean 'tiny'?)", "vit_b32_openai"],
    f"{LIGHT} model=null": ["model=null", "name a choice"],
    f"{LIGHT} quant/weight=lsqq": ["quant/weight=lsqq is unknown (did you mean 'lsq'?)", "minmax"],
    f"{LIGHT} quant/wieght=lsq": ["quant/wieght is not an option (did you mean 'quant/weight'?)"],
    f"{LIGHT} quant/weight=null": ["quant/weight=null", "~quant/weight"],
    f"{LIGHT} quant=null": ["quant=null", "~quant/weight ~quant/act"],
    f"{LIGHT} fit.stepz=3": ["fit.stepz is not an option (did you mean 'fit.steps'?)"],
    f"{LIGHT} +fit.stepz=3": ["fit.stepz is not an option (did you mean 'fit.steps'?)"],
    f"{LIGHT} fitt.steps=3": ["fitt.steps is not an option (did you mean 'fit.steps'?)"],
    f"{LIGHT} +foo=3": ["foo is not an option"],
    f"{LIGHT} quant.weight.bitz=4": ["quant.weight.bitz is not an option (did you mean 'quant.weight.bits'?)"],
    f"{LIGHT} quant.weights.bits=4": ["quant.weights.bits is not an option (did you mean 'quant.weight.bits'?)"],
    f"{LIGHT} +quant.weight.bitz=4": ["(did you mean 'quant.weight.bits'?)", "qatlab.quant.MinMax takes"],
    f"{LIGHT} quant.weight.init=mse": ["quant.weight.init is not an option of the choice made here"],
    f"{LIGHT} quant.weight.bits=four": ["quant.weight.bits=four: it takes a whole number from 2 to 8"],
    f"{LIGHT} quant.weight.bits=null": ["quant.weight.bits=null: it takes a whole number from 2 to 8"],
    f"{LIGHT} quant.weight.per_channel=maybe": ["quant.weight.per_channel=maybe: it takes true or false"],
    f"{LIGHT} quant.weight._target_=qatlab.quant.LSQQ": ["qatlab.quant.LSQQ cannot be imported", "mean 'LSQ'"],
    f"{LIGHT} quant.weight._target_=qatlabb.LSQ": ["qatlabb.LSQ cannot be imported", "No module named 'qatlabb'"],
    f"{LIGHT} quant.weight=4": ["quant.weight=4: it takes a block with a _target_"],
    f"{LIGHT} ~data": ["data=null: it takes a block with a _target_"],
    f"{LIGHT} ~data.samples": ["data.samples is missing"],
    f"{LIGHT} data.samplez=3": ["data.samplez is not an option (did you mean 'data.samples'?)"],
    f"{LIGHT} quant.rules={{a:null}}": ["quant.rules is added to with a plus", "+quant.rules={"],
    f"{LIGHT} callbacks.odd=null": ["callbacks.odd is not an option (did you mean 'callbacks.ood'?)"],
    f"{LIGHT} callbacks.ood.score=[msp]": ["(did you mean 'callbacks.ood.scores'?)"],
    f"{LIGHT} +callbacks.ood.score=[msp]": ["(did you mean 'callbacks.ood.scores'?)", "qatlab.callbacks.OOD takes"],
    f"{LIGHT} suite.sets.id.rol=id": ["suite.sets.id.rol is not an option (did you mean 'suite.sets.id.role'?)"],
    f"{LIGHT} +suite.sets.mine.role=id": ["suite.sets.mine has no path", "+suite.sets.mine={path: FOLDER, role: id}"],
    f"{LIGHT} suite.sets.idd.pick=1": ["suite.sets.idd has no path and no role (did you mean 'id'?)"],
    f"{LIGHT} +suite.sets.my-own={{path:a,rol:id}}": ["suite.sets.my-own.rol is not an option (did you mean "],
    f"{LIGHT} +suite.sets.my-own={{path:a,role:id,images:x}}": ["suite.sets.my-own.images=x: it takes a whole number"],
    f"{LIGHT} +suite.sets.mine=photos": ["suite.sets.mine is 'photos': a set needs a path and a role"],
    f"{LIGHT} fit.steps=many": ["fit.steps=many: it takes a whole number"],
    f"{LIGHT} fit.steps=null": ["fit.steps=null: it takes a whole number"],
    f"{LIGHT} fit.steps=": ["fit.steps=: it takes a whole number"],
    f"{LIGHT} fit.steps=-1": ["fit.steps=-1: it takes a whole number from 0 on"],
    f"{LIGHT} suite.batch_size=0": ["suite.batch_size=0: it takes a whole number from 1 on"],
    f"{LIGHT} seed=1.5": ["seed=1.5: it takes a whole number"],
    f"{LIGHT} fit.lr=slow": ["fit.lr=slow: it takes a number"],
    f"{LIGHT} force=maybe": ["force=maybe: it takes true or false"],
    f"{LIGHT} fit.grad_clip=x": ["fit.grad_clip=x: it takes a number from 0 on or null"],
    f"{LIGHT} wandb=off": ["wandb=off: it takes options of its own (mode, project, entity, group, name, notes, tags)"],
    f"{LIGHT} fit.steps": ["fit.steps has no value", "name=value"],
    f"{LIGHT} wandb.project=a(b": ["could not read wandb.project=a(b", "\"wandb.project='a(b'\""],
    f"{LIGHT} fit.steps=2,3": ["fit.steps=2,3: a comma separates several values; add -m to run them"],
    f"{LIGHT} output=a,b": ["output=a,b: a comma separates several values", "\"output='a,b'\""],
    f"{LIGHT} model.checkpoint=w/x,y.pt": ["quote it for the shell and for Hydra, \"model.checkpoint='w/x,y.pt'\""],
    f"{LIGHT} suite.probe_sets=id,noise": ['a list is written "suite.probe_sets=[id,noise]"'],
    f"{LIGHT} output=my folder": ["folder has no value", "\"name='a b'\""],
    f"{LIGHT} output=a[b": ["\"output='a[b'\""],
    f"{LIGHT} output=~/x": ["\"output='~/x'\""],
    f"{LIGHT} fit.lr=nan": ["fit.lr=nan: it takes a number from 0 to 1."],
    f"{LIGHT} fit.batch_size=1e30": ["fit.batch_size=1e30: it takes a whole number from 1 on."],
    f"{LIGHT} fit.steps=[1]": ["fit.steps=[1]: it takes a whole number from 0 on."],
    f"{LIGHT} output=": ["output=: it takes a path."],
    f"{LIGHT} fit.schedule=cosin": [
        "fit.schedule=cosin is unknown (did you mean 'cosine'?); there are constant, cosine."
    ],
    f"{LIGHT} callbacks.refits.kinds=temperature": ["it takes a list of one or more, each temperature | vector"],
    f"{LIGHT} data.samples=0": ["data.samples=0: it takes a whole number from 1 on."],
    f"{LIGHT} --fit.steps=3": ["--fit.steps=3 is not known: options have no dashes, fit.steps=3"],
    f"{LIGHT} --config-dir nowhere": ["nowhere", "not found"],
    f"{LIGHT} data=cc3m data.shards={SHARDS}": ["could not read data.shards", f"\"data.shards='{SHARDS}'\""],
}


def test_a_command_without_a_word_lists_the_recipes(command):
    outcome = command()
    assert outcome.code == 2
    assert outcome.err.startswith(
        "qatlab: no recipe given; run `python -m qatlab.fit recipe=<name>` with one of\n  fp32"
    )


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_on_the_command_line_is_a_sentence(command, line):
    command(*line.split()).mistake(*MISTAKES[line])


def test_another_parse_error_does_not_blame_the_shards(command):
    outcome = command(LIGHT, "data=cc3m", f"data.shards='{SHARDS}'", "fit.steps")
    outcome.mistake("fit.steps has no value")
    assert "shards" not in outcome.err


def test_a_brace_pattern_that_the_shell_expanded_shows_the_quoted_form(command):
    command(LIGHT, "data=cc3m", "data.shards=/data/0.tar", "data.shards=/data/1.tar").mistake(
        "the shell expanded the braces", f"\"data.shards='{SHARDS}'\""
    )


def test_no_recipe_lists_the_recipes(command):
    outcome = command("fit.steps=3")
    assert (outcome.code, outcome.calls, outcome.out) == (2, [], "")
    first, *lines = outcome.err.splitlines()
    assert first == "qatlab: no recipe given; run `python -m qatlab.fit recipe=<name>` with one of"
    assert [line.split()[0] for line in lines] == list(recipe_files())
    assert all(line.rstrip().endswith(".") for line in lines)


def test_a_recipe_added_with_plus_is_no_recipe(command):
    outcome = command("+recipe=light_qat")
    assert outcome.code == 2
    assert "no recipe given" in outcome.err


# -- the user's own files ------------------------------------------------------------------------------------------------

GLOBAL = "# @package _global_\n"
FILES = {
    "option": ("fit: {stepz: 3}", ["fit.stepz is not an option (did you mean 'fit.steps'?)"]),
    "section": ("fitt: {steps: 3}", ["fitt is not an option (did you mean 'fit'?)"]),
    "base": ("defaults: [light_qatt]", ["recipe=light_qatt is unknown (did you mean 'light_qat'?)", "mine"]),
    "choice": ("defaults: [override /quant/weight: lsqq]", ["quant/weight=lsqq is unknown (did you mean 'lsq'?)"]),
    "group": ("defaults: [override /quant/wieght: lsq]", ["quant/wieght is not an option", "'quant/weight'"]),
    "group twice": ("defaults: [light_qat, /optim: paper]", ["mine.yaml: optim has", "'- override /optim: <choice>'"]),
    "no group": (
        "defaults: [light_qat, /quant: weight]",
        ["recipe/mine.yaml: quant is no group", "there are recipe, mod"],
    ),
    "group without a slash": ("defaults: [light_qat, optim: paper]", ["recipe/mine.yaml: recipe/optim is", "/optim."]),
    "override without a slash": (
        "defaults: [ptq, override quant/act: lsq]",
        ["recipe/mine.yaml: recipe/quant", "/quant/act."],
    ),
    "block": ("quant: {weight: {bitz: 4}}", ["quant.weight.bitz is not an option (did you mean 'quant.weight.bits'?)"]),
    "block value": ("quant: {weight: {bits: four}}", ["quant.weight.bits=four: it takes a whole number from 2 to 8"]),
    "block null": ("quant: {act: {bits: null}}", ["quant.act.bits=null: it takes a whole number from 2 to 8"]),
    "type": ("fit: {steps: many}", ["fit.steps=many: it takes a whole number"]),
    "null": ("fit: {steps: null}", ["fit.steps=null: it takes a whole number"]),
    "bool": ("force: 3x", ["force=3x: it takes true or false"]),
    "set": ("suite: {sets: {id: {rol: id}}}", ["suite.sets.id.rol is not an option", "'suite.sets.id.role'"]),
    "interpolation": ("seed: ${fit.stepz}", ["seed", "fit.stepz"]),
    "yaml": ("fit: {steps: 3", ["not YAML", "mine.yaml", "line 2"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_mistake_in_a_recipe_file_is_a_sentence(command, own, kind):
    text, words = FILES[kind]
    command(own("recipe/mine.yaml", GLOBAL + text + "\n"), "recipe=mine").mistake(*words)


def test_a_recipe_file_without_its_first_line_is_told_so(command, own):
    command(own("recipe/mine.yaml", "fit: {steps: 3}\n"), "recipe=mine").mistake("# @package _global_", "my/recipe")


def test_an_own_recipe_and_an_own_choice_run(command, own):
    text = "# Mine.\ndefaults: [light_qat, override /quant/weight: mine4, _self_]\nfit: {steps: 3}\n"
    folder = own("recipe/mine.yaml", GLOBAL + text)
    own("quant/weight/mine4.yaml", "_target_: qatlab.quant.LSQ\nbits: 4\n")
    own("suite/birds.yaml", "sets: {birds: {path: birds, role: id}}\n")
    outcome = command("recipe=mine", *folder.split("="), "suite=birds")  # the option may stand between the choices
    assert (outcome.code, outcome.err) == (0, "")
    [(recipe, config)] = outcome.calls
    assert (recipe, config.fit.steps, config.fit.batch_size) == ("mine", 3, 100)
    assert config.quant.weight == {"_target_": "qatlab.quant.LSQ", "bits": 4}
    assert list(config.suite.sets) == ["birds"]


def test_own_choices_are_known_to_help_and_to_the_next_mistake(command, own):
    folder = own("recipe/mine.yaml", GLOBAL + "# Eight words.\n")
    own("quant/weight/mine4.yaml", "_target_: qatlab.quant.LSQ\nbits: 4\nflavour: 1\n")
    helped = command(folder, "--help").out
    assert re.search(r"^  recipe=mine\n      Eight words\.$", helped, re.MULTILINE)
    assert "quant/weight=mine4" in helped
    command(folder, "recipe=minee").mistake("(did you mean 'mine'?)")
    command(folder, LIGHT, "quant/weight=mine").mistake("(did you mean 'mine4'?)")
    command(folder, LIGHT, "quant.weight.flavor=2").mistake("(did you mean 'quant.weight.flavour'?)")


def test_training_f7_a_folder_of_choices_may_lie_in_the_home(command, own, monkeypatch, tmp_path):
    own("recipe/mine.yaml", GLOBAL + "# Mine.\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in ["--config-dir=~/my"], ["--config-dir", "~/my"]:
        assert command(*arguments, "recipe=mine").calls[0][0] == "mine"


# -- what works ----------------------------------------------------------------------------------------------------------


def test_the_task_gets_the_options_and_nothing_is_written(command, tmp_path):
    outcome = command("recipe=light_qat_lsq", "data=cc3m", f"data.shards='{SHARDS}'", "fit.steps=3")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    [(recipe, config)] = outcome.calls
    assert recipe == "light_qat_lsq"
    assert isinstance(config, Config)
    assert (config.data["shards"], config.fit.steps) == (SHARDS, 3)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_needs_no_recipe(command):
    [(recipe, config)] = command("model=vit_b16_openai", program="evaluate").calls
    assert (recipe, config.model.name) == ("evaluate", "ViT-B-16")


def test_cfg_job_prints_the_composed_options_and_runs_nothing(command):
    outcome = command(LIGHT, "fit.steps=3", "--cfg", "job")
    printed = yaml.safe_load(outcome.out)
    assert (outcome.code, outcome.calls) == (0, [])
    assert printed["fit"]["steps"] == 3
    assert printed["quant"]["weight"]["_target_"] == "qatlab.quant.MinMax"


def test_multirun_composes_each_recipe(command):
    outcome = command("-m", "recipe=light_qat,ptq", "seed=1,2")
    assert (outcome.code, outcome.err) == (0, "")
    assert [(recipe, config.fit.steps, config.seed) for recipe, config in outcome.calls] == [
        ("light_qat", 100, 1), ("light_qat", 100, 2), ("ptq", 0, 1), ("ptq", 0, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("option", ["trainer.devices=2", "trainer.num_nodes=2"])
def test_multirun_refuses_more_than_one_process(command, option):
    command("-m", "recipe=light_qat,ptq", option).mistake(option, "-m", "start one process per run")


def test_multirun_names_a_mistake_in_one_of_its_runs(command):
    command("-m", "recipe=light_qat,ptqq").mistake("recipe=ptqq is unknown (did you mean 'ptq'?)")


# -- errors from inside a run --------------------------------------------------------------------------------------------


def fail(error: BaseException) -> Callable[[Config, str], None]:
    def task(config: Config, recipe: str) -> None:
        raise error

    return task


def refuse(**_: Any) -> None:
    raise UserError("data.shards is missing.")


def stumble(**_: Any) -> None:
    raise TypeError("a bug")


class Unreadable:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise UserError(f"image {index} cannot be read; replace it.")


def test_a_user_error_of_the_task_is_its_sentence(command):
    outcome = command(LIGHT, task=fail(UserError("the disk is full; make room.")))
    assert (outcome.code, outcome.err) == (2, "qatlab: the disk is full; make room.\n")


def test_a_user_error_from_a_block_is_its_sentence(command):
    outcome = command(LIGHT, task=lambda *_: instantiate({"_target_": f"{__name__}.refuse"}))
    assert (outcome.code, outcome.err) == (2, "qatlab: data.shards is missing.\n")


def test_a_user_error_from_a_loader_process_is_its_sentence(command):
    def task(config: Config, recipe: str) -> None:
        batches = iter(DataLoader(Unreadable(), num_workers=1, multiprocessing_context="fork"))
        try:
            next(batches)
        finally:
            batches._shutdown_workers()  # else collecting the garbage waits five seconds for them

    with pytest.raises(UserError, match="Traceback") as caught:  # what it looks like without main
        task(Config(), "")
    assert "UserError: image 0" in str(caught.value)
    outcome = command(LIGHT, task=task)
    assert (outcome.code, outcome.err) == (2, "qatlab: image 0 cannot be read; replace it.\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), TypeError("a bug"), OSError("a bug")])
def test_anything_else_keeps_its_traceback(command, error):
    with pytest.raises(type(error), match="a bug") as caught:
        command(LIGHT, task=fail(error))
    assert caught.value is error
    assert "task" in [entry.name for entry in caught.traceback]


def test_a_bug_inside_a_block_keeps_its_traceback(command):
    with pytest.raises(Exception, match="a bug") as caught:
        command(LIGHT, task=lambda *_: instantiate({"_target_": f"{__name__}.stumble"}))
    assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR1, 75, "SIGUSR1")],
)
def test_a_stop_says_how_to_go_on(command, number, code, name):
    outcome = command(LIGHT, task=fail(Stopped(number)))
    assert outcome.code == code
    assert f"stopped by {name}; the same command goes on from the last checkpoint or finished stage" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("error", "marked"),
    [
        (UserError("no shard."), True),
        (RuntimeError("odd"), True),
        (Stopped(signal.SIGTERM), False),
        (SystemExit(0), False),
    ],
)
def test_a_script_is_told_whether_a_process_erred(command, monkeypatch, tmp_path, error, marked):
    """What terminates the others of a job makes them look like stopped ones."""
    monkeypatch.setenv("QATLAB_MISTAKE", str(tmp_path / "mistake"))
    with suppress(RuntimeError):
        command(LIGHT, task=fail(error))
    assert (tmp_path / "mistake").exists() == marked


@pytest.mark.parametrize(
    "given",
    [{"LOCAL_RANK": "1"}, {"RANK": "8", "LOCAL_RANK": "0"}, {"SLURM_PROCID": "3"}],
    ids=["lightning", "torchrun", "srun"],
)
def test_other_ranks_stop_in_silence_and_say_who_errs(command, monkeypatch, given):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    outcome = command(LIGHT, task=fail(Stopped(signal.SIGTERM)))
    assert (outcome.code, outcome.err) == (0, "")
    outcome = command(LIGHT, task=fail(UserError("no shard.")))
    number = next(value for value in given.values())
    assert (outcome.code, outcome.err) == (2, f"qatlab: rank {number}: no shard.\n")


def test_ctrl_c_before_the_run_began(command):
    outcome = command(LIGHT, task=fail(KeyboardInterrupt()))
    assert (outcome.code, outcome.err) == (130, "qatlab: interrupted; what was finished before is stored.\n")


# -- help ----------------------------------------------------------------------------------------------------------------


def dotted_fields(kind: Any, prefix: str = "") -> list[str]:
    """Return every leaf option of the dataclasses, groups of _target_ blocks and Hydra's own left out."""
    names = []
    for entry in fields(kind):
        hint = get_type_hints(kind)[entry.name]
        if is_dataclass(hint):
            names += dotted_fields(hint, f"{prefix}{entry.name}.")
        elif prefix or entry.name not in ("defaults", "hydra", "data"):
            names.append(f"{prefix}{entry.name}")
            if names[-1] in ENTRIES:
                names += dotted_fields(ENTRIES[names[-1]], f"{names[-1]}.<name>.")
    return names


def test_every_option_has_a_sentence():
    sentences = dict(option_sentences())
    assert set(sentences) == set(dotted_fields(Config))
    assert "suite.sets.<name>.role" in sentences
    for name, sentence in sentences.items():
        assert sentence.endswith("."), name
        assert "\n" not in sentence, name


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_recipe_group_choice_and_option(command, flag):
    outcome = command(LIGHT, flag)
    assert (outcome.code, outcome.calls, outcome.err) == (0, [], "")
    lines = [line for line in outcome.out.splitlines() if line.strip()]
    heads = {line.split()[0].split("=")[0] for line in lines if line.startswith("  ")}
    assert heads >= {option for option in dotted_fields(Config) if heeds("fit", option)}
    assert {f"  recipe={name}" for name in recipe_files()} <= {*lines}
    told = " ".join(outcome.out.split())
    for group in GROUPS:
        assert f"{group}= {' | '.join(recipe_files(group))} " in told
    assert "quant.weight.{bits=8, per_channel=true, init=absmax, log_scale=${optim.log_scale}}" in told
    assert f"\"data.shards='{SHARDS}'\"" in outcome.out
    assert outcome.out.startswith("usage: python -m qatlab.fit recipe=<name> ")


@pytest.mark.parametrize("program", PROGRAMS)
def test_using_help_shows_what_the_program_heeds_at_80_columns(program):
    text = help_text(program)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    heads = set(re.findall(r"^  (\S+?)=", text, re.MULTILINE))
    told = " ".join(text.split())
    for option, hint in option_hints():
        assert (option in heads) == heeds(program, option)
        assert f"({words(hint)}) " in told or option not in heads
    assert ("fit.lr" in heads, "bench.threads" in heads) == (program == "fit", program == "bench")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_section_of_the_help_shows_it_alone_and_what_its_blocks_take(program):
    for section in re.search(r"SECTION, of ([^:]*?)\n[a-z]", help_text(program), re.DOTALL)[1].split(","):
        text = help_text(program, section=section.strip())
        assert text.startswith(f"{section.strip()}: ")
        assert [line for line in text.splitlines() if line[:1].strip()] == [text.splitlines()[0]]
        assert [line for line in text.splitlines() if len(line) > 80] == []


def test_the_section_of_blocks_shows_every_domain(command):
    lines = [line.strip() for line in command("--help", "quant").out.splitlines()]
    assert "quant.weight.bits=8 (a whole number from 2 to 8)" in lines
    assert "+quant.weight.percentile=99.99 (a number above 50, at most 100)" in lines
    assert "quant.plan.sensitivity=measured (measured | gradient)" in lines


def test_an_unknown_section_is_a_sentence(command):
    command("--help", "qant").mistake("--help qant", "did you mean 'quant'?")
    command("--help", "quant", program="bench").mistake("there are bench, run")


def test_the_help_of_evaluate_shows_that_it_takes_a_checkpoint():
    assert help_text("evaluate").startswith("usage: python -m qatlab.evaluate [checkpoint=runs/<id>]")


def test_the_known_keys_hold_options_of_blocks_and_callbacks():
    keys = known_keys()
    assert len(keys) == len(set(keys))
    assert {"fit", "fit.steps", "quant/act", "quant.act.bits", "data.shards", "callbacks.ood.scores"} <= set(keys)


# -- real shells ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash(tmp_path_factory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """``bash(line)`` runs the line in a real bash in the repository, with this Python as ``python``."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


def readme_commands() -> list[str]:
    """Return the command lines in the README's fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_cc3m_command_of_the_readme_parses_in_a_real_shell(bash):
    line = next(line for line in readme_commands() if "python -m qatlab.fit" in line and "data=cc3m" in line)
    ended = bash(f"{line} --cfg job")
    assert (ended.returncode, ended.stderr) == (0, "")
    composed = yaml.safe_load(ended.stdout)
    assert composed["data"]["shards"] == SHARDS
    assert composed["data"]["name"] == "cc3m"
    assert composed["model"]["pretrained"] is not None
    assert composed["suite"]["root"] == "/data"


def test_an_unquoted_pattern_in_a_real_shell_shows_the_quoted_form(bash):
    ended = bash("python -m qatlab.fit recipe=light_qat data=cc3m data.shards=/data/cc3m/{00000..00003}.tar")
    Outcome(ended.returncode, ended.stdout, ended.stderr).mistake("shell", f"\"data.shards='{SHARDS}'\"")


def test_a_pattern_quoted_once_shows_the_quoted_form(bash):
    ended = bash("python -m qatlab.fit recipe=light_qat data=cc3m 'data.shards=/data/cc3m/{00000..00003}.tar'")
    Outcome(ended.returncode, ended.stdout, ended.stderr).mistake(f"\"data.shards='{SHARDS}'\"")


# -- what has no effect ---------------------------------------------------------------------------------------------------

UNHEEDED = {
    "evaluate recipe=ptq": "it is for `python -m qatlab.fit`",
    "evaluate quant.weight.bits=4": "it is for `python -m qatlab.fit`",
    "evaluate quant/act=lsq": "it is for `python -m qatlab.fit`",
    "evaluate fit.lr=1": "it is for `python -m qatlab.fit`",
    "evaluate checkpoint=runs/a model=tiny": "the run in checkpoint= has its own model",
    "evaluate checkpoint=runs/a data.name=b": "the run in checkpoint= has its own data.name",
    "evaluate bench.rounds=3": "it is for `python -m qatlab.bench`",
    "export checkpoint=runs/a seed=3": "it is for `python -m qatlab.fit` and `python -m qatlab.evaluate`",
    "bench checkpoint=runs/a suite.images=8": "it is for `python -m qatlab.fit`",
    "fit recipe=ptq suite.check=true": "it is for `python -m qatlab.evaluate`",
    "fit recipe=ptq checkpoint=runs/a": "weights to start from are model.checkpoint=",
}
VAIN = {
    "recipe=ptq fit.lr=1e-5": "fit.lr=1e-5 has no effect: fit.steps=0 trains nothing",
    "recipe=ptq optim.betas=[0,0.9]": "fit.steps=0 trains nothing",
    "recipe=ptq objective.kl=1": "fit.steps=0 trains nothing",
    "recipe=ptq suite.probe_images=8": "no probe is taken",
    "recipe=light_qat fit.eval_every=0 suite.probe_images=8": "no probe is taken",
    "recipe=fp32 quant.patch_conv=true": "nothing is quantized",
    "recipe=fp32 quant/rewrite=smoothquant": "nothing is quantized",
    "recipe=fp32 +quant.rules={a: null}": "nothing is quantized",
    "recipe=ptq model.pretrained=foo": "the embedded model",
    "recipe=ptq suite.root=/nonexistent": "all sets of this suite are rendered",
    "recipe=ptq suite=cifar10 suite.images=3": "it is about rendered sets",
    "recipe=ptq callbacks={}": "an empty one changes nothing",
    "recipe=ptq suite.sets={}": "an empty one changes nothing",
    "recipe=ptq hydra.run.dir=/x": "output= says where",
    "recipe=ptq suite.negatives=imagenet1k": "no score that is asked for (callbacks.ood.scores) reads it",
    "recipe=ptq callbacks.ood.scores=[msp] callbacks.ood.mcm_temperature=2": "no score that is asked for",
    "recipe=pretrain_tiny model.checkpoint=a.pt": "random weights",
}


@pytest.mark.parametrize("line", UNHEEDED)
def test_an_option_that_the_program_does_not_heed_is_refused(command, line):
    program, *arguments = line.split()
    command(*arguments, program=program).mistake(arguments[-1], "has no effect", UNHEEDED[line])


@pytest.mark.parametrize("line", VAIN)
def test_an_option_without_effect_in_the_run_is_refused(command, line):
    command(*re.split(r" (?!null)", line)).mistake("has no effect", VAIN[line], "leave it out")


def test_what_a_recipe_holds_is_never_refused(command, own):
    folder = own("recipe/mine.yaml", GLOBAL + "defaults: [ptq, _self_]\nfit: {lr: 1.0e-5}\nsuite: {root: /nowhere}\n")
    assert command(folder, "recipe=mine").code == 0


def test_what_has_an_effect_is_taken(command):
    for line in (
        "recipe=ptq fit.workers=0 fit.steps=1",
        "recipe=ptq callbacks.ood.scores=all suite.negatives=imagenet1k",
        "recipe=ptq ~quant/act",
        "recipe=ptq fit.steps=2 fit.lr=1e-5",
        "recipe=fp32 callbacks.temperature.source=proxy quant.calibration_images=8",
    ):
        assert command(*line.split()).err == ""
    assert command("suite.images=8", "fit.workers=0", program="evaluate").err == ""


def test_in_a_sweep_what_has_no_effect_is_told(command, monkeypatch):
    outcome = command("-m", "recipe=ptq,light_qat", "fit.lr=1e-5")
    assert (outcome.code, len(outcome.calls)) == (0, 2)
    assert (
        outcome.err == "qatlab: without effect in recipe=ptq fit.lr=1e-05: fit.lr=1e-05 (fit.steps=0 trains nothing)\n"
    )
    monkeypatch.setenv("QATLAB_IN_SWEEP", "1")
    assert command("recipe=ptq", "fit.lr=1e-5").err == ""


def test_no_command_of_the_readme_holds_an_option_without_effect(command):
    for line in readme_commands():
        if found := re.match(r"python -m qatlab\.(fit|evaluate|export|bench) (.*?)(?: #.*)?$", line):
            program, arguments = found[1], shlex.split(found[2])
            if not any("/" in argument for argument in arguments if argument.startswith("--config-dir")):
                assert "has no effect" not in command(*arguments, program=program).err, line


@pytest.mark.parametrize("program", ["fit", "evaluate"])
def test_help_and_mistakes_do_not_wait_for_torch(bash, program):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['qatlab/{program}.py', *{['recipe=ptq'] if program == 'fit' else []}, 'fit.stepz=3']\n"
        f"try: runpy.run_module('qatlab.{program}', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)\n"
    )
    ended = bash(f'python -c "{code}"')
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert "did you mean 'fit.steps'?" in ended.stderr
