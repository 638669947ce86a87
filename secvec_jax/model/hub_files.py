"""The files of a model on the Hugging Face Hub, in the hub's own cache."""

from collections.abc import Sequence
from pathlib import Path

from secvec_jax.checksums import FILE as CHECKSUMS
from secvec_jax.errors import UserError
from secvec_jax.model.checkpoint_files import INDEX, SINGLE_FILE, files_of
from secvec_jax.model.embedded import EMBEDDED
from secvec_jax.model.tokenizer import SETTINGS, VOCABULARIES

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    *SETTINGS,
    *VOCABULARIES,
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""What `load` reads of a folder in addition to weights."""

CONTENT_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""The files of a model folder that count as its content; cards, licenses and trainer state do not."""

REPLACEABLE = (
    *CONTENT_FILES, "additional_chat_templates", "adapter_config.json", CHECKSUMS, "*.md", "LICENSE*", "NOTICE*",
    ".gitattributes",
)  # fmt: skip
"""A folder with only these files may be replaced by another model or adapter."""


def snapshot(source: str) -> Path:
    """The hub repository as a folder, of the files that `load` reads and no others."""
    folder = fetched(source, [*_SMALL_FILES, SINGLE_FILE])
    if not (folder / SINGLE_FILE).exists() and (folder / INDEX).exists():
        folder = fetched(source, files_of(folder / INDEX), revision=folder.name)
    return folder


def fetched(source: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder with these files of a hub repository. revision: a commit; None: the newest."""
    if Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"no model {source!r}: give an embedded name ({', '.join(EMBEDDED)}), a folder with config.json, "
            "a .gguf file, or a hub id like owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(files), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if Path(source).parent.is_dir():
            raise UserError(
                f"no model {source!r}: the folder {Path(source).parent} has none of this name, and the hub cannot be "
                f"asked for it ({reason})"
            ) from error
        raise UserError(
            f"cannot fetch {source!r} from the hub ({reason}): check the name and the network, or give a local folder"
        ) from error
