"""report.json's counts, on a case small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.columns import table_of
from ultralong_ray.data.pack import DocumentPlaces
from ultralong_ray.data.plan_file import plan_text
from ultralong_ray.data.summary import length_edges, prepare_report, sft_report

TABLE = table_of([("a", "code", 100), ("b", "code", 3000), ("c", "web", 1024)], [2, 1])
# sequence, start, end, row, copy, document_start, document_end
PLACES = [(0, 0, 2000, 1, 0, 0, 2000), (1, 0, 1000, 1, 0, 2000, 3000), (1, 1002, 1502, 2, 0, 0, 500)]
PLACES += [(2, 0, 500, 1, 1, 0, 500)]


def places(rows: list[tuple[int, ...]]) -> DocumentPlaces:
    return DocumentPlaces(*np.array(rows, np.int64).T)  # type: ignore[arg-type]


def test_counts_by_hand() -> None:
    report = prepare_report(TABLE, places(PLACES), {"code": 0.75, "web": 0.25}, long_above_tokens=2048)
    assert report["length_edges_tokens"] == [1024, 2048, 4096]
    assert report["histogram_before"] == {"code": [100, 0, 3000, 0], "web": [0, 1024, 0, 0]}
    assert report["histogram_after"] == {"code": [0, 0, 3500, 0], "web": [0, 500, 0, 0]}
    code = report["domains"]["code"]
    assert (code["documents_before"], code["tokens_before"], code["documents_after"]) == (2, 3100, 2)
    assert code["distinct_documents_after"] == 1
    assert code["share_after"] == pytest.approx(3500 / 4000)
    assert code["share_asked"] == 0.75
    assert code["long_share_before"] == pytest.approx(3000 / 3100)
    assert code["long_share_after"] == 1.0
    assert report["domains"]["web"]["long_share_after"] == 0.0
    assert report["buckets"][:2] == [
        {
            "domain": "code",
            "from_tokens": 0,
            "below_tokens": 1024,
            "documents_before": 1,
            "tokens_before": 100,
            "documents_after": 0,
            "repeats": 0.0,
            "tokens_after": 0,
        },
        {
            "domain": "code",
            "from_tokens": 2048,
            "below_tokens": 4096,
            "documents_before": 1,
            "tokens_before": 3000,
            "documents_after": 1,
            "repeats": 2.0,
            "tokens_after": 3500,
        },
    ]


def test_plan_as_text() -> None:
    plan = {
        "num_sequences": 3,
        "sequence_length": 2000,
        "tokens": 6000,
        "packing": "concatenate",
        "separator": {"mode": "<s>", "ids": [5, 6], "pieces": ["<", "s>"]},
        "quarantine": {"bad_rows": 7, "skipped_shards": []},
        "holdout_documents": 1,
        **prepare_report(TABLE, places(PLACES), {"code": 0.75, "web": 0.25}, long_above_tokens=2048),
    }
    lines = [line.split() for line in plan_text(plan).splitlines()]
    assert "3 documents read, 1 held out; 7 bad rows set aside" in plan_text(plan)
    assert ["code", "2", "3,100", "75.17%", "->", "2", "3,500", "87.50%", "75.00%", "96.8%", "/", "100.0%"] in lines
    assert ["code", "2K-4K", "1", "3,000", "->", "1", "2.00", "3,500"] in lines
    assert ["code", "0-1K", "1", "100", "->", "0", "-", "0"] in lines


def test_edges_cover_the_longest() -> None:
    assert length_edges(0) == [1024]
    assert length_edges(5000)[-1] == 8192


def test_sft_counts() -> None:
    report = sft_report(TABLE, places(PLACES[1:3]), too_long=4, supervised_tokens=300)
    assert report["domains"]["code"] == {
        "samples_before": 2,
        "samples": 1,
        "tokens": 1000,
        "share": pytest.approx(2 / 3),
    }
    assert report["dropped_too_long"] == 4
    assert report["supervised_share"] == pytest.approx(0.2)
