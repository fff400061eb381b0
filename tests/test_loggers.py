from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger

from qatlab.config import compose
from qatlab.errors import UserError
from qatlab.loggers import MODES, Wandb, build_loggers, merge_curves, wandb_mode
from qatlab.results import Run


class Login:
    """Stands where wandb.login does: knows the key of the environment, asks and calls nobody."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> bool:
        self.calls.append(options)
        if self.error:
            raise self.error
        return bool(os.environ.get("WANDB_API_KEY"))


@pytest.fixture(autouse=True)
def login(monkeypatch) -> Iterator[Login]:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    login = Login()
    monkeypatch.setattr(wandb, "login", login)
    yield login
    assert all(call == {"prompt": False} for call in login.calls)  # never a question on the terminal


def test_auto_without_a_key_is_offline(login, capsys):
    assert wandb_mode("auto") == "offline"
    assert len(login.calls) == 1
    assert capsys.readouterr() == ("", "")


def test_auto_with_a_key_is_online(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode("auto") == "online"


def test_auto_stays_offline_where_the_key_is_not_accepted_and_says_so(login, capsys):
    login.error = wandb.errors.AuthenticationError("the service did not respond in time.")
    assert wandb_mode("auto") == "offline"
    assert capsys.readouterr().out == "W&B: the service did not respond in time; the curves are kept offline.\n"


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_auto_follows_the_environment(login, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode("auto") == mode
    assert login.calls == []


def test_the_option_beats_the_environment(login, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("offline") == "offline"
    assert login.calls == []


@pytest.mark.parametrize(("option", "variable"), [("online", ""), ("auto", "online")])
def test_online_without_a_key_is_an_error(monkeypatch, option, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    name = "WANDB_MODE" if variable else "wandb.mode"
    with pytest.raises(UserError, match=rf"^{name}=online, but no API key is configured: run `wandb login`"):
        wandb_mode(option)


def test_online_with_a_refused_key_gives_the_reason(login):
    login.error = wandb.errors.AuthenticationError("API key must have 40+ characters.")
    with pytest.raises(UserError, match=r"but API key must have 40\+ characters: run"):
        wandb_mode("online")


@pytest.mark.parametrize(("option", "variable", "named"), [("ofline", "", "wandb.mode"), ("auto", "of", "WANDB_MODE")])
def test_another_word_is_an_error(monkeypatch, option, variable, named):
    monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.raises(UserError, match=rf"^{named}={variable or option} is unknown") as caught:
        wandb_mode(option)
    assert all(mode in str(caught.value) for mode in MODES)


# -- the loggers of a run ------------------------------------------------------------------------------------------------


def build(tmp_path: Path, *overrides: str) -> tuple[list[Any], Run]:
    config = compose("recipe=light_qat", f"output={tmp_path}", *overrides)
    run = Run(config, "light_qat")
    run.folder.mkdir()
    return build_loggers(config, run, "light_qat"), run


def test_csv_is_always_written_and_wandb_beside_it(tmp_path):
    (curves, online), run = build(tmp_path, "wandb.mode=offline", "wandb.project=p")
    assert isinstance(curves, CSVLogger)
    assert isinstance(online, Wandb)
    assert online._offline
    assert (online.name, online.version) == ("p", run.id)
    assert Path(online.save_dir) == run.folder
    assert list(run.folder.iterdir()) == []  # nothing before the first value


def test_disabled_leaves_csv_alone(tmp_path, login):
    loggers, _ = build(tmp_path, "wandb.mode=disabled")
    assert [type(logger) for logger in loggers] == [CSVLogger]
    assert login.calls == []


def test_a_run_without_training_has_no_curves_and_asks_nobody(tmp_path, login):
    loggers, _ = build(tmp_path, "fit.steps=0", "wandb.mode=online")
    assert [type(logger) for logger in loggers] == [CSVLogger]
    assert login.calls == []


def test_a_wrong_word_is_told_without_training_too(tmp_path):
    with pytest.raises(UserError, match=r"wandb\.mode=ofline is unknown \(did you mean 'offline'\?\)"):
        build(tmp_path, "fit.steps=0", "wandb.mode=ofline")


# -- curves --------------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: dict[int, dict[str, float]]) -> None:
    """One process' curves, as Lightning writes them."""
    logger = CSVLogger(folder, name="curves")
    for step, metrics in rows.items():
        logger.log_metrics(metrics, step)
    logger.save()


