"""The feature store gives back the bits it was given, and says what it has not."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import qatlab.quant
from qatlab.core.errors import UserError
from qatlab.evaluation import store as store_module
from qatlab.evaluation.store import FeatureStore, tell_superseded
from qatlab.models.fingerprint import fingerprint, lasting_module
from qatlab.quant import MinMax, QuantLinear, quantize
from qatlab.quant.layers.attention import QuantAttention


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


def test_data_w1_of_files_without_a_wanted_image_only_the_ids_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of all datasets lie beside each other: a small set must not cost the reading of a large one."""
    for i in range(6):
        FeatureStore(tmp_path).write([2 * i, 2 * i + 1], features(2, seed=i))
    read: list[int] = []
    digest = store_module._digest
    monkeypatch.setattr(store_module, "_digest", lambda ids, of: read.append(int(ids[0])) or digest(ids, of))
    store = FeatureStore(tmp_path)
    assert store.missing([5, 3, 99]) == [99]
    assert sorted(read) == [2, 4]
    assert torch.equal(store.read([4]), features(2, seed=2)[:1])
    assert {*read} == {2, 4}


def test_data_w1_what_earlier_releases_kept_is_measured_and_said_once(
    tmp_path: Path, cold: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell_superseded.cache_clear()
    tell_superseded()
    assert capsys.readouterr().out == ""
    for name in ("features/key/val-12345678/0.safetensors", "decoded/0.u8", "features-2/key/images-64-1/1.safetensors"):
        (cold / name).parent.mkdir(parents=True)
        (cold / name).write_bytes(b"x" * 8192)
    with (cold / "decoded/0.u8").open("r+b") as holes:
        holes.truncate(2**30)
    size = sum(512 * (cold / n).stat().st_blocks for n in ("features/key/val-12345678/0.safetensors", "decoded/0.u8"))
    assert 16384 <= size < 2**20
    tell_superseded.cache_clear()
    tell_superseded()
    tell_superseded()
    said = f"{size} bytes of an earlier release in {cold / 'features'} and {cold / 'decoded'} may be deleted"
    assert [said in line for line in capsys.readouterr().out.splitlines()] == [True]


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


def test_what_a_module_computes_with_and_its_repr_leaves_out_is_structure() -> None:
    torch.manual_seed(0)
    few, many = (nn.ModuleDict({"attention": nn.MultiheadAttention(8, heads)}) for heads in (2, 4))
    many.load_state_dict(few.state_dict())
    assert repr(few) == repr(many)
    assert fingerprint(few) != fingerprint(many)
    assert fingerprint(few, without=["attention"]) == fingerprint(many, without=["attention"])
    standing_in = [QuantAttention(model["attention"], "attention", lambda _, layer: layer) for model in (few, many)]
    assert fingerprint(standing_in[0]) != fingerprint(standing_in[1])
    few.eval()
    assert fingerprint(few) == fingerprint(copy.deepcopy(few).train())


def test_a_file_may_move_inside_its_package_and_keys_stay() -> None:
    assert lasting_module(QuantLinear) == "qatlab.quant"
    assert lasting_module(nn.Linear) == "torch.nn.modules.linear"
    model = quantize(nn.Sequential(nn.Linear(4, 2)), partial(MinMax, 8), None)
    with torch.no_grad():
        model[0].weight_quantizer.step.fill_(0.1)  # type: ignore[union-attr, operator]
    key = fingerprint(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantLinear, "__module__", "qatlab.quant.elsewhere.linear")
        assert fingerprint(model) == key
        patch.setattr(QuantLinear, "__module__", "somebody.linear")
        assert fingerprint(model) != key


def test_no_two_classes_of_quant_share_a_name() -> None:
    """Keys tell them apart by nothing else."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(qatlab.quant.__path__, "qatlab.quant."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("qatlab."):
                assert found.setdefault(kind.__qualname__, kind) is kind
    assert len(found) > 10
