"""Detectors that find personal data and secrets in text by regular expressions and checksums.

Data without a fixed format, such as names, streets and illnesses, requires named entity recognition. Presidio provides
it through `PresidioDetector`.
"""

from __future__ import annotations

import html
import ipaddress
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from langchain_datashunt.exceptions import ConfigurationError


class Entity(NamedTuple):
    """Span of a text.

    Attributes:
        kind: Kind in capitals, such as "EMAIL" or "IBAN".
        start: Position of the first character.
        end: Position after the last character.
    """

    kind: str
    start: int
    end: int


@runtime_checkable
class Detector(Protocol):
    """Interface of detectors, which find entities of some kinds."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that the detector can find."""

    def find(self, text: str) -> Iterable[Entity]:
        """Return the entities of a text. They may overlap."""


@dataclass(frozen=True)
class PatternDetector:
    """Detect matches of a regular expression that pass a check.

    Attributes:
        kind: Kind of the entities.
        pattern: Regular expression. If it has a group named "it", the entity is that group, otherwise the whole match.
        check: Function that returns True if the matched text is an entity. None accepts every match.
    """

    kind: str
    pattern: re.Pattern[str]
    check: Callable[[str], bool] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The single kind of this detector."""
        return (self.kind,)

    def find(self, text: str) -> list[Entity]:
        """Return all matches that pass the check."""
        group = "it" if "it" in self.pattern.groupindex else 0
        return [
            Entity(self.kind, *match.span(group))
            for match in self.pattern.finditer(text)
            if self.check is None or self.check(match.group(group))
        ]


class PresidioDetector:
    """Detect entities with Presidio's recognisers, including names.

    Pass an `AnalyzerEngine` with a locally installed language model. This class downloads nothing.

    ```python
    detector = PresidioDetector(AnalyzerEngine(nlp_engine=..., supported_languages=["en"]))
    ```

    Args:
        analyzer: A `presidio_analyzer.AnalyzerEngine`.
        language: Language of the texts.
        score: Minimum score of results, in [0, 1].
        entities: Presidio's names of the entities to detect. None detects all supported ones.
    """

    def __init__(
        self, analyzer: Any, *, language: str = "en", score: float = 0.5, entities: Sequence[str] | None = None
    ) -> None:
        if not callable(getattr(analyzer, "analyze", None)):
            raise ConfigurationError(
                f"Expected an `analyzer` with a method analyze(), got {type(analyzer).__name__}. Pass a Presidio "
                f"AnalyzerEngine."
            )
        self.analyzer, self.language, self.score, self.entities = analyzer, language, score, entities

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds given as `entities`, or all that the analyzer supports."""
        return tuple(self.entities or self.analyzer.get_supported_entities(language=self.language))

    def find(self, text: str) -> list[Entity]:
        """Return the entities that Presidio finds with at least the minimum score."""
        wanted = None if self.entities is None else list(self.entities)
        found = self.analyzer.analyze(text=text, language=self.language, entities=wanted, score_threshold=self.score)
        return [Entity(str(one.entity_type), int(one.start), int(one.end)) for one in found]


def find_entities(text: str, detectors: Sequence[Detector]) -> list[Entity]:
    """Return the entities of a text in order, with overlapping ones merged.

    A merged entity has the kind of the longest one.
    """
    return [whole for whole, _ in without_overlaps(all_entities(text, detectors))]


def all_entities(text: str, detectors: Sequence[Detector]) -> list[Entity]:
    """Return the entities of all detectors, including overlapping ones.

    Unusual spellings are found too: the detectors also read the text in a plain form (see `plain_form`).
    """
    found = [entity for detector in detectors for entity in detector.find(text) if entity.end > entity.start]
    plain, places = plain_form(text)
    if plain != text:
        more = [entity for detector in detectors for entity in detector.find(plain) if entity.end > entity.start]
        found += [Entity(kind, places[start][0], places[end - 1][1]) for kind, start, end in more]
    return found


_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}|&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,8});|\\u[0-9A-Fa-f]{4}")
_SPELLED = re.compile(r"\s?[\[({]\s?(at|dot)\s?[\])}]\s?", re.IGNORECASE)


