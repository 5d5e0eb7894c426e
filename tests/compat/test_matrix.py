"""One graph root through a whole life, in our hands and in theirs: each kind of layer and store.

In each life both sides pull an image, the two sharing layers; each lists, mounts, runs, tags,
saves and pushes what the other made; Podman commits and Buildah builds on what we pulled; each
removes what the other brought; at the end nothing is left of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from lab import images, oci
from lab import rig as lab
from lab.fresh import fresh
from lab.podman import FLAVOURS, Flavour, PodmanEnv
from lab.registry import DebianRegistry
from lab.rig import PlainTree, Push, Pushed
from lab.store import LayerstoreService
from lab.trees import Tree, snapshot
from lab.zygote import Zygote

pytestmark = pytest.mark.compat

Kind = Literal["estargz", "zstd:chunked", "gzip", "zstd"]
Provider = Literal["no store", "service", "static"]

BIG_BYTES: Final = 1 << 20

# Of which layers a client that looks them up by TOC (Podman 5) or by blob (Podman 4) finds any.
LAZY: Final[dict[Flavour, set[tuple[Provider, Kind]]]] = {
    "debian13": {
        ("service", "estargz"),
        ("service", "zstd:chunked"),
        ("static", "estargz"),
        ("static", "zstd:chunked"),
    },
    "debian12": {
        ("service", "estargz"),
        ("service", "zstd:chunked"),
        ("static", "estargz"),
        ("static", "zstd:chunked"),
        ("static", "gzip"),
        ("static", "zstd"),
    },
}


def hello(member: str) -> str:
    """What the image of this pair prints."""
    return f"hello from small amd64 {member}: 199 files\n"


def plain(member: str) -> oci.StoredImage:
    """The image of the pair as it was built: tar.gz."""
    return images.small_image(big_bytes=BIG_BYTES, marker=member)


# -- what all lives share ----------------------------------------------------------------


Pair = tuple[Pushed, Pushed]


@pytest.fixture(scope="module")
def pair(
    workspace: Path, push: Push, push_lazy: Push, trixie: object, registry: DebianRegistry
) -> Callable[[Kind], Pair]:
    """``pair(kind)``: two images in the registry that share the first two of three layers."""
    known: dict[Kind, Pair] = {}

    def packed(place: Path, kind: Kind, member: str) -> Pushed:
        name = f"matrix/{kind.replace(':', '-')}:{member}"
        if kind == "gzip":
            return push(plain(member), name)
        if kind == "estargz":
            return push_lazy(plain(member), name)
        layout = place / member
        way = f"--dest-compress-format={kind}"
        with PodmanEnv(place / "env", "debian13") as env:
            env.skopeo("copy", "--quiet", way, plain(member).source, f"oci:{layout}:latest")
        return push(oci.read_image(layout, "latest"), name)

    def make(kind: Kind) -> Pair:
        if kind not in known:
            place = fresh("matrix-", workspace)
            known[kind] = (packed(place, kind, "one"), packed(place, kind, "two"))
        return known[kind]

    return make


@pytest.fixture(scope="module")
def trees(pair: Callable[[Kind], Pair], plain_tree: PlainTree) -> tuple[Tree, Tree]:
    """The files of both images."""
    one, two = pair("gzip")
    return plain_tree(one), plain_tree(two)


@pytest.fixture(scope="module")
def service(workspace: Path, registry: DebianRegistry) -> Iterator[LayerstoreService]:
    """One running store for all lives."""
    place = fresh("matrix-service-", workspace)
    with (
        PodmanEnv(place / "env", registries=(registry.host,)) as env,
        LayerstoreService(place / "layerstore", environment=env.environment()) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def layer_store(
    workspace: Path,
    registry: DebianRegistry,
    pair: Callable[[Kind], Pair],
    request: pytest.FixtureRequest,
) -> Callable[[Provider, Kind], Path | None]:
    """``layer_store(provider, kind)``: the store, which has these images if anyone has them."""
    static = fresh("matrix-static-", workspace) / "store"
    unpacked: set[Kind] = set()

    def get(provider: Provider, kind: Kind) -> Path | None:
        if provider == "service":
            running: LayerstoreService = request.getfixturevalue("service")
            return running.mountpoint
        if provider == "no store":
            return None
        if kind not in unpacked:
            with PodmanEnv(static.with_name("env"), registries=(registry.host,)) as env:
                for pushed in pair(kind):
                    env.layerstore("unpack", "--ref", f"{registry.host}/{pushed.name}", static)
            unpacked.add(kind)
        return static

    return get


@pytest.fixture(scope="module")
def far(workspace: Path) -> Iterator[DebianRegistry]:
    """A registry that has none of the layers."""
    with DebianRegistry(workspace / "matrix-far") as running:
        yield running


@pytest.fixture(scope="module")
def elsewhere(
    workspace: Path, registry: DebianRegistry, far: DebianRegistry
) -> Iterator[Callable[[Flavour], PodmanEnv]]:
    """``elsewhere(flavour)``: another Podman, without any layer store."""
    made: dict[Flavour, PodmanEnv] = {}

    def get(flavour: Flavour) -> PodmanEnv:
        if flavour not in made:
            place = workspace / f"matrix-elsewhere-{flavour}"
            made[flavour] = PodmanEnv(place, flavour, registries=(registry.host, far.host))
        return made[flavour]

    yield get
    for env in made.values():
        env.cleanup()


# -- one life ----------------------------------------------------------------------------


class Life:
    """A graph root, and what is done to it."""

    def __init__(
        self,
        env: PodmanEnv,
        elsewhere: PodmanEnv,
        registry: DebianRegistry,
        far: DebianRegistry,
        pair: Pair,
        trees: tuple[Tree, Tree],
        name: str,
        lazy: bool,
        zygote: Zygote,
    ) -> None:
        self.env: Final = env
        self.elsewhere: Final = elsewhere
        self.registry: Final = registry
        self.far: Final = far
        self.pair: Final = pair
        self.trees: Final = trees
        self.name: Final = name
        self.lazy: Final = lazy
        self.one, self.two = (f"{registry.host}/{pushed.name}" for pushed in pair)
        self.archive: Final = env.directory / "archive"
        self.zygote: Final = zygote
        self.made: Final[list[str]] = []

    # -- helpers

    def ours(self, *arguments: str | Path, env: PodmanEnv | None = None, status: int = 0) -> str:
        """Our program; what it printed, its errors if it was to fail."""
        environment = (env or self.env).environment()
        found, _ = self.zygote.run(*map(str, arguments), environment=environment)
        assert found == status, f"{arguments} ended with {found}: {self.zygote.said()}"
        return self.zygote.said() if status else self.zygote.output()

    def told(self, *arguments: str | Path) -> Any:
        return json.loads(self.ours(*arguments, "--json"))

    def theirs(self, *arguments: str | Path) -> str:
        return self.env.podman(*arguments).stdout

    def digests(self, image: str) -> list[str]:
        """The layers of an image in a registry."""
        tls = "--tls-verify=false"
        raw = self.env.skopeo("inspect", tls, "--raw", f"docker://{image}").stdout
        return [layer["digest"] for layer in json.loads(raw)["layers"]]

    def runs_elsewhere(self, image: str, expected: str, *command: str) -> None:
        other = self.elsewhere
        assert other.podman("run", "--rm", image, *command).stdout == expected
        other.podman("rmi", "--all", "--force")

    def loads_elsewhere(self, image: str, expected: str, how: str, *command: str) -> None:
        if how == "ours":
            self.ours("load", "--quiet", "-i", self.archive, env=self.elsewhere)
        else:
            self.elsewhere.podman("load", "--quiet", "-i", self.archive)
        self.archive.unlink()
        self.runs_elsewhere(image, expected, *command)

    def is_sound(self) -> None:
        """Nothing is wrong as far as any tool can tell, and all list the same."""
        env = self.env
        assert self.told("check", "storage")["findings"] == []
        storage = ("--graph", str(env.graph_root), "--run", str(env.run_root))
        if env.flavour == "debian13":
            assert env.podman("system", "check").stdout == ""
            env.containers_storage(*storage, "check")
        listed = {image["Id"] for image in self.told("images", "--all")}
        quiet = ("images", "--all", "--quiet", "--no-trunc")
        assert {f"sha256:{each}" for each in listed} == set(self.theirs(*quiet).split())
        for what, expected in (
            ("images", listed),
            ("layers", {layer["id"] for layer in lab.graph_layers(env)}),
        ):
            shown = json.loads(env.containers_storage(*storage, what, "--json").stdout or "[]")
            assert {each["id"] for each in shown or []} == expected

    def is_empty(self) -> None:
        """Neither a record is left, nor a file of a layer or an image."""
        root = self.env.graph_root
        left = {
            path.relative_to(root).as_posix()
            for top in ("overlay", "overlay-layers", "overlay-images", "overlay-containers")
            for path in (root / top).rglob("*")
        }
        ours = root / "layerstore"
        left |= {path.relative_to(root).as_posix() for path in ours.rglob("*") if path.is_file()}
        assert {path for path in left if not _stays(path)} == set()
        for kind in ("layers", "images", "containers"):
            for name in (kind, f"volatile-{kind}"):
                table = root / f"overlay-{kind}/{name}.json"
                assert not table.exists() or json.loads(table.read_bytes() or "[]") in ([], None)
        assert self.told("images", "--all") == []
        assert self.theirs("images", "--all", "--quiet") == ""

    # -- the parts of a life

    def pull(self, flags: tuple[str, ...]) -> None:
        """We pull the first image, they pull the second: two layers are there already."""
        (ours,) = self.told("pull", "--quiet", *flags, self.one)
        assert [each["how"] for each in ours["layers"]] == ["als" if self.lazy else "pulled"] * 3
        self.theirs("pull", "--quiet", self.two)
        assert len(lab.graph_layers(self.env)) == 4
        assert len(lab.extracted_layers(self.env)) == (0 if self.lazy else 4)
        assert self.theirs("run", "--rm", self.one) == hello("one")
        assert self.theirs("run", "--rm", self.two) == hello("two")
        # what they pulled, we need not pull, and the reverse
        (again,) = self.told("pull", "--quiet", *flags, self.two)
        assert {each["how"] for each in again["layers"]} <= {"shared", "toc", "local"}
        if not (self.lazy and self.env.flavour == "debian13"):
            # of images of lazy layers it has ids that leave the config out
            self.theirs("pull", "--quiet", self.one)
        assert len(lab.graph_layers(self.env)) == 4

    def look(self) -> None:
        """We mount and describe theirs, they ours."""
        path = Path(self.ours("mount", self.two).strip())
        assert lab.differing(self.trees[1], snapshot(path), seconds=True) == []
        with pytest.raises(OSError, match="Read-only"):
            (path / "new").touch()
        self.theirs("image", "unmount", self.two)
        assert not path.is_mount()
        path = Path(self.theirs("image", "mount", self.one).strip())
        assert lab.differing(self.trees[0], snapshot(path), seconds=True) == []
        self.ours("umount", self.one)
        assert not path.is_mount()
        for image in (self.one, self.two):
            (document,) = self.told("inspect", image)
            assert {layer["Lazy"] for layer in document.pop("Layers")} == {self.lazy}
            (theirs,) = json.loads(self.theirs("image", "inspect", image))
            if self.lazy and self.env.flavour == "debian13":
                # where no diff ID is verified, it counts the files and not the tar stream
                for found in (document, theirs):
                    del found["Size"], found["VirtualSize"]
            assert document == theirs
            assert self.ours("diff", image) == self.theirs("diff", image)

    def commit(self) -> None:
        """A container of theirs on our image, which we write to, too."""
        box = self.theirs("run", "--detach", "--name", "box", self.one, "sleep", "600").strip()
        self.theirs("exec", "box", "sh", "-c", "echo theirs > /app/made; rm /data/noted")
        path = Path(self.ours("mount", "--read-write", "box").strip())
        assert (path / "app/made").read_text() == "theirs\n"
        with (path / "app/made").open("a") as file:
            file.write("ours\n")
        assert self.theirs("exec", "box", "cat", "/app/made") == "theirs\nours\n"
        self.ours("umount", "box")
        assert self.ours("diff", "box") == self.theirs("diff", "box")
        (used,) = self.told("inspect", self.one)
        assert box in self.ours("rmi", "--force", used["Id"], status=2)
        self.theirs("commit", "--quiet", "box", "localhost/made:1")
        self.made.append("localhost/made:1")
        self.theirs("rm", "--force", "--time=0", "box")
        (made,) = self.told("inspect", "localhost/made:1")
        # Podman 5 unpacks what it knows by its TOC only to build on it
        still = self.lazy and self.env.flavour == "debian12"
        assert [layer["Lazy"] for layer in made["Layers"]] == [*[still] * 3, False]
        assert "D /data/noted" in self.ours("diff", "localhost/made:1").splitlines()

    def build(self) -> None:
        """Buildah builds on what we pulled."""
        buildah = self.env.buildah
        added = self.env.directory / "added"
        added.write_text("added\n")
        work = buildah("from", self.one).stdout.strip()
        buildah("run", work, "--", "sh", "-c", "cat /data/small/007.txt > /app/ran")
        buildah("add", "--quiet", work, added, "/app/added")
        assert self.told("mount") == []
        path = Path(self.ours("mount", "--read-write", work).strip())
        assert (path / "app/ran").read_text() == "file 7\n" * 8
        (path / "app/third").write_text("ours\n")
        self.ours("umount", work)
        buildah("commit", "--quiet", work, "localhost/built:1")
        self.made.append("localhost/built:1")
        buildah("rm", work)
        said = self.theirs("run", "--rm", "localhost/built:1", "cat", "/app/added", "/app/third")
        assert said == "added\nours\n"

    def save(self) -> None:
        """What is saved loads elsewhere and runs, whoever saved it and whose it is."""
        self.ours("save", "--quiet", "-o", self.archive, self.two)
        self.loads_elsewhere(self.two, hello("two"), "theirs")
        oci_archive = ("--format=oci-archive",)
        self.ours("save", "--quiet", *oci_archive, "-o", self.archive, "localhost/made:1")
        shown = ("cat", "/app/made")
        self.loads_elsewhere("localhost/made:1", "theirs\nours\n", "theirs", *shown)
        # old Podman cannot make a Docker archive of an image with zstd layers
        way = () if self.env.flavour == "debian13" else oci_archive
        self.theirs("save", "--quiet", *way, "-o", self.archive, self.one)
        self.loads_elsewhere(self.one, hello("one"), "ours")

    def push(self) -> None:
        """What is pushed has the same layers, unless only the unpacked ones are there."""
        original = [[layer.digest for layer in pushed.image.layers] for pushed in self.pair]
        # where the layers are already, they stay what they are
        again = f"{self.two.rpartition(':')[0]}:{self.name}"
        sent = self.told("push", "--quiet", self.two, again)
        assert sent["digest"] == self.pair[1].image.digest
        # elsewhere they have to come from here
        for number, image in enumerate((self.one, self.two)):
            target = f"{self.far.host}/{self.name}:{number}"
            sent = self.told("push", "--quiet", image, target)
            if self.lazy:
                assert sent["digest"] == self.pair[number].image.digest
                assert self.digests(target) == original[number]
        target = f"{self.far.host}/{self.name}-built:1"
        self.ours("push", "--quiet", "localhost/built:1", target)
        self.runs_elsewhere(target, "added\nours\n", "cat", "/app/added", "/app/third")
        target = f"{self.far.host}/{self.name}-theirs:1"
        self.theirs("push", "--quiet", self.one, target)
        self.runs_elsewhere(target, hello("one"))
        layout = self.env.directory / "skopeo"
        self.env.skopeo("copy", "--quiet", f"containers-storage:{self.one}", f"oci:{layout}:1")
        assert json.loads(self.env.skopeo("inspect", f"oci:{layout}:1").stdout)["Architecture"]
        shutil.rmtree(layout)

    def remove(self) -> None:
        """Each names the other's, and removes what the other made and brought, names first."""
        self.ours("tag", self.two, "localhost/ours:1")
        self.theirs("tag", self.one, "localhost/theirs:1")
        self.ours("rmi", "localhost/theirs:1")
        self.theirs("rmi", "localhost/ours:1")
        self.is_sound()
        for remove, image in ((self.ours, "localhost/made:1"), (self.theirs, "localhost/built:1")):
            if image in self.made:
                remove("rmi", image)
        assert len(lab.graph_layers(self.env)) == 4
        self.theirs("rmi", self.one)
        assert self.theirs("run", "--rm", self.two) == hello("two")
        self.is_sound()
        self.ours("rmi", self.two)


