"""The page and its server; with Chromium and onnxruntime-web at hand, whole measurements in a real browser."""

import base64
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import psutil
import pytest
from progress_record import ProgressRecord
from small_models import build, truncated

from converters.errors import InputError
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.quantize import quantize_graph
from prehab_export.config.bench import BenchConfig
from prehab_export.measurement.targets import browser, chromium, page_server, web_runtime
from prehab_export.measurement.targets.browser import measure_in_browser, serve_by_hand
from prehab_export.measurement.targets.chromium import find_browser
from prehab_export.measurement.targets.kit import KIT, make_kit, read_kit
from prehab_export.measurement.targets.page_server import serve
from prehab_export.measurement.targets.web_runtime import WEB_ENTRY, find_web
from prehab_export.pipeline import target_bench as measuring
from prehab_export.system.errors import ParityError, TargetError
from prehab_export.system.files import cache_folder

QUICK = BenchConfig(threads=1, sequence_lengths=(6,), warmup=0, rounds=2, min_seconds=0.0, new_tokens=4)
TASKS = {"vit": "image-classification", "bert": "text-classification", "llama": "text-generation"}


def cached_web():
    """onnxruntime-web, if an earlier use has put it there; tests download nothing."""
    folder = cache_folder() / f"onnxruntime-web-{web_runtime.WEB_VERSION}"
    return folder if (folder / WEB_ENTRY).is_file() else None


CHROMIUM = next((path for name in chromium.BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or cached_web() is None,
    reason="needs Chromium, and onnxruntime-web as one use of --target browser leaves it in the cache",
)


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    made = {}

    def kit_of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            graphs = {
                "dense": export_onnx(
                    build(family),
                    TASKS[family],
                    folder / "dense" / "model.onnx",
                    GraphForm(external_data_threshold=1000),
                ).path,
                "low rank": export_onnx(truncated(build(family), 6), TASKS[family], folder / "low" / "model.onnx").path,
            }
            graphs["low rank int8"] = quantize_graph(graphs["low rank"], folder / "low" / "int8.onnx", "int8")
            made[family] = make_kit(graphs, folder / "kit", QUICK)
        return made[family]

    return kit_of


@pytest.fixture
def web(tmp_path):
    """A folder that looks like onnxruntime-web's."""
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / WEB_ENTRY).write_text("export {};")
    return tmp_path / "dist"


def ask(served, path, method="GET", body=None, token=None, **headers):
    """What the server answers to ``path`` behind its token, or another one."""
    place = urlsplit(served.address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    start = "" if token == "" else f"/{token or served.token}"
    try:
        connection.request(method, start + path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_what_is_served(kits, web):
    kit = kits("vit")
    with serve(kit, web) as served:
        for path, start in (
            ("/", b"<!doctype html>"),
            ("/kit.mjs", b"//"),
            ("/kit/kit.json", b"{"),
            (f"/ort/{WEB_ENTRY}", b"export"),
        ):
            status, headers, content = ask(served, path)
            assert (status, content.startswith(start)) == (200, True), path
            assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert ask(served, "/kit.mjs")[1]["Content-Type"] == "text/javascript"
        model = kit.facts["models"][0]["file"]
        assert ask(served, f"/kit/{model}")[2] == (kit.folder / model).read_bytes()
    with pytest.raises(OSError, match="refused"):
        ask(served, "/")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/kit/../secret.txt",
        "/kit/%2e%2e/secret.txt",
        "/kit//etc/passwd",
        "/kit/..%5csecret.txt",
        "/kit/%00",
        "/ort/../../kit/kit.json",
        "/nothing",
        "/kit/",
        "/kit",
        "/kit/models",
        "/ort/",
        "",
    ],
)
def test_nothing_else_is_served(kits, web, path):
    """No file of another folder, and no list of what a folder holds."""
    (kits("vit").folder.parent / "secret.txt").write_text("secret")
    with serve(kits("vit"), web) as served:
        assert ask(served, path)[0] == 404


@pytest.mark.parametrize("token", ["", "guess", "é", "a" * 10_000, ".."])
def test_without_the_token_there_is_nothing(kits, web, token):
    """Not the models, not the page, and nothing is taken."""
    kit = kits("vit")
    with serve(kit, web) as served:
        for path in ("/", "/kit.mjs", "/kit/kit.json", f"/kit/{kit.facts['models'][0]['file']}", f"/ort/{WEB_ENTRY}"):
            status, _, content = ask(served, path, token=quote(token))
            assert (status, kit.digest.encode() in content) == (404, False)
        for what in ("results", "progress", "failed"):
            assert ask(served, f"/{what}", "POST", b"{}", token=quote(token))[0] == 403
            assert ask(served, f"/{what}?token={served.token}", "POST", b"{}", token="")[0] == 403
        assert served.messages.empty()


