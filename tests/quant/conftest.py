from __future__ import annotations

from functools import partial

import open_clip
import pytest
import torch

from qatlab.quant import LSQ, MinMax, calibrate, quantize


def tiny_visual(**vision: object) -> torch.nn.Module:
    torch.manual_seed(0)
    vision_cfg = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, **vision}
    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision_cfg, text_cfg=text_cfg).visual.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def build_visual():
    return tiny_visual


def five_steps(model: torch.nn.Module, images: torch.Tensor, lr: float) -> list[float]:
    """The losses of five steps of all that ``model`` learns."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    losses = []
    for _ in range(5):
        loss = (model(images) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def train_a_little():
    return five_steps


@pytest.fixture
def visual() -> torch.nn.Module:
    return tiny_visual()


@pytest.fixture
def quantized(images: torch.Tensor) -> torch.nn.Module:
    model = quantize(
        tiny_visual(), partial(LSQ, 8, per_channel=True), partial(MinMax, 8), patch_conv=True, final_proj=True
    )
    calibrate(model, [images])
    return model
