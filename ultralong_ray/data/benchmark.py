"""How fast and how large the prepare stage is, beside the bare tokenizer: a corpus folder in, one JSON out.

    run(["--corpus", FOLDER, "--tokenizer", FOLDER, "--gigabytes", "0.25", "2", "--output", FILE.json])

For each size the shards of the corpus are copied with changed ids until they hold that much text, and then

    bare        `Tokenizer.encode_batch` on the same texts (the first --bare-gigabytes of them), one process per core,
                reading and start not counted
    prepare     the whole stage in a driver of its own: tokenise, sample, pack, write. Seconds by phase, and the memory
                of the driver and of all workers together, sampled
    datatrove   with --datatrove-python: its tokenisation and shuffling merge in an interpreter that has it, start not
                counted; for sizes up to --datatrove-gigabytes

run one after the other on the same cores. Where other work shares the machine, compare tokens per CPU second only.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.config import Recipe
from ultralong_ray.types import UserError

SAMPLE_SECONDS = 0.5
BATCH_CHARACTERS = 2**20
SHARD_BYTES = 2**26  # of text
SEQUENCE_LENGTH = 131_072
PACKED_SHARE = 0.9  # of the corpus's tokens
PACKAGES = ("tokenizers", "transformers", "pyarrow", "ray", "numpy")

_DATATROVE = """
import json, sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer, DocumentTokenizerMerger
corpus, tokenizer, folder, workers, tasks = sys.argv[1:4] + [int(n) for n in sys.argv[4:6]]
if __name__ == "__main__":
    began = time.perf_counter()
    LocalPipelineExecutor([
        ParquetReader(corpus, text_key="text", id_key="id"),
        DocumentTokenizer(folder + "/tokens", tokenizer_name_or_path=tokenizer, eos_token=None, shuffle_documents=True,
                          local_working_dir=folder + "/scratch"),
    ], tasks=tasks, workers=workers, logging_dir=folder + "/logs", start_method="spawn").run()
    tokenised = time.perf_counter()
    LocalPipelineExecutor([
        DocumentTokenizerMerger(folder + "/tokens", folder + "/merged", save_filename="merged", shuffle=True),
    ], tasks=1, logging_dir=folder + "/logs2").run()
    merged = time.perf_counter()
    print("RESULT " + json.dumps({"tokenise_seconds": tokenised - began, "merge_seconds": merged - tokenised}))
"""


def run(argv: Sequence[str]) -> None:
    """Entry of `benchmark.py data`: measure, write the JSON, print it."""
    parser = argparse.ArgumentParser(prog="benchmark.py data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", required=True, help="folder of Parquet shards with id, domain, text")
    parser.add_argument("--tokenizer", required=True, help="folder that holds tokenizer.json")
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 2.0], help="sizes of text to run at")
    parser.add_argument("--bare-gigabytes", type=float, default=float("inf"), help="text for the bare tokenizer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", help="folder for corpora and outputs; default: a temporary one")
    parser.add_argument("--datatrove-python", help="interpreter of an environment that has datatrove")
    parser.add_argument("--datatrove-gigabytes", type=float, default=float("inf"), help="largest size to run it at")
    parser.add_argument("--output", help="where to write the JSON")
    options = parser.parse_args(argv)
    sizes: list[dict[str, Any]] = []
    text = ""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for size in options.gigabytes:
            sizes.append(_measure(options, Path(scratch) / str(size), size))
            text = json.dumps(_account(options, argv, sizes), indent=2)
            if options.output:  # after every size: the last may take hours
                Path(options.output).write_text(text + "\n")
            print(text, flush=True)


def _account(options: argparse.Namespace, argv: Sequence[str], sizes: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON: where and how it ran, the sizes, and the growth from the first to the last of them."""
    result = {
        # folders by their names: where they lay on this machine is of no use elsewhere
        "command": ["jobs/benchmark.py", "data", *(Path(a).name if os.sep in a else a for a in argv)],
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "workers": options.workers,
        "sizes": sizes,
    }
    if len(sizes) > 1:
        first, last = sizes[0]["prepare"], sizes[-1]["prepare"]
        result["memory_growth"] = last["peak_workers_bytes"] / first["peak_workers_bytes"] - 1
        result["time_per_token_growth"] = last["seconds_per_token"] / first["seconds_per_token"] - 1
    return result


