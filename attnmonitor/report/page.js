// The reader's choice, and what changes it: controls, clicks, keys and the page's address.

let page = null;  // runs, the figures of all runs, and colors
let stops = [];  // steps at which the slider stops
const state = { metric: null, step: 0, slot: null, head: null, scope: "query_head" };

const byId = id => document.getElementById(id);
const drawAll = parts => page.runs.forEach((run, index) => parts.forEach(part => part(run, index)));
const setText = (selector, text) => document.querySelectorAll(selector).forEach(element => { element.textContent = text; });
const anyRun = look => page.runs.map(look).find(found => found !== undefined && found !== null);

// ---- the choice

function show(changes, { keepsAddress = false } = {}) {
  const before = { ...state };
  Object.assign(state, changes);
  const isNew = (...names) => names.some(name => state[name] !== before[name]);
  if (isNew("metric")) takeMetric();
  if (isNew("metric", "step")) takeStep();
  if (isNew("slot", "head", "scope")) drawGrid();
  if (isNew("metric", "step", "slot", "head", "scope")) {
    drawAll([drawHeatmap, drawCurves]);
    drawCompared();
  }
  nameChoice();
  if (!keepsAddress) writeAddress();
}

function takeMetric() {
  const { title, meaning } = anyRun(run => run.metrics[state.metric]);
  byId("metric").value = state.metric;
  setText(".metric-name", title);
  setText(".metric-meaning", meaning);
  stops = [...new Set(page.runs.flatMap(run => run.metrics[state.metric]?.frameSteps ?? []))].sort((a, b) => a - b);
  byId("step").max = Math.max(0, stops.length - 1);
}

function takeStep() {  // at the last stop that is not after the wanted step
  const at = Math.max(0, stops.findLastIndex(step => step <= state.step)), slider = byId("step");
  state.step = stops[at] ?? 0;
  slider.value = at;
  slider.setAttribute("aria-valuetext", `step ${grouped(state.step)}`);
  setText("#step-shown", grouped(state.step));
}

function nameChoice() {
  const names = [...new Set(page.runs.map(chosenName).filter(name => name))];
  setText("#chosen, .head-name", names.join(" / "));
  const layer = anyRun(run => run.layers[run.layerOfSlot.get(state.slot)]);
  if (document.activeElement !== byId("layer")) byId("layer").value = layer ?? "";
  if (document.activeElement !== byId("head")) byId("head").value = state.head ?? "";
  const alarms = page.runs.flatMap(run => run.alarms.filter(alarm => isOfChoice(run, alarm) && isFiring(alarm, state.step)));
  const since = new Map([...alarms].sort((a, b) => b.began - a.began).map(({ fault, began }) => [fault, began]));
  setText("#alarm-shown", [...since].map(([fault, began]) => `▲ ${fault} since step ${grouped(began)}`).join("; "));
  page.runs.forEach(showEvidence);
}

function showEvidence(run, index) {  // of the alarms of the chosen head
  const layer = run.layers[run.layerOfSlot.get(state.slot)], ofScope = state.scope === "kv_head" ? "kvHead" : "queryHead";
  document.querySelectorAll(`#run-${index} .evidence`).forEach(part => {
    const alarms = [...part.querySelectorAll("details")];
    alarms.forEach(({ dataset }, at) => {
      alarms[at].hidden = dataset.layer !== layer || !(dataset[ofScope] ?? "").split(" ").includes(String(state.head));
    });
    part.hidden = alarms.every(({ hidden }) => hidden);
  });
}

function isOfChoice(run, alarm) {
  const layer = run.layerOfSlot.get(state.slot);
  if (layer === undefined || alarm.layer !== layer) return false;
  return state.head === null || chosenHeads(run, layer, state.scope).some(head => (alarm.heads[state.scope] ?? []).includes(head));
}

// ---- the address: #layer=…&head=…&metric=…&step=…

function writeAddress() {
  const run = page.runs.find(({ layerOfSlot }) => layerOfSlot.has(state.slot)), metric = anyRun(({ metrics }) => metrics[state.metric]);
  const parts = {
    layer: run?.layers[run.layerOfSlot.get(state.slot)],
    head: state.head,
    scope: state.head !== null && state.scope !== metric?.scope ? state.scope : null,
    metric: state.metric,
    step: state.step,
    run: run?.index || null,
  };
  const given = Object.entries(parts).filter(([, value]) => value !== undefined && value !== null);
  const address = "#" + given.map(([key, value]) => `${key}=${encodeURIComponent(value)}`).join("&");
  try {
    history.replaceState(null, "", address);
  } catch {}  // a page inside another one may have no address of its own
}

function readings(text) {  // what a part of an address may stand for: programs write a space as %20 or as +
  const decoded = part => { try { return decodeURIComponent(part); } catch { return part; } };
  return [decoded(text), decoded(text.replace(/\+/g, " "))];
}

