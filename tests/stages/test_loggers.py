from __future__ import annotations

import csv
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qatlab.config import WandbConfig, compose
from qatlab.config.blocks import check_blocks
from qatlab.config.explain import explain
from qatlab.core.errors import UserError
from qatlab.results.curves import merge_curves
from qatlab.results.run import Run
from qatlab.stages import loggers as run_loggers
from qatlab.stages.loggers import MODES, Curves, TensorBoard, Wandb, build_loggers, check_loggers, wandb_mode
from qatlab.stages.loggers import _tags as tags_of
from qatlab.sweeps.compositions import Composition, initialized

ID_TOP1 = ("id", "zero_shot")


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


def test_a_full_disk_takes_no_curves_that_were_written_before(tmp_path: Path, monkeypatch: Any) -> None:
    curves = Curves(tmp_path)
    curves.log_metrics({"loss": 3.0}, step=1)
    curves.save()
    (path,) = tmp_path.rglob("metrics.csv")
    before = path.read_bytes()
    curves.log_metrics({"loss": 2.0, "kept": 0.5}, step=2)  # a new name: Lightning writes the whole file again
    rows = csv.DictWriter.writerows

    def full(self: Any, lines: Any) -> None:
        rows(self, lines)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", full)
        with pytest.raises(UserError, match=r"metrics\.csv could not be written, the disk"):
            curves.save()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]
    curves.finalize("failed")
    merged = merge_curves(tmp_path)
    assert merged is not None
    with merged.open() as file:
        assert list(csv.DictReader(file)) == [
            {"step": "1", "kept": "", "loss": "3.0"},
            {"step": "2", "kept": "0.5", "loss": "2.0"},
        ]


def test_a_full_disk_is_a_sentence_where_no_file_is_known() -> None:
    assert "make room on the disk" in str(explain(OSError(errno.ENOSPC, "No space left on device")))
    assert explain(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None


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
    assert isinstance(curves, Curves)
    assert isinstance(online, Wandb)
    assert online._offline
    assert (online.name, online.version) == ("p", run.id)
    assert Path(online.save_dir) == run.folder
    assert list(run.folder.iterdir()) == []  # nothing before the first value


def test_disabled_leaves_csv_alone(tmp_path, login):
    loggers, _ = build(tmp_path, "wandb.mode=disabled")
    assert [type(logger) for logger in loggers] == [Curves]
    assert login.calls == []


def test_using_a3_a_run_without_training_is_logged_as_well(tmp_path):
    loggers, _ = build(tmp_path, "fit.steps=0", "wandb.mode=offline")
    assert [type(logger) for logger in loggers] == [Curves, Wandb]


@pytest.mark.parametrize(
    ("logger", "kinds"),
    [
        ("csv", [Curves]),
        ("wandb", [Curves, Wandb]),
        ("tensorboard", [Curves, TensorBoard]),
        ("[tensorboard,wandb]", [Curves, TensorBoard, Wandb]),
        ("[csv,tensorboard]", [Curves, TensorBoard]),
    ],
)
def test_loggers_are_chosen_beside_the_csv(tmp_path, login, logger, kinds):
    loggers, run = build(tmp_path, f"logger={logger}", "wandb.mode=offline")
    assert [type(logger) for logger in loggers] == kinds
    assert list(run.folder.iterdir()) == []
    assert login.calls == []


def test_only_the_first_process_logs(tmp_path, login, monkeypatch):
    monkeypatch.setattr(run_loggers, "is_first", lambda: False)
    loggers, _ = build(tmp_path, "logger=[tensorboard,wandb,{_target_: nothing.Here}]", "wandb.mode=online")
    assert [type(logger) for logger in loggers] == [Curves]
    assert login.calls == []


def test_tensorboard_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"tensorboard is not installed.*pip install 'qatlab\[tensorboard\]'"):
        build(tmp_path, "logger=tensorboard")


