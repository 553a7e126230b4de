import hashlib
import json
import os

import pytest

from data import Problem, download, gsm8k, load_problems
from data.prompts import Prompting
from data.tokenizer import Tokenizer
from data.traces import gold_tail, split_trace
from tests.file_server import serving

PROBLEMS = [
    {
        "question": "Tom has 1,000 eggs and eats 3. How many are left?",
        "answer": "He has 1,000 - 3 = <<1000-3=997>>997 or $<<997=997>>997.\n#### 997",
    },
    {"question": "What is 2 - 1,202?", "answer": "2 - 1202 = <<2-1202=-1200>>-1200\n#### -1,200"},
]


def write(folder, problems=PROBLEMS, split="test"):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split}.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return file


def test_load_from_data_dir(tmp_path, capsys):
    write(tmp_path)
    first, second = gsm8k.load("test", tmp_path)
    assert (first.id, second.id) == ("gsm8k/test/0", "gsm8k/test/1")
    assert first.question == PROBLEMS[0]["question"]
    assert (first.answer, second.answer) == ("997", "-1200")
    assert first.solution == "He has 1,000 - 3 = 997 or $997."
    assert "test.jsonl is not the published GSM8K" in capsys.readouterr().err


def test_no_warning_for_the_published_file(tmp_path, capsys, monkeypatch):
    file = write(tmp_path)
    published = (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(gsm8k.FILES, "test", published)
    gsm8k.load("test", tmp_path)
    assert capsys.readouterr().err == ""


def test_blank_lines_are_skipped(tmp_path):
    file = write(tmp_path)
    plain = gsm8k.load("test", tmp_path)
    file.write_text("\n" + file.read_text().replace("\n", "\n \n"))
    assert gsm8k.load("test", tmp_path) == plain


def test_a_limit_draws_with_the_seed(tmp_path):
    write(tmp_path, PROBLEMS * 10)
    every = load_problems("gsm8k", "heldout", tmp_path)
    drawn = load_problems("gsm8k", "heldout", tmp_path, limit=5)
    assert len({p.id for p in drawn}) == 5 and set(drawn) < set(every)
    assert drawn == load_problems("gsm8k", "test", tmp_path, limit=5)
    assert drawn != load_problems("gsm8k", "test", tmp_path, limit=5, seed=1)
    assert load_problems("gsm8k", "test", tmp_path, limit=20) == every


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"question": "q"}',
        '{"answer": "#### 1"}',
        '{"question": "q", "answer": null}',
        '{"question": 5, "answer": "#### 1"}',
        '{"question": " ", "answer": "#### 1"}',
        '{"question": "q", "answer": "no gold"}',
        '{"question": "q", "answer": "##### 5"}',
        b'{"question": "\xff", "answer": "#### 1"}',
        '{"question": "a\\ud800", "answer": "#### 1"}',
        '{"question": "a", "answer": "\\udfff #### 1\\n#### 1"}',
    ],
)
def test_bad_lines_are_named(tmp_path, line):
    file = write(tmp_path)
    raw = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(file.read_bytes() + b"\n" + raw + b"\n")
    with pytest.raises(ValueError, match="test.jsonl, line 4: not a GSM8K problem"):
        gsm8k.load("test", tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="no split 'val'"):
        gsm8k.load("val", tmp_path)
    with pytest.raises(FileNotFoundError, match="train.jsonl not found.*--data-dir"):
        gsm8k.load("train", tmp_path)
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no usable problem"):
        gsm8k.load("train", tmp_path)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("so\n#### 18", "18"),
        ("#### -3\n", "-3"),
        ("#### 1,234,567", "1234567"),
        ("####5", "5"),
        ("#### 1\n#### 2", "2"),
        ("#### 2.50", "2.5"),  # of a user's own file
        ("#### $1,200", "1200"),
    ],
)
def test_gold_answer(text, gold):
    assert gsm8k.gold_answer(text) == gold


@pytest.mark.parametrize(
    "text",
    ["", "18", "#### ", "##### 18", "#### 18\nso", "### 1", "#### 18 eggs", "#### eighteen"]
    + ["#### 3 thousand", "#### 10,00,000", "#### 1 000", "#### 1/2", "#### - 5", "#### B"]
    + ["#### 1,20", "#### 1.2.3", "#### " + "1" * 41, "#### 5 * 3 = 15", "#### 18 #### 5"],
)
def test_no_gold_answer(text):
    with pytest.raises(ValueError, match="#### N"):
        gsm8k.gold_answer(text)


