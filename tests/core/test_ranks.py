"""Which process this one is: told by its process group, else by what started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from qatlab.core.ranks import is_first, rank, world_size


@pytest.fixture(autouse=True)
def started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group() -> Iterator[None]:
    """This process is the second of a group of three."""
    store = dist.HashStore()
    dist.init_process_group("fake", store=store, rank=1, world_size=3)
    yield
    dist.destroy_process_group()


def test_a_process_on_its_own_is_the_first() -> None:
    assert (rank(), is_first(), world_size()) == (0, True, 1)


@pytest.mark.parametrize(
    "given", [{"LOCAL_RANK": "1"}, {"RANK": "1", "LOCAL_RANK": "0"}, {"SLURM_PROCID": "1"}], ids=" ".join
)
def test_before_there_is_a_group_the_environment_tells(monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert (rank(), is_first(), world_size()) == (1, False, 1)


def test_the_group_has_the_last_word(monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as the first process of a second node has it
    assert (rank(), is_first(), world_size()) == (1, False, 3)
