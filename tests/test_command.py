"""The command qatlab, and Tab after it and after python -m."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qatlab import cli
from qatlab.__main__ import COMMANDS, main
from qatlab.config import recipe_files
from qatlab.sweep import WORDS

ROOT = Path(__file__).resolve().parents[1]
# Other tests import the modules that are commands; a command's process does not.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package:RuntimeWarning")
Shell = Callable[..., subprocess.CompletedProcess[str]]


def test_every_module_with_a_command_line_is_a_command():
    modules = {path.stem for path in (ROOT / "qatlab").glob("*.py") if "\ndef main() -> None:" in path.read_text()}
    assert modules - {"__main__"} == set(COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_command_they_are_listed_with_a_line_each(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["qatlab", *arguments])
    main()
    told = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].+\.$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("word", "said"),
    [("fitt", "fitt is none of fit, evaluate, export, bench, sweep (did you mean 'fit'?)"), ("a=1", "a=1 is none of")],
)
def test_a_typo_is_a_sentence(monkeypatch, capsys, word, said):
    monkeypatch.setattr(sys, "argv", ["qatlab", word, "recipe=ptq"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert printed.err.startswith(f"qatlab: {said}")


def test_a_command_runs_as_its_module_does_with_its_arguments_untouched(monkeypatch):
    seen = []

    def look(task: object) -> None:
        # By this name Lightning starts the processes of further devices.
        seen.append((sys.modules["__main__"].__spec__.name, list(sys.argv)))

    monkeypatch.setattr(cli, "main", look)
    arguments = ["-m", "a='b c'", "--cfg", "job", "--help"]
    monkeypatch.setattr(sys, "argv", ["/bin/qatlab", "evaluate", *arguments])
    main()
    assert seen == [("qatlab.evaluate", [str(ROOT / "qatlab/evaluate.py"), *arguments])]


# -- what a shell asks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(monkeypatch, capsys) -> Callable[[str], list[str]]:
    """``complete(line)`` returns what is printed for the line, as the script of a shell asks for it."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # cli sets it; this takes it back

    def ask(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setattr(sys, "argv", ["qatlab", "-sc", "query=bash"])
        main()
        return capsys.readouterr().out.split()

    return ask


@pytest.mark.parametrize("form", ["qatlab {}", "/venv/bin/qatlab {}", "python3.12 -m qatlab.{}", "python -m qatlab {}"])
def test_both_forms_are_completed(complete, form):
    assert complete(form.format("fit recipe=light_qat_l")) == ["recipe=light_qat_lsq", "recipe=light_qat_lsq_pc"]
    assert complete(form.format("fit recipe=ptq quant.weight.b")) == ["quant.weight.bits="]
    assert complete(form.format("evaluate checkp")) == ["checkpoint="]
    prefix = "qatlab." if "-m qatlab." in form else ""
    assert complete(form.format("fi")) == [prefix + command for command in COMMANDS]


def test_what_may_come_next_is_an_option_and_no_folder_of_the_package(complete):
    found = complete("python -m qatlab.fit recipe=light_qat ")
    assert {"recipe=", "model=", "data=", "quant/", "fit."} <= set(found)
    assert [word for word in found if word[-1] not in "=./"] == ["hydra"]
    assert [word for word in found if word.endswith("/")] == ["quant/"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qatlab fit \"data.shards='/a b/{0..3}.tar'\" --cfg job recipe=ptq fit.st", ["fit.steps="]),
        ("qatlab fit -m recipe=ptq,light_qat seed=1,2 quant/ac", ["quant/act="]),
        ("qatlab fit 'data.shards=/a", []),
        ("qatlab fitt recipe=", []),
        ("qatlab sweep ", list(WORDS)),
        ("python -m qatlab.sweep plan sweep=", [f"sweep={name}" for name in recipe_files("sweep")]),
    ],
)
def test_of_other_lines(complete, line, expected):
    assert complete(line) == expected


def test_after_a_sweep_its_options_and_those_of_every_run(complete):
    found = complete("qatlab sweep run sweep=paper jobs=2 slurm='--gres gpu' s")
    assert {"sweep=", "seed=", "suite="} <= set(found)
    assert complete("qatlab sweep run sweep=paper suite=cifar1")[-2:] == ["suite=cifar10", "suite=cifar100"]


def test_using_a_program_completes_nothing_that_it_refuses(complete):
    assert not {"recipe=", "quant/", "quant.", "optim.", "bench."} & set(complete("qatlab evaluate "))
    assert {"model=", "suite.", "fit.", "checkpoint="} <= set(complete("qatlab evaluate "))
    assert complete("qatlab evaluate fit.") == ["fit.workers="]
    assert not {"model=", "seed=", "data="} & set(complete("qatlab evaluate checkpoint=runs/a "))
    assert set(complete("python -m qatlab.bench ")) == {"hydra", "hydra.", "bench.", "checkpoint=", "trust="}


def test_choices_of_the_users_own_are_completed(complete, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\n")
    assert complete(f"qatlab fit --config-dir {tmp_path} recipe=mine") == ["recipe=mine"]


def test_a_shell_without_a_script_is_a_sentence(monkeypatch, capsys):
    monkeypatch.delenv("COMP_LINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["qatlab", "-sc", "install=csh"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "install=csh: -sc takes install= and one of bash, zsh, fish" in capsys.readouterr().err


# -- real shells ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Shell:
    """``shell(name, text)`` runs the text in that shell, with this Python as ``python`` and as ``qatlab``."""
    folder = tmp_path_factory.mktemp("bin")
    for name, arguments in (("python", ""), ("qatlab", "-m qatlab")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

    def run(name: str, text: str) -> subprocess.CompletedProcess[str]:
        if not shutil.which(name):
            pytest.skip(f"{name} is not installed")
        command = [name, "-c", text]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_bash_completes_a_word_after_its_break(shell):
    # As an interactive bash calls it, for which = and : end a word; its -sc install is the README's.
    module = "python -m qatlab.fit recipe"
    lines = {
        "qatlab fi": ("(qatlab fi) 1", ["fit "]),
        f"{module}=light_qat_l": (f"({module} = light_qat_l) 5", ["light_qat_lsq", "light_qat_lsq_pc"]),
        "python x.py a": ("(python x.py a) 2", []),
    }
    text = 'eval "$(python -m qatlab.fit -sc install=bash)"; COMP_WORDBREAKS=" =:"\n'
    for line, (words, _) in lines.items():
        array, _, at = words.rpartition(" ")
        text += f"COMP_WORDS={array} COMP_CWORD={at} COMP_LINE='{line}' COMP_POINT={len(line)} COMPREPLY=()\n"
        text += f"_qatlab {line.split()[0]}; printf '%s|' \"${{COMPREPLY[@]}}\"; echo\n"
    ended = shell("bash", f"{text}complete -p qatlab python")
    assert ended.stderr == ""
    *found, qatlab, python = ended.stdout.splitlines()
    assert [[word for word in line.split("|") if word] for line in found] == [words for _, words in lines.values()]
    assert "_qatlab qatlab" in qatlab
    assert "_qatlab python" in python


def test_fish_completes_both_forms(shell):
    text = "qatlab fit -sc install=fish | source\n"
    text += "for line in 'qatlab fi' 'python -m qatlab.fit recipe=pt'; complete -C $line; end"
    assert shell("fish", text).stdout.split() == ["fit", "recipe=ptq"]
