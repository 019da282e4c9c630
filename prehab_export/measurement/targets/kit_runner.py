"""Measure the models of this kit on this machine. Needs only Python 3.8 or newer, onnxruntime and numpy.

    python run_kit.py                      check all outputs, then measure, and write results.json
    python run_kit.py --check-only         only check the outputs
    python run_kit.py --threads 1 --threads 4 --rounds 30 --cooldown 5

Exit codes: 0 success, 1 an internal error, 2 bad input (a damaged kit, or a runtime that is missing or too old), 3 an
output is out of tolerance and nothing was measured.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FORMAT = 1


class RunnerError(Exception):
    """An error with a message for the user and an exit code."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


try:
    import numpy as np
    import onnxruntime as ort
except ImportError as error:
    sys.exit(f"error: {error}; install what this kit needs: python -m pip install onnxruntime numpy")


# ---- the kit


def read_kit():
    """Read kit.json and check every file of the kit."""
    try:
        kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunnerError(f"kit.json cannot be read ({error}); copy the kit again") from error
    if kit.get("format") != FORMAT:
        raise RunnerError(
            f"this runner reads kits of format {FORMAT}, not {kit.get('format')}; copy the whole kit again"
        )
    for name, facts in kit["files"].items():
        path = HERE / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or digest(path) != facts["sha256"]:
            raise RunnerError(f"{name} is missing or damaged; copy the kit again")
    for model in kit["models"]:
        model["made_with"] = kit["runtime_version"]  # for the message of `open_session`
    return kit


