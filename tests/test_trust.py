"""What is read back is data: a stranger's run, file or sweep builds no class that was not asked for, and runs no command."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from brief import BRIEF, with_options
from hydra.utils import get_object
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qatlab
from qatlab import cli
from qatlab.config import OF_CALL, QUANT_SLOTS, Config, compose, load, recipe_files
from qatlab.config.trust import BLOCKS, blocks_of, name_targets, targets
from qatlab.core.errors import UserError
from qatlab.deploy.runtimes import load as load_export
from qatlab.evaluate import evaluate
from qatlab.export import export
from qatlab.fit import fit
from qatlab.models.quantized import QUANTIZED, TRAINED, load_quantized
from qatlab.results.run import Run

Fit = Callable[..., Run]

# A quantizer of the user's own, absmax by another name; it kills its process once step 2 is on disk, if told to.
MINE = """
import os, signal
from pathlib import Path
from qatlab.quant import MinMax

class Own(MinMax):
    def forward(self, x):
        if os.environ.get("STRIKE") and list(Path(os.environ["STRIKE"]).glob("*/checkpoints/step=2.ckpt")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
"""
EVIL = """
from pathlib import Path
Path("{mark}").touch()
class Quantizer: pass
"""


@pytest.fixture(scope="module")
def ptq(small_fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_fit("ptq", tmp_path_factory.mktemp("runs"), "callbacks.temperature=null")


@pytest.fixture
def stranger(ptq: Run, tmp_path: Path) -> Path:
    """A copy of a finished run that may be tampered with."""
    return Path(shutil.copytree(ptq.folder, tmp_path / ptq.folder.name))


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the module ``evil`` makes when it is imported."""
    (tmp_path / "evil.py").write_text(EVIL.format(mark=tmp_path / "mark"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return tmp_path / "mark"


@pytest.fixture(autouse=True)
def nothing_named() -> Iterator[None]:
    """Each test begins, and ends, with a call that names no class."""
    name_targets([], None)
    yield
    name_targets([], None)


def scoring(folder: Path, *overrides: str) -> Config:
    sets = ["~suite.sets.far_ood", *(f"~suite.sets.{name}" for name in ("fog", "gray", "outline", "blur"))]
    small = ["suite.images=16", "suite.resamples=0", "trainer.accelerator=cpu", "wandb.mode=disabled", "fit.workers=0"]
    return compose(f"checkpoint={folder}", "callbacks.temperature=null", *sets, *small, *overrides)


def edit(folder: Path, old: str, new: str) -> None:
    """Change the stored options, and take their checksum off as whoever edits them may."""
    file = folder / "config.yaml"
    text = file.read_text().partition("\n# checksum")[0] + "\n"
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_table_holds_what_recipes_name_and_what_exists() -> None:
    for recipe in recipe_files():
        assert targets(compose(f"recipe={recipe}")) <= BLOCKS
    for slot in QUANT_SLOTS:
        for name in recipe_files(f"quant/{slot}"):
            assert targets(compose("recipe=ptq", f"quant/{slot}={name}")) <= BLOCKS
    for target in BLOCKS:
        assert isinstance(get_object(target), type)


# -- a stranger's run ----------------------------------------------------------------------------------------------------

TAMPERED = {
    "data": ("_target_: qatlab.data.rendered.RenderedShards", "_target_: evil.Quantizer"),
    "a quantizer": ("_target_: qatlab.quant.MinMax", "_target_: evil.Quantizer"),
    "a call": ("_target_: qatlab.quant.MinMax", "_target_: os.system\n    command: 'touch mark'"),
    "torch": ("_target_: qatlab.data.rendered.RenderedShards", "_target_: torch.load\n  f: notes.pt"),
    "an objective": ("extra: {}", "extra: {mine: {_target_: evil.Quantizer, weight: 1.0}}"),
    "a private one": ("_target_: qatlab.quant.MinMax", "_target_: qatlab.quant.quantizers.minmax.subprocess.Popen"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_faults_s1_a_strangers_run_builds_nothing_of_its_own(stranger: Path, mark: Path, kind: str) -> None:
    edit(stranger, *TAMPERED[kind])
    with pytest.raises(
        UserError, match=r"config\.yaml asks for the class .* Name it on the command line or .*trust=true"
    ):
        evaluate(scoring(stranger), "evaluate")
    assert not mark.exists()


def test_faults_s1_below_a_block_nothing_is_built(stranger: Path, mark: Path) -> None:
    edit(stranger, "samples: 64", "samples: {_target_: evil.Quantizer}")
    with pytest.raises(UserError, match=r"data\.samples=\{.*\}: it takes a whole number"):
        evaluate(scoring(stranger), "evaluate")
    assert not mark.exists()


NOT_READ = {
    "a logger": ("logger: wandb", "logger: {_target_: evil.Quantizer}"),
    "an evaluation": ("_target_: qatlab.callbacks.Calibration", "_target_: evil.Quantizer"),
    "a score": ("    - msp", "    - evil.Quantizer"),
    "a layout": ("layout: auto", "layout: evil.Quantizer"),
}


def test_faults_s1_what_a_strangers_run_was_scored_and_watched_by_is_not_read(stranger: Path, mark: Path) -> None:
    for old, new in NOT_READ.values():
        edit(stranger, old, new)
    (run,) = evaluate(scoring(stranger), "evaluate")
    assert not mark.exists()
    assert "zero_shot" in {row["score"] for row in run.rows()}


def test_faults_s1_the_suite_of_a_strangers_run_is_read_by_no_class_of_its_own(stranger: Path, mark: Path) -> None:
    edit(stranger, *NOT_READ["a layout"])
    with pytest.raises(UserError, match=r"asks for the class evil\.Quantizer as suite\.sets\.\w+\.layout.*trust=True"):
        qatlab.features(qatlab.open_run(stranger), "id")
    assert not mark.exists()
    # Trusted, it is looked at, and is no layout. A rendered set has none, but the option is asked for all the same.
    assert qatlab.features(qatlab.open_run(stranger), "id", trust=True).shape[1] == 64


def test_faults_s1_trust_is_never_read_from_a_file(stranger: Path, mark: Path) -> None:
    edit(stranger, *TAMPERED["a quantizer"])
    edit(stranger, "output:", "trust: true\noutput:")
    with pytest.raises(UserError, match="asks for the class evil"):
        evaluate(scoring(stranger), "evaluate")
    assert not mark.exists()
    assert "trust" in OF_CALL  # which is what a run does not store


def test_faults_s1_trust_in_a_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults: [ptq, _self_]\ntrust: true\n"
    )
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for arguments, code in (["recipe=mine"], 2), (["recipe=mine", "trust=true"], 0):
        monkeypatch.setattr(sys, "argv", ["fit.py", "--config-dir", str(tmp_path), *arguments])
        ended: Any = 0
        try:
            cli.main(lambda config, recipe: None)
        except SystemExit as end:
            ended = end.code
        assert ended == code
    assert "trust=true stands in a file: it is for the command line" in capsys.readouterr().err


LIVE = {
    "an interpolation": ("recipe: ptq", "recipe: ${oc.env:HOME}", "holds an interpolation"),
    "aliases": ("recipe: ptq", "a: &a [1, 1]\nb: [*a, *a]\nrecipe: ptq", "holds an alias"),
    "a python object": (
        "recipe: ptq",
        "recipe: !!python/object/apply:os.system ['touch mark']",
        "is damaged, or",
    ),
    "a recipe elsewhere": ("recipe: ptq", "recipe: ../../ptq", "no run of qatlab is called so"),
    "an id that is a path": ("run_id: ", "run_id: ../", "no run of qatlab is called so"),
    "another option": ("recipe: ptq", "recipe: ptq\nunknown: 1", "is damaged, or"),
    "no mapping": ("recipe: ptq", "- recipe", "is damaged, or"),
}


@pytest.mark.parametrize("kind", LIVE)
def test_faults_s1_stored_options_are_plain_values(stranger: Path, kind: str) -> None:
    old, new, said = LIVE[kind]
    edit(stranger, old, new)
    with pytest.raises(UserError, match=rf"config\.yaml.*{said}"):
        load(stranger / "config.yaml")


def test_faults_s1_a_stored_command_is_not_run(stranger: Path, tmp_path: Path) -> None:
    shards = f"_target_: qatlab.data.CaptionShards\n  shards: ['pipe:touch {tmp_path}/mark']"
    edit(stranger, "_target_: qatlab.data.rendered.RenderedShards", shards)
    with pytest.raises(UserError, match=r"names the command 'pipe:touch .*add trust=true"):
        evaluate(scoring(stranger), "evaluate")
    assert not (tmp_path / "mark").exists()


# -- a stranger's file ---------------------------------------------------------------------------------------------------


def retold(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write the file anew with another description of how it was quantized, and no checksum, as earlier releases did."""
    with safe_open(file, "pt") as stored:
        about = json.loads(stored.metadata()["qatlab"])
    change(about)
    save_file(load_file(file), file, {"qatlab": json.dumps(about)})
    return file


def test_faults_s2_a_file_builds_nothing_of_its_own(stranger: Path, mark: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        about["quant"]["weight"] = {"_target_": "evil.Quantizer"}

    file = retold(stranger / QUANTIZED, change)
    with pytest.raises(UserError, match=r"quantized\.safetensors asks for the class evil\.Quantizer as quant\.weight"):
        load_quantized(file)
    assert not mark.exists()
    # Trusted, it is looked at like any other block, and this one is no quantizer.
    with pytest.raises(UserError, match=r"quant\.weight\.|evil|takes"):
        load_quantized(retold(file, lambda about: about["quant"]["weight"].update(bits=8)), trust=True)
    assert mark.exists()


def test_faults_s2_below_a_block_nothing_is_built(stranger: Path, mark: Path) -> None:
    def change(about: dict[str, Any]) -> None:
        about["quant"]["weight"]["bits"] = {"_target_": "evil.Quantizer"}

    with pytest.raises(UserError, match=r"quant\.weight\.bits=.*: it takes a whole number"):
        load_quantized(retold(stranger / QUANTIZED, change))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change", [lambda a: a.pop("quant"), lambda a: a["quant"].update(x=1), lambda a: a.update(tower=3)]
)
def test_faults_s2_another_description_is_a_sentence(stranger: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(UserError, match="does not say how it was quantized in words of this release"):
        load_quantized(retold(stranger / QUANTIZED, change))


def test_faults_s2_what_fit_reads_back_is_looked_at_too(
    stranger: Path, mark: Path, small: Callable[..., Config]
) -> None:
    """A run that was begun by somebody else, and is gone on with."""

    def change(about: dict[str, Any]) -> None:
        about["quant"]["act"] = {"_target_": "evil.Quantizer"}

    retold(stranger / QUANTIZED, change)
    (stranger / "results.jsonl").unlink()
    with pytest.raises(UserError, match=r"asks for the class evil\.Quantizer as quant\.act"):
        fit(small("ptq", f"output={stranger.parent}", "callbacks.temperature=null"), "ptq")
    assert not mark.exists()


# -- one's own quantizer -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_faults_s1_ones_own_quantizer_is_killed_resumed_evaluated_and_exported(
    tmp_path: Path,
    small_options: list[str],
    python: str,
    subprocess_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    own = tmp_path / "my"
    (own / "quant" / "weight").mkdir(parents=True)
    (own / "quant" / "weight" / "mine.yaml").write_text("# Mine.\n_target_: mine.Own\nbits: 8\n")
    line = ["--config-dir", str(own), "recipe=light_qat", "quant/weight=mine", "callbacks.temperature=null"]
    trained = ["fit.steps=4", "fit.batch_size=8", "fit.unique_samples=16", "fit.checkpoint_every=1", "fit.eval_every=0"]
    line += [f"output={tmp_path / 'runs'}", *with_options(small_options, *BRIEF, *trained), "quant.kernels=eager"]
    environment = {**subprocess_environment, "STRIKE": str(tmp_path / "runs")}
    killed = subprocess.run(
        [python, "-m", "qatlab.fit", *line], env=environment, cwd=tmp_path, capture_output=True, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    (folder,) = (tmp_path / "runs").iterdir()
    assert list((folder / "checkpoints").glob("*.ckpt"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def called(task: Any, *arguments: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [f"{task.__name__}.py", *arguments])
        code: Any = 0
        try:
            cli.main(task)
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    code, said = called(fit, *line)
    assert code == 0, said
    assert "training on from step=" in said
    mine = importlib.import_module("mine").Own
    named = ["--config-dir", str(own)]
    sets = [option for option in small_options if option.startswith("~suite.sets")]
    checkpoint = [f"checkpoint={folder}", "trainer.accelerator=cpu", "suite.resamples=0", "wandb.mode=disabled"]
    checkpoint += ["callbacks.temperature=null", "fit.workers=0", "suite.images=8", "~suite.sets.noise", *sets]
    for task in (evaluate, export):
        # A call that does not name the class builds nothing of it.
        code, said = called(task, *checkpoint)
        assert (code, "asks for the class mine.Own as quant.weight" in said) == (2, True)
        for allowed in ["trust=true"], named:
            code, said = called(task, *allowed, *checkpoint, *(["format=onnx", "exact=true"] if task is export else []))
            assert code == 0, said

    name_targets([], None)
    with pytest.raises(UserError, match=r"asks for the class mine\.Own"):
        load_quantized(folder)
    encoder = load_quantized(folder / TRAINED, trust=True)
    assert any(isinstance(module, mine) for module in encoder.modules())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact = encoder(images).numpy()
    assert abs(load_export(folder / "export" / "onnx")(images.numpy()) - exact).max() < 0.3 * abs(exact).max()


def test_blocks_are_found_by_their_keys() -> None:
    config = compose("recipe=light_qat_lsq", "callbacks.ood=null")
    assert blocks_of(config)["callbacks.ood"] is None
    assert blocks_of(config)["quant.weight"]["_target_"] == "qatlab.quant.LSQ"
    name_targets(["quant.weight._target_=mine.One", "+callbacks.x={_target_: mine.Two}"], None)
