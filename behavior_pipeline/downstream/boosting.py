"""Gradient boosting of many targets on the same columns, which are cut into bins only once.

A third to a half of a small fit goes into sorting columns into bins, which are the same for every
target. scikit-learn has no public way to share them, so this reaches for the one private method
that makes them; a test holds the models equal to those that are fitted one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier


class Bins:
    """The columns of the training users as bins, made by the first fit that needs them."""

    def __init__(self) -> None:
        self.mapper: Any = None
        self.columns: Any = None


class SharingClassifier(HistGradientBoostingClassifier):  # type: ignore[misc] # untyped
    """The classifier on columns whose bins other classifiers on the same columns share."""

    _bins: Bins
    _bin_mapper: Any

    def _bin_data(self, *given: Any, is_training_data: bool) -> Any:
        """Return the columns as bins: the shared ones if there are."""
        if not is_training_data:
            return super()._bin_data(*given, is_training_data=False)
        if self._bins.columns is None:
            columns = super()._bin_data(*given, is_training_data=True)
            self._bins.mapper, self._bins.columns = self._bin_mapper, columns
        self._bin_mapper = self._bins.mapper
        return self._bins.columns


def fit_boosting(
    columns: NDArray[np.float64],
    labels: NDArray[Any],
    options: Mapping[str, Any],
    bins: Bins | None = None,
) -> Any:
    """Fit one model on (N, F) columns; those that are given the same `bins` share them."""
    model = SharingClassifier(**options, random_state=0)
    model._bins = bins or Bins()  # noqa: SLF001 - of this file; no parameter, which it would clone
    model.fit(columns, labels)
    del model._bins  # noqa: SLF001 - nobody needs them any more
    return model
