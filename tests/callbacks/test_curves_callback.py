"""What is logged while training, against values computed by hand; and that looking changes nothing."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qatlab.callbacks.curves import Curves, gradient_norms, layer_means, learned_scales
from qatlab.config import Config
from qatlab.core.signals import StopSignals
from qatlab.models.quantized import quantized_copy
from qatlab.quant import LSQ, layer_report
from qatlab.quant.layers.walk import quant_layers
from qatlab.results.curves import merge_curves
from qatlab.results.run import Run
from qatlab.stages import train as training
from qatlab.stages.opening import open_experiment
from qatlab.stages.quantize import quantize_towers

Options = Callable[..., Config]
KINDS = ("in_proj", "out_proj", "c_fc", "c_proj")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Trained:
    """A small experiment, trained with a Curves of its own (unless ``watched`` is false) and with ``others``."""

    def __init__(
        self,
        options: Options,
        folder: Path,
        *overrides: str,
        recipe: str = "light_qat_lsq",
        watched: bool = True,
        others: Sequence[L.Callback] = (),
    ) -> None:
        self.config = options(recipe, f"output={folder}", *overrides)
        self.calls = 0
        with Run(self.config, recipe) as self.run, StopSignals() as stop:
            self.experiment = experiment = open_experiment(self.config, self.run, recipe, stop)
            if "quantized" in experiment.stages:
                quantize_towers(experiment)
            usual = training._callbacks
            watching = [*([Curves(self.images)] if watched else []), *others]
            with pytest.MonkeyPatch.context() as patch:  # in place of the run's own Curves
                kept = [callback for callback in usual(experiment) if not isinstance(callback, Curves)]
                patch.setattr(training, "_callbacks", lambda _: [*kept, *watching])
                training.train(experiment)
        self.file = merge_curves(self.run.folder)

    def images(self) -> Tensor:
        self.calls += 1
        return self.experiment.captions.normalized(4)

    @property
    def visual(self) -> nn.Module:
        return self.experiment.towers.student.visual

    @property
    def curves(self) -> dict[int, dict[str, float]]:
        assert self.file is not None
        with self.file.open() as file:
            return {
                int(line.pop("step")): {name: float(value) for name, value in line.items() if value}
                for line in csv.DictReader(file)
            }


@pytest.fixture(scope="module")
def trained(small: Options, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Three steps with per-tensor LSQ, a probe after the second only, on scales that move fast."""
    return Trained(small, tmp_path_factory.mktemp("trained"), "fit.steps=3", "fit.eval_every=2", "optim.scale_lr=0.01")


def start(trained: Trained) -> nn.Module:
    """The student before its first step, from the file that the run keeps of it."""
    visual = quantized_copy(trained.experiment.towers.full.visual, trained.config.quant)
    visual.load_state_dict(load_file(trained.run.folder / "quantized.safetensors"))
    return visual


# -- what is measured ------------------------------------------------------------------------------------------------


def test_every_curve_is_there_against_step(trained: Trained) -> None:
    curves = trained.curves
    each = {f"grad_norm/{name}" for name in ("total", "weights", "vectors", "scales")}
    moved = {
        f"scale/{kind}/{t}/{m}" for kind in KINDS for t in ("weight", "act") for m in ("log_ratio", "abs_log_ratio")
    }
    columns = ("act_clipped", "weight_sqnr_db", "act_sqnr_db", "output_sqnr_db")
    layers = {f"layers/{kind}/{column}" for kind in KINDS for column in columns}

    def of(step: int) -> set[str]:
        return {name for name in curves[step] if name.startswith(("grad_norm/", "scale/", "layers/"))}

    assert of(0) == each | moved | layers
    assert of(1) == each | moved
    assert of(2) == each | moved | layers
    assert of(3) == moved
    assert {step for step in curves if "probe/id@16/zero_shot/top1" in curves[step]} == {0, 2}
    assert {step for step in curves if "train/loss" in curves[step]} == {0, 1, 2}
    assert trained.calls == 1


def test_scales_are_measured_from_where_they_started(trained: Trained) -> None:
    before, after = (quant_layers(visual) for visual in (start(trained), trained.visual))
    found = defaultdict(list)
    for name in before:
        for tensor in ("weight", "act"):
            old, new = (getattr(layers[name], f"{tensor}_quantizer").log_step.item() for layers in (before, after))
            found[f"scale/{name.split('.')[-1]}/{tensor}"].append(new - old)
    assert len(found) == 8
    curves = trained.curves
    for name, moved in found.items():
        assert curves[3][f"{name}/log_ratio"] == pytest.approx(sum(moved) / len(moved), abs=1e-6)
        assert curves[3][f"{name}/abs_log_ratio"] == pytest.approx(sum(map(abs, moved)) / len(moved), abs=1e-6)
        assert curves[0][f"{name}/abs_log_ratio"] == 0
        # AdamW's first step moves each log-scale by the learning rate, a little less where the gradient is near its epsilon
        assert 0.005 < curves[1][f"{name}/abs_log_ratio"] < 0.01001


