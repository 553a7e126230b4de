"""Files and folders appear whole or not at all; JSON is read, or a sentence says why not."""

import errno
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from data import files
from data.files import read_json, whole_folder, write_file, writing


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save(directory, text, names=("a", "b", "c")):
    """One folder of three files that hold the text."""
    with whole_folder(directory, replaces=lambda name: name.startswith("old")) as part:
        for name in names:
            (part / name).write_text(text)


def saved(directory):
    """The text of a folder that `save` wrote; the three files must agree."""
    (text,) = {(directory / name).read_text() for name in ("a", "b", "c")}
    return text


# -------------------------------------------------------------------------------------- write_file


@pytest.mark.parametrize("content", ["später", "später".encode()])
def test_write_file(tmp_path, content):
    write_file(tmp_path / "file", "before")
    write_file(tmp_path / "file", content)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "später"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["sync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_file(tmp_path / "file", "before")
    monkeypatch.setattr(files if step == "sync" else os, step, full)
    with pytest.raises(OSError, match=f"{tmp_path}/file cannot be written .*No space left"):
        write_file(tmp_path / "file", "after")
    assert contents(tmp_path) == {Path("file"): b"before"}
    with pytest.raises(OSError, match="nowhere/file cannot be written .*No such file"):
        write_file(tmp_path / "nowhere" / "file", "after")


def test_an_error_while_writing_names_the_path_once():
    for error in (OSError(errno.EROFS, "read-only"), SafetensorError("read-only")):
        with pytest.raises(OSError, match="^outer cannot be written .*read-only"):
            with writing("outer"):
                raise error
        with pytest.raises(OSError, match="^inner cannot be written"):
            with writing("outer"), writing("inner"):
                raise error


# ------------------------------------------------------------------------------------ whole_folder


def test_a_folder_is_made_with_those_above_it(tmp_path):
    save(tmp_path / "new" / "folder", "first")
    assert saved(tmp_path / "new" / "folder") == "first"
    assert os.listdir(tmp_path / "new") == ["folder"]


def test_other_files_of_a_folder_are_moved_not_copied(tmp_path):
    target = tmp_path / "target"
    save(target, "first", names="abcd")
    for name in ("old", "old-too", "log.txt"):
        (target / name).write_text(name)
    (target / "folder").mkdir()
    (target / "folder" / "mine.txt").write_text("keep me")
    (target / "dangling").symlink_to("nowhere")
    (target / "itself").symlink_to(target)
    target.chmod(0o700)
    with open(target / "log.txt", "a") as log:  # as a running process would hold it
        save(target, "second")
        log.write(" goes on")
    assert saved(target) == "second" and (target / "d").read_text() == "first"
    assert (target / "log.txt").read_text() == "log.txt goes on"
    assert (target / "folder" / "mine.txt").read_text() == "keep me"
    assert os.readlink(target / "dangling") == "nowhere"
    assert os.readlink(target / "itself") == str(target)
    assert not list(target.glob("old*"))
    assert target.stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path) == ["target"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    save(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and saved(tmp_path / "disk") == "text"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        save(tmp_path / "file", "text")
    with pytest.raises(OSError, match="file/inside: cannot write beside it .*; save elsewhere"):
        save(tmp_path / "file" / "inside", "text")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "..", "inner/.."])
def test_the_current_directory_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="in use as the current directory"):
        save(name, "text")
    assert os.listdir(tmp_path) == ["here"] and os.listdir(tmp_path / "here") == ["inner"]


def test_a_body_that_fails_leaves_the_folder_as_it_was(tmp_path):
    save(tmp_path / "target", "first")
    for error in (KeyboardInterrupt, ValueError("inner")):
        with pytest.raises(BaseException, match="^(inner)?$"):
            with whole_folder(tmp_path / "target") as part:
                (part / "a").write_text("second")
                raise error
        assert saved(tmp_path / "target") == "first" and os.listdir(tmp_path) == ["target"]


def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "target"
    save(target, "first")
    before, rename = contents(tmp_path), os.rename

    for refused in (target, tmp_path / ".target.atmanrl-new"):  # first the old one, then the new

        def busy(source, *rest, refused=refused):
            if Path(source) == refused:
                raise OSError(errno.EBUSY, "Device or resource busy")
            rename(source, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", busy)
            with pytest.raises(OSError, match="busy"):
                save(target, "second")
        assert contents(tmp_path) == before


def test_everything_is_on_disk_before_a_name_changes(tmp_path, monkeypatch):
    save(tmp_path / "target", "first")
    done, sync, rename = [], files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda *a: (done.append("rename"), rename(*a)))
    save(tmp_path / "target", "second")
    assert set(done[:4]) == {"a", "b", "c", ".target.atmanrl-new"}
    assert done[4:] == ["rename", "rename", tmp_path.name]


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs, so cleaning up is disabled too."""


def test_a_kill_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    """Before each call that touches the disk in turn: the old folder or the new one is there."""
    target, aside = tmp_path / "target", tmp_path / ".target.atmanrl-old"
    calls = [(Path, "write_text"), (files, "sync"), (os, "rename"), (shutil, "copymode")]
    real = {name: getattr(module, name) for module, name in calls}
    remove, clock = shutil.rmtree, {"now": 0, "kill at": 0}

    def until_killed(name):
        def call(*arguments):
            clock["now"] += 1
            if clock["now"] > clock["kill at"]:
                raise Killed
            return real[name](*arguments)

        return call

    def remove_while_alive(*arguments, **options):  # a killed process cleans nothing up
        if clock["now"] <= clock["kill at"]:
            remove(*arguments, **options)

    finished, seen = False, set()
    while not finished:
        clock["kill at"] += 1
        clock["now"] = 0
        remove(target, ignore_errors=True)
        save(target, "first")
        (target / "notes.txt").write_text("keep me")
        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, until_killed(name))
            patch.setattr(shutil, "rmtree", remove_while_alive)
            try:
                save(target, "second")
                finished = True
            except Killed:
                pass
        notes = [f for f in (target / "notes.txt", aside / "notes.txt") if f.exists()]
        assert [file.read_text() for file in notes] == ["keep me"]
        seen.add((saved(target if target.is_dir() else aside), target.is_dir()))
        save(target, "third")  # the next save sets everything right
        assert saved(target) == "third"
        assert (target / "notes.txt").read_text() == "keep me"
        assert os.listdir(tmp_path) == ["target"]
    assert seen == {("first", True), ("first", False), ("second", True)}
    assert clock["kill at"] > 9


@contextmanager
def full_disk(size):
    """No file can grow beyond this size: writing fails half way, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_folder(tmp_path):
    save(tmp_path / "target", "first")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="target cannot be written .*File too large"):
        with full_disk(100):
            save(tmp_path / "target", "second" * 99)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------- read_json


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff", b"[1]", b"1"])
def test_json_that_is_no_object_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}.*(missing|damaged|JSON object).*; look up"):
        read_json(path, "look up")
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^{path} is a broken link .to nowhere"):
        read_json(path)
    path.unlink()
    for mark in ("", "\ufeff"):  # some editors begin a file with one
        path.write_text(mark + '{"a": 1}', encoding="utf-8")
        assert read_json(path) == {"a": 1}
