"""What a forward keeps against a count by hand and against the unquantized tower; what is free; how much goes at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.config import ModelConfig
from qatlab.models.clip import load
from qatlab.quant import LSQ, calibrate, quantize
from qatlab.quant.layers.linear import QuantLinear
from qatlab.quant.layers.trainable import prepare_training
from qatlab.quant.quantizers import kernels
from qatlab.training import memory
from qatlab.training.memory import SHARE, free_bytes, largest_micro_batch, saved_bytes

CPU = torch.device("cpu")
FLOAT = 4  # bytes

# -- what is kept ----------------------------------------------------------------------------------------------------


def kept(net: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: net(x), net.parameters())


def test_counted_by_hand() -> None:
    x = torch.randn(5, 8)
    assert kept(nn.Linear(8, 6), x) == 5 * 8 * FLOAT
    assert kept(nn.Linear(8, 6, bias=False).double(), x.double()) == 5 * 8 * 2 * FLOAT
    assert kept(nn.Sequential(nn.Linear(8, 6), nn.GELU()), x) == 5 * (8 + 6) * FLOAT
    assert kept(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)), x) == 5 * (8 + 6 + 6) * FLOAT
    assert kept(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), x) == 5 * (8 + 6) * FLOAT  # in both


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(10, 8)
    first, second = nn.Linear(8, 6), nn.Linear(8, 3)
    parameters = [*first.parameters(), *second.parameters()]
    assert saved_bytes(lambda: (first(x), second(x)), parameters) == 10 * 8 * FLOAT
    assert saved_bytes(lambda: (first(x), second(x.view(2, 5, 8))), parameters) == 10 * 8 * FLOAT
    assert saved_bytes(lambda: first(x[:2]), parameters) == 10 * 8 * FLOAT
    assert saved_bytes(lambda: (first(x), second(x.clone())), parameters) == 2 * 10 * 8 * FLOAT


def test_equal_ones_are_counted_as_many() -> None:
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
    inputs = torch.randn(3, 64)
    total = saved_bytes(lambda: [layer(inputs + i) for i, layer in enumerate(layers)], layers.parameters())
    assert total == 20 * 3 * 64 * FLOAT


def test_parameters_and_what_needs_no_gradient_are_left_out() -> None:
    net, x = nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: net(x), []) == (5 * 8 + 8 * 6) * FLOAT
    assert kept(net, x) == 5 * 8 * FLOAT
    assert kept(net.requires_grad_(False), x) == 0
    assert kept(net, x.detach()) == 0
    with torch.no_grad():  # a caller without gradients asks about training all the same
        assert kept(net.requires_grad_(True), x) == 5 * 8 * FLOAT


# -- the quantized tower ---------------------------------------------------------------------------------------------


@cache
def naive() -> type[LSQ]:
    """LSQ written with detach() alone; in a function, because a test of all quantizers takes every class that it finds."""

    class Naive(LSQ):
        def fake_quantize(self, x: Tensor) -> Tensor:
            v = (x / self.scale).clamp(self.qmin, self.qmax)
            return (v + (v.round() - v).detach()) * self.scale

    return Naive


def unfuse(model: nn.Module) -> None:
    def forward(layer: QuantLinear, x: Tensor) -> Tensor:
        return F.linear(layer.act_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)  # type: ignore[misc]

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def ratio(tower: nn.Module, images: Tensor, kind: str, matmul: str, quantizer: type[LSQ] = LSQ) -> float:
    """The bytes that a W8A8 copy of the tower keeps over those of the unquantized one, with the same attention."""
    unquantized = quantize(copy.deepcopy(tower), None, None).train()
    model = quantize(copy.deepcopy(tower), partial(quantizer, 8, per_channel=True), partial(quantizer, 8)).train()
    calibrate(model, [images])
    prepare_training(model, kind, matmul)
    if quantizer is naive():
        unfuse(model)
    return kept(model, images) / kept(unquantized, images)


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Tensor]:
    visual: Any = load(ModelConfig()).visual
    return visual, torch.randn(4, 3, *visual.image_size, generator=torch.Generator().manual_seed(0))


NO_COMPILER = kernels._missing_compiler(CPU)
VARIANTS = [
    ("eager", "float"),
    pytest.param("compiled", "float", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))),
    ("eager", "int8"),
    ("eager", "bf16"),
]


@pytest.mark.parametrize(("kind", "matmul"), VARIANTS)
def test_a_quantized_tower_keeps_what_the_unquantized_one_keeps(
    tiny: tuple[nn.Module, Tensor], kind: str, matmul: str
) -> None:
    assert 0.95 <= ratio(*tiny, kind, matmul) <= 1.05


def test_the_plain_way_keeps_several_times_as_much(tiny: tuple[nn.Module, Tensor]) -> None:
    assert ratio(*tiny, "eager", "float", naive()) > 2


@pytest.mark.slow
def test_the_real_size() -> None:
    torch.manual_seed(0)
    vision_cfg = open_clip.get_model_config("ViT-B-32")["vision_cfg"]
    text_cfg = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    tower, images = open_clip.CLIP(512, vision_cfg, text_cfg).visual, torch.randn(2, 3, 224, 224)
    assert ratio(tower, images, "eager", "float") <= 1.05
    assert ratio(tower, images, "eager", "float", naive()) > 2


# -- what is free ----------------------------------------------------------------------------------------------------


def test_free_memory_is_some_and_not_more_than_there_is() -> None:
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``machine(own, {group: {file: text}})``: what is free with these control groups, the process being in ``own``."""

    def free(own: str | None, groups: dict[str, dict[str, str]], available: int = 10**12) -> int:
        for group, files in groups.items():
            folder = tmp_path / "sys/fs/cgroup" / group
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (folder / name).write_text(text + "\n")
        if own is not None:
            (tmp_path / "proc/self").mkdir(parents=True)
            (tmp_path / "proc/self/cgroup").write_text(own)
        monkeypatch.setattr(memory, "Path", lambda path: tmp_path / str(path).lstrip("/"))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
        return free_bytes(CPU)

    return free


