"""CPUs without VNNI add products of bytes in sixteen bits: who is refused, and what is exact on all of them."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from encoders import EXACT, built, made
from folders import exported_folder, signed, written

from qatlab import deploy
from qatlab.core.errors import UserError
from qatlab.deploy import certified
from qatlab.deploy.cpu import lacks_vnni
from qatlab.deploy.formats import onnx as onnx_format
from qatlab.deploy.formats import openvino as openvino_format
from qatlab.deploy.integer import integer_copy, integer_layers
from qatlab.deploy.parity import LayerParity, compare_layers
from qatlab.deploy.saturation import cut_off, extreme_codes, wide_layers
from qatlab.deploy.stored import features_of, telling_layer
from qatlab.quant import MinMax
from qatlab.stages import export as packaging

REFUSED = r"does not compute here what it did where it was certified: .* the outputs of transformer\."


def vpmaddubsw(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product of uint8 (M, K) and int8 (N, K) as the instruction has it, a pair at a time: (M, N)."""
    sums = np.zeros((len(codes), len(weight)), np.int64)
    for m in range(len(codes)):
        for n in range(len(weight)):
            for k in range(0, codes.shape[1], 2):
                pair = int(codes[m, k]) * int(weight[n, k]) + int(codes[m, k + 1]) * int(weight[n, k + 1])
                sums[m, n] += min(max(pair, -(2**15)), 2**15 - 1)
    return sums


def test_training_f1_what_is_cut_off_is_what_the_instruction_does() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (5, 12), dtype=np.uint8)
    weight = generator.integers(-128, 128, (7, 12), dtype=np.int8)
    weight[0], codes[0] = 127, 255
    exact = codes.astype(np.int64) @ weight.astype(np.int64).T
    lost = cut_off(torch.from_numpy(codes), torch.from_numpy(weight)).numpy()
    assert np.array_equal(exact + lost, vpmaddubsw(codes, weight))
    assert np.count_nonzero(lost) > 5
    narrow = np.clip(weight, -64, 64).astype(np.int8)
    assert not cut_off(torch.full((3, 12), 255, dtype=torch.uint8), torch.from_numpy(narrow)).any()


