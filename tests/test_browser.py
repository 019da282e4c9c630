"""The page and its server; with Chromium and onnxruntime-web at hand, whole measurements in a real browser."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from small_models import build, truncated

from converters.errors import InputError
from converters.onnx.export import export_onnx
from converters.onnx.quantize import quantize_graph
from prehab_export.bench_config import BenchConfig
from prehab_export.errors import ParityError, TargetError
from prehab_export.targets import browser
from prehab_export.targets.browser import WEB_ENTRY, find_browser, find_web, measure_in_browser, serve
from prehab_export.targets.kit import KIT, make_kit, read_kit

QUICK = BenchConfig(threads=1, sequence_lengths=(6,), warmup=0, rounds=2, min_seconds=0.0, new_tokens=4)
TASKS = {"vit": "image-classification", "bert": "text-classification", "llama": "text-generation"}


def cached_web():
    """onnxruntime-web, if an earlier use has put it there; tests download nothing."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prehab-export"
    folders = base.glob("onnxruntime-web-*/node_modules/onnxruntime-web/dist")
    return next((folder for folder in folders if (folder / WEB_ENTRY).is_file()), None)


CHROMIUM = next((path for name in browser.BROWSERS if (path := shutil.which(name))), None)
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
                    build(family), folder / "dense" / "model.onnx", TASKS[family], external_data_threshold=1000
                ).path,
                "low rank": export_onnx(truncated(build(family), 6), folder / "low" / "model.onnx", TASKS[family]).path,
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


def ask(served, path, method="GET", body=None):
    place = urlsplit(served.address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    try:
        connection.request(method, path, body)
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
        "/ort/../../kit/kit.json",
        "/nothing",
        "/kit/",
    ],
)
def test_nothing_else_is_served(kits, web, path):
    (kits("vit").folder.parent / "secret.txt").write_text("secret")
    with serve(kits("vit"), web) as served:
        assert ask(served, path)[0] == 404


def test_only_our_page_may_send(kits, web):
    with serve(kits("vit"), web) as served:
        assert ask(served, "/results?token=guess", "POST", b"{}")[0] == 403
        assert ask(served, f"/other?token={served.token}", "POST", b"{}")[0] == 403
        assert served.messages.empty()
        assert ask(served, f"/progress?token={served.token}", "POST", b"half")[0] == 204
        assert served.messages.get_nowait() == ("progress", "half")


def fake_browser(tmp_path, program):
    """A command that is given the address as its last argument."""
    script = tmp_path / "fake-browser"
    script.write_text(f"#!{sys.executable}\nimport sys, time, json, urllib.request, urllib.parse\n{program}")
    script.chmod(0o755)
    return str(script)


POST = """
place = urllib.parse.urlsplit(sys.argv[-1])
token = urllib.parse.parse_qs(place.query)["auto"][0]
def post(what, text):
    url = f"{place.scheme}://{place.netloc}/{what}?token={token}"
    urllib.request.urlopen(urllib.request.Request(url, text.encode(), method="POST"))
"""


@pytest.mark.parametrize(
    ("program", "kind", "sentence"),
    [
        ("sys.exit(7)", TargetError, "exit code 7"),
        (POST + "post('failed', 'WASM ran out of memory'); time.sleep(60)", TargetError, "WASM ran out of memory"),
        (POST + "post('failed', 'dense is off by 1e+0 here'); time.sleep(60)", ParityError, "dense is off by"),
        (POST + "post('results', json.dumps({})); time.sleep(60)", InputError, "what the page sent is not"),
        ("time.sleep(60)", TargetError, "said nothing for 2 s"),
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


# ---- the real thing


@needs_browser
@pytest.mark.parametrize("family", list(TASKS))
def test_a_kit_in_chromium(kits, family):
    """Answers equal to the recorded ones: external data, int8 and greedy decoding included."""
    kit, said = kits(family), []
    results = measure_in_browser(kit, (1,), web=cached_web(), progress=said.append)
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
    assert any("round 2 of 2" in line for line in said)


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
        "from prehab_export.targets.browser import measure_in_browser\n"
        "from prehab_export.targets.kit import read_kit\n"
        f"kit = read_kit(Path({str(kits('vit').folder)!r}))\n"
        "say = lambda line: print(line, flush=True)\n"
        f"measure_in_browser(kit, (1,), web=Path({str(cached_web())!r}), progress=say)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
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
