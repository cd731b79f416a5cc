"use strict";
// Draws what Python packed. One state (metric, step, chosen head); each control changes it and redraws what depends on it.

const ALARM = "#D55E00", CHOSEN = "#0072B2", CROWD = "#9aa1a9", BAND = "53,96,141", INK = "#22262b", FAINT = "#6a7078";
const KIND_COLOURS = ["#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9", "#000000"];
const MOST_CURVES = 256, MOST_TIMELINE_ROWS = 40;
const CONFIG = { displayModeBar: false, responsive: true };

const runs = JSON.parse(document.getElementById("numbers").textContent).runs;
const state = { metric: null, step: 0, layer: null, head: null, scope: "query_head" };

const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const chart = (name, index) => document.getElementById(`${name}-${index}`);
const grouped = step => step.toLocaleString("en-US");
const finite = value => Number.isFinite(value) ? value : null;

function unpack(run) {
  run.seconds = floats(run.seconds);
  for (const metric of Object.values(run.metrics)) {
    metric.values = floats(metric.values);
    metric.bands = floats(metric.bands);
    metric.width = metric.rows.reduce((sum, [, heads]) => sum + heads, 0);
    let start = 0;
    metric.start = new Map(metric.rows.map(([layer, heads]) => [layer, (start += heads) - heads]));
    metric.heads = new Map(metric.rows);
    metric.frameSteps = metric.frames.map(at => run.steps[at]);
    metric.bandSteps = metric.band_samples.map(at => run.steps[at]);
  }
}

const valueAt = (metric, frame, layer, head) => finite(metric.values[frame * metric.width + metric.start.get(layer) + head]);
const curveOf = (metric, layer, head) => metric.frames.map((_, frame) => valueAt(metric, frame, layer, head));
const noun = scope => scope === "kv_head" ? "KV head" : "head";
const headName = (run, layer, head, scope) => `${run.short[layer]} ${noun(scope)} ${head}`;

function frameAt(metric, step) {  // the last frame that is not after the step
  let frame = 0;
  while (frame + 1 < metric.frameSteps.length && metric.frameSteps[frame + 1] <= step) frame++;
  return frame;
}

function chosenHeads(run, metric) {  // the chosen head in the heads this metric counts
  if (state.layer === null || !metric.heads.has(state.layer)) return [];
  const read = run.kv_heads[state.layer];  // by query head
  let heads = [state.head];
  if (state.scope === "query_head" && metric.scope === "kv_head") heads = [read[state.head] ?? state.head];
  if (state.scope === "kv_head" && metric.scope === "query_head") heads = read.flatMap((kvHead, head) => kvHead === state.head ? [head] : []);
  return heads.filter(head => head < metric.heads.get(state.layer));
}

function alarmedHeads(run, metric, step) {  // [layer, head] pairs: firing at the step, or ever when the step is left out
  const pairs = new Map();
  for (const alarm of run.alarms)
    if (metric.heads.has(alarm.layer) && (step === undefined || (alarm.began <= step && (alarm.ended === null || step < alarm.ended))))
      for (const head of alarm.heads[metric.scope])
        if (head < metric.heads.get(alarm.layer)) pairs.set(`${alarm.layer}/${head}`, [alarm.layer, head]);
  return [...pairs.values()];
}

const base = height => ({
  height, margin: { l: 60, r: 20, t: 30, b: 44 }, font: { family: "system-ui, sans-serif", size: 12, color: INK },
  paper_bgcolor: "#fff", plot_bgcolor: "#fff", showlegend: false, hovermode: "closest", hoverlabel: { align: "left" },
});
const stepAxis = extra => ({ title: { text: "optimizer step" }, gridcolor: "#f0f1f3", zeroline: false, tickformat: ",d", range: stepRange, ...extra });
function valueAxis(metric, extra) {
  const ticks = metric.log && metric.range ? logTicks(...metric.range) : {};
  return {
    title: { text: metric.unit }, gridcolor: "#f0f1f3", zeroline: false, automargin: true, nticks: 6, type: metric.log ? "log" : "linear",
    range: metric.range, ...ticks, ...(ticks.tickvals ? { tickvals: ticks.tickvals.map(tick => 10 ** tick) } : {}), ...extra,
  };
}
const segmentLines = (run, xref = "x", yref = "y domain") => run.segments.map(step => ({
  type: "line", xref, yref, x0: step, x1: step, y0: 0, y1: 1, line: { color: FAINT, width: 1, dash: "dot" } }));

