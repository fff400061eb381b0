from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from qatlab.metrics.detection import aupr_in, aupr_out, auroc, detection, fpr95_id_pos, fpr95_ood_pos

MEASURES = [auroc, aupr_in, aupr_out, fpr95_id_pos, fpr95_ood_pos]


def scores(n: int, m: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n + m)
    return np.round(rng.normal(41, 1, n), digits), np.round(rng.normal(40, 1, m), digits)


@pytest.mark.parametrize(("n", "m", "digits"), list(product([1, 19, 200], [1, 21, 90], [0, 1, 9])))
def test_aupr_matches_sklearn_whichever_side_is_positive(n, m, digits):
    inside, outside = scores(n, m, digits)
    truth, both = np.r_[np.ones(n), np.zeros(m)], np.r_[inside, outside]
    assert aupr_in(inside, outside) == pytest.approx(average_precision_score(truth, both), abs=1e-12)
    assert aupr_out(inside, outside) == pytest.approx(average_precision_score(1 - truth, -both), abs=1e-12)


@pytest.mark.parametrize("digits", [0, 9])
def test_all_at_once_is_each_by_itself(digits):
    inside, outside = scores(100, 60, digits)
    assert detection(inside, outside) == {measure.__name__: measure(inside, outside) for measure in MEASURES}


def test_equal_scores_are_chance():
    same = detection(np.full(30, 2.0), np.full(10, 2.0))
    assert same == {"auroc": 0.5, "aupr_in": 0.75, "aupr_out": 0.25, "fpr95_id_pos": 1.0, "fpr95_ood_pos": 1.0}


@pytest.mark.parametrize("measure", [*MEASURES, detection])
def test_what_has_no_number_is_refused(measure):
    for inside, outside in (([], [1.0]), ([1.0], []), ([math.nan], [1.0]), ([1.0], [-math.inf])):
        with pytest.raises(ValueError, match=r"there are no|NaN or infinite"):
            measure(inside, outside)