WRONG = {
    "logger=wandbb": r"logger=wandbb: it takes csv \| wandb \| tensorboard or a block .*did you mean 'wandb'",
    "logger=null": r"logger=null: it takes csv \| wandb",
    "logger=0": r"logger=0: it takes csv \| wandb",
    "logger=[]": r"logger=\[\]: it takes .* or a list of one or more",
    "logger=[csv,1]": r"logger=\[csv, 1\]: it takes csv \| wandb",
    "logger=[wandb,wandb]": r"logger names wandb twice",
    "logger={}": r"logger=\{\}: it takes a block with a _target_",
    "logger={_target_: nothing.Here}": r"logger\._target_=nothing\.Here cannot be imported",
    "logger={_target_: pathlib.Path}": r"logger: pathlib\.Path is no logger: expected a subclass of Lightning's Logger",
    "wandb.project=a/b": r"wandb\.project=a/b cannot be taken: Invalid project name",
    "wandb.project=''": r"wandb\.project=: it takes text",
    "wandb.name=''": r"wandb\.name=: it takes text or null",
    "wandb.notes=''": r"wandb\.notes=: it takes text or null",
    "wandb.tags=['']": r"wandb\.tags=\[\]: it takes a list, each text",
    f"wandb.tags=[{'x' * 65}]": r"wandb\.tags holds 'x+': W&B takes texts of at most 64 characters",
}


@pytest.mark.parametrize("option", WRONG)
def test_faults_6_what_no_logger_takes_is_told_before_anything_is_scored(tmp_path, option):
    def opened() -> None:
        check_blocks(compose("recipe=light_qat", option))
        build(tmp_path, "wandb.mode=offline", option)

    with pytest.raises(UserError, match=WRONG[option]):
        opened()


def test_faults_7_wandb_that_is_asked_for_and_left_out_is_told():
    for mode in ("online", "offline"):
        with pytest.raises(
            UserError, match=rf"wandb\.mode={mode}, but logger=tensorboard leaves W&B out: add wandb to it"
        ):
            check_loggers(compose("recipe=ptq", "logger=tensorboard", f"wandb.mode={mode}"))
    check_loggers(compose("recipe=ptq", "logger=[tensorboard,wandb]", "wandb.mode=offline"))
    check_loggers(compose("recipe=ptq", "logger=tensorboard"))


VALUES = ("0", "-1", "nan", "inf", "1e30", "''", "null", "true", "[1]", "[null]", "[[1]]", "{a: 1}", "text")
OPTIONS = ("logger", "trust", "wandb", *(f"wandb.{entry.name}" for entry in fields(WandbConfig)))


def told(composition: Composition, option: str) -> str | None:
    """The sentence on an option whose loggers cannot be made, None where they can."""
    try:
        config = composition.with_values([OverridesParser.create().parse_override(option)])
        check_blocks(config)
        build_loggers(config, Run(config, "ptq"), "ptq")
    except (UserError, HydraException, OmegaConfBaseException) as error:  # those that a command tells as a sentence
        return explain(error)
    return None


@pytest.mark.parametrize("option", OPTIONS)
def test_faults_5_any_value_is_a_sentence_or_has_a_meaning(tmp_path, option):
    with initialized(None):
        composition = Composition(["recipe=ptq", f"output={tmp_path}"])
        sentences = {value: told(composition, f"{option}={value}") for value in VALUES}
    assert [sentence for sentence in sentences.values() if sentence and option not in sentence] == []
    accepted = {value for value, sentence in sentences.items() if sentence is None}
    # Texts are texts, whatever they look like.
    texts = {*VALUES} - {"''", "null", "[1]", "[null]", "[[1]]", "{a: 1}"}
    null = {"null"} if option.removeprefix("wandb.") in ("entity", "group", "name", "notes") else set()
    meaning = {"trust": {"0", "-1", "true"}, "wandb.tags": {"[1]"}}
    nothing = ("wandb", "wandb.mode", "logger")
    assert accepted == (set() if option in nothing else meaning.get(option, texts | null))


def test_a_long_name_of_a_model_is_cut_to_what_a_tag_holds():
    tags = tags_of(compose("recipe=ptq", f"model.name={'very-' * 20}long", "wandb.tags=[mine,W8A8]"))
    assert tags[0] == ("very-" * 20 + "long")[-64:]
    assert tags[1:] == ["W8A8", "seed 0", "mine"]


