from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qatlab.reports.plots import reliability_diagram


@pytest.mark.usefixtures("rendered")
def test_the_picture_is_written_whole_and_grows_with_its_panels(tmp_path):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, size=200)
    correct = rng.uniform(size=200) < confidence
    one, three = tmp_path / "one.png", tmp_path / "folder" / "three.png"
    reliability_diagram([("FP32", confidence, correct)], one)
    reliability_diagram([("FP32", torch.tensor(confidence), correct), ("W8A8", confidence, correct)] * 2, three)
    sizes = [Image.open(path).convert("L").size for path in (one, three)]
    assert sizes[0][1] == sizes[1][1]
    assert sizes[1][0] > 3 * sizes[0][0]
    assert [path.name for path in tmp_path.rglob("*.png")] == ["one.png", "three.png"]


@pytest.mark.usefixtures("rendered")
def test_a_failure_leaves_the_earlier_picture(tmp_path):
    path = tmp_path / "reliability.png"
    reliability_diagram([("FP32", [0.5, 1.0], [1, 0])], path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not a probability"):
        reliability_diagram([("FP32", [0.5, 1.5], [1, 0])], path)
    with pytest.raises(ValueError, match="at least one"):
        reliability_diagram([], path)
    assert path.read_bytes() == before
