"""MMLU's official layout, in small files of our own writing: folders, data.tar, and damage."""

import csv
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from data import DATASETS, Problem, load_problems, mmlu
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import gold_tail, split_trace
from tests.file_server import serving

SEA = ["Which of these is a sea, not a lake?", "Como", "Baltic", "Garda", "None", "B"]
QUOTED = ['He said "go", and left.\nWho?', "1,000 men", "NA", "A\nB", "", "A"]
LATE = [" Which comes last? ", " noon", "night ", "dawn", "None of these", "D"]
FILES = {
    "test/virology_test.csv": [SEA],
    "test/anatomy_test.csv": [QUOTED, LATE],
    "dev/anatomy_dev.csv": [LATE],
    "val/anatomy_val.csv": [SEA, SEA],
    "auxiliary_train/race.csv": [SEA, LATE],
    "auxiliary_train/arc_easy.csv": [QUOTED],
}
IN_THE_WAY = {  # no file of any split, and none of them is a problem's
    "test/virology_dev.csv": [["?"]],
    "test/._virology_test.csv": [["?"]],
    "test/_test.csv": [["?"]],
    "test/virology_test.csv.bak": [["?"]],
    "test/more/physics_test.csv": [["?"]],
    "auxiliary_train/.hidden.csv": [["?"]],
    "README.txt": [["?"]],
}


def as_csv(records) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(records)
    return text.getvalue().encode()


def write(folder, files):
    for name, records in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(records if isinstance(records, bytes) else as_csv(records))
    return folder


def as_tar(files, prefix="data/") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, records in files.items():
            member = tarfile.TarInfo(prefix + name)
            content = records if isinstance(records, bytes) else as_csv(records)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def folder_itself(path):
    write(path, FILES | IN_THE_WAY)
    (path / "test/knots_test.csv").mkdir()


def folder_above(path):
    write(path / "data", FILES | IN_THE_WAY)


def folder_with_tar(path):
    (path / "data.tar").write_bytes(as_tar(FILES | IN_THE_WAY))


def folder_with_own_tar(path):
    (path / "data.tar").write_bytes(as_tar(FILES | IN_THE_WAY, "./data/"))


PLACES = [folder_itself, folder_above, folder_with_tar, folder_with_own_tar]


@pytest.mark.parametrize("place", PLACES)
def test_load_from_data_dir(tmp_path, place):
    place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    quoted, late, sea = mmlu.load("test", tmp_path)
    assert sea.id == "mmlu/test/virology/0" and sea.subject == "virology"
    assert sea.question == (
        "Which of these is a sea, not a lake?\nA. Como\nB. Baltic\nC. Garda\nD. None"
    )
    assert (sea.answer, sea.solution) == ("B", "The right choice is: Baltic.")
    assert (quoted.id, late.id) == ("mmlu/test/anatomy/0", "mmlu/test/anatomy/1")
    assert (quoted.subject, late.subject) == ("anatomy", "anatomy")
    assert quoted.question == 'He said "go", and left.\nWho?\nA. 1,000 men\nB. NA\nC. A\nB\nD. '
    assert late.question == "Which comes last?\nA. noon\nB. night\nC. dawn\nD. None of these"
    assert (quoted.answer, late.answer) == ("A", "D")
    assert [p.id for p in mmlu.load("dev", tmp_path)] == ["mmlu/dev/anatomy/0"]
    assert [p.id for p in mmlu.load("val", tmp_path)] == [f"mmlu/val/anatomy/{n}" for n in (0, 1)]
    auxiliary = mmlu.load("auxiliary", tmp_path)
    assert [p.subject for p in auxiliary] == ["arc_easy", "race", "race"]
    assert auxiliary[2].id == "mmlu/auxiliary/race/1" and auxiliary[2].answer == "D"
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_the_splits_of_the_commands(tmp_path, capsys):
    write(tmp_path, FILES)
    assert [p.subject for p in load_problems("mmlu", "train", tmp_path)][0] == "arc_easy"
    assert load_problems("mmlu", "heldout", tmp_path) == load_problems("mmlu", "test", tmp_path)
    for split in mmlu.SPLITS:
        assert load_problems("mmlu", split, tmp_path) == mmlu.load(split, tmp_path)
    assert len(load_problems("mmlu", "test", tmp_path, limit=2)) == 2
    assert set(DATASETS["mmlu"].splits.values()) == set(mmlu.SPLITS)
    for entry in DATASETS.values():
        assert set(entry.max_new_tokens) == set(entry.splits)
    capsys.readouterr()


