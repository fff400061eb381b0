"""The feature store gives back the bits it was given, and says what it has not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qatlab.errors import UserError
from qatlab.store import FeatureStore, fingerprint


def features(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def test_what_was_written_comes_back_in_any_order(tmp_path: Path) -> None:
    first, second = features(5), features(3, seed=1)
    store = FeatureStore(tmp_path)
    store.write([0, 2, 4, 6, 8], first)
    store.write([1, 3, 5], second)
    assert store.missing([8, 7, 3, 9, 7]) == [7, 9]
    expected = torch.stack([second[1], first[4], first[0], first[4]])
    for reader in (store, FeatureStore(tmp_path)):
        assert torch.equal(reader.read([3, 8, 0, 8]), expected)


def test_features_of_another_process_are_seen(tmp_path: Path) -> None:
    store, other = FeatureStore(tmp_path), FeatureStore(tmp_path)
    other.write([0, 1], features(2))
    assert store.missing([0, 1, 2]) == [2]
    other.write([2], features(1, seed=2))
    assert torch.equal(store.read([2, 0]), torch.cat([features(1, seed=2), features(2)[:1]]))


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.write([0, 1], features(2))
    with pytest.raises(UserError, match="lacks the features of 1 of 3 images: give the same command again"):
        store.read([0, 1, 2])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_put_aside_and_its_images_are_missing(tmp_path: Path, damage: str) -> None:
    FeatureStore(tmp_path).write([0, 1], features(2))
    FeatureStore(tmp_path).write([2], features(1))
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    held = FeatureStore(tmp_path).missing([0, 1, 2])
    assert held == []
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    file.write_bytes({"cut": content[:-7], "flipped": content, "empty": b""}[damage])
    store = FeatureStore(tmp_path)
    lost = store.missing([0, 1, 2])
    assert lost in ([0, 1], [2])
    assert store.damaged == [file]
    assert not file.exists()
    assert file.with_suffix(".damaged").exists()
    store.write(lost, features(len(lost), seed=5))
    assert store.missing([0, 1, 2]) == []


def test_half_a_file_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path)

    def fail(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(UserError, match="could not be written, the disk or quota is full"):
            store.write([0], features(1))
    assert list(tmp_path.iterdir()) == []
    assert store.missing([0]) == [0]


def test_a_model_is_its_structure_and_its_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.BatchNorm1d(4))
    same = copy.deepcopy(model)
    assert fingerprint(model, "224") == fingerprint(same, "224") != fingerprint(model, "196")
    with torch.no_grad():
        same[0].bias[1] += 1e-6
    assert fingerprint(same) != fingerprint(model)
    assert fingerprint(nn.Sequential(model[0], nn.ReLU(), model[2])) != fingerprint(model)