def test_training_f1_the_stored_input_has_the_largest_sums() -> None:
    weight = torch.randint(-128, 128, (40, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes = extreme_codes(weight)
    assert codes.shape == (16, 64)
    sums = vpmaddubsw(codes.numpy(), np.clip(weight.numpy(), -64, 64)).max()
    other = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert sums > vpmaddubsw(other.numpy(), np.clip(weight.numpy(), -64, 64)).max()
    lost = [float(cut_off(given, weight).abs().amax(1).mean()) for given in (codes, other)]
    assert lost[0] > 2 * lost[1]


@pytest.mark.parametrize("name", ["absmax", "per tensor", "zero point", "lsq", "lsq_plus", "rotation"])
def test_training_f1_one_layer_shows_what_is_cut_off_and_nothing_else(name: str) -> None:
    slots = EXACT["absmax" if name == "rotation" else name]
    simulated = built(
        {**slots, "weight": partial(slots["weight"].func, 8, **slots["weight"].keywords)}, name == "rotation"
    )
    integer = integer_copy(simulated)
    layer = telling_layer(simulated, integer, made(2))
    assert layer.name in wide_layers(integer)
    assert layer.lost > 50 * layer.limit
    of = integer_layers(integer)[layer.name]
    x = torch.from_numpy(layer.x)
    with torch.no_grad():
        assert set(of.rounded(x).unique().tolist()) <= {of.zero, 255}  # on the grid: no rounding that may go either way
        codes = of.rounded(x).reshape(-1, x.shape[-1]).numpy()
        right = (codes.astype(np.int64) - of.zero) @ of.codes.long().numpy().T
        cut = vpmaddubsw(codes, of.codes.numpy()) - of.zero * of.codes.long().numpy().sum(1)
        bias = 0.0 if of.shell.bias is None else of.shell.bias.numpy()
    outputs = [of.scale * of.scales.numpy() * sums + bias for sums in (right, cut)]
    assert np.linalg.norm(outputs[1] - outputs[0]) / np.linalg.norm(outputs[0]) == pytest.approx(layer.lost, rel=1e-3)


@pytest.mark.parametrize("bits", [4, 7])
def test_training_f1_weights_of_seven_bits_lose_nothing(bits: int) -> None:
    simulated = built(signed(bits))
    integer = integer_copy(simulated)
    assert wide_layers(integer) == []
    assert telling_layer(simulated, integer, made(2)).lost == 0


@pytest.mark.parametrize("slots", [signed(8), {**signed(8), "act": partial(MinMax, 8, symmetric=False)}])
def test_training_f1_unsigned_weights_are_the_simulation_on_every_machine(
    slots: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever CPU this is: in integers, and to the last bits."""
    simulated = built(slots)
    integer = integer_copy(simulated)
    path = onnx_format.write(integer, tmp_path, 16, exact=True)
    assert onnx_format.integer_products(path) == 8
    found = compare_layers(simulated, made(16), onnx_format.LayerModels(path, integer).part)
    assert all(layer.product_error <= 1e-6 and layer.mismatch <= 1e-3 for layer in found)
    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = {node.input[0]: node.input[2] for node in graph.node if node.op_type == "DequantizeLinear"}
    for name, layer in integer_layers(integer).items():
        stored = tensors[f"{name}.codes"]
        assert stored.dtype == np.uint8
        assert np.array_equal(stored.astype(int) - tensors[zeros[f"{name}.codes"]][:, None], layer.codes.numpy())
    # OpenVINO takes such weights apart and multiplies floats: that is no product of integers.
    assert openvino_format.OpenVinoModel(path, 1).integer_products()[1] == 0


def test_training_f1_exact_in_another_format_asks_for_seven_bits() -> None:
    with pytest.raises(
        UserError, match=r"exact=true, and 8 layers have weights of more than 7 bits .*quant.weight.bits=7"
    ):
        packaging._require_narrow(integer_copy(built(signed(8))), "openvino")
    packaging._require_narrow(integer_copy(built(signed(7))), "openvino")


def test_training_f1_an_export_where_sums_are_cut_off_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = [LayerParity("visual.c_fc", 0.1, 0.1, 0.0, True)]
    for lacks, told in ((True, "has no VNNI .* format=onnx exact=true"), (False, r"parity\.csv has every layer\.$")):
        monkeypatch.setattr(packaging, "lacks_vnni", lambda lacks=lacks: lacks)
        with pytest.raises(UserError, match=told):
            packaging._require_layers(off, 1, tmp_path, ["visual.c_fc"])


# -- where it is opened -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bits", "exact"), [("onnx", 8, True), ("onnx", 7, False), ("openvino", 7, False)])
def test_training_f1_an_exact_export_is_accepted_on_this_machine(
    tmp_path: Path, form: str, bits: int, exact: bool
) -> None:
    folder = exported_folder(tmp_path / "export", form, bits, exact)
    with np.load(folder / "check.npz") as stored:
        found = deploy.load(folder, 1)(stored["images"])
        np.testing.assert_allclose(found, stored["features"], atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_training_f1_a_signed_export_is_accepted_where_nothing_is_cut_off(tmp_path: Path, form: str) -> None:
    folder = exported_folder(tmp_path / "export", form)
    if not lacks_vnni():
        deploy.load(folder, 1)
        return
    with pytest.raises(UserError, match=REFUSED):
        deploy.load(folder, 1)
    with pytest.warns(UserWarning, match=REFUSED):
        assert deploy.load(folder, 1, allow_inexact=True)(made(2).numpy()).shape == (2, 24)


@pytest.mark.qemu
@pytest.mark.skipif(platform.machine() != "x86_64", reason="qemu-x86_64 emulates another machine for this one's Python")
def test_training_f1_a_cpu_without_vnni_refuses_the_signed_export_and_takes_the_exact_one(
    tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        if "qemu" in os.environ.get("QATLAB_REQUIRE", "").split(","):
            pytest.fail("QATLAB_REQUIRE=qemu, and there is no qemu-x86_64: apt-get install qemu-user")
        pytest.skip("no qemu-x86_64 (Debian's qemu-user)")
    folders = {
        exported_folder(tmp_path / "signed", "onnx"): True,
        exported_folder(tmp_path / "signed-ov", "openvino"): True,
        exported_folder(tmp_path / "unsigned", "onnx", exact=True): False,
        exported_folder(tmp_path / "seven-ov", "openvino", bits=7): False,
    }
    program = [
        qemu,
        "-cpu",
        "Haswell",
        sys.executable,
        str(Path(__file__).parent / "under_qemu.py"),
        *map(str, folders),
    ]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=subprocess_environment)
    told = dict(json.loads(line) for line in done.stdout.splitlines())
    assert told.keys() == {str(folder) for folder in folders}, done.stderr[-2000:]
    for folder, refused in folders.items():
        assert ("does not compute here what it did" in told[str(folder)]) is refused, told[str(folder)]


def test_training_f1_without_qemu_the_test_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that says so cannot pass by leaving the processor out."""
    test = test_training_f1_a_cpu_without_vnni_refuses_the_signed_export_and_takes_the_exact_one
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("QATLAB_REQUIRE", "slurm,qemu")
    with pytest.raises(pytest.fail.Exception, match="there is no qemu-x86_64"):
        test(Path(), {})
    monkeypatch.delenv("QATLAB_REQUIRE")
    with pytest.raises(pytest.skip.Exception):
        test(Path(), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_folder(tmp_path_factory.mktemp("exports") / "onnx", bits=7)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "onnx"))


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())


def test_training_f1_the_limit_is_half_the_distance_from_full_precision(folder: Path) -> None:
    stored, check = dict(np.load(folder / "check.npz")), about(folder)["check"]
    from encoders import plain_encoder

    with torch.no_grad():
        full = plain_encoder()(torch.from_numpy(stored["images"])).numpy()
    off = np.sqrt(((stored["features"] - full) ** 2).sum() / (stored["features"] ** 2).sum())
    assert check["limit"] == pytest.approx(off / 2, rel=1e-4)


def test_training_f1_two_right_programs_of_a_deep_encoder_are_within_the_limit() -> None:
    """There rounding moves features by more than half of what quantization does: nobody right is refused."""
    images = made(6)
    fp32, noise = np.ones((6, 8), np.float32), np.eye(6, 8, dtype=np.float32)

    class Given(torch.nn.Module):
        def __init__(self, values: np.ndarray) -> None:
            super().__init__()
            self.values = torch.from_numpy(values)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.values

    found = fp32 + 0.10 * noise
    _, check = features_of(lambda _: found, Given(fp32 - 0.10 * noise), Given(fp32), images)
    assert check["limit"] == pytest.approx(1.5 * check["rounding"])
    _, check = features_of(lambda _: found, Given(found + 0.01 * noise), Given(fp32), images)
    assert check["limit"] > 4 * check["rounding"]


def test_training_f1_features_that_differ_are_refused_though_every_layer_is_right(copied: Path) -> None:
    stored = dict(np.load(copied / "check.npz"))
    limit = about(copied)["check"]["limit"]
    for share, refused in ((0.5, False), (2.0, True)):
        off = stored["features"] * (1 + share * limit)
        np.savez(copied / "check.npz", **{**stored, "features": off})
        written(copied, about(copied))
        if refused:
            with pytest.raises(UserError, match=r"on the stored input the features are .* off, and at most"):
                deploy.load(copied)
        else:
            deploy.load(copied)


def test_training_f1_features_that_are_no_numbers_are_refused() -> None:
    ones = np.ones((2, 3), np.float32)
    assert certified.difference(ones, 2 * ones) == pytest.approx(0.5)
    assert certified.difference(ones * np.nan, ones) == certified.difference(ones[:1], ones) == float("inf")


def test_training_f1_an_export_of_before_is_not_trusted(copied: Path) -> None:
    old = about(copied)
    old.pop("check")
    written(copied, old)
    with pytest.raises(UserError, match=r"has no stored input.*: export again .* allow_inexact=True"):
        deploy.load(copied)
    with pytest.warns(UserWarning, match="has no stored input"):
        deploy.load(copied, allow_inexact=True)


def test_training_f1_another_version_of_the_runtime_is_told(copied: Path, recwarn: pytest.WarningsRecorder) -> None:
    deploy.load(copied)
    assert not recwarn.list
    written(copied, about(copied), runtime="onnxruntime 0.1")
    with pytest.warns(UserWarning, match=r"was certified with onnxruntime 0\.1, and onnxruntime [1-9].* all the same"):
        deploy.load(copied)


def test_an_export_is_opened_without_torch(folder: Path, subprocess_environment: dict[str, str]) -> None:
    program = f"import sys; sys.modules['torch'] = None; from qatlab import deploy; deploy.load({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=subprocess_environment, check=False
    )
    assert done.returncode == 0, done.stderr
