from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from qatlab import cli
from qatlab.config import GROUPS, Config, recipe_files
from qatlab.errors import UserError
from qatlab.stopping import Stopped
from qatlab.usage import help_text, known_keys, option_sentences

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
    """``command(*arguments, task=..., needs_recipe=True)``: qatlab.fit's command line in this process."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it; this takes it back
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, task: Any = None, needs_recipe: bool = True) -> Outcome:
        calls: list[tuple[str, Config]] = []
        monkeypatch.setattr(sys, "argv", ["qatlab/fit.py", *arguments])
        code = 0
        try:
            cli.main(task or (lambda config, recipe: calls.append((recipe, config))), needs_recipe)
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
    f"{LIGHT} quant.weight.bits=four": ["quant.weight.bits is 'four': it takes a whole number"],
    f"{LIGHT} quant.weight.bits=null": ["quant.weight.bits is None: it takes a whole number"],
    f"{LIGHT} quant.weight.per_channel=maybe": ["quant.weight.per_channel is 'maybe': it takes true or false"],
    f"{LIGHT} quant.weight._target_=qatlab.quant.LSQQ": ["qatlab.quant.LSQQ cannot be imported", "mean 'LSQ'"],
    f"{LIGHT} quant.weight._target_=qatlabb.LSQ": ["qatlabb.LSQ cannot be imported", "No module named 'qatlabb'"],
    f"{LIGHT} quant.weight=4": ["quant.weight is 4: it takes a block with a _target_"],
    f"{LIGHT} ~data": ["data is None: it takes a block with a _target_"],
    f"{LIGHT} ~data.samples": ["data.samples is missing"],
    f"{LIGHT} data.samplez=3": ["data.samplez is not an option (did you mean 'data.samples'?)"],
    f"{LIGHT} quant.rules={{a:null}}": ["quant.rules is added to with a plus", "+quant.rules={"],
    f"{LIGHT} callbacks.odd=null": ["callbacks.odd is not an option (did you mean 'callbacks.ood'?)"],
    f"{LIGHT} callbacks.ood.score=[msp]": ["(did you mean 'callbacks.ood.scores'?)"],
    f"{LIGHT} +callbacks.ood.score=[msp]": ["(did you mean 'callbacks.ood.scores'?)", "qatlab.callbacks.OOD takes"],
    f"{LIGHT} suite.sets.id.rol=id": ["suite.sets.id.rol is not an option (did you mean 'suite.sets.id.role'?)"],
    f"{LIGHT} +suite.sets.mine.role=id": ["suite.sets.mine.role is not in the suite", "--config-dir FOLDER suite=mine"],
    f"{LIGHT} fit.steps=many": ["fit.steps=many: it takes a whole number"],
    f"{LIGHT} fit.steps=null": ["fit.steps=null: it takes a whole number"],
    f"{LIGHT} fit.steps=": ["fit.steps=: it takes a whole number"],
    f"{LIGHT} fit.steps=-1": ["fit.steps=-1: it takes a whole number from 0 on"],
    f"{LIGHT} suite.batch_size=0": ["suite.batch_size=0: it takes a whole number from 1 on"],
    f"{LIGHT} seed=1.5": ["seed=1.5: it takes a whole number"],
    f"{LIGHT} fit.lr=slow": ["fit.lr=slow: it takes a number"],
    f"{LIGHT} force=maybe": ["force=maybe: it takes true or false"],
    f"{LIGHT} fit.grad_clip=x": ["fit.grad_clip=x: it takes a number or null"],
    f"{LIGHT} wandb=off": ["wandb=off: it takes options of its own (mode, project, entity, group)"],
    f"{LIGHT} fit.steps": ["fit.steps has no value", "name=value"],
    f"{LIGHT} wandb.project=a(b": ["could not read wandb.project=a(b", "\"wandb.project='a(b'\""],
    f"{LIGHT} --fit.steps=3": ["--fit.steps=3 is not known: options have no dashes, fit.steps=3"],
    f"{LIGHT} --config-dir nowhere": ["nowhere", "not found"],
    f"{LIGHT} data=cc3m data.shards={SHARDS}": ["could not read data.shards", f"\"data.shards='{SHARDS}'\""],
}


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
    "block": ("quant: {weight: {bitz: 4}}", ["quant.weight.bitz is not an option (did you mean 'quant.weight.bits'?)"]),
    "block value": ("quant: {weight: {bits: four}}", ["quant.weight.bits is 'four': it takes a whole number"]),
    "block null": ("quant: {act: {bits: null}}", ["quant.act.bits is None: it takes a whole number"]),
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
    assert re.search(r"^  mine +Eight words\.$", helped, re.MULTILINE)
    assert "quant/weight=mine4" in helped
    command(folder, "recipe=minee").mistake("(did you mean 'mine'?)")
    command(folder, LIGHT, "quant/weight=mine").mistake("(did you mean 'mine4'?)")
    command(folder, LIGHT, "quant.weight.flavor=2").mistake("(did you mean 'quant.weight.flavour'?)")


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
    [(recipe, config)] = command("model=vit_b16_openai", needs_recipe=False).calls
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
            names += [
                n for kind in get_args(hint) if is_dataclass(kind) for n in dotted_fields(kind, f"{names[-1]}.<name>.")
            ]
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
    lines = [line.split() for line in outcome.out.splitlines() if line.strip()]
    firsts = {words[0] for words in lines}
    assert firsts >= {*recipe_files(), *(f"{group}=" for group in GROUPS), *dotted_fields(Config)}
    for group in GROUPS:
        [shown] = [words[1:] for words in lines if words[0] == f"{group}="]
        assert [word for word in shown if word != "|"] == list(recipe_files(group))
    assert "quant.weight.{bits=8 per_channel=true init=absmax log_scale=${optim.log_scale}}" in outcome.out
    assert f"\"data.shards='{SHARDS}'\"" in outcome.out
    assert outcome.out.startswith("usage: python -m qatlab.fit recipe=<name> ")


def test_the_help_of_evaluate_shows_that_it_takes_a_checkpoint():
    assert help_text("python -m qatlab.evaluate", needs_recipe=False).startswith(
        "usage: python -m qatlab.evaluate [checkpoint=runs/<id>]"
    )


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


@pytest.mark.parametrize(
    "arguments",
    ["recipe=ptq", "quant.weight.bits=4", "checkpoint=runs/a model=tiny", "checkpoint=runs/a data.name=b"],
)
def test_an_evaluation_refuses_what_it_would_not_heed(monkeypatch, capsys, arguments):
    monkeypatch.setattr("sys.argv", ["qatlab/evaluate.py", *arguments.split(), "suite.images=8"])
    with pytest.raises(SystemExit) as ended:
        cli.main(lambda config, recipe: None, needs_recipe=False)
    assert ended.value.code == 2
    assert "`python -m qatlab.evaluate` takes" in capsys.readouterr().err


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
