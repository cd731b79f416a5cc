// Draws the figures that Python made, and puts in the numbers that they name in `meta`, for the chosen metric, step and
// head. What is drawn and how it looks is decided in Python; on a dark page its colors are exchanged here.

const CONFIG = { displayModeBar: false, responsive: true };
const NARROW = 480, LEGEND_ROW = 19, NARROW_LABEL = 18, NARROW_TICKS = 8;  // pixels, pixels, characters, ticks
const divOf = (name, index) => document.getElementById(`${name}-${index}`);

const isDark = () => !document.body.classList.contains("printing") && matchMedia("screen and (prefers-color-scheme: dark)").matches;

function themed(part) {  // a part of a figure in the colors of the page
  if (!isDark()) return part;
  if (typeof part === "string") return page.dark[part.toLowerCase()] ?? part.replace(/#[0-9a-f]{6}|rgba\([\d,]+,/gi, color => page.dark[color.toLowerCase()] ?? color);
  if (Array.isArray(part)) return part.map(themed);
  return part && typeof part === "object" ? Object.fromEntries(Object.entries(part).map(([key, value]) => [key, themed(value)])) : part;
}

// ---- numbers into traces

function filled(run, trace) {  // the trace with the numbers that its meta names
  if (!trace.meta) return trace;
  const of = page.runs[trace.meta.run] ?? run, { logged, band, columns } = trace.meta;
  if (logged !== undefined) return { ...trace, x: of.logged[logged].steps, y: of.logged[logged].values };
  const metric = of.metrics[trace.meta.metric];
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
    text: joined(column => Array(metric.frames.length).fill(plainText(nameOf(of, metric, column)))),
  };
}

function chosenTraces(run, lines) {  // in the color of the alarm where the head has one
  const metric = run.metrics[lines.healthy.meta.metric];
  return chosenColumns(run, metric).map(column => {
    const alarms = metric.alarms.get(column) ?? [], alarm = alarms.find(({ ended }) => ended === null) ?? alarms.at(-1);
    const template = alarm ? lines.alarmed : lines.healthy;
    const name = nameOf(run, metric, column) + (alarm ? ` ▲ ${alarm.fault}` : "") + (page.runs.length > 1 ? `, ${run.name}` : "");
    return { ...template, name: plainText(name), meta: { ...template.meta, columns: [column], run: run.index } };
  });
}

function alarmMarks(run, metric, columns, place) {  // on the curves of these heads, where an alarm began and where it ended
  const { began, ended } = run.charts.marks;
  const marked = (template, stepOf, words) => {
    const at = columns.flatMap(column => (metric.alarms.get(column) ?? []).filter(alarm => stepOf(alarm) !== null).map(alarm => [alarm, column]));
    return {
      ...template, ...place,
      x: at.map(([alarm]) => stepOf(alarm)),
      y: at.map(([alarm, column]) => lastValue(metric, stepOf(alarm), column)),
      text: at.map(([alarm]) => `${plainText(alarm.where)}: ${plainText(alarm.fault)} ${words} at step ${grouped(stepOf(alarm))}`),
    };
  };
  return [marked(began, alarm => alarm.began, "began"), marked(ended, alarm => alarm.ended, "ended")].filter(({ x }) => x.length);
}

function alarmShades(run, metric, columns, place = {}) {  // behind the curves of these heads, from an alarm's first step to its last
  const alarms = columns.flatMap(column => metric.alarms.get(column) ?? []).sort((a, b) => a.began - b.began), spans = [];
  for (const { began, ended } of alarms) {  // joined where they overlap
    const end = ended ?? run.steps.at(-1), last = spans.at(-1);
    if (last && began <= last[1]) last[1] = Math.max(last[1], end);
    else spans.push([began, end]);
  }
  return spans.map(([began, end]) => ({ ...run.charts.marks.shade, ...place, x0: began, x1: end }));
}

// ---- figures

function shortened(axis) {  // labels for a narrow page, from the left: the end of a name tells it from the others
  return { ...axis, ticktext: axis.ticktext.map(text => text.length > NARROW_LABEL ? `…${text.slice(1 - NARROW_LABEL)}` : text) };
}

function fewer(axis) {  // ticks that have room side by side on a narrow page
  const every = Math.ceil(axis.tickvals.length / NARROW_TICKS);
  return { ...axis, tickvals: axis.tickvals.filter((_, at) => at % every === 0) };
}

