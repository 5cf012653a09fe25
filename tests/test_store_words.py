"""What a store refuses is said in words that name the remedy, and only what may pass is tried again."""

import re
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from ultralong_ray import object_store, storage
from ultralong_ray.object_store import is_transient, retried
from ultralong_ray.plan import describe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.storage import Location, copy_file, copy_files, explain_full_disk, refusals_in_words
from ultralong_ray.types import StorageOptions, UserError

# As pyarrow 26.0 words what a store answers.
UNPARSED = (
    "AWS Error UNKNOWN (HTTP status {}) during CreateMultipartUpload operation: Unable to parse ExceptionName: {}"
)
DROPPED = "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 56"
FULL = (UNPARSED.format(507, "XMinioStorageFull"), UNPARSED.format(403, "QuotaExceeded"))
SAID = {
    "AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body.": (
        "another region.*storage.region"
    ),
    UNPARSED.format(301, "PermanentRedirect"): "another region",
    UNPARSED.format(400, "AuthorizationHeaderMalformed"): "another region",
    "AWS Error REQUEST_TIME_TOO_SKEWED during PutObject operation: too large": "set this machine's clock",
    UNPARSED.format(400, "KMS.DisabledException"): "the key that encrypts",
    "AWS Error NO_SUCH_UPLOAD during UploadPart operation: The upload does not exist": "upload was ended",
    "AWS Error NO_SUCH_KEY during ListObjectsV2 operation: gone": r"the store refused a request.*NO_SUCH_KEY.*gone",
    FULL[0]: "cannot be written: no room is left there",
    FULL[1]: "cannot be written: no room is left there",
    DROPPED: r"does not answer \(a request is tried at most storage.max_attempts times\)",
}


@pytest.mark.parametrize("error", SAID)
def test_a_refusal_is_put_in_words(error: str):
    with pytest.raises(UserError, match=SAID[error]), refusals_in_words():
        raise OSError(error)
    assert is_transient(OSError(error)) == (error == DROPPED)


def test_what_is_not_the_stores_stays_as_it_is():
    with pytest.raises(FileNotFoundError), refusals_in_words():
        raise FileNotFoundError("Path does not exist 'bucket/x'")


@pytest.mark.parametrize("error", FULL)
def test_a_full_store_is_told_from_a_network_at_fault(error: str):
    tried: list[str] = []

    def write() -> None:
        tried.append(error)
        with explain_full_disk("s3://bucket/run"):
            raise OSError(error)

    with pytest.raises(UserError, match=r"s3://bucket/run cannot be written: no room is left there.*workdir"):
        retried(write, 3)
    assert len(tried) == 1


def test_a_copy_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a").write_text("1")
    copy, calls = pafs.copy_files, list[str]()

    def fails_first(source: str, *more: object, **named: object) -> None:
        calls.append(source)
        if len(calls) % 2:
            raise OSError(DROPPED)
        copy(source, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(pafs, "copy_files", fails_first)
    monkeypatch.setattr(object_store, "LONGEST_WAIT_SECONDS", 0.01)
    copy_files(Location.of(tmp_path / "from"), Location.of(tmp_path / "to"))
    copy_file(tmp_path / "from" / "a", Location.of(tmp_path / "one" / "a"))
    assert (tmp_path / "to" / "a").read_text() == (tmp_path / "one" / "a").read_text() == "1"
    assert len(calls) == 4


@pytest.mark.parametrize("error", SAID)
def test_a_dry_run_is_not_spoiled_by_its_store_nor_waits_for_it(error: str, monkeypatch: pytest.MonkeyPatch):
    asked = list[str]()

    def refuses(root: str, _: StorageOptions) -> pafs.FileSystem:
        if not root:
            return pafs.LocalFileSystem()
        asked.append(root)
        raise OSError(error)

    monkeypatch.setattr(object_store, "LONGEST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(storage, "_filesystem_of", refuses)
    quickstart = Path(__file__).parents[1] / "jobs" / "recipes" / "quickstart.toml"
    plan = describe(load_recipe(str(quickstart), ["--workdir", "s3://bucket/run"]))
    assert re.search(rf"what is done already is not known from here: .*{SAID[error]}", plan)
    assert re.search(r"  prepare +\? +s3://bucket/run/prepare-", plan)
    assert len(asked) == 1
