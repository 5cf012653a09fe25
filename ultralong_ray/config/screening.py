"""[decontaminate] and [sft.deduplicate]: what is taken out of the training data before it is packed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ultralong_ray.config.base import NonNegative, Positive, Section, Share


class BenchmarkConfig(Section):
    """One evaluation set, given as files: its questions, and whatever else of it must not be trained on."""

    name: str
    """Name in reports."""
    uri: str
    """A file, or a folder of files: .jsonl, .parquet (both may hold one row per item) or .txt (one item per line);
    .gz and .zst too."""
    columns: tuple[str, ...] = ()
    """Columns to look for, each an item of its own (a list of strings is joined). Default: the first of question,
    prompt, problem, text, query, input that the file has."""
    id_column: str | None = None
    """Column that names an item in reports. Default: file and row number."""


class DecontaminateConfig(Section):
    """Overlap of documents and SFT samples with evaluation sets, after AceMath (arXiv 2412.15084, section 3.2.3)."""

    benchmarks: Annotated[tuple[BenchmarkConfig, ...], Field(min_length=1)]
    ngram_words: Annotated[int, Field(ge=2)] = 13
    """Normalised words in a row that a text and an item share."""
    min_item_words: Annotated[int, Field(ge=2)] = 8
    """An item shorter than ngram_words counts as found when all of it is; shorter than this, it is not looked for."""
    mathematics_domains: tuple[str, ...] = ("math", "mathematics")
    """Training domains in which an overlap counts only with a long common subsequence, since problems share phrases."""
    mathematics_lcs_share: Share = 0.6
    """Longest common subsequence of words with the item, as a share of the item's words, that must be exceeded."""
    documents: Literal["cut", "drop"] = "cut"
    """cut: the span and a margin are taken out of a document, the rest is kept. SFT samples are always dropped."""
    cut_margin_characters: NonNegative = 200
    """Taken out on either side of a span (Brown et al., arXiv 2005.14165, appendix C)."""
    max_cut_share: Share = 0.25
    """A document that would lose more of its characters than this is dropped."""

    @model_validator(mode="after")
    def _names_and_lengths(self) -> DecontaminateConfig:
        names = [benchmark.name for benchmark in self.benchmarks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(
                f"decontaminate.benchmarks: the name {', '.join(map(repr, repeated))} is given more than once; reports "
                f"count by name"
            )
        if self.min_item_words > self.ngram_words:
            raise ValueError(
                f"decontaminate.min_item_words {self.min_item_words} is above decontaminate.ngram_words "
                f"{self.ngram_words}; items from ngram_words on are matched by n-gram"
            )
        return self


class DeduplicateConfig(Section):
    """SFT samples whose prompt (all turns of the user) another sample has. The one with the smallest id survives."""

    near_threshold: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.8
    """Jaccard similarity of the prompts' word n-grams, estimated by MinHash, from which one of the two is dropped.
    None: only exact duplicates, after lower-casing and collapsing white space."""
    ngram_words: Positive = 5
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Hash functions: the standard error of a similarity s is sqrt(s (1 - s) / permutations)."""
