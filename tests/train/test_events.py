"""The lines a host reads: every kind there and back, and streams that break."""

import errno
import io
import json
import math

import pytest

from train.events import FIELDS, KINDS, REASONS, EventError, EventWriter, TrainEvent, parse, read_events

STEP = {
    "step": 3,
    "steps": 10,
    "loss": 0.5,
    "smoothed_loss": 0.25,
    "lr": 1e-4,
    "seconds": 1.5,
    "eta": 10,
    "peak_memory": 5,
}
FAILED = {"reason": "data", "message": "no pictures"}


def filled(kind):
    """Fields of a kind, with values of the types that it asks for."""
    return {name: types[0](1) for name, types in FIELDS[kind].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    event = TrainEvent(kind, filled(kind), time=12.5)
    line = event.line()
    assert "\n" not in line and line.isascii()
    assert json.loads(line)["v"] == 1 and json.loads(line)["event"] == kind
    assert parse(line) == event


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_field_is_required(kind):
    for name in FIELDS[kind]:
        data = {key: value for key, value in filled(kind).items() if key != name}
        with pytest.raises(EventError, match=rf"{kind}\.{name} is None"):
            TrainEvent(kind, data)
        with pytest.raises(EventError, match=f"{kind}.{name}"):
            TrainEvent(kind, data | {name: True})


def test_a_reader_ignores_fields_it_does_not_know():
    line = TrainEvent("failed", FAILED | {"later": [1, {"x": math.inf}]}).line()
    assert parse(line).data["later"] == [1, {"x": None}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know(value):
    """They are null in the line, and a number again for who reads it: formatting one must not fail."""
    line = TrainEvent("step", STEP | {"loss": value}).line()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    read = parse(line).data
    assert math.isnan(read["loss"]) and f"{read['loss']:.4f}" == "nan"
    with pytest.raises(EventError, match=r"step\.step"):
        parse(line.replace('"step":3', '"step":null'))


def test_text_of_any_language_is_one_line_of_ascii():
    message = 'a\nb\u2028c \u72ac "q" \\ \ud800'
    line = TrainEvent("failed", FAILED | {"message": message}).line()
    assert line.isascii() and len(line.splitlines()) == 1
    assert parse(line).data["message"] == message


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "not JSON"),
        ("Traceback (most recent call last):", "not JSON"),
        ("[1]", "version 1"),
        ("3", "version 1"),
        ('{"event": "failed"}', "version 1"),
        ('{"v": 2, "event": "failed", "time": 1}', "version 1"),
        ('{"v": 1, "event": "other", "time": 1}', "not one of"),
        ('{"v": 1, "event": ["failed"], "time": 1}', "not one of"),
        ('{"v": 1, "time": 1}', "not one of"),
        ('{"v": 1, "event": "failed", "reason": "data", "message": "x"}', "without a time"),
        ('{"v": 1, "event": "failed", "time": true, "reason": "data", "message": "x"}', "without a time"),
        ('{"v": 1, "event": "failed", "time": 1, "reason": 7, "message": "x"}', "failed.reason is 7"),
    ],
)
def test_lines_that_are_no_events(line, message):
    with pytest.raises(EventError, match=message):
        parse(line)


def test_a_file_is_appended_to_and_read_back(tmp_path):
    path = tmp_path / "new" / "events.jsonl"
    for number in range(3):
        writer = EventWriter.open(str(path))
        writer.emit("validation", step=number, loss=0.5)
        assert len(read_events(path)) == number + 1, "a line is there at once"
        writer.close()
    assert path.read_bytes().count(b"\n") == 3 and b"\r" not in path.read_bytes()
    assert [event.data["step"] for event in read_events(path)] == [0, 1, 2]


def test_a_writer_that_was_killed_within_a_line(tmp_path):
    path = tmp_path / "events.jsonl"
    first = TrainEvent("validation", {"step": 1, "loss": 0.5}).line()
    for length in (1, 10, len(first) - 1, len(first)):
        path.write_text(f"{first}\n{first[:length]}")
        assert len(read_events(path)) == 1, "the last line is still being written"
        writer = EventWriter.open(str(path))
        writer.emit("validation", step=2, loss=0.25)
        writer.close()
        assert [event.data["step"] for event in read_events(path)] == [1, 2]


def test_a_whole_line_that_is_no_event_is_an_error(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("hello\n")
    with pytest.raises(EventError, match="not JSON"):
        read_events(path)
    path.write_text("\n\n")
    assert read_events(path) == []
    with pytest.raises(OSError):
        read_events(tmp_path / "missing")


def test_standard_output_and_nowhere(capsys):
    writer = EventWriter.open("-")
    writer.emit("failed", **FAILED)
    writer.close()
    print("still open")
    lines = capsys.readouterr().out.splitlines()
    assert parse(lines[0]).data == FAILED and lines[1] == "still open"
    EventWriter.open("").emit("failed", **FAILED)


def test_a_wrong_event_is_an_error_even_without_a_stream():
    with pytest.raises(EventError):
        EventWriter(None).emit("step", step=1)


class Breaking(io.StringIO):
    """A stream whose writes fail from the second one on."""

    def __init__(self, error):
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text):
        self.writes += 1
        if self.writes > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "pipe"),
        OSError(errno.EINVAL, "what Windows says of a closed pipe"),
        ValueError("I/O operation on closed file"),
    ],
    ids=repr,
)
def test_a_reader_that_is_gone_ends_the_reporting_only(error):
    stream = Breaking(error)
    writer = EventWriter(stream)
    for _ in range(4):
        writer.emit("failed", **FAILED)
    assert stream.writes == 2 and len(stream.getvalue().splitlines()) == 1


def test_a_full_disk_is_not_silent():
    writer = EventWriter(Breaking(OSError(errno.ENOSPC, "No space left on device")))
    writer.emit("failed", **FAILED)
    with pytest.raises(OSError, match="No space"):
        writer.emit("failed", **FAILED)


def test_reasons_are_what_failures_say():
    from qrlora_core import FileFormatError, PathError, TargetError, WeightError
    from train.errors import TrainError
    from train.failures import explained

    errors = [TargetError("x"), WeightError("x"), FileFormatError("x"), PathError("x"), MemoryError("x")]
    errors += [OSError(errno.ENOSPC, "x"), ImportError("x"), KeyError("x"), *(TrainError(one, "x") for one in REASONS)]
    found = {explained(error, None)[0] for error in errors}
    assert found == set(REASONS)
