"""docs/EXTENDING.md: every example of it, used by its full name as the page says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from brief import BRIEF
from PIL import Image
from sklearn.metrics import roc_auc_score

from qatlab.config import ModelConfig, SetConfig, SuiteConfig, compose, load
from qatlab.config.blocks import check_blocks
from qatlab.core.errors import UserError
from qatlab.evaluate import evaluate
from qatlab.metrics.ood import ALL_SCORES, INPUTS, NEEDS, score_images
from qatlab.models import clip as clips
from qatlab.reports.numbers import table_numbers
from qatlab.results.identity import evaluation_id, run_id
from qatlab.results.run import Run
from qatlab.suites.suite import build_suite
from qatlab.training.objectives import Features, Objective

Fit = Callable[..., Run]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "EXTENDING.md"
EXAMPLES = dict(re.findall(r"```python\n# (my/\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
MARGIN, RELATIONS = "my.scores.margin", "{_target_: my.losses.relations, weight: 1.0}"


@pytest.fixture(scope="module", autouse=True)
def my(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files, from which they can be imported."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my").mkdir()
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "my"]:
        del sys.modules[name]


def test_the_page_has_an_example_of_each_kind() -> None:
    kinds = ("scores", "losses", "layouts", "evaluations", "loggers")
    assert list(EXAMPLES) == [f"my/{kind}.py" for kind in kinds]


# -- an OOD score --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(my: Path, small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a score and an evaluation of one's own."""
    return small_fit(
        "ptq",
        tmp_path_factory.mktemp("runs"),
        f"callbacks.ood.scores=[msp,{MARGIN}]",
        f"callbacks.predictions.scores=[{MARGIN}]",
        "+callbacks.pairs={_target_: my.evaluations.Pairs}",
    )


def test_an_ood_score_has_rows_under_its_full_name(scored: Run) -> None:
    rows = [row for row in scored.rows() if row["score"] == MARGIN]
    assert {(row["stage"], row["dataset"]) for row in rows} == {
        (stage, name) for stage in ("fp32", "quantized", "temperature") for name in ("near_ood", "noise")
    }
    values = pl.read_parquet(scored.folder / "predictions" / "fp32.parquet")
    sides = [values.filter(dataset=name)[MARGIN].to_numpy() for name in ("id", "near_ood")]
    truth = [1] * len(sides[0]) + [0] * len(sides[1])
    (row,) = (row for row in rows if (row["stage"], row["dataset"]) == ("fp32", "near_ood"))
    assert row["metrics"]["auroc"] == pytest.approx(roc_auc_score(truth, [*sides[0], *sides[1]]), abs=1e-12)
    assert row["temperature"] is None
    assert set(row["intervals"]) >= {"auroc", "fpr95_id_pos"}


def test_an_evaluation_has_the_rows_that_it_computes(scored: Run) -> None:
    rows = [row for row in scored.rows() if row["score"] == "pairs"]
    assert [(row["stage"], row["dataset"], row["n"]) for row in rows] == [
        (stage, "id", 32) for stage in ("fp32", "quantized", "temperature")
    ]
    assert all(0 < row["metrics"]["close"] < 1 for row in rows)


def test_what_is_scored_once_is_not_scored_again(
    scored: Run, small_fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    before = scored.results.read_bytes()
    small_fit(
        "ptq",
        scored.folder.parent,
        f"callbacks.ood.scores=[msp,{MARGIN}]",
        f"callbacks.predictions.scores=[{MARGIN}]",
        "+callbacks.pairs={_target_: my.evaluations.Pairs}",
    )
    assert "nothing left to compute" in capsys.readouterr().out
    assert scored.results.read_bytes() == before


def test_a_score_is_in_the_id_of_the_evaluation_by_its_name() -> None:
    plain, own = (compose("recipe=ptq", *more) for more in ([], [f"callbacks.ood.scores=[msp,{MARGIN}]"]))
    assert run_id(plain) == run_id(own)
    assert evaluation_id(plain) != evaluation_id(own)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("my.scores.margi", r"callbacks\.ood\.scores=my\.scores\.margi cannot be imported: .*did you mean 'margin'"),
        ("mine.margin", r"callbacks\.ood\.scores=mine\.margin cannot be imported: .*mine"),
        ("my.odd.asks", r"my\.odd\.asks asks for images, which no score is given; .*cosines, logit_scale"),
        ("my.odd.takes_nothing", r"my\.odd\.takes_nothing asks for nothing"),
        ("my.odd.NUMBER", r"my\.odd\.NUMBER cannot be called"),
        ("my.", r"scores=\[my\.\]: it takes .* or the full name of your own"),
        (".margin", r"scores=\[\.margin\]: it takes .* or the full name of your own"),
        ("margin", r"scores=\[margin\]: it takes .* or the full name of your own"),
        ("mcn", r"scores=\[mcn\]: it takes .*did you mean 'mcm'"),
    ],
)
def test_a_score_that_does_not_fit_is_told(my: Path, text: str, said: str) -> None:
    from qatlab.callbacks import OOD

    odd = "def asks(cosines, images): ...\ndef takes_nothing(k=3): ...\nNUMBER = 3\ndef wide(cosines): return cosines\n"
    (my / "my" / "odd.py").write_text(odd)
    with pytest.raises(UserError, match=said):
        OOD(scores=[text])


