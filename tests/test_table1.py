"""Table 1: pass@k, its counts and averages, its text, and spaCy with and without a tagger."""

import itertools

import pytest
import spacy
import torch
from spacy.tokens import Doc
from spacy.training import Example

from lab.measure.table1 import (
    counts_by_text,
    describe_spacy,
    load_spacy,
    pass_at_k,
    summarize,
    table1_ratios,
    word_spans,
)
from lab.show.tables import summary_table


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for correct in range(6):
        draws = list(itertools.combinations([True] * correct + [False] * (5 - correct), 3))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(5, correct, 3) == pytest.approx(share)


def test_blank_english_counts_by_lexical_attributes():
    texts = ["So the total is $18 + 4 = 22.\nTwo  cats", "", "1 + 1"]
    counts, nothing, sums = counts_by_text(texts, load_spacy(None))
    # 13 tokens: the line break and the spaces are none. Stop words: So, the, is, Two.
    assert counts == {"tokens": 13, "numbers": 4, "stop_words": 4, "symbols": 3}
    assert not any(nothing.values()) and (sums["tokens"], sums["symbols"]) == (3, 1)


def trained_pipeline():
    """A tagger small enough to train in a second: digits are NUM, plus signs SYM, words NOUN."""
    nlp = spacy.blank("en")
    tagger = nlp.add_pipe(
        "tagger",
        config={"model": {"@architectures": "spacy.Tagger.v2", "tok2vec": {
            "@architectures": "spacy.HashEmbedCNN.v2", "pretrained_vectors": None, "width": 32,
            "depth": 1, "embed_size": 200, "window_size": 1, "maxout_pieces": 2,
            "subword_features": True}}},
    )  # fmt: skip
    ruler = nlp.add_pipe("attribute_ruler")
    sentences = [
        ["cats", "eat", "4"],
        ["3", "+", "4"],
        ["12", "dogs"],
        ["dogs", "+", "cats"],
        ["cats", "=", "dogs"],
    ]

    def tag(word):
        return "CD" if word.isdigit() else "SYM" if word == "+" else "NN"

    examples = [
        Example.from_dict(Doc(nlp.vocab, words=words), {"tags": [tag(word) for word in words]})
        for words in sentences
    ]
    tagger.add_label("NN")
    nlp.initialize(lambda: examples)
    ruler.load_from_tag_map({"CD": {"POS": 93}, "SYM": {"POS": 99}, "NN": {"POS": 92}})
    torch.manual_seed(0)
    for _ in range(30):
        nlp.update(examples)
    return nlp


def test_a_trained_pipeline_counts_parts_of_speech(tmp_path):
    trained_pipeline().to_disk(tmp_path / "tagger")
    pipeline = load_spacy(str(tmp_path / "tagger"))
    (counts,) = counts_by_text(["cats + 3 dogs"], pipeline)
    assert counts == {"tokens": 4, "numbers": 1, "stop_words": 0, "symbols": 1}
    # "=" is a symbol to the list of operators, not to this tagger, which learned it as a noun
    assert counts_by_text(["cats = dogs"], pipeline)[0]["symbols"] == 0
    assert counts_by_text(["cats = dogs"], load_spacy(None))[0]["symbols"] == 1
    (words,) = word_spans(["cats + 3"], pipeline)
    assert words == [[0, 4, "other", "NOUN"], [5, 6, "symbol", "SYM"], [7, 8, "number", "NUM"]]
    assert describe_spacy(pipeline) == "a trained tagger of English (en_pipeline 0.0.0)"
    pipeline.disable_pipe("attribute_ruler")  # which turns tags into parts of speech
    untagged = "English's lexical attributes (en_pipeline 0.0.0 has no tagger)"
    assert describe_spacy(pipeline) == untagged


@pytest.mark.parametrize(
    ("language", "components", "said"),
    [
        ("en", [], "blank English's lexical attributes (no trained tagger)"),
        ("de", [], "blank German's lexical attributes (no trained tagger)"),
        ("xx", [], "blank MultiLanguage's lexical attributes (no trained tagger), "
                   "which know no stop words"),
        ("de", ["sentencizer"], "German's lexical attributes (de_pipeline 0.0.0 has no tagger)"),
        ("xx", ["sentencizer"], "MultiLanguage's lexical attributes (xx_pipeline 0.0.0 has no "
                                "tagger), which know no stop words"),
        ("fr", ["attribute_ruler"], "French's lexical attributes (fr_pipeline 0.0.0 has no "
                                    "tagger)"),
    ],
)  # fmt: skip
def test_a_pipeline_is_called_what_it_is(language, components, said, tmp_path):
    pipeline = spacy.blank(language)
    for name in components:
        pipe = pipeline.add_pipe(name)
        if name == "attribute_ruler":  # parts of speech by rule, of one word alone
            pipe.add([[{"LOWER": "7"}]], {"POS": "NUM"})
    pipeline.to_disk(tmp_path / "it")
    loaded = load_spacy(str(tmp_path / "it"))
    assert describe_spacy(loaded) == said
    assert said in summary_table({"x": summarize([record("a", 0, True, "", [])], loaded)}, loaded)
    # Every text is counted alike, with a word that a rule knows or without.
    counts = counts_by_text(["7 $ +", "8 $ +"], loaded)
    assert counts[0] == counts[1] == {"tokens": 3, "numbers": 1, "stop_words": 0, "symbols": 2}


