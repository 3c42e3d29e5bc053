"""A place in a bucket (`s3://...`, `gs://...`), with the verbs of `pathlib.Path` that results need.

An object is put whole or not at all, and is seen by all readers once it is there: a bucket needs no temporary names.
Two writers are told apart by a conditional put: `write_if` fails where the object is not the one that was read.
pyarrow's file systems cannot do that, so obstore (the object_store of Arrow's Rust half) does the work. A bucket that
does not answer is tried again for some minutes; what is then still wrong is an `OSError` like a disk's.

Credentials, region and endpoint come from where the vendor's own tools take them: `AWS_ACCESS_KEY_ID`,
`AWS_REGION`, `AWS_ENDPOINT_URL`..., the machine's role, `~/.aws` where boto3 is installed;
`GOOGLE_APPLICATION_CREDENTIALS` or gcloud's own login.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmin.errors import ResultsError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs")

PATIENCE = timedelta(minutes=5)
"""How long a bucket that does not answer is tried again before a write fails."""

_QUICK = timedelta(seconds=10)

Tag = str
"""Which version of an object was seen."""


class Changed(OSError):
    """An object is not the one that was read: somebody else has written it."""


@dataclass(frozen=True)
class Listed:
    """What a listing says of an object, under the names of `os.stat_result`.

    Attributes:
        st_size: Bytes.
        st_mtime_ns: Time of its last change.
    """

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class BucketPath:
    """An object, or the common beginning of the names of several.

    Attributes:
        bucket: `s3://name` or `gs://name`.
        key: The name within the bucket, without slashes at its ends; empty: the bucket itself.
    """

    bucket: str
    key: str = ""
    _listed: Listed | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, uri: str) -> BucketPath:
        """Return the place that a URI names.

        Raises:
            ResultsError: It is of another kind, names no bucket, holds credentials, or leads upwards.
        """
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        parts = [part for part in key.split("/") if part]
        if "@" in bucket or ":" in bucket:
            raise ResultsError(
                f"{scheme}://***@...: a URI of results holds no credentials, for it is shown and kept; give "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or the machine a role"
            )
        if scheme not in SCHEMES:
            raise ResultsError(f"'{uri}': results go to a directory, s3://BUCKET/NAME or gs://BUCKET/NAME")
        if not bucket or {".", ".."}.intersection(parts):
            raise ResultsError(f"'{uri}': give {scheme}://BUCKET/NAME, without '.' and '..'")
        return cls(f"{scheme}://{bucket}", "/".join(parts))

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(self.bucket, f"{self.key}/{name}" if self.key else name)

    def __lt__(self, other: BucketPath) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return Path(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part, with its dot."""
        return Path(self.name).suffix

    def reach(self) -> None:
        """Raise, after some seconds, unless the bucket answers.

        Raises:
            ResultsError: It does not exist, does not answer, or does not let us in.
        """
        try:
            with _errors(self):
                next(iter(_store(self.bucket, patient=False).list(f"{self.key}/", chunk_size=1)), None)
        except OSError as error:
            raise ResultsError(f"'{self}' cannot be used: {error.strerror or error}") from None

    def stat(self) -> Listed:
        """Return size and time of change, from the listing where the path comes from one.

        Raises:
            FileNotFoundError: There is no such object.
        """
        if self._listed is not None:
            return self._listed
        with _errors(self):
            return _listed(_store(self.bucket).head(self.key))

    def is_file(self) -> bool:
        """Whether there is an object of that name."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    exists = is_file

    def iterdir(self) -> Iterator[BucketPath]:
        """Yield what lies one level below: objects, and beginnings of longer names."""
        with _errors(self):
            found = _store(self.bucket).list_with_delimiter(f"{self.key}/" if self.key else None)
        for entry in found["objects"]:
            yield BucketPath(self.bucket, entry["path"], _listed(entry))
        for prefix in found["common_prefixes"]:
            yield BucketPath(self.bucket, prefix.rstrip("/"))

    def is_dir(self) -> bool:
        """Whether something lies below."""
        return next(self.iterdir(), None) is not None

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Yield the objects one level below whose last part matches."""
        for entry in self.iterdir():
            if entry._listed is not None and fnmatch.fnmatchcase(entry.name, pattern):
                yield entry

    def read_bytes(self) -> bytes:
        """Return what the object holds.

        Raises:
            FileNotFoundError: There is none.
        """
        return self.read_tagged()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return what the object holds, as text."""
        return self.read_bytes().decode(encoding)

    def read_tagged(self) -> tuple[bytes, Tag]:
        """Return what the object holds, and which version of it that is."""
        with _errors(self):
            found = _store(self.bucket).get(self.key)
            return bytes(found.bytes()), str(found.meta["e_tag"])

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a bucket has no directories."""

    def write_text(self, content: str) -> None:
        """Put an object that holds a text."""
        self.write_bytes(content.encode())

    def write_bytes(self, content: bytes | bytearray | Path) -> None:
        """Put an object, whole or not at all; in place of one of that name. A path: what that file holds."""
        with _errors(self):
            _store(self.bucket).put(self.key, content)

    def write_if(self, content: bytes, tag: Tag | None) -> Tag:
        """Put an object in place of the version that was read; None: where there was none. Return its own tag.

        Raises:
            Changed: Somebody else has written it meanwhile.
        """
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        try:
            with _errors(self):
                put = _store(self.bucket).put(self.key, content, mode="create" if tag is None else {"e_tag": tag})
        except OSError as error:
            if isinstance(error.__cause__, AlreadyExistsError | PreconditionError):
                raise Changed(errno.EEXIST, "somebody else has written it", str(self)) from None
            raise
        return str(put["e_tag"])

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove an object; one that is not there is no error, as buckets have it."""
        with _errors(self), contextlib.suppress(FileNotFoundError):
            _store(self.bucket).delete(self.key)


Place = Path | BucketPath


@contextlib.contextmanager
def local_copy(file: Place) -> Iterator[Path]:
    """Give a file on this machine's disk with what another holds: itself, or a copy while the context lasts.

    Raises:
        FileNotFoundError: There is none.
    """
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        copy = Path(folder) / file.name
        with _errors(file), open(copy, "wb") as sink:
            for chunk in _store(file.bucket).get(file.key).stream():
                sink.write(chunk)
        yield copy


def _listed(meta: Any) -> Listed:
    changed: datetime = meta["last_modified"]
    return Listed(meta["size"], round(changed.timestamp() * 1e6) * 1000)


@functools.cache
def _store(bucket: str, *, patient: bool = True) -> ObjectStore:
    from obstore.store import from_url

    retry: Any = (
        {"retry_timeout": PATIENCE, "max_retries": 100} if patient else {"max_retries": 2, "retry_timeout": _QUICK}
    )
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    plain = bucket.startswith("s3://") and endpoint.startswith("http://")
    given: dict[str, Any] = {"client_options": {"allow_http": True}} if plain else {}
    if bucket.startswith("s3://") and importlib.util.find_spec("boto3"):
        import boto3  # type: ignore[import-untyped]
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session()
        if session.get_credentials() is not None:
            given["credential_provider"] = Boto3CredentialProvider(session)
    return from_url(bucket, retry_config=retry, **given)


@contextlib.contextmanager
def _errors(place: BucketPath) -> Iterator[None]:
    """Turn what obstore raises into errors of the operating system, in one line."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(place)) from None
    except BaseError as error:
        refused = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        said = "the bucket does not let us in" if refused else "the bucket did not answer, or refused"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(errno.EACCES if refused else errno.EIO, f"{said}: {first[:300]}", str(place)) from error
