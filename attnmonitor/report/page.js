"use strict";
// Draws the figures that Python made, and puts in the numbers that they name in `meta`, for the chosen metric, step and
// head. What is drawn and how it looks is decided in Python.

const { runs } = JSON.parse(document.getElementById("numbers").textContent);
const state = { metric: null, step: 0, layer: null, head: null, scope: "query_head" };
let stops = [];  // steps at which the slider stops

const CONFIG = { displayModeBar: false, responsive: true };
const NARROW = 480, LEGEND_ROW = 19;  // pixels
const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const finite = value => Number.isFinite(value) ? value : null;
const grouped = step => step.toLocaleString("en-US");
const plainText = name => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // Plotly reads markup in every text
const divOf = (name, index) => document.getElementById(`${name}-${index}`);

function unpack(run) {
  for (const metric of Object.values(run.metrics)) {
    metric.values = floats(metric.values);  // (frames, columns): a column for each head of each layer
    metric.bands = floats(metric.bands);
    metric.columns = metric.rows.flatMap(([layer, heads]) => Array.from({ length: heads }, (_, head) => ({ layer, head })));
    metric.columnOf = new Map(metric.columns.map(({ layer, head }, column) => [`${layer}/${head}`, column]));
    metric.rowOf = new Map(metric.rows.map(([layer], row) => [layer, row]));
    metric.frameSteps = metric.frames.map(at => run.steps[at]);
    metric.bandSteps = metric.band_samples.map(at => run.steps[at]);
  }
}

const nameOf = (run, metric, column) => run.names[metric.scope][metric.columns[column].layer][metric.columns[column].head];
const valueAt = (metric, frame, column) => finite(metric.values[frame * metric.columns.length + column]);

function frameAt(metric, step) {  // the last frame that is not after the step
  return Math.max(0, metric.frameSteps.findLastIndex(frameStep => frameStep <= step));
}

function columnsOf(metric, layer, heads) {  // where these heads are among the metric's values
  return heads.map(head => metric.columnOf.get(`${layer}/${head}`)).filter(column => column !== undefined);
}

function chosenColumns(run, metric) {  // a KV head is chosen with the query heads that read it, and the other way round
  if (state.layer === null) return [];
  const kvHeads = run.kv_heads[state.layer] ?? [];  // by query head
  let heads = [state.head];
  if (state.scope === "query_head" && metric.scope === "kv_head") heads = [kvHeads[state.head] ?? state.head];
  if (state.scope === "kv_head" && metric.scope === "query_head") heads = kvHeads.flatMap((kvHead, head) => kvHead === state.head ? [head] : []);
  return columnsOf(metric, state.layer, heads);
}

function alarmedColumns(run, metric, step) {
  const firing = run.alarms.filter(alarm => alarm.began <= step && (alarm.ended === null || step < alarm.ended));
  return [...new Set(firing.flatMap(alarm => columnsOf(metric, alarm.layer, alarm.heads[metric.scope])))];
}

function filled(run, trace) {  // the trace with the numbers that its meta names
  if (!trace.meta) return trace;
  const metric = run.metrics[trace.meta.metric], { band, columns } = trace.meta;
  if (band !== undefined) {
    const size = metric.bandSteps.length;
    return { ...trace, x: metric.bandSteps, y: Array.from(metric.bands.subarray(band * size, (band + 1) * size), finite) };
  }
  // Several heads are one line with gaps: browsers draw few traces with many points faster than many traces.
  const joined = make => columns.flatMap((column, at) => at ? [null, ...make(column)] : make(column));
  return {
    ...trace,
    x: joined(() => metric.frameSteps),
    y: joined(column => metric.frames.map((_, frame) => valueAt(metric, frame, column))),
    text: joined(column => Array(metric.frames.length).fill(plainText(nameOf(run, metric, column)))),
  };
}

function chosenTraces(run, template) {
  const metric = run.metrics[template.meta.metric];
  return chosenColumns(run, metric).map(column =>
    ({ ...template, name: plainText(nameOf(run, metric, column)), meta: { ...template.meta, columns: [column] } }));
}

function draw(run, div, traces, layout, onClick) {
  const shown = traces.map(trace => filled(run, trace)), figure = structuredClone(layout);
  // On a narrow page every entry of a legend has a row of its own: the figure grows, so that the plot keeps its height.
  const entries = traces.filter(({ showlegend }) => showlegend !== false).length;
  if (figure.showlegend && div.clientWidth < NARROW) figure.height += LEGEND_ROW * entries;
  Plotly.react(div, shown, figure, CONFIG).then(() => {
    div.removeAllListeners("plotly_click");
    if (onClick) div.on("plotly_click", event => onClick(event.points[0]));
  });
}

function drawComplete(name, onClick) {
  return (run, index) => {
    const div = divOf(name, index), figure = run.charts[name];
    if (figure) draw(run, div, figure.data, figure.layout, onClick);
    else div.style.display = "none";
  };
}
const drawTimeline = drawComplete("timeline", point => point.customdata && choose(...point.customdata));
const drawCost = drawComplete("cost");