# -- TensorBoard ---------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_curves_results_table_and_pictures(tmp_path, small_fit):
    done = small_fit("light_qat_lsq", tmp_path, "logger=tensorboard", "wandb.notes='https://h/?sig=secret'")
    events = EventAccumulator(str(done.folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    curves = read(done.folder / "metrics.csv")
    for name in ("train/loss", "layers/c_fc/output_sqnr_db", "grad_norm/total"):
        drawn = {event.step: event.value for event in events.Scalars(name)}
        assert drawn == pytest.approx({step: values[name] for step, values in curves.items() if name in values})
    assert [event.step for event in events.Scalars("probe/id@16/zero_shot/top1")] == [0, 1, 2]
    top1 = {row["stage"]: row["metrics"]["top1"] for row in done.rows() if (row["dataset"], row["score"]) == ID_TOP1}
    assert events.Scalars("id/top-1 %/adapted")[-1].value == pytest.approx(100 * top1["adapted"])
    assert events.Scalars("id/top-1 %/after temperature")[-1].value == pytest.approx(100 * top1["temperature"])
    assert {"reliability", "curves"} <= set(events.Tags()["images"])
    (text,) = events.Tensors("results/text_summary")
    assert b"top-1 %" in text.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.summary_metadata
    options = (done.folder / "tensorboard" / "hparams.yaml").read_text()
    assert "quant.weight.bits: 8" in options
    assert "secret" not in options
    assert not (done.folder / "wandb").exists()


def test_a_folder_that_reads_as_a_variable_is_the_folder(tmp_path):
    logger = TensorBoard(tmp_path / "$HOME", {})
    logger.log_metrics({"x": 1.0}, 0)
    logger.finalize("success")
    assert list((tmp_path / "$HOME" / "tensorboard").iterdir())


def test_a_wrong_word_is_told_without_training_too(tmp_path):
    with pytest.raises(UserError, match=r"wandb\.mode=ofline is unknown \(did you mean 'offline'\?\)"):
        build(tmp_path, "fit.steps=0", "wandb.mode=ofline")


# -- curves --------------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: dict[int, dict[str, float]]) -> None:
    """One process' curves, as a run writes them."""
    logger = Curves(folder)
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


def test_the_parts_are_removed_and_a_later_process_goes_on_from_the_whole(tmp_path):
    write(tmp_path, {0: {"loss": 1.0}, 1: {"loss": 0.5}})
    merge_curves(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert merge_curves(tmp_path) == tmp_path / "metrics.csv"
    write(tmp_path, {1: {"loss": 0.25}, 2: {"loss": 0.125}})
    merged = merge_curves(tmp_path)
    assert merged is not None
    assert read(merged) == {0: {"loss": 1.0}, 1: {"loss": 0.25}, 2: {"loss": 0.125}}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_part_that_is_damaged_stays_aside(tmp_path):
    write(tmp_path, {0: {"loss": 1.0}})
    write(tmp_path, {1: {"loss": 0.5}})
    (tmp_path / "curves/version_1/metrics.csv").write_bytes(b"\x00\xff")
    merged = merge_curves(tmp_path)
    assert merged is not None
    assert read(merged) == {0: {"loss": 1.0}}
    assert [path.parent.name for path in (tmp_path / "curves").rglob("metrics*")] == ["version_1"]


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


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["recipe=ptq", "quant.weight.bits=4"], "W4A8"),
        (["recipe=ptq", "+quant.rules={*.c_proj: {weight: {bits: 4}, act: {bits: 5}}}"], "W8A8+rules"),
        (["recipe=mixed_precision"], "W8A8+plan"),
        (["recipe=fp32"], None),
    ],
)
def test_using_a10_a_tag_says_where_layers_may_have_other_bits(overrides: list[str], expected: str | None):
    bits = [tag for tag in tags_of(compose(*overrides)) if tag.startswith("W")]
    assert bits == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("argument", "kept"), [("data.shards=/data/{0..3}.tar", True), ("data.shards=https://h/0.tar?sig=x", False)]
)
def test_faults_s4_wandb_gets_no_command_line_with_a_secret_in_it(
    monkeypatch: pytest.MonkeyPatch, argument: str, kept: bool
) -> None:
    monkeypatch.setattr("sys.argv", ["fit.py", argument])
    assert run_loggers._settings(offline=True).x_disable_meta is not kept