def group(limit: int | str, used: int, reclaimable: int = 0) -> dict[str, str]:
    stat = f"anon {used - reclaimable}\nfile {reclaimable}\ninactive_file {reclaimable}\nactive_file 0"
    return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}


def test_the_control_groups_limit(machine: Any) -> None:
    assert machine("0::/job/step\n", {"job/step": group(1000, 300)}) == 700


def test_of_several_hierarchies_the_unified_one_is_read(machine: Any) -> None:
    assert (
        machine("12:cpu:/other\n1:name=systemd:/x\n0::/job\n", {"job": group(1000, 300), "other": group(9, 9)}) == 700
    )


def test_a_container_sees_its_group_as_the_root(machine: Any) -> None:
    assert machine("0::/\n", {"": group(5000, 1000)}) == 4000


def test_a_full_group_leaves_nothing(machine: Any) -> None:
    assert machine("0::/job\n", {"job": group(1000, 1001)}) == 0


@pytest.mark.parametrize(
    ("own", "groups"),
    [(None, {}), ("", {}), ("0::/\n", {}), ("0::/job\n", {"job": group("max", 5)})],
    ids=["no groups", "older kernel", "root", "no limit"],
)
def test_without_a_limit_the_machine_counts(machine: Any, own: str | None, groups: dict[str, Any]) -> None:
    assert machine(own, groups, available=1234) == 1234


def test_the_machine_may_have_less_than_the_group_allows(machine: Any) -> None:
    assert machine("0::/job\n", {"job": group(1000, 300)}, available=500) == 500


def test_a_limit_on_a_group_above_counts_too(machine: Any) -> None:
    """Slurm and systemd limit the job, and the process is in a group below it that has no limit of its own."""
    assert machine("0::/job/step/task\n", {"job": group(1000, 300), "job/step/task": group("max", 200)}) == 700


def test_cached_files_are_no_memory_in_use(machine: Any) -> None:
    """The kernel drops them when memory is asked for; after a while of reading shards they fill any group."""
    assert machine("0::/job\n", {"job": group(1000, 990, reclaimable=600)}) == 610


# -- how much at once ------------------------------------------------------------------------------------------------


def test_parts_are_equal_few_and_fit() -> None:
    for images in (1, 2, 3, 7, 8, 32, 100, 255, 4096):
        for per_image in (1, 7, 1000, 10**6):
            for fixed in (0, 500, 10**7):
                for free in (0, 1, 999, 10**4, 10**6, 10**7, 10**9, 10**12):
                    size = largest_micro_batch(images, per_image, fixed, free)
                    parts = -(-images // size)
                    room = int(free * SHARE) - fixed
                    assert 1 <= size <= images
                    assert size == 1 or size * per_image <= room
                    assert 0 < images - (parts - 1) * size <= size  # all of them, and no empty part
                    assert size == -(-images // parts)  # as equal as they can be
                    if parts > 1:  # with a part less they would not fit
                        assert -(-images // (parts - 1)) * per_image > room


def test_known_cases() -> None:
    assert largest_micro_batch(32, 10, 0, 10**6) == 32
    assert largest_micro_batch(32, 10, 0, int(310 / SHARE) + 1) == 16
    assert largest_micro_batch(100, 10, 0, int(400 / SHARE) + 1) == 34
    assert largest_micro_batch(100, 10, 400, int(400 / SHARE) + 1) == 1
    assert largest_micro_batch(8, 0, 0, 100) == 8
