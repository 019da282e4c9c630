// Runs a kit with onnxruntime-web: checks the answers, measures the models in turns, shows and hands back the figures.
// The address says how: ?threads=2&rounds=10&provider=wasm, and &auto=1 for a run that nobody watches. Its path holds a
// token, without which nothing is served and nothing taken, so every address here is relative to it.
import * as ort from "./ort/ort.all.min.mjs";

const query = new URLSearchParams(location.search);
const auto = query.has("auto");
const $ = (id) => document.getElementById(id);
const median = (values) => quantile(values, 0.5);

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const at = (sorted.length - 1) * share, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

// ---- the kit

async function bytesOf(path) {
  const answer = await fetch(`kit/${path}`);
  if (!answer.ok) throw new Error(`${path} is missing from the kit`);
  return new Uint8Array(await answer.arrayBuffer());
}

const KINDS = {
  "<f4": ["float32", Float32Array], "<i8": ["int64", BigInt64Array], "<i4": ["int32", Int32Array],
  "<f2": ["float16", Uint16Array], "|b1": ["bool", Uint8Array],
};

// NumPy's format, version 1 and 2: a magic number, the length of a header in Python's syntax, the header, the numbers.
async function tensorOf(path) {
  const bytes = await bytesOf(path), view = new DataView(bytes.buffer);
  const wide = bytes[6] > 1, start = wide ? 12 : 10;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const [type, Numbers] = KINDS[/'descr': '([^']+)'/.exec(header)[1]];
  const dims = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((part) => part.trim()).map(Number);
  return new ort.Tensor(type, new Numbers(bytes.slice(start + length).buffer), dims);
}

async function tensorsOf(entries) {
  return Object.fromEntries(await Promise.all(Object.entries(entries).map(async ([key, path]) => [key, await tensorOf(path)])));
}

async function open(kit, model, provider) {
  const folder = model.file.slice(0, model.file.lastIndexOf("/") + 1);
  const others = Object.keys(kit.files).filter((name) => name.startsWith(folder) && name !== model.file);
  const externalData = await Promise.all(others.map(async (name) => ({ path: name.slice(folder.length), data: await bytesOf(name) })));
  const graph = await bytesOf(model.file);
  const started = performance.now();
  try {
    const session = await ort.InferenceSession.create(graph, { executionProviders: [provider], externalData });
    return { session, load: performance.now() - started };
  } catch (error) {
    throw new Error(`${model.name} does not open on onnxruntime-web ${ort.env.versions.web}: ${error.message ?? error}`);
  }
}

// ---- requests

function nextTokens(logits) {
  const [batch, length, words] = logits.dims, tokens = [];
  for (let row = 0; row < batch; row++) {
    const start = (row * length + length - 1) * words;
    let best = 0;
    for (let word = 1; word < words; word++) if (logits.data[start + word] > logits.data[start + best]) best = word;
    tokens.push(best);
  }
  return tokens;
}

// One request: a run, and for a decoder so many greedy tokens after it.
async function request(session, feeds, count) {
  const first = await session.run(feeds), tokens = [], steps = [];
  if (!count) return { first, tokens: null, steps };
  const past = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  let outputs = first, length = feeds.attention_mask.dims[1];
  const batch = feeds.attention_mask.dims[0];
  tokens.push(nextTokens(outputs.logits));
  while (tokens.length < count) {
    const before = performance.now();
    length += 1;
    const whole = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
    const step = {
      input_ids: whole(tokens.at(-1), [batch, 1]),
      attention_mask: whole(new Array(batch * length).fill(1), [batch, length]),
    };
    if (session.inputNames.includes("position_ids")) step.position_ids = whole(new Array(batch).fill(length - 1), [batch, 1]);
    for (const name of past) step[name] = outputs[name.replace("past_key_values.", "present.")];
    outputs = await session.run(step);
    tokens.push(nextTokens(outputs.logits));
    steps.push(performance.now() - before);
  }
  return { first, tokens: tokens[0].map((_, row) => tokens.map((step) => step[row])), steps };
}

