"""Kits on other machines: a real sshd on the loopback, and an adb that stands in for a phone."""

import getpass
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from progress_record import ProgressRecord
from small_models import build

from converters.errors import InputError
from converters.onnx.export import export_onnx
from prehab_export.config.bench import BenchConfig
from prehab_export.config.target import Target
from prehab_export.measurement.targets.kit import make_kit
from prehab_export.measurement.targets.limits import Limits, run_limited
from prehab_export.measurement.targets.remote import _HASH_SCRIPT, measure_remotely
from prehab_export.measurement.targets.shell import adb, ssh
from prehab_export.system.errors import ParityError, TargetError

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="needs OpenSSH: apt-get install openssh-server openssh-client"
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    graph = export_onnx(build("vit"), "image-classification", folder / "model.onnx").path
    config = BenchConfig(threads=1, warmup=0, rounds=2, min_seconds=0.0)
    return make_kit({"dense": graph, "same": graph}, folder / "kit", config)


@pytest.fixture
def server(tmp_path):
    """An sshd of our own, on a free port of the loopback, with a key made for it."""
    if SSHD is None:
        pytest.skip("needs sshd")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "user.pub").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    config = tmp_path / "sshd_config"
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {tmp_path / 'host'}",
        f"AuthorizedKeysFile {tmp_path / 'authorized'}",
        "PidFile none",
        "UsePAM no",
        "StrictModes no",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        f"SetEnv HOME={home}",
        f'ForceCommand cd {home} && eval "$SSH_ORIGINAL_COMMAND"',
    ]
    config.write_text("\n".join(lines) + "\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, started as root, locks itself in
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.PIPE, text=True)
    assert "listening" in process.stderr.readline()
    threading.Thread(target=process.stderr.read, daemon=True).start()
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    options = (f"IdentityFile={tmp_path / 'user'}", f"UserKnownHostsFile={known}", "IdentitiesOnly=yes")
    try:
        yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}", options, home, process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def left_there(home):
    """Of ours: ONNX Runtime itself keeps an identity of the device in its own cache."""
    found = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
    return [path for path in found if "Microsoft" not in path.parts]


@needs_sshd
def test_over_ssh_and_nothing_is_left(kit, server):
    url, options, home, _ = server
    record = ProgressRecord()
    with ssh(url, options) as shell:
        results = measure_remotely(kit, shell, "ssh", sys.executable, progress=record)
        record.check_all_done(f"copy to {shell.name}", f"measure at {shell.name}")
    assert results["place"] == "ssh"
    assert [row["model"] for row in results["cases"]] == ["dense", "same"]
    assert all(row["ok"] for row in results["parity"])
    assert any("round 2 of 2" in note for note in record.notes)
    assert left_there(home) == []
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]


@needs_sshd
def test_what_is_there_is_not_copied_again(kit, server):
    url, options, home, _ = server
    record = ProgressRecord()
    with ssh(url, options) as shell:
        measure_remotely(kit, shell, "ssh", sys.executable, keep=True)
        kept = home / ".cache/prehab-export/kits/kept"
        assert (kept / "kit.json").is_file()
        (kept / "README.md").write_text("changed")
        (kept / "left-over.bin").write_text("of another kit")
        measure_remotely(kit, shell, "ssh", sys.executable, keep=True, progress=record)
    copied = record.works[0]
    assert (copied.steps, set(copied.notes)) == (1, {"README.md"})
    assert not (kept / "left-over.bin").exists()


