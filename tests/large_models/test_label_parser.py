from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.exceptions import OutputParserException
from langchain_core.runnables import RunnableLambda

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
def test_label_parser_label_or_alias_returns_label(parser: LabelParser, answer: str, label: str) -> None:
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
def test_label_parser_other_answer_raises_with_raw_text(parser: LabelParser, answer: str) -> None:
    with pytest.raises(UnparsableAnswerError) as caught:
        parser.parse(answer)
    assert caught.value.raw == answer
    assert caught.value.labels == LABELS
    assert "not one of the 4 labels" in str(caught.value)


def test_label_parser_labels_differing_in_case_require_exact_answer() -> None:
    parser = LabelParser(labels=("A b", "a_b", "other"))
    assert parser.parse("A b") == "A b"
    assert parser.parse("a_b") == "a_b"
    with pytest.raises(UnparsableAnswerError):
        parser.parse("a-b")


def test_label_parser_sign_is_not_a_separator() -> None:
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
        ({"pin": ("lost card",)}, "also matches another label"),
        ({"pin": ("code",), "lost-card": ("Code",)}, "also matches another label"),
        ({"nothing": ("x",)}, "labels that do not exist: nothing"),
    ],
)
def test_label_parser_invalid_alias_raises(aliases: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        LabelParser(labels=LABELS, aliases=aliases)


def test_label_parser_without_labels_raises() -> None:
    with pytest.raises(ConfigurationError, match="labels"):
        LabelParser(labels=())


@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=6, unique=True))
def test_label_parser_any_label_parses_to_itself(labels: list[str]) -> None:
    labels = [label for label in labels if label.strip() == label]
    if labels:
        parser = LabelParser(labels=tuple(labels))
        for label in labels:
            assert parser.parse(label) == label


@given(st.text(max_size=60))
def test_label_parser_any_text_returns_label_or_raises_unparsable(text: str) -> None:
    parser = LabelParser(labels=LABELS)
    try:
        assert parser.parse(text) in LABELS
    except UnparsableAnswerError as error:
        assert error.raw == text


def test_unparsable_answer_error_long_answer_has_short_message() -> None:
    error = UnparsableAnswerError("x" * 1000, [str(i) for i in range(77)], attempts=2)
    assert len(str(error)) < 600
    assert "tried 2 times" in str(error)


def test_normalised_twice_is_idempotent() -> None:
    assert normalised(" Lost__CARD-x ") == normalised(normalised(" Lost__CARD-x ")) == "lost card x"
    assert "exactly one" in LabelParser(labels=LABELS).get_format_instructions()


def test_unparsable_answer_error_is_langchains_parser_error() -> None:
    error = UnparsableAnswerError("perhaps", ["cancel", "refund"], attempts=2)
    assert isinstance(error, OutputParserException)
    assert error.llm_output == "perhaps"
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (copied.raw, copied.labels, copied.attempts) == ("perhaps", ("cancel", "refund"), 2)
        assert str(copied) == str(error)
    parser = LabelParser(labels=("cancel", "refund"))
    chain = parser.with_fallbacks([RunnableLambda(lambda _: "refund")], exceptions_to_handle=(OutputParserException,))
    assert chain.invoke("perhaps") == "refund"


WORLD = (
    "退款",
    "remboursement",
    "check-in",
    "U.S.",
    "don't know",
    "C",
    "C#",
    "درخواست بازپرداخت",
    "возврат",
    "A (new)",
)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("退款。", "退款"),
        ("答案：退款", "退款"),
        ("「退款」", "退款"),
        ("【退款】。", "退款"),
        ("« remboursement »", "remboursement"),
        ("« Remboursement\u00a0».", "remboursement"),
        ("Réponse : remboursement", "remboursement"),
        ("„возврат“", "возврат"),
        ("Ответ: возврат.", "возврат"),
        ("check‑in", "check-in"),
        ("check–in", "check-in"),
        ("ｃｈｅｃｋ－ｉｎ", "check-in"),
        ("check\u200b-in\ufeff", "check-in"),
        ("<think>It may be a refund. No.</think>\n\ncheck-in", "check-in"),
        ("<THINK>\nhm\n</THINK> **U.S.**", "U.S."),
        ('```json\n{"label": "U.S."}\n```', "U.S."),
        ("```\ncheck-in\n```", "check-in"),
        ('["check-in"]', "check-in"),
        ("U.S.", "U.S."),
        ("U.S..", "U.S."),
        ("u.s", "U.S."),
        ("“U.S.”", "U.S."),
        ("don’t know", "don't know"),
        ("Don't know!", "don't know"),
        ("C#", "C#"),
        ("**C**", "C"),
        ("درخواست بازپرداخت۔", "درخواست بازپرداخت"),
        ("- check-in", "check-in"),
        ("• C#.", "C#"),
        ("(A (new))", "A (new)"),
        ("A (new).", "A (new)"),
    ],
)
def test_label_parser_label_in_any_script_and_wrapping_is_found(answer: str, label: str) -> None:
    assert LabelParser(labels=WORLD).parse(answer) == label


@pytest.mark.parametrize(
    "answer",
    [
        "<think>check-in</think>",
        "<think>check-in",
        "<think>a</think>check-in</think>C",
        "不是退款",
        "退款？",
        "remboursement ou check-in",
        "C++",
        "C%",
        "```\ncheck-in\nC\n```",
        '{"label": "check-in", ',
        '["check-in", "C"]',
        "« remboursement » est faux",
        "....................C",
    ],
)
def test_label_parser_text_around_label_in_any_script_is_rejected(answer: str) -> None:
    with pytest.raises(UnparsableAnswerError):
        LabelParser(labels=WORLD).parse(answer)
