"""The door for files from outside: what is no regular file is refused at once, and what is read whole has a bound."""

import os
import socket
import time

import pytest
from sdinpaint_weights import door
from sdinpaint_weights.door import Refusal, open_regular, read_whole

PLACES = {
    "pipe": "special",
    "link to a pipe": "special",
    "socket": "special",
    "loop": "special",
    "dangling link": "missing",
    "folder": "folder",
    "nothing": "missing",
    "file/below": "missing",
    "n" * 300: "missing",
    "p" * 5000: "missing",
    "nul\0": "missing",
    "lone \ud800": "missing",
    "/dev/zero": "special",
    "/proc/self/mem": "special",
    "/proc/self/maps": "special",
    "/proc": "folder",
    "": "missing",
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("pipe", "link to a pipe")
    os.symlink("loop", "loop")
    os.symlink("gone", "dangling link")
    os.mkdir("folder")
    (tmp_path / "file").write_bytes(b"0123456789")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket")
    yield
    listening.close()


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("read", [open_regular, lambda path: read_whole(path, 100)], ids=["open", "whole"])
def test_what_is_no_file_is_refused_at_once(path, read):
    start = time.monotonic()
    with pytest.raises(Refusal) as caught:
        read(path)
    assert time.monotonic() - start < 1
    assert caught.value.reason == PLACES[path]
    assert 0 < len(caught.value.found) < 200


@pytest.mark.usefixtures("places")
def test_a_file_is_read_up_to_its_bound():
    assert read_whole("file", 10) == b"0123456789"
    with open_regular("file") as file:
        assert file.read() == b"0123456789"
    with pytest.raises(Refusal, match="more than 9 bytes") as caught:
        read_whole("file", 9)
    assert caught.value.reason == "large"


@pytest.mark.usefixtures("places")
def test_a_path_that_becomes_a_pipe_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(door.os, "stat", lambda _, real=os.stat: real("file"))
    with pytest.raises(Refusal, match="pipe"):
        open_regular("pipe")
