// Run a kit with onnxruntime-web: check the outputs, measure the models in turns, show the results and send them back.
// The query sets the options: ?threads=2&rounds=10&provider=wasm, and &auto=1 for a run without a user. The path of the
// page holds a token that the server requires, so every address here is relative.
import * as ort from "./ort/ort.all.min.mjs";

const query = new URLSearchParams(location.search);
const auto = query.has("auto");
const $ = (id) => document.getElementById(id);
const median = (values) => quantile(values, 0.5);

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const position = (sorted.length - 1) * share, low = Math.floor(position);
  return sorted[low] + (position - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

// ---- the kit

async function fetchBytes(path) {
  const response = await fetch(`kit/${path}`);
  if (!response.ok) throw new Error(`${path} is missing from the kit`);
  return new Uint8Array(await response.arrayBuffer());
}

// NumPy's data type → that of onnxruntime-web, and the class of its values.
const TYPES = {
  "<f4": ["float32", Float32Array], "<i8": ["int64", BigInt64Array], "<i4": ["int32", Int32Array],
  "<f2": ["float16", Uint16Array], "|b1": ["bool", Uint8Array],
};

// Read a NumPy file of version 1 or 2: a magic number, the length of the header, the header as a Python literal, the data.
async function loadTensor(path) {
  const bytes = await fetchBytes(path), view = new DataView(bytes.buffer);
  const hasLongHeader = bytes[6] > 1, start = hasLongHeader ? 12 : 10;
  const length = hasLongHeader ? view.getUint32(8, true) : view.getUint16(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(start, start + length));
  const [type, TypedArray] = TYPES[/'descr': '([^']+)'/.exec(header)[1]];
  const dims = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((part) => part.trim()).map(Number);
  return new ort.Tensor(type, new TypedArray(bytes.slice(start + length).buffer), dims);
}

async function loadTensors(entries) {
  return Object.fromEntries(await Promise.all(Object.entries(entries).map(async ([key, path]) => [key, await loadTensor(path)])));
}

async function openSession(kit, model, provider) {
  const folder = model.file.slice(0, model.file.lastIndexOf("/") + 1);
  const dataFiles = Object.keys(kit.files).filter((name) => name.startsWith(folder) && name !== model.file);
  const externalData = await Promise.all(dataFiles.map(async (name) => ({ path: name.slice(folder.length), data: await fetchBytes(name) })));
  const graph = await fetchBytes(model.file);
  const start = performance.now();
  try {
    const session = await ort.InferenceSession.create(graph, { executionProviders: [provider], externalData });
    return { session, loadMs: performance.now() - start };
  } catch (error) {
    throw new Error(`${model.name} does not open on onnxruntime-web ${ort.env.versions.web}: ${error.message ?? error}`);
  }
}

// ---- requests

function nextTokens(logits) {
  const [batch, length, vocabSize] = logits.dims, tokens = [];
  for (let row = 0; row < batch; row++) {
    const start = (row * length + length - 1) * vocabSize;
    let best = 0;
    for (let id = 1; id < vocabSize; id++) if (logits.data[start + id] > logits.data[start + best]) best = id;
    tokens.push(best);
  }
  return tokens;
}