def test_layers_are_those_of_the_report_at_that_step(trained: Trained) -> None:
    report = layer_report(start(trained), trained.images())
    for kind in KINDS:
        for column in ("act_clipped", "weight_sqnr_db", "act_sqnr_db", "output_sqnr_db"):
            values = [row[column] for row in report if row["kind"] == kind]
            assert len(values) == 4
            assert trained.curves[0][f"layers/{kind}/{column}"] == pytest.approx(sum(values) / 4, rel=1e-6)
    assert trained.curves[0]["layers/c_fc/output_sqnr_db"] != trained.curves[2]["layers/c_fc/output_sqnr_db"]


def test_a_mean_leaves_out_what_is_not_quantized_or_has_no_error() -> None:
    row = {"kind": "c_fc", "act_clipped": 0.5, "weight_sqnr_db": 30.0, "act_sqnr_db": None, "output_sqnr_db": math.inf}
    other = row | {"act_clipped": 0.25, "weight_sqnr_db": math.inf, "kind": "c_fc"}
    assert layer_means([row, other]) == {"layers/c_fc/act_clipped": 0.375, "layers/c_fc/weight_sqnr_db": 30.0}


class Norms(L.Callback):
    """The gradient's norms in float64 before the trainer clips it, and, from AdamW's first moment, after."""

    def __init__(self) -> None:
        self.before: list[dict[str, float]] = []
        self.clipped = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        squares = {
            group["name"]: sum(float(p.grad.double().square().sum()) for p in group["params"])
            for group in optimizer.param_groups
        }
        squares["total"] = sum(squares.values())
        self.before.append({name: math.sqrt(value) for name, value in squares.items()})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            moments = [state["exp_avg"].double() for state in trainer.optimizers[0].state.values()]
            self.clipped = 10 * math.sqrt(sum(float(moment.square().sum()) for moment in moments))


def test_the_gradient_is_the_one_before_clipping(small: Options, tmp_path: Path) -> None:
    norms = Norms()

    curves = Trained(small, tmp_path, "fit.grad_clip=1e-3", others=[norms]).curves
    assert len(norms.before) == 2
    for step, expected in enumerate(norms.before):
        for name, value in expected.items():
            assert curves[step][f"grad_norm/{name}"] == pytest.approx(value, rel=1e-5)
        assert expected["total"] > 2e-3
    assert norms.clipped == pytest.approx(1e-3, rel=1e-3)


def test_norms_of_groups_without_a_gradient_are_left_out() -> None:
    used, unused = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"name": "a", "params": [used]}, {"name": "b", "params": [unused]}], lr=0.1)
    assert gradient_norms(optimizer) == {}
    used.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert {name: float(value) for name, value in gradient_norms(optimizer).items()} == {
        "grad_norm/total": 5,
        "grad_norm/a": 5,
    }


def test_scales_that_are_not_learned_do_not_move(small: Options, tmp_path: Path) -> None:
    done = Trained(small, tmp_path, "quant/weight=minmax")
    assert set(learned_scales(done.visual)) == {f"{kind}/act" for kind in KINDS}
    for quantizer in done.visual.modules():
        if isinstance(quantizer, LSQ):
            quantizer.log_step.requires_grad_(False)
    assert learned_scales(done.visual) == {}
    names = {name for values in done.curves.values() for name in values}
    assert not any(name.startswith("scale/") and "/weight/" in name for name in names)
    assert "layers/c_fc/weight_sqnr_db" in names


def test_a_model_without_quantizers_has_gradients_only(small: Options, tmp_path: Path) -> None:
    done = Trained(small, tmp_path, "quant.weight=null", "quant.act=null", recipe="light_qat")
    names = {name for values in done.curves.values() for name in values}
    assert {"grad_norm/total", "grad_norm/weights", "grad_norm/vectors"} <= names
    assert not any(name.startswith(("scale/", "layers/")) for name in names)
    assert done.calls == 0


# -- what it must not do ---------------------------------------------------------------------------------------------


def test_training_comes_out_the_same_to_the_last_bit(small: Options, trained: Trained, tmp_path: Path) -> None:
    same = ("fit.steps=3", "fit.eval_every=2", "optim.scale_lr=0.01")
    without = Trained(small, tmp_path, *same, watched=False)
    assert without.calls == 0
    for (name, one), (other, two) in zip(
        trained.visual.state_dict().items(), without.visual.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name
    for step, values in without.curves.items():
        assert values.items() <= trained.curves[step].items()


def test_a_resumed_run_measures_from_the_same_start(small: Options, trained: Trained, tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("stopped")

    same = ("fit.steps=3", "fit.eval_every=2", "optim.scale_lr=0.01", "fit.checkpoint_every=1")
    with pytest.raises(RuntimeError, match="stopped"):
        Trained(small, tmp_path, *same, others=[Stop()])
    assert list(tmp_path.rglob("*.ckpt"))
    curves = Trained(small, tmp_path, *same).curves
    for step in (2, 3):
        expected = {name: value for name, value in trained.curves[step].items() if name.startswith("scale/")}
        assert len(expected) == 16
        assert {name: curves[step][name] for name in expected} == pytest.approx(expected, abs=1e-7)


def test_only_rank_zero_pays_for_the_report(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step)))
    module = trained.experiment.towers.student
    monkeypatch.setattr(module, "probed_step", 5)  # one that is made up for
    curves = Curves(trained.images)
    for rank_zero in (False, True):
        trainer: Any = SimpleNamespace(is_global_zero=rank_zero, loggers=[logger])
        curves.on_validation_start(trainer, module)
        assert [step for _, step in logged] == ([5] if rank_zero else [])
