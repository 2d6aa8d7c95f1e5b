"""Adapters and models by address: from a real server of S3, a web server, and a server that answers as the hub does."""

from __future__ import annotations

import copy
import functools
import http.server
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from loraover.common.errors import ConfigError, OutputError
from loraover.common.paths import AddressPath, without_secrets
from loraover.models.load import load_config, resolve_model
from loraover.sources.address import Address, HubName, SourceError, is_elsewhere, name_of, read_address
from loraover.sources.fetch import RemoteStore, fetch_adapter
from loraover_export import check_adapter, check_fleet
from loraover_export.check.request import CheckRequest

from support.http_server import Handler, serving

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def quiet(line: str) -> None:
    """Drop a line of progress."""


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """An empty bucket of a server of S3 on this machine, as fsspec opens it."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is in the extra remote")
    server_of = pytest.importorskip("moto.server", reason="moto is in the extra dev")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem()
        system.mkdir("bucket")
        yield system
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def put(s3: Any, folder: str, **files: bytes) -> str:
    for name, content in files.items():
        s3.pipe(f"bucket/{folder}/{name.replace('__', '.')}", content)
    return f"s3://bucket/{folder}"


class Site(Handler, http.server.SimpleHTTPRequestHandler):
    """A folder's files, and redirects; `moved` has the targets by path, `heard` the paths and headers of requests."""

    moved: ClassVar[dict[str, str]] = {}
    heard: ClassVar[list[tuple[str, Mapping[str, str]]]] = []

    def send_head(self) -> Any:
        self.heard.append((self.path, dict(self.headers)))
        if self.path in self.moved:
            self.send_response(302)
            self.send_header("Location", self.moved[self.path])
            self.end_headers()
            return None
        return super().send_head()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "site"
    (folder / "a").mkdir(parents=True)
    Site.moved, Site.heard = {}, []
    with serving(functools.partial(Site, directory=str(folder))) as address:
        yield folder / "a", f"{address}/a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubName("org/name", None)),
        ("org/name@v1.0", HubName("org/name", "v1.0")),
        ("hf://org/name@refs", HubName("org/name", "refs")),
        ("https://huggingface.co/org/name/tree/main", HubName("org/name", "main")),
        ("s3://b/x/", Address("s3", "b/x")),
        (AddressPath("s3://b/x"), Address("s3", "b/x")),
        (AddressPath("file:///a/x"), Address("file", "/a/x")),
        (AddressPath(AddressPath("hdfs:///a/x/")), Address("hdfs", "/a/x")),
        (AddressPath("hdfs://host/x"), Address("hdfs", "host/x")),
        ("https://host/x?version=1", Address("https", "host/x?version=1")),
        ("name", Path("name")),
        ("./org/name", Path("org/name")),
        ("/a/b", Path("/a/b")),
        ("a/b/c", Path("a/b/c")),
        ("../x", Path("../x")),
    ],
)
def test_a_text_is_a_path_a_hub_name_or_an_address(text: str | Path, expected: object) -> None:
    assert read_address(text) == expected
    assert is_elsewhere(text) == ("://" in str(text))


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert read_address("org/name") == Path("org/name")
    assert [name_of(text) for text in ("org/name", "org/other@v1", "s3://b/shop")] == ["name", "other", "shop"]


def test_an_address_keeps_its_text_in_a_path() -> None:
    for text in ("s3://b/x", "file:///a/x", "file://x", "hdfs:///a/x", "hdfs://host/x"):
        path = AddressPath(text)
        assert str(path) == str(AddressPath(path)) == str(copy.deepcopy(path)) == text
    assert [str(AddressPath(Path(text))) for text in ("s3://b/x", "file:///x")] == ["s3://b/x", "file:///x"]
    assert str(AddressPath("/s3://b")) == "/s3:/b"


@pytest.mark.parametrize("text", ["hf://datasets/org/name", "https://huggingface.co/org"])
def test_an_address_of_the_hub_names_a_repository(text: str) -> None:
    with pytest.raises(ConfigError, match="names no repository of the hub; expected"):
        read_address(text)


