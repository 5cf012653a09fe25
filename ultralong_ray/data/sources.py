"""Sources as the recipe names them in, sources that can be read as files or made on the fly out.

The text installed on this machine is written once as shards below the working directory and read like any others.
The folder's name covers what is installed, so another Python or another package never reads stale shards.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence

from ultralong_ray.config import Recipe, SourceConfig
from ultralong_ray.stages import workdir
from ultralong_ray.storage import SUCCESS_FILE, Location


def materialise(sources: Sequence[SourceConfig], recipe: Recipe, *, chat: bool) -> list[SourceConfig]:
    """The same sources, with every "installed" one replaced by the files written for it, each with its [storage]."""
    root = workdir(recipe)
    files = [_installed_files(s, root, chat=chat) if s.kind == "installed" else s for s in sources]
    return [s if s.storage is not None else s.model_copy(update={"storage": recipe.storage}) for s in files]


def _installed_files(source: SourceConfig, root: Location, *, chat: bool) -> SourceConfig:
    from ultralong_ray.data.installed import write_installed_corpus, write_installed_sft

    folder = root / f"{'installed-sft' if chat else 'corpus'}-{_installed_fingerprint(source.max_megabytes)}"
    if not (folder / SUCCESS_FILE).exists():
        folder.delete_dir()
        if chat:
            write_installed_sft(folder)
        else:
            write_installed_corpus(folder, source.max_megabytes)
        (folder / SUCCESS_FILE).write_json({"kind": "installed", "max_megabytes": source.max_megabytes})
    return SourceConfig(kind="files", uri=folder.uri, domain=source.domain, weight=source.weight)


def _installed_fingerprint(max_megabytes: float | None) -> str:
    """12 hex digits over the Python version, the installed distributions and the limit."""
    packages = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    content = json.dumps([sys.version, packages, max_megabytes])
    return hashlib.sha256(content.encode()).hexdigest()[:12]