def _stays(path: str) -> bool:
    """Whether a path of the graph root may be there when it is empty."""
    top, _, rest = path.partition("/")
    if top == "overlay":
        return rest in {"l", "staging", "tempdirs", ".has-mount-program", "backingFsBlockDev"}
    if rest == "tmp":
        return True
    kind = top.removeprefix("overlay-")
    return rest in {f"{kind}.lock", f"{kind}.json", f"volatile-{kind}.json"}


@pytest.mark.parametrize("provider", ["no store", "service", "static"])
@pytest.mark.parametrize("kind", ["estargz", "zstd:chunked", "gzip", "zstd"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_life(
    flavour: Flavour,
    kind: Kind,
    provider: Provider,
    make_podman_env: Callable[..., PodmanEnv],
    elsewhere: Callable[[Flavour], PodmanEnv],
    registry: DebianRegistry,
    far: DebianRegistry,
    pair: Callable[[Kind], Pair],
    trees: tuple[Tree, Tree],
    layer_store: Callable[[Provider, Kind], Path | None],
    zygote: Zygote,
    request: pytest.FixtureRequest,
) -> None:
    images_of_kind = pair(kind)
    store = layer_store(provider, kind)
    env = make_podman_env(flavour, registries=(far.host,), additional_layer_store=store)
    lazy = (provider, kind) in LAZY[flavour]
    name = f"{flavour}-{kind}-{provider}".replace(":", "-").replace(" ", "-")
    life = Life(env, elsewhere(flavour), registry, far, images_of_kind, trees, name, lazy, zygote)
    life.pull(("--dialect-l",) if flavour == "debian12" else ())
    life.is_sound()
    if lazy or provider == "no store":  # where nothing is found, nothing can differ
        life.look()
        life.commit()
        life.build()
        life.is_sound()
    if lazy or (kind, provider) == ("gzip", "no store"):  # see also test_consumer_pull
        life.save()
        life.push()
    life.remove()
    life.is_empty()
    life.is_sound()
    if provider == "service":
        running: LayerstoreService = request.getfixturevalue("service")
        assert {layer["uses"] for layer in running.status()["layers"]} <= {0}
