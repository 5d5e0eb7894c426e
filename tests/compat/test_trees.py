"""The demo image and a file of more than 4 GiB are the same through the store as pulled plainly."""

import stat

from lab import ctrremote, images, torture, trees
from lab import rig as lab
from lab.rig import MakeRig, PlainTree, Push, Rig

# containers/storage skips the archive's entry for the root when it extracts.
IGNORE = {*trees.FORMAT_FILES, *trees.ROOT}


def test_the_demo_image_is_the_same_tree(rig: Rig, push: Push, plain_tree: PlainTree) -> None:
    pushed = push(ctrremote.converted(images.python_image()), "lazy/python:1")
    expected = plain_tree(pushed)
    # What the issue asks of the image: setuid files, capabilities, hard links, some size.
    assert sum(bool(node.mode & stat.S_ISUID) for node in expected.values()) >= 5
    assert b"security.capability" in expected[b"usr/bin/ping"].xattrs
    assert expected[b"app/hello.py"].peers == (b"app/hello.py", b"app/plugins/hello.py")
    assert not [path for path in expected if path.startswith(b"usr/share/doc/")]
    assert len(expected) > 20_000
    assert pushed.image.compressed_size > 150_000_000

    image = rig.image(pushed.name)
    rig.env.podman("pull", "-q", image)
    assert lab.extracted_layers(rig.env) == []
    actual = lab.image_tree(rig.env, image)
    assert trees.compare(expected, actual, ignore=IGNORE, seconds=True) == []
    assert rig.env.podman("run", "--rm", image).stdout.startswith("hello from pandas ")


def test_a_file_beyond_4_gib_has_its_size_and_its_end(make_rig: MakeRig, push: Push) -> None:
    """Its contents in full are not read here: that takes a minute and 4 GiB of disk."""
    pushed = push(ctrremote.converted(torture.huge_image()), "lazy/huge:1")
    rig = make_rig("debian12", config="background_fetch = false\n")
    image = rig.image(pushed.name)
    rig.env.podman("pull", "-q", image)
    assert lab.extracted_layers(rig.env) == []
    assert rig.env.podman("run", "--rm", image).stdout == torture.HUGE_TAIL.decode()
    said = rig.env.podman("run", "--rm", image, "stat", "-c", "%s", "/huge").stdout
    assert int(said) == torture.HUGE_SIZE
    with lab.mounted(rig.env, image) as root, (root / "huge").open("rb") as file:
        file.seek((4 << 30) - 5)
        assert file.read(10) == bytes(10)
        file.seek(-len(torture.HUGE_TAIL) - 3, 2)
        assert file.read() == bytes(3) + torture.HUGE_TAIL