function fitted(div, traces, layout) {  // a layout for the width there is
  if (div.clientWidth >= NARROW) return layout;
  // Every entry of a legend has a row of its own: the figure grows, so that the plot keeps its height.
  const entries = traces.filter(({ showlegend }) => showlegend !== false).length;
  const rows = layout.yaxis?.ticktext ? { yaxis: shortened(layout.yaxis) } : {};
  const columns = layout.xaxis?.tickvals ? { xaxis: fewer(layout.xaxis) } : {};
  return { ...layout, ...rows, ...columns, height: layout.height + (layout.showlegend ? LEGEND_ROW * entries : 0) };
}

function draw(run, div, traces, layout, onClick) {
  const figure = { data: traces.map(trace => filled(run, trace)), layout: structuredClone(fitted(div, traces, layout)) };
  drawFigure(div, figure, onClick);
}

function drawFigure(div, { data, layout }, onClick) {
  div.figure = { data, layout };  // in its own colors, to be saved
  const shown = data.map(({ x, y, z, text, customdata, ...look }) => ({ ...themed(look), x, y, ...z && { z }, ...text && { text }, ...customdata && { customdata } }));
  const { shapes, ...rest } = layout;
  Plotly.react(div, shown, { ...themed(rest), shapes: shapes?.map(shape => shape.framed ? shape : themed(shape)) }, CONFIG).then(() => {
    div.removeAllListeners("plotly_click");
    if (onClick) div.on("plotly_click", event => onClick(event.points[0]));
  });
}

function drawComplete(name, onClick) {
  return (run, index) => {
    const div = divOf(name, index), figure = run.charts[name];
    if (div && figure) draw(run, div, figure.data, figure.layout, point => onClick?.(run, point));
  };
}
const drawTimeline = drawComplete("timeline", (run, point) => showAlarm(run, run.alarms[point.customdata]));
const drawCost = drawComplete("cost");

function tableOf(metric, cell) {  // a number for each cell of the heatmap, null where there is no head
  const most = Math.max(...metric.rows.map(([, heads]) => heads));
  return metric.rows.map(([layer]) => counted(most).map(head => {
    const column = metric.columnOf.get(`${layer}/${head}`);
    return column === undefined ? null : cell(column);
  }));
}

function gapsOf(run, metric, values) {  // layers without a number, and single heads of others: [row, first head, last head, text]
  return metric.rows.flatMap(([layer, heads], row) => {
    const why = run.reasons[layer] ? `not measured: ${run.reasons[layer]}` : "no number at this step";
    const text = plainText(`${run.short[layer]}: ${why}`);
    const missing = counted(heads).filter(head => values[row][head] === null);
    if (missing.length === heads) return [[row, 0, Math.max(heads || values[row].length, 1) - 1, text]];
    return missing.map(head => [row, head, head, text]);
  });
}

function hatchedTraces(template, gaps) {  // one for each text
  return [...new Set(gaps.map(gap => gap[3]))].map(text => {
    const own = gaps.filter(gap => gap[3] === text);
    return {
      ...template, text,
      x: own.flatMap(([, first, last]) => [first - 0.5, last + 0.5, last + 0.5, first - 0.5, first - 0.5, null]),
      y: own.flatMap(([row]) => [row - 0.45, row - 0.45, row + 0.45, row + 0.45, row - 0.45, null]),
    };
  });
}

function marksBeyond(template, shades, isBeyond) {  // cells whose color is the end of the scale, though the value is further out
  const cells = shades.flatMap((row, y) => row.flatMap((shade, x) => shade !== null && isBeyond(shade) ? [[x, y]] : []));
  return { ...template, x: cells.map(([x]) => x), y: cells.map(([, y]) => y) };
}

function drawHeatmap(run, index) {
  const div = divOf("heatmap", index), metric = run.metrics[state.metric], figure = run.charts.metrics[state.metric]?.heatmap;
  if (!div) return;
  if (!figure) { Plotly.purge(div); return; }
  const frame = frameAt(metric, state.step), { cells, hatched, above, below, layout } = figure;
  const values = tableOf(metric, column => valueAt(metric, frame, column));
  const shade = value => value === null || !cells.meta.log ? value : Math.log10(Math.max(value, 1e-30));
  const shades = values.map(row => row.map(shade));
  const framed = (columns, frames) => frames.flatMap(shape => columns.map(column => {
    const { layer, head } = metric.columns[column], row = metric.rowOf.get(layer);
    return { ...shape, framed: true, x0: shape.x0 + head, x1: shape.x1 + head, y0: shape.y0 + row, y1: shape.y1 + row };
  }));
  const { alarm, chosen } = run.charts.frames;
  const data = [
    { ...cells, z: shades, customdata: values, text: tableOf(metric, column => plainText(nameOf(run, metric, column))) },
    ...hatchedTraces(hatched, gapsOf(run, metric, values)),
    marksBeyond(above, shades, value => value > cells.zmax), marksBeyond(below, shades, value => value < cells.zmin),
  ];
  const title = { ...layout.title, text: layout.title.text.replace("{step}", grouped(metric.frameSteps[frame])) };
  const shapes = [...framed(alarmedColumns(metric, state.step), alarm), ...framed(chosenColumns(run, metric), chosen)];
  drawFigure(div, { data, layout: { ...structuredClone(fitted(div, data, layout)), title, shapes } }, ({ data: { type }, x, y }) => {
    if (type === "heatmap") show({ slot: run.slots[metric.rows[y][0]], head: x, scope: metric.scope });
  });
}