def _measure(options: argparse.Namespace, folder: Path, gigabytes: float) -> dict[str, Any]:
    corpus = folder / "corpus"
    text_bytes, shards = replicate(Path(options.corpus), corpus, int(gigabytes * 1e9))
    bare = _bare(options, corpus, min(text_bytes, options.bare_gigabytes * 1e9))
    result = {"gigabytes": text_bytes / 1e9, "shards": shards, "bare": bare}
    result["prepare"] = _prepare(options, corpus, folder, int(bare["tokens"] / bare["bytes"] * text_bytes))
    for rate in ("tokens_per_second", "tokens_per_cpu_second"):
        result[f"prepare_of_bare_{rate}"] = result["prepare"][rate] / bare[rate]
    if options.datatrove_python and gigabytes <= options.datatrove_gigabytes:
        arguments = [str(corpus), f"{options.tokenizer}/tokenizer.json", str(folder / "datatrove")]
        trove = _child([options.datatrove_python, "-c", _DATATROVE, *arguments, str(options.workers), str(shards)])
        seconds = trove["tokenise_seconds"] + trove["merge_seconds"]
        result["datatrove"] = {**trove, "tokens_per_second": result["prepare"]["tokens"] / seconds}
    shutil.rmtree(folder)
    return result


def replicate(source: Path, target: Path, text_bytes: int) -> tuple[int, int]:
    """Copy documents under new ids into shards below `target` until they hold `text_bytes`; (bytes, shards).

    Raises UserError for a source without text.
    """
    target.mkdir(parents=True)
    written = shards = copy = 0
    rows: list[dict[str, str]] = []
    size = 0

    def flush() -> None:
        nonlocal rows, size, shards
        # small row groups, so that parts and workers come out even
        pq.write_table(pa.Table.from_pylist(rows), target / f"{shards:05d}.parquet", row_group_size=64)
        rows, size, shards = [], 0, shards + 1

    while written < text_bytes:
        for row in _documents(source):
            length = len(row["text"].encode())
            rows.append({**row, "id": f"{copy}/{row['id']}"})
            size, written = size + length, written + length
            if size >= SHARD_BYTES:
                flush()
            if written >= text_bytes:
                break
        if not written:
            raise UserError(f"--corpus {source}: no Parquet file there with text; name a folder of shards")
        copy += 1
    if rows:
        flush()
    return written, shards


