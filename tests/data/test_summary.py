"""report.json's counts, on a case small enough to count by hand."""

from __future__ import annotations

import pytest

from ultralong_ray.data.summary import length_edges, prepare_report, sft_report
from ultralong_ray.types import DocumentLength, Placement

DOCUMENTS = [DocumentLength("a", "code", 100), DocumentLength("b", "code", 3000), DocumentLength("c", "web", 1024)]
PLACEMENTS = [
    Placement(0, 0, 2000, "b", "code", 0, 0, 2000),
    Placement(1, 0, 1000, "b", "code", 0, 2000, 3000),
    Placement(1, 1002, 1502, "c", "web", 0, 0, 500),
    Placement(2, 0, 500, "b", "code", 1, 0, 500),
]


def test_counts_by_hand() -> None:
    report = prepare_report(DOCUMENTS, PLACEMENTS, {"code": 0.75, "web": 0.25}, long_above_tokens=2048)
    assert report["length_edges_tokens"] == [1024, 2048, 4096]
    assert report["histogram_before"] == {"code": [100, 0, 3000, 0], "web": [0, 1024, 0, 0]}
    assert report["histogram_after"] == {"code": [0, 0, 3500, 0], "web": [0, 500, 0, 0]}
    code = report["domains"]["code"]
    assert (code["documents_before"], code["tokens_before"], code["documents_after"]) == (2, 3100, 2)
    assert code["share_after"] == pytest.approx(3500 / 4000)
    assert code["share_asked"] == 0.75
    assert code["long_share_before"] == pytest.approx(3000 / 3100)
    assert code["long_share_after"] == 1.0
    assert report["domains"]["web"]["long_share_after"] == 0.0


def test_edges_cover_the_longest() -> None:
    assert length_edges(0) == [1024]
    assert length_edges(5000)[-1] == 8192


def test_sft_counts() -> None:
    report = sft_report(DOCUMENTS, PLACEMENTS[1:3], too_long=4, supervised_tokens=300)
    assert report["domains"]["code"] == {
        "samples_before": 2,
        "samples": 1,
        "tokens": 1000,
        "share": pytest.approx(2 / 3),
    }
    assert report["dropped_too_long"] == 4
    assert report["supervised_share"] == pytest.approx(0.2)