function drawCurves(run, index) {
  const div = divOf("curves", index), metric = run.metrics[state.metric], charts = run.charts.metrics[state.metric];
  if (!div) return;
  if (!charts) {
    const { training } = run.charts;
    training ? draw(run, div, training.data, training.layout) : Plotly.purge(div);
    return;
  }
  const columns = chosenColumns(run, metric), { data, layout } = charts.curves, layer = run.layerOfSlot.get(state.slot);
  const isChosen = ({ meta, name }) => name && columns.length === 1 && meta?.columns?.[0] === columns[0];
  const shown = data.filter(trace => !isChosen(trace)).map(trace => ofChosenLayer(metric, layer, trace));
  const marks = alarmMarks(run, metric, [...metric.alarms.keys()], {});
  const shapes = [...nowAt(metric, layout), ...alarmShades(run, metric, columns)];
  draw(run, div, [...shown, ...chosenTraces(run, charts.chosen), ...marks], { ...layout, shapes }, point => {
    const column = point.data.meta?.columns?.[Math.floor(point.pointIndex / (metric.frames.length + 1))];
    if (column !== undefined) show({ ...choiceOf(run, metric.columns[column]), scope: metric.scope });
  });
}

function ofChosenLayer(metric, layer, trace) {  // of a model with many heads, gray lines are those of the chosen layer
  const without = trace.meta?.chosen_layer_without;
  if (!without) return trace;
  const columns = metric.columns.flatMap((column, at) => column.layer === layer && !without.includes(at) ? [at] : []);
  return { ...trace, meta: { ...trace.meta, columns } };
}

function nowAt(metric, { shapes: [nowLine, ...others] }) {  // the shapes of a figure, its first at the chosen step
  const now = metric.frameSteps[frameAt(metric, state.step)];
  return [{ ...nowLine, x0: now, x1: now }, ...others];
}

const choiceOf = (run, { layer, head }) => ({ slot: run.slots[layer], head });

function drawCompared() {  // the chosen head of all runs in one figure
  const div = divOf("compared", 0), figure = page.compared?.[state.metric];
  if (!div || !figure) return;
  const chosen = figure.chosen.flatMap(lines => {
    const run = page.runs[lines.run], metric = run.metrics[state.metric];
    return [...chosenTraces(run, lines), ...alarmMarks(run, metric, chosenColumns(run, metric), { showlegend: false })];
  });
  const first = page.runs[figure.chosen[0].run].metrics[state.metric];
  draw(page.runs[0], div, [...figure.data, ...chosen], { ...figure.layout, shapes: nowAt(first, figure.layout) });
}

function drawGrid() {
  const div = divOf("grid", 0), { data, chosen, layouts } = page.grid;
  if (!div) return;
  const { layout } = layouts.find(({ least_width }) => div.clientWidth >= least_width);
  const parts = chosen.map(lines => {
    const run = page.runs[lines.run], metric = run.metrics[lines.healthy.meta.metric], columns = chosenColumns(run, metric);
    const { xaxis, yaxis, showlegend } = lines.healthy, one = page.runs.length === 1;
    return {
      traces: [...chosenTraces(run, lines), ...alarmMarks(run, metric, columns, { xaxis, yaxis, showlegend })],
      shades: one ? alarmShades(run, metric, columns, { xref: xaxis, yref: `${yaxis} domain` }) : [],
    };
  });
  const shapes = [...layout.shapes, ...parts.flatMap(({ shades }) => shades)];
  draw(page.runs[0], div, [...data, ...parts.flatMap(({ traces }) => traces)], { ...layout, shapes });
}

function save(div, format) {  // in light colors, as large as it is shown
  const { width, height } = div.getBoundingClientRect();
  const filename = `${document.title.split(" · ")[0]} ${div.id.split("-")[0]} ${state.metric ?? ""}`.trim();
  return Plotly.downloadImage(div.figure, { format, filename, width, height, scale: format === "png" ? 2 : 1 });
}