def plain_form(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text in a plain form, and the span of the original text that each of its characters comes from.

    Compatibility characters such as no-break spaces and full-width digits become usual ones (NFKC), dashes become
    hyphens, invisible characters are left out, escapes of URLs, HTML and JSON are decoded, and "(at)" and "[dot]"
    become "@" and ".".
    """
    if text.isascii() and not any(mark in text for mark in "%&\\[({"):
        return text, []
    pieces: list[str] = []
    places: list[tuple[int, int]] = []
    at = 0
    while at < len(text):
        end, made = at + 1, text[at]
        if made in "%&\\" and (escape := _ESCAPE.match(text, at)) is not None:
            end, made = escape.end(), _decoded(escape.group())
        elif made in "[({ " and (spelled := _SPELLED.match(text, at)) is not None:
            end, made = spelled.end(), "@" if spelled.group(1).lower() == "at" else "."
        if not made.isascii():
            made = "".join(_plain_character(one) for one in unicodedata.normalize("NFKC", made))
        pieces.append(made)
        places += [(at, end)] * len(made)
        at = end
    return "".join(pieces), places


def _decoded(escape: str) -> str:
    if escape.startswith("&"):
        return html.unescape(escape)
    code = int(escape[1:] if escape.startswith("%") else escape[2:], 16)
    return chr(code) if code < 0x80 or escape.startswith("\\") else escape


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Pd" or character == "\u2212":
        return "-"
    if category == "Cf" or character == "\u034f":
        return ""
    if category == "Nd":
        return str(unicodedata.digit(character))
    return " " if category == "Zs" else character


def without_overlaps(found: Sequence[Entity]) -> list[tuple[Entity, list[Entity]]]:
    """Merge overlapping entities, and return each merged one with its parts.

    A merged entity covers all its parts and has the kind of the longest one, or of the first one if several are
    longest.
    """
    groups: list[list[Entity]] = []
    end = 0
    for entity in sorted(found, key=lambda entity: entity.start):
        if groups and entity.start < end:
            groups[-1].append(entity)
        else:
            groups.append([entity])
        end = max(end, entity.end)
    wholes = (
        Entity(max(parts, key=lambda part: part.end - part.start).kind, parts[0].start, max(part.end for part in parts))
        for parts in groups
    )
    return list(zip(wholes, groups, strict=True))


# Checksums


def _digits(text: str) -> list[int]:
    return [int(character) for character in text if character.isdigit()]


def luhn(text: str) -> bool:
    """Return whether the text is a payment card number (ISO/IEC 7812): 13 to 19 digits with a valid check digit.

    Numbers of one repeated digit are rejected.
    """
    digits = _digits(text)
    if not 13 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
    return total % 10 == 0


_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def iban(text: str) -> bool:
    """Return whether the text is an IBAN (ISO 13616): the country's length and a remainder of 1 modulo 97."""
    plain = re.sub(r"[\s-]", "", text).upper()
    if len(plain) != _IBAN_LENGTHS.get(plain[:2], -1):
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _phone(text: str) -> bool:
    digits = _digits(text)
    return 7 <= len(digits) <= 15 and len(set(digits)) > 1


def _ssn(text: str) -> bool:
    area, group, serial = re.split(r"[- ]", text)
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _nino(text: str) -> bool:
    return text[:2].upper() not in ("BG", "GB", "NK", "KN", "TN", "NT", "ZZ")


def _spanish(text: str) -> bool:
    plain = text.upper().replace("-", "")
    number = plain[:-1].replace("X", "0").replace("Y", "1").replace("Z", "2")
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == plain[-1]


def _french(text: str) -> bool:
    plain = re.sub(r"\s", "", text).upper()
    number = plain[:-2].replace("2A", "19").replace("2B", "18")
    return 97 - int(number) % 97 == int(plain[-2:])


def _german_tax(text: str) -> bool:
    """Check a German tax identification number: ISO 7064 MOD 11, 10, with one digit occurring two or three times."""
    digits = _digits(text)
    most = Counter(digits[:10]).most_common(1)[0][1]
    product = 10
    for digit in digits[:10]:
        total = (digit + product) % 10 or 10
        product = 2 * total % 11
    return most in (2, 3) and digits[0] != 0 and (11 - product) % 10 == digits[10]


def _dutch(text: str) -> bool:
    digits = _digits(text)
    weights = (9, 8, 7, 6, 5, 4, 3, 2, -1)
    return any(digits) and sum(a * b for a, b in zip(digits, weights, strict=True)) % 11 == 0


def _brazilian(text: str) -> bool:
    digits = _digits(text)
    if len(set(digits)) == 1:
        return False
    for n in (9, 10):
        total = sum(digit * (n + 1 - i) for i, digit in enumerate(digits[:n]))
        if total * 10 % 11 % 10 != digits[n]:
            return False
    return True


_ODD = "BAFHJNPRTVCESULDGIMOQKWZYX"


def _italian(text: str) -> bool:
    plain = text.upper()
    odd = {**{str(i): ord(_ODD[i]) - 65 for i in range(10)}, **{chr(65 + i): ord(_ODD[i]) - 65 for i in range(26)}}
    even = {**{str(i): i for i in range(10)}, **{chr(65 + i): i for i in range(26)}}
    total = sum(odd[character] for character in plain[:15:2]) + sum(even[character] for character in plain[1:15:2])
    return chr(65 + total % 26) == plain[15]


_TWIST = (
    "0123456789", "1234067895", "2340178956", "3401289567", "4012395678",
    "5987604321", "6598710432", "7659821043", "8765932104", "9876543210",
)  # fmt: skip
_TURN = ("0123456789", "1576283094", "5803796142", "8916043527", "9453126870", "4286573901", "2793806415", "7046913258")


def verhoeff(text: str) -> bool:
    """Return whether the digits have a valid Verhoeff check digit, as in India's Aadhaar."""
    state = 0
    for i, digit in enumerate(reversed(_digits(text))):
        state = int(_TWIST[state][int(_TURN[i % 8][digit])])
    return state == 0


def _random_looking(text: str) -> bool:
    """Return whether a string after "key=" is likely a secret: long, mixed and of high entropy."""
    counts = Counter(text)
    bits = -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())
    return len(text) >= 16 and bits >= 3.0 and any(c.isdigit() for c in text) and any(c.isalpha() for c in text)


