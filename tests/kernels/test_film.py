"""Scale and shift of all layers on every backend against float64."""

import pytest

from tests.kernels.cases import assert_as_good_as_pytorch, film


@pytest.mark.parametrize("batch,time,condition,channels", [(1, 8, 8, (4,)), (3, 20, 12, (8, 6)), (70, 33, 50, (5, 40))])
def test_batches_and_widths(side, batch, time, condition, channels):
    assert_as_good_as_pytorch("film", side, film(batch, time, condition, channels))
