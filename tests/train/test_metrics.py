import json
import struct

from tensorboardX.proto.event_pb2 import Event

from blockjax.train.metrics import MetricsLog, read_metrics


def events(folder) -> list[Event]:
    """What TensorBoard reads: records of length, checksum, event, checksum."""
    found = []
    for file in sorted(folder.glob("events.*")):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def scalars(folder) -> dict:
    return {(e.step, v.tag): v.simple_value for e in events(folder) for v in e.summary.value}


def test_lines_and_events(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 2.5})
    log.write(2, {"train/loss": 0.1, "train/z": 1e-30})
    log.write(2, {"val/bits_per_byte": 1.25})
    log.flush()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "train/loss": 2.5}',
        '{"step": 2, "train/loss": 0.1, "train/z": 1e-30}',
        '{"step": 2, "val/bits_per_byte": 1.25}',
    ]
    log.close()
    written = scalars(tmp_path / "tensorboard")
    assert written.keys() == {(1, "train/loss"), (2, "train/loss"), (2, "train/z"), (2, "val/bits_per_byte")}
    assert written[1, "train/loss"] == 2.5


def test_what_comes_after_the_checkpoint_is_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 8):
        log.write(step, {"train/loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # a crash
    log = MetricsLog(tmp_path, start=5)
    log.write(6, {"train/loss": 9.0})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in lines] == [*(1 / s for s in range(1, 6)), 9.0]
    # TensorBoard hides the old events from there on.
    assert 6 in [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]


def test_without_tensorboard(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, {"train/loss": float("nan")})
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert "NaN" in json.dumps(read_metrics(tmp_path / "metrics.jsonl"))


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
