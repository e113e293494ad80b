"""Every shape comment is true, and the check of shape_comments.py lets no wrong one pass."""

import re

import pytest
from runs import AGENTS, ROOT
from shape_comments import COMMENT, run_checked


@pytest.fixture(params=AGENTS)
def name(request):
    return request.param


def test_shape_comments_are_true(name):
    script = run_checked(name, (ROOT / f"{name}.py").read_text())
    assert script.wrong == []
    assert script.checked == script.comments.keys(), "lines whose comments were not checked"
    assert len(script.checked) >= 25


@pytest.mark.parametrize("position", range(3))
def test_no_wrong_comment_goes_unnoticed(position, name):
    """In a copy where one more is added to a size of every comment, every comment is reported."""

    def off_by_one(comment):
        dims = [dim for dim in comment[1][1:-1].split(",") if dim.strip()]
        at = min(position, len(dims) - 1)
        dims[at] = " or ".join(f"{choice} + 1" for choice in dims[at].split(" or "))
        return f"  # ({','.join(dims)},)"

    script = run_checked(name, COMMENT.sub(off_by_one, (ROOT / f"{name}.py").read_text()))
    assert {line for line, _ in script.wrong} == script.comments.keys()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # then `batch` has another value here than in the rest of act()
        (
            "  # (batch * n, obs_dim)\n        if",
            "  # (batch, obs_dim)\n        if",
            r"says \(batch \* n, action",
        ),
        ("  # (num_qs, batch, n)", "  # (num_qs, batch, samples)", "samples has no known value"),
    ],
)
def test_a_wrong_comment_is_named(old, new, message):
    text = (ROOT / "dac.py").read_text()
    assert text.count(old) == 1
    assert re.search(message, run_checked("dac", text.replace(old, new)).wrong[0][1])
