"""Hooks that only look, and that never stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatlab.quant.inspect.hooks import on_inputs, on_outputs


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def hooks_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules())


def test_inputs_and_outputs_are_seen_with_their_names_and_left_as_they_are() -> None:
    net, x = model(), torch.randn(5, 3)
    seen: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []

    def before(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        seen.append((name, module, inputs[0], None))
        return torch.zeros_like(inputs[0])  # what a bare hook returns takes the place of the input

    def after(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Any:
        seen.append((name, module, inputs[0], output))
        return torch.zeros_like(output)

    expected = net(x)
    with on_inputs({"first": net[0]}, before), on_outputs({"last": net[2]}, after):
        assert torch.equal(net(x), expected)
    assert [(name, module) for name, module, _, _ in seen] == [("first", net[0]), ("last", net[2])]
    assert torch.equal(seen[0][2], x)
    assert seen[0][3] is None
    assert torch.equal(seen[1][3], expected)  # type: ignore[arg-type]
    assert hooks_of(net) == 0


@pytest.mark.parametrize("watch", [on_inputs, on_outputs])
@pytest.mark.parametrize("by", ["the look", "the model"])
def test_no_hook_is_left_where_something_raises(watch: Any, by: str) -> None:
    net = model()

    def look(*_: Any) -> None:
        if by == "the look":
            raise KeyError("look")

    x = torch.randn(5, 3 if by == "the look" else 7)
    with pytest.raises((KeyError, RuntimeError)), watch({"0": net[0], "2": net[2]}, look):
        net(x)
    assert hooks_of(net) == 0
