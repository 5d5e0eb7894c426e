"""The order of entries in an eStargz blob."""

import io

import pytest

from lab import tars
from layerstore.errors import InvalidLayer, LimitExceeded, UnsupportedFormat
from layerstore.formats.layerorder import Order, clean_path, order_entries


def order(*members: tars.Member, prioritize: tuple[str, ...] = ()) -> Order:
    out = io.BytesIO()
    tars.write_tar(out, members)
    out.seek(0)
    return order_entries(out, prioritize)


def paths(*members: tars.Member, prioritize: tuple[str, ...] = ()) -> list[bytes]:
    return [item.path for item in order(*members, prioritize=prioritize).items]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"", b""),
        (b"./", b""),
        (b"/", b""),
        (b"./a//b/", b"a/b"),
        (b"/a/./b", b"a/b"),
        (b"a/../b", b"b"),
        (b"a/...", b"a/..."),
    ],
)
def test_paths_are_cleaned(name: bytes, path: bytes) -> None:
    assert clean_path(name) == path


def test_paths_that_leave_the_root_or_have_no_end_are_refused() -> None:
    with pytest.raises(InvalidLayer):
        clean_path(b"a/../../b")
    with pytest.raises(LimitExceeded):
        clean_path(b"a" * 5000)


def test_the_order_stays_without_wishes() -> None:
    members = [tars.directory(b"z"), tars.regular(b"z/b"), tars.regular(b"a"), tars.regular(b"z/a")]
    found = order(*members)
    assert [item.path for item in found.items] == [b"z", b"z/b", b"a", b"z/a"]
    assert (found.prioritized, found.found) == (0, ())


def test_wanted_files_come_first_with_parents_and_link_targets() -> None:
    members = [
        tars.directory(b"./"),
        tars.regular(b"first", b"1"),
        tars.directory(b"d"),
        tars.directory(b"d/e"),
        tars.regular(b"d/e/target", b"2"),
        tars.directory(b"l"),
        tars.hard_link(b"l/link", b"./d/e/target"),
        tars.regular(b"last", b"3"),
    ]
    found = order(*members, prioritize=("/last", "l/link", "missing", "last"))
    assert [item.path for item in found.items] == [
        b"",
        b"last",
        b"l",
        b"d",
        b"d/e",
        b"d/e/target",
        b"l/link",
        b"first",
    ]
    assert found.prioritized == 7
    assert found.found == ("/last", "l/link", "last")


def test_the_last_of_equal_names_counts_and_parents_still_come_before() -> None:
    found = order(
        tars.directory(b"a", mode=0o700),
        tars.regular(b"a/f", b"old"),
        tars.regular(b"./a/f", b"new"),
        tars.directory(b"a", mode=0o755),
    )
    assert [item.path for item in found.items] == [b"a", b"a/f"]
    assert found.items[0].header_offset > found.items[1].header_offset


def test_what_lay_in_a_directory_that_a_file_replaces_is_gone() -> None:
    assert paths(
        tars.directory(b"a"), tars.regular(b"a/f"), tars.regular(b"a", b"file"), tars.regular(b"b")
    ) == [b"a", b"b"]


def test_own_entries_of_an_estargz_input_are_left_out() -> None:
    names = [b"stargz.index.json", b"./.prefetch.landmark", b".no.prefetch.landmark"]
    members = [tars.regular(name, b"x") for name in names]
    assert paths(*members, tars.regular(b"d/stargz.index.json", b"x")) == [b"d/stargz.index.json"]


def test_a_link_to_a_file_that_is_replaced_later_is_refused() -> None:
    with pytest.raises(UnsupportedFormat):
        order(tars.regular(b"f", b"1"), tars.hard_link(b"l", b"f"), tars.regular(b"f", b"2"))


def test_links_that_lead_in_a_circle_or_nowhere_end() -> None:
    assert paths(tars.hard_link(b"a", b"b"), tars.hard_link(b"b", b"a"), tars.hard_link(b"c", b"c"))


def test_chains_of_links_and_deep_directories_do_not_overflow() -> None:
    members = [tars.regular(b"0", b"x")]
    members += [tars.hard_link(b"%d" % (n + 1), b"%d" % n) for n in range(3000)]
    assert paths(*members, prioritize=("3000",))[:2] == [b"0", b"1"]
    deep = [tars.directory(b"d/" * n) for n in range(1, 1500)]
    assert len(paths(*reversed(deep))) == 1499
    assert paths(*reversed(deep))[0] == b"d"
