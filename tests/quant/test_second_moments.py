"""The second moments of a layer's inputs against their sums in float64."""

from __future__ import annotations

import pytest
import torch

from qatlab.quant.ptq.second_moments import STRIP, SecondMoments


@pytest.mark.parametrize("width", [1, 5, STRIP, STRIP + 1, 2 * STRIP + 3])
def test_the_sums_of_products_of_every_width(width: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, rows, width) for rows in (7, 4)]
    moments = SecondMoments()
    for batch in batches:
        moments.update(batch, batch + 1)
    rows = torch.cat(batches, 1).double()
    hessian, drift = moments.of_group(1)
    torch.testing.assert_close(hessian, 2 / 11 * rows[1].T @ rows[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=0)
    assert drift is not None
    torch.testing.assert_close(drift, 2 / 11 * torch.ones_like(rows[1]).T @ rows[1], rtol=1e-5, atol=1e-5)
