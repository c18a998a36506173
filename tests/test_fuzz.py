"""Damaged files of every kind: a reader takes each or refuses it, in little time and memory."""

from __future__ import annotations

import time

import fuzz
import pytest

from sdinpaint.errors import SettingError

FILES = 80


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_file_brings_a_reader_to_anything_else(name, tmp_path):
    found = [failure for failure in fuzz.fuzz(name, range(FILES), tmp_path) if failure is not None]
    assert not found, found[0].why


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_good_files_are_read_and_most_spoiled_ones_differ(name, tmp_path):
    target = fuzz.TARGETS[name]
    for content in target.seeds() if name != "pickle" else ():  # which is that of no checkpoint
        (tmp_path / target.name).write_bytes(content)
        target.read(tmp_path / target.name)
    made = [fuzz.spoiled(target, seed) for seed in range(30)]
    assert made == [fuzz.spoiled(target, seed) for seed in range(30)]
    assert len({*made} - {*target.seeds()}) > 20


def raises(error):
    def read(path):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (raises(KeyError("a")), "KeyError"),
        (lambda path: sum(range(10**7)), " s"),
        (lambda path: time.sleep(2), "more than 0 s"),
        (lambda path: path.read_bytes(), ""),
        (raises(SettingError("A", "b", "c")), ""),
    ],
)
def test_what_counts_as_a_failure(read, says, tmp_path, substitute):
    substitute(fuzz, SECONDS=0.02 if says.endswith(" s") else 5, HANGS=0.1 if "more" in says else 60)
    (tmp_path / "file").write_bytes(b"1")
    found = fuzz.complaint(fuzz.Target(read, list, ()), tmp_path / "file")
    assert says in found if says else not found


def test_memory_counts_too(tmp_path, substitute):
    (tmp_path / "file").write_bytes(b"1")
    target = fuzz.Target(lambda path: None, list, ())
    for grown, says in ((500 << 10, ""), (700 << 10, "700 MB more")):
        substitute(fuzz, _peak=iter((1000, 1000 + grown)).__next__)
        assert fuzz.complaint(target, tmp_path / "file") == says
