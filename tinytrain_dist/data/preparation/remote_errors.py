"""Explain why a file cannot be read by URL, without the secrets that a URL or an error may contain.

Must not know how files are read.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator

from tinytrain_dist.errors import DataError

_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
# By name, because the libraries need not be installed: those of botocore, aiohttp, gcsfs and huggingface_hub.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"DefaultCredentialsError", "TokenRetrievalError", "NoAuthTokenError", "UnauthorizedSSOTokenError"}
_NO_CREDENTIALS |= {"SSOTokenLoadError"}
_NO_CONNECTION = {"EndpointConnectionError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectTimeoutError"}
_NO_CONNECTION |= {"ConnectionRefusedError", "gaierror", "ProxyConnectionError", "ConnectError"}
_PASSING = {"ClientPayloadError", "ServerDisconnectedError", "IncompleteReadError", "HTTPClientError", "FSTimeoutError"}
_PASSING |= {
    "ResponseStreamingError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ClientOSError",
    "ContentLengthError",
}
_CREDENTIALS_OF = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket set "
    "FSSPEC_S3='{\"anon\": true}'",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket set "
    'FSSPEC_GS=\'{"token": "anon"}\'',
    "hf": "set HF_TOKEN",
}


def shown(url: str) -> str:
    """Return a URL as it may be shown and stored: without a user, a password, and what follows the path."""
    if "://" not in url:
        return url
    parts = urllib.parse.urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def may_pass(error: BaseException) -> bool:
    """Return whether an error may be gone when the same is tried again."""
    errors = list(_chain(error))
    names = {type(found).__name__ for found in errors}
    if names & _NO_CREDENTIALS:
        return False
    if names & _NO_CONNECTION:  # which fsspec reports as a missing file for a URL of the web
        return True
    if any(isinstance(found, _LASTING) for found in errors):
        return False
    status = _status(errors)
    if status is not None:
        return status in _PASSING_STATUS
    return any(isinstance(found, OSError | EOFError) for found in errors) or bool(names & (_PASSING | _NO_CONNECTION))


def error_of(url: str, error: BaseException, tries: int = 1, action: str = "read") -> DataError:
    """Return the error to report: what is wrong with a URL, and what to do.

    tries: how often it was tried. action: read, or what else was tried, as a participle.
    """
    errors = list(_chain(error))
    names = {type(found).__name__ for found in errors}
    status = _status(errors)
    protocol = url.partition("://")[0].lower().replace("s3a", "s3").replace("gcs", "gs")
    credentials = _CREDENTIALS_OF.get(protocol, "check the user, the password or the token in the URL")
    profile = next(filter(os.environ.get, ("AWS_DEFAULT_PROFILE", "AWS_PROFILE")), "")  # the order of botocore
    if "ProfileNotFound" in names and profile:
        return DataError(
            f"{shown(url)}: {profile} is {os.environ[profile]!r}, but the AWS configuration has no such profile; "
            "correct or unset it"
        )
    if names & _NO_CREDENTIALS:
        return DataError(f"{shown(url)}: no credentials were found; {credentials}")
    if status in (401, 403) or any(isinstance(found, PermissionError) for found in errors):
        return DataError(f"{shown(url)}: access was refused{_in_brackets(status)}; check the rights, or {credentials}")
    after = f" after {tries} tries" if tries > 1 else ""
    variable = next(filter(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")), "") if protocol == "s3" else ""
    endpoint = os.environ.get(variable, "")
    if endpoint and "://" not in endpoint:
        return DataError(f"{variable}: {endpoint} has no protocol; set it to http://{endpoint} or https://{endpoint}")
    if names & _NO_CONNECTION:
        through = f" and {variable} ({shown(endpoint)})" if endpoint else ""
        return DataError(
            f"{shown(url)}: the server cannot be reached{after} ({_reason(errors)}); check the URL{through} and the "
            "network, and run again"
        )
    if status in (404, 410) or any(isinstance(found, FileNotFoundError) for found in errors):
        return DataError(f"{shown(url)}: there is no such file or folder{_in_brackets(status)}; check the URL")
    return DataError(
        f"{shown(url)}: cannot be {action}{after} ({_reason(errors)}{_in_brackets(status)}); check the URL and the "
        "network, and run again"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that caused it, each once."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _status(errors: list[BaseException]) -> int | None:
    """Return the status of HTTP that the errors name."""
    for error in errors:
        status = getattr(error, "status", None)
        response = getattr(error, "response", None)
        if status is None and isinstance(response, dict):  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    return None


def _in_brackets(status: int | None) -> str:
    return f" (HTTP {status})" if status is not None else ""


def _reason(errors: list[BaseException]) -> str:
    """Return what the system said, or else the kind of the error: a library's own words may contain a signed URL."""
    spoken = (found.strerror for found in errors if isinstance(found, OSError) and found.errno is not None)
    text = next(filter(None, spoken), None)
    if text is None or "://" in text or len(text) > 100:
        return type(errors[0]).__name__
    return re.sub(r"\s+", " ", text)