# Patterns

_EDGE, _END = r"(?<![\w@.+-])", r"(?![\w-])"
_NUMBER, _NUMBER_END = r"(?<![\w.,/-])", r"(?![\w/-]|[.,]\d)"


def _pattern(kind: str, pattern: str, check: Callable[[str], bool] | None = None, flags: int = 0) -> PatternDetector:
    return PatternDetector(kind, re.compile(pattern, flags), check)


EMAIL = _pattern(
    "EMAIL",
    r"(?<![\w.+%-])[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}){0,8}"
    r"@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w-])",
)
PHONE = _pattern(
    "PHONE",
    r"(?<![\w.,/+-])(?:\+\d{1,3}[ .\-/]?(?:\(0\)[ .\-/]?)?|\(?0\d{1,5}\)?[ .\-/]|"
    r"\(\d{3}\)[ .-]?|\d{3}[ .-](?=\d{3}[ .-]\d{4}))"
    r"\d{1,5}(?:[ .\-/]?\d{1,5}){0,5}(?![\w/-]|[.,]\d)",
    _phone,
)
CARD = _pattern("CARD", _NUMBER + r"\d(?:[ -]?\d){12,18}" + _NUMBER_END, luhn)
_IBAN_FORMS = "|".join(
    rf"(?:{'|'.join(code for code, its in _IBAN_LENGTHS.items() if its == n)})\d\d(?:[ -]?[A-Z0-9]){{{n - 4}}}"
    for n in sorted(set(_IBAN_LENGTHS.values()))
)
IBAN = _pattern("IBAN", rf"(?<!\w)(?=[A-Z]{{2}}\d)(?:{_IBAN_FORMS})(?![A-Z0-9])", iban, re.IGNORECASE)
IP = _pattern(
    "IP",
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?=:\d{1,5}(?![\w:])|(?![\w:]|\.\d))|"
    r"(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9A-Fa-f]{1,4}|(?:\d{1,3}\.){3}\d{1,3})?(?![\w:]|\.\d))",
    _ip,
)
URL_SECRET = _pattern(
    "URL_SECRET",
    r"(?:(?<=[?&#;])(?:access_?token|api_?key|auth|client_?secret|code|key|pass(?:word|wd)?|pwd|secret|session(?:_?id)?|sid|"
    r"sig(?:nature)?|token|x-amz-[a-z-]+)=(?P<it>[^\s&#\"'<>]{3,}))",
    None,
    re.IGNORECASE,
)
URL_LOGIN = _pattern("URL_SECRET", r"(?<=://)(?P<it>[^\s/:@\"'<>]{1,100}:[^\s/@\"'<>]{1,100})(?=@)")
API_KEY = _pattern(
    "API_KEY",
    r"(?<![\w-])(?:sk-(?:ant-|proj-|svcacct-)?[\w-]{16,200}|(?:sk|pk|rk)_(?:live|test)_\w{16,200}|gh[pousr]_\w{36,255}|"
    r"github_pat_\w{22,255}|glpat-[\w-]{20,100}|AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,300}|"
    r"xox[abeoprs]-[\w-]{10,250}|hf_[A-Za-z0-9]{30,60}|npm_\w{36}|pypi-[\w-]{50,250}|SG\.[\w-]{16,32}\.[\w-]{16,64}|"
    r"eyJ[\w-]{8,1000}\.eyJ[\w-]{8,4000}\.[\w-]{8,1000})(?![\w-])",
)
PRIVATE_KEY = _pattern(
    "PRIVATE_KEY",
    r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){0,8000}"
    r"(?:-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?",
)
ASSIGNED_SECRET = _pattern(
    "API_KEY",
    r"(?:api[_-]?key|access[_-]?token|auth[_-]?token|bearer|client[_-]?secret|secret[_-]?key)[\"']?\s{0,3}[:=]?\s{0,3}[\"']?"
    r"(?P<it>[A-Za-z0-9_\-./+=]{16,200})",
    _random_looking,
    re.IGNORECASE,
)
PASSWORD = _pattern(
    "PASSWORD",
    r"(?:password|passwd|passwort|kennwort|passphrase|mot de passe|contraseña|senha|pin code)[\"']?\s{0,3}"
    r"(?:is|ist|est|es)?\s{0,3}[:=]\s{0,3}(?P<quote>[\"'])?(?P<it>(?(quote)[^\s\"']{3,100}|[^\s,;]{3,100}))",
    None,
    re.IGNORECASE,
)
NATIONAL_ID = (
    _pattern("NATIONAL_ID", _NUMBER + r"\d{3}[- ]\d{2}[- ]\d{4}" + _NUMBER_END, _ssn),  # United States
    _pattern(
        "NATIONAL_ID",
        _EDGE
        + r"[A-CEGHJ-PR-TW-Za-ceghj-pr-tw-z][A-CEGHJ-NPR-TW-Za-ceghj-npr-tw-z] ?\d{2} ?\d{2} ?\d{2} ?[A-Da-d]"
        + _END,
        _nino,
    ),  # United Kingdom
    _pattern("NATIONAL_ID", _EDGE + r"(?:\d{8}|[XYZxyz]\d{7})-?[A-HJ-NP-TV-Za-hj-np-tv-z]" + _END, _spanish),
    _pattern(
        "NATIONAL_ID", _NUMBER + r"[12] ?\d{2} ?\d{2} ?(?:\d{2}|2[ABab]) ?\d{3} ?\d{3} ?\d{2}" + _NUMBER_END, _french
    ),
    _pattern("NATIONAL_ID", _NUMBER + r"\d{2} ?\d{3} ?\d{3} ?\d{3}" + _NUMBER_END, _german_tax),
    _pattern("NATIONAL_ID", _NUMBER + r"\d{9}" + _NUMBER_END, _dutch),
    _pattern("NATIONAL_ID", _NUMBER + r"\d{3}\.?\d{3}\.?\d{3}-?\d{2}" + _NUMBER_END, _brazilian),
    _pattern(
        "NATIONAL_ID",
        _EDGE + r"[A-Za-z]{6}\d{2}[A-EHLMPR-Ta-ehlmpr-t]\d{2}[A-Za-z]\d{3}[A-Za-z]" + _END,
        _italian,
    ),
    _pattern("NATIONAL_ID", _NUMBER + r"[2-9]\d{3} ?\d{4} ?\d{4}" + _NUMBER_END, verhoeff),  # India
)

DETECTORS: tuple[Detector, ...] = (
    EMAIL, PHONE, CARD, IBAN, IP, URL_SECRET, URL_LOGIN, API_KEY, PRIVATE_KEY, ASSIGNED_SECRET, PASSWORD, *NATIONAL_ID,
)  # fmt: skip
"""Default detectors, which find EMAIL, PHONE, CARD, IBAN, IP, URL_SECRET, API_KEY, PRIVATE_KEY, PASSWORD and
NATIONAL_ID (United States, United Kingdom, Spain, France, Germany, Netherlands, Brazil, Italy, India).
"""
