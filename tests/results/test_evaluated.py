"""Every suite has a folder of its own for the evaluation of an unquantized model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest

from qatlab.config import Config, compose, flat
from qatlab.results.evaluated import evaluated_run
from qatlab.results.run import Run


@pytest.fixture(scope="module")
def base() -> Config:
    return compose()


@pytest.fixture
def config(base: Config, tmp_path: Path) -> Config:
    found = copy.deepcopy(base)
    found.output = str(tmp_path)
    return found


def row(name: str) -> dict[str, object]:
    return {
        "stage": "fp32",
        "step": 0,
        "dataset": name,
        "definition": "d",
        "score": "accuracy",
        "prompts": None,
        "metrics": {},
    }


def on(config: Config, **suite: object) -> Config:
    changed = copy.deepcopy(config)
    for name, value in suite.items():
        setattr(changed.suite, name, value)
    return changed


def test_using_b6_two_suites_of_one_model_have_two_folders_and_one_id(config: Config) -> None:
    one, other = evaluated_run(config, "evaluate"), evaluated_run(on(config, seed=1), "evaluate")
    assert one.folder != other.folder
    assert one.id == other.id
    assert one.folder.name.startswith("evaluate-")
    assert one.folder.name.endswith(f"-{one.id}")
    with one, other:  # at once, in two folders with a lock each
        pass
    # How a suite is scored makes no other suite of it.
    assert evaluated_run(on(config, batch_size=3, cache=True, resamples=7), "evaluate").folder == one.folder
    scores = copy.deepcopy(config)
    scores.callbacks["ood"]["scores"] = ["msp"]
    assert evaluated_run(scores, "evaluate").folder == one.folder


def test_using_b6_a_folder_of_an_earlier_release_that_holds_the_evaluation_is_used(config: Config) -> None:
    with Run(config, "evaluate") as earlier:
        earlier.describe("evaluate")
        earlier.append([row("id")])
    assert evaluated_run(config, "evaluate").folder == earlier.folder
    assert evaluated_run(on(config, seed=1), "evaluate").folder != earlier.folder
    # Evaluations that were added to it later are known by their rows.
    with Run(on(config, seed=2), "evaluate") as added:
        added.append([row("other")])
    assert added.folder == earlier.folder
    assert evaluated_run(on(config, seed=2), "evaluate").folder == earlier.folder
    # Nobody moves back into it from a folder of one's own.
    with evaluated_run(on(config, seed=3), "evaluate") as own:
        own.append([row("id")])
    with Run(on(config, seed=3), "evaluate") as late:
        late.append([row("late")])
    assert evaluated_run(on(config, seed=3), "evaluate").folder == own.folder


def test_using_b6_options_that_came_later_do_not_hide_an_earlier_evaluation(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(flat(dataclasses.asdict(config)))
    stored = {key: value for key, value in options.items() if not key.endswith((".numbers", ".outside"))}
    monkeypatch.setattr(Run, "rows", lambda run: [{"config": stored}])
    assert evaluated_run(config, "evaluate").folder.name == f"evaluate-{Run(config, 'evaluate').id}"
    changed = on(config, sets=copy.deepcopy(config.suite.sets))
    changed.suite.sets["id"].numbers = "own"
    assert evaluated_run(changed, "evaluate").folder.name != f"evaluate-{Run(config, 'evaluate').id}"
