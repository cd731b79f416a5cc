"use strict";
// The numbers of the page, unpacked, and what is looked up in them: heads, layers, alarms, frames.

const floats = text => new Float32Array(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
const finite = value => Number.isFinite(value) ? value : null;
const grouped = step => step.toLocaleString("en-US");
const plainText = name => name.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // Plotly reads markup in every text
const counted = number => Array.from({ length: number }, (_, index) => index);

function unpack(run, index) {
  run.index = index;
  run.layerOfSlot = new Map(run.slots.map((slot, layer) => [slot, layer]));  // paired layers of all runs share a slot
  for (const curve of Object.values(run.logged)) curve.values = Array.from(floats(curve.values), finite);
  for (const metric of Object.values(run.metrics)) {
    metric.values = floats(metric.values);  // (frames, columns): a column for each head of each layer
    metric.bands = floats(metric.bands);
    metric.columns = metric.rows.flatMap(([layer, heads]) => counted(heads).map(head => ({ layer, head })));
    metric.columnOf = new Map(metric.columns.map(({ layer, head }, column) => [`${layer}/${head}`, column]));
    metric.rowOf = new Map(metric.rows.map(([layer], row) => [layer, row]));
    metric.frameSteps = metric.frames.map(at => run.steps[at]);
    metric.bandSteps = metric.band_samples.map(at => run.steps[at]);
    metric.alarms = new Map();  // by column
    for (const alarm of run.alarms) {
      for (const column of columnsOf(metric, alarm.layer, alarm.heads[metric.scope])) {
        metric.alarms.set(column, [...metric.alarms.get(column) ?? [], alarm]);
      }
    }
  }
}

const nameOf = (run, metric, column) => run.names[metric.scope][metric.columns[column].layer][metric.columns[column].head];
const valueAt = (metric, frame, column) => finite(metric.values[frame * metric.columns.length + column]);

function frameAt(metric, step) {  // the last frame that is not after the step
  return Math.max(0, metric.frameSteps.findLastIndex(frameStep => frameStep <= step));
}

function lastValue(metric, step, column) {  // the value at a step, or the last one before it
  for (let frame = frameAt(metric, step); frame >= 0; frame--) {
    const value = valueAt(metric, frame, column);
    if (value !== null) return value;
  }
  return null;
}

function columnsOf(metric, layer, heads) {  // where these heads are among the metric's values
  return heads.map(head => metric.columnOf.get(`${layer}/${head}`)).filter(column => column !== undefined);
}

function chosenHeads(run, layer, scope) {  // a KV head is chosen with the query heads that read it, and the other way round
  if (state.head === null) return counted(run.names[scope][layer].length);
  const kvHeads = run.kv_heads[layer];  // by query head
  if (state.scope === "query_head" && scope === "kv_head") return [kvHeads[state.head] ?? state.head];
  if (state.scope === "kv_head" && scope === "query_head") return kvHeads.flatMap((kvHead, head) => kvHead === state.head ? [head] : []);
  return [state.head];
}

function chosenColumns(run, metric) {
  const layer = run.layerOfSlot.get(state.slot);
  return layer === undefined ? [] : columnsOf(metric, layer, chosenHeads(run, layer, metric.scope));
}

function chosenName(run) {  // of a head, or of a layer
  const layer = run.layerOfSlot.get(state.slot);
  if (layer === undefined) return null;
  if (run.reasons[layer]) return `${run.short[layer]}: not measured (${run.reasons[layer]})`;
  return state.head === null ? run.short[layer] : run.names[state.scope][layer][state.head] ?? null;
}

const isFiring = (alarm, step) => alarm.began <= step && (alarm.ended === null || step < alarm.ended);

function alarmedColumns(metric, step) {
  return [...metric.alarms].filter(([, alarms]) => alarms.some(alarm => isFiring(alarm, step))).map(([column]) => column);
}
