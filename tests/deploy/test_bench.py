"""A bench of the embedded model: every form that is there, in its own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from encoders import made, plain_encoder
from PIL import Image

from qatlab.bench import bench
from qatlab.config import Config
from qatlab.core.errors import UserError
from qatlab.deploy.bench.bitsandbytes import replaced
from qatlab.deploy.bench.timing import Job, run
from qatlab.export import export
from qatlab.results.run import Run

Options = Callable[..., Config]


@pytest.mark.slow
@pytest.mark.usefixtures("rendered")
def test_every_form_is_timed_beside_full_precision(
    small: Options, small_fit: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = small_fit("ptq", tmp_path, "suite.images=8", "callbacks.temperature=null", "quant.weight.bits=7")
    options = [f"checkpoint={fitted.folder}", f"output={tmp_path}", "suite.images=8", "callbacks.temperature=null"]
    export(small("fp32", *options, "format=openvino"), "evaluate")
    path = bench(small("fp32", *options, "bench.batches=[1,2]", "bench.rounds=1"), "evaluate")
    found = pl.read_csv(path)
    kinds = ["fp32", "bf16", "simulated", "bnb_int8", "bnb_nf4", "openvino_fp32", "openvino_bf16", "openvino"]
    assert list(zip(found["kind"], found["batch"], strict=True)) == [
        (kind, batch) for kind in kinds for batch in (1, 2)
    ]
    assert (found["seconds"] > 0).all()
    held = dict(zip(found["kind"], found["memory_mib"], strict=True))
    assert all(0 < memory < 1000 for memory in held.values())
    assert len({*held.values()}) > 5
    sizes = dict(zip(found["kind"], found["file_mib"], strict=True))
    assert sizes["openvino"] < 0.5 * sizes["fp32"]
    assert sizes["bnb_int8"] is None
    assert "OpenVINO int8" in capsys.readouterr().out
    with Image.open(fitted.folder / "bench.png") as picture:
        assert picture.width > 500


@pytest.mark.slow
def test_what_a_process_dies_of_is_told() -> None:
    with pytest.raises(UserError, match=r"timing onnx failed: .*nowhere"):
        run(Job("onnx", "/nowhere", "/nowhere", 16, [1], 1, 1, "cpu"))


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("bench.device=tpu", "bench.device=tpu is unknown .did you mean 'cpu'.*there are cpu, cuda"),
        ("bench.rounds=0", "bench.rounds=0: it takes a whole number from 1 on"),
        ("bench.batches=[]", "it takes a list of one or more, each a whole number from 1 on"),
        pytest.param(
            "bench.device=cuda",
            "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_options_that_cannot_be_timed(
    small: Options, small_fit: Callable[..., Run], tmp_path: Path, option: str, sentence: str
) -> None:
    fitted = small_fit("ptq", tmp_path, "suite.images=4", "callbacks.temperature=null")
    with pytest.raises(UserError, match=sentence):
        bench(small("fp32", f"checkpoint={fitted.folder}", option), "evaluate")


@pytest.mark.parametrize(("kind", "off"), [("bnb_int8", 0.03), ("bnb_nf4", 0.3)])
def test_bitsandbytes_takes_the_place_of_every_linear_layer(kind: str, off: float) -> None:
    visual = plain_encoder(width=64)  # NF4 takes 64 weights at a time
    model = replaced(visual, kind).to("cpu")
    swapped = [
        type(module).__name__ for module in model.modules() if type(module).__module__.startswith("bitsandbytes")
    ]
    assert swapped == [{"bnb_int8": "Linear8bitLt", "bnb_nf4": "Linear4bit"}[kind]] * 8
    with torch.no_grad():
        found, reference = model(made(6)), visual(made(6))
    assert 0 < (found - reference).norm() <= off * reference.norm()
