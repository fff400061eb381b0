"""Small floating-point formats, bit for bit against torchao, ml_dtypes and torch's casts, and against plain formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from embedded_images import embedded_images
from safetensors.torch import load_file
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
)

from qatlab.config import ModelConfig, compose
from qatlab.config.blocks import check_blocks
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.quantized import fitted_copy
from qatlab.quant import FP8, MX, NVFP4, MinMax, Quantizer, calibrate, layer_report, quant_layers, quantize, verify
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers.number_formats import FORMATS, power_of_two
from qatlab.results.run import Run
from qatlab.training.student import Student

PEERS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TORCHAO = {**TORCH, "e2m3": DTYPE_FP6_E2M3, "e3m2": DTYPE_FP6_E3M2, "e2m1": torch.float4_e2m1fn_x2}
MAKES: dict[str, Callable[..., Quantizer]] = {
    **{f"fp8_{name}": partial(FP8, name) for name in TORCH},
    **{f"mx_{name}_{how}": partial(MX, name, scaling=how) for name in FORMATS for how in ("floor", "rceil")},
    "nvfp4": NVFP4,
}
each_make = pytest.mark.parametrize("make", MAKES.values(), ids=list(MAKES))
each_format = pytest.mark.parametrize("name", list(FORMATS))
of_both = pytest.mark.parametrize("batched", [True, False], ids=["act", "weight"])


def spread(*shape: int, seed: int = 0) -> Tensor:
    """Values of many magnitudes, blocks of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp2(torch.randn(*shape, generator=generator) * 4)
    x.view(-1)[64:128] = 0
    return x


def fitted(make: Callable[..., Quantizer], x: Tensor, batched: bool) -> Quantizer:
    quantizer = make(channels=x.shape[-1] if batched else len(x), batched=batched)
    quantizer.observe(x)
    quantizer.fit()
    return quantizer


def numbers(name: str) -> Tensor:
    """All finite numbers of a format, float64, written out from its bits."""
    form = FORMATS[name]
    bias, found = 2 ** (form.exponent - 1) - 1, []
    for exponent, mantissa in itertools.product(range(2**form.exponent), range(2**form.mantissa)):
        fraction = mantissa / 2**form.mantissa
        found.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    kept = sorted({value for value in found if value <= form.largest})
    return torch.tensor([-value for value in kept[:0:-1]] + kept, dtype=torch.float64)


# -- numbers ---------------------------------------------------------------------------------------------------------


@each_format
def test_the_numbers_are_those_of_ml_dtypes_and_their_own_nearest(name: str) -> None:
    info, ours = ml_dtypes.finfo(PEERS[name]), numbers(name)
    assert (info.bits, info.nmant, float(info.max)) == (
        FORMATS[name].bits,
        FORMATS[name].mantissa,
        FORMATS[name].largest,
    )
    peers = np.arange(2**info.bits, dtype=np.uint8).view(PEERS[name]).astype(np.float64)
    assert sorted(set(peers[np.isfinite(peers)].tolist())) == ours.tolist()
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(FORMATS[name].rounded(ours.to(dtype)), ours.to(dtype))


@each_format
def test_values_inside_are_rounded_as_ml_dtypes_and_torch_do(name: str) -> None:
    form, ours = FORMATS[name], numbers(name)
    middles = (ours[1:] + ours[:-1]) / 2  # ties, and their neighbours in float32
    near = [torch.nextafter(middles.float(), torch.tensor(end)) for end in (-math.inf, math.inf)]
    x = torch.cat([middles.float(), *near, spread(20000).clamp(-form.largest, form.largest), ours.float()])
    expected = torch.from_numpy(x.numpy().astype(PEERS[name]).astype(np.float32))
    assert torch.equal(form.rounded(x), expected)
    assert torch.equal(form.rounded(x).signbit(), expected.signbit())
    if name in TORCH:
        assert torch.equal(form.rounded(x), x.to(TORCH[name]).float())
    # By brute force: no number is nearer, in float64.
    distance = (x.double()[:, None] - ours).abs().amin(1)
    assert torch.equal((form.rounded(x).double() - x.double()).abs(), distance)


@each_format
def test_beyond_the_largest_number_is_that_number(name: str) -> None:
    form = FORMATS[name]
    x = torch.tensor([1.01, 1.5, 2, 1e9, math.inf]) * form.largest
    x = torch.cat([x, -x])
    assert torch.equal(form.rounded(x), x.sign() * form.largest)
    if name in TORCH:
        finite = x[x.isfinite()]
        saturated = finite.clamp(-form.largest, form.largest).to(TORCH[name]).float()
        assert torch.equal(form.rounded(finite), saturated)
    assert form.rounded(torch.tensor([math.nan])).isnan().all()
    assert form.rounded(torch.tensor([1.0]).double()).dtype == torch.float64