def test_missing_subjects_are_counted(tmp_path, capsys):
    write(tmp_path, {f"test/s{number}_test.csv": [SEA] for number in range(57)})
    assert len(mmlu.load("test", tmp_path)) == 57
    assert capsys.readouterr().err == ""
    (tmp_path / "test/s7_test.csv").unlink()
    assert len({problem.subject for problem in mmlu.load("test", tmp_path)}) == 56
    printed = capsys.readouterr().err
    assert printed == f"warning: {tmp_path} has 56 of MMLU's 57 subjects in test\n"
    write(tmp_path, {"auxiliary_train/race.csv": [SEA]})
    mmlu.load("auxiliary", tmp_path)
    assert capsys.readouterr().err == ""


def test_windows_line_ends_a_byte_order_mark_and_blank_lines(tmp_path):
    raw = as_csv([QUOTED, SEA]).replace(b"\n", b"\r\n")
    write(tmp_path, {"test/anatomy_test.csv": b"\xef\xbb\xbf" + raw + b"\r\n\r\n"})
    quoted, sea = mmlu.load("test", tmp_path)
    assert quoted.question.startswith('He said "go"') and sea.answer == "B"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"q,a,b,c,d\n", "5 columns"),
        (b"q,a,b,c,d,A,\n", "7 columns"),
        (b'"q,a,b,c,d,A\n', "1 columns"),  # a quote that never ends
        (b"not a csv\n", "1 columns"),
        (b"question,a,b,c,d,answer\n", "'answer'"),  # a header
        (b"q,a,b,c,d,1\n", "'1'"),
        (b"q,a,b,c,d,E\n", "'E'"),
        (b"q,a,b,c,d,a\n", "'a'"),
        (b"q,a,b,c,d,AB\n", "'AB'"),
        (b"q,a,b,c,d,\n", "''"),
        (b" \t,a,b,c,d,A\n", "the question is empty"),
        (b"q\xff,a,b,c,d,A\n", "invalid start byte"),
        (b"q,a\rb,a,b,c,d,A\n", "new-line character"),
        (b'"' + b"x" * 140_000 + b'",a,b,c,d,A\n', "field limit"),
    ],
)
def test_bad_records_are_named(tmp_path, raw, reason):
    start = as_csv([QUOTED, SEA]) + b"\n"  # two records on five lines
    write(tmp_path, {"test/anatomy_test.csv": start + raw})
    with pytest.raises(ValueError, match=f"anatomy_test.csv, record 3: .*{reason}.*six columns"):
        mmlu.load("test", tmp_path)
    (tmp_path / "test/anatomy_test.csv").unlink()
    (tmp_path / "data.tar").write_bytes(as_tar({"test/anatomy_test.csv": start + raw}))
    with pytest.raises(ValueError, match="data.tar, data/test/anatomy_test.csv, record 3: "):
        mmlu.load("test", tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="no split 'train': use dev, val, test, auxiliary"):
        mmlu.load("train", tmp_path)
    for folder in (tmp_path / "nowhere", tmp_path, write(tmp_path / "stray", IN_THE_WAY)):
        with pytest.raises(FileNotFoundError, match=f"--data-dir {folder}: no test/SUBJECT_test"):
            mmlu.load("test", folder)
        with pytest.raises(FileNotFoundError, match=r"no auxiliary_train/\*.csv.*data.tar and put"):
            mmlu.load("auxiliary", folder)
    write(tmp_path, {"test/anatomy_test.csv": b"\n"})
    with pytest.raises(ValueError, match="anatomy_test.csv holds no problem"):
        mmlu.load("test", tmp_path)


def test_only_regular_files_of_the_tar_are_read(tmp_path):
    (tmp_path / "secret.csv").write_bytes(as_csv([SEA]))
    raw = io.BytesIO(as_tar({"test/anatomy_test.csv": [SEA]}))
    with tarfile.open(fileobj=raw, mode="a") as tar:
        for name, kind, link in [
            ("data/test/virology_test.csv", tarfile.SYMTYPE, str(tmp_path / "secret.csv")),
            ("data/test/sociology_test.csv", tarfile.LNKTYPE, "data/test/anatomy_test.csv"),
            ("data/test/management_test.csv", tarfile.DIRTYPE, ""),
            ("data/test/marketing_test.csv", tarfile.FIFOTYPE, ""),
        ]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            tar.addfile(member)
        for name in ("../data/test/a_test.csv", "/data/test/b_test.csv", "test/c_test.csv"):
            member = tarfile.TarInfo(name)
            tar.addfile(member, io.BytesIO())
    (tmp_path / "data.tar").write_bytes(raw.getvalue())
    assert [problem.subject for problem in mmlu.load("test", tmp_path)] == ["anatomy"]


@pytest.mark.parametrize("cut", [0, 100, 600])
def test_a_damaged_tar_is_named(tmp_path, cut):
    (tmp_path / "data.tar").write_bytes(as_tar({"test/anatomy_test.csv": [SEA] * 50})[:cut])
    with pytest.raises(ValueError, match="data.tar cannot be read as a tar file"):
        mmlu.load("test", tmp_path)


