"""A published file, fetched once into the user's cache and checked.

    file = fetch(url, cache_folder("gsm8k") / "test.jsonl", 749_738, "3730d3...", "GSM8K")

The user's own copy, named with --data-dir, never comes through here.
"""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from tqdm import tqdm


def cache_folder(name: str) -> Path:
    """~/.cache/atmanrl/NAME; $XDG_CACHE_HOME stands for ~/.cache where it is set."""
    # an empty XDG_CACHE_HOME counts as unset, as its specification says
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "atmanrl" / name


def fetch(url: str, target: Path, size: int, sha256: str, name: str) -> Path:
    """`target`, holding the file of that sha256: as found there, else downloaded from `url`.

    size: bytes, for the progress bar. name: the dataset's, for bar and messages. Several processes
    may call this at once. FileNotFoundError where the download fails and ValueError where another
    file arrives; both say what to fetch by hand, and nothing is left behind.
    """
    if target.is_file() and sha256_of(target) == sha256:
        return target
    by_hand = f"fetch {url} by hand into a folder and name that with --data-dir"
    try:
        _download(url, target, size, sha256, name)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise FileNotFoundError(
            f"{target.name} of {name} could not be downloaded to {target} ({error}): {by_hand}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{target.name} of {name} {error}: try again, or {by_hand}") from None
    return target


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # in chunks: MMLU has 166 MB


def _download(url: str, target: Path, size: int, sha256: str, name: str) -> None:
    """Fetches to a temporary name, checks, then renames: `target` is complete or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own for each process, as several may download at once
    handle, part_name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    part = Path(part_name)
    try:
        with (
            os.fdopen(handle, "wb") as out,
            urllib.request.urlopen(url, timeout=30) as response,
            tqdm(total=size, unit="B", unit_scale=True, desc=f"{name} {target.name}") as progress,
        ):
            while chunk := response.read(1 << 16):
                out.write(chunk)
                progress.update(len(chunk))
        if sha256_of(part) != sha256:
            raise ValueError("arrived damaged or changed (its sha256 differs)")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