function drawHeatmap(run, index) {
  const div = divOf("heatmap", index), metric = run.metrics[state.metric], figure = run.charts.metrics[state.metric]?.heatmap;
  if (!figure) { Plotly.purge(div); return; }
  const frame = frameAt(metric, state.step), step = metric.frameSteps[frame], most = Math.max(...metric.rows.map(([, heads]) => heads));
  const table = cell => metric.rows.map(([layer]) => Array.from({ length: most }, (_, head) => {
    const [column] = columnsOf(metric, layer, [head]);
    return column === undefined ? null : cell(column);
  }));
  const [trace] = figure.data, values = table(column => valueAt(metric, frame, column));
  const shade = value => value === null || !trace.meta.log ? value : Math.log10(Math.max(value, 1e-30));
  const framed = (columns, frames) => frames.flatMap(shape => columns.map(column => {
    const { layer, head } = metric.columns[column], row = metric.rowOf.get(layer);
    return { ...shape, x0: shape.x0 + head, x1: shape.x1 + head, y0: shape.y0 + row, y1: shape.y1 + row };
  }));
  // Layers without a number keep their row, hatched.
  const gaps = values.flatMap((row, at) => row.every(value => value === null) ? [at] : []), [, hatched] = figure.data;
  const corners = (left, right) => gaps.flatMap(at => [at - left, at - left, at + right, at + right, at - left, null]);
  const notMeasured = gaps.map(at => plainText(`${run.short[metric.rows[at][0]]}: not measured`));
  const { alarm, chosen } = run.charts.frames, title = figure.layout.title;
  const cells = { ...trace, z: values.map(row => row.map(shade)), customdata: values, text: table(column => plainText(nameOf(run, metric, column))) };
  const gapTrace = { ...hatched, x: gaps.flatMap(() => [-0.5, most - 0.5, most - 0.5, -0.5, -0.5, null]), y: corners(0.45, 0.45), text: notMeasured.join("<br>") };
  Plotly.react(div, [cells, gapTrace], {
    ...structuredClone(figure.layout),
    title: { ...title, text: title.text.replace("{step}", grouped(step)) },
    shapes: [...framed(alarmedColumns(run, metric, step), alarm), ...framed(chosenColumns(run, metric), chosen)],
  }, CONFIG).then(() => {
    div.removeAllListeners("plotly_click");
    div.on("plotly_click", ({ points: [{ data, x, y }] }) => data.type === "heatmap" && choose(metric.rows[y][0], x, metric.scope));
  });
}

function drawCurves(run, index) {
  const div = divOf("curves", index), metric = run.metrics[state.metric], charts = run.charts.metrics[state.metric];
  if (!charts) { Plotly.purge(div); return; }
  const { data, layout } = charts.curves, now = metric.frameSteps[frameAt(metric, state.step)];
  const shown = data.filter(({ meta }) => meta?.layer === undefined || meta.layer === state.layer);
  const [nowLine, ...otherShapes] = layout.shapes;
  draw(run, div, [...shown, ...chosenTraces(run, charts.chosen)], { ...layout, shapes: [{ ...nowLine, x0: now, x1: now }, ...otherShapes] }, point => {
    const column = point.data.meta?.columns?.[Math.floor(point.pointIndex / (metric.frames.length + 1))];
    if (column !== undefined) choose(metric.columns[column].layer, metric.columns[column].head, metric.scope);
  });
}

function drawGrid(run, index) {
  const div = divOf("grid", index), { data, chosen, layouts } = run.charts.grid;
  const fitting = layouts.find(({ least_width }) => div.clientWidth >= least_width);
  if (fitting) draw(run, div, [...data, ...chosen.flatMap(template => chosenTraces(run, template))], fitting.layout);
}

const drawAll = parts => runs.forEach((run, index) => parts.forEach(part => part(run, index)));
const setText = (selector, text) => document.querySelectorAll(selector).forEach(element => { element.textContent = text; });

function choose(layer, head, scope) {
  Object.assign(state, { layer, head, scope });
  setText("#chosen, .head-name", runs.map(run => run.names[scope][layer]?.[head]).find(name => name) ?? "");
  drawAll([drawHeatmap, drawCurves, drawGrid]);
}

function setMetric(name) {
  state.metric = name;
  const metric = runs.map(run => run.metrics[name]).find(found => found);
  setText(".metric-name", metric.title);
  setText(".metric-meaning", metric.meaning);
  stops = [...new Set(runs.flatMap(run => run.metrics[name]?.frameSteps ?? []))].sort((a, b) => a - b);
  const slider = document.getElementById("step");
  slider.max = Math.max(0, stops.length - 1);
  slider.value = Math.max(0, stops.findLastIndex(step => step <= state.step));
  setStep(slider.value);
}

function setStep(at) {
  state.step = stops[at] ?? 0;
  setText("#step-shown", grouped(state.step));
  drawAll([drawHeatmap, drawCurves]);
}

runs.forEach(unpack);
const names = [...new Set(runs.flatMap(run => Object.keys(run.metrics)))], picker = document.getElementById("metric");
names.forEach(name => picker.add(new Option(runs.map(run => run.metrics[name]).find(found => found).title, name)));
picker.addEventListener("change", () => setMetric(picker.value));
document.getElementById("step").addEventListener("input", event => setStep(event.target.value));
drawAll([drawTimeline, drawCost]);
if (names.length) {
  const first = runs.map(run => run.first_look).find(found => found);
  state.step = Math.max(...runs.map(run => run.steps.at(-1) ?? 0));
  picker.value = [first?.metric, "key_incoherence", names[0]].find(name => names.includes(name));
  setMetric(picker.value);
  first ? choose(first.layer, first.head, first.scope) : drawAll([drawGrid]);
}
document.body.dataset.ready = "yes";