@each_format
def test_the_limit_is_where_one_more_number_would_be_nearer(name: str) -> None:
    ours = numbers(name)
    assert FORMATS[name].limit == float(ours[-1] + (ours[-1] - ours[-2]) / 2)
    assert 2.0 ** FORMATS[name].largest_exponent <= FORMATS[name].largest < 2.0 ** (FORMATS[name].largest_exponent + 1)


def test_powers_of_two() -> None:
    x = torch.tensor([0.0, 1, 1.0000001, 1.9999999, 2, 3, 2.0**-126, 1.5 * 2.0**-130, 3e38])
    for dtype in (torch.float32, torch.float64):
        values = x.to(dtype)
        logs = [math.log2(value) if value else -math.inf for value in values.double().tolist()]
        down = [2.0 ** max(math.floor(log), -127) if log > -math.inf else 2.0**-127 for log in logs]
        up = [2.0 ** min(max(math.ceil(log), -127), 127) if log > -math.inf else 2.0**-127 for log in logs]
        assert power_of_two(values).tolist() == down
        assert power_of_two(values, up=True).tolist() == up
    assert power_of_two(torch.tensor([8.0]), lower=5).item() == 2.0**-2
    assert power_of_two(torch.tensor([math.nan, math.inf])).isnan().all()


# -- whole quantizers against torchao ----------------------------------------------------------------------------------


@of_both
@pytest.mark.parametrize("name", list(TORCH))
def test_fp8_is_torchaos(name: str, batched: bool) -> None:
    seen, x = spread(6, 96), spread(6, 96, seed=1 if batched else 0)  # static activations meet what they have not seen
    quantizer = fitted(partial(FP8, name), seen, batched)
    scale = _choose_scale_float8(seen, [6, 96] if batched else [1, 96], TORCH[name])
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer.scale.reshape(-1), scale.reshape(-1))
    peer = _dequantize_affine_float8(_quantize_affine_float8(x, scale, TORCH[name]), scale)
    assert torch.equal(quantizer(x), peer)


@of_both
@pytest.mark.parametrize("how", ["floor", "rceil"])
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mx_is_torchaos(name: str, how: str, batched: bool, dtype: torch.dtype) -> None:
    x = spread(8, 96).to(dtype)
    quantizer = fitted(partial(MX, name, scaling=how), x, batched)
    scale, data = to_mx(x, TORCHAO[name], 32, ScaleCalculationMode[how.upper()])
    peer = to_dtype(data, scale, TORCHAO[name], 32, dtype)
    assert torch.equal(quantizer(x), peer)
    # to_mx gives blocks of zeros the byte 0, which is 2^-127.
    assert torch.equal(quantizer.grid(x)[0][:, ::32], scale.float().reshape(8, 3))


@of_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_torchaos(batched: bool, dtype: torch.dtype) -> None:
    seen, x = spread(8, 96).to(dtype), spread(8, 96, seed=2 if batched else 0).to(dtype)
    quantizer = fitted(NVFP4, seen, batched)
    of_tensor = per_tensor_amax_to_scale(seen.abs().max())
    assert torch.equal(quantizer.scale, of_tensor)
    peer = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=of_tensor)
    assert torch.equal(quantizer(x), peer.dequantize(dtype))
    assert torch.equal(quantizer.grid(x)[0][:, ::16], peer.scale.float().reshape(8, 6) * of_tensor)


@pytest.mark.parametrize("how", ["floor", "rceil"])
@each_format
def test_mx_against_a_loop_in_float64(name: str, how: str) -> None:
    x, ours = spread(3, 64).double(), numbers(name)
    result = fitted(partial(MX, name, scaling=how), x, True)(x)
    for row, block in itertools.product(range(3), range(2)):
        values = x[row, 32 * block : 32 * block + 32]
        largest = float(values.abs().max())
        power = math.floor(math.log2(largest)) - math.floor(math.log2(FORMATS[name].largest)) if largest else -127
        if how == "rceil" and largest:
            power = math.ceil(math.log2(largest / FORMATS[name].largest))
        nearest = ours[(values[:, None] / 2.0**power - ours).abs().argmin(1)]
        error = (nearest * 2.0**power - values).abs()
        assert torch.equal((result[row, 32 * block : 32 * block + 32] - values).abs(), error)
        assert how == "floor" or (values.abs() / 2.0**power <= FORMATS[name].largest).all()


# -- what every quantizer has -----------------------------------------------------------------------------------------


