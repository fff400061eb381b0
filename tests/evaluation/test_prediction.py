"""What a score of the user's own may give, told in a sentence where it is something else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.evaluation.prediction import Prediction
from qatlab.suites.source import Source, View


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (
            "short(cosines): return cosines[0]",
            r"'odd_scores\.short' gives \(3,\) for 4 images: a score is a number for",
        ),
        ("lost(cosines): return cosines[:, 0] / 0 * 0", r"odd_scores\.lost gives NaN or infinite values"),
    ],
)
def test_a_score_of_ones_own_that_gives_no_numbers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, told: str
) -> None:
    (tmp_path / "odd_scores.py").write_text(f"def {function}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("odd_scores", None)
    view, labels = View("fp32", 10.0), torch.full((4,), -1)
    source, cosines = Source("far", "far_ood", "id"), torch.rand(4, 3)
    found = Prediction(source, torch.rand(4, 8), cosines, labels, torch.arange(4), [view])
    name = f"odd_scores.{function.partition('(')[0]}"
    with pytest.raises(UserError, match=told):
        found.ood_scores([name], view, 1.0)
    sys.modules.pop("odd_scores", None)