async function check(kit, model, session, cases) {
  const rows = [];
  for (const one of cases) {
    const { first, tokens } = await request(session, await tensorsOf(one.inputs), one.new_tokens);
    for (const [name, expected] of Object.entries(await tensorsOf(one.expected[model.slug]))) {
      let largest = 0, scale = 1e-30;
      const found = first[name].data;
      for (let at = 0; at < expected.data.length; at++) {
        largest = Math.max(largest, Math.abs(found[at] - expected.data[at]));
        scale = Math.max(scale, Math.abs(expected.data[at]));
      }
      const allowed = kit.tolerance[model.slug].relative;
      rows.push({
        model: model.name, case: one.name, output: name, max_abs: largest, relative: largest / scale, tolerance: allowed,
        ok: found.length === expected.data.length && largest / scale <= allowed,
        same_tokens: tokens && JSON.stringify(tokens) === JSON.stringify(one.expected_tokens[model.slug]),
      });
    }
  }
  return rows;
}

// ---- the measurement

async function heapMegabytes() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const late = new Promise((resolve) => setTimeout(resolve, 20000, null));
  const measured = await Promise.race([performance.measureUserAgentSpecificMemory(), late]);
  return measured && measured.bytes / 1e6;
}

async function measured(kit, asked) {
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  ort.env.wasm.numThreads = asked.threads;
  const models = kit.models.filter((model) => !asked.only || model.slug === asked.only);
  const result = {
    format: 1, kit: asked.digest, place: auto ? "browser" : "by hand", device: await device(asked), protocol: { ...kit.protocol, ...asked },
    parity: [], cases: [], drift: [], comparison: [],
  };
  const opened = [];
  for (const model of models) {
    await say(`${model.name}: opening`);
    const { session, load } = await open(kit, model, asked.provider);
    const feeds = await tensorsOf(kit.cases[0].inputs), started = performance.now();
    await request(session, feeds, kit.cases[0].new_tokens);
    opened.push({ model, session, load, first: performance.now() - started });
    await say(`${model.name}: checking its answers`);
    result.parity.push(...await check(kit, model, session, kit.cases));
  }
  if (asked.only) {
    result.heap_mb = await heapMegabytes();
    return result;
  }
  if (result.parity.some((row) => !row.ok)) return result;
  for (const one of kit.cases) {
    const feeds = await tensorsOf(one.inputs), turns = new Map(opened.map(({ model }) => [model, { rounds: [], steps: [] }]));
    for (const { session } of opened)
      for (let at = 0; at < kit.protocol.warmup; at++) await request(session, feeds, one.new_tokens);
    for (let round = 0; round < asked.rounds; round++) {
      await say(`${one.name}: round ${round + 1} of ${asked.rounds}`);
      for (const { model, session } of round % 2 ? [...opened].reverse() : opened) {
        await new Promise((resolve) => setTimeout(resolve, 1e3 * kit.protocol.cooldown_s));
        const times = [], end = performance.now() + 1e3 * kit.protocol.min_seconds;
        await session.run(feeds); // brings back what the others have pushed out of the caches
        do {
          const before = performance.now(), { steps } = await request(session, feeds, one.new_tokens);
          times.push(performance.now() - before);
          turns.get(model).steps.push(...steps);
        } while (performance.now() < end);
        turns.get(model).rounds.push(times);
      }
    }
    report(result, one, opened, turns, asked);
  }
  return result;
}

function report(result, one, opened, turns, asked) {
  const medians = new Map(opened.map(({ model }) => [model, turns.get(model).rounds.map(median)]));
  const base = medians.get(opened[0].model);
  for (const { model, load, first } of opened) {
    const key = { model: model.name, case: one.name, threads: asked.threads };
    const { rounds, steps } = turns.get(model), own = medians.get(model), every = rounds.flat();
    const percentiles = Object.fromEntries([50, 90, 95, 99].map((p) => [`p${p}_ms`, quantile(every, p / 100)]));
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    result.cases.push({
      ...key, batch: one.batch, sequence: one.sequence, load_ms: load, first_ms: first, runs: every.length, rounds: own,
      peak_mb: null, heap_mb: null, tokens_per_s: steps.length ? 1e3 * one.batch / mean(steps) : null, ...percentiles,
    });
    const third = Math.max(1, Math.floor(own.length / 3)), middle = (own.length - 1) / 2;
    const spread = own.reduce((sum, _, at) => sum + (at - middle) ** 2, 0) || 1;
    result.drift.push({
      ...key, slope_ms_per_round: own.reduce((sum, value, at) => sum + (at - middle) * value, 0) / spread,
      last_third_over_first_third: median(own.slice(-third)) / median(own.slice(0, third)),
    });
    if (model === opened[0].model) continue;
    const ratios = own.map((value, at) => base[at] / value), enough = ratios.length >= 5;
    const drawn = enough && Array.from({ length: 1000 }, () => median(ratios.map(() => ratios[Math.floor(Math.random() * ratios.length)])));
    result.comparison.push({
      ...key, speedup: median(ratios), speedup_low: enough ? quantile(drawn, 0.025) : null,
      speedup_high: enough ? quantile(drawn, 0.975) : null,
    });
  }
}

