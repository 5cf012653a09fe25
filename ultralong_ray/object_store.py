"""S3-compatible stores: a pyarrow filesystem from options and environment, and plain words for what such a store says.

Every request is tried `max_attempts` times with growing waits (the AWS SDK's standard strategy), so a store that
answers 503, drops connections or is away for half a minute costs time and nothing else. What the SDK gives up too soon
(a 503 to a HEAD request has no body to say that it may be tried again) is tried again by `retried`. Read against
pyarrow 26.0: its errors carry the code of the AWS SDK ("AWS Error ACCESS_DENIED during GetObject operation: ...").
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs as pafs

from ultralong_ray.types import StorageOptions, UserError

PATIENCE_SECONDS = 90.0
LONGEST_WAIT_SECONDS = 10.0

Value = TypeVar("Value")


class StoreUnavailable(UserError):
    """The store does not answer, or asks to come back later."""


_FULL = "no room is left there; free some, or name another workdir, and submit again: what is finished is kept"

# What the store or the SDK says -> what it means and what mends it. The first that matches counts.
_MEANINGS = (
    (
        r"ExpiredToken|TokenRefreshRequired|token.{0,40}expired|expired.{0,40}token",
        "the credentials have expired; renew them (AWS_SESSION_TOKEN, the profile or the role) and submit again",
    ),
    (r"HTTP (?:status|response code:?) 507|StorageFull|QuotaExceeded", _FULL),
    (
        r"HTTP (?:status|response code:?) 301|PermanentRedirect|AuthorizationHeaderMalformed",
        "the bucket lies in another region or at another endpoint; set storage.region (or AWS_REGION) to the bucket's",
    ),
    (
        r"REQUEST_TIME_TOO_SKEWED|RequestTimeTooSkewed",
        "this machine's clock differs too much from the store's; set this machine's clock and submit again",
    ),
    (
        r"KMS\.\w+Exception",
        "the key that encrypts the bucket cannot be used; enable it, or grant these credentials its use",
    ),
    (
        r"NO_SUCH_UPLOAD|NoSuchUpload",
        "the upload was ended from elsewhere, by a rule of the bucket or a second writer; submit again",
    ),
    (
        # an answer to HEAD has no body to say more, and of a refused GET the SDK does not always read it
        r"HTTP (?:status|response code:?) 400\)? during Head|UNKNOWN \(HTTP status 400\) during Get",
        "the request is refused without a reason: most often the credentials have expired or belong to another "
        "endpoint or region",
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|InvalidToken|"
        r"INVALID_CLIENT_TOKEN_ID|UnrecognizedClient",
        "the credentials are not known there; check the access key, the secret key and the endpoint they belong to",
    ),
    (
        r"ACCESS_DENIED|AccessDenied|Forbidden|HTTP (?:status|response code:?) 40[13]|Unauthorized",
        "access is denied; these credentials lack the right to list, read or write there (for a public bucket set "
        "storage.anonymous = true)",
    ),
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket '[^']*' not found|Bucket '[^']*' not found",
        "there is no such bucket; check its name, storage.endpoint and storage.region",
    ),
    (
        r"MissingContentLength|HTTP (?:status|response code:?) 411",
        "the server refuses trailing checksums; set storage.plain_checksums = true (or "
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required)",
    ),
    (
        r"curlCode|NETWORK_CONNECTION|SERVICE_UNAVAILABLE|SLOW_DOWN|SlowDown|INTERNAL_FAILURE|InternalError|"
        r"REQUEST_TIMEOUT|THROTTLING|HTTP (?:status|response code:?) 50\d|Connection refused|Connection reset",
        "the store does not answer (a request is tried at most storage.max_attempts times); check the network and the "
        "endpoint, and submit again: what is finished is kept",
    ),
)


_TRANSIENT = _MEANINGS[-1][1]


def s3_filesystem(root: str, options: StorageOptions) -> pafs.FileSystem:
    """Filesystem of `s3://bucket`. Options win over the environment; without either AWS is asked for the region.

    Raises OSError when the region of a bucket cannot be found out.
    """
    if options.plain_checksums:  # the SDK takes this from the environment only
        os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] = "when_required"
        os.environ["AWS_RESPONSE_CHECKSUM_VALIDATION"] = "when_required"
    endpoint = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None:
        region = "us-east-1" if endpoint else pafs.resolve_s3_region(root.removeprefix("s3://"))
    if endpoint is None and options.path_style:  # pyarrow puts the bucket into the path of a named endpoint only
        endpoint = f"https://s3.{region}.amazonaws.com"
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        anonymous=options.anonymous,
        force_virtual_addressing=options.path_style is False,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=options.max_attempts),
    )


def meaning_of(error: Exception) -> str | None:
    """What a store's refusal means and what mends it; None for an error that is not the store's."""
    text = str(error)
    if isinstance(error, PermissionError):
        return "access is denied; these credentials or this user lack the right"
    if "AWS" not in text and "S3" not in text:
        return None
    return next((meaning for pattern, meaning in _MEANINGS if re.search(pattern, text)), None)


def is_transient(error: Exception) -> bool:
    """Does the error say that the store does not answer for now?"""
    return isinstance(error, StoreUnavailable) or meaning_of(error) == _TRANSIENT


def is_refusal(error: Exception) -> bool:
    """Is the error a store's or a disk's own, whether or not its meaning is known?"""
    return meaning_of(error) is not None or "AWS Error" in str(error)


def is_full(error: Exception) -> bool:
    """Does the error say that the store has no room left, or its owner no quota?"""
    return meaning_of(error) == _FULL


def retried(operation: Callable[[], Value], attempts: int) -> Value:
    """The operation's value; it is tried again, after growing waits, while the store does not answer."""
    began = time.monotonic()
    for attempt in range(attempts):
        try:
            return operation()
        except (OSError, StoreUnavailable) as error:
            late = attempt + 1 >= attempts or time.monotonic() - began > PATIENCE_SECONDS
            if late or not is_transient(error):
                raise
            time.sleep(min(0.5 * 2**attempt, LONGEST_WAIT_SECONDS) * random.uniform(0.5, 1.0))
    raise AssertionError("attempts is at least 1")


def explained(error: Exception, where: str) -> UserError:
    """The UserError for a store that cannot be used at `where`: StoreUnavailable where it may pass."""
    meaning = meaning_of(error)
    if meaning is None and is_refusal(error):
        return UserError(f"{where}: the store refused a request; what is finished is kept ({error})")
    meaning = meaning or (
        "check the bucket's name, the network, storage.endpoint or AWS_ENDPOINT_URL (for a server other than AWS), "
        "storage.region or AWS_REGION, and the credentials of the usual AWS chain"
    )
    kind = StoreUnavailable if meaning == _TRANSIENT else UserError
    return kind(f"{where} cannot be {'written' if meaning == _FULL else 'reached'}: {meaning} ({error})")