function readAddress() {
  const parts = new Map(location.hash.slice(1).split("&").map(part => [part.split("=")[0], part.slice(part.indexOf("=") + 1)]));
  const words = [], changes = {}, given = key => parts.has(key) ? readings(parts.get(key)) : null;
  const ignored = (key, why) => words.push(`${key}=${readings(parts.get(key))[0]} ${why}`);
  const metric = given("metric")?.find(name => hasNumbers(name));
  if (metric) changes.metric = metric;
  else if (parts.has("metric")) ignored("metric", "is no metric of this page");
  if (parts.has("layer")) {
    const found = layerNamed(given("layer"), Number(given("run")?.[0] ?? -1));
    found ? Object.assign(changes, found, headNamed(found, changes.metric ?? state.metric)) : ignored("layer", "is no layer of this page");
  }
  if (parts.has("step")) {
    const step = given("step")[0].trim() === "" ? NaN : Number(given("step")[0]);
    const first = Math.min(...page.runs.map(run => run.steps[0] ?? 0)), last = Math.max(...page.runs.map(run => run.steps.at(-1) ?? 0));
    step >= first && step <= last ? changes.step = step : ignored("step", "is no step of this page");
  }
  setText("#word", words.length ? `Ignored in the address: ${words.join("; ")}.` : "");
  if (Object.keys(changes).length) show(changes, { keepsAddress: true });

  function headNamed({ slot }, ofMetric) {
    if (!parts.has("head")) return { head: null };
    const scope = given("scope")?.find(name => name in page.runs[0].names) ?? anyRun(run => run.metrics[ofMetric])?.scope ?? "query_head";
    const text = given("head")[0], head = /^\d+$/.test(text) ? Number(text) : -1;
    const exists = page.runs.some(run => run.names[scope][run.layerOfSlot.get(slot)]?.[head] !== undefined);
    if (!exists) ignored("head", "is no head of this layer");
    return { head: exists ? head : null, scope };
  }
}

function layerNamed(names, preferred = -1) {
  const runs = [...page.runs].sort((a, b) => (b.index === preferred) - (a.index === preferred));
  for (const run of runs) {
    const layer = names.map(name => run.layers.indexOf(name)).find(at => at >= 0);
    if (layer !== undefined) return { slot: run.slots[layer] };
  }
  return null;
}

const hasNumbers = name => page.runs.some(run => run.charts.metrics[name]);

// ---- alarms

function showAlarm(run, alarm) {
  const changes = { step: alarm.began };
  if (alarm.metric !== null && run.charts.metrics[alarm.metric]) changes.metric = alarm.metric;
  if (alarm.layer !== null) Object.assign(changes, { slot: run.slots[alarm.layer], head: alarm.head, scope: alarm.head === null ? state.scope : alarm.scope });
  show(changes);
}

function goToAlarm(direction) {  // in the order in which alarms began, from the one that is shown or else from the step
  const alarms = page.runs.flatMap(run => run.alarms.map(alarm => ({ run, alarm }))).sort((a, b) => a.alarm.began - b.alarm.began);
  const isShown = ({ run, alarm }) => alarm.began === state.step && (alarm.layer === null || isOfChoice(run, alarm));
  let at = alarms.findIndex(each => each.alarm === goToAlarm.last && isShown(each));
  if (at < 0) at = alarms.findIndex(each => isShown(each) && each.alarm.metric === state.metric);
  if (at < 0) at = direction > 0 ? alarms.findLastIndex(({ alarm }) => alarm.began < state.step) : alarms.findIndex(({ alarm }) => alarm.began >= state.step);
  const next = alarms[(at + direction + alarms.length) % alarms.length];
  goToAlarm.last = next.alarm;
  showAlarm(next.run, next.alarm);
  setText("#word", `Alarm ${alarms.indexOf(next) + 1} of ${alarms.length}: ${next.alarm.where}, ${next.alarm.fault}`);
}

// ---- controls and keys

function searchLayer() {
  const wanted = byId("layer").value.trim();
  if (!wanted) return;
  const contains = name => name.toLowerCase().includes(wanted.toLowerCase());
  const found = layerNamed([wanted]) ?? anyRun(run => {
    const layer = [run.short.indexOf(wanted), run.layers.findIndex(contains)].find(at => at >= 0);
    return layer === undefined ? undefined : { slot: run.slots[layer] };
  });
  setText("#word", found ? "" : `No layer is called ${wanted}.`);
  if (found) show({ ...found, head: headThere(found.slot, state.head ?? 0) });
}

function headThere(slot, head) {  // the head of this number in a layer, or its last one; null where it has none
  const most = Math.max(...page.runs.map(run => run.names[state.scope][run.layerOfSlot.get(slot)]?.length ?? 0));
  return most ? Math.min(Math.max(head, 0), most - 1) : null;
}

function searchHead() {
  const text = byId("head").value;
  if (state.slot === null) return;
  show({ head: text === "" ? null : headThere(state.slot, Number(text)) });
}

