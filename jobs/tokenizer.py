"""Train the tokenizer of a base model made from nothing: on the text that is on this machine, and on Parquet files."""

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq

from ultralong_ray.data.bpe import train_tokenizer
from ultralong_ray.data.installed import installed_documents
from ultralong_ray.data.task_text import NOISE
from ultralong_ray.data.tasks import INTRODUCTION
from ultralong_ray.types import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the tokenizer is saved")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--context-length", type=int, default=512, help="tokens, written as model_max_length")
    parser.add_argument("--max-megabytes", type=float, default=12, help="of the text on this machine")
    parser.add_argument("--parquet", type=Path, nargs="*", default=[], help="files with a column text, read as well")
    parser.add_argument("--characters", type=int, default=20_000, help="of each of their documents")
    arguments = parser.parse_args()
    try:
        texts = [document.text for document in installed_documents(arguments.max_megabytes)]
        texts += [text for path in arguments.parquet for text in _documents(path, arguments.characters)]
        # The wording of the retrieval tasks is met often in training, so it deserves tokens.
        texts += [INTRODUCTION, NOISE, "What is the pass key? The pass key is. Remember it.", "user", "assistant"] * 200
        train_tokenizer(texts, arguments.vocab_size, arguments.context_length, arguments.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"tokenizer: {arguments.folder}")
    return 0


def _documents(path: Path, characters: int) -> list[str]:
    try:
        texts = pq.read_table(path, columns=["text"])["text"].to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"--parquet {path} is no Parquet file with a column text: {error}") from None
    return [text[:characters] for text in texts if text]


if __name__ == "__main__":
    sys.exit(main())
