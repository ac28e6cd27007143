"""The images are small, hold what they need and nothing else, and run as anybody on a read-only root."""

import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import tomllib
import zlib
from pathlib import Path

import pytest

from testcluster import images
from testcluster.images import Buildah

pytestmark = pytest.mark.nodes

REPOSITORY = Path(__file__).parents[2]
MEGABYTE = 1_000_000
NEVER_SHIPPED = (
    "pip",
    "pip3",
    "uv",
    "gcc",
    "g++",
    "cc",
    "c++",
    "clang",
    "ld",
    "as",
    "make",
    "cmake",
    "ninja",
)
LOADED_FROM_SOURCE = """
import importlib, importlib.util, os, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for module in list(sys.modules.values()):
    source = getattr(module, "__file__", None) or ""
    if source.startswith("/opt/") and source.endswith(".py"):
        if not os.path.exists(importlib.util.cache_from_source(source)):
            print(source)
"""
ALL_REDUCE = """
import os, socket, subprocess, sys

if "RANK" in os.environ:
    import torch
    import torch.distributed as dist

    dist.init_process_group(sys.argv[1])
    numbers = torch.arange(100_000.0) * (dist.get_rank() + 1)
    dist.all_reduce(numbers)
    dist.destroy_process_group()
    print(torch.equal(numbers, torch.arange(100_000.0) * 3), flush=True)
else:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    world = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [subprocess.Popen(sys.orig_argv, env={**world, "RANK": rank}) for rank in "01"]
    sys.exit(max(abs(rank.wait(60)) for rank in ranks))
"""
"""The sum over two ranks, each a process; what a backend is called in torch is the argument."""


def test_the_operator_is_small(operator) -> None:
    """The operator's image has less than 250 MB, unpacked and thus packed, and no torch."""
    unpacked = sum(layer.size for layer in operator.image.layers)
    packed = sum(packed_size(operator.store.blob(layer.digest)) for layer in operator.image.layers)

    print(f"the operator's image: {unpacked / MEGABYTE:.0f} MB, compressed {packed / MEGABYTE:.0f} MB")
    assert unpacked < 250 * MEGABYTE
    assert packed < 100 * MEGABYTE
    assert not list(operator.root.glob("opt/venv/lib/python3*/site-packages/torch*"))


def test_the_operator_starts_as_anybody(operator) -> None:
    """The operator starts as a user without a name, on a read-only root."""
    done = operator.run("python", "-m", "qlora_operator", "--help")

    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
    assert done.stderr == ""


def test_the_trainer_starts_as_anybody(trainer) -> None:
    """The trainer computes with torch, and its command works, as a user without a name on a read-only root."""
    program = (
        "import torch, torch.distributed, qlora_trainer.training.loop as t; print(torch.ones(3).sum().item())"
    )
    done = trainer.run("python", "-c", program)
    help_ = trainer.run("qlora", "--help")

    assert done.returncode == 0, done.stderr
    assert done.stdout == "3.0\n"
    assert help_.returncode == 0, help_.stderr


@pytest.mark.parametrize("backend", ["ccl", "impi"])
def test_two_ranks_all_reduce_as_anybody(trainer, backend: str) -> None:
    """Each backend that torch itself has not adds up the numbers of two ranks, as a user without a name on a
    read-only root."""
    done = trainer.run("python", "-c", ALL_REDUCE, backend)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("True") == 2, done.stderr  # both may write at once, in one line


def test_the_launcher_finds_an_allocator_that_loads(trainer) -> None:
    """What the launcher would preload into the ranks is in the image, and is in a process that it is preloaded into."""
    library = trainer.run(
        "python", "-c", "from qlora_trainer.launch.environment import allocator; print(allocator())"
    ).stdout.strip()
    done = trainer.run(
        "env", f"LD_PRELOAD={library}", "python", "-c", "print(open('/proc/self/maps').read())"
    )

    assert library.endswith("/libjemalloc.so.2")
    assert library in done.stdout
    assert done.stderr == ""


