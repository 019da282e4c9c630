"""Measures the models of this kit on this machine. Needs Python 3.8, onnxruntime and numpy, nothing else.

    python run_kit.py                      check all answers, then measure, and write results.json
    python run_kit.py --check-only         answers only
    python run_kit.py --threads 1 --threads 4 --rounds 30 --cooldown 5

Exit codes: 0 done, 1 a defect, 2 bad input (a damaged kit, a runtime that is missing or too old), 3 an answer is out of
tolerance and nothing was measured.
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


class Refused(Exception):
    """A sentence for the user, and an exit code."""

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
    try:
        kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"kit.json cannot be read ({error}); copy the kit again") from error
    if kit.get("format") != FORMAT:
        raise Refused(f"this runner reads kits of format {FORMAT}, not {kit.get('format')}; copy the whole kit again")
    for name, facts in kit["files"].items():
        path = HERE / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or digest(path) != facts["sha256"]:
            raise Refused(f"{name} is missing or damaged; copy the kit again")
    for model in kit["models"]:
        model["made_with"] = kit["runtime_version"]
    return kit


def digest(path):
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            sha.update(part)
    return sha.hexdigest()


def arrays(entries):
    return {name: np.load(HERE / file) for name, file in entries.items()}


# ---- one model


def opened(model, threads):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that go on spinning after a run would take the cores from the model whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(HERE / model["file"]), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise Refused(
            f"{model['name']} does not open on onnxruntime {ort.__version__}: {' '.join(str(error).split())[:300]}; "
            f"the kit was made with onnxruntime {model['made_with']}, install that or a later one"
        ) from error


def request(session, feeds, new_tokens, times=None):
    """One request: a run, and for a decoder ``new_tokens`` greedy tokens. Returns the first outputs and the tokens."""
    start = time.perf_counter()
    names = [output.name for output in session.get_outputs()]
    first = dict(zip(names, session.run(None, feeds)))
    steps, tokens = [], []
    if new_tokens:
        past = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        wanted = {i.name for i in session.get_inputs()}
        mask, outputs = feeds["attention_mask"], first
        tokens.append(outputs["logits"][:, -1].argmax(-1))
        while len(tokens) < new_tokens:
            before = time.perf_counter()
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            step = {"input_ids": tokens[-1][:, None].astype(np.int64), "attention_mask": mask}
            if "position_ids" in wanted:
                step["position_ids"] = mask.sum(1, keepdims=True) - 1
            step.update({name: outputs[name.replace("past_key_values.", "present.", 1)] for name in past})
            outputs = dict(zip(names, session.run(None, step)))
            tokens.append(outputs["logits"][:, -1].argmax(-1))
            steps.append(1e3 * (time.perf_counter() - before))
    if times is not None:
        times.append((1e3 * (time.perf_counter() - start), steps))
    return first, np.stack(tokens, 1) if tokens else None


# ---- parity


def check(kit, models, cases, threads):
    rows = []
    for model in models:
        session = opened(model, threads)
        for case in cases:
            outputs, tokens = request(session, arrays(case["inputs"]), case["new_tokens"])
            allowed = kit["tolerance"][model["slug"]]["relative"]
            for name, expected in arrays(case["expected"][model["slug"]]).items():
                got = outputs[name].astype(np.float64)
                largest = float(np.abs(got - expected).max())
                relative = largest / max(float(np.abs(expected).max()), 1e-30)
                same = None if tokens is None else tokens.tolist() == case["expected_tokens"][model["slug"]]
                rows.append(
                    {
                        "model": model["name"], "case": case["name"], "output": name,
                        "max_abs": largest, "relative": relative, "tolerance": allowed,
                        "ok": bool(relative <= allowed), "same_tokens": same,
                    }
                )  # fmt: skip
                where = f"{model['name']}, {case['name']}"
                say(f"{where}: {name} is off by {relative:.1e} of its largest; {allowed:.0e} is allowed")
    return rows


# ---- measurement


def measure(models, cases, protocol):
    rows, drifts, comparison = [], [], []
    for threads in protocol["threads"]:
        for case in cases:
            feeds = arrays(case["inputs"])
            loads, sessions, first = {}, {}, {}
            for model in models:
                start = time.perf_counter()
                sessions[model["slug"]] = opened(model, threads)
                loads[model["slug"]] = 1e3 * (time.perf_counter() - start)
                start = time.perf_counter()
                request(sessions[model["slug"]], feeds, case["new_tokens"])
                first[model["slug"]] = 1e3 * (time.perf_counter() - start)
                for _ in range(protocol["warmup"]):
                    request(sessions[model["slug"]], feeds, case["new_tokens"])
            rounds = {model["slug"]: [] for model in models}
            for number in range(protocol["rounds"]):
                say(f"{case['name']}, {threads} thread(s): round {number + 1} of {protocol['rounds']}")
                for model in models if number % 2 == 0 else models[::-1]:
                    time.sleep(protocol["cooldown_s"])
                    rounds[model["slug"]].append(turn(sessions[model["slug"]], feeds, case, protocol["min_seconds"]))
            medians = {slug: [float(np.median([t for t, _ in own])) for own in turns] for slug, turns in rounds.items()}
            for model in models:
                slug, key = model["slug"], {"model": model["name"], "case": case["name"], "threads": threads}
                total = np.array([t for own in rounds[slug] for t, _ in own])
                steps = [step for own in rounds[slug] for _, taken in own for step in taken]
                rows.append(
                    dict(
                        key, batch=case["batch"], sequence=case["sequence"], load_ms=loads[slug], first_ms=first[slug],
                        runs=len(total), rounds=medians[slug], heap_mb=None, peak_mb=None,
                        tokens_per_s=1e3 * case["batch"] / float(np.mean(steps)) if steps else None,
                        **{f"p{p}_ms": float(np.percentile(total, p)) for p in (50, 90, 95, 99)},
                    )
                )  # fmt: skip
                drifts.append(dict(key, **drift(medians[slug])))
                if model is not models[0]:
                    comparison.append(dict(key, **compared(medians[models[0]["slug"]], medians[slug])))
    return {"cases": rows, "drift": drifts, "comparison": comparison}


def turn(session, feeds, case, seconds):
    request(session, feeds, 0)  # brings back what the others have pushed out of the caches
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        request(session, feeds, case["new_tokens"], times)
    return times


def drift(medians):
    """A machine that grows warm grows slow: the slope over the rounds, and the last third against the first."""
    third = max(1, len(medians) // 3)
    slope = float(np.polyfit(range(len(medians)), medians, 1)[0]) if len(medians) > 1 else 0.0
    ratio = float(np.median(medians[-third:]) / np.median(medians[:third]))
    return {"slope_ms_per_round": slope, "last_third_over_first_third": ratio}


def compared(base, own):
    """Baseline over model: the median of the rounds' ratios, and what 95% of resampled rounds give."""
    ratios, generator = np.array(base) / np.array(own), np.random.default_rng(0)
    low = high = None
    if len(ratios) >= 5:
        draws = np.median(ratios[generator.integers(0, len(ratios), (1000, len(ratios)))], axis=1)
        low, high = (float(value) for value in np.quantile(draws, (0.025, 0.975)))
    return {"speedup": float(np.median(ratios)), "speedup_low": low, "speedup_high": high}


