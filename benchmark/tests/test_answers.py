"""The final number of a text, and exact match by it."""

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_lite_benchmark.answers import final_number, is_correct

WORDS = st.text(
    alphabet=st.characters(
        codec="utf-8", exclude_categories=["N"], exclude_characters="#$€£¥.,-−+%"
    ),
    max_size=40,
)
NUMBERS = st.decimals(min_value=-(10**12), max_value=10**12, places=2) | st.integers(
    -(10**12), 10**12
).map(Decimal)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 18", "18"),
        ("She has 18.", "18"),
        ("It costs $1,234.50.", "1234.50"),
        ("It costs 1,234,567 dollars", "1234567"),
        ("the change is -$5", "-5"),
        ("the change is $-5", "-5"),
        ("the change is −5 degrees", "-5"),
        ("(-7)", "-7"),
        ("x=-7", "-7"),
        ("7-5", "5"),
        ("9 - 5", "5"),
        ("20%-5", "5"),
        ("(4)-3", "3"),
        ("- 5 apples", "5"),
        ("a share of .25", "0.25"),
        ("numbers 1, 2, 3", "3"),
        ("1,23", "23"),
        ("1,2345", "2345"),
        ("€12", "12"),
        ("25%", "25"),
        ("3 apples and 4 pears make 7 fruits\n#### 7", "7"),
        ("first 12\n#### 1,450", "1450"),
        ("#### $18.00", "18"),
        ("#### 5\nQuestion: what is 3+4?\nAnswer: 7\n#### 7", "5"),
        ("3 + 4 = 7\nThe answer is: 7. I was born in 1999", "7"),
        ("THE ANSWER IS 8", "8"),
        ("The answer is: 3\n#### 4", "4"),
        ("The answer is: unknown, but 6", "6"),
        ("2 and then #### nothing", "2"),
        ("The answer is:\n12", "12"),
    ],
)
def test_reads_the_number_that_a_reader_would(text: str, number: str) -> None:
    """Commas, signs, decimals, currency, trailing periods and several numbers: the answer's number
    is found.
    """
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no idea", "####", "The answer is: x", "$", "-", ".", ","])
def test_no_number_is_none(text: str) -> None:
    """A text without a number has no answer, and matches nothing."""
    assert final_number(text) is None
    assert not is_correct(text, "#### 0")
    assert not is_correct("#### 0", text)


@given(
    before=WORDS,
    number=NUMBERS,
    after=WORDS,
    sign=st.sampled_from(["", "$", "€"]),
    commas=st.booleans(),
    dot=st.booleans(),
)
def test_any_number_in_any_words(
    before: str, number: Decimal, after: str, sign: str, commas: bool, dot: bool
) -> None:
    """However a number is written, and whatever words without numbers stand around it, it is read
    back exactly.
    """
    written = f"{abs(number):,}" if commas else f"{abs(number)}"
    text = f"{before} {'-' if number < 0 else ''}{sign}{written}{'.' if dot else ''} {after}"
    assert final_number(text) == number


@given(
    rationale=st.text(max_size=80).filter(lambda text: "####" not in text),
    number=NUMBERS,
    rest=WORDS,
)
def test_the_marker_wins(rationale: str, number: Decimal, rest: str) -> None:
    """Whatever is said before `#### n`, and in the lines after it, n is the answer."""
    assert final_number(f"{rationale}\n#### {number:,}\n{rest}") == number


@given(text=st.text())
def test_reads_anything(text: str) -> None:
    """No text whatever makes the extraction fail, and what it finds is finite."""
    number = final_number(text)
    assert number is None or number.is_finite()


@given(number=NUMBERS, places=st.integers(0, 4))
def test_equal_numbers_written_differently_agree(number: Decimal, places: int) -> None:
    """Trailing zeros and a comma do not make an answer wrong; the next number up does."""
    written = f"{number:,}" + (
        "." + "0" * places if places and number == int(number) and "." not in str(number) else ""
    )
    assert is_correct(f"The answer is: {written}", f"#### {number}")
    assert not is_correct(f"The answer is: {number + 1}", f"#### {number}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_real_gsm8k_answers(split: str) -> None:
    """Of every answer in GSM8K, the number is the one after `####`, commas aside; its text without
    it ends elsewhere at times, which is why the marker has priority.
    """
    folder = os.environ.get("LORA_LITE_GSM8K")
    if not folder:
        pytest.skip(
            "LORA_LITE_GSM8K is not set: it names a folder with GSM8K's train.jsonl and test.jsonl"
        )
    answers = [
        json.loads(line)["answer"]
        for line in (Path(folder) / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]
    assert len(answers) == {"train": 7473, "test": 1319}[split]
    for answer in answers:
        expected = Decimal(answer.rsplit("####", 1)[1].strip().replace(",", ""))
        assert final_number(answer) == expected, answer
    endings = [
        final_number(answer.rsplit("####", 1)[0]) == final_number(answer) for answer in answers
    ]
    assert 0.9 < sum(endings) / len(endings) < 1