def read(path: Path) -> dict[int, dict[str, float]]:
    with path.open() as file:
        return {
            int(line.pop("step")): {name: float(value) for name, value in line.items() if value}
            for line in csv.DictReader(file)
        }


def test_the_parts_of_an_interrupted_run_are_one_curve(tmp_path):
    first = {step: {"loss": 1.0 / (step + 1)} for step in range(6)} | {3: {"loss": 0.25, "probe/id/top1": 0.5}}
    second = {4: {"loss": 0.75}, 5: {"loss": 0.5, "probe/id/top1": 0.625}, 6: {"loss": 0.375}}
    write(tmp_path, first)
    write(tmp_path, second)
    merged = merge_curves(tmp_path)
    assert merged == tmp_path / "metrics.csv"
    assert read(merged) == first | second
    assert list(read(merged)) == list(range(7))


def test_a_step_keeps_the_values_that_the_later_part_does_not_have(tmp_path):
    write(tmp_path, {4: {"loss": 1.0, "probe/id/top1": 0.5}})
    write(tmp_path, {4: {"loss": 2.0}})
    merged = merge_curves(tmp_path)
    assert merged is not None
    assert read(merged) == {4: {"loss": 2.0, "probe/id/top1": 0.5}}


def test_ten_parts_are_merged_in_the_order_they_were_written_whatever_the_clocks_say(tmp_path):
    for part in range(11):  # version_10 sorts before version_2
        write(tmp_path, {0: {"loss": float(part)}})
        os.utime(tmp_path / f"curves/version_{part}/metrics.csv", (1000 - part, 1000 - part))
    merged = merge_curves(tmp_path)
    assert merged is not None
    assert read(merged) == {0: {"loss": 10.0}}


def test_without_curves_nothing_is_written(tmp_path):
    (tmp_path / "curves/version_0").mkdir(parents=True)
    (tmp_path / "curves/version_0/metrics.csv").touch()
    assert merge_curves(tmp_path) is None
    assert not (tmp_path / "metrics.csv").exists()


def test_a_run_outlives_wandbs_own_process(tmp_path, monkeypatch, capsys):
    class Gone:
        """wandb's run after its process was killed."""

        def log(self, _: object) -> None:
            raise ConnectionResetError(104, "Connection reset by peer")

        finish = log

    (_, logger), run = build(tmp_path, "wandb.mode=offline")
    logger._experiment = Gone()
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0}, step)
    assert logger.finish() is None
    said = capsys.readouterr().out
    assert said == f"W&B: [Errno 104] Connection reset by peer; the curves are kept in {run.folder / 'curves'}.\n"


def test_finishing_what_never_began_does_nothing(tmp_path):
    (_, logger), run = build(tmp_path, "wandb.mode=offline")
    assert logger.finish() is None
    assert list(run.folder.iterdir()) == []


def test_an_offline_run_leaves_the_mode_to_the_next_run_of_the_process(tmp_path, monkeypatch):
    """Lightning sets WANDB_MODE=dryrun for it, which the second cell of a sweep would take for the user's word."""
    for mode in (None, "offline", "dryrun"):
        if mode is not None:
            monkeypatch.setenv("WANDB_MODE", mode)
        (folder := tmp_path / str(mode)).mkdir()
        (_, offline), _ = build(folder, "wandb.mode=auto")
        offline.log_metrics({"x": 1.0}, step=0)
        offline.finish()
        assert os.environ.get("WANDB_MODE") == mode
        assert wandb_mode("auto") == "offline"
