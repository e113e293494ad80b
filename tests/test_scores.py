"""D4RL's normalized score and its reference table."""

import numpy as np
import pytest

from common.scores import normalized_score, reference_returns, summarize


@pytest.mark.parametrize(
    ("task", "reference"),
    [
        ("hopper-medium-v2", (-20.272305, 3234.3)),
        ("hopper-mini-v0", (-20.272305, 3234.3)),
        ("Hopper-v4", (-20.272305, 3234.3)),
        ("HalfCheetah-v4", (-280.178953, 12135.0)),
        ("Walker2d-v4", (1.629008, 4592.3)),
        ("ant-random-v2", (-325.6, 3879.7)),
        ("antmaze-umaze-v0", (0.0, 1.0)),
        ("antmaze-large-diverse-v1", (0.0, 1.0)),  # missing from D4RL's own table
        ("pen-human-v1", (96.262799, 3076.8331017826877)),
        ("kitchen-partial-v0", (0.0, 4.0)),
        ("maze2d-umaze-v1", (23.85, 161.86)),
        ("maze2d-umaze-dense-v1", (68.537689, 193.66285642381482)),
        ("bandit-moons-v0", (0.0, 1.0)),
    ],
)
def test_reference_is_that_of_the_environment(task, reference):
    assert reference_returns(task) == reference


def test_normalized_score():
    reference = reference_returns("hopper-medium-v2")
    assert normalized_score(-20.272305, reference) == 0
    assert normalized_score(3234.3, reference) == pytest.approx(100)
    np.testing.assert_allclose(normalized_score(np.array([0.0, 0.5, 1.0, 2.0]), (0, 1)), [0, 50, 100, 200])
    # Mean return of the DAPG door demonstrations, and the score it is known to have.
    assert normalized_score(794.1, reference_returns("door-human-v1")) == pytest.approx(28.96, abs=0.005)


def test_summarize():
    returns = [90, 90, *range(10)]
    summary = summarize([{"return_mean": float(each)} for each in returns], (0, 200))
    expected = {"final": (9, 4.5), "best": (90, 45), "last_ten": (4.5, 2.25)}
    assert {name: (each["return"], each["score"]) for name, each in summary.items()} == expected
    assert summarize([], None) == {}
