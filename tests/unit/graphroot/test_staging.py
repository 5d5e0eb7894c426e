"""Temporary directories: private while their owner lives, nobody's when it died."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerstore.errors import StorageError
from layerstore.graphroot.removal import remove_tree
from layerstore.graphroot.staging import StagingLost, TempDirectory, remove_stale

CHILD = """
import sys, os
from pathlib import Path
from layerstore.graphroot.staging import TempDirectory
made = TempDirectory(Path(sys.argv[1]))
(made.new() / "file").write_text("x")
print(made.directory, flush=True)
sys.stdin.readline()
os._exit(9)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tempdirs"


def other_process(root: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_nothing_is_made_before_it_is_used(root: Path) -> None:
    with TempDirectory(root):
        assert not root.exists()


def test_each_layer_has_a_directory_of_its_own(root: Path) -> None:
    with TempDirectory(root) as made:
        one, other = made.new(), made.new()
        assert one != other
        assert one.parent == other.parent == made.directory
        word = made.directory.name.removeprefix("temp-dir-")
        assert sorted(os.listdir(root)) == sorted([f"lock-{word}", f"temp-dir-{word}"])
        (one / "file").write_text("x")
    assert not root.exists()


def test_a_living_process_keeps_its_directory(root: Path) -> None:
    process, directory = other_process(root)
    with process:
        assert remove_stale(root) == 0
        assert directory.is_dir()
        process.communicate("\n")
    assert directory.is_dir()
    assert remove_stale(root) == 1
    assert not root.exists()


def test_our_own_is_not_stale(root: Path) -> None:
    with TempDirectory(root) as made:
        made.new()
        assert remove_stale(root) == 0
        # asking did not drop the lock, as closing a second descriptor would
        code = (
            "import sys\nfrom pathlib import Path\n"
            "from layerstore.graphroot.staging import remove_stale\n"
            "sys.exit(remove_stale(Path(sys.argv[1])))"
        )
        assert subprocess.run([sys.executable, "-c", code, root], check=False).returncode == 0
        assert made.directory.is_dir()


def test_leftovers_without_a_lock_file_are_stale(root: Path) -> None:
    (root / "temp-dir-123/0-layer").mkdir(parents=True)
    (root / "lock-456").touch()
    assert remove_stale(root) == 2
    assert not root.exists()


def test_an_empty_root_goes(root: Path) -> None:
    root.mkdir()
    assert remove_stale(root) == 0
    assert not root.exists()


def test_what_is_taken_is_gone_at_once_and_removed_at_the_end(root: Path, tmp_path: Path) -> None:
    doomed = tmp_path / "layer"
    (doomed / "diff").mkdir(parents=True)
    with TempDirectory(root) as made:
        made.take(doomed)
        assert not doomed.exists()
        assert [path.name for path in made.directory.iterdir()] == ["0-layer"]
        made.take(doomed)  # there is none any more
    assert not root.exists()


def test_a_collected_directory_is_noticed(root: Path, tmp_path: Path) -> None:
    doomed = tmp_path / "layer"
    doomed.mkdir()
    with TempDirectory(root) as made:
        made.new()
        remove_tree(root)
        with pytest.raises(StagingLost):
            made.new()
        made.take(doomed)
        assert not doomed.exists()
    assert not root.exists()


def test_nothing_comes_after_the_end(root: Path) -> None:
    made = TempDirectory(root)
    made.new()
    made.close()
    made.close()
    with pytest.raises(StorageError):
        made.new()


def test_a_fork_s_child_leaves_it_alone(root: Path) -> None:
    with TempDirectory(root) as made:
        path = made.new()
        child = os.fork()
        if child == 0:
            made.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.is_dir()


def test_a_root_that_others_remove_again_and_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir
    times: list[object] = []

    def mkdir(path: str | Path, mode: int = 0o777) -> None:
        if Path(path) == root and len(times) < 3:
            # there when it is to be made, gone when one looks
            times.append(path)
            raise FileExistsError(17, "File exists", str(path))
        real(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with TempDirectory(root) as made:
        assert made.new().is_dir()
    assert len(times) == 3


def test_a_file_in_the_place_of_the_root(root: Path) -> None:
    root.write_text("")
    with TempDirectory(root) as made, pytest.raises(StorageError, match=r"tempdirs.*directory"):
        made.new()
    assert root.read_text() == ""
