"""Every family learns: two steps give a gradient to every learned tensor, of scales, zero points and low-rank factors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import FAMILIES, images, quantized
from torch import nn

from qatlab.quant import LSQ, LSQPlus, MinMax, quant_layers
from qatlab.quant.quantizers.lr_qat import LRQAT

QUICK = ("vit", "coca", "pe_core", "convnext", "resnet")
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def without_gradient(model: nn.Module, steps: int = 2) -> list[str]:
    """The names of learned tensors that got no gradient in any of some steps, or one that is not finite."""
    learned = {name: parameter for name, parameter in model.train().named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-4)
    seen, target = images(model, 2), torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    reached = set[str]()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(seen) - target).square().mean().backward()
        for name, parameter in learned.items():
            if parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any():
                reached.add(name)
        optimizer.step()
    return [name for name in learned if name not in reached]


@pytest.mark.parametrize("name", EACH)
def test_two_steps_of_learned_scales_and_offsets_reach_every_tensor(name: str) -> None:
    model = quantized(name, partial(LSQ, 4, per_channel=True), partial(LSQPlus, 4))
    learned = dict(model.named_parameters())
    for layer in quant_layers(model):
        assert {f"{layer}.weight_quantizer.log_step", f"{layer}.act_quantizer.log_step"} <= learned.keys()
    with torch.no_grad():
        for layer in quant_layers(model).values():
            # An offset has a gradient where values are clipped, and at first none is.
            layer.act_quantizer.log_step.sub_(0.7)  # type: ignore[union-attr, operator]
    # Softmax takes no notice of what is added to all logits alike, as a bias of keys does.
    missing = without_gradient(model)
    assert [name for name in missing if not name.endswith(("k_proj.bias", "k.bias"))] == []


@pytest.mark.parametrize("name", EACH)
def test_lr_qat_learns_low_rank_factors_of_convolutions_too(name: str) -> None:
    weight: Any = partial(LRQAT, 4, rank=1)
    model = quantized(name, weight, partial(MinMax, 8))
    assert all(isinstance(layer.weight_quantizer, LRQAT) for layer in quant_layers(model).values())
    # The second factor starts as zero, so the first one has no gradient before the second step.
    assert without_gradient(model) == []