async function device(asked) {
  const adapter = navigator.gpu && await navigator.gpu.requestAdapter();
  return {
    cpu: null, cores: navigator.hardwareConcurrency, memory_mb: navigator.deviceMemory ? 1e3 * navigator.deviceMemory : null,
    os: navigator.userAgentData?.platform || navigator.platform, arch: null, governor: null, python: null,
    runtime: "onnxruntime-web", runtime_version: ort.env.versions.web, providers: [asked.provider],
    user_agent: navigator.userAgent, isolated: self.crossOriginIsolated, webgpu: Boolean(adapter),
  };
}

// ---- the page

async function send(what, body) {
  await fetch(what, { method: "POST", body });
}

async function say(line) {
  $("status").textContent = line;
  if (auto) await send("progress", line);
  await new Promise((resolve) => setTimeout(resolve)); // let the page draw
}

function show(result) {
  const body = $("table").tBodies[0];
  body.replaceChildren();
  for (const row of result.cases) {
    const faster = result.comparison.find((entry) => entry.model === row.model && entry.case === row.case);
    const worst = Math.max(...result.parity.filter((entry) => entry.model === row.model).map((entry) => entry.relative));
    const cells = [row.model, row.case, row.load_ms.toFixed(0), row.first_ms.toFixed(1), row.p50_ms.toFixed(2), row.p95_ms.toFixed(2),
      faster ? `${faster.speedup.toFixed(2)}×` : "", `±${worst.toExponential(0)}`];
    body.append(Object.assign(document.createElement("tr"), { innerHTML: cells.map(() => "<td></td>").join("") }));
    cells.forEach((text, at) => { body.lastChild.children[at].textContent = text; });
  }
  $("table").hidden = false;
  $("save").href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }));
  $("save").hidden = false;
}

async function start(kit, digest) {
  $("start").disabled = true;
  const asked = {
    threads: Number($("threads").value), rounds: Number($("rounds").value), provider: $("provider").value, only: query.get("only"), digest,
  };
  try {
    if (asked.threads > 1 && !self.crossOriginIsolated) throw new Error("several threads need a page that is isolated (https, or localhost)");
    const result = await measured(kit, asked), wrong = result.parity.find((row) => !row.ok);
    if (wrong) throw new Error(`${wrong.model} is off by ${wrong.relative.toExponential(1)} here; nothing was measured`);
    if (!asked.only) show(result);
    $("status").textContent = "Done.";
    await send("results", JSON.stringify(result));
  } catch (error) {
    $("status").textContent = error.message ?? String(error);
    $("status").className = "bad";
    if (auto) await send("failed", error.message ?? String(error));
  }
}

try {
  const text = new TextDecoder().decode(await bytesOf("kit.json"));
  const kit = JSON.parse(text);
  const hash = self.crypto?.subtle && await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  const digest = hash ? [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, "0")).join("") : "";
  const size = kit.models.reduce((sum, model) => sum + model.bytes, 0);
  $("kit").textContent = `${kit.models.map((model) => model.name).join(", ")}; ${(size / 1e6).toFixed(0)} MB to fetch`;
  $("threads").max = navigator.hardwareConcurrency;
  $("threads").value = query.get("threads") ?? kit.protocol.threads[0];
  $("rounds").value = query.get("rounds") ?? kit.protocol.rounds;
  if (navigator.gpu) $("provider").add(new Option("GPU (WebGPU)", "webgpu"));
  $("provider").value = query.get("provider") ?? "wasm";
  $("start").disabled = false;
  let ran = false;
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (ran && Number($("threads").value) !== ort.env.wasm.numThreads) {
      // The number of threads is fixed with the first session of a page.
      location.search = `?threads=${$("threads").value}&rounds=${$("rounds").value}&provider=${$("provider").value}`;
      return;
    }
    ran = true;
    start(kit, digest).finally(() => { $("start").disabled = false; });
  });
  if (auto) start(kit, digest);
} catch (error) {
  $("status").textContent = error.message ?? String(error);
  $("status").className = "bad";
  if (auto) send("failed", error.message ?? String(error));
}
