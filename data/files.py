"""Files and folders that are written whole or not at all, and JSON that is read or explained.

    write_file("runs/a/config.json", json_text(settings))
    with whole_folder("runs/a/checkpoint") as part:  # the body writes its files into part
        ...
    config = read_json(Path("data/micro/config.json"))

An OSError that leaves this module names the path that could not be written, because Python's own
for a full disk names none.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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


def json_text(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path, advice: str = "fetch the checkpoint again") -> dict:
    """A JSON object from a file. ValueError with the advice when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object; {advice}")
    return content
