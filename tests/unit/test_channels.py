"""Channels: what one side writes the other reads, and nothing stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sagec.runtime import comm
from sagec.runtime.comm import ChannelError, open_channel, shared_memory


@pytest.fixture(params=comm.known())
def sides(request):
    """A sender and a receiver of each kind of channel."""
    pair = [open_channel(request.param, owner) for owner in ("p0", "d0")]
    yield pair
    for side in pair:
        side.close()


def test_what_is_written_is_read(sides):
    sender, receiver = sides
    place, segment = sender.allocate(5000)
    assert bytes(segment) == bytes(5000)
    segment[:5] = b"hello"
    assert bytes(receiver.receive(place, 5000)[:6]) == b"hello\0"


def test_a_freed_segment_is_gone_but_stays_readable_where_it_is_open(sides):
    sender, receiver = sides
    place, segment = sender.allocate(64)
    segment[:2] = b"ok"
    opened = receiver.receive(place, 64)
    receiver.free(place)
    assert bytes(opened[:2]) == b"ok"
    with pytest.raises(ChannelError, match=place):
        sender.receive(place, 64)
    receiver.free(place)  # again is no error


def test_a_closing_sender_takes_along_what_nobody_received(sides):
    sender, receiver = sides
    places = [sender.allocate(16)[0] for _ in range(3)]
    receiver.free(places[0])
    sender.close()
    for place in places:
        with pytest.raises(ChannelError):
            receiver.receive(place, 16)


def test_a_segment_of_another_size_is_refused(sides):
    sender, receiver = sides
    place, _ = sender.allocate(64)
    with pytest.raises(ChannelError, match="64 bytes, 65 announced"):
        receiver.receive(place, 65)


def test_a_segment_that_does_not_exist_is_refused(sides):
    with pytest.raises(ChannelError, match="nowhere"):
        sides[1].receive("sagec-nowhere", 10)


def test_a_sender_forgets_what_receivers_have_freed(sides):
    sender, receiver = sides
    for _ in range(200):
        receiver.free(sender.allocate(16)[0])
    assert len(sender._allocated) <= 65


def test_an_unknown_channel_is_named():
    with pytest.raises(ChannelError, match="no channel 'pigeon'; there are: local, shared-memory"):
        open_channel("pigeon", "p0")


@pytest.mark.parametrize("place", ["/etc/passwd", "../sagec-x", "sagec-/x"])
def test_a_place_outside_the_memory_file_system_is_never_touched(place: str):
    side = open_channel("shared-memory", "d0")
    with pytest.raises(ChannelError, match="is no name of a segment"):
        side.receive(place, 10)
    side.free(place)


def test_a_memory_file_system_that_is_full_is_named():
    side = open_channel("shared-memory", "p0")
    with pytest.raises(ChannelError, match=r"no segment of \d+ bytes for KV \(.*\); "):
        side.allocate(1 << 60)
    assert not side._allocated


def test_a_memory_file_system_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "gone")
    with pytest.raises(
        ChannelError, match=r"gone: no segment .*No such file or directory\); check"
    ):
        open_channel("shared-memory", "p0").allocate(64)


def test_another_process_reads_and_frees_a_segment_without_a_word():
    """No tracker warns at the exit of either process, and the receiver's end removes nothing."""
    sender = open_channel("shared-memory", "p0")
    (taken, first), (kept, second) = sender.allocate(4096), sender.allocate(4096)
    first[:5] = second[:5] = b"hello"
    code = (
        "from sagec.runtime.comm import open_channel\n"
        "side = open_channel('shared-memory', 'd0')\n"
        f"print(*(bytes(side.receive(p, 4096)[:5]) for p in ({taken!r}, {kept!r})))\n"
        f"side.free({taken!r})\n"
        "side.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "b'hello' b'hello'\n"
    assert done.stderr == ""
    assert not (shared_memory.FOLDER / taken).exists()
    assert (shared_memory.FOLDER / kept).exists()
    sender.close()
    assert not (shared_memory.FOLDER / kept).exists()


def test_what_a_killed_sender_left_long_ago_is_swept_away(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    old, fresh, alive = (
        tmp_path / f"sagec-p0-{pid}-{name}"
        for pid, name in ((child.pid, "old"), (child.pid, "fresh"), (os.getpid(), "old"))
    )
    for path in (old, fresh, alive):
        path.write_bytes(b"kv")
    for path in (old, alive):
        os.utime(path, (0, 0))
    open_channel("shared-memory", "d0")
    assert (old.exists(), fresh.exists(), alive.exists()) == (False, True, True)