def digest(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            sha.update(part)
    return sha.hexdigest()


def load_arrays(entries):
    return {name: np.load(HERE / file) for name, file in entries.items()}


# ---- one model


def open_session(model, threads):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that spin after a run would slow down the model whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact products on x86 without VNNI
    try:
        return ort.InferenceSession(str(HERE / model["file"]), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunnerError(
            f"{model['name']} does not open on onnxruntime {ort.__version__}: {' '.join(str(error).split())[:300]}; "
            f"the kit was made with onnxruntime {model['made_with']}, install that or a later one"
        ) from error


def request(session, feeds, new_tokens, times=None):
    """Serve one request and return the outputs of its first run and the tokens.

    A request is a run, and for a decoder ``new_tokens`` greedy tokens.

    If ``times`` is a list, the milliseconds of the request and of each decode step are appended to it.
    """
    start = time.perf_counter()
    names = [output.name for output in session.get_outputs()]
    first = dict(zip(names, session.run(None, feeds)))
    steps, tokens = [], []
    if new_tokens:
        input_names = [node.name for node in session.get_inputs()]
        cache_inputs = [name for name in input_names if name.startswith("past_key_values.")]
        mask, outputs = feeds["attention_mask"], first
        tokens.append(outputs["logits"][:, -1].argmax(-1))
        while len(tokens) < new_tokens:
            step_start = time.perf_counter()
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            step = {"input_ids": tokens[-1][:, None].astype(np.int64), "attention_mask": mask}
            if "position_ids" in input_names:
                step["position_ids"] = mask.sum(1, keepdims=True) - 1
            step.update({name: outputs[name.replace("past_key_values.", "present.", 1)] for name in cache_inputs})
            outputs = dict(zip(names, session.run(None, step)))
            tokens.append(outputs["logits"][:, -1].argmax(-1))
            steps.append(1e3 * (time.perf_counter() - step_start))
    if times is not None:
        times.append((1e3 * (time.perf_counter() - start), steps))
    return first, np.stack(tokens, 1) if tokens else None


# ---- parity


def check(kit, models, cases, threads):
    """Compare the outputs of each model with the recorded ones, and return one row for each output."""
    rows = []
    for model in models:
        session = open_session(model, threads)
        for case in cases:
            outputs, tokens = request(session, load_arrays(case["inputs"]), case["new_tokens"])
            tolerance = kit["tolerance"][model["slug"]]["relative"]
            for name, expected in load_arrays(case["expected"][model["slug"]]).items():
                output = outputs[name].astype(np.float64)
                max_error = float(np.abs(output - expected).max())
                relative = max_error / max(float(np.abs(expected).max()), 1e-30)
                same_tokens = None if tokens is None else tokens.tolist() == case["expected_tokens"][model["slug"]]
                rows.append(
                    {
                        "model": model["name"], "case": case["name"], "output": name,
                        "max_abs": max_error, "relative": relative, "tolerance": tolerance,
                        "ok": bool(relative <= tolerance), "same_tokens": same_tokens,
                    }
                )  # fmt: skip
                say(
                    f"{model['name']}, {case['name']}: {name} is off by {relative:.1e} of its largest value; "
                    f"{tolerance:.0e} is allowed"
                )
    return rows


# ---- measurement


def measure(models, cases, protocol):
    """Measure the models in turns, for each number of threads and each case."""
    rows, drifts, comparison = [], [], []
    for threads in protocol["threads"]:
        for case in cases:
            feeds = load_arrays(case["inputs"])
            load_ms, sessions, first_ms = {}, {}, {}
            for model in models:
                start = time.perf_counter()
                sessions[model["slug"]] = open_session(model, threads)
                load_ms[model["slug"]] = 1e3 * (time.perf_counter() - start)
                start = time.perf_counter()
                request(sessions[model["slug"]], feeds, case["new_tokens"])
                first_ms[model["slug"]] = 1e3 * (time.perf_counter() - start)
                for _ in range(protocol["warmup"]):
                    request(sessions[model["slug"]], feeds, case["new_tokens"])
            rounds = {model["slug"]: [] for model in models}
            for number in range(protocol["rounds"]):
                say(f"{case['name']}, {threads} thread(s): round {number + 1} of {protocol['rounds']}")
                for model in models if number % 2 == 0 else models[::-1]:
                    time.sleep(protocol["cooldown_s"])
                    rounds[model["slug"]].append(turn(sessions[model["slug"]], feeds, case, protocol["min_seconds"]))
            medians = {
                slug: [float(np.median([total for total, _ in times])) for times in turns]
                for slug, turns in rounds.items()
            }
            for model in models:
                slug, key = model["slug"], {"model": model["name"], "case": case["name"], "threads": threads}
                totals = np.array([total for times in rounds[slug] for total, _ in times])
                steps = [step for times in rounds[slug] for _, request_steps in times for step in request_steps]
                rows.append(
                    dict(
                        key, batch=case["batch"], sequence=case["sequence"], load_ms=load_ms[slug],
                        first_ms=first_ms[slug], runs=len(totals), rounds=medians[slug], heap_mb=None, peak_mb=None,
                        tokens_per_s=1e3 * case["batch"] / float(np.mean(steps)) if steps else None,
                        **{f"p{p}_ms": float(np.percentile(totals, p)) for p in (50, 90, 95, 99)},
                    )
                )  # fmt: skip
                drifts.append(dict(key, **drift(medians[slug])))
                if model is not models[0] and protocol.get("compares", True):
                    comparison.append(dict(key, **compare(medians[models[0]["slug"]], medians[slug])))
    return {"cases": rows, "drift": drifts, "comparison": comparison}


def turn(session, feeds, case, seconds):
    """Serve requests for a number of seconds and return their times."""
    request(session, feeds, 0)  # refills the caches that the other models have used
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        request(session, feeds, case["new_tokens"], times)
    return times


def drift(medians):
    """Return how much a model slows down as the machine heats up: the slope over rounds, and last third over first."""
    third = max(1, len(medians) // 3)
    slope = float(np.polyfit(range(len(medians)), medians, 1)[0]) if len(medians) > 1 else 0.0
    ratio = float(np.median(medians[-third:]) / np.median(medians[:third]))
    return {"slope_ms_per_round": slope, "last_third_over_first_third": ratio}


def compare(base, model):
    """Return the speedup over the baseline, which is the median ratio over rounds, with its 95% bootstrap interval."""
    ratios, generator = np.array(base) / np.array(model), np.random.default_rng(0)
    low = high = None
    if len(ratios) >= 5:
        draws = np.median(ratios[generator.integers(0, len(ratios), (1000, len(ratios)))], axis=1)
        low, high = (float(value) for value in np.quantile(draws, (0.025, 0.975)))
    return {"speedup": float(np.median(ratios)), "speedup_low": low, "speedup_high": high}


# ---- memory, with one process for each model


def memory(models, cases, threads):
    """Return the peak resident MB of each model, in a fresh process that serves all cases; None where unknown."""
    import subprocess

    peaks = {}
    for model in models:
        command = [sys.executable, str(HERE / "run_kit.py"), "--memory", model["slug"], "--threads", str(threads)]
        command += [part for case in cases for part in ("--case", case["name"])]
        # The pipe closes when this process ends for any reason, and the child ends with it.
        child = subprocess.Popen(
            [*command, "--end-with-stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        output = child.stdout.read().decode().strip()
        child.stdin.close()
        peaks[model["name"]] = float(output) if child.wait() == 0 and output else None
    return peaks


def serve_and_report_peak(model, cases, threads):
    """Serve all cases, and return the peak resident MB of this process, or an empty string where it is unknown."""
    session = open_session(model, threads)
    for case in cases:
        for _ in range(2):
            request(session, load_arrays(case["inputs"]), case["new_tokens"])
    peak = kib_to_mb(read_field("/proc/self/status", ("VmHWM",)))
    return "" if peak is None else peak


# ---- the machine


def device():
    return {
        "cpu": read_field("/proc/cpuinfo", ("model name", "Hardware", "uarch")) or platform.processor() or None,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_mb": kib_to_mb(read_field("/proc/meminfo", ("MemTotal",))),
        "os": platform.platform(),
        "arch": platform.machine(),
        "governor": read_file("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "runtime": "onnxruntime",
        "runtime_version": ort.__version__,
        "providers": ort.get_available_providers(),
        "numpy": np.__version__,
    }


def read_file(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_field(path, keys):
    """Return the value of the first ``key: value`` line in a file that has one of the keys."""
    for line in (read_file(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return None


def kib_to_mb(text):
    """Convert a text such as "1024 kB" of /proc, which means KiB, to MB (10⁶ bytes)."""
    return None if text is None else int(text.split()[0]) * 1024 / 1e6


# ---- the command


def say(line):
    print(line, file=sys.stderr, flush=True)


def end_with_stdin():
    """End this process when its stdin closes, as it does when the connection that started it is lost."""

    def wait():
        while sys.stdin.read(1):
            pass
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def select(entries, key, names):
    """Return the entries with the given names, or all entries if no names are given."""
    known = [entry[key] for entry in entries]
    for name in names or ():
        if name not in known:
            raise RunnerError(f"the kit has no {name}; it has {', '.join(known)}")
    return [entry for entry in entries if not names or entry[key] in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="number of threads; can be repeated")
    parser.add_argument("--rounds", type=int, help="number of turns of each model")
    parser.add_argument("--cooldown", type=float, help="seconds of rest before each turn")
    parser.add_argument("--model", action="append", help="measure only this model (its folder name); can be repeated")
    parser.add_argument("--case", action="append", help="measure only this case; can be repeated")
    parser.add_argument("--check-only", action="store_true", help="only check the outputs")
    parser.add_argument("--end-with-stdin", action="store_true", help="stop when standard input is closed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--place", default="by hand", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="results.json", help="file to write the results to")
    options = parser.parse_args()
    if options.end_with_stdin:
        end_with_stdin()
    try:
        kit = read_kit()
        protocol = dict(kit["protocol"])
        protocol["threads"] = options.threads or protocol["threads"]
        protocol["rounds"] = protocol["rounds"] if options.rounds is None else options.rounds
        protocol["cooldown_s"] = protocol["cooldown_s"] if options.cooldown is None else options.cooldown
        if min(*protocol["threads"], protocol["rounds"]) < 1 or protocol["cooldown_s"] < 0:
            raise RunnerError("threads and rounds must be 1 or more, and the cool-down 0 or more")
        models = select(kit["models"], "slug", options.model)
        cases = select(kit["cases"], "name", options.case)
        if options.memory:
            model = select(kit["models"], "slug", [options.memory])[0]
            print(serve_and_report_peak(model, cases, protocol["threads"][0]))
            return 0
        result = {
            "format": FORMAT, "kit": digest(HERE / "kit.json"), "place": options.place, "device": device(),
            "protocol": protocol, "parity": check(kit, models, cases, protocol["threads"][0]),
            "cases": [], "drift": [], "comparison": [],
        }  # fmt: skip
        failures = [row for row in result["parity"] if not row["ok"]]
        if not failures and not options.check_only:
            result.update(measure(models, cases, protocol))
            if not options.no_memory:
                peaks = {threads: memory(models, cases, threads) for threads in protocol["threads"]}
                for row in result["cases"]:
                    row["peak_mb"] = peaks[row["threads"]][row["model"]]
        write(Path(options.out), result)
        if failures:
            row = failures[0]
            raise RunnerError(f"{row['model']} is off by {row['relative']:.1e} here; nothing was measured", 3)
    except RunnerError as error:
        say(f"error: {error}")
        return error.code
    say(f"results written to {options.out}")
    return 0


def write(path, result):
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise RunnerError(f"{path} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
