"""The text that is already on this machine, written as corpus shards: real documents without a download.

Three domains: code (the standard library and installed packages), prose (`pydoc` topics and package descriptions) and
legal (licence files). Documents come in an order that depends only on what is installed, so that two runs on one
machine write the same shards. The same text gives short instruction samples (code, general) beside arithmetic (math).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from email.message import Message
from itertools import groupby
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.storage import Location
from ultralong_ray.types import Document

MIN_CHARACTERS = 400
MAX_CHARACTERS = 2_000_000
DOCUMENTS_PER_SHARD = 400
# Share of max_megabytes that each domain may take; code is by far the largest on any machine.
DOMAIN_SHARES = {"code": 0.6, "prose": 0.3, "legal": 0.1}
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")


def installed_text_key() -> str:
    """Hex digest of what the shards depend on: interpreter version and installed distributions."""
    names = sorted(f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256("\n".join([sys.version, *names]).encode()).hexdigest()[:12]


def installed_documents(max_megabytes: float | None) -> Iterator[Document]:
    """Every distinct text, domain after domain, at most `max_megabytes` in all."""
    for domain, reader in {"code": _code, "prose": _prose, "legal": _legal}.items():
        limit = None if max_megabytes is None else int(max_megabytes * DOMAIN_SHARES[domain] * 1e6)
        yield from _distinct(reader(), limit)


def write_installed_corpus(target: Location, max_megabytes: float | None) -> None:
    """Write `<domain>-NNNNN.parquet` shards (columns id, domain, text) below `target`."""
    for domain, documents in groupby(installed_documents(max_megabytes), key=lambda d: d.domain):
        for index, batch in enumerate(_batches(documents)):
            table = pa.table(
                {"id": [d.id for d in batch], "domain": [d.domain for d in batch], "text": [d.text for d in batch]}
            )
            with (target / f"{domain}-{index:05d}.parquet").open_for_write() as sink:
                pq.write_table(table, sink, compression="zstd")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == DOCUMENTS_PER_SHARD:
            yield batch
            batch = []
    if batch:
        yield batch


def _distinct(documents: Iterable[Document], limit_bytes: int | None) -> Iterator[Document]:
    """Drop repeated texts (every wheel brings the same few licences) and stop at the byte limit."""
    seen: set[bytes] = set()
    written = 0
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        size = len(document.text.encode())
        if limit_bytes is not None and written + size > limit_bytes:
            continue
        written += size
        yield document


def _read(path: Path) -> str | None:
    """The file's text, or None where it is no text of a useful length."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS and "\0" not in text else None


def _in_hash_order(paths: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """A fixed order that mixes packages, so that a byte limit does not keep only the first letters."""
    return sorted(paths, key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _code_files() -> list[tuple[str, Path]]:
    paths = sysconfig.get_paths()
    stdlib, site = Path(paths["stdlib"]), Path(paths["purelib"])
    standard = [(f"stdlib/{p.relative_to(stdlib)}", p) for p in stdlib.rglob("*.py") if "site-packages" not in p.parts]
    packages = [(f"site/{p.relative_to(site)}", p) for p in site.rglob("*.py")] if site.is_dir() else []
    return _in_hash_order(standard + packages)


def _code() -> Iterator[Document]:
    for name, path in _code_files():
        text = _read(path)
        if text is not None:
            yield Document(name, "code", text)


def _topics() -> dict[str, str]:
    from pydoc_data import topics

    return dict(sorted(topics.topics.items()))


def _prose() -> Iterator[Document]:
    # The topics of `pydoc` are chapters of one book, the language reference: one document of a book's length. Its
    # chapters do not appear singly, or a held-out book would be trained on in pieces.
    yield Document("pydoc/topics", "prose", "\n\n".join(_topics().values()))
    for distribution in _distributions():
        metadata = _metadata(distribution)
        text = str(metadata.get_payload() or metadata.get("Description") or "").strip()
        if MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            yield Document(f"description/{metadata['Name']}", "prose", text)


def _distributions() -> list[importlib.metadata.Distribution]:
    return sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"]))


def _metadata(distribution: importlib.metadata.Distribution) -> Message:
    """METADATA as the e-mail message that it is; the declared type knows less."""
    return cast(Message, distribution.metadata)


def _legal() -> Iterator[Document]:
    own = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    candidates = [("python/LICENSE.txt", own)]
    for distribution in _distributions():
        for file in distribution.files or []:
            if file.name.upper().startswith(LICENCE_NAMES) and file.suffix in ("", ".txt", ".md", ".rst"):
                candidates.append(
                    (f"{distribution.metadata['Name']}/{file}", Path(str(distribution.locate_file(file))))
                )
    for name, path in candidates:
        text = _read(path)
        if text is not None:
            yield Document(f"licence/{name}", "legal", text)


def write_installed_sft(target: Location, samples_per_domain: int = 400, seed: int = 7) -> None:
    """Write `sft.parquet` (columns id, domain, messages): short general, math and code samples."""
    rows = [
        *_take(_general_samples(), samples_per_domain),
        *_take(_math_samples(seed), samples_per_domain),
        *_take(_code_samples(), samples_per_domain),
    ]
    table = pa.table(
        {
            "id": [f"{domain}/{index}" for index, (domain, _, _) in enumerate(rows)],
            "domain": [domain for domain, _, _ in rows],
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for _, question, answer in rows
            ],
        }
    )
    with (target / "sft.parquet").open_for_write() as sink:
        pq.write_table(table, sink, compression="zstd")


def _take(samples: Iterator[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    return [sample for _, sample in zip(range(count), samples, strict=False)]


def _general_samples() -> Iterator[tuple[str, str, str]]:
    for distribution in _distributions():
        name, summary = _metadata(distribution)["Name"], _metadata(distribution).get("Summary")
        if summary and summary.strip() and summary != "UNKNOWN":
            yield "general", f"What is the Python package {name}?", summary.strip()
    for name, text in _topics().items():
        paragraphs = [p.strip() for p in text.split("\n\n") if len(p.strip()) > 120]
        for number, paragraph in enumerate(paragraphs[:4]):
            question = f"What does the Python reference say on '{name}'? Quote paragraph {number + 1}."
            yield "general", question, " ".join(paragraph.split())


def _math_samples(seed: int) -> Iterator[tuple[str, str, str]]:
    rng = random.Random(seed)
    while True:
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        kind = rng.choice(("plus", "minus", "compare"))
        if kind == "plus":
            yield "math", f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
        elif kind == "minus":
            yield "math", f"What is {a + b} - {b}?", f"{a + b} - {b} = {a}."
        elif a != b:
            yield "math", f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."


def _code_samples() -> Iterator[tuple[str, str, str]]:
    for name, path in _code_files():
        text = _read(path) if name.startswith("stdlib/") else None
        if text is None:
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node)
                source = ast.get_source_segment(text, node)
                if docstring and source and len(docstring) < 400 and len(source) < 1500:
                    yield "code", f"Write a Python function `{node.name}`: {docstring}", source