def _documents(source: Path) -> Iterator[dict[str, str]]:
    for path in sorted(source.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(64, columns=["id", "domain", "text"]):
            yield from batch.to_pylist()


def _bare(options: argparse.Namespace, corpus: Path, text_bytes: float) -> dict[str, Any]:
    """All cores at `encode_batch`: each process has read its texts before the clock starts."""
    paths = sorted(str(path) for path in corpus.glob("*.parquet"))
    command = [sys.executable, "-m", "ultralong_ray.data.benchmark", "bare", options.tokenizer]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    rest = [str(options.workers), str(text_bytes), *paths]
    children = [
        subprocess.Popen([*command, str(i), *rest], stdout=subprocess.PIPE, env=environment)
        for i in range(options.workers)
    ]
    results = [_result_of(child.communicate()[0], child.returncode) for child in children]
    tokens = sum(r["tokens"] for r in results)
    rate = sum(r["tokens"] / r["seconds"] for r in results)
    return {
        "tokens": tokens,
        "bytes": sum(r["bytes"] for r in results),
        "tokens_per_second": rate,
        "tokens_per_cpu_second": tokens / sum(r["cpu_seconds"] for r in results),
        "seconds_by_process": [r["seconds"] for r in results],
    }


def _bare_child(tokenizer: str, index: int, count: int, text_bytes: float, paths: Sequence[str]) -> dict[str, Any]:
    """Every `count`-th batch of the first `text_bytes` of the corpus, one call of `encode_batch` each."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    encoder.encode_special_tokens = True
    tokens, size, seconds, cpu_seconds = 0, 0, 0.0, 0.0
    for number, batch in enumerate(_batches(paths, text_bytes)):
        if number % count != index:
            continue
        began, cpu_began = time.perf_counter(), time.process_time()
        encoded = encoder.encode_batch(batch, add_special_tokens=False)
        cpu_seconds += time.process_time() - cpu_began
        seconds += time.perf_counter() - began
        tokens += sum(len(e) for e in encoded)
        size += sum(len(text.encode()) for text in batch)
    return {"tokens": tokens, "bytes": size, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _batches(paths: Sequence[str], text_bytes: float) -> Iterator[list[str]]:
    """The texts of shards in calls of about `BATCH_CHARACTERS`, up to the batch that reaches `text_bytes`."""
    batch: list[str] = []
    characters = size = 0
    rows = (b for path in paths for b in pq.ParquetFile(path).iter_batches(64, columns=["text"]))
    for text in (text for batch_of_rows in rows for text in batch_of_rows.column("text").to_pylist()):
        batch.append(text)
        characters, size = characters + len(text), size + len(text.encode())
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        if size >= text_bytes:
            break
    if batch:
        yield batch


def _prepare(options: argparse.Namespace, corpus: Path, folder: Path, about_tokens: int) -> dict[str, Any]:
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(_recipe(options, corpus, folder, about_tokens)))
    command = [sys.executable, "-m", "ultralong_ray.data.benchmark", "prepare", str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "RAY_DEDUP_LOGS": "0"})
    peaks, cpu_ticks = {"workers": 0, "driver": 0}, {}
    watcher = threading.Thread(target=_watch, args=(process, peaks, cpu_ticks), daemon=True)
    watcher.start()
    result = _result_of(process.communicate()[0], process.returncode)
    watcher.join()
    tokens = result["tokens"]
    return {
        **result,
        "tokens_per_second": tokens / result["seconds"],
        "tokens_per_cpu_second": tokens * os.sysconf("SC_CLK_TCK") / sum(cpu_ticks.values()),
        "seconds_per_token": result["seconds"] / tokens,
        "peak_workers_bytes": peaks["workers"],
        "peak_driver_bytes": peaks["driver"],
    }


def _recipe(options: argparse.Namespace, corpus: Path, folder: Path, tokens: int) -> dict[str, Any]:
    window = {"original_context_length": 8192, "base_context_length": SEQUENCE_LENGTH}
    return {
        "name": "benchmark",
        "workdir": str(folder / "work"),
        "model": {"base": options.tokenizer, **window, "target_context_length": SEQUENCE_LENGTH},
        "corpus": {"sources": [{"uri": str(corpus)}]},
        "prepare": {
            "sequence_length": SEQUENCE_LENGTH,
            "token_budget": max(SEQUENCE_LENGTH, int(tokens * PACKED_SHARE)),
            "short_keep": 1.0,
            "num_workers": options.workers,
        },
        "pretrain": {"global_batch_sequences": 1, "learning_rate": 1e-5},
    }


def _prepare_child(path: str) -> dict[str, Any]:
    """The stage, on the Ray that Ray Data starts by itself; its own account of the phases is taken from its log."""
    from ultralong_ray.data import fan_out, pipeline
    from ultralong_ray.stages import stage_directory

    phases: dict[str, Any] = {}

    class Account(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if verb := getattr(record, "verb", None):
                phases[verb] = {"wall_seconds": record.wall_seconds, "task_seconds": record.task_seconds}  # type: ignore[attr-defined]

    fan_out.log.setLevel(logging.INFO)
    fan_out.log.addHandler(Account())
    recipe = Recipe.model_validate_json(Path(path).read_text())
    fan_out.start_ray()
    began = time.perf_counter()
    stage = stage_directory(recipe, "prepare")
    pipeline.prepare(recipe, stage)
    seconds = time.perf_counter() - began
    tokens = sum(domain["tokens_before"] for domain in (stage.location / "report.json").read_json()["domains"].values())
    driver = seconds - sum(phase["wall_seconds"] for phase in phases.values())
    return {"tokens": tokens, "seconds": seconds, "phases": phases, "driver_seconds": driver}


def _watch(process: subprocess.Popen[bytes], peaks: dict[str, int], cpu_ticks: dict[int, int]) -> None:
    """Peak of private memory, of the Ray worker processes together and of the driver; CPU time of every process."""
    while process.poll() is None:
        found = list(_processes_below(process.pid))
        workers = [pid for pid, name in found if name.startswith("ray::")]
        for pid in (process.pid, *(pid for pid, _ in found)):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                cpu_ticks[pid] = int(fields[11]) + int(fields[12])
        peaks["workers"] = max(peaks["workers"], sum(map(_private_bytes, workers)))
        peaks["driver"] = max(peaks["driver"], _private_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)


def _processes_below(root: int) -> Iterator[tuple[int, str]]:
    """(process id, command) of all descendants, from /proc."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                command = (entry / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:
                continue
            parents[int(entry.name)] = (int(fields[1]), command)
    for pid, (parent, command) in parents.items():
        while parent not in (0, 1, root):
            parent = parents.get(parent, (0, ""))[0]
        if parent == root:
            yield pid, command


def _private_bytes(pid: int) -> int:
    """Resident memory that is no file's and not shared: RssAnon of proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _child(command: Sequence[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    return _result_of(done.stdout, done.returncode)


def _result_of(output: bytes, status: int) -> dict[str, Any]:
    found = [line for line in output.decode().splitlines() if line.startswith("RESULT ")]
    if status or not found:
        raise RuntimeError(f"a measurement ended with status {status}: {output.decode()[-2000:]}")
    return json.loads(found[-1].removeprefix("RESULT "))


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    if sys.argv[1] == "bare":
        measured = _bare_child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), sys.argv[6:])
    else:
        measured = _prepare_child(sys.argv[2])
    print("RESULT " + json.dumps(measured), flush=True)