@needs_sshd
def test_a_connection_that_is_lost_in_the_middle(kit, server, tmp_path):
    url, options, home, process = server
    graph = kit.folder / "models/dense/model.onnx"
    long = make_kit({"dense": graph}, tmp_path / "long", BenchConfig(threads=1, rounds=10**6, min_seconds=0.0))

    def cut(line):
        if "round 3" in line:
            for child in psutil.Process(process.pid).children(recursive=True):
                # A child that ended between the listing and the look is as good as killed.
                with suppress(psutil.NoSuchProcess):
                    if "sshd" in child.name():
                        child.kill()

    with ssh(url, options) as shell, pytest.raises(TargetError, match="connection was lost"):
        measure_remotely(long, shell, "ssh", sys.executable, progress=ProgressRecord(cut))
    deadline = time.monotonic() + 30
    while runners(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert runners(home) == []


def runners(home):
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        text = " ".join(process.info["cmdline"] or [])
        if "run_kit.py" in text and "--end-with-stdin" in text and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(text)
    return found


@needs_sshd
def test_a_runner_that_is_killed_there(kit, server, tmp_path):
    """As a device without enough memory does it: not a lost connection."""
    url, options, home, _ = server
    graph = kit.folder / "models/dense/model.onnx"
    long = make_kit({"dense": graph}, tmp_path / "long", BenchConfig(threads=1, rounds=10**6, min_seconds=0.0))

    def kill(line):
        if "round 3 " in line:
            for process in psutil.process_iter(["cmdline"]):
                if "run_kit.py" in " ".join((process.info["cmdline"] or [])[1:2]):
                    process.kill()

    with (
        ssh(url, options) as shell,
        pytest.raises(TargetError, match="killed there, most likely because"),
    ):
        measure_remotely(long, shell, "ssh", sys.executable, progress=ProgressRecord(kill))
    assert left_there(home) == []


@needs_sshd
def test_an_error_of_the_watcher_ends_the_command(kit, server, tmp_path):
    url, options, home, _ = server
    graph = kit.folder / "models/dense/model.onnx"
    long = make_kit({"dense": graph}, tmp_path / "long", BenchConfig(threads=1, rounds=10**6, min_seconds=0.0))

    def fail(line):
        if "round 3 " in line:
            raise ArithmeticError("the display is gone")

    with ssh(url, options) as shell, pytest.raises(ArithmeticError, match="display"):
        measure_remotely(long, shell, "ssh", sys.executable, progress=ProgressRecord(fail))
    deadline = time.monotonic() + 30
    while runners(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert runners(home) == []
    assert left_there(home) == []


@needs_sshd
def test_what_is_missing_there(kit, server, tmp_path):
    url, options, _, _ = server
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    with ssh(url, options) as shell:
        with pytest.raises(TargetError, match=r"has no python9; name one with --python"):
            measure_remotely(kit, shell, "ssh", "python9")
        with pytest.raises(TargetError, match=r"No module named 'numpy'; install .* -m pip install onnxruntime numpy"):
            measure_remotely(kit, shell, "ssh", str(bare))


@needs_sshd
def test_a_full_disk_there(kit, server):
    url, options, home, _ = server
    place = home / ".cache/prehab-export/kits/kept"
    place.mkdir(parents=True)
    (place / "README.md.part").symlink_to("/dev/full")  # as good as a full disk
    with ssh(url, options) as shell, pytest.raises(TargetError, match=r"README\.md could not be copied.*No space left"):
        measure_remotely(kit, shell, "ssh", sys.executable, keep=True)


@needs_sshd
def test_wrong_answers_there(kit, server, tmp_path):
    url, options, home, _ = server
    wrong = shutil.copytree(kit.folder, tmp_path / "wrong")
    facts = json.loads((wrong / "kit.json").read_text())
    facts["tolerance"]["same"]["relative"] = -1.0
    (wrong / "kit.json").write_text(json.dumps(facts))
    with ssh(url, options) as shell, pytest.raises(ParityError, match="same is off by"):
        measure_remotely(type(kit)(wrong, facts), shell, "ssh", sys.executable)
    assert left_there(home) == []


@needs_sshd
def test_logins_that_fail(server, tmp_path):
    url, options, _, _ = server
    stranger = tmp_path / "stranger"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(stranger)], check=True)
    with (
        ssh(url, (f"IdentityFile={stranger}", *options[1:])) as shell,
        pytest.raises(TargetError, match="set up a key"),
    ):
        shell.run("true")
    unknown = (options[0], f"UserKnownHostsFile={tmp_path / 'none'}", options[2], "StrictHostKeyChecking=yes")
    with ssh(url, unknown) as shell, pytest.raises(TargetError, match="connect once by hand"):
        shell.run("true")


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client")
def test_hosts_that_are_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ssh(f"ssh://127.0.0.1:{port}") as shell, pytest.raises(TargetError, match="nothing listens there"):
        shell.run("true")
    with ssh("ssh://no-such-host.invalid") as shell, pytest.raises(TargetError, match="the host is unknown"):
        shell.run("true")