def test_addresses_hold_the_token_and_lead_here(kits, web):
    """Of all addresses, those that another machine can open; a token is for one serving only."""
    with serve(kits("vit"), web) as first, serve(kits("vit"), web, "0.0.0.0") as second:
        assert first.address.startswith("http://localhost:")
        assert first.token != second.token
        assert len(first.token) >= 20
        for served in (first, second):
            for address in served.addresses:
                assert address.endswith(f"/{served.token}/")
                assert "0.0.0.0" not in address
                with urllib.request.urlopen(address + "kit/kit.json", timeout=10) as answer:
                    assert json.load(answer)["models"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("192.168.1.7:80", 200), ("[::1]:80", 200), (socket.gethostname(), 200),
     ("evil.example", 404), ("localhost.evil.example:80", 404), ("", 404), ("[", 404)],
)  # fmt: skip
def test_names_that_somebody_else_has_made_lead_here(kits, web, host, status):
    """As DNS rebinding does: a page of theirs would count as ours."""
    with serve(kits("vit"), web) as served:
        assert ask(served, "/kit/kit.json", Host=host)[0] == status


def test_only_our_page_may_send(kits, web):
    with serve(kits("vit"), web) as served:
        assert ask(served, "/other", "POST", b"{}")[0] == 403
        for length in ("-1", "many", str(page_server.LARGEST_POST + 1)):
            assert ask(served, "/results", "POST", b"", **{"Content-Length": length})[0] == 403
        assert served.messages.empty()
        assert ask(served, "/progress", "POST", b"half")[0] == 204
        assert served.messages.get_nowait() == ("progress", "half")


def fake_browser(tmp_path, program):
    """A command that is given the address as its last argument."""
    script = tmp_path / "fake-browser"
    script.write_text(f"#!{sys.executable}\nimport sys, time, json, urllib.request, urllib.parse\n{program}")
    script.chmod(0o755)
    return str(script)


POST = """
def post(what, text):
    url = urllib.parse.urljoin(sys.argv[-1], what)
    urllib.request.urlopen(urllib.request.Request(url, text.encode(), method="POST"))
"""


@pytest.mark.parametrize(
    ("program", "kind", "sentence"),
    [
        ("sys.exit(7)", TargetError, "exit code 7"),
        (POST + "post('failed', 'WASM ran out of memory'); time.sleep(60)", TargetError, "WASM ran out of memory"),
        (POST + "post('failed', 'dense is off by 1e+0 here'); time.sleep(60)", ParityError, "dense is off by"),
        (POST + "post('results', json.dumps({})); time.sleep(60)", InputError, "what the page sent is not"),
        ("time.sleep(60)", TargetError, "sent nothing for 2 s"),
    ],
)
def test_browsers_that_fail(kits, web, tmp_path, program, kind, sentence):
    command = fake_browser(tmp_path, program)
    with pytest.raises(kind, match=sentence):
        measure_in_browser(kits("vit"), (1,), browser=command, web=web, timeout_s=2)
    left = [p for p in psutil.Process().children(recursive=True) if command in " ".join(p.cmdline())]
    assert not left


