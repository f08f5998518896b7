"""Checkpoints on the Hugging Face hub: what a name or an address asks for, and its download."""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from flax_vae.io.files import PICKLED, SAFE
from flax_vae.io.weights_files import is_weights, weights_in

CONFIG_FILE = "config.json"
WORD = r"\w[\w.-]*"
NAME = re.compile(rf"(?P<repository>{WORD}/{WORD})(?:@(?P<revision>{WORD}))?(?P<path>(?:/{WORD})*)/?", re.ASCII)
ADDRESS = re.compile(r"(?:hf://(?:models/)?|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)(?P<name>[^?#]*)(?:[?#].*)?")
PLACE = re.compile(rf"({WORD}/{WORD})/(?:tree|blob|resolve|raw)/({WORD})(.*)", re.ASCII)  # in the address of a page


class HubName(NamedTuple):
    """A repository on the hub, a folder in it, empty for the top, and the file that is meant, if one is."""

    repository: str
    folder: str = ""
    file: str | None = None
    revision: str | None = None

    def within(self, subfolder: str | None) -> "HubName":
        """Returns the name of a folder in this one."""
        return self._replace(folder="/".join(filter(None, (self.folder, subfolder))))


def hub_name(text: str) -> HubName | None:
    """Reads owner/name[/folder], hf://owner/name[@revision][/folder], or the address of a page or a file of the hub.

    Returns None for anything else, also for owner/name.pt, which would be a file here.
    """
    address = ADDRESS.fullmatch(text)
    found = NAME.fullmatch(PLACE.sub(r"\1@\2\3", address["name"]) if address else text)
    if found is None or found["repository"].startswith(("datasets/", "spaces/")):
        return None
    folder, slash, file = found["path"].strip("/").rpartition("/")
    if not (is_weights(file) or file == CONFIG_FILE):
        folder, file = f"{folder}{slash}{file}", ""
    if not address and (found["revision"] or file or is_weights(found["repository"])):
        return None
    return HubName(found["repository"], folder, file if is_weights(file) else None, found["revision"])


def download(text: str, subfolder: str | None = None, variant: str | None = None) -> Path:
    """Downloads what a name on the hub asks for, a folder's config and weights; returns the folder, or the file.

    Raises FileNotFoundError where the text is no such name, and where the hub does not give it.
    """
    missing = f"{text} is no file or directory here"
    name = hub_name(text)
    if name is None:
        raise FileNotFoundError(f"{missing}, and no name on the hub, which would be owner/name or owner/name/folder")
    name = name.within(subfolder)
    within = f"{name.folder}/" if name.folder else ""
    for suffix in (SAFE, PICKLED):
        wanted = [CONFIG_FILE, *(pattern for one in suffix for pattern in patterns(one, variant))]
        if name.file and not name.file.endswith(".json"):  # an index asks for its shards
            wanted = [CONFIG_FILE, name.file]
        root = fetch(missing, name, [f"{within}{pattern}" for pattern in wanted], f"{within}*/*")
        if name.file and (root / name.folder / name.file).is_file():
            return root / name.folder / name.file
        with contextlib.suppress(FileNotFoundError):
            if name.file is None:
                weights_in(root / name.folder, variant)
                return root / name.folder
    what = name.file or f"weights{f' of the variant {variant!r}' if variant else ''}"
    where = f"{name.repository} on the hub has no {what} in its {name.folder or 'top'} folder"
    raise FileNotFoundError(f"{missing}, and {where}")


def configs(text: str, subfolder: str | None = None) -> Path | None:
    """Downloads the configs of the folders in a folder on the hub; returns it, or None where there is none."""
    if (name := hub_name(text)) is None:
        return None
    name = name.within(subfolder)
    within = f"{name.folder}/" if name.folder else ""
    with contextlib.suppress(OSError, ImportError):
        return fetch("", name, [f"{within}*/{CONFIG_FILE}"], f"{within}*/*/*") / name.folder
    return None


def patterns(suffix: str, variant: str | None) -> list[str]:
    """Returns what weights and indexes of a suffix are called, all or those of a variant."""
    if variant is None:
        return [f"*{suffix}", f"*{suffix}.*json"]
    return [f"*.{variant}{suffix}", f"*.{variant}-*{suffix}", f"*{suffix}.*json"]


def fetch(missing: str, name: HubName, allow: list[str], ignore: str) -> Path:
    """Downloads the files of a repository that match; FileNotFoundError where that fails."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{missing}; to look for it on the hub: pip install huggingface_hub") from None
    revision: dict[str, Any] = {} if name.revision is None else {"revision": name.revision}
    try:
        return Path(snapshot_download(name.repository, allow_patterns=allow, ignore_patterns=ignore, **revision))
    except Exception as error:  # no network, no access, no such name: each library below raises errors of its own
        reason = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{missing}, and the hub does not give it: {reason}") from error
