"""Every shape comment is true."""

from runs import ROOT
from shape_comments import run_checked


def test_shape_comments_are_true(script):
    checked = run_checked(script.__name__, (ROOT / f"{script.__name__}.py").read_text())
    assert checked.wrong == []
    assert checked.checked == checked.comments.keys(), "lines whose comments were not checked"
    assert len(checked.checked) >= 25
