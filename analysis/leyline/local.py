"""The object store in a folder: for one machine, for tests, and for a run on a shared file system.

A file appears under its key in one step (a hard link to a finished, synced temporary file), so a reader never
sees half of it and of two writers exactly one wins. Keys come from records that others wrote, so a key that
would leave the folder, by `..` or through a symbolic link, is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from urllib.parse import unquote, urlsplit

from leyline.store import (
    CHUNK,
    Changed,
    Data,
    Exists,
    Head,
    NotFound,
    Refused,
    StoreError,
    Unreachable,
    Unsuitable,
    checked_chunks,
    checked_key,
)

TEMPORARY = ".tmp"
"""The folder of unfinished files inside the run; on the same file system, so that linking works."""

_ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which the temporary file of a killed writer is swept; no write lasts that long."""

_NO_HARD_LINK = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
_RENAME_NOREPLACE = 1


class LocalStore:
    """One run in a folder, given as a path or a `file://` URI. The folder is made by the first write."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = _as_path(root)
        self._swept = False
        self._borrowed: dict[str, tuple[LocalStore, str]] = {}

    @property
    def uri(self) -> str:
        return self._root.as_uri()

    def where(self, key: str) -> str:
        lent = self._borrowed.get(key)
        return lent[0].where(lent[1]) if lent else f"{key} in {self.uri}"

    def ancestors(self) -> Iterator[LocalStore]:
        """The folders above this one, as stores: a run in one of them would contain this one."""
        return (LocalStore(parent) for parent in self._root.parents)

    def head(self, key: str) -> Head:
        with self._opened(key) as file:
            return _head(key, os.fstat(file))

    def get(self, key: str) -> bytes:
        with self._opened(key) as file:
            return _read(key, file, 0, os.fstat(file).st_size)

    def get_range(self, key: str, start: int, stop: int, *, pin: str | None = None) -> bytes:
        with self._opened(key) as file:
            data = _read(key, file, start, stop)
            # Compared after reading: an overwrite in place while we read moves the mtime.
            if pin is not None and _pin(os.fstat(file)) != pin:
                raise Changed(f"{key} in {self.uri} is not the file that was pinned; do not overwrite checkpoints")
            return data

    def put_if_absent(self, key: str, data: Data) -> bool:
        return self._put(key, [data])

    def put_stream(
        self,
        key: str,
        chunks: Iterable[Data],
        *,
        size: int,
        digests: Sequence[str] | None = None,  # noqa: ARG002  files are compared byte by byte
    ) -> bool:
        return self._put(key, checked_chunks(key, chunks, size=size))

    def list(self, prefix: str, *, after: str = "") -> Iterator[Head]:
        folder = prefix.rpartition("/")[0]
        if folder:
            checked_key(folder)
        yield from self._walk(folder, prefix, after)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._told(key), suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            # Empty folders go too; a writer who loses its folder to this makes it again (see _publish).
            for parent in path.relative_to(self._root).parents[:-1]:
                with suppress(OSError):
                    (self._root / parent).rmdir()

    def abort_stale(self, older_than: datetime) -> int:
        folder = self._root / TEMPORARY
        with self._told(TEMPORARY):
            return _sweep(folder, older_than.timestamp()) if folder.is_dir() else 0

    def now(self) -> datetime:
        try:
            with self._temporary() as (file, _):
                seconds = os.fstat(file).st_mtime
        except StoreError:  # a reader without write permission: this machine's clock is the next best
            seconds = time.time()
        return datetime.fromtimestamp(seconds, UTC)

    def lender(self, uri: str) -> LocalStore:
        scheme, separator, _ = uri.partition("://")
        if separator and scheme != "file":
            raise StoreError(f"{uri} is in another kind of store than the run {self.uri}; copy it into a folder")
        return LocalStore(os.path.realpath(_as_path(uri)))  # a link may lead into a run

    def borrow(self, uri: str, keys: Mapping[str, str]) -> None:
        lender = self.lender(uri)
        self._borrowed |= {key: (lender, path) for key, path in keys.items()}

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        if key.split("/", 1)[0] == TEMPORARY:
            raise StoreError(f"{key!r} is no object key; {TEMPORARY}/ belongs to unfinished files")
        if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(self._root)):
            raise Refused(f"{key} leads out of {self.uri} through a symbolic link; replace the link by a folder")
        return path

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Turns an OSError into the port's own error, as a sentence."""
        try:
            yield
        except OSError as error:
            raise self._as_store_error(key, error) from error

    def _as_store_error(self, key: str, error: OSError) -> StoreError:
        where = f"{key} in {self.uri}"
        match error.errno:
            case errno.ENOENT | errno.EISDIR:
                return NotFound(f"{where} does not exist")
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return Refused(f"{where} is refused ({error.strerror}); give this user access to the folder")
            case errno.ENOSPC | errno.EDQUOT:
                return Refused(f"{where} cannot be written ({error.strerror}); free some space")
            case errno.ENOTDIR:
                return Refused(f"{where}: a part of the path is a file, not a folder; choose another run URI")
            case errno.ELOOP:
                return Refused(f"{where} is a symbolic link; replace it by the file")
            case errno.EIO | errno.ESTALE | errno.ETIMEDOUT | errno.EHOSTDOWN:
                return Unreachable(f"{where}: the file system does not answer ({error.strerror})")
        return StoreError(f"{where}: {error.strerror}")

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        if lent := self._borrowed.get(key):
            with lent[0]._opened(lent[1]) as file:
                yield file
            return
        path = self._path(key)
        with self._told(key):
            try:
                file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except NotADirectoryError:  # a/b where a is an object: no such object, as in S3
                raise NotFound(f"{key} in {self.uri} does not exist") from None
            try:
                if not S_ISREG(os.fstat(file).st_mode):
                    raise NotFound(f"{key} in {self.uri} is no file")
                yield file
            finally:
                os.close(file)

    @contextmanager
    def _temporary(self) -> Iterator[tuple[int, Path]]:
        folder = self._root / TEMPORARY
        path = folder / uuid.uuid4().hex
        with self._told(TEMPORARY):
            _make_folders(folder)
            if not self._swept:
                _sweep(folder, time.time() - _ABANDONED_AFTER)
                self._swept = True
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield file, path
        finally:
            os.close(file)
            path.unlink(missing_ok=True)

    def _put(self, key: str, chunks: Iterable[Data]) -> bool:
        target = self._path(key)
        with self._temporary() as (file, temporary):
            for chunk in chunks:  # outside of _told: an OSError of the caller's own source stays what it is
                with self._told(key):
                    _write(file, chunk)
            with self._told(key):
                os.fsync(file)
                made = self._publish(temporary, target)
                _fsync_folder(target.parent)  # also for the loser, who will go on as if the file were safe
            if not made and not self._same(key, file):
                raise Exists(f"{key} in {self.uri} exists with other content; somebody else wrote it first")
            return made

    def _publish(self, temporary: Path, target: Path) -> bool:
        for _ in range(100):
            _make_folders(target.parent)
            try:
                os.link(temporary, target)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                continue  # a delete has just removed the folder that was empty until now
            except OSError as error:
                if error.errno not in _NO_HARD_LINK:
                    raise
                return _rename_no_replace(temporary, target)
        raise Unreachable(f"{target} was never writable: its folder keeps disappearing; try again")

    def _same(self, key: str, ours: int) -> bool:
        with self._opened(key) as theirs:
            size = os.fstat(ours).st_size
            return size == os.fstat(theirs).st_size and all(
                os.pread(ours, CHUNK, at) == os.pread(theirs, CHUNK, at) for at in range(0, size, CHUNK)
            )

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[Head]:
        base = f"{folder}/" if folder else ""
        try:
            with self._told(folder or "/"), os.scandir(self._root / folder) as entries:
                # A folder sorts as "name/": S3 compares whole keys, and "a-b" comes before "a/b".
                found = sorted(
                    (f"{base}{entry.name}/" if entry.is_dir(follow_symlinks=False) else f"{base}{entry.name}", entry)
                    for entry in entries
                    if not entry.is_symlink() and f"{base}{entry.name}" != TEMPORARY
                )
        except NotFound:
            return
        for key, entry in found:
            if key.endswith("/"):
                inside = key.startswith(prefix) or prefix.startswith(key)
                if inside and (key > after or after.startswith(key)):
                    yield from self._walk(key[:-1], prefix, after)
            elif key.startswith(prefix) and key > after:
                with suppress(FileNotFoundError):  # deleted since the folder was read
                    status = entry.stat(follow_symlinks=False)
                    if S_ISREG(status.st_mode):
                        yield _head(key, status)


