"""Files and folders are written whole or not at all, and what killed programs left behind is removed."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import ExitStack, suppress

import pytest
from sdinpaint_weights import atomic, strays
from sdinpaint_weights.atomic import atomic_folder, atomic_write, keep_others
from sdinpaint_weights.strays import discard_unfinished, is_temporary, lock, new_name, sweep
from sdinpaint_weights.targets import check_writable, overlap

LONGEST = "x" * 255


@pytest.fixture(params=["without a name", "named"])
def way(request, substitute):
    """Both ways of writing a file; the second one is that of systems without O_TMPFILE."""
    if request.param == "named":
        substitute(atomic, NO_NAME=0)
    return request.param


def write(path, content=b"new"):
    with atomic_write(path) as file:
        file.write(content)


def fill(path, **files):
    with atomic_folder(path) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def temporaries(folder):
    return [name for name in os.listdir(folder) if is_temporary(name)]


@pytest.mark.parametrize("name", ["a", LONGEST, "new/folder/a"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_is_replaced_by_a_whole_one(tmp_path, way, name, exists):
    path = tmp_path / name
    if exists:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")
    with suppress(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"half")
        assert path.exists() == exists
        assert len(temporaries(path.parent)) == (way == "named")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ([name.partition("/")[0]] if exists else [])
    write(path)
    assert content(path.parent) == {path.name: b"new"}


@pytest.mark.parametrize("name", ["a", LONGEST, "new/folder/a"])
@pytest.mark.parametrize("renames", ["exchange", "two renames"])
def test_a_folder_is_replaced_by_a_whole_one(tmp_path, substitute, name, renames):
    if renames == "two renames":
        substitute(atomic, _renameat2=lambda: None)
    path = tmp_path / name
    with suppress(ZeroDivisionError), atomic_folder(path) as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    for number in range(2):
        fill(path, **{f"file{number}": b"new"})
        assert content(path) == {f"file{number}": b"new"}
        assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_take_its_name_leaves_the_previous_one(tmp_path, substitute, monkeypatch):
    substitute(atomic, _renameat2=lambda: None)
    fill(tmp_path / "a", old=b"old")
    rename, given = os.replace, []

    def fail_the_second_time(*names):
        given.append(names)
        if len(given) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*names)

    monkeypatch.setattr(os, "replace", fail_the_second_time)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "a", new=b"new")
    assert content(tmp_path / "a") == {"old": b"old"}
    assert os.listdir(tmp_path) == ["a"]


def test_the_current_folder_stays_and_its_content_is_exchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old").touch()
    (tmp_path / "note").write_bytes(b"mine")
    with atomic_folder(tmp_path) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "new").touch()
    assert sorted(os.listdir()) == ["note", "unet"]
    assert os.listdir("unet") == ["new"]


def test_permissions_stay(tmp_path, way):
    (tmp_path / "a").touch(mode=0o640)
    (tmp_path / "b").mkdir(mode=0o710)
    write(tmp_path / "a")
    fill(tmp_path / "b", new=b"")
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o710]


def test_links_stay_links(tmp_path, way):
    (tmp_path / "far").mkdir()
    (tmp_path / "file").symlink_to("far/file")
    (tmp_path / "folder").symlink_to("far/folder")
    write(tmp_path / "file")
    fill(tmp_path / "folder", new=b"new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    assert content(tmp_path / "folder") == {"new": b"new"}


def test_what_is_marked_read_only_stays(tmp_path):
    fill(tmp_path / "a", old=b"old")
    (tmp_path / "a" / "old").chmod(0o444)
    with pytest.raises(PermissionError, match="read-only"):
        write(tmp_path / "a" / "old")
    (tmp_path / "a").chmod(0o555)
    with pytest.raises(PermissionError, match="read-only"):
        fill(tmp_path / "a", new=b"new")
    (tmp_path / "a").chmod(0o755)
    assert content(tmp_path / "a") == {"old": b"old"}


def test_a_file_does_not_replace_a_folder_nor_a_folder_a_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "folder")
    with pytest.raises(NotADirectoryError):
        fill(tmp_path / "file")


def test_other_files_of_a_folder_are_kept(tmp_path):
    fill(tmp_path / "a", note=b"mine", model=b"old")
    (tmp_path / "a" / "unet").mkdir()
    (tmp_path / "a" / "unet" / "note").write_bytes(b"mine, too")
    (tmp_path / "a" / "link").symlink_to("nowhere")
    new_name(tmp_path / "a" / "x").touch()
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "model").write_bytes(b"new")
        keep_others(tmp_path / "a", folder)
    assert sorted(os.listdir(tmp_path / "a")) == ["link", "model", "note", "unet"]
    assert (tmp_path / "a" / "model").read_bytes() == b"new"
    assert (tmp_path / "a" / "unet" / "note").read_bytes() == b"mine, too"
    assert os.readlink(tmp_path / "a" / "link") == "nowhere"


# what killed programs left behind


def abandoned(target, kind="tmp"):
    path = new_name(target, kind)
    path.mkdir()
    (path / "half").write_bytes(b"half")
    return path


@pytest.mark.parametrize("make", [abandoned, lambda target: new_name(target).touch()])
@pytest.mark.parametrize("next_write", [write, fill])
def test_the_next_write_removes_what_nobody_holds(tmp_path, make, next_write):
    make(tmp_path / "another")
    next_write(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_what_is_being_written_stays(tmp_path, substitute):
    substitute(atomic, NO_NAME=0)
    with atomic_write(tmp_path / "a") as one, atomic_folder(tmp_path / "b") as other:
        sweep(tmp_path / "c")
        one.write(b"new")
        (other / "new").touch()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_temporary_that_was_swept_before_it_was_locked_is_made_again(tmp_path, substitute):
    substitute(atomic, NO_NAME=0)
    calls = []

    def swept(handle):
        calls.append(handle)
        if len(calls) == 1:
            sweep(tmp_path / "a")
        return lock(handle)

    substitute(atomic, lock=swept)
    write(tmp_path / "a")
    assert len(calls) == 2
    assert content(tmp_path) == {"a": b"new"}


def test_what_belongs_to_another_user_stays(tmp_path, substitute):
    stray = abandoned(tmp_path / "a")
    substitute(os, geteuid=lambda: 12345)
    sweep(tmp_path / "a")
    assert stray.exists()


@pytest.mark.parametrize("kind", ["another machine", "no locks"])
def test_where_no_lock_tells_the_age_does(tmp_path, substitute, failing, kind):
    stray = abandoned(tmp_path / "a")
    if kind == "no locks":
        failing(strays.fcntl, "flock", OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
    else:
        substitute(strays, _kernel=lambda: "another")
    sweep(tmp_path / "a")
    assert stray.exists()
    os.utime(stray, (time.time() - 100_000,) * 2)
    sweep(tmp_path / "a")
    assert not stray.exists()


@pytest.mark.parametrize("change", [lambda name: name + "x", lambda name: name[1:], lambda name: "a" + name])
def test_names_that_only_look_alike_stay(tmp_path, change):
    path = tmp_path / change(new_name(tmp_path / "a").name)
    path.touch()
    sweep(tmp_path / "a")
    assert path.exists()


def test_a_link_of_such_a_name_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    new_name(tmp_path / "a").symlink_to("mine")
    write(tmp_path / "a")
    assert os.listdir(tmp_path / "mine") == ["file"]


def test_the_previous_folder_of_a_program_that_was_killed_between_two_renames_is_put_back(tmp_path):
    abandoned(tmp_path / "a", "old")
    write(tmp_path / "another")
    assert not (tmp_path / "a").exists()
    with suppress(ZeroDivisionError), atomic_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert content(tmp_path / "a") == {"half": b"half"}
    abandoned(tmp_path / "a", "old")
    fill(tmp_path / "a", new=b"new")
    assert sorted(os.listdir(tmp_path)) == ["a", "another"]


def test_a_folder_of_many_files_is_not_listed_each_time(tmp_path, substitute, spy):
    substitute(strays, MANY=-1, REST=10**9)
    listed = spy(os, "listdir")
    for number in range(5):
        write(tmp_path / str(number))
    assert len(listed) == 1


def test_the_end_of_the_process_removes_what_is_unfinished(tmp_path, substitute):
    substitute(atomic, NO_NAME=0)
    with ExitStack() as writing:
        writing.enter_context(suppress(OSError))
        writing.enter_context(atomic_write(tmp_path / "a"))
        writing.enter_context(atomic_folder(tmp_path / "b"))
        assert len(os.listdir(tmp_path)) == 2
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)  # as in a forked process
            discard_unfinished()
        assert len(os.listdir(tmp_path)) == 2
        discard_unfinished()
        assert os.listdir(tmp_path) == []


def test_a_lock_lasts_as_long_as_its_handle(tmp_path):
    (tmp_path / "a").touch()
    with open(tmp_path / "a") as one, open(tmp_path / "a") as other:
        assert lock(one.fileno())
        assert not lock(other.fileno())
        one.close()
        assert lock(other.fileno())


# places


@pytest.mark.parametrize(
    ("target", "shared"),
    [
        ("model", True),
        ("link", True),
        ("model/unet", True),
        ("model/new/folder", True),
        ("link/new", True),
        (".", True),
        ("hard", True),
        ("linked", True),
        ("holds", True),
        ("hard.copy", False),
        ("new", False),
        ("models", False),
        ("other", False),
    ],
)
def test_places_that_overlap(tmp_path, target, shared):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    weights = tmp_path / "model" / "unet" / "weights"
    weights.write_bytes(b"weights")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "linked").symlink_to(weights)
    os.link(weights, tmp_path / "hard")
    (tmp_path / "holds" / "deep").mkdir(parents=True)
    os.link(weights, tmp_path / "holds" / "deep" / "a")
    shutil.copyfile(weights, tmp_path / "hard.copy")
    (tmp_path / "other").mkdir()
    assert overlap(tmp_path / target, tmp_path / "model") == shared
    assert not overlap(tmp_path / target, tmp_path / "missing")


def test_a_file_in_the_folder_of_another_does_not_overlap_with_it(tmp_path):
    (tmp_path / "model.ckpt").touch()
    assert overlap(tmp_path, tmp_path / "model.ckpt")
    assert not overlap(tmp_path / "model.safetensors", tmp_path / "model.ckpt")


def test_a_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "folder" / "a")
    assert os.listdir(tmp_path) == []