def test_of_the_backends_only_what_runs_is_shipped(trainer) -> None:
    """Of oneCCL and Intel MPI there are neither headers, archives, programs nor libraries for devices, but every
    licence."""
    environment = trainer.root / "opt/venv"
    names = {path.name for path in trainer.files() if path.is_relative_to(environment)}
    libraries = {path.name for path in environment.glob("lib/*.so*")}

    assert libraries == {
        "libfabric.so.1",
        "libhwloc.so.15",
        "libmpi.so.12",
        "libshm-fi.so",
        "libtcp-fi.so",
    }
    assert names.isdisjoint({"mpi.h", "ccl.hpp", "libccl.a", "mpirun", "mpiexec.hydra", "mpicc"})
    for library in ("ccl", "mpi", "tcm"):
        assert len(list(environment.glob(f"share/doc/{library}/licens*/*.txt"))) == 2
    for distribution in ("impi_rt", "oneccl_cpu_devel", "tcmlib"):
        assert list(environment.glob(f"lib/python3*/site-packages/{distribution}-*.dist-info/LICENSE.txt"))


def test_the_root_is_read_only_in_these_tests(operator) -> None:
    """What these tests call a read-only root is one, and they do not run as root."""
    done = operator.run("python", "-c", "import os; print(os.getuid()); open('/opt/new', 'w')")

    assert done.stdout == "54321\n"
    assert "Read-only file system" in done.stderr


@pytest.mark.parametrize(
    ("image", "modules"),
    [
        ("operator", ["qlora_operator.controller.handlers"]),
        ("trainer", ["qlora_trainer.training.loop", "qlora_trainer.launch"]),
    ],
    ids=["operator", "trainer"],
)
def test_nothing_is_compiled_at_run_time(built, image: str, modules: list[str]) -> None:
    """Every module that the program imports has its bytecode beside it."""
    done = built[image].run("python", "-c", LOADED_FROM_SOURCE, *modules)

    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_nothing_that_builds_or_installs_is_shipped(each) -> None:
    """Neither pip nor uv nor a compiler is in the image."""
    found = [path for path in each.files() if path.name in NEVER_SHIPPED and path.is_file()]
    modules = list(each.root.glob("opt/venv/lib/python3*/site-packages/pip")) + list(
        each.root.glob("usr/**/ensurepip")
    )

    assert found == []
    assert modules == []


def test_no_file_gives_privileges_or_can_be_changed_by_all(each) -> None:
    """No program changes its user, and only folders for temporary files are open to all."""
    modes = {path: path.lstat().st_mode for path in each.files() if not path.is_symlink()}

    assert [
        path for path, mode in modes.items() if mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(mode)
    ] == []
    opened = {path for path, mode in modes.items() if mode & stat.S_IWOTH}
    assert {str(path.relative_to(each.root)) for path in opened} == {"tmp", "var/tmp", "run/lock"}
    assert all(modes[path] & stat.S_ISVTX for path in opened)


def test_no_file_needs_an_owner(each) -> None:
    """Everything belongs to root and can be read by all, except what Debian keeps from all."""
    ours = [path for path in each.files() if path.is_relative_to(each.root / "opt") and not path.is_symlink()]

    assert len(ours) > 1000
    assert [
        path for path in ours if path.lstat().st_uid != 0 or not path.lstat().st_mode & stat.S_IROTH
    ] == []