@pytest.mark.parametrize(
    "url",
    ["ssh://", "http://host", "ssh://host:port", "ssh://host/folder", "ssh://me:secret@host", "ssh://-oProxyCommand=x"],
)
def test_addresses_that_are_none(url):
    with pytest.raises(InputError), ssh(url):
        pass


def test_no_ssh_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="install OpenSSH"), ssh("ssh://host"):
        pass


# ---- adb: a script in its place, which keeps a phone's files in a folder


def test_hashes_take_a_block_of_memory_not_a_file(tmp_path):
    """A board has less memory than its models are large."""
    big = tmp_path / "models" / "big.bin"
    big.parent.mkdir()
    with big.open("wb") as file:
        file.truncate(400_000_000)
    bare = run_limited([sys.executable, "-c", "import hashlib, json, os"], Limits(memory_mb=100))
    assert bare.code == 0, bare.errors
    done = run_limited([sys.executable, "-c", _HASH_SCRIPT, str(tmp_path)], Limits(memory_mb=100))
    assert done.code == 0, done.errors
    with big.open("rb") as file:
        assert json.loads(done.output) == {"models/big.bin": hashlib.file_digest(file, "sha256").hexdigest()}


FAKE_ADB = """
    import os, shutil, subprocess, sys
    root, words = os.environ["PHONE"], sys.argv[1:]
    if words[:1] == ["-s"]:
        if words[1] != "serial-1":
            sys.exit("error: device '" + words[1] + "' not found")
        words = words[2:]
    there = lambda path: root + path
    if words[0] == "get-state":
        print("device")
    elif words[0] == "shell" and os.path.exists(root + "/unplugged"):
        sys.exit("error: device offline")
    elif words[0] == "shell":
        line = words[1].replace("/data/local/tmp", there("/data/local/tmp"))
        sys.exit(subprocess.run(["sh", "-c", line]).returncode)
    elif words[0] == "push":
        shutil.copyfile(words[1], there(words[2]))
    elif words[0] == "pull":
        shutil.copyfile(there(words[1]), words[2])
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "adb"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{textwrap.dedent(FAKE_ADB)}")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    root = tmp_path / "phone"
    (root / "data/local/tmp").mkdir(parents=True)
    monkeypatch.setenv("PHONE", str(root))
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return root


@pytest.mark.parametrize("serial", [None, "serial-1"])
def test_over_adb_and_nothing_is_left(kit, phone, serial):
    with adb(serial) as shell:
        results = measure_remotely(kit, shell, "adb", sys.executable)
    assert results["place"] == "adb"
    assert [row["model"] for row in results["cases"]] == ["dense", "same"]
    assert left_there(phone) == []


def test_a_device_that_is_not_there(phone):
    with pytest.raises(TargetError, match="serial-2' not found; connect it"), adb("serial-2"):
        pass


def test_a_phone_that_is_unplugged(kit, phone):
    with adb(None) as shell:
        (phone / "unplugged").touch()
        with pytest.raises(TargetError, match="the connection was lost"):
            measure_remotely(kit, shell, "adb", sys.executable)


def test_a_phone_without_python(kit, phone):
    with adb(None) as shell, pytest.raises(TargetError, match="as the kit's README says"):
        measure_remotely(kit, shell, "adb", "python9")


def test_no_adb_here(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="platform tools"), adb(None):
        pass


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "telnet://host"}, "--target must be"),
        ({"name": "kit:"}, "--target must be"),
        ({"name": "adb", "pin": 1}, "--target local"),
        ({"name": "local", "cooldown_s": -1.0}, "--cooldown"),
        ({"name": "local", "pin": 10_000}, "--pin-cores"),
        ({"name": "local", "matrix_memory_mb": (0.0,)}, "--matrix"),
        ({"name": "local", "memory_mb": -3.0}, "leaves nothing"),
    ],
)
def test_targets_that_are_none(options, sentence):
    with pytest.raises(InputError, match=sentence):
        Target(**options)