# ---- memory: a process for each model


def memory(models, cases, threads):
    """Peak resident memory of a fresh process with one model that serves its largest case; None where unknown."""
    import subprocess

    peaks = {}
    for model in models:
        command = [sys.executable, str(HERE / "run_kit.py"), "--memory", model["slug"], "--threads", str(threads)]
        command += [part for case in cases for part in ("--case", case["name"])]
        # A pipe that closes when this process ends, however it ends, so that no child is left behind.
        child = subprocess.Popen(
            [*command, "--end-with-stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        output = child.stdout.read().decode().strip()
        child.stdin.close()
        peaks[model["name"]] = float(output) if child.wait() == 0 and output else None
    return peaks


def own_peak(model, cases, threads):
    session = opened(model, threads)
    for case in cases:
        for _ in range(2):
            request(session, arrays(case["inputs"]), case["new_tokens"])
    peak = kilobytes(first_of("/proc/self/status", ("VmHWM",)))
    return "" if peak is None else peak


# ---- the machine


def device():
    return {
        "cpu": first_of("/proc/cpuinfo", ("model name", "Hardware", "uarch")) or platform.processor() or None,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_mb": kilobytes(first_of("/proc/meminfo", ("MemTotal",))),
        "os": platform.platform(),
        "arch": platform.machine(),
        "governor": text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "python": platform.python_version(),
        "runtime": "onnxruntime",
        "runtime_version": ort.__version__,
        "providers": ort.get_available_providers(),
        "numpy": np.__version__,
    }


def text_of(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def first_of(path, keys):
    for line in (text_of(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return None


def kilobytes(text):
    return None if text is None else int(text.split()[0]) * 1024 / 1e6


# ---- the command


def say(line):
    print(line, file=sys.stderr, flush=True)


def end_with_stdin():
    """A runner that was started over a connection ends with it."""

    def wait():
        while sys.stdin.read(1):
            pass
        os._exit(130)

    threading.Thread(target=wait, daemon=True).start()


def chosen(entries, key, wanted):
    known = [entry[key] for entry in entries]
    for name in wanted or ():
        if name not in known:
            raise Refused(f"the kit has no {name}; it has {', '.join(known)}")
    return [entry for entry in entries if not wanted or entry[key] in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="threads of the runtime; repeat for more")
    parser.add_argument("--rounds", type=int, help="turns of each model")
    parser.add_argument("--cooldown", type=float, help="seconds of rest before each turn")
    parser.add_argument("--model", action="append", help="only this model (its folder's name)")
    parser.add_argument("--case", action="append", help="only this case")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--end-with-stdin", action="store_true", help="stop as soon as standard input is closed")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--place", default="by hand", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="results.json")
    asked = parser.parse_args()
    if asked.end_with_stdin:
        end_with_stdin()
    try:
        kit = read_kit()
        protocol = dict(kit["protocol"])
        protocol["threads"] = asked.threads or protocol["threads"]
        protocol["rounds"] = protocol["rounds"] if asked.rounds is None else asked.rounds
        protocol["cooldown_s"] = protocol["cooldown_s"] if asked.cooldown is None else asked.cooldown
        if min(*protocol["threads"], protocol["rounds"]) < 1 or protocol["cooldown_s"] < 0:
            raise Refused("threads and rounds must be 1 or more, and the cool-down 0 or more")
        models = chosen(kit["models"], "slug", asked.model)
        cases = chosen(kit["cases"], "name", asked.case)
        if asked.memory:
            print(own_peak(chosen(kit["models"], "slug", [asked.memory])[0], cases, protocol["threads"][0]))
            return 0
        result = {
            "format": FORMAT, "kit": digest(HERE / "kit.json"), "place": asked.place, "device": device(),
            "protocol": protocol, "parity": check(kit, models, cases, protocol["threads"][0]),
            "cases": [], "drift": [], "comparison": [],
        }  # fmt: skip
        wrong = [row for row in result["parity"] if not row["ok"]]
        if not wrong and not asked.check_only:
            result.update(measure(models, cases, protocol))
            if not asked.no_memory:
                peaks = {threads: memory(models, cases, threads) for threads in protocol["threads"]}
                for row in result["cases"]:
                    row["peak_mb"] = peaks[row["threads"]][row["model"]]
        write(Path(asked.out), result)
        if wrong:
            raise Refused(f"{wrong[0]['model']} is off by {wrong[0]['relative']:.1e} here; nothing was measured", 3)
    except Refused as error:
        say(f"error: {error}")
        return error.code
    say(f"written: {asked.out}")
    return 0


def write(path, result):
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise Refused(f"{path} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
