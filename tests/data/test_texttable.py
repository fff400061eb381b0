"""Text tables: names from metadata or beside the file, unit rows, and each mistake's sentence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qatlab.core.errors import UserError
from qatlab.data.texttable import TextTable, load_text_table, save_text_table

DATA = Path(os.environ.get("QATLAB_TEST_DATA") or Path(__file__).parents[2] / "../shared/data")


def test_round_trip(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    tables = {"birds": TextTable(rows, ["a", "b", "c"], "made"), "one": TextTable(rows[:1] * 7, ["x"], "made")}
    save_text_table(tmp_path / "t.safetensors", tables)
    read = load_text_table(f"{tmp_path}/t.safetensors:birds")
    assert read.names == ["a", "b", "c"]
    assert read.source == "t.safetensors:birds"
    torch.testing.assert_close(read.features, rows)
    torch.testing.assert_close(load_text_table(f"{tmp_path}/t.safetensors:one").features, rows[:1])
    with pytest.raises(UserError, match="3 rows but 1 names"):
        save_text_table(tmp_path / "u.safetensors", {"birds": TextTable(rows, ["a"], "made")})


@pytest.mark.parametrize("beside", ["heads_fp16.json", "heads_fp16_names.json", "heads.json", "heads_names.json"])
@pytest.mark.parametrize("content", [["a", "b"], {"set": ["a", "b"]}, {"set.raw": ["a", "b"], "set": ["no"]}])
def test_names_beside_the_file(tmp_path, beside, content):
    raw = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float16)
    save_file({"set.raw": raw}, tmp_path / "heads_fp16.safetensors")
    (tmp_path / beside).write_text(json.dumps(content))
    read = load_text_table(str(tmp_path / "heads_fp16.safetensors"))
    assert read.names == ["a", "b"]
    assert read.features.dtype == torch.float32
    np.testing.assert_allclose(read.features.numpy(), [[0.6, 0.8], [0.0, 1.0]], rtol=1e-7)


def save(path, metadata=None, **tensors):
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.safetensors:birds", "does not exist"),
        ("t.pt:birds", "write PATH.safetensors:TABLE"),
        ("t.safetensors", r"holds 5 tables; name one"),
        ("t.safetensors:brds", r"no table 'brds' \(did you mean 'birds'\?\)"),
        ("t.safetensors:nan", "row 1 is zero or not finite"),
        ("t.safetensors:zero", "row 0 is zero or not finite"),
        ("t.safetensors:flat", r"of shape \(3,\)"),
        ("t.safetensors:short", "2 rows but 1 names"),
        ("t.safetensors:birds", "no names for the table 'birds'"),
        ("u.safetensors", "has no class names; .* u_names.json"),
        ("v.safetensors", "it is no JSON"),
        ("w.safetensors", "must be a JSON list of text"),
        ("x.safetensors", "cannot be read"),
    ],
)
def test_mistakes(tmp_path, spec, message):
    good = torch.eye(2)
    bad = {"nan": good * torch.tensor([[1.0], [torch.nan]]), "zero": torch.zeros(2, 2), "flat": torch.ones(3)}
    save(tmp_path / "t.safetensors", {"names": '{"short": ["a"]}'}, birds=good, short=good.clone(), **bad)
    save(tmp_path / "u.safetensors", a=good)
    save(tmp_path / "v.safetensors", {"names": "[a"}, a=good)
    save(tmp_path / "w.safetensors", {"names": "[1, 2]"}, a=good)
    (tmp_path / "x.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=message):
        load_text_table(f"{tmp_path}/{spec}")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real text features at {DATA} (QATLAB_TEST_DATA)")
def test_real_tables():
    path = DATA / "clip_vitb16/text_features_fp16.safetensors"
    table = load_text_table(f"{path}:imagenet1k.a_photo_of_a")
    assert table.features.shape == (1000, 512)
    assert table.names[:2] == ["tench", "goldfish"]
    torch.testing.assert_close(table.features.double().norm(dim=1), torch.ones(1000, dtype=torch.float64))
    assert len(load_text_table(f"{path}:coco80").names) == 80


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_data_t2_names_beside_a_table_in_other_encodings(tmp_path, encoding):
    save(tmp_path / "t.safetensors", {}, birds=torch.eye(2))
    (tmp_path / "t.json").write_bytes('["tit", "café"]'.encode(encoding))
    assert load_text_table(f"{tmp_path}/t.safetensors").names == ["tit", "café"]
    (tmp_path / "t.json").write_bytes(b'["tit", "caf\xe9"]')
    with pytest.raises(UserError, match=r"t\.json, line 1: the byte 0xe9 is no UTF-8"):
        load_text_table(f"{tmp_path}/t.safetensors")