function drawTimeline(run, index) {
  const div = chart("timeline", index);
  if (!run.alarms.length) { div.style.display = "none"; return; }
  const place = alarm => alarm.layer === null ? "the whole run"
    : alarm.head === null ? run.short[alarm.layer] : headName(run, alarm.layer, alarm.head, alarm.scope);
  const places = [...new Set(run.alarms.map(place))], shown = places.slice(-MOST_TIMELINE_ROWS);
  const kinds = [...new Set(run.alarms.map(alarm => alarm.kind))], last = run.steps.at(-1);
  const traces = kinds.map((kind, at) => {
    const of = run.alarms.filter(alarm => alarm.kind === kind && shown.includes(place(alarm)));
    const hover = of.map(alarm => `${escaped(place(alarm))}: ${escaped(kind.replaceAll("_", " "))}<br>since step ${grouped(alarm.began)}`
      + (alarm.ended === null ? ", still firing" : `, until ${grouped(alarm.ended)}`) + (alarm.message ? `<br>${escaped(alarm.message)}` : ""));
    return {
      type: "scatter", mode: "lines+markers", name: escaped(kind.replaceAll("_", " ")),
      x: of.flatMap(alarm => [alarm.began, alarm.ended ?? last, null]), y: of.flatMap(alarm => { const y = escaped(place(alarm)); return [y, y, null]; }),
      text: hover.flatMap(text => [text, text, ""]), customdata: of.flatMap(alarm => { const at = run.alarms.indexOf(alarm); return [at, at, null]; }),
      hovertemplate: "%{text}<extra></extra>", line: { width: 9, color: KIND_COLOURS[at % KIND_COLOURS.length] },
      marker: { size: 11, symbol: of.flatMap(alarm => ["line-ns", alarm.ended === null ? "triangle-right" : "line-ns", "circle"]), color: KIND_COLOURS[at % KIND_COLOURS.length] },
    };
  });
  const hidden = places.length - shown.length;
  Plotly.react(div, traces, {
    ...base(90 + 22 * shown.length), showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    margin: { l: 10, r: 20, t: 34, b: 44 }, shapes: segmentLines(run),
    title: hidden ? { text: `${hidden} places with earlier alarms are left out`, font: { size: 11, color: FAINT }, x: 1, xanchor: "right" } : undefined,
    xaxis: stepAxis(),
    yaxis: { automargin: true, autorange: "reversed", type: "category", categoryarray: shown.map(escaped), gridcolor: "#f0f1f3" },
  }, CONFIG).then(() => listen(div, point => {
    const alarm = run.alarms[point.customdata];
    if (alarm && alarm.layer !== null) choose(alarm.layer, alarm.head ?? 0, alarm.scope === "layer" ? "query_head" : alarm.scope);
  }));
}