def untrained(folder) -> str:
    pipeline = spacy.blank("en")
    pipeline.add_pipe("tagger")
    pipeline.to_disk(folder / "untrained")
    return str(folder / "untrained")


def damaged(folder) -> str:
    spacy.blank("en").to_disk(folder / "damaged")
    (folder / "damaged/config.cfg").write_text("[nlp\nlang = ")
    return str(folder / "damaged")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_thing", "no such pipeline; get it with `python -m spacy download no_such_thing`"),
        ("blank:zz", r"\[E048\] Can't import language zz"),
        ("blank:th", "Thai tokenizer requires"),  # another package
        (str, "meta.json"),  # a folder of something else
        (untrained, "'tagger' could not be run"),
        (damaged, ".+"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_refused_by_name(name, reason, tmp_path):
    name = name if isinstance(name, str) else name(tmp_path)
    with pytest.raises(ValueError, match=f"--spacy-model {name}: .*{reason}.* or leave the flag"):
        load_spacy(name)


def record(problem, sample, correct, text, ids, **more):
    return {"id": problem, "sample": sample, "correct": correct, "text": text, "reasoning": ids,
            "truncated": False, "no_delimiter": False} | more  # fmt: skip


def test_a_summary_by_hand():
    records = [
        record("a", 0, True, "4 + 5 = 9", [1, 2, 3]),
        record("a", 1, False, "the cat", [1], truncated=True),
        record("b", 0, False, "", [], no_delimiter=True),
        record("b", 1, False, "7", [1, 2]),
    ]
    summary = summarize(records, load_spacy(None))
    assert summary["problems"] == 2 and summary["samples"] == 2
    assert summary["pass@1"] == 0.25 and summary["pass@2"] == 0.5
    assert summary["tokens"] == 1.5 and summary["spacy_tokens"] == 2.0
    assert summary["numbers"] == 4 / 8  # pooled over traces, not a mean of shares
    assert summary["stop_words"] == 1 / 8 and summary["symbols"] == 2 / 8
    assert summary["truncated"] == 0.25 and summary["no_delimiter"] == 0.25


def test_micro_and_macro_averages_by_hand():
    large, small = {"subject": "large"}, {"subject": "small"}
    records = [
        record("a", 0, True, "", [], **large),
        record("a", 1, True, "", [], **large),
        record("b", 0, True, "", [], **large),
        record("b", 1, False, "", [], **large),
        record("c", 0, True, "", [], **large),
        record("c", 1, True, "", [], **large),
        record("d", 0, False, "", [], **small),
        record("d", 1, True, "", [], **small),
    ]
    summary = summarize(records, load_spacy(None))
    assert summary["pass@1"] == pytest.approx((1 + 1 / 2 + 1 + 1 / 2) / 4)
    assert summary["macro pass@1"] == pytest.approx(((1 + 1 / 2 + 1) / 3 + 1 / 2) / 2)
    columns = {"x": summary, "y": summary | {"macro pass@1": 0.5}}
    lines = summary_table(columns, load_spacy(None)).split("\n")
    (row,) = (number for number, line in enumerate(lines) if "mean of subjects" in line)
    assert lines[row - 1].startswith("accuracy")
    assert "66.7%" in lines[row] and "50.0%" in lines[row] and "-16.7 pts" in lines[row]


def test_the_computing_share_is_of_labelled_traces_alone():
    records = [
        record("a", 0, True, "", [], computing=True),
        record("a", 1, True, "", [], computing=False),
        record("b", 0, True, "", [], computing=True),
        record("b", 1, False, "", [], computing=None),  # invalid
        record("c", 0, False, "", [], computing=None),
        record("c", 1, False, "", [], computing=None),
    ]
    assert summarize(records, load_spacy(None))["computing"] == 2 / 3
    ratios = table1_ratios(records, counts_by_text([""] * 6, load_spacy(None)))
    assert ratios["computing"] == {"a": (1, 2), "b": (1, 1)}
    # Nor is there a row where no trace has a label, or in what was kept before there were any.
    unknown = [record("a", 0, True, "", [], computing=None), record("b", 0, True, "", [])]
    before = summarize(unknown, load_spacy(None))
    assert "computing" not in before
    columns = {"before": before, "after": summarize(records, load_spacy(None))}
    assert "computing" not in summary_table({"x": before}, load_spacy(None))
    (line,) = (x for x in summary_table(columns, load_spacy(None)).split("\n") if "computing" in x)
    assert line.split() == ["computing", "share", "-", "66.7%"]
    columns["before"] = before | {"computing": 0.5}
    assert "+16.7 pts" in summary_table(columns, load_spacy(None))


def test_without_subjects_there_is_no_macro_average():
    records = [record("a", 0, True, "", []), record("b", 0, False, "", [], subject="sums")]
    for rows in (records, records[:1]):
        summary = summarize(rows, load_spacy(None))
        assert "macro pass@1" not in summary
        assert "subjects" not in summary_table({"x": summary}, load_spacy(None))


def test_the_table_shows_relative_change_of_shares_and_points_of_accuracy():
    before = {"problems": 2, "samples": 4, "pass@1": 0.5, "tokens": 50.0, "numbers": 0.2}
    after = before | {"pass@1": 0.45, "tokens": 25.0, "numbers": 0.3}
    printed = summary_table({"before": before, "after": after}, load_spacy(None))
    assert "-5.0 pts" in printed and "-50%" in printed and "+50%" in printed
    assert "blank English" in printed