def test_what_is_missing_here(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no netscape here"):
        find_browser("netscape")
    with pytest.raises(InputError, match=f"holds no {WEB_ENTRY}"):
        find_web(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no npm to get it"):
        find_web(None)
    with pytest.raises(InputError, match="Chromium or Chrome"):
        find_browser(None)


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_by_hand_the_whole_address_is_said(kits, web, tmp_path, monkeypatch, capsys, host, warned):
    """And whom it is good for, where another machine can reach it."""
    seen = []

    def until_opened(kit, web, host, port, opened, results):
        def interrupted(addresses):
            seen.extend(addresses)
            opened(addresses)
            raise KeyboardInterrupt

        serve_by_hand(kit, web, host, port, interrupted, results)

    monkeypatch.setattr(measuring, "serve_by_hand", until_opened)
    session = SimpleNamespace(workspace=SimpleNamespace(root=tmp_path))
    target = measuring.Target("browser", web=web, by_hand=True, host=host)
    with pytest.raises(InputError, match="nobody measured"):
        measuring._serve_by_hand(session, kits("vit"), target)
    told = capsys.readouterr().err
    assert seen
    assert all(address in told for address in seen)
    assert ("can download the models" in told) == warned


@pytest.mark.parametrize("user", [0, 1000])
def test_only_root_goes_without_the_sandbox(kits, web, tmp_path, monkeypatch, capsys, user):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(sys, "platform", "linux")
    browser._warn_without_sandbox.cache_clear()
    command = fake_browser(tmp_path, POST + "post('failed', ' '.join(sys.argv)); time.sleep(60)")
    for _ in range(2):
        with pytest.raises(TargetError, match="the page failed") as caught:
            measure_in_browser(kits("vit"), (1,), browser=command, web=web)
        assert ("--no-sandbox" in str(caught.value)) == (user == 0)
    assert capsys.readouterr().err.count("without its sandbox") == (1 if user == 0 else 0)


def npm(folder, archive):
    """A stand-in for npm that packs ``archive``, and notes where it was called and how."""
    folder.mkdir()
    script = folder / "npm"
    script.write_text(
        f"#!{sys.executable}\nimport os, shutil, sys\n"
        "place = sys.argv[sys.argv.index('--pack-destination') + 1]\n"
        f"open({str(folder / 'called')!r}, 'a').write(os.getcwd() + ' ' + ' '.join(sys.argv[1:]))\n"
        f"shutil.copy({str(archive)!r}, os.path.join(place, 'onnxruntime-web.tgz'))\n"
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def package(tmp_path):
    """An archive such as npm packs, and its SHA-512 as npm writes it."""
    source = tmp_path / "source" / "package" / "dist"
    source.mkdir(parents=True)
    for name in (WEB_ENTRY, "ort-wasm.wasm"):
        (source / name).write_text(name)
    (source.parent / "package.json").write_text("{}")
    archive = tmp_path / "packed.tgz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(source.parent, "package")
    return archive, base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def test_the_package_is_what_was_pinned(package, tmp_path, monkeypatch):
    archive, digest = package
    script, place = npm(tmp_path / "bin", archive), tmp_path / "cache" / "prehab-export"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="is not the expected package"):
        find_web(None)
    assert not list(place.iterdir())
    monkeypatch.setattr(web_runtime, "WEB_SHA512", digest)
    folder = find_web(None)
    assert sorted(path.name for path in folder.iterdir()) == ["ort-wasm.wasm", WEB_ENTRY]
    assert [path.name for path in place.iterdir()] == [folder.name]
    called = (script.parent / "called").read_text()
    assert "--ignore-scripts" in called
    assert not called.startswith(str(tmp_path / "here"))  # whose .npmrc may say what to run
    script.unlink()
    assert find_web(None) == folder


# ---- the real thing


@needs_browser
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family == "vit" else pytest.mark.slow) for family in TASKS]
)
def test_a_kit_in_chromium(kits, family):
    """Answers equal to the recorded ones: external data, int8 and greedy decoding included."""
    kit, record = kits(family), ProgressRecord()
    results = measure_in_browser(kit, (1,), web=cached_web(), progress=record)
    record.check_all_done("measure in a browser")
    names = ["dense", "low rank", "low rank int8"]
    assert [row["model"] for row in results["cases"]] == names
    assert all(row["ok"] for row in results["parity"])
    exact = [row for row in results["parity"] if row["model"] != "low rank int8"]
    assert max(row["relative"] for row in exact) < 1e-4
    if family == "llama":
        assert all(row["same_tokens"] for row in exact)
        assert all(row["tokens_per_s"] > 0 for row in results["cases"])
    for row in results["cases"]:
        assert 0 <= row["p50_ms"] <= row["p95_ms"]
        assert row["heap_mb"] > 1
        assert len(row["rounds"]) == 2
    assert results["device"]["isolated"] is True
    assert results["device"]["runtime"] == "onnxruntime-web"
    assert [row["model"] for row in results["comparison"]] == names[1:]
    assert any("round 2 of 2" in note for note in record.notes)


@needs_browser
def test_wrong_answers_in_chromium(kits, tmp_path):
    shutil.copytree(kits("vit").folder, tmp_path / "kit")
    facts = json.loads((tmp_path / "kit" / KIT).read_text())
    facts["tolerance"]["low-rank"]["relative"] = -1.0
    (tmp_path / "kit" / KIT).write_text(json.dumps(facts))
    with pytest.raises(ParityError, match="low rank is off by"):
        measure_in_browser(read_kit(tmp_path / "kit"), (1,), web=cached_web())


@needs_browser
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_by_an_interrupt(kits, tmp_path, number):
    """A program that ends while the browser works takes the browser with it, even without a chance to tidy up."""
    code = (
        "from pathlib import Path\n"
        "from prehab_export.measurement.targets.browser import measure_in_browser\n"
        "from prehab_export.measurement.targets.kit import read_kit\n"
        f"kit = read_kit(Path({str(kits('vit').folder)!r}))\n"
        "from progress_record import ProgressRecord\n"
        "told = ProgressRecord(lambda note: print(note, flush=True))\n"
        f"measure_in_browser(kit, (1,), web=Path({str(cached_web())!r}), progress=told)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.send_signal(number)
    parent.wait(timeout=30)
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.2)