function drawHeatmap(run, index) {
  const div = chart("heatmap", index), metric = run.metrics[state.metric];
  if (!metric || !metric.frames.length) { Plotly.purge(div); return; }
  const frame = frameAt(metric, state.step), most = Math.max(...metric.rows.map(([, heads]) => heads));
  const raw = metric.rows.map(([layer, heads]) => Array.from({ length: most }, (_, head) => head < heads ? valueAt(metric, frame, layer, head) : null));
  const colour = value => value === null ? null : metric.log ? Math.log10(Math.max(value, 1e-30)) : value;
  const [low, high] = (metric.limits ?? [1, 2]).map(colour), pad = Math.max(0, 0.05 - (high - low)) / 2;
  const rowOf = new Map(metric.rows.map(([layer], row) => [layer, row]));
  const box = ([layer, head], color, width, half = 0.5) => ({
    type: "rect", x0: head - half, x1: head + half, y0: rowOf.get(layer) - half, y1: rowOf.get(layer) + half, line: { color, width } });
  const alarmed = alarmedHeads(run, metric, metric.frameSteps[frame]), chosen = chosenHeads(run, metric).map(head => [state.layer, head]);
  const stride = Math.ceil(metric.rows.length / 26), rows = metric.rows.map((_, row) => row).filter(row => row % stride === 0);
  const columns = Array.from({ length: most }, (_, head) => head).filter(head => head % Math.ceil(most / 16) === 0);
  const ticks = metric.log ? logTicks(low - pad, high + pad) : {};
  Plotly.react(div, [{
    type: "heatmap", z: raw.map(row => row.map(colour)), customdata: raw, zmin: low - pad, zmax: high + pad, colorscale: "Viridis",
    xgap: raw.length * most <= 400 ? 2 : 0, ygap: raw.length * most <= 400 ? 2 : 0, hoverongaps: false,
    text: metric.rows.map(([layer]) => Array(most).fill(escaped(run.short[layer]))),
    hovertemplate: `%{text} ${noun(metric.scope)} %{x}<br>%{customdata:.4g}<extra></extra>`,
    colorbar: { thickness: 12, outlinewidth: 0, title: { text: metric.unit, side: "right", font: { size: 11, color: FAINT } }, ...ticks },
  }], {
    ...base(Math.min(900, Math.max(240, 110 + Math.min(30, 700 / raw.length) * raw.length))),
    title: { text: `${metric.title} at step ${grouped(metric.frameSteps[frame])}`, x: 0, xanchor: "left", font: { size: 13 } },
    shapes: [...alarmed.map(pair => box(pair, ALARM, 3)), ...chosen.map(pair => box(pair, "#ffffff", 4, 0.36)), ...chosen.map(pair => box(pair, "#000000", 2, 0.36))],
    xaxis: { title: { text: noun(metric.scope) }, zeroline: false, showgrid: false, constrain: "domain", tickvals: columns },
    yaxis: { autorange: "reversed", tickvals: rows, ticktext: rows.map(row => escaped(run.short[metric.rows[row][0]])), zeroline: false, showgrid: false, automargin: true },
  }, CONFIG).then(() => listen(div, point => choose(metric.rows[point.y][0], point.x, metric.scope)));
}

function logTicks(low, high) {
  for (const mantissas of [[1], [1, 3], [1, 2, 5], [1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8]]) {
    const ticks = [];
    for (let decade = Math.floor(low); decade <= high; decade++)
      for (const mantissa of mantissas) {
        const tick = decade + Math.log10(mantissa);
        if (tick >= low && tick <= high) ticks.push([tick, String(+(mantissa * 10 ** decade).toPrecision(3))]);
      }
    if (ticks.length >= 3 || mantissas.length > 4) return { tickvals: ticks.map(t => t[0]), ticktext: ticks.map(t => t[1]) };
  }
}

function bandTraces(metric, axes = {}, colour = BAND) {
  const n = metric.bandSteps.length, row = at => Array.from(metric.bands.subarray(at * n, (at + 1) * n), finite);
  const edge = (at, fill, alpha) => ({ type: "scatter", mode: "lines", x: metric.bandSteps, y: row(at), line: { width: 0, color: `rgba(${colour},0)` }, fill, fillcolor: `rgba(${colour},${alpha})`, hoverinfo: "skip", ...axes });
  const median = { type: "scatter", mode: "lines", x: metric.bandSteps, y: row(2), name: "median", line: { width: 1.6, color: `rgb(${colour})` }, hovertemplate: "median of all heads %{y:.4g}<br>step %{x:,}<extra></extra>", ...axes };
  return [edge(0, "none", 0), edge(4, "tonexty", 0.12), edge(1, "none", 0), edge(3, "tonexty", 0.28), median];
}

function headTrace(run, metric, layer, head, style, axes = {}) {
  return {
    type: "scatter", mode: "lines", x: metric.frameSteps, y: curveOf(metric, layer, head), connectgaps: false,
    customdata: metric.frames.map(() => [layer, head]),
    hovertemplate: `${escaped(headName(run, layer, head, metric.scope))}: %{y:.4g}<br>step %{x:,}<extra></extra>`, ...style, ...axes,
  };
}