function moveInHeatmap(event) {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  const run = page.runs[Number(event.currentTarget.id.split("-")[1])], metric = run.metrics[state.metric];
  if (!moves || !metric) return;
  event.preventDefault();
  const row = metric.rowOf.get(run.layerOfSlot.get(state.slot)), [column] = chosenColumns(run, metric);
  const nextRow = row === undefined ? 0 : Math.min(Math.max(row + moves[0], 0), metric.rows.length - 1), [layer, heads] = metric.rows[nextRow];
  const head = (column === undefined ? state.head ?? 0 : metric.columns[column].head) + (row === undefined ? 0 : moves[1]);
  show({ slot: run.slots[layer], head: heads ? Math.min(Math.max(head, 0), heads - 1) : state.head ?? 0, scope: metric.scope });
}

function listenToControls() {
  byId("metric").addEventListener("change", event => show({ metric: event.target.value }));
  byId("step").addEventListener("input", event => show({ step: stops[event.target.value] ?? 0 }));
  byId("layer").addEventListener("change", searchLayer);
  byId("head").addEventListener("change", searchHead);
  byId("previous-alarm").addEventListener("click", () => goToAlarm(-1));
  byId("next-alarm").addEventListener("click", () => goToAlarm(1));
  document.addEventListener("click", ({ target }) => {
    const row = target.closest(".alarms tbody tr"), button = target.closest("button[data-save]");
    if (row && !target.closest("a")) row.querySelector("a").click();
    if (target.closest(".alarms a")) document.querySelector(".heads h2")?.scrollIntoView();
    if (button) save(byId(button.dataset.chart), button.dataset.save);
  });
  window.addEventListener("hashchange", readAddress);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawEverything);
  for (const [name, isPrinting] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => { document.body.classList.toggle("printing", isPrinting); drawEverything(); });
  }
}

// ---- drawing all of it, and again

function drawEverything() {
  drawAll([drawTimeline, drawCost, drawHeatmap, drawCurves]);
  drawGrid();
  drawCompared();
}

function takeNumbers(numbers) {
  page = numbers;
  page.runs.forEach(unpack);
  const picker = byId("metric"), names = [...new Set(page.runs.flatMap(run => Object.keys(run.charts.metrics)))];
  picker.replaceChildren(...names.map(name => new Option(anyRun(run => run.metrics[name]).title, name)));
  byId("layers").replaceChildren(...[...new Set(page.runs.flatMap(run => run.layers))].map(name => new Option(name)));
  byId("controls").hidden = byId("hint").hidden = !names.length;
  for (const id of ["previous-alarm", "next-alarm"]) byId(id).disabled = !page.runs.some(run => run.alarms.length);
  document.querySelectorAll("[id^=heatmap-]").forEach(div => div.addEventListener("keydown", moveInHeatmap));
  return names;
}

function firstChoice(names) {  // the worst alarm, at the last step
  const worst = anyRun(run => run.first_look), run = page.runs.find(({ first_look }) => first_look === worst);
  const metric = [worst?.metric, "key_incoherence", names[0]].find(name => names.includes(name));
  const choice = worst && worst.layer !== null ? { ...choiceOf(run, worst), scope: worst.head === null ? state.scope : worst.scope } : {};
  return { metric, step: lastStep(), ...choice };
}

const lastStep = () => Math.max(...page.runs.map(run => run.steps.at(-1) ?? 0));

const allDetails = () => [...document.querySelectorAll("details")];

function partOf(details) {  // the same text for the same part, however many alarms there are by now
  const { className, dataset } = details, isOfAlarm = dataset.layer !== undefined;
  return [className, ...Object.values(dataset), isOfAlarm ? details.querySelector("summary").textContent : ""].join(" ");
}

// Puts newer parts of the same runs into the open page. What the reader chose stays; who looked at the last step sees the new one.
function refreshPage({ main, numbers }) {
  const isLast = state.step === stops.at(-1), opened = new Map(allDetails().map(details => [partOf(details), details.open]));
  const layer = anyRun(run => run.layers[run.layerOfSlot.get(state.slot)]);
  document.querySelector("main").innerHTML = main;
  for (const details of allDetails()) details.open = opened.get(partOf(details)) ?? details.open;
  const names = takeNumbers(numbers), wanted = names.includes(state.metric) ? {} : firstChoice(names);
  Object.assign(state, layer === undefined ? {} : layerNamed([layer]), wanted, isLast ? { step: lastStep() } : {});
  if (names.length) { takeMetric(); takeStep(); nameChoice(); }
  drawEverything();
}

listenToControls();
const names = takeNumbers(JSON.parse(byId("numbers").textContent));
drawAll([drawTimeline, drawCost]);
if (names.length) {
  show(firstChoice(names), { keepsAddress: true });
  if (state.slot === null) drawGrid();
} else {
  drawAll([drawCurves]);
}
if (location.hash.length > 1 && names.length) readAddress();
document.body.dataset.ready = "yes";
