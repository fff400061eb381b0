"""Runs that wait for each other before every layer: the right inputs, no thread left, and errors handed on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.quant.ptq.in_step import in_step

BATCHES = torch.arange(24.0).reshape(4, 2, 3)


class Chain(nn.Module):
    """Three layers, the last one before the second where the first input is negative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.c, self.b) if bool(x[0, 0] < 0) else (self.b, self.c)
        return second(first(self.a(x)))


def test_a_change_to_a_layer_is_seen_behind_it() -> None:
    model, seen = Chain(), {}

    def double(name: str, inputs: list[Tensor]) -> None:
        seen[name] = inputs
        assert not torch.is_grad_enabled()
        model.get_submodule(name).weight.mul_(2)

    before = threading.active_count()
    with torch.no_grad():
        in_step([(model, batch) for batch in BATCHES], ["a", "b", "c"], double)
        for place, batch in enumerate(BATCHES):
            assert torch.equal(seen["a"][place], batch)
            assert torch.equal(seen["b"][place], model.a(batch))
            assert torch.equal(seen["c"][place], model.b(model.a(batch)))
    assert list(seen) == ["a", "b", "c"]
    assert threading.active_count() == before
    assert not model.a._forward_pre_hooks


def test_two_models_stop_together() -> None:
    model, other = Chain(), Chain()
    other.a.weight.data.zero_()
    found: dict[str, list[Tensor]] = {}
    in_step([(model, BATCHES[0]), (other, BATCHES[0])], ["b"], lambda name, inputs: found.update({name: inputs}))
    assert torch.equal(found["b"][0], model.a(BATCHES[0]))
    assert torch.equal(found["b"][1], other.a.bias.expand(2, 3))


def test_other_orders_are_refused() -> None:
    with pytest.raises(UserError, match="the model calls b, c in another order, or again"):
        in_step([(Chain(), BATCHES[0]), (Chain(), -1 - BATCHES[0])], ["a", "b", "c"], lambda name, inputs: None)


def test_a_layer_that_is_called_again_is_refused() -> None:
    model = Chain()
    model.c = model.b
    with pytest.raises(UserError, match=r"in another order, or again.*quant\.rules"):
        in_step([(model, BATCHES[0])], ["a", "b"], lambda name, inputs: None)


@pytest.mark.parametrize("where", ["model", "at"])
def test_errors_are_handed_on_and_no_thread_is_left(where: str) -> None:
    def fail(name: str, inputs: list[Tensor]) -> None:
        if where == "at":
            raise ArithmeticError("from at")

    batch = BATCHES[0] if where == "at" else BATCHES[0, :, :2]
    before = threading.active_count()
    with pytest.raises(ArithmeticError if where == "at" else RuntimeError):
        in_step([(Chain(), BATCHES[1]), (Chain(), batch)], ["a", "b", "c"], fail)
    assert threading.active_count() == before
