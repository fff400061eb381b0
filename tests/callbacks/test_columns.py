from __future__ import annotations

import numpy as np
import pytest
import torch

from qatlab.evaluation.columns import Columns


def test_columns_come_back_in_the_order_of_the_images():
    columns = Columns(["value", "hit"])
    columns.update(torch.tensor([3, 1]), value=torch.tensor([0.3, 0.1]), hit=torch.tensor([True, False]))
    columns.update(torch.tensor([0, 2]), value=torch.tensor([0.0, 0.2]), hit=torch.tensor([True, True]))
    merged = columns.compute()
    assert merged["index"].tolist() == [0, 1, 2, 3]
    assert merged["index"].dtype == np.int64
    assert merged["value"].tolist() == torch.tensor([0.0, 0.1, 0.2, 0.3]).double().tolist()
    assert merged["hit"].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_float64_and_large_labels_survive():
    columns = Columns(["value", "label"])
    columns.update(torch.tensor([0]), value=torch.tensor([1 / 3], dtype=torch.float64), label=torch.tensor([2**52 + 1]))
    assert columns.compute()["value"].tolist() == [1 / 3]
    assert columns.compute()["label"].tolist() == [2**52 + 1]


def test_a_single_image_keeps_its_dimension():
    columns = Columns(["value"])
    columns.update(torch.tensor([5]), value=torch.tensor([2.0]))
    assert columns.compute()["value"].shape == (1,)


def test_a_set_without_images_is_empty_and_silent(recwarn):
    assert Columns(["value"]).compute()["value"].shape == (0,)
    assert not recwarn.list


def test_an_image_that_comes_twice_counts_once():
    columns = Columns(["value"])
    columns.update(torch.tensor([2, 0, 1]), value=torch.tensor([2.0, 0.0, 1.0]))
    columns.update(torch.tensor([0]), value=torch.tensor([0.0]))
    assert columns.compute()["value"].tolist() == [0.0, 1.0, 2.0]


def test_a_missing_column_is_an_error():
    with pytest.raises(KeyError, match="value"):
        Columns(["value"]).update(torch.tensor([0]))