def test_a_score_gives_a_number_per_image(my: Path) -> None:
    (my / "my" / "wide.py").write_text("def wide(cosines): return cosines\n")
    with pytest.raises(ValueError, match=r"'my\.wide\.wide' gives \(4, 3\) for 4 images"):
        score_images(["my.wide.wide"], torch.ones(4, 3), 10.0, 1.0)


def test_inputs_are_what_qatlabs_own_scores_name() -> None:
    asked = {need for name in ALL_SCORES for need in NEEDS[name]}
    assert asked | {"temperature"} == set(INPUTS)


# -- an objective --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(my: Path, small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_fit(
        "light_qat",
        tmp_path_factory.mktemp("runs"),
        f"+objective.extra.relations={RELATIONS}",
        "objective.contrastive=0",
        *BRIEF,
    )


def test_using_b3_an_objective_that_reads_the_teacher_trains_and_its_rows_name_it(trained: Run) -> None:
    objectives = {row["stage"]: row["objective"] for row in trained.rows()}
    assert objectives["adapted"] == "1 relations"
    assert objectives["quantized"] is None
    curves = pl.read_csv(trained.folder / "metrics.csv")
    # The only term with the weight 1 is the loss, and the teacher that it reads has run.
    assert curves["train/relations"].drop_nulls().to_list() == curves["train/loss"].drop_nulls().to_list()
    assert all(value > 0 for value in curves["train/relations"].drop_nulls())


def test_an_objective_is_of_the_whole_batch_whatever_the_micro_batch(
    trained: Run, small_fit: Fit, tmp_path: Path
) -> None:
    parts = small_fit(
        "light_qat",
        tmp_path,
        f"+objective.extra.relations={RELATIONS}",
        "objective.contrastive=0",
        "fit.micro_batch=4",
        *BRIEF,
    )
    whole, cut = (pl.read_csv(run.folder / "metrics.csv")["train/relations"].drop_nulls() for run in (trained, parts))
    assert cut.to_list() == pytest.approx(whole.to_list(), rel=1e-4)
    assert parts.id == trained.id


def test_an_objective_is_in_the_run_id_by_its_name_and_options() -> None:
    base = compose("recipe=light_qat")
    texts = [RELATIONS, RELATIONS.replace("1.0", "2.0"), RELATIONS.replace("1.0", "1.0, margin: 0.1")]
    ids = [run_id(compose("recipe=light_qat", f"+objective.extra.relations={text}")) for text in texts]
    assert len({run_id(base), *ids}) == 4
    stored = compose("recipe=light_qat", f"+objective.extra.relations={RELATIONS}").objective.extra
    assert stored == {"relations": {"_target_": "my.losses.relations", "weight": 1.0}}


WRONG = {
    "relations={_target_: my.losses.relation, weight: 1}": r"cannot be imported.*did you mean 'relations'",
    "relations={_target_: my.losses.relations, weight: 1, margins: 2}": r"margins is not an option.*takes objective.*margin",
    "relations={_target_: my.losses.relations, weight: 1, margin: {_target_: os.getcwd}}": r"margin=\{.*: it takes a number",
    "relations={_target_: my.losses.relations}": r"objective\.extra\.relations\.weight=null: it takes a number from 0 on",
    "relations={_target_: my.losses.relations, weight: nan}": r"extra\.relations\.weight=nan: it takes a number from 0 on",
    "relations={_target_: my.losses.relations, weight: -1}": r"objective\.extra\.relations\.weight=-1: it takes a number from 0 on",
    "relations={_target_: my.losses.relations, weight: many}": r"weight=many: it takes a number from 0 on",
    "relations=1": r"objective\.extra\.relations=1: it takes a block with a _target_",
    "kl={_target_: my.losses.relations, weight: 1}": r"kl is a name of qatlab's own objectives",
    "old={_target_: my.old.by_batch, weight: 1}": r"extra\.old\.batch is missing: .*passes to it \(student, scale, teacher",
    "old={_target_: my.old.untrained, weight: 1}": r"extra\.old has no parameter student",
}


@pytest.mark.parametrize("text", WRONG)
def test_an_objective_that_does_not_fit_is_told_before_anything_is_computed(my: Path, text: str) -> None:
    (my / "my" / "old.py").write_text("def by_batch(batch): ...\ndef untrained(teacher): ...\n")
    config = compose("recipe=light_qat", f"+objective.extra.{text}")

    def checked() -> None:
        check_blocks(config)
        Objective(config.objective)

    with pytest.raises(UserError, match=WRONG[text]):
        checked()


