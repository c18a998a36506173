"""Writers that are killed at random moments break nothing, leave nothing, and their target is there at every moment.

`tests/support/killing.py` says how to do so for hours.
"""

from __future__ import annotations

import time

import killing
import pytest
from killing import kill_writers
from sdinpaint_weights.strays import new_name

KILLS = 10


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "mask", "file", "folder"])
def test_killed_writers(tmp_path, kind):
    found = kill_writers(kind, tmp_path, KILLS)
    assert (found.kills, found.broken, found.gone, found.strays) == (KILLS, 0, 0, 0)
    assert found.looks > KILLS


def test_a_careless_writer_is_found_out(tmp_path, monkeypatch):
    def careless(path, version):
        new_name(path).touch()
        path.unlink(missing_ok=True)
        time.sleep(0.005)
        with path.open("wb", buffering=0) as file:
            for _ in range(4):
                file.write(b"%d" % version)
                time.sleep(0.005)

    monkeypatch.setitem(killing.KINDS, "careless", ("a", careless))
    found = kill_writers("careless", tmp_path, KILLS)
    assert min(found.broken, found.gone, found.left, found.strays) > 0