def test_another_tar_than_the_published_one_is_a_warning(tmp_path, capsys, monkeypatch):
    folder_with_tar(tmp_path)
    mmlu.load("auxiliary", tmp_path)
    assert "data.tar is not the published MMLU file" in capsys.readouterr().err
    published = mmlu.sha256_of(tmp_path / "data.tar")
    monkeypatch.setattr(mmlu, "FILE", (1, published))
    mmlu.load("auxiliary", tmp_path)
    assert capsys.readouterr().err == ""


def test_instruction_asks_for_the_delimiter_and_the_letter():
    text = Prompting("mmlu").message(Problem("", "Which {one}?\nA. this\nB. that", ""))
    assert text.startswith("Which {one}?\nA. this\nB. that\n")
    assert "step by step" in text and "letter" in text and text.count("#") == 5


def test_a_question_there_and_back(tmp_path):
    """Question to prompt, letter to a trace, gold letter to tokens: nothing lost."""
    tokenizer = Tokenizer.from_directory("data/micro")  # byte-level: no text is beyond it
    for problem in mmlu.load("test", write(tmp_path, FILES)):
        message = Prompting("mmlu").message(problem)
        prompt = tokenizer.encode_prompt(message)
        assert message in tokenizer.decode(prompt) and prompt.count(tokenizer.bos_id) == 1
        for answer in ("{}", "({})", "{}.", "**{}**", "The answer is {}", "\\boxed{{{}}}"):
            text = "It is clear.\n##### " + answer.format(problem.answer)
            trace = split_trace([*tokenizer.encode(text), tokenizer.eos_ids[0]], tokenizer)
            assert trace.valid and trace.correct(problem.answer), text
            assert trace.parsed(problem.answer) == problem.answer
            assert not any(trace.correct(other) for other in {*"ABCD", "1"} - {problem.answer})
            delimiter, gold = gold_tail(trace, problem.answer, tokenizer)
            assert tokenizer.decode(trace.reasoning + delimiter + gold) == (
                f"It is clear.\n##### {problem.answer}"
            )


# ---------------------------------------------------------------------------------- the download


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving(as_tar(FILES)) as server:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(mmlu, "URL", f"{server.url}/data.tar")
        monkeypatch.setattr(mmlu, "FILE", server.published)
        server.folder = tmp_path / "cache" / "atmanrl" / "mmlu"
        yield server


def test_download_once_and_never_unpack(server, capsys):
    assert len(mmlu.load("test")) == 3 and len(mmlu.load("auxiliary")) == 3
    assert server.hits == 1 and os.listdir(server.folder) == ["data.tar"]
    assert f"{server.url}/data.tar has 2 of MMLU's 57 subjects" in capsys.readouterr().err


def test_a_damaged_cache_is_fetched_again(server):
    server.folder.mkdir(parents=True)
    (server.folder / "data.tar").write_bytes(server.body[:-1])
    assert len(mmlu.load("test")) == 3 and server.hits == 1


def test_several_processes_may_download_at_once(server):
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(mmlu.load, ["test"] * 8))
    assert all(problems == loaded[0] for problems in loaded) and len(loaded[0]) == 3
    assert os.listdir(server.folder) == ["data.tar"]


def test_a_changed_file_is_refused_with_the_way_on(server):
    server.body = server.body.replace(b"Baltic", b"Aral S")
    with pytest.raises(ValueError, match=r"sha256 differs.*fetch .*/data.tar by hand.*--data-dir"):
        mmlu.load("test")
    assert os.listdir(server.folder) == []


def test_offline_says_what_to_put_where(server, monkeypatch):
    server.status = 404
    with pytest.raises(FileNotFoundError, match="data.tar of MMLU.*404.*by hand.*--data-dir"):
        mmlu.load("test")
    monkeypatch.setattr(mmlu, "URL", "http://127.0.0.1:9/data.tar")  # nobody listens
    with pytest.raises(FileNotFoundError, match="127.0.0.1:9/data.tar.*--data-dir"):
        mmlu.load("test")
    assert os.listdir(server.folder) == []


def test_a_cache_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(FileNotFoundError, match="could not be downloaded to .*cache.*--data-dir"):
        mmlu.load("test")


@pytest.mark.skipif("ATMANRL_MMLU_DIR" not in os.environ, reason="needs the published files")
@pytest.mark.parametrize(("split", "count"), [("dev", 285), ("val", 1531), ("test", 14_042)])
def test_the_published_files(split, count, capsys):
    problems = mmlu.load(split, os.environ["ATMANRL_MMLU_DIR"])
    assert len(problems) == count and capsys.readouterr().err == ""
    assert len({problem.subject for problem in problems}) == mmlu.SUBJECTS
    assert len({problem.id for problem in problems}) == count
