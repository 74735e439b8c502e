"""Linear models on frozen features: quick judges of the data, not what is tuned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def classifier(strength: float) -> Any:
    """Logistic regression on standardised features; `strength` is scikit-learn's C.

    A loose tolerance: a fit of 8,000 rows of 384 features in 77 classes takes one to two seconds on one core, and what
    further steps change is within what another sample of the rows changes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-3, max_iter=200))


def regressor() -> Any:
    """Ridge regression on standardised features, with the strength that leaves one row out best."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(alphas=(1.0, 10.0, 100.0, 1000.0, 10_000.0)))


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of fits that were stopped early: they are good enough to judge rows by."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
