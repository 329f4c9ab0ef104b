"""Of sixty damaged files none brings a traceback, ends a process, hangs it, or is read as what no checksum allows."""

from collections import Counter

import pytest

from benchmarks import corruption


@pytest.fixture(scope="module")
def found():
    said: list[str] = []
    return corruption.try_all(list(range(1, 61)), 2, 1, said.append), said


def test_no_damage_goes_wrong(found):
    inputs, said = found
    assert said == []
    assert Counter(what for _, what, _ in inputs).keys() <= {"detected", "tolerated", "changed"}
    assert {given.reader for given, _, _ in inputs} == set(corruption.READERS)
    of_checkpoints = [what for given, what, _ in inputs if given.reader.name == "checkpoint"]
    assert of_checkpoints == ["detected"] * len(of_checkpoints)
    *rows, last = corruption.rows_of(inputs)
    assert last["inputs"] == sum(row["inputs"] for row in rows) == 60


def fails(directory, file):
    raise ZeroDivisionError


def dies(directory, file):
    corruption.os._exit(7)


@pytest.mark.parametrize(
    ("reads", "outcome"),
    [(lambda _, file: file.read_bytes(), "wrong"), (fails, "traceback"), (dies, "died")],
    ids=["wrong", "traceback", "died"],
)
def test_what_must_not_be_is_counted(tmp_path, monkeypatch, reads, outcome):
    """A reader that takes anything, and two that fail as they look at a damaged file."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "one").write_bytes(bytes(range(200)))
    whole = (tmp_path / "files" / "one").read_bytes()
    read = lambda d, file: whole if file.read_bytes() == whole else reads(d, file)  # noqa: E731
    monkeypatch.setattr(corruption, "READERS", (corruption.Reader("one", "files", "*", read, True),))
    process = corruption.Process(tmp_path, 1, {("one", "one"): whole})
    try:
        assert [process(number)[0] for number in (1, 2)] == [outcome, outcome]
    finally:
        process.close()


def test_what_cannot_be_read_undamaged_is_an_error(monkeypatch):
    def make(work):
        (work / "files").mkdir()
        (work / "files" / "one").write_bytes(b"12345678")

    monkeypatch.setattr(corruption, "make", make)
    monkeypatch.setattr(corruption, "READERS", (corruption.Reader("one", "files", "*", fails, True),))
    with pytest.raises(ZeroDivisionError):
        corruption.try_all([1], 1, 1)