def test_labels_say_what_it_is(each) -> None:
    """The image carries the labels of the OCI, and a user that is not root."""
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in labels_of(each).items()}

    assert labels["title"] == f"qlora-{each.image.name}"
    assert labels["version"] == version
    assert labels["licenses"] == "Apache-2.0"
    assert labels["description"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d([+-]\d\d:\d\d|Z)", labels["created"])
    assert each.config["config"]["User"] == "1000:1000"


def test_the_trainer_has_no_libraries_that_a_cpu_never_loads(trainer) -> None:
    """Of what comes with torch for GPUs nothing is left but what torch itself cannot be imported without."""
    site = next(trainer.root.glob("opt/venv/lib/python3*/site-packages"))

    assert not (site / "triton").exists()
    assert not list(site.glob("triton-*.dist-info"))
    assert trainer.run("python", "-c", "import torch; print(torch.cuda.is_available())").stdout == "False\n"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("operator", "operator/qlora_operator/cli/main.py"),
        ("trainer", "trainer/qlora_trainer/distributed/backends/ccl.py"),
    ],
    ids=["operator", "trainer"],
)
def test_a_change_of_code_changes_one_layer(
    built, name: str, file: str, buildah: Buildah, tmp_path: Path
) -> None:
    """After a change of our code the layers of the base, the dependencies and the compiled backends are the same
    ones."""
    context = tmp_path / "context"
    copy_sources(context)
    changed = context / file
    changed.write_text(changed.read_text() + "\n# changed\n")
    settings = context / "pyproject.toml"
    settings.write_text(re.sub(r'(?m)^version = ".*"', 'version = "0.0.0.dev1"', settings.read_text()))

    build(name, context, buildah)
    try:
        made = json.loads(buildah.run("inspect", "--type", "image", f"qlora-{name}:0.0.0.dev1"))
    finally:
        buildah.run("rmi", f"qlora-{name}:0.0.0.dev1")

    layers = made["OCIv1"]["rootfs"]["diff_ids"]
    before = built[name].config["rootfs"]["diff_ids"]
    assert layers[:-1] == before[:-1]
    assert layers[-1] != before[-1]


# In the soak as long as layers that are found in a builder's cache may be of an earlier builder: then one differs.
@pytest.mark.soak
def test_two_builds_make_the_same_layers(built, buildah: Buildah, tmp_path: Path) -> None:
    """Built again from nothing but the base, in a storage of its own and from sources of another time, the operator's
    image has the very layers and configuration that it has."""
    context = tmp_path / "context"
    copy_sources(context)
    for path in context.rglob("*"):
        os.utime(path, (1, 1))
    base = tmp_path / "base"
    buildah.run("push", "--quiet", "qlora-debian:bookworm", f"oci:{base}:base")
    with tempfile.TemporaryDirectory(dir=built["operator"].store.folder) as folder:
        other = Buildah(Path(folder, "buildah"))
        other.run("tag", other.run("pull", "--quiet", f"oci:{base}:base").strip(), "qlora-debian:bookworm")
        build("operator", context, other)
        again = json.loads(other.run("inspect", "--type", "image", images.tag("operator")))["OCIv1"]
        other.run("rmi", "--all", "--force")
        other.run("rm", "--all")

    assert again["rootfs"]["diff_ids"] == built["operator"].config["rootfs"]["diff_ids"]
    assert again["created"] == built["operator"].config["created"]


def packed_size(tar: Path) -> int:
    """How many bytes the layer has compressed, as registries keep it."""
    packer = zlib.compressobj(6, wbits=31)
    with tar.open("rb") as file:
        size = sum(len(packer.compress(block)) for block in iter(lambda: file.read(1 << 20), b""))
    return size + len(packer.flush())


def labels_of(built) -> dict[str, str]:
    """The image's labels."""
    return dict(built.config["config"]["Labels"])


def copy_sources(context: Path) -> None:
    """Copy what the images are made from."""
    for name in images.MADE_FROM:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__", "compiled"))
        else:
            context.mkdir(exist_ok=True)
            shutil.copy(source, context / name)


def build(name: str, context: Path, buildah: Buildah) -> None:
    """Build the image from the folder."""
    environment = {**os.environ, **buildah.environment, "BASE_IMAGE": "debootstrap"}
    subprocess.run([context / "images" / "build.sh", name], env=environment, check=True)