def test_an_objective_gives_one_number(my: Path) -> None:
    (my / "my" / "rows.py").write_text("def each(student): return student.sum(1)\n")
    config = compose("recipe=light_qat", "+objective.extra.each={_target_: my.rows.each, weight: 1}")
    with pytest.raises(UserError, match=r"objective\.extra\.each gives a tensor \(2,\): an objective is one number"):
        Objective(config.objective)(
            Features(*[torch.ones(2, 3), torch.tensor(1.0)], captions=torch.ones(2, 3), caption_ids=torch.arange(2))
        )


def test_faults_s1_a_stored_objective_runs_no_code_unless_trusted(trained: Run) -> None:
    """Its module is not even imported."""
    config, _, _ = load(trained.folder / "config.yaml")
    assert config.objective.extra["relations"]["_target_"] == "my.losses.relations"
    for name in [name for name in sys.modules if name.partition(".")[0] == "my"]:
        del sys.modules[name]
    asked = [f"checkpoint={trained.folder}", "callbacks.temperature=null", "suite.images=32", "suite.resamples=0"]
    asked += ["trainer.accelerator=cpu", "fit.workers=0", "~suite.sets.far_ood", "wandb.mode=disabled"]
    with pytest.raises(
        UserError, match=r"asks for the class my\.losses\.relations as objective\.extra\.relations.*trust"
    ):
        evaluate(compose(*asked), "evaluate")
    assert "my.losses" not in sys.modules
    (run,) = evaluate(compose(*asked, "trust=true"), "evaluate")
    assert run.id == trained.id


# -- a layout ------------------------------------------------------------------------------------------------------------


def write_images(root: Path) -> None:
    """The same pictures as a folder per class, and in one folder with the class before the number."""
    for i in range(4):
        name = ("circle", "star")[i % 2]
        for file in (root / "folders" / name / f"{i}.png", root / "prefixed" / f"{name}-{i}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (20 * i,) * 3).save(file)


def suite_of(root: Path, layout: str) -> SuiteConfig:
    path = "folders" if layout == "auto" else "prefixed"
    entry = SetConfig(path=path, role="id", layout=layout)
    return SuiteConfig(root=str(root), sets={"shapes": entry}, class_names=["circle", "star"], resamples=0)


def test_a_layout_gives_the_rows_of_the_same_images_in_folders(tmp_path: Path) -> None:
    write_images(tmp_path)
    found: list[list[Any]] = []
    for layout in ("auto", "my.layouts.Prefixed"):
        asked = [f"output={tmp_path / layout}", "callbacks.temperature=null", "callbacks.refits=null"]
        config = compose(*asked, "trainer.accelerator=cpu", "fit.workers=0", "wandb.mode=disabled")
        config.suite = suite_of(tmp_path, layout)
        (run,) = evaluate(config, "evaluate")
        found.append([(row["dataset"], row["score"], row["n"], row["metrics"]) for row in run.rows()])
    assert found[0][0][:3] == ("shapes", "zero_shot", 4)
    assert sorted(found[0], key=str) == sorted(found[1], key=str)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("my.layouts.Prefix", r"suite\.sets\.shapes\.layout=my\.layouts\.Prefix cannot be imported.*'Prefixed'"),
        ("my.scores.margin", r"layout=my\.scores\.margin is no layout: expected a subclass of qatlab\.data\.Layout"),
        ("qatlab.data.Files", r"layout=qatlab\.data\.Files is no layout: .* with a kind"),
        ("prefixed", r"layout=prefixed is unknown.*full name of a class of your own"),
    ],
)
def test_a_layout_that_is_none_is_told(tmp_path: Path, layout: str, said: str) -> None:
    write_images(tmp_path)
    with pytest.raises(UserError, match=said):
        build_suite(suite_of(tmp_path, layout), clips.load(ModelConfig()))


# -- a logger ------------------------------------------------------------------------------------------------------------


def test_a_logger_gets_options_curves_and_the_numbers_of_the_table(small_fit: Fit, tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    done = small_fit("light_qat", tmp_path, f"logger=[csv,{{_target_: my.loggers.Lines, path: {file}}}]")
    first, *lines = file.read_text().splitlines()
    assert first == f"light_qat {done.id}"
    assert lines[0].startswith("0 {")
    assert "'train/loss'" in file.read_text()
    last = eval(lines[-1].removeprefix("2 "))
    (adapted,) = (
        row for row in done.rows() if (row["stage"], row["dataset"], row["score"]) == ("adapted", "id", "zero_shot")
    )
    assert last["id/top-1 %/adapted"] == 100 * adapted["metrics"]["top1"]
    assert {name.rpartition("/")[2] for name in last} == {"FP32", "quantized", "adapted", "after temperature"}


def test_the_numbers_of_ones_own_scores_and_evaluations_are_among_them(scored: Run) -> None:
    numbers = table_numbers(scored.rows())
    stored = {(row["stage"], row["dataset"], row["score"]): row["metrics"] for row in scored.rows()}
    assert numbers[f"near_ood/OOD, {MARGIN} auroc/FP32"] == 100 * stored["fp32", "near_ood", MARGIN]["auroc"]
    assert numbers["id/pairs, close/quantized"] == stored["quantized", "id", "pairs"]["close"]
    assert not any("refit_none" in name or "logit_scale_fit" in name for name in numbers)
