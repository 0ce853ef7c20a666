"""What the evidence page is made of: intervals, verdicts, and samples that survive a killed run."""

import pytest

from montage.evidence import measurements


def test_intervals_and_verdicts():
    found = measurements.Interval.of([1.0, 2.0, 3.0, None, float("inf")])
    assert (found.mean, found.n) == (2.0, 3) and found.half == pytest.approx(1.96 / 3**0.5)
    assert (
        measurements.verdict(measurements.Interval(1.0, 0.5, 9))
        == "reproduced"
        == measurements.verdict(measurements.Interval(-1.0, 0.5, 9), -1)
    )
    assert measurements.verdict(measurements.Interval(-1.0, 0.5, 9)) == "not reproduced"
    assert (
        measurements.verdict(measurements.Interval(1.0, 1.5, 9))
        == "not decided"
        == measurements.verdict(measurements.Interval(1.0, 0.0, 1))
    )


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    measured = []

    def measure(sample):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(sample)
        return {"a": {"x": sample}, "b": {"x": 2 * sample if sample else None}}

    with pytest.raises(KeyboardInterrupt):
        measurements.Study("study", tmp_path).run(range(3), measure)
    measured.clear()
    found = measurements.Study("study", tmp_path).run(range(3), measure)
    assert measured == [2] and found.of("a", "x") == [0, 1, 2]
    assert found.difference("b", "a", "x") == measurements.Interval.of([1, 2])  # the pairs that have both


def test_samples_belong_to_the_weights(tmp_path, monkeypatch):
    measurements.Study("study", tmp_path).run(range(1), lambda sample: {"a": {"x": 1}})
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(measurements, "WEIGHTS", tmp_path / "weights")
    assert not measurements.Study("study", tmp_path).samples
