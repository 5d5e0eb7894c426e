import os
from pathlib import Path

import pytest

from layerstore import limits
from layerstore.errors import ConfigError
from layerstore.graphroot.storageconf import LayerStoreSpec, StorageConfig

USER = 1234


class Machine:
    """A made-up machine: its files, its environment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env: dict[str, str] = {"TMPDIR": str(root / "tmp")}
        self.home: Path = root / "home/u"
        self.home.mkdir(parents=True)

    def write(self, name: str, text: str) -> Path:
        """``name`` is relative to etc, usr or home: "etc/containers/storage.conf"."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def config(self, uid: int = 0, **options) -> StorageConfig:
        return StorageConfig.from_system(
            env={"HOME": str(self.home), **self.env},
            uid=uid,
            etc=self.root / "etc",
            usr=self.root / "usr",
            run=self.root / "run",
            **options,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def conf(graph_root: str = "", **keys: str) -> str:
    lines = [f'graphroot = "{graph_root}"'] if graph_root else []
    return "\n".join(["[storage]", *lines, *(f"{key} = {value}" for key, value in keys.items())])


# -- which files --------------------------------------------------------------------------


def test_without_any_file(machine: Machine) -> None:
    config = machine.config()
    assert config.graph_root == Path("/var/lib/containers/storage")
    assert config.run_root == machine.root / "run/containers/storage"
    assert (config.driver, config.rootless, config.files) == ("overlay", False, ())
    config.check()


def test_the_first_main_file_counts_alone(machine: Machine) -> None:
    usr = machine.write("usr/containers/storage.conf", conf("/usr-root", runroot='"/usr-run"'))
    assert machine.config().graph_root == Path("/usr-root")
    assert machine.config().files == (usr,)
    etc = machine.write("etc/containers/storage.conf", conf("/etc-root"))
    config = machine.config()
    assert config.graph_root == Path("/etc-root")
    assert config.run_root == machine.root / "run/containers/storage"
    assert config.files == (etc,)
    own = machine.write("home/u/.config/containers/storage.conf", conf("/own-root"))
    assert machine.config().files == (own,)
    xdg = machine.write("xdg/containers/storage.conf", conf("/xdg-root"))
    machine.env["XDG_CONFIG_HOME"] = str(machine.root / "xdg")
    assert machine.config().files == (xdg,)
    named = machine.write("named.conf", conf("/named-root"))
    machine.write("etc/containers/storage.conf.d/1.conf", conf("/drop-in"))
    machine.env["CONTAINERS_STORAGE_CONF"] = str(named)
    config = machine.config()
    assert (config.graph_root, config.files) == (Path("/named-root"), (named,))


def test_a_named_file_must_exist(machine: Machine) -> None:
    for name in ("CONTAINERS_STORAGE_CONF", "CONTAINERS_STORAGE_CONF_OVERRIDE"):
        machine.env = {name: str(machine.root / "gone")}
        with pytest.raises(ConfigError, match="exist"):
            machine.config()


def test_drop_ins_in_the_order_of_their_names(machine: Machine) -> None:
    main = machine.write("etc/containers/storage.conf", conf("/main", runroot='"/run-main"'))
    late = machine.write("usr/containers/storage.conf.d/90.conf", conf("/vendor"))
    early = machine.write("home/u/.config/containers/storage.conf.d/10.conf", conf("/own"))
    machine.write("usr/containers/storage.conf.d/50.conf", conf("/hidden"))
    hiding = machine.write("etc/containers/storage.conf.d/50.conf", conf("/seen"))
    machine.write("etc/containers/storage.conf.d/95.txt", conf("/no"))
    (machine.root / "etc/containers/storage.conf.d/99.conf").mkdir()
    config = machine.config()
    assert config.files == (main, early, hiding, late)
    assert config.graph_root == Path("/vendor")
    assert config.run_root == Path("/run-main")
    last = machine.write("last.conf", conf("/last"))
    machine.env["CONTAINERS_STORAGE_CONF_OVERRIDE"] = str(last)
    assert machine.config().graph_root == Path("/last")
    assert machine.config().files[-1] == last


def test_drop_ins_for_root_and_for_users(machine: Machine) -> None:
    for place in ("usr", "etc"):
        machine.write(f"{place}/containers/storage.rootful.conf.d/a.conf", conf(f"/{place}-full"))
        machine.write(f"{place}/containers/storage.rootless.conf.d/b.conf", conf(f"/{place}-less"))
        machine.write(
            f"{place}/containers/storage.rootless.conf.d/{USER}/c.conf", conf(f"/{place}-user")
        )
    assert machine.config().graph_root == Path("/etc-full")
    assert machine.config(USER).graph_root == Path("/etc-user")
    assert machine.config(USER + 1).graph_root == Path("/etc-less")


def test_lists_are_replaced_or_extended(machine: Machine) -> None:
    machine.write(
        "etc/containers/storage.conf",
        '[storage.options]\nadditionalimagestores=["/a"]\nadditionallayerstores=["/l:ref"]',
    )
    machine.write(
        "etc/containers/storage.conf.d/1.conf",
        '[storage.options]\nadditionalimagestores=["/b", {append=true}]\n'
        'additionallayerstores=["/m"]',
    )
    config = machine.config()
    assert config.additional_image_stores == (Path("/a"), Path("/b"))
    assert config.additional_layer_stores == (LayerStoreSpec(Path("/m")),)


# -- roots --------------------------------------------------------------------------------


def test_the_roots_of_a_user(machine: Machine) -> None:
    config = machine.config(USER)
    assert config.rootless
    assert config.graph_root == machine.home / ".local/share/containers/storage"
    assert config.run_root == machine.root / f"tmp/storage-run-{USER}/containers"
    machine.env["XDG_DATA_HOME"] = "/data"
    machine.env["XDG_RUNTIME_DIR"] = "/runtime"
    config = machine.config(USER)
    assert config.graph_root == Path("/data/containers/storage")
    assert config.run_root == Path("/runtime/containers")


def test_the_runtime_directory_must_be_the_users_own(machine: Machine) -> None:
    uid = os.geteuid() or USER
    directory = machine.root / f"run/user/{uid}"
    directory.mkdir(parents=True)
    directory.chmod(0o700)
    assert machine.config(uid).run_root == directory / "containers"
    directory.chmod(0o722)
    assert machine.config(uid).run_root == machine.root / f"tmp/storage-run-{uid}/containers"
    directory.rmdir()
    directory.symlink_to(machine.home)
    assert machine.config(uid).run_root == machine.root / f"tmp/storage-run-{uid}/containers"


def test_a_user_without_a_home(machine: Machine) -> None:
    machine.env["HOME"] = ""
    with pytest.raises(ConfigError, match="HOME"):
        machine.config(USER)
    machine.env["XDG_DATA_HOME"] = "/data"
    assert machine.config(USER).graph_root == Path("/data/containers/storage")


def test_what_a_user_takes_from_the_system(machine: Machine) -> None:
    machine.write(
        "etc/containers/storage.conf",
        '[storage]\ndriver="overlay"\ngraphroot="/var/lib/containers/storage"\n'
        'runroot="/run/containers/storage"\n'
        'rootless_storage_path="/scratch/$UID${HOME}/$NOTHING/storage"\n'
        '[storage.options]\nadditionalimagestores=["/shared"]\n'
        'additionallayerstores=["/store:ref"]\nmount_program="/bin/fuse-overlayfs"\n'
        '[storage.options.overlay]\nignore_chown_errors="true"\nmountopt="nodev"',
    )
    config = machine.config(USER)
    assert config.graph_root == Path(f"/scratch/{USER}{machine.home}/storage")
    assert config.run_root.parent.name == f"storage-run-{USER}"
    assert config.ignore_chown_errors
    assert config.additional_image_stores == ()
    assert config.additional_layer_stores == ()
    assert (config.mount_program, config.mount_options) == ("", ())
    # a file of one's own has everything, or nothing
    machine.write("home/u/.config/containers/storage.conf", conf("$HOME/mine"))
    config = machine.config(USER)
    assert config.graph_root == machine.home / "mine"
    assert not config.ignore_chown_errors
    assert machine.config().additional_image_stores == () == config.additional_image_stores


def test_the_systems_root_may_be_one_for_each_user(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", conf("/big/$UID", runroot='"$HOME/run"'))
    config = machine.config(USER)
    assert config.graph_root == Path(f"/big/{USER}")
    assert config.run_root == machine.home / "run"


def test_roots_are_resolved(machine: Machine) -> None:
    (machine.root / "real").mkdir()
    (machine.root / "link").symlink_to("real")
    machine.write("etc/containers/storage.conf", conf(f"{machine.root}/link/./g/"))
    assert machine.config().graph_root == machine.root / "real/g"


def test_a_root_must_be_absolute(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", conf("relative"))
    with pytest.raises(ConfigError, match="graphroot"):
        machine.config()


def test_inside_a_user_namespace_of_podman(machine: Machine) -> None:
    config = StorageConfig.from_system(
        env={"HOME": str(machine.home), "_CONTAINERS_ROOTLESS_UID": str(USER)},
        etc=machine.root / "etc",
        usr=machine.root / "usr",
        run=machine.root / "run",
    )
    assert config.rootless
    assert config.graph_root == machine.home / ".local/share/containers/storage"


# -- options ------------------------------------------------------------------------------

ALL = """
[storage]
driver = "overlay"
[storage.options]
additionalimagestores = ["/i", "/j"]
additionallayerstores = ["/a:ref", "/b", "/c:ref,/d"]
mount_program = "/bin/below"
ignore_chown_errors = "true"
disable-volatile = true
size = "10G"
[storage.options.overlay]
mount_program = "/bin/fuse-overlayfs"
mountopt = "nodev,metacopy=on"
skip_mount_home = "true"
sync = "filesystem"
[storage.options.vfs]
ignore_chown_errors = "false"
[storage.options.pull_options]
enable_partial_images = "true"
"""


def test_all_options_of_a_file(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", ALL)
    config = machine.config()
    assert config.additional_image_stores == (Path("/i"), Path("/j"))
    assert [str(spec) for spec in config.additional_layer_stores] == [
        "/a:ref",
        "/b",
        "/c:ref",
        "/d",
    ]
    assert config.mount_program == "/bin/fuse-overlayfs"
    assert config.mount_options == ("nodev", "metacopy=on")
    assert config.skip_mount_home
    assert config.ignore_chown_errors
    assert config.disable_volatile
    assert config.sync == "filesystem"
    config.check()


@pytest.mark.parametrize(
    "given",
    [
        {"root": Path("/other")},
        {"driver": "overlay"},
        {"options": ["overlay.mountopt=ro"]},
    ],
)
def test_the_command_line_makes_the_files_options_void(machine: Machine, given) -> None:
    machine.write("etc/containers/storage.conf", ALL)
    machine.env["STORAGE_OPTS"] = "additionallayerstore=/env"
    config = machine.config(**given)
    assert config.additional_layer_stores == ()
    assert config.mount_options == (("ro",) if "options" in given else ())
    assert config.graph_root == given.get("root", Path("/var/lib/containers/storage"))


def test_another_run_root_keeps_the_options(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", ALL)
    config = machine.config(run_root=Path("/r"))
    assert config.run_root == Path("/r")
    assert config.skip_mount_home


def test_the_environment_replaces_the_files_options(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", ALL)
    machine.env["STORAGE_OPTS"] = (
        "overlay.additionallayerstore=/a:ref,overlay2.additionallayerstore=/b,"
        ".imagestore=/i,overlay.additionalimagestore=/j,Overlay.MountOpt=nodev"
    )
    config = machine.config()
    assert [str(spec) for spec in config.additional_layer_stores] == ["/a:ref", "/b"]
    assert config.additional_image_stores == (Path("/i"), Path("/j"))
    assert config.mount_options == ("nodev",)
    assert not config.skip_mount_home
    machine.env["STORAGE_OPTS"] = ""
    assert machine.config().additional_layer_stores == ()


@pytest.mark.parametrize(
    "option",
    [
        "overlay.unknown=1",
        "mountopt",
        "=x",
        "additionallayerstore=relative",
        "additionallayerstore=/a:other",
        "additionallayerstore=/a:ref:ref",
        "imagestore=relative",
        "skip_mount_home=maybe",
        "sync=sometimes",
    ],
)
def test_options_that_make_no_sense(machine: Machine, option: str) -> None:
    with pytest.raises(ConfigError):
        machine.config(options=[option])


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/a", LayerStoreSpec(Path("/a"))),
        ("/a:ref", LayerStoreSpec(Path("/a"), True)),
        ("//a/./b/../c/:ref", LayerStoreSpec(Path("/a/c"), True)),
    ],
)
def test_a_layer_store(text: str, spec: LayerStoreSpec) -> None:
    assert LayerStoreSpec.parse(text) == spec
    assert LayerStoreSpec.parse(str(spec)) == spec


# -- what we cannot do ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[storage]\ndriver="vfs"', "vfs"),
        ('[storage]\ndriver="zfs"\n[storage.options.zfs]\nfsname="x"', "zfs"),
        ('[storage]\nimagestore="/images"', "imagestore"),
        ("[storage]\ntransient_store=true", "transient_store"),
        ('[storage.options.overlay]\nuse_composefs="true"', "composefs"),
        ('[storage.options.overlay]\nforce_mask="shared"', "force_mask"),
        ("[storage.options]\nforce_mask=0o755", "force_mask"),
        ('[storage.options]\nremap-uids="0:1000:100"', "remap-uids"),
    ],
)
def test_settings_that_would_change_what_is_on_disk(
    machine: Machine, text: str, reason: str
) -> None:
    machine.write("etc/containers/storage.conf", text)
    config = machine.config()
    with pytest.raises(ConfigError, match=reason):
        config.check()


def test_harmless_settings(machine: Machine) -> None:
    machine.write(
        "etc/containers/storage.conf",
        '[storage]\ndriver="overlay2"\nimagestore=""\ntransient_store=false\nnew="x"\n'
        "list=[1,2]\n[storage.options]\nuse_composefs='true'\nforce_mask=0\n"
        '[storage.options.overlay]\nuse_composefs="false"\nforce_mask=""\n[other]\nx=1',
    )
    config = machine.config()
    config.check()
    assert config.driver == "overlay"


def test_keys_that_no_version_knows_are_told(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    path = machine.write(
        "etc/containers/storage.conf",
        "[storage]\ndrver='overlay'\n[storage.options]\nadditionallayerstore=['/a']\n"
        "additionallayerstores=['/b']\nsize='1G'\n[storage.options.overlay]\nmountopts='nodev'\n"
        "[storage.options.pull_options]\nany='thing'\n[storage.options.zfs]\nany='thing'\n",
    )
    with caplog.at_level("WARNING", "layerstore"):
        config = machine.config()
    assert [spec.path for spec in config.additional_layer_stores] == [Path("/b")]
    assert caplog.messages == [
        f"{path}: there is no key storage.drver",
        f"{path}: there is no key storage.options.additionallayerstore",
        f"{path}: there is no key storage.options.overlay.mountopts",
    ]


def test_the_driver(machine: Machine) -> None:
    machine.write("etc/containers/storage.conf", f'[storage]\ngraphroot="{machine.root}/g"')
    (machine.root / "g/vfs-images").mkdir(parents=True)
    assert machine.config().driver == "vfs"
    (machine.root / "g/overlay-images").mkdir()
    assert machine.config().driver == "overlay"
    machine.env["STORAGE_DRIVER"] = "btrfs"
    assert machine.config().driver == "btrfs"
    assert machine.config(driver="overlay2").driver == "overlay"


def test_the_driver_of_a_new_store(machine: Machine) -> None:
    for priority, driver in (('["vfs"]', "vfs"), ('["vfs", "overlay"]', "overlay")):
        machine.write("etc/containers/storage.conf", conf("/none", driver_priority=priority))
        assert machine.config().driver == driver


@pytest.mark.parametrize(
    "text",
    [
        "[storage",
        "[storage]\ngraphroot=5",
        "storage=5",
        '[storage.options]\nadditionallayerstores="/a"',
        "[storage.options]\nadditionallayerstores=[5]",
        "[storage]\ntransient_store=[]",
        "[storage.options.overlay]\nmountopt=[5]",
        "[storage.options]\noverlay=1",
        "[storage]\ndriver=true",
    ],
)
def test_broken_files(machine: Machine, text: str) -> None:
    machine.write("etc/containers/storage.conf", text)
    with pytest.raises(ConfigError):
        machine.config()


def test_a_file_that_cannot_be_read(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    path = machine.write("etc/containers/storage.conf", "#" * 100)
    monkeypatch.setattr(limits, "STORAGE_CONF_BYTES", 50)
    with pytest.raises(ConfigError, match="larger"):
        machine.config()
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        machine.config()
    path.rmdir()
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="TOML"):
        machine.config()
