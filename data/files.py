"""Files and folders that are written whole or not at all, and what is read or else explained.

    write_file("runs/a/config.json", json_text(settings))
    with whole_folder("runs/a/checkpoint") as part:  # the body writes its files into part
        ...
    config = read_json(Path("data/micro/config.json"))

An OSError that leaves this module names the path that could not be written, because Python's own
for a full disk names none.
"""

import errno
import json
import os
import re
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

LFS_POINTER = b"version https://git-lfs"


def write_file(path, content: str | bytes) -> None:
    """Write a file whole or not at all: until the new content is on disk, the old file stays.

    Raises OSError, with the old file as it was, when the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")  # after a kill, the next write clears it
    content = content.encode() if isinstance(content, str) else content
    with writing(path):
        try:
            part.write_bytes(content)
            sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(directory, replaces=lambda name: False):
    """Yield a folder beside `directory` to write into; it takes that name when the body ends well.

    Until then `directory` stays as it was: what is written reaches the disk before the names
    change. Afterwards the old folder's other files move over, except those that `replaces` names.
    A kill in between leaves the old folder beside the new one, and the next save repairs that.
    Raises ValueError where `directory` is a file or the current directory, and OSError where it
    cannot be made or replaced.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a folder to save to")
    if Path.cwd().is_relative_to(directory):
        raise ValueError(f"{directory} is in use as the current directory; save to another folder")
    part, old = directory.parent / f".{directory.name}.atmanrl-new", set_aside(directory)

    def recover() -> None:  # an old folder that is left goes back, or its files move over
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        elif old.exists():
            for entry in old.iterdir():
                if not replaces(entry.name) and not os.path.lexists(directory / entry.name):
                    os.rename(entry, directory / entry.name)
            shutil.rmtree(old)

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        recover()
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise OSError(f"{directory}: cannot write beside it ({error}); save elsewhere") from None
    try:
        with writing(directory):
            yield part
            if directory.exists():
                shutil.copymode(directory, part)
            for path in (*part.rglob("*"), part):
                sync(path)
        if directory.exists():
            try:
                os.rename(directory, old)
            except OSError as error:  # such as a mount point
                raise OSError(f"{directory} cannot be replaced ({error}); save inside it") from None
        os.rename(part, directory)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        recover()
        raise
    sync(directory.parent)
    recover()


def set_aside(directory: Path) -> Path:
    """Where whole_folder puts the old folder, for the moment between two renames."""
    return directory.parent / f".{directory.name}.atmanrl-old"


@contextmanager
def writing(path):
    """Turn an OSError of the body into one that says which path cannot be written.

    safetensors reports a full disk by an error of its own, which becomes an OSError too.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # it names the path already
            raise
        raise OSError(f"{path} cannot be written ({error})") from None


def sync(path) -> None:
    """Have a file's content, or a folder's list of names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_there(file: Path) -> bool:
    """Whether a file of a checkpoint is there. ValueError for one that is, but cannot be read."""
    if (problem := obstacle(file)) == "":
        with open(file, "rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                problem = "is a Git LFS pointer, not the file: run `git lfs pull` where it is"
    if problem:
        raise ValueError(f"{file} {problem}")
    return problem is not None


def obstacle(path: str | Path, folder: bool = False) -> str | None:
    """What keeps a file, or a folder, from being read: a phrase, or "" for nothing.

    None where nothing stands at that path, not even a broken link.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode) != folder:
            return "a file; give the directory it is in" if folder else "is a folder, not a file"
        return "" if os.access(path, os.R_OK) else "may not be read by you: change its permissions"
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return f"cannot be opened ({error.strerror})"
    for link in (Path(path), *Path(path).parents):
        if os.path.islink(link) and not os.path.exists(link):
            which = "" if link == Path(path) else f"lies behind {link}, which "
            reason = f"{which}is a broken link (to {os.readlink(link)})"
            return f"{reason}: copy what it leads to, or fetch it again"
    return None


def is_text(value) -> bool:
    """Whether it is a str of whole characters: JSON and file names may hold halves (\\ud800)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def json_text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path, advice: str = "fetch the checkpoint again") -> dict:
    """A JSON object from a file. ValueError with the advice when it is missing or damaged."""
    if not is_there(path):
        raise ValueError(f"{path} is missing; {advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # an editor's mark goes
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; {advice}")
    return content