// Serve one request: a run, and for a decoder ``newTokens`` greedy tokens. Returns the outputs of the first run, the tokens
// and the milliseconds of each decode step.
async function request(session, feeds, newTokens) {
  const first = await session.run(feeds), tokens = [], steps = [];
  if (!newTokens) return { first, tokens: null, steps };
  const cacheInputs = session.inputNames.filter((name) => name.startsWith("past_key_values."));
  let outputs = first, length = feeds.attention_mask.dims[1];
  const batch = feeds.attention_mask.dims[0];
  tokens.push(nextTokens(outputs.logits));
  while (tokens.length < newTokens) {
    const start = performance.now();
    length += 1;
    const int64Tensor = (values, dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
    const step = {
      input_ids: int64Tensor(tokens.at(-1), [batch, 1]),
      attention_mask: int64Tensor(new Array(batch * length).fill(1), [batch, length]),
    };
    if (session.inputNames.includes("position_ids")) step.position_ids = int64Tensor(new Array(batch).fill(length - 1), [batch, 1]);
    for (const name of cacheInputs) step[name] = outputs[name.replace("past_key_values.", "present.")];
    outputs = await session.run(step);
    tokens.push(nextTokens(outputs.logits));
    steps.push(performance.now() - start);
  }
  return { first, tokens: tokens[0].map((_, row) => tokens.map((step) => step[row])), steps };
}

// Compare the outputs of a model with the recorded ones.
async function check(kit, model, session) {
  const rows = [];
  for (const kitCase of kit.cases) {
    const { first, tokens } = await request(session, await loadTensors(kitCase.inputs), kitCase.new_tokens);
    for (const [name, expected] of Object.entries(await loadTensors(kitCase.expected[model.slug]))) {
      let maxError = 0, scale = 1e-30;
      const actual = first[name].data;
      for (let i = 0; i < expected.data.length; i++) {
        maxError = Math.max(maxError, Math.abs(actual[i] - expected.data[i]));
        scale = Math.max(scale, Math.abs(expected.data[i]));
      }
      const tolerance = kit.tolerance[model.slug].relative;
      rows.push({
        model: model.name, case: kitCase.name, output: name, max_abs: maxError, relative: maxError / scale, tolerance,
        ok: actual.length === expected.data.length && maxError / scale <= tolerance,
        same_tokens: tokens && JSON.stringify(tokens) === JSON.stringify(kitCase.expected_tokens[model.slug]),
      });
    }
  }
  return rows;
}

// ---- the measurement

async function heapMegabytes() {
  if (!self.crossOriginIsolated || !performance.measureUserAgentSpecificMemory) return null;
  const timeout = new Promise((resolve) => setTimeout(resolve, 20000, null));
  const memory = await Promise.race([performance.measureUserAgentSpecificMemory(), timeout]);
  return memory && memory.bytes / 1e6;
}

async function measure(kit, options) {
  ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
  ort.env.wasm.numThreads = options.threads;
  const models = kit.models.filter((model) => !options.only || model.slug === options.only);
  const result = {
    format: 1, kit: options.digest, place: auto ? "browser" : "by hand", device: await device(options),
    protocol: { ...kit.protocol, ...options },
    parity: [], cases: [], drift: [], comparison: [],
  };
  const entries = []; // a model, its session, and the times of loading and of the first request
  for (const model of models) {
    await say(`${model.name}: opening`);
    const { session, loadMs } = await openSession(kit, model, options.provider);
    const feeds = await loadTensors(kit.cases[0].inputs), start = performance.now();
    await request(session, feeds, kit.cases[0].new_tokens);
    entries.push({ model, session, loadMs, firstMs: performance.now() - start });
    await say(`${model.name}: checking its outputs`);
    result.parity.push(...await check(kit, model, session));
  }
  if (options.only) {
    result.heap_mb = await heapMegabytes();
    return result;
  }
  if (result.parity.some((row) => !row.ok)) return result;
  for (const kitCase of kit.cases) {
    const feeds = await loadTensors(kitCase.inputs);
    const turns = new Map(entries.map(({ model }) => [model, { rounds: [], steps: [] }]));
    for (const { session } of entries)
      for (let i = 0; i < kit.protocol.warmup; i++) await request(session, feeds, kitCase.new_tokens);
    for (let round = 0; round < options.rounds; round++) {
      await say(`${kitCase.name}: round ${round + 1} of ${options.rounds}`);
      for (const { model, session } of round % 2 ? [...entries].reverse() : entries) {
        await new Promise((resolve) => setTimeout(resolve, 1e3 * kit.protocol.cooldown_s));
        const times = [], end = performance.now() + 1e3 * kit.protocol.min_seconds;
        await session.run(feeds); // refills the caches that the other models have used
        do {
          const start = performance.now(), { steps } = await request(session, feeds, kitCase.new_tokens);
          times.push(performance.now() - start);
          turns.get(model).steps.push(...steps);
        } while (performance.now() < end);
        turns.get(model).rounds.push(times);
      }
    }
    addFigures(result, kitCase, entries, turns, options);
  }
  return result;
}

// Add the figures of one case to the result.
function addFigures(result, kitCase, entries, turns, options) {
  const mediansByModel = new Map(entries.map(({ model }) => [model, turns.get(model).rounds.map(median)]));
  const baseline = mediansByModel.get(entries[0].model);
  for (const { model, loadMs, firstMs } of entries) {
    const key = { model: model.name, case: kitCase.name, threads: options.threads };
    const { rounds, steps } = turns.get(model), medians = mediansByModel.get(model), times = rounds.flat();
    const percentiles = Object.fromEntries([50, 90, 95, 99].map((p) => [`p${p}_ms`, quantile(times, p / 100)]));
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    result.cases.push({
      ...key, batch: kitCase.batch, sequence: kitCase.sequence, load_ms: loadMs, first_ms: firstMs, runs: times.length,
      rounds: medians, peak_mb: null, heap_mb: null, tokens_per_s: steps.length ? 1e3 * kitCase.batch / mean(steps) : null,
      ...percentiles,
    });
    const third = Math.max(1, Math.floor(medians.length / 3)), middle = (medians.length - 1) / 2;
    const spread = medians.reduce((sum, _, round) => sum + (round - middle) ** 2, 0) || 1;
    result.drift.push({
      ...key, slope_ms_per_round: medians.reduce((sum, value, round) => sum + (round - middle) * value, 0) / spread,
      last_third_over_first_third: median(medians.slice(-third)) / median(medians.slice(0, third)),
    });
    if (model === entries[0].model || result.protocol.compares === false) continue;
    const ratios = medians.map((value, round) => baseline[round] / value), hasInterval = ratios.length >= 5;
    const resamples = hasInterval && Array.from({ length: 1000 }, () => median(ratios.map(() => ratios[Math.floor(Math.random() * ratios.length)])));
    result.comparison.push({
      ...key, speedup: median(ratios), speedup_low: hasInterval ? quantile(resamples, 0.025) : null,
      speedup_high: hasInterval ? quantile(resamples, 0.975) : null,
    });
  }
}

async function device(options) {
  const adapter = navigator.gpu && await navigator.gpu.requestAdapter();
  return {
    cpu: null, cores: navigator.hardwareConcurrency, memory_mb: navigator.deviceMemory ? 1e3 * navigator.deviceMemory : null,
    os: navigator.userAgentData?.platform || navigator.platform, arch: null, governor: null, python: null,
    runtime: "onnxruntime-web", runtime_version: ort.env.versions.web, providers: [options.provider],
    user_agent: navigator.userAgent, isolated: self.crossOriginIsolated, webgpu: Boolean(adapter),
  };
}

// ---- the page

async function send(kind, body) {
  await fetch(kind, { method: "POST", body });
}

async function say(line) {
  $("status").textContent = line;
  if (auto) await send("progress", line);
  await new Promise((resolve) => setTimeout(resolve)); // lets the page redraw
}

function show(result) {
  const body = $("table").tBodies[0];
  body.replaceChildren();
  for (const row of result.cases) {
    const comparison = result.comparison.find((entry) => entry.model === row.model && entry.case === row.case);
    const maxError = Math.max(...result.parity.filter((entry) => entry.model === row.model).map((entry) => entry.relative));
    const cells = [row.model, row.case, row.load_ms.toFixed(0), row.first_ms.toFixed(1), row.p50_ms.toFixed(2), row.p95_ms.toFixed(2),
      comparison ? `${comparison.speedup.toFixed(2)}×` : "", `±${maxError.toExponential(0)}`];
    body.append(Object.assign(document.createElement("tr"), { innerHTML: cells.map(() => "<td></td>").join("") }));
    cells.forEach((text, column) => { body.lastChild.children[column].textContent = text; });
  }
  $("table").hidden = false;
  $("save").href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }));
  $("save").hidden = false;
}