function crowdTrace(run, metric, layer, heads) {  // all heads of a layer in one trace: browsers mind traces more than points
  const each = make => Array.from({ length: heads }, (_, head) => make(head)).flat(), n = metric.frames.length;
  return {
    type: "scatter", mode: "lines", line: { width: 0.8, color: CROWD }, connectgaps: false,
    x: each(() => [...metric.frameSteps, null]), y: each(head => [...curveOf(metric, layer, head), null]),
    customdata: each(head => Array(n + 1).fill([layer, head])),
    text: each(head => Array(n + 1).fill(escaped(headName(run, layer, head, metric.scope)))),
    hovertemplate: "%{text}: %{y:.4g}<br>step %{x:,}<extra></extra>",
  };
}

function drawCurves(run, index) {
  const div = chart("curves", index), metric = run.metrics[state.metric];
  if (!metric || !metric.frames.length) { Plotly.purge(div); return; }
  const everyone = metric.width <= MOST_CURVES, traces = bandTraces(metric), alarmed = alarmedHeads(run, metric);
  const opacity = everyone && metric.width > 40 ? 0.45 : 0.8;
  for (const [layer, heads] of metric.rows)
    if (everyone || layer === state.layer) traces.push({ ...crowdTrace(run, metric, layer, heads), opacity });
  const chosen = chosenHeads(run, metric), isChosen = pair => pair[0] === state.layer && chosen.includes(pair[1]);
  for (const pair of alarmed.filter(pair => !isChosen(pair))) traces.push(headTrace(run, metric, ...pair, { line: { width: 1.8, color: ALARM } }));
  for (const head of chosen) traces.push(headTrace(run, metric, state.layer, head, { line: { width: 3, color: CHOSEN } }));
  const name = chosen.length ? headName(run, state.layer, chosen.join(", "), metric.scope) : "";
  const crowd = everyone ? "all heads" : state.layer === null ? "bands of all heads; click a cell for its layer" : `the heads of ${run.short[state.layer]}; bands of all heads`;
  const now = metric.frameSteps[frameAt(metric, state.step)];
  Plotly.react(div, traces, {
    ...base(430), title: { text: name ? `<b style="color:${CHOSEN}">${escaped(name)}</b> among ${escaped(crowd)}` : escaped(crowd), x: 0, xanchor: "left", font: { size: 13 } },
    shapes: [...segmentLines(run), { type: "line", xref: "x", yref: "y domain", x0: now, x1: now, y0: 0, y1: 1, line: { color: CROWD, width: 1 } }],
    xaxis: stepAxis(), yaxis: valueAxis(metric, { title: { text: metric.unit || metric.title } }),
  }, CONFIG).then(() => listen(div, point => { if (point.customdata) choose(...point.customdata, metric.scope); }));
}

function drawMetrics(run, index) {
  const div = chart("metrics", index), names = Object.keys(run.metrics), columns = runs.length > 1 ? 2 : 4, rows = Math.ceil(names.length / columns);
  const traces = [], layout = { ...base(60 + 190 * rows), grid: { rows, columns, pattern: "independent", xgap: 0.16, ygap: 0.38 }, annotations: [], shapes: [], margin: { l: 46, r: 20, t: 30, b: 40 } };
  names.forEach((name, at) => {
    const metric = run.metrics[name], suffix = at ? String(at + 1) : "", axes = { xaxis: `x${suffix}`, yaxis: `y${suffix}` };
    traces.push(...bandTraces(metric, axes));
    for (const head of chosenHeads(run, metric)) traces.push(headTrace(run, metric, state.layer, head, { line: { width: 2.2, color: CHOSEN } }, axes));
    layout[`xaxis${suffix}`] = stepAxis({ title: undefined, nticks: 4 });
    layout[`yaxis${suffix}`] = valueAxis(metric, { title: undefined, nticks: 4, automargin: false });
    layout.shapes.push(...segmentLines(run, `x${suffix}`, `y${suffix} domain`));
    layout.annotations.push({ text: metric.title + (metric.unit ? ` <span style="color:${FAINT}">${metric.unit}</span>` : ""), xref: `x${suffix} domain`, yref: `y${suffix} domain`, x: 0, y: 1.04, xanchor: "left", yanchor: "bottom", showarrow: false, font: { size: 12 } });
  });
  Plotly.react(div, traces, layout, CONFIG);
}

