import pytest

from mxperts.errors import FormatError
from mxperts.evaluation import schemes
from mxperts.formats import FP8_STATIC, Scheme


def test_sets():
    assert len(schemes.ALL) == 6 * 8
    assert set(schemes.COMMON) < set(schemes.ALL)
    assert all(s.activation != FP8_STATIC for s in schemes.ALL)
    assert schemes.parse("common") == schemes.COMMON
    assert schemes.parse(" All ") == schemes.ALL


def test_lists_understand_aliases_and_drop_repetitions():
    assert schemes.parse("w4a16, w_mxfp4_a_mxfp4,mxfp4_weight_only") == (Scheme("w_mxfp4"), Scheme("w4a4"))


def test_unknown_scheme():
    with pytest.raises(FormatError, match="unknown scheme"):
        schemes.parse("w_mxfp4,w_mxfp5")
