"""What a long evaluation has done so far, on disk: kill it, give the same command, it goes on.

    journal = Journal(Path("out"), settings)        # settings: what the rows depend on
    done = journal.rows("reliance", arm)            # (id, sample) -> row
    journal.add("reliance", arm, rows)              # on disk when this returns

The file is partial.jsonl: the settings, then one line per finished batch. A line that was cut off
while it was written is dropped. Without a folder nothing is kept beyond the process.
"""

import json
import os
from pathlib import Path


class Journal:
    def __init__(self, folder: Path | None, settings: dict[str, object]):
        """ValueError where the folder holds rows of other settings, or what no journal holds."""
        self.path = folder and folder / "partial.jsonl"
        self._rows: dict[tuple[str, str], dict[tuple[str, int], dict]] = {}
        settings = json.loads(json.dumps(settings))  # as they will be read again
        lines = self._read() if self.path else []
        if lines:
            found = lines[0]["settings"]
            for name, value in settings.items():
                if found.get(name) != value:
                    raise ValueError(
                        f"--out {folder}: partial.jsonl is of an unfinished evaluation with "
                        f"{name} {found.get(name)}, this one has {value}; give the same, or "
                        "another --out, or delete that file"
                    )
            for line in lines[1:]:
                self._take(line["stage"], line["arm"], line["rows"])
        elif self.path:
            self._append({"settings": settings})

    def rows(self, stage: str, arm: str) -> dict[tuple[str, int], dict]:
        """Rows of a stage by (id, sample): the journal's own dict, so it grows with `add`."""
        return self._rows.setdefault((stage, arm), {})

    def add(self, stage: str, arm: str, rows: list[dict]) -> None:
        """Keep a finished batch; each row has an id and a sample."""
        if self.path:
            self._append({"stage": stage, "arm": arm, "rows": rows})
        self._take(stage, arm, rows)

    def finish(self) -> None:
        """The results are written: what led there is no longer needed."""
        if self.path:
            self.path.unlink()

    def _take(self, stage: str, arm: str, rows: list[dict]) -> None:
        self.rows(stage, arm).update({(row["id"], row["sample"]): row for row in rows})

    def _read(self) -> list[dict]:
        """What the file holds: the settings first, then batches."""
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: move it, or name another --out")
        if not self.path.is_file():
            return []
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:  # killed while writing
            os.truncate(self.path, len(kept))
        lines = []
        for number, line in enumerate(kept.split(b"\n")[:-1], 1):
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.path} is damaged ({error}): delete it") from None
            if not (_is_batch if number > 1 else _is_head)(lines[-1]):
                raise ValueError(f"{self.path} is damaged (line {number}): delete it")
        return lines

    def _append(self, line: dict) -> None:
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _is_head(line) -> bool:
    return isinstance(line, dict) and isinstance(line.get("settings"), dict)


def _is_batch(line) -> bool:
    if not isinstance(line, dict) or not isinstance(line.get("rows"), list):
        return False
    return all(isinstance(line.get(name), str) for name in ("stage", "arm")) and all(
        isinstance(row, dict)
        and isinstance(row.get("id"), str)
        and isinstance(row.get("sample"), int)
        for row in line["rows"]
    )