function drawCost(run, index) {
  const seconds = Array.from(run.seconds, finite);
  if (!seconds.some(value => value !== null)) { chart("cost", index).style.display = "none"; return; }
  Plotly.react(chart("cost", index), [{ type: "scatter", mode: "lines", x: run.steps, y: seconds, line: { color: `rgb(${BAND})`, width: 1.4 }, hovertemplate: "%{y:.3g} s<br>step %{x:,}<extra></extra>" }],
    { ...base(190), xaxis: stepAxis(), yaxis: { title: { text: "seconds per sample" }, rangemode: "tozero", gridcolor: "#f0f1f3", automargin: true } }, CONFIG);
}

function listen(div, react) {
  div.removeAllListeners("plotly_click");
  div.on("plotly_click", event => react(event.points[0]));
}

function choose(layer, head, scope) {
  Object.assign(state, { layer, head, scope });
  const name = headName(runs.find(run => layer < run.short.length), layer, head, scope);
  document.getElementById("chosen").textContent = name;
  document.querySelectorAll(".head-name").forEach(span => { span.textContent = name; });
  draw([drawHeatmap, drawCurves, drawMetrics]);
}

function setMetric(name) {
  state.metric = name;
  const metric = runs.map(run => run.metrics[name]).find(found => found);
  document.querySelectorAll(".metric-name").forEach(span => { span.textContent = metric.title; });
  document.querySelectorAll(".metric-meaning").forEach(line => { line.textContent = metric.meaning; });
  stops = [...new Set(runs.flatMap(run => run.metrics[name]?.frameSteps ?? []))].sort((a, b) => a - b);
  const slider = document.getElementById("step"), at = stops.findLastIndex(step => step <= state.step);
  slider.max = Math.max(0, stops.length - 1);
  slider.value = Math.max(0, at);
  setStep(slider.value);
}

function setStep(at) {
  state.step = stops[at] ?? 0;
  document.getElementById("step-shown").textContent = grouped(state.step);
  draw([drawHeatmap, drawCurves]);
}

const draw = parts => runs.forEach((run, index) => parts.forEach(part => part(run, index)));
let stops = [];

function shareScales() {  // two runs are compared on the same colours and axes
  for (const name of new Set(runs.flatMap(run => Object.keys(run.metrics)))) {
    const known = runs.map(run => run.metrics[name]).filter(metric => metric?.limits);
    const limits = [Math.min(...known.map(metric => metric.limits[0])), Math.max(...known.map(metric => metric.limits[1]))];
    const drawn = known.flatMap(metric => Array.from(metric.bands).filter(value => Number.isFinite(value) && (value > 0 || !metric.log)));
    const ends = [drawn.reduce((a, b) => Math.min(a, b), Infinity), drawn.reduce((a, b) => Math.max(a, b), -Infinity)];
    for (const metric of known) {
      const [low, high] = metric.log ? ends.map(Math.log10) : ends, margin = 0.05 * (high - low) || 0.05 * Math.abs(high) || 0.1;
      Object.assign(metric, { limits, range: [low - margin, high + margin] });
    }
  }
}

const allSteps = runs.flatMap(run => run.steps.length ? [run.steps[0], run.steps.at(-1)] : []);
const firstStep = Math.min(...allSteps), stepMargin = 0.015 * (Math.max(...allSteps) - firstStep) || 1;
const stepRange = allSteps.length ? [firstStep - stepMargin, Math.max(...allSteps) + stepMargin] : [0, 1];
runs.forEach(unpack);
shareScales();
const names = [...new Set(runs.flatMap(run => Object.keys(run.metrics)))], picker = document.getElementById("metric");
names.forEach(name => picker.add(new Option(runs.map(run => run.metrics[name]).find(found => found).title, name)));
picker.addEventListener("change", () => setMetric(picker.value));
document.getElementById("step").addEventListener("input", event => setStep(event.target.value));
draw([drawTimeline, drawCost]);
if (names.length) {
  const worst = runs.map(run => run.first_look).find(found => found);
  state.step = Math.max(...runs.map(run => run.steps.at(-1) ?? 0));
  picker.value = [worst?.metric, "key_incoherence", names[0]].find(name => names.includes(name));
  setMetric(picker.value);
  worst ? choose(worst.layer, worst.head, worst.scope) : draw([drawMetrics]);
}
document.body.dataset.ready = "yes";