@each_make
@of_both
def test_a_state_dict_makes_the_same_twin_and_a_twin_is_on_the_grid(
    make: Callable[..., Quantizer], batched: bool
) -> None:
    x = spread(6, 96)
    quantizer = fitted(make, x, batched)
    fresh = make(channels=96 if batched else 6, batched=batched)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    assert set(quantizer.state_dict()) == (set() if isinstance(quantizer, MX) else {"step"})
    rows = quantizer.grid_rows(quantizer(x))
    assert rows.numel() == x.numel()
    assert max(len(row.unique()) for row in rows) <= 2**quantizer.bits
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))


@each_make
@of_both
def test_values_shapes_and_types_that_come(make: Callable[..., Quantizer], batched: bool) -> None:
    x = spread(6, 96)
    quantizer = fitted(make, x, batched)
    assert not quantizer(torch.zeros_like(x)).any()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert quantizer(x.to(dtype)).dtype == dtype
    broken = x.clone()
    broken[2, 5] = math.nan
    assert quantizer(broken)[2, 5].isnan()
    if batched:
        tokens = x.reshape(2, 3, 96)
        assert torch.equal(quantizer(tokens), quantizer(x).reshape(2, 3, 96))
        assert torch.equal(quantizer(tokens.transpose(0, 1)), quantizer(tokens).transpose(0, 1))
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="NaN or infinite"):
            quantizer.observe(torch.where(x == x.max(), bad, x))


@each_make
def test_an_uncalibrated_scale_is_an_error(make: Callable[..., Quantizer]) -> None:
    quantizer = make(channels=96, batched=True)
    if not isinstance(quantizer, MX):
        with pytest.raises(UserError, match="calibrate"):
            quantizer(spread(6, 96))
        with pytest.raises(UserError, match="nothing was observed"):
            quantizer.fit()
        return
    with pytest.raises(UserError, match="no scale of its own"):
        _ = quantizer.scale


@each_make
def test_the_gradient_passes_where_nothing_is_clipped(make: Callable[..., Quantizer]) -> None:
    seen = spread(6, 96)
    quantizer = fitted(make, seen, True)
    x = (seen * 4).requires_grad_()
    grad = torch.randn(6, 96, generator=torch.Generator().manual_seed(5))
    quantizer(x).backward(grad)
    if isinstance(quantizer, MX):
        assert torch.equal(x.grad, grad)
        return
    # Of FP8 the values beyond the absmax of calibration, of NVFP4 those of blocks beyond it: a constant end.
    scale = quantizer.grid(x)[0].double()
    inside = (x.detach().double() / scale).abs() <= quantizer.number.limit
    assert torch.equal(x.grad, torch.where(inside, grad, 0))
    assert 0 < int((~inside).sum()) < 100


def test_floor_clips_a_block_and_rceil_does_not() -> None:
    x = torch.linspace(0, 1.99, 32)[None]
    floor, rceil = (fitted(partial(MX, "e2m1", scaling=how), x, True) for how in ("floor", "rceil"))
    assert floor(x).max() == 1.5
    assert rceil(x).max() == 2
    assert int(floor.beyond(x).sum()) == int((x > 1.75).sum()) > 0
    assert not rceil.beyond(x).any()


# -- layers -----------------------------------------------------------------------------------------------------------


def test_a_convolution_has_blocks_of_input_channels_at_one_place_of_its_kernel() -> None:
    weight = spread(4, 64, 3, 3)
    for make in (partial(MX, "e4m3"), NVFP4):
        twin = fitted(make, weight, False)(weight)
        places = weight.permute(0, 2, 3, 1).reshape(4 * 9, 64)
        flat = fitted(make, places, False)(places)
        assert torch.equal(twin, flat.reshape(4, 3, 3, 64).permute(0, 3, 1, 2))
    layer = torch.nn.Sequential(torch.nn.Conv2d(64, 8, 3))
    model = quantize(layer, partial(MX, "e4m3"), partial(MX, "e4m3"))
    images = torch.randn(2, 64, 6, 6)
    calibrate(model, [images])
    expected = torch.nn.functional.conv2d(
        fitted(partial(MX, "e4m3"), images.movedim(1, -1), True)(images.movedim(1, -1)).movedim(-1, 1),
        model[0].weight_quantizer(model[0].weight),
        model[0].bias,
    )
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(("width", "slot"), [(40, "weight"), (40, "act"), (24, "weight")])
def test_a_width_that_blocks_do_not_divide_names_layer_and_remedy(width: int, slot: str) -> None:
    make = NVFP4 if width == 24 else partial(MX, "e2m1")
    model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, 32))
    slots = {"weight": None, "act": None, slot: make}
    with pytest.raises(UserError, match=rf"quant\.{slot} of 1: .* the layer has {width}.*quant\.rules=.*{slot}: null"):
        quantize(model, slots["weight"], slots["act"])
    quantize(model, slots["weight"], slots["act"], rules={"1": {slot: None}})
    assert list(quant_layers(model)) == ["0"]


