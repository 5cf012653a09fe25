"""What an address may be: a mistyped one is refused and never becomes a folder below the job's own directory."""

from pathlib import Path

import pytest

from ultralong_ray.storage import Location
from ultralong_ray.types import UserError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3:/bkt/x", r"'s3:/bkt/x' has one slash .*write s3://bkt/x"),
        ("file:/tmp/x", r"'file:/tmp/x' has one slash .*write file:///tmp/x"),
        ("file://host/x", r"file://host/x.*this machine.*file:///"),
        ("s3://", r"'s3://' names no bucket; write s3://BUCKET/FOLDER"),
        ("s3:///x", r"'s3:///x' names no bucket; write s3://x"),
        ("s3://bkt//x", r"'s3://bkt//x' has an empty folder name; write s3://bkt/x"),
        ("zip://a.txt::s3://b/x.zip", r"one address within another.*unpack"),
    ],
)
def test_a_mistyped_address_is_refused(text: str, words: str):
    with pytest.raises(UserError, match=words):
        Location.of(text)


def test_what_is_an_address_is_taken():
    assert Location.of("file://localhost/tmp/x").uri == "/tmp/x"
    assert Location.of("FILE:///tmp/x").uri == "/tmp/x"
    assert Location.of("S3://Bucket/A").uri == "s3://Bucket/A"
    assert Location.of("s3://bucket/").uri == "s3://bucket"
    assert Location.of("./s3:/x").uri == f"{Path.cwd()}/s3:/x"
    assert Location.of("run:1/a//b").uri == f"{Path.cwd()}/run:1/a/b"


@pytest.mark.parametrize(
    "address", ["http://host/x", "https://host/x", "github://org:repo@main/x", "zip://a/x", "ftp://host/x"]
)
def test_a_scheme_whose_address_is_more_than_a_path_is_refused(address: str):
    scheme = address.split(":")[0]
    with pytest.raises(UserError, match=rf"scheme '{scheme}' .*copy the files to a disk or to a bucket"):
        Location.of(address).exists()


def test_a_bucket_with_an_account_is_refused():
    with pytest.raises(UserError, match=r"gs://anonymous@bucket.*scheme 'gs' "):
        Location.of("gs://anonymous@bucket/x").exists()


def test_a_scheme_whose_address_is_a_path_works():
    place = Location.of("memory://addresses/x")
    place.write_bytes(b"1")
    assert [file.read_bytes() for file in place.parent.files()] == [b"1"]
