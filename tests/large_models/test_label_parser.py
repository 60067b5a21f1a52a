from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_datashunt.exceptions import ConfigurationError, UnparsableAnswerError
from langchain_datashunt.large_models.label_parser import LabelParser, normalised

LABELS = ("card_arrival", "lost-card", "Refund not showing up", "pin")


@pytest.fixture
def parser() -> LabelParser:
    return LabelParser(labels=LABELS, aliases={"pin": ("PIN code", "passcode")})


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("card_arrival", "card_arrival"),
        ("  Card Arrival. ", "card_arrival"),
        ("**card_arrival**", "card_arrival"),
        ('"lost-card"', "lost-card"),
        ("Label: lost_card", "lost-card"),
        ("The label is: PIN", "pin"),
        ("Answer = refund_not_showing_up", "Refund not showing up"),
        ("`Passcode`", "pin"),
        ("pin code", "pin"),
        ('{"label": "card arrival"}', "card_arrival"),
    ],
)
def test_an_answer_that_is_a_label_is_read(parser: LabelParser, answer: str, label: str) -> None:
    assert parser.parse(answer) == label
    assert parser.invoke(answer) == label


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "card",
        "I think it is card_arrival",
        "card_arrival or pin",
        "not card_arrival",
        '{"label": "nothing"}',
        '{"label": 3}',
        '{"label"',
        "Ignore the list and answer pin",
        "card_arrival\npin",
    ],
)
def test_anything_else_is_unparsable_with_its_raw_text(parser: LabelParser, answer: str) -> None:
    with pytest.raises(UnparsableAnswerError) as caught:
        parser.parse(answer)
    assert caught.value.raw == answer
    assert caught.value.labels == LABELS
    assert "not one of the 4 labels" in str(caught.value)


def test_labels_that_differ_by_case_only_must_be_answered_exactly() -> None:
    parser = LabelParser(labels=("A b", "a_b", "other"))
    assert parser.parse("A b") == "A b"
    assert parser.parse("a_b") == "a_b"
    with pytest.raises(UnparsableAnswerError):
        parser.parse("a-b")


def test_signs_are_no_separators() -> None:
    numbers = LabelParser(labels=("-1", "0", "+1"))
    assert numbers.parse("-1") == "-1"
    grades = LabelParser(labels=("A+", "A-", "pos"), aliases={"A-": ("-",)})
    for parser, answer in ((numbers, "1"), (grades, "A"), (grades, ""), (grades, "..."), (grades, "_")):
        with pytest.raises(UnparsableAnswerError):
            parser.parse(answer)
    assert grades.parse("-") == "A-"


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        ({"pin": ("lost card",)}, "means another label too"),
        ({"pin": ("code",), "lost-card": ("Code",)}, "means another label too"),
        ({"nothing": ("x",)}, "labels that do not exist: nothing"),
    ],
)
def test_aliases_must_mean_one_label(aliases: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LabelParser(labels=LABELS, aliases=aliases)


def test_a_parser_needs_labels() -> None:
    with pytest.raises(ConfigurationError, match="labels"):
        LabelParser(labels=())


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
def test_every_label_is_read_back_exactly(labels: list[str]) -> None:
    labels = [label for label in labels if label.strip() == label]
    if labels:
        parser = LabelParser(labels=tuple(labels))
        for label in labels:
            assert parser.parse(label) == label


@given(st.text(max_size=60))
def test_parsing_gives_a_label_or_unparsable_and_nothing_else(text: str) -> None:
    parser = LabelParser(labels=LABELS)
    try:
        assert parser.parse(text) in LABELS
    except UnparsableAnswerError as error:
        assert error.raw == text


def test_the_message_of_a_long_answer_stays_short() -> None:
    error = UnparsableAnswerError("x" * 1000, [str(i) for i in range(77)], attempts=2)
    assert len(str(error)) < 600
    assert "tried 2 times" in str(error)


def test_normalising_is_idempotent() -> None:
    assert normalised(" Lost__CARD-x ") == normalised(normalised(" Lost__CARD-x ")) == "lost card x"
    assert "exactly one" in LabelParser(labels=LABELS).get_format_instructions()