def test_a_weight_that_comes_without_its_width_is_counted_then() -> None:
    with pytest.raises(UserError, match="the layer has 40"):
        MX("e2m1", channels=3, batched=False).observe(torch.ones(3, 40))


@each_make
def test_a_model_runs_trains_and_tells_of_its_layers(
    visual: torch.nn.Module, images: Tensor, make: Callable[..., Quantizer], train_a_little: Callable[..., list[float]]
) -> None:
    model = quantize(visual, make, make)
    calibrate(model, [images])
    bits = make(channels=32, batched=True).bits
    assert {row["bits"] for row in verify(model, images)} == {bits}
    for row in layer_report(model, images):
        assert row["weight_bits"] == row["act_bits"] == bits
        assert row["output_sqnr_db"] > 2
        assert row["weight_scale"] > 0
        assert row["act_scale"] > 0
    with torch.no_grad():
        folded = model.eval()(images)
    torch.testing.assert_close(folded, model(images).detach(), rtol=1e-5, atol=1e-5)
    for kernels in ("compiled", "eager"):
        prepare_training(model, kernels, "float")
    losses = train_a_little(model.train(), images, 1e-3)
    assert losses[-1] < losses[0]


@each_make
def test_integer_products_and_codes_are_refused(make: Callable[..., Quantizer]) -> None:
    model = quantize(torch.nn.Sequential(torch.nn.Linear(32, 32)), make, partial(MinMax, 8))
    with pytest.raises(UserError, match=r"quant\.weight of 0 does not have"):
        prepare_training(model, "eager", "int8")
    with pytest.raises(UserError, match=r"no integer codes: set quant\.matmul=float"):
        make(channels=32, batched=True).codes(torch.ones(2, 32))


def test_wrong_options_are_named() -> None:
    with pytest.raises(UserError, match="format"):
        FP8("e2m1", channels=4, batched=True)
    with pytest.raises(UserError, match="scaling"):
        MX("e2m1", channels=32, batched=True, scaling="even")


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp6_e2m3", "nvfp4"])
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(
    small_fit: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = [f"quant/weight={name}", f"quant/act={name}", "fit.steps=3", "fit.checkpoint_every=1", "fit.eval_every=0"]
    whole = small_fit("light_qat", tmp_path / "whole", *options)
    step = Student.training_step

    def failing(self: Student, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise RuntimeError("the power is gone")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "training_step", failing)
        with pytest.raises(RuntimeError, match="power"):
            small_fit("light_qat", tmp_path / "stopped", *options)
    resumed = small_fit("light_qat", tmp_path / "stopped", *options)
    assert resumed.rows() == whole.rows()
    files = [load_file(run.folder / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0] | files[1])
    before = load_file(whole.folder / "quantized.safetensors")
    assert any(not torch.equal(before[key], files[0][key]) for key in before)
    bits = {"fp8_e4m3": 8, "mxfp6_e2m3": 6, "nvfp4": 4}[name]
    assert {(row["weight_bits"], row["act_bits"]) for row in whole.rows() if row["stage"] == "adapted"} == {
        (bits, bits)
    }


@pytest.mark.parametrize("name", ["fp8_e5m2", "mxfp4", "nvfp4"])
def test_smoothquant_searches_with_a_format(name: str) -> None:
    clip = clips.load(ModelConfig())
    config = compose("recipe=smoothquant", f"quant/weight={name}", f"quant/act={name}").quant
    images = embedded_images(clip)
    model, _ = fitted_copy(clip.visual, config, lambda: [images])
    assert float(torch.cosine_similarity(model(images), clip.visual(images)).detach().min()) > 0.8


def test_a_plan_has_no_bits_to_choose() -> None:
    clip = clips.load(ModelConfig())
    config = compose("recipe=mixed_precision", "quant/weight=mxfp4").quant
    with pytest.raises(
        UserError, match=r"those of MX, the quant\.weight of .*, are fixed: choose another quant/weight"
    ):
        fitted_copy(clip.visual, config, lambda: [torch.zeros(2, 3, clip.preprocess.size, clip.preprocess.size)])


def test_a_format_has_no_option_bits() -> None:
    config = compose("recipe=ptq", "quant/weight=mxfp4", "+quant.weight.bits=4")
    with pytest.raises(UserError, match=r"quant\.weight\.bits is not an option"):
        check_blocks(config)
