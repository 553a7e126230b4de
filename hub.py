"""A checkpoint's name on the command line -> its directory on this machine.

    checkpoint_directory("data/micro")                             # a directory, as it is
    checkpoint_directory("meta-llama/Llama-3.2-3B-Instruct")       # on the hub: downloaded and kept
    checkpoint_directory("meta-llama/Llama-3.2-3B-Instruct@main")  # a branch, tag or commit of it

huggingface_hub downloads, into its cache below HF_HOME. Chosen here are the files, and what a user
reads where it does not work out: one sentence that ends with the next step.
"""

import errno
import json
import os
import re
from pathlib import Path

INDEX = "model.safetensors.index.json"
FILES = ["model.safetensors", "model-*-of-*.safetensors", INDEX]
FILES += ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FILES += ["special_tokens_map.json", "chat_template.jinja"]
SUBFOLDERS = "*/*"  # not wanted, and a hub's "*" matches slashes: original/ has the weights again
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@((?!.*\.\.)\w[\w./+-]*))?", re.ASCII)
NO_NAME = (
    "no such directory, and no name for the hub; give a checkpoint directory, OWNER/NAME (such as "
    "meta-llama/Llama-3.2-3B-Instruct) or OWNER/NAME@REVISION"
)


def checkpoint_directory(path_or_repo, flag: str = "--model") -> Path:
    """The local directory of a checkpoint; a hub name is downloaded first.

    A directory here wins over a name on the hub. Without a network the copy of an earlier download
    serves, if it is complete. Raises FileNotFoundError naming the flag, the name and what to do.
    """
    name = str(path_or_repo)
    try:
        return local_directory(name) or hub_directory(name, flag)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{flag} {name}: {error}") from None


def local_directory(name: str) -> Path | None:
    """The directory of that name, None without one; FileNotFoundError for what is in its place."""
    path = Path(name)
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError):
        wanted = Path(os.path.realpath(name))
        previous = set_aside(wanted)
        if not previous.is_dir():
            return None
        reason = "no such directory, a save was cut short; rename the checkpoint before it back"
        raise FileNotFoundError(f"{reason}: mv {previous} {wanted}") from None
    except OSError as error:  # such as a folder above that may not be entered
        raise FileNotFoundError(f"cannot be opened ({error.strerror})") from None
    if not path.is_dir():
        raise FileNotFoundError("a file; give the directory it is in")
    return path


def set_aside(directory: Path) -> Path:
    """Where checkpoint.py's save puts the old folder, for the moment between two renames."""
    return directory.parent / f".{directory.name}.atmanrl-old"


def hub_directory(name: str, flag: str) -> Path:
    """The hub's copy of OWNER/NAME[@REVISION], complete; FileNotFoundError with the reason."""
    if not (match := HUB_NAME.fullmatch(name)):
        raise FileNotFoundError(NO_NAME)
    repo, revision = match.groups()
    from huggingface_hub import constants, snapshot_download  # slow, and mostly not needed
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":  # one rank of a machine shows the bars
        disable_progress_bars()

    def fetch(**options) -> Path:
        # Every rank comes here at once. The hub locks each file and renames it when it is whole: of
        # a machine's ranks one downloads, and the others wait and then find the file.
        options |= {"allow_patterns": FILES, "ignore_patterns": SUBFOLDERS, "revision": revision}
        return Path(snapshot_download(repo, **options))

    again = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "run again with a network"
    pinned = f" --revision {revision}" if revision else ""
    elsewhere = f"or `hf download {repo}{pinned} --local-dir DIR` elsewhere and {flag} DIR here"
    try:
        directory = fetch()
    except Exception as error:  # the hub's, the network library's, the disk's
        if reason := refusal(error, repo):
            raise FileNotFoundError(reason) from None
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub did not deliver ({cause(error)})"
        try:
            directory = fetch(local_files_only=True)
        except Exception as absent:
            held = "no such directory, no copy in the hub's cache"
            if hasattr(absent, "snapshot_path"):  # an IncompleteSnapshotError, of later versions
                held = "only a part of it is in the hub's cache"
            raise FileNotFoundError(f"{held}, and {why}; {again}, {elsewhere}") from None
    missing = missing_weights(directory)
    if missing == ["model.safetensors"]:
        raise FileNotFoundError(
            f"its copy in the hub's cache has neither model.safetensors nor {INDEX}; name a "
            "repository with safetensors (.bin, .pth and .gguf are not read) or, if the download "
            f"was cut short, {again}"
        )
    if missing:
        reason = f"only a part of it is in the hub's cache, {missing[0]} is not"
        raise FileNotFoundError(f"{reason}; {again}, {elsewhere}")
    return directory


def refusal(error: Exception, repo: str) -> str | None:
    """What the hub or the disk says no to, and the next step; None for every other error."""
    from huggingface_hub import constants, errors

    page, cache = f"https://huggingface.co/{repo}", constants.HF_HUB_CACHE
    status = getattr(getattr(error, "response", None), "status_code", None)
    code = getattr(error, "errno", None)
    if isinstance(error, errors.HFValidationError):
        return NO_NAME
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too: asked first
        if status == 403:
            return f"gated, and your account has no access yet; ask at {page}, then run again"
        return f"gated; accept the licence at {page}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such directory, and on the hub no such repository or a private one; check the "
            "spelling, or `hf auth login` (or set HF_TOKEN) as someone who may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision; give a branch, tag or commit ({page}/commits)"
    if status == 401:
        return "the hub refuses the token; `hf auth login` again, or correct or unset HF_TOKEN"
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):  # hf_xet: no code
        return f"no space left for {cache}; free some, or set HF_HOME to a larger disk"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        where = getattr(error, "filename", None) or cache
        return f"no permission for {where}; set HF_HOME to a folder of your own"
    return None


def cause(error: Exception) -> str:
    """One line: the error, or the one behind the hub's FileNotFoundError (not in the cache)."""
    error = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def missing_weights(directory: Path) -> list[str]:
    """The weight files that are not there. A damaged index is checkpoint.py's to name."""
    names = ["model.safetensors"]
    if (directory / INDEX).exists():
        try:
            names = json.loads((directory / INDEX).read_bytes())["weight_map"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return []
    return sorted({name for name in map(str, names) if not (directory / name).exists()})