def test_s3_files_are_fetched_once_and_again_when_they_change(s3: Any, cache: Path) -> None:
    address = put(s3, "once", adapter_config__json=b"{}", adapter_model__safetensors=b"1", optimizer__pt=b"large")
    lines: list[str] = []
    first = fetch_adapter(address, lines.append).folder
    assert {path.name for path in first.iterdir()} == {CONFIG, TENSORS}
    assert fetch_adapter(address, lines.append).folder == first
    assert len(lines) == 1
    put(s3, "once", adapter_model__safetensors=b"2")
    second = fetch_adapter(address, lines.append).folder
    assert (first / TENSORS).read_bytes() == b"1"
    assert (second / TENSORS).read_bytes() == b"2"


def test_a_check_reads_s3(s3: Any, adapter: Path) -> None:
    s3.put(f"{adapter}/", "bucket/real/", recursive=True)
    report = check_adapter("s3://bucket/real", engines="vllm")
    assert report.modules == check_adapter(adapter, engines="vllm").modules
    assert report.adapter == "s3://bucket/real"


def test_a_model_is_read_from_s3_and_a_check_takes_its_configuration_alone(s3: Any, adapter: Path, cache: Path) -> None:
    base = Path(json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"])
    s3.put(f"{base}/", "bucket/base/", recursive=True)
    small = resolve_model("s3://bucket/base", with_weights=False)
    assert {path.name for path in Path(small.location).iterdir()} == {"config.json"}
    whole = resolve_model("s3://bucket/base")
    assert (Path(whole.location) / "model.safetensors").is_file()
    assert load_config(whole).architectures == ["LlamaForCausalLM"]


@pytest.fixture
def listed() -> Any:
    """A system of fsspec at listed://, with a listing and contents that a test sets."""
    fsspec = pytest.importorskip("fsspec")

    class Listed(fsspec.AbstractFileSystem):  # type: ignore[name-defined]
        protocol, cachable = "listed", False
        files: ClassVar[dict[str, bytes]] = {}
        read: ClassVar[Callable[[], object]] = lambda: None

        def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
            return [
                {"name": f"{path.rstrip('/')}/{name}", "size": len(content), "type": "file", "mark": content}
                for name, content in self.files.items()
            ]

        def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
            Path(lpath).write_bytes(self.files[rpath.rpartition("/")[2]])
            type(self).read()

    fsspec.register_implementation("listed", Listed, clobber=True)
    return Listed


@pytest.mark.parametrize("name", ["..", "../x", "x/../../y"])
def test_no_name_leads_out_of_the_cache(name: str, listed: Any, cache: Path) -> None:
    """S3's own client collapses such names."""
    listed.files = {name: b"1", CONFIG: b"{}"}
    with pytest.raises(SourceError, match="outside of the cache; expected plain names"):
        fetch_adapter("listed://d", quiet)
    assert not cache.exists()


def test_a_file_that_changes_in_between_is_refused(listed: Any, cache: Path) -> None:
    listed.files = {CONFIG: b"{}", TENSORS: b"1"}
    listed.read = lambda: listed.files.update({CONFIG: b"[]"})
    with pytest.raises(SourceError, match=f"{CONFIG} changed while it was read"):
        fetch_adapter("listed://d", quiet)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/nothing", "no such folder there"),
        ("s3://nowhere/x", "no such folder there"),
        ("nonsense://x", "cannot be read: Protocol not known"),
        ("gs://b/x", "this needs gcsfs"),
        ("github://x", "lacks a part that github:// needs: .* 'org'"),
        ("http://example.org/x", "without encryption"),
    ],
)
def test_what_cannot_be_fetched_is_refused(s3: Any, address: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        fetch_adapter(address, quiet)


class Cluster(Handler):
    """What HDFS answers over http for a folder with one file."""

    def do_GET(self) -> None:
        assert self.path.startswith("/webhdfs/v1/shop")
        found = {"pathSuffix": CONFIG, "type": "FILE", "length": 2, "modificationTime": 1}
        self.answer(200, json.dumps({"FileStatuses": {"FileStatus": [found]}}).encode())


def test_an_address_names_the_host_and_its_port() -> None:
    pytest.importorskip("requests", reason="fsspec asks HDFS by requests")
    with serving(Cluster) as url:
        store = RemoteStore(Address("webhdfs", f"{url.removeprefix('http://')}/shop"))
        assert store.entries((CONFIG,))[CONFIG].size == 2


def test_a_cache_that_cannot_be_written_is_said(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = put(s3, "full", adapter_config__json=b"{}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file"):
        fetch_adapter(address, quiet)


def test_a_web_folder_is_fetched_once(site: tuple[Path, str]) -> None:
    folder, address = site
    (folder / CONFIG).write_text("{}")
    (folder / TENSORS).write_bytes(b"1" * 100_000)
    Site.moved = {f"/a/{TENSORS}": "/a/moved"}  # within the host
    (folder / "moved").write_bytes(b"1" * 100_000)
    lines: list[str] = []
    first = fetch_adapter(address, lines.append).folder
    assert (first / TENSORS).read_bytes() == b"1" * 100_000
    assert fetch_adapter(address + "/", lines.append).folder == first
    assert len(lines) == 1


def test_a_model_of_the_web_has_the_shards_that_its_index_names(site: tuple[Path, str]) -> None:
    folder, address = site
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    (folder / "model-1.safetensors").write_bytes(b"1")
    assert (Path(resolve_model(address).location) / "model-1.safetensors").read_bytes() == b"1"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../../x"}}))
    (folder.parent.parent / "x").write_bytes(b"1")
    with pytest.raises(SourceError, match="outside of the cache"):
        resolve_model(address)


def test_a_server_that_sends_without_end_fills_no_disk(tmp_path: Path) -> None:
    sent: list[int] = []

    class Endless(Site):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    sent.append(self.wfile.write(bytes(2**20)))

    (tmp_path / CONFIG).write_text("{}")
    with serving(functools.partial(Endless, directory=str(tmp_path))) as address:
        with pytest.raises(SourceError, match=f"{CONFIG} changed while it was read"):
            fetch_adapter(address, quiet)
        assert len(sent) < 100
        with pytest.raises(SourceError, match=r"index\.json: more than 67108864 bytes"):
            resolve_model(address)
        assert len(sent) < 200


def test_an_index_of_deep_lists_is_refused(site: tuple[Path, str]) -> None:
    folder, address = site
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(SourceError, match="is not an index of weights: RecursionError"):
        resolve_model(address)


def test_secrets_of_an_address_are_sent_and_shown_to_nobody(
    site: tuple[Path, str], adapter: Path, tmp_path: Path
) -> None:
    folder, address = site
    shutil.copytree(adapter, folder / "shop")
    secret = address.replace("http://", "http://me:hunter2@") + "/shop?sv=1&sig=hunter2"
    shown = address.replace("http://", "http://***@") + "/shop?sv=***&sig=***"
    request = CheckRequest(secret, engines="vllm")
    assert request.command() == f"loraover check '{shown}' --engine vllm"
    report = check_adapter(secret, engines="vllm")
    assert report.adapter == shown
    assert all(path.endswith("?sv=1&sig=hunter2") and headers["Authorization"] for path, headers in Site.heard)
    (row,) = check_fleet([secret], engines="vllm", html=tmp_path / "fleet.html").rows
    assert (row.source, row.address, row.verdict) == (shown, shown, "right")
    assert "hunter2" not in (tmp_path / "fleet.html").read_text()
    (folder / "shop" / TENSORS).unlink()
    (row,) = check_fleet([secret], engines="vllm").rows
    assert (row.verdict, "hunter2" in row.reason) == ("refused", False)
    shutil.rmtree(folder / "shop")
    lines: list[str] = []
    with pytest.raises(SourceError) as caught:
        fetch_adapter(secret, lines.append)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://token@host/x", "https://***@host/x"),
        ("ftp:/me:p@ss@host/x", "ftp:/***@host/x"),
        ("abfss://box@account.dfs.core.windows.net/x", "abfss://box@account.dfs.core.windows.net/x"),
        ("https://host/x?token", "https://host/x?***"),
        ("see https://host/x?a=1&b=2 there", "see https://host/x?a=***&b=*** there"),
        ("org/name@main", "org/name@main"),
        ("--header=a?b=c", "--header=a?b=c"),
    ],
)
def test_an_address_is_shown_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_redirect_to_another_host_is_refused(site: tuple[Path, str], cache: Path) -> None:
    folder, address = site
    (folder / CONFIG).write_text("{}")
    Site.moved = {f"/a/{TENSORS}": "http://127.0.0.1:1/secret"}
    with pytest.raises(SourceError, match=r"redirects to another host, '127\.0\.0\.1:1'"):
        fetch_adapter(address, quiet)
    assert not cache.exists()
