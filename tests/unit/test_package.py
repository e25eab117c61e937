"""The package's own names, of which some are imported on first use."""

from __future__ import annotations

import pytest

import rawaio
from rawaio.statistics import Statistics


def test_every_public_name_is_there() -> None:
    for name in rawaio.__all__:
        assert getattr(rawaio, name) is not None
        assert name in dir(rawaio)
    assert rawaio.Statistics is Statistics


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    name = "Statistic"
    with pytest.raises(AttributeError, match="no attribute 'Statistic'"):
        getattr(rawaio, name)
