from __future__ import annotations

import random
import time

import pytest

from fastbert.data.sentences import cut_text, split_sentences


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("", []),
        (" \t ", []),
        ("One sentence without an end", ["One sentence without an end"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Wait... What?! Yes.", ["Wait...", "What?!", "Yes."]),
        ('He said "Stop." She did.', ['He said "Stop."', "She did."]),
        ("(It rained.) “It did.” ‘Really?’ Yes.", ["(It rained.)", "“It did.”", "‘Really?’", "Yes."]),
        ('"Why?" he asked. "No idea."', ['"Why?" he asked.', '"No idea."']),
        ("Mr. and Mrs. Dashwood met Dr. Grey at St. Paul's. They left.", 2),
        ("J. R. R. Tolkien was born in the U.S. embassy, i.e. abroad. True.", 2),
        ("It was No. 5 of vol. 3, from Jan. 4, 1990. It sold well.", 2),
        ("He said no. Then he left. It was the fig. Nobody ate it.", 4),
        ("It cost 3.50 dollars in 1999. The price rose to 4.20.", ["It cost 3.50 dollars in 1999.", "The price rose to 4.20."]),
        ("1. Introduction to knots. 2. Ropes.", ["1. Introduction to knots.", "2. Ropes."]),
        ("see example.com or file.txt for more. Done.", ["see example.com or file.txt for more.", "Done."]),
        ("all in small letters. no capitals here. fine.", ["all in small letters.", "no capitals here.", "fine."]),
        ("今日は晴れ。明日は雨！そう？はい", ["今日は晴れ。", "明日は雨！", "そう？", "はい"]),
        ("Первое предложение. Второе предложение.", ["Первое предложение.", "Второе предложение."]),
        ("A line . Spaced as in WikiText . End", ["A line .", "Spaced as in WikiText .", "End"]),
        ("... Dots first. Then text.", ["...", "Dots first.", "Then text."]),
    ],
)
def test_examples(paragraph: str, sentences: list[str] | int) -> None:
    split = split_sentences(paragraph)
    assert (len(split) if isinstance(sentences, int) else split) == sentences


def test_no_text_is_lost_and_no_sentence_is_empty() -> None:
    draw = random.Random(7)
    pieces = [
        *[
            ".",
            "!",
            "?",
            "…",
            "。",
            "！",
            '"',
            "'",
            "”",
            ")",
            "]",
            "[",
            "(",
            "-",
            "Mr",
            "Dr.",
            "e.g.",
            "No.",
            "5",
            "1.",
            "U.S.",
            "The",
            "the",
            "ÀB",
            "ß",
            "中",
            "文",
            "\xa0",
            "\u2028",
            "\t",
            "\x1c",
            "\n",
        ],
        " ",
        "  ",
        "",
    ]
    for _ in range(5000):
        paragraph = "".join(draw.choices(pieces, k=draw.randint(0, 30)))
        sentences = split_sentences(paragraph)
        assert all(sentence and sentence == sentence.strip() for sentence in sentences)
        assert "".join("".join(sentences).split()) == "".join(paragraph.split())
        rest = paragraph
        for sentence in sentences:
            before, rest = rest.split(sentence, 1)
            assert not before.strip()
        assert not rest.strip()


@pytest.mark.parametrize("unit", [".", ". ", "a. ", "。", ".)", "A.", "?!", "word ", "\n", '"'])
def test_time_is_linear_in_the_length(unit: str) -> None:
    paragraph = unit * (400_000 // len(unit)) + "x"
    start = time.process_time()
    sentences = split_sentences(paragraph)
    assert time.process_time() - start < 2.0
    assert "".join("".join(sentences).split()) == "".join(paragraph.split())


@pytest.mark.parametrize("longest", [1, 5, 8, 1000])
def test_cut_text_keeps_all_characters_but_white_space(longest: int) -> None:
    text = "one two\tthree   four " + "five" * 5 + "\u3000six seven eight" + " " * 20 + "nine "
    pieces = list(cut_text(text, longest))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(pieces) and max(map(len, pieces)) <= longest
    if longest == 8:
        assert pieces == ["one two", "three", "four", "fivefive", "fivefive", "five", "six", "seven", "eight", "nine"]
    assert list(cut_text("", 4)) == list(cut_text("  ", 1)) == []


def test_time_is_linear_in_the_length_of_a_sentence_without_an_end() -> None:
    text = "J. " * 500_000 + "x"
    start = time.process_time()
    assert split_sentences(text) == [text]
    assert time.process_time() - start < 4.0


@pytest.mark.parametrize("spaces", [1, 30, 45])
def test_the_number_of_a_list_item_ends_no_sentence_wherever_it_stands(spaces: int) -> None:
    assert split_sentences(" " * spaces + "1. One thing. 2. Another.") == ["1. One thing.", "2. Another."]
    assert split_sentences("In " + "a long row of words " * 5 + "1. Then.")[0].endswith(" 1.")
