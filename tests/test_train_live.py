"""The live line of a training on terminals of every width and without one, and the time that is left."""

import fcntl
import io
import math
import os
import re
import struct
import termios
import threading

import pytest
from training_logs import STATE, Clock, log_of, read_csv, row

from fused_resnet.training import live, summary
from fused_resnet.training.live import Standing, TimeLeft


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self, columns):
        self.master, slave = os.openpty()
        self.resize(columns)
        self.stream = os.fdopen(slave, "w")
        self.found = bytearray()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def resize(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self):
        while True:
            try:
                part = os.read(self.master, 4096)
            except OSError:  # the other end is closed
                return
            if not part:
                return
            self.found += part

    def text(self):
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return self.found.decode()


def states(text):
    """Every state of every line, in order."""
    return [state.rstrip() for state in re.split(r"[\r\n]+", text) if state.strip()]


def screen(text):
    """The lines that a terminal shows in the end."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells = []
        for state in line.split("\r"):
            cells[: len(state)] = state
        lines.append("".join(cells).rstrip())
    return lines


def halfway(log, clock, of_images=10_000):
    """Batches of 100 images, ten a second, to 41 % of the third epoch."""
    for images in range(100, 4101, 100):
        clock.now += 0.1
        log.batch(Standing(epoch=3, images=images, of_images=of_images, step=images // 100, **STATE))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            120,
            "epoch 3/90  41 %  1,234 images/s  loss 0.123  top-1 95.2 %  lr 0.01  waited 2 %  "
            "left 0:06 (all 90: 14:36)",
        ),
        (80, "3/90  41 %  1,234/s  loss 0.123  95.2 %  lr 0.01  wait 2 %  0:06 (14:36)"),
        (60, "3/90 41% 1234/s 0.123 95.2% lr 0.01 wait 2% 0:06 (14:36)"),
    ],
)
def test_live_line_has_every_number_and_fits(tmp_path, columns, expected):
    terminal, clock = Terminal(columns), Clock()
    log = log_of(tmp_path, stream=terminal.stream, clock=clock)
    halfway(log, clock)
    log.close()
    found = states(terminal.text())
    assert found[-1] == expected
    assert len(found) > 15
    assert max(map(len, found)) < columns


def test_live_line_shortens_by_importance():
    state = Standing(100, 1_200_000, 1_281_167, 1, 123456.0, 12.3456, 0.952, 0.000123456, 0.5)
    lines = [live.line(state, 300, (12345.6, 1_234_567.0), width) for width in range(121)]
    assert all(len(text) <= width for width, text in enumerate(lines))
    assert lines[59] == "100/300 94% 123456/s 12.346 95.2% 3:25:46 (14d6h)"
    assert lines[20] == "100/300 94% 12.346"
    assert lines[9].startswith("100/300")


def test_live_line_without_what_is_not_known():
    state = Standing(1, 0, 0, 0, None, None, None, None, None)
    assert [live.line(state, 2, None, width) for width in (120, 9, 3)] == ["epoch 1/2", "epoch 1/2", "1/2"]
    nan = Standing(1, 5, 10, 0, math.nan, math.nan, None, 0.1, 0.0)
    assert live.line(nan, 2, (math.inf, 3.0), 120) == (
        "epoch 1/2  50 %  nan images/s  loss nan  lr 0.1  waited 0 %  left ? (all 2: 0:03)"
    )


def test_whole_lines_do_not_break_the_live_one(tmp_path):
    terminal, clock = Terminal(80), Clock()
    log = log_of(tmp_path, stream=terminal.stream, clock=clock)
    halfway(log, clock)
    log.say("saved")
    clock.now += 1
    log.batch(Standing(epoch=3, images=4200, of_images=10_000, step=42, **STATE))
    log.phase("validating")
    log.epoch(row(3))
    log.phase("saving")
    log.close()
    log.close()
    shown = screen(terminal.text())
    assert shown[0] == "saved"
    assert shown[1] == summary.line(row(3), 90)
    assert shown[2:] == [""]  # what has ended is not said any longer


def test_narrowed_terminal(tmp_path):
    terminal, clock = Terminal(120), Clock()
    log = log_of(tmp_path, stream=terminal.stream, clock=clock)
    halfway(log, clock)
    terminal.resize(40)
    clock.now += 1
    log.batch(Standing(epoch=3, images=4200, of_images=10_000, step=42, **STATE))
    log.close()
    assert len(states(terminal.text())[-1]) < 40


def test_draws_at_most_ten_times_a_second(tmp_path):
    terminal, clock = Terminal(80), Clock()
    log = log_of(tmp_path, stream=terminal.stream, clock=clock)
    for images in range(1, 1001):
        clock.now += 0.001
        log.batch(Standing(epoch=1, images=images, of_images=10_000, step=images, **STATE))
    log.close()
    assert 9 <= len(states(terminal.text())) <= 11


def test_no_terminal_has_a_line_an_epoch_and_one_each_half_minute(tmp_path):
    stream, clock = io.StringIO(), Clock()
    log = log_of(tmp_path, stream=stream, clock=clock, epochs=2)
    for epoch in (1, 2):
        for images in range(1, 101):
            clock.now += 1
            log.batch(Standing(epoch=epoch, images=images, of_images=100, step=images, **STATE))
        log.phase("validating")
        log.epoch(row(epoch))
    log.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert [line[:15] for line in lines if "left" in line] == [
        f"epoch {epoch}/2  {share} %" for epoch in (1, 2) for share in (30, 60, 90)
    ]
    assert [line for line in lines if "val" in line] == [summary.line(row(epoch), 2) for epoch in (1, 2)]


def test_terminal_that_is_gone(tmp_path):
    terminal, clock = Terminal(80), Clock()
    log = log_of(tmp_path, stream=terminal.stream, clock=clock)
    halfway(log, clock)
    terminal.text()
    clock.now += 1
    log.batch(Standing(epoch=3, images=4200, of_images=10_000, step=42, **STATE))
    log.say("saved")
    log.epoch(row(3))
    log.close()
    assert [r["epoch"] for r in read_csv(tmp_path)] == ["3"]


def test_time_left_by_hand():
    left = TimeLeft(epochs=3)
    for now, epoch, images in [(50, 1, 10), (52, 1, 20), (54, 1, 30)]:
        left.see(now, epoch, images)
    # 0.2 s an image: 70 images of this epoch, 200 of two more; nothing is known of what lies between epochs.
    assert left.left(100) == pytest.approx((14, 54))
    left.see(68, 1, 100)
    # 10 s of validation and 2 s for the first ten images.
    left.see(80, 2, 10)
    assert left.left(100) == pytest.approx((18, 18 + 10 + 20 + 10))
    left.see(98, 2, 100)
    assert left.left(100) == pytest.approx((0, 10 + 20 + 10))


def test_time_left_follows_a_change_of_speed():
    left = TimeLeft(epochs=1)
    assert left.left(100) is None
    for second in range(400):
        left.see(second, 1, 100 * second if second < 100 else 10_000 + 10 * (second - 100))
    assert left.left(20_000)[0] == pytest.approx((20_000 - 12_990) / 10, rel=0.1)


def test_time_left_of_epochs_of_one_batch():
    left = TimeLeft(epochs=10)
    for epoch in (1, 2, 3):
        left.see(5.0 * epoch, epoch, 8)
    assert left.left(8) == pytest.approx((0, 8 * 5))


def test_time_left_of_an_epoch_resumed_amid():
    left = TimeLeft(epochs=1)
    left.see(0, 1, 900)  # in this process no image is known to have taken any time
    assert left.left(1000) is None
    left.see(1, 1, 910)
    assert left.left(1000) == pytest.approx((9, 9))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (5025, "1:23:45"), (86400, "1 d 0 h"), (183_600, "2 d 3 h")]
)
def test_duration(seconds, text):
    assert live.duration(seconds) == text