def test_instruction_asks_for_the_delimiter():
    text = Prompting("gsm8k").message(Problem("", "How many {eggs}?", ""))
    assert text.startswith("How many {eggs}?")
    assert "step by step" in text and text.split("#####")[1][0] == " "
    assert text.count("#") == 5


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The official repository's stand-in, on this machine; attributes steer what it sends."""
    body = write(tmp_path / "origin").read_bytes() * 1000

    with serving(body) as server:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(gsm8k, "URL", f"{server.url}/{{split}}.jsonl")
        monkeypatch.setitem(gsm8k.FILES, "test", server.published)
        server.folder = tmp_path / "cache" / "atmanrl" / "gsm8k"
        yield server


def test_download_once(server):
    assert len(gsm8k.load("test")) == 2000
    assert len(gsm8k.load("test")) == 2000
    assert server.hits == 1
    (server.folder / "plain").touch()  # with the rights that open() gives, for a shared cache
    modes = [(server.folder / name).stat().st_mode for name in ("test.jsonl", "plain")]
    assert modes[0] == modes[1]
    (server.folder / "plain").unlink()
    assert os.listdir(server.folder) == ["test.jsonl"]


def test_a_damaged_cache_is_fetched_again(server):
    server.folder.mkdir(parents=True)
    (server.folder / "test.jsonl").write_text("{")
    assert len(gsm8k.load("test")) == 2000


def test_a_changed_file_is_refused(server):
    server.body = server.body.replace(b"eggs", b"legs")
    with pytest.raises(ValueError, match="sha256 differs.*--data-dir"):
        gsm8k.load("test")
    assert os.listdir(server.folder) == []


def test_a_download_cut_short_leaves_nothing(server):
    server.body = server.body[: len(server.body) // 2]
    with pytest.raises((ValueError, FileNotFoundError), match="--data-dir"):
        gsm8k.load("test")
    assert os.listdir(server.folder) == []


def test_an_interrupted_download_leaves_nothing(server, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gsm8k.load("test")
    assert os.listdir(server.folder) == []


def test_offline_says_what_to_put_where(server, monkeypatch):
    server.status = 404
    with pytest.raises(FileNotFoundError, match="test.jsonl.*404.*--data-dir"):
        gsm8k.load("test")
    monkeypatch.setattr(gsm8k, "URL", "http://127.0.0.1:9/{split}.jsonl")  # nobody listens
    with pytest.raises(FileNotFoundError, match=r"test.jsonl.*127.0.0.1:9/test.jsonl.*--data-dir"):
        gsm8k.load("test")
    assert os.listdir(server.folder) == []


@pytest.mark.skipif("ATMANRL_GSM8K_DIR" not in os.environ, reason="needs the published files")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_the_published_files(split, count, capsys):
    problems = gsm8k.load(split, os.environ["ATMANRL_GSM8K_DIR"])
    assert len(problems) == count and capsys.readouterr().err == ""
    assert all(str(int(problem.answer)) == problem.answer for problem in problems)
    assert not any(
        mark in problem.solution for problem in problems for mark in ("<<", ">>", "####")
    )
    assert all(problem.question and problem.solution for problem in problems)


@pytest.mark.skipif("ATMANRL_GSM8K_DIR" not in os.environ, reason="needs the published files")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_published_line_there_and_back(split):
    """Question to prompt, solution and answer to a trace, gold answer to tokens: nothing lost."""
    tokenizer = Tokenizer.from_directory("data/micro")  # byte-level: no text is beyond it
    eos = tokenizer.eos_ids[0]
    for problem in gsm8k.load(split, os.environ["ATMANRL_GSM8K_DIR"]):
        message = Prompting("gsm8k").message(problem)
        prompt = tokenizer.encode_prompt(message)
        assert message in tokenizer.decode(prompt) and prompt.count(tokenizer.bos_id) == 1
        grouped = f"{int(problem.answer):,}"  # as people write it
        for answer in (problem.answer, f"${grouped}".replace("$-", "-$"), f"{grouped}.00"):
            text = f"{problem.solution}\n##### {answer}"
            trace = split_trace([*tokenizer.encode(text), eos], tokenizer)
            assert trace.valid and trace.delimiter_count == 1, text
            assert trace.number == problem.answer and trace.correct(problem.answer), text
            assert trace.text == text
            before, after = tokenizer.decode(trace.reasoning), tokenizer.decode(trace.delimiter)
            assert (before + after).startswith(f"{problem.solution}\n#####")
            delimiter, gold = gold_tail(trace, problem.answer, tokenizer)
            assert tokenizer.decode(delimiter + gold).endswith(f"##### {problem.answer}")
            assert not trace.correct(str(int(problem.answer) + 1))