async function start(kit, digest) {
  $("start").disabled = true;
  const options = {
    threads: Number($("threads").value), rounds: Number($("rounds").value), provider: $("provider").value,
    only: query.get("only"), digest,
  };
  try {
    if (options.threads > 1 && !self.crossOriginIsolated) throw new Error("several threads need an isolated page (https, or localhost)");
    const result = await measure(kit, options), failure = result.parity.find((row) => !row.ok);
    if (failure) throw new Error(`${failure.model} is off by ${failure.relative.toExponential(1)} here; nothing was measured`);
    if (!options.only) show(result);
    $("status").textContent = "Done.";
    await send("results", JSON.stringify(result));
  } catch (error) {
    $("status").textContent = error.message ?? String(error);
    $("status").className = "bad";
    if (auto) await send("failed", error.message ?? String(error));
  }
}

try {
  const text = new TextDecoder().decode(await fetchBytes("kit.json"));
  const kit = JSON.parse(text);
  const hash = self.crypto?.subtle && await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  const digest = hash ? [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, "0")).join("") : "";
  const size = kit.models.reduce((sum, model) => sum + model.bytes, 0);
  $("kit").textContent = `${kit.models.map((model) => model.name).join(", ")}; ${(size / 1e6).toFixed(0)} MB to download`;
  $("threads").max = navigator.hardwareConcurrency;
  $("threads").value = query.get("threads") ?? kit.protocol.threads[0];
  $("rounds").value = query.get("rounds") ?? kit.protocol.rounds;
  if (navigator.gpu) $("provider").add(new Option("GPU (WebGPU)", "webgpu"));
  $("provider").value = query.get("provider") ?? "wasm";
  $("start").disabled = false;
  let hasRun = false;
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (hasRun && Number($("threads").value) !== ort.env.wasm.numThreads) {
      // The first session of a page fixes its number of threads, so another number needs a new page.
      location.search = `?threads=${$("threads").value}&rounds=${$("rounds").value}&provider=${$("provider").value}`;
      return;
    }
    hasRun = true;
    start(kit, digest).finally(() => { $("start").disabled = false; });
  });
  if (auto) start(kit, digest);
} catch (error) {
  $("status").textContent = error.message ?? String(error);
  $("status").className = "bad";
  if (auto) send("failed", error.message ?? String(error));
}
