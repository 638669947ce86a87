"""What a checkpoint has in addition to weights, kept so that an export repeats it.

config.json and generation_config.json are copied, not generated again: an entry that the source lacks can mean a
different model to transformers.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secvec_jax.errors import UserError
from secvec_jax.files import check_regular
from secvec_jax.model.architecture import Architecture
from secvec_jax.model.checkpoint_files import DTYPES, read_json
from secvec_jax.model.hf_config import from_hf_config, to_hf_config

_LEFT_OUT = ("_name_or_path", "_commit_hash", "auto_map")
"""Keys of config.json that do not belong in an export: a path of another machine, code that is not exported."""


NOTICE = "NOTICE"
"""The file in a folder with the text that a license requires with the model and everything made from it."""
_MAX_NOTICE_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The entries of a checkpoint that an export repeats.

    config: the source's config.json; None: it has none. generation: its generation_config.json, or the entries of
    one that are known; None: it has none. dtype: what its weights are stored in, a key of `DTYPES`. notice: the text
    of its `NOTICE`; None: it has none.
    """

    config: Mapping[str, Any] | None = None
    generation: Mapping[str, Any] | None = None
    dtype: str = "float32"
    notice: str | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text, as transformers finds them: generation_config.json's, without it config.json's.

        Raises UserError for an entry that is no token id.
        """
        entries = self.config if self.generation is None else self.generation
        ids = (entries or {}).get("eos_token_id")
        token_ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in token_ids):
            raise UserError(f"eos_token_id is {str(ids)[:40]}: it has to be a token id or a list of them")
        return tuple(token_ids)

    def config_for(self, architecture: Architecture, ids: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
        """The config.json of an export: the source's, or a new one if it has none or the architecture differs.

        ids: token ids for a new one. dtype: what all weights are saved in; None: the source's entry stays.
        """
        if self.config is None or from_hf_config(dict(self.config)) != architecture:
            return to_hf_config(architecture, dict(ids)) | {"dtype": dtype or self.dtype}
        config = {key: copy.deepcopy(value) for key, value in self.config.items() if key not in _LEFT_OUT}
        if dtype is not None:
            config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
        return config

    def generation_for(self, ids: Mapping[str, Any]) -> dict[str, Any] | None:
        """The generation_config.json of an export; None: the source has a config.json, but no such file."""
        if self.config is None:
            return dict(ids) | dict(self.generation or {})
        return None if self.generation is None else dict(self.generation)


def metadata_of(folder: Path, config: dict[str, Any], stored: str) -> Metadata:
    """The metadata of a folder. stored: the dtype of its weights, which config.json's entry overrides.

    Raises UserError if generation_config.json or the notice cannot be read.
    """
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else None
    declared = str(config.get("dtype") or config.get("torch_dtype"))
    return Metadata(config, generation, declared if declared in DTYPES else stored, _notice(folder))


def _notice(folder: Path) -> str | None:
    path = folder / NOTICE
    check_regular(path, max_bytes=_MAX_NOTICE_BYTES)
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error


def checked_dtype(dtype: Any) -> str:
    """The name of a dtype that weights can be saved in. Raises UserError for another one."""
    name = getattr(dtype, "__name__", None) or str(dtype)
    if name not in DTYPES:
        raise UserError(f"dtype is {name[:40]!r}: it has to be one of {', '.join(DTYPES)}")
    return name
