"""A store under load: its registry, a Podman, images that are there and images still to come.

One set-up for all that is done to a server under way (killed, replaced, cut off from its registry,
run for half an hour): the loads of `lab.loads` on it, and what a plain pull gave to compare with.
"""

from __future__ import annotations

import http.client
import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from lab import images, loadimages, oci
from lab.fdstore import FdStore
from lab.fusectl import FuseControl
from lab.loadcrew import Crew
from lab.loads import Kind, Place, Runnable, Task, save_tree
from lab.oci import StoredImage
from lab.podman import Flavour, PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import Rig, image_tree, store_layers

EVERY_LOAD: Final[tuple[Kind, ...]] = (
    *("read", "stream", "mmap", "walk", "containers", "resident", "pulls"),
)


class Workbench:
    """A context manager: pushes ``present + coming`` images, pulls and mounts the first ones.

    The store has a registry process of its own, ``upstream``, which may be stopped and started;
    Podman asks another one with the same contents, so that what is seen there is the store's doing.
    The keeper's descriptors are kept by ``fd_store``, as systemd would.
    ``coming`` images have ``tags`` names each: new contents at first, then new references.
    """

    def __init__(
        self,
        directory: Path,
        *,
        flavour: Flavour = "debian13",
        present: int = 2,
        coming: int = 4,
        tags: int = 20,
        config: str = "",
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory: Final = directory.absolute()
        self.registry: Final = DebianRegistry(self.directory / "registry")
        self.upstream: Final = DebianRegistry(self.directory / "upstream")
        self._present: Final = range(present)
        self._coming: Final = range(present, present + coming)
        self._tags: Final = range(1, tags + 1)
        self._stack: Final = ExitStack()
        self.fd_store: Final = FdStore(self.directory)
        self._crews = 0
        self.rig: Final = Rig(
            self.directory / "rig",
            flavour,
            self.registry.host,
            provider_upstream=self.upstream.host,
            config=config,
            fd_store=self.fd_store,
        )
        self._places: list[Place] = []

    @property
    def control(self) -> FuseControl:
        """The kernel's side of the mount."""
        return self._control

    def crew(self, seed: str, kinds: Iterable[Kind] = EVERY_LOAD) -> Crew:
        """Loads of these kinds, started, on what is here."""
        self._crews += 1
        self.rig.env.podman("rm", "--all", "--force", "--time=0")  # of a crew that was cut short
        crew = Crew(self.directory / f"crew-{self._crews}", self.control)
        for number, kind in enumerate(kinds):
            crew.add(
                Task(
                    kind,
                    board=Path(),  # the crew's choice
                    seed=f"{seed} {number} {kind}",
                    places=tuple(self._places),
                    runnables=self._runnables(kind, seed),
                    podman=tuple(self.rig.env.command("podman")),
                    environment=self.rig.env.environment(),
                )
            )
        return crew

    def _runnables(self, kind: Kind, seed: str) -> tuple[Runnable, ...]:
        """Those to come in their order for the first crew, for later ones in any."""
        numbers: Sequence[int] = self._coming if kind == "pulls" else self._present
        tags: Sequence[int] = self._tags if kind == "pulls" else self._tags[:1]
        found = [
            Runnable(self.rig.image(_name(number, tag)), loadimages.prints(number))
            for tag in tags
            for number in numbers
        ]
        if kind == "pulls" and self._crews > 1:
            random.Random(seed).shuffle(found)
        return tuple(found)

    def _push(self) -> None:
        with PodmanEnv(self.directory / "pusher", registries=(self.registry.host,)) as env:
            for number in (*self._present, *self._coming):
                image = images.lazy(
                    loadimages.load_image(number), self.directory / f"lazy-{number}"
                )
                target = f"docker://{self.registry.host}/{_name(number, 1)}"
                env.skopeo("copy", "--quiet", "--preserve-digests", image.source, target)
                for tag in self._tags if number in self._coming else ():
                    _tag(self.registry, image, number, tag)

    def _plainly(self, number: int) -> Path:
        """The tree of an image as a plain pull extracts it, in a file."""
        path = self.directory / f"tree-{number}"
        name = f"{self.registry.host}/{_name(number, 1)}"
        with PodmanEnv(self.directory / "plain", registries=(self.registry.host,)) as env:
            env.podman("pull", "--quiet", name)
            save_tree(image_tree(env, name), path)
        return path

    def _pull(self, number: int) -> Path:
        """Where the image of this number is mounted now."""
        name = self.rig.image(_name(number, 1))
        self.rig.env.podman("pull", "--quiet", name)
        return Path(self.rig.env.podman("image", "mount", name).stdout.strip())

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.registry)
            stack.enter_context(self.fd_store)
            self.upstream.directory.mkdir()
            self.upstream.storage.symlink_to(self.registry.storage)
            stack.enter_context(self.upstream)
            self._push()
            trees = [self._plainly(number) for number in self._present]
            stack.enter_context(self.rig)
            roots = [self._pull(number) for number in self._present]
            store_layers(self.rig.env, self.rig.store)  # all of them are links into the store
            self._places = [Place(*pair) for pair in zip(roots, trees, strict=True)]
            self._control = stack.enter_context(FuseControl(self.rig.store))
            self._stack.push(stack.pop_all())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def _name(number: int, tag: int) -> str:
    return f"load/{number}:{tag}"


def _tag(registry: DebianRegistry, image: StoredImage, number: int, tag: int) -> None:
    """A further name for the manifest of an image."""
    connection = http.client.HTTPConnection(registry.host)
    connection.request(
        "PUT",
        f"/v2/load/{number}/manifests/{tag}",
        image.blob(image.digest).read_bytes(),
        {"Content-Type": oci.MANIFEST},
    )
    status = connection.getresponse().status
    connection.close()
    assert status == 201, status
