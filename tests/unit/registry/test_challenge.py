"""WWW-Authenticate headers, well and badly formed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.registry.challenge import Challenge, choose, parse_challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Basic", [Challenge("basic")]),
        ('Basic realm="a, b"', [Challenge("basic", {"realm": "a, b"})]),
        (
            'Bearer realm="https://x/t",service="s",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {"realm": "https://x/t", "service": "s", "scope": "repository:a/b:pull,push"},
                )
            ],
        ),
        (
            'Bearer realm=https://x/t , service = s ,, Basic realm="y"',
            [
                Challenge("bearer", {"realm": "https://x/t", "service": "s"}),
                Challenge("basic", {"realm": "y"}),
            ],
        ),
        (
            r'Bearer REALM="a\"b",realm="second"',
            [Challenge("bearer", {"realm": 'a"b'})],
        ),
        (
            'Basic realm=x, Bearer realm="unfinished',
            [Challenge("basic", {"realm": "x"}), Challenge("bearer")],
        ),
        ("", []),
    ],
)
def test_examples(header: str, expected: list[Challenge]) -> None:
    assert parse_challenges([header]) == expected


def test_bearer_is_preferred_even_in_a_later_header() -> None:
    both = parse_challenges(['Basic realm="x"', 'Bearer realm="y"'])
    assert choose(both) == Challenge("bearer", {"realm": "y"})
    assert choose(parse_challenges(["Bearer service=x", "Basic"])) == Challenge("basic")
    assert choose(parse_challenges(["Digest realm=x"])) is None


def test_other_schemes_do_not_hide_the_known_one() -> None:
    found = parse_challenges(["Negotiate abc==, Basic realm=x, NTLM"])
    assert choose(found) == Challenge("basic", {"realm": "x"})


@given(st.text())
def test_any_text_ends(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme


_WORD = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
_VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


@given(st.lists(st.tuples(_WORD, st.dictionaries(_WORD, _VALUE, min_size=1)), max_size=4))
def test_what_is_written_is_read(challenges: list[tuple[str, dict[str, str]]]) -> None:
    def quote(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{scheme} " + ", ".join(f"{name}={quote(value)}" for name, value in parameters.items())
        for scheme, parameters in challenges
    )
    assert parse_challenges([header]) == [Challenge(*pair) for pair in challenges]