def _as_path(root: str | os.PathLike[str]) -> Path:
    text = os.fspath(root)
    if text.startswith("file:"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StoreError(f"{text} is no local folder; write file:///absolute/path")
        text = unquote(parts.path)
    # abspath, not resolve: the URI stays the one that was given although a parent may be a link.
    return Path(os.path.abspath(text))  # noqa: PTH100


def _pin(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"


def _head(key: str, status: os.stat_result) -> Head:
    modified = datetime.fromtimestamp(status.st_mtime, UTC)
    return Head(key=key, size=status.st_size, pin=_pin(status), modified=modified)


def _read(key: str, file: int, start: int, stop: int) -> bytes:
    data = os.pread(file, stop - start, start)
    while len(data) < stop - start:  # one pread gives at most 2 GiB, and less on some network file systems
        more = os.pread(file, stop - start - len(data), start + len(data))
        if not more:
            raise Changed(f"{key} ends at byte {start + len(data):,}, before byte {stop:,} that was asked for")
        data += more
    return data


def _write(file: int, data: Data) -> None:
    done = os.write(file, data)
    while done < len(data):
        done += os.write(file, memoryview(data)[done:])


def _make_folders(folder: Path) -> None:
    """Like mkdir -p, and each new name is synced into its parent, or a crash could lose what is inside."""
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    except FileNotFoundError:
        _make_folders(folder.parent)
        _make_folders(folder)
    else:
        _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sweep(folder: Path, oldest: float) -> int:
    """Removes what writers that were killed left behind before `oldest` (seconds since 1970); how many there were."""
    swept = 0
    for path in folder.iterdir():
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                swept += 1
    return swept


def _rename_no_replace(temporary: Path, target: Path) -> bool:
    """For file systems without hard links (FAT, some FUSE and network mounts)."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd = -100
    if renameat2 is not None:
        if renameat2(at_cwd, os.fsencode(temporary), at_cwd, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EEXIST:
            return False
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(target))
    raise Unsuitable(
        f"the file system of {target.parent} has neither hard links nor a rename that replaces nothing, so two "
        "writers could overwrite each other; put the run on another file system or into an S3 bucket"
    )
