"""Downloads from a server that breaks off, or sends damaged files; two processes at once; unpacking; what is kept."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from flatmin.errors import DataError, MissingData
from flatmin.trainables import downloads
from flatmin.trainables.downloads import Download, Source, downloads_allowed, kept, provide

CONTENT = bytes(range(256)) * 400


@dataclass
class Server:
    """What a server sends, and what it was asked.

    Attributes:
        files: Content by path.
        cuts: Bytes after which the next answers break off; None: not.
        ranges: Whether it knows Range.
        asked: (path, Range header) of every request.
        address: Its address.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.asked.append((self.path, wanted))
            content = state.files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if wanted and state.ranges else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts else None
            self.wfile.write(content[first:][:cut])

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(downloads, "_WAIT", 0.0)
    yield state
    running.shutdown()
    thread.join()
    running.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def source(server: Server, *urls: str, content: bytes = CONTENT) -> Source:
    addresses = tuple(server.url(url) for url in urls or ("a.bin",))
    download = Download("a.bin", addresses, md5(content), len(content))
    return Source("data", ("a.bin",), (download,), "http://official.page")


def test_nothing_is_downloaded_unless_it_is_allowed(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    with pytest.raises(MissingData) as caught:
        provide(source(server), tmp_path / "data")
    assert str(caught.value) == (
        f"data is not at {tmp_path}/data, which has no a.bin; `flatmin-sweep launch` downloads it; or put there what "
        f"http://official.page has (FLATMIN_DATA says where data sets lie)\n  {tmp_path}/data/a.bin "
        f"(102,400 bytes, md5 {md5(CONTENT)}, from {server.url('a.bin')})"
    )
    assert server.asked == []
    assert not (tmp_path / "data").exists()


def test_a_download_is_there_afterwards_and_not_repeated(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    with downloads_allowed():
        provide(source(server), tmp_path)
        provide(source(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked == [("/a.bin", "")]
    assert not (tmp_path / "a.bin.part").exists()


def test_a_transfer_goes_on_where_it_was_cut_off(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"], server.cuts = CONTENT, [30_000, 50_000]
    with downloads_allowed():
        provide(source(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["", "bytes=30000-", "bytes=80000-"]


def test_a_transfer_goes_on_in_another_run(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"], server.cuts = CONTENT, [30_000, 0, 0, 0]
    with downloads_allowed():
        with pytest.raises(MissingData, match=r"cut off after 30,000 bytes\); launch again, which goes on"):
            provide(source(server), tmp_path)
        provide(source(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["", *["bytes=30000-"] * 4]


def test_a_server_without_range_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"], server.cuts, server.ranges = CONTENT, [30_000], False
    with downloads_allowed():
        provide(source(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more", b"another file"])
def test_what_an_older_transfer_left(left: bytes, server: Server, tmp_path: Path) -> None:
    """All of the file, which was not renamed yet; too much; or the beginning of another one."""
    server.files["a.bin"] = CONTENT
    (tmp_path / "a.bin.part").write_bytes(left)
    with downloads_allowed():
        provide(source(server), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.asked) == (1 if left == CONTENT else 2)


def test_a_wrong_checksum_is_named(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT[:-1] + b"?"
    found = md5(server.files["a.bin"])
    with downloads_allowed(), pytest.raises(MissingData, match=f"its md5 is {found} and should be {md5(CONTENT)}"):
        provide(source(server), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    assert not (tmp_path / "a.bin.part").exists()


def test_the_next_address_is_tried(server: Server, tmp_path: Path) -> None:
    server.files["good/a.bin"] = CONTENT
    with downloads_allowed():
        provide(source(server, "gone/a.bin", "good/a.bin"), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_failed_download_says_which_files_go_where(server: Server, tmp_path: Path) -> None:
    nobody = Source(
        "data", ("a.bin",), (Download("a.bin", (server.url("a.bin"), "http://127.0.0.1:1/a.bin")),), "http://p"
    )
    with downloads_allowed(), pytest.raises(MissingData) as caught:
        provide(nobody, tmp_path)
    text = str(caught.value)
    assert "could not be downloaded" in text
    assert "HTTP 404" in text
    assert "refused" in text
    assert f"{tmp_path}/a.bin (from {server.url('a.bin')})" in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text  # it crosses from a worker to the driver


def test_a_folder_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT
    (tmp_path / "file").touch()
    with downloads_allowed(), pytest.raises(DataError, match=r"file/data: .*; make room, or change FLATMIN_DATA"):
        provide(source(server), tmp_path / "file" / "data")


def _provide(source: Source, folder: Path, start: Any) -> None:
    start.wait()
    with downloads_allowed():
        provide(source, folder)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = CONTENT * 100
    wanted = source(server, content=CONTENT * 100)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_provide, args=(wanted, tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT * 100
    assert len(server.asked) == 1


def archives(folder: Path) -> dict[str, Path]:
    """Return the same two files in each kind of archive."""
    (folder / "tree" / "sub").mkdir(parents=True)
    (folder / "tree" / "one").write_bytes(b"1")
    (folder / "tree" / "sub" / "two").write_bytes(CONTENT)
    with tarfile.open(folder / "a.tar.gz", "w:gz") as tar:
        tar.add(folder / "tree", "tree")
    with zipfile.ZipFile(folder / "a.zip", "w") as zipped:
        for name in ("tree/one", "tree/sub/two"):
            zipped.write(folder / name, name)
    (folder / "two.gz").write_bytes(gzip.compress(CONTENT))
    return {name: folder / name for name in ("a.tar.gz", "a.zip", "two.gz")}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "two.gz"])
def test_an_archive_that_is_there_is_unpacked(name: str, tmp_path: Path) -> None:
    """Without permission to download; what is there of it already, is replaced."""
    archive, folder = archives(tmp_path)[name], tmp_path / "data"
    (folder / "tree" / "sub").mkdir(parents=True)
    (folder / "tree" / "sub" / "two").write_bytes(b"half")
    shutil.copy(archive, folder)
    files = ("two",) if name == "two.gz" else ("tree/one", "tree/sub/two")
    download = Download(name, ("http://nowhere",), md5(archive.read_bytes()), into=".")
    provide(Source("data", files, (download,), "http://page"), folder)
    assert (folder / files[-1]).read_bytes() == CONTENT
    assert {path.name for path in folder.iterdir()} <= {name, "tree", "two", ".data.lock"}


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "two.gz"])
@pytest.mark.parametrize("known", [True, False])
def test_a_truncated_archive_is_named(name: str, known: bool, tmp_path: Path) -> None:
    archive = archives(tmp_path)[name]
    checksum = md5(archive.read_bytes()) if known else ""
    archive.write_bytes(archive.read_bytes()[:-40])
    download = Download(name, ("http://nowhere",), checksum, into="unpacked")
    with pytest.raises(
        DataError, match=rf"{name} (is damaged: its md5|cannot be unpacked).*; remove it, and"
    ) as caught:
        provide(Source("data", ("unpacked/tree",), (download,), "http://page"), tmp_path)
    assert ("md5" in str(caught.value)) == known
    assert not (tmp_path / "unpacked" / "tree").exists()


def test_an_archive_of_something_else_is_named(tmp_path: Path) -> None:
    archives(tmp_path)
    download = Download("a.zip", ("http://nowhere",), into="unpacked")
    with pytest.raises(DataError, match="has no unpacked/other, with all downloads there"):
        provide(Source("data", ("unpacked/other",), (download,), "http://page"), tmp_path)


def test_what_is_decoded_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(len(made))
        return {"x": torch.arange(5)}

    file = tmp_path / "kept.safetensors"
    for _ in range(2):
        assert torch.equal(kept(file, make)["x"], torch.arange(5))
    assert made == [0]
    file.write_bytes(file.read_bytes()[:-3])  # cut off: made again
    assert torch.equal(kept(file, make)["x"], torch.arange(5))
    assert made == [0, 1]
    file.unlink()
    monkeypatch.setattr("os.access", lambda *_: False)  # a folder that others keep: made each time
    assert torch.equal(kept(file, make)["x"], torch.arange(5))
    assert not file.exists()
