"""The torture image: ordinary pulls accept it, and through the store it is the same tree."""

import pytest

from lab import ctrremote, torture, trees
from lab import rig as lab
from lab.podman import PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import PlainTree, Push, Pushed, Rig
from lab.trees import Tree

HELLO = "hello from torture\n"
TOP = b"torture/"


@pytest.fixture(scope="session")
def plain(push: Push) -> Pushed:
    """The image as it was built."""
    return push(torture.torture_image(), "plain/torture:1")


@pytest.fixture(scope="session")
def lazy(push: Push) -> Pushed:
    """The image as Debian's ctr-remote converts it."""
    return push(ctrremote.converted(torture.torture_image()), "lazy/torture:1")


@pytest.fixture(scope="session")
def ours(push_lazy: Push) -> Pushed:
    """The image as layerstore converts it."""
    return push_lazy(torture.torture_image(), "ours/torture:1")


def below(tree: Tree, directory: bytes) -> set[bytes]:
    start = TOP + directory + b"/"
    return {path.removeprefix(start) for path in tree if path.startswith(start)}


def test_an_ordinary_pull_accepts_everything(
    podman_env: PodmanEnv, registry: DebianRegistry, plain: Pushed
) -> None:
    image = f"{registry.host}/{plain.name}"
    podman_env.podman("pull", "-q", image)
    assert podman_env.podman("run", "--rm", image).stdout == HELLO
    tree = lab.image_tree(podman_env, image)
    assert tree.keys() >= torture.RAW_NAMES
    assert {node.kind for node in tree.values()} == {
        *("file", "directory", "symlink", "fifo", "character device", "block device")
    }
    assert max(len(path) for path in tree) > 2900
    assert max(len(path.rpartition(b"/")[2]) for path in tree) == 255
    assert max(len(node.target) for node in tree.values()) == 4095
    assert tree[TOP + b"types/owner-3000000000"].gid == 3000000001
    assert tree[TOP + b"times/early-fraction"].mtime_ns % 10**9 == 123_456_789
    assert below(tree, b"changes/opaque") == {b"new", b"below"}
    assert below(tree, b"changes/links") == {b"one"}
    assert tree[TOP + b"changes/links/one"].nlink == 3
    assert not below(tree, b"changes/directory-gone")
    assert tree[TOP + b"changes/file-directory-file"].kind == "file"
    assert tree[TOP + b"links/b/c/third"].peers == (
        *(TOP + b"links/a/first", TOP + b"links/a/second"),
        *(TOP + b"links/b/c/third", TOP + b"links/b/of-a-link"),
    )
    assert {name for node in tree.values() for name in node.xattrs} >= {
        *(b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"),
        *(b"trusted.fifo", b"trusted.link", b"user.note"),
    }


def test_through_the_store_it_is_the_same_tree(
    rig: Rig, plain: Pushed, lazy: Pushed, plain_tree: PlainTree
) -> None:
    image = rig.image(lazy.name)
    rig.env.podman("pull", "-q", image)
    # Names that are no UTF-8 get lost in the TOC of ctr-remote: that layer is pulled plainly.
    assert len(lab.extracted_layers(rig.env)) == 1
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    differences = trees.compare(
        plain_tree(plain),
        lab.image_tree(rig.env, image),
        ignore={*trees.FORMAT_FILES, *trees.ROOT},
        any_mtime=torture.IMPLICIT_DIRECTORIES | torture.INEXACT_TIMES,
    )
    assert differences == []


def test_converted_by_us_every_layer_is_lazy_and_the_same_tree(
    rig: Rig, plain: Pushed, ours: Pushed, plain_tree: PlainTree
) -> None:
    image = rig.image(ours.name)
    rig.env.podman("pull", "-q", image)
    assert lab.extracted_layers(rig.env) == []
    assert rig.env.podman("run", "--rm", image).stdout == HELLO
    differences = trees.compare(
        plain_tree(plain),
        lab.image_tree(rig.env, image),
        ignore={*trees.FORMAT_FILES, *trees.ROOT},
        any_mtime=torture.IMPLICIT_DIRECTORIES,
    )
    assert differences == []
