"use strict";
// Draws the report from the JSON in the page: who passed where, and for the chosen run what is known of it.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const COLOURS = {
  "pass": "pass", "expected failure": "expected", "fail": "fail", "unexpected pass": "fail",
  "device rule broken": "rule", "time-out": "late", "oops": "oops", "skipped": "skipped",
};
const colour = (verdict) => `var(--${COLOURS[verdict] || "fail"})`;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const seconds = (value) => (value < 100 ? value.toFixed(1) : value.toFixed(0)) + " s";
const compare = (a, b) => a.localeCompare(b, "en", { numeric: true });

function head() {
  document.getElementById("line").textContent = data.line;
  const counts = new Map();
  for (const run of runs) counts.set(run.verdict, (counts.get(run.verdict) || 0) + 1);
  const legend = document.getElementById("legend");
  for (const verdict of Object.keys(COLOURS)) {
    if (!counts.has(verdict)) continue;
    legend.append(element("button", {
      "aria-pressed": "false", title: `only scenarios with "${verdict}"`, onclick: (event) => filter(verdict, event.currentTarget),
    }, element("i", { style: `background:${colour(verdict)}` }), `${verdict}: ${counts.get(verdict)}`));
  }
}

/// Rows of the overview that have the verdict, or all when it is chosen once more.
function filter(verdict, button) {
  const chosen = button.getAttribute("aria-pressed") !== "true";
  for (const other of document.querySelectorAll("#legend button")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(chosen));
  for (const row of document.querySelectorAll("#overview tbody tr")) {
    row.hidden = chosen && !row.dataset.verdicts.split("|").includes(verdict);
  }
}

/// The columns: a kernel in a lane.
function column(run) {
  return run.guest === null ? "no guest" : `${run.guest}|${run.lane}`;
}

function overview() {
  const columns = [...new Set(runs.map(column))].sort((a, b) => {
    const newest = (name) => name.startsWith("newest") || name === "no guest";
    return newest(a) - newest(b) || compare(a, b);
  });
  const rows = new Map();
  // The guests of a matrix share a row, and with many kernels there is little room for each.
  const row = (run) => run.scenario.replace(/ \d+\/\d+$/, "");
  const wide = columns.length > 5;
  document.body.classList.toggle("wide", wide);
  for (const run of runs) {
    if (!rows.has(row(run))) rows.set(row(run), new Map());
    const cells = rows.get(row(run));
    if (!cells.has(column(run))) cells.set(column(run), []);
    cells.get(column(run)).push(run);
  }
  const versions = new Map(runs.map((run) => [column(run), run.version]));
  const title = (name) => {
    const [guest, lane] = name.split("|");
    return element("th", { scope: "col" }, guest,
      element("small", {}, lane ? `${versions.get(name) || ""} · ${lane}` : ""));
  };
  const body = [...rows].map(([scenario, cells]) => {
    const story = cells.values().next().value[0].story.replace(/\s+/g, " ");
    const verdicts = new Set([...cells.values()].flat().map((run) => run.verdict));
    return element("tr", { "data-verdicts": [...verdicts].join("|") },
      element("th", { scope: "row" }, scenario, element("small", { title: story }, story)),
      ...columns.map((name) => {
        const here = cells.get(name);
        if (!here) return element("td", { class: "none" }, "–");
        const many = here.length > 3;
        return element("td", many ? { class: "many" } : {}, ...here.map((run) => cell(run, many, wide)));
      }));
  });
  document.getElementById("overview").append(
    element("h2", {}, "Scenarios and kernels"),
    element("div", { class: "grid scroll", style: "max-height:none" }, element("table", {},
      element("thead", {}, element("tr", {}, element("th", {}, "Scenario"), ...columns.map(title))),
      element("tbody", {}, ...body))));
}

const cellOf = new Map();

/// A button for the run: one of `many`, a square; in a `wide` table, only what is needed.
function cell(run, many, wide) {
  const extra = run.combinations.length && !wide ? ` ${run.combinations.length} combinations` : "";
  const verdict = wide && run.verdict === "expected failure" ? "expected" : run.verdict;
  const made = element("button", {
    class: "cell", style: `background:${colour(run.verdict)}`, "aria-pressed": "false",
    title: `${run.name}: ${run.verdict}, ${seconds(run.seconds)}`, "aria-label": `${run.name}: ${run.verdict}`,
    onclick: () => choose(run, true),
  });
  if (!many) {
    made.append(run.repetition > 1 ? `${verdict} #${run.repetition}` : verdict + extra,
      element("small", {}, run.verdict === "skipped" ? "" : seconds(run.seconds)));
  }
  cellOf.set(run, made);
  return made;
}

function choose(run, scroll) {
  for (const [other, made] of cellOf) made.setAttribute("aria-pressed", String(other === run));
  const details = document.getElementById("details");
  details.replaceChildren(describe(run));
  if (scroll) {
    history.replaceState(null, "", "#" + encodeURIComponent(run.name));
    details.scrollIntoView({ behavior: "smooth", block: "start" });
  }
}

function section(title, open, ...children) {
  return element("details", open ? { open: "" } : {}, element("summary", {}, title), ...children);
}

function describe(run) {
  const evidence = run.evidence;
  const made = element("div", {},
    element("h2", {}, run.name, " ",
      element("span", { class: "badge", style: `background:${colour(run.verdict)}` }, run.verdict)),
    element("p", { class: "story" }, run.story),
    element("p", {}, [run.version, run.lane === "qemu" ? "QEMU, the device behind vfio-user" : "built-in VMM",
      seconds(run.seconds)].filter(Boolean).join(" · ")));
  if (run.repeated) made.append(element("p", {}, `Run a second time, since ${run.repeated}.`));
  if (run.reason) made.append(element("p", {}, element("b", {}, run.reason)));
  for (const problem of run.problems) made.append(element("pre", { class: "problem" }, problem));
  if (evidence.files.length) {
    const links = evidence.files.flatMap((file) => [element("a", { href: encodeURI(file) }, file.split("/").pop()), "  "]);
    made.append(element("p", {}, "Files: ", ...links));
  }
  const timeline = evidence.timeline;
  if (timeline && timeline.devices) {
    const charts = timeline.devices.map((device) => chart(device, timeline));
    const more = timeline.all_devices - timeline.devices.length;
    made.append(section("Vectors over time", true, ...charts,
      more > 0 ? element("p", { class: "story" }, `${more} more functions are in timeline.html.`) : null));
    for (const device of timeline.devices) made.append(commands(device, timeline.all_devices > 1));
  }
  if (run.sweep.length) made.append(section(`Sweep: ${run.sweep.length} points`, true, sweepTable(run)));
  if (run.combinations.length) {
    made.append(section(`${run.combinations.length} combinations of limits`, false, limitsTable([run])));
  }
  if (evidence.events.length) {
    made.append(section(`Faults, events of the host, broken rules: ${evidence.events.length}`, false,
      element("pre", {}, evidence.events.map(eventLine).join("\n"))));
  }
  if (evidence.log) made.append(section("End of the console", run.is_failure, element("pre", {}, evidence.log)));
  return made;
}

function eventLine(line) {
  try {
    const { t_ns, event, device, ...rest } = JSON.parse(line);
    const fields = Object.entries(rest).map(([name, value]) => `${name}=${typeof value === "string" ? value : JSON.stringify(value)}`);
    return `${(t_ns / 1e9).toFixed(6)}  ${device === undefined ? "" : `#${device} `}${event}  ${fields.join(" ")}`;
  } catch {
    return line;
  }
}

function commands(device, several) {
  const rows = device.commands.map(([at, took, name, status]) => element("tr", status ? { class: "differs" } : {},
    element("td", { class: "number" }, (at / 1e9).toFixed(6)), element("td", {}, name),
    element("td", { class: "number" }, (took / 1e3).toFixed(0) + " µs"),
    element("td", {}, status ? "0x" + status.toString(16) : "ok")));
  const failed = device.commands.filter((command) => command[3]).length;
  const here = device.commands.length;
  const cut = here < device.all_commands ? `, of which the first ${here} are here and above, all in timeline.html` : "";
  const title = `Commands${several ? ` of function ${device.n}` : ""}: ${device.all_commands}${cut}` +
    (failed ? `; ${failed} of ${cut ? "these" : "them"} failed` : "");
  return section(title, false, element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...["at, s", "command", "took", "status"].map((name) => element("th", {}, name)))),
    element("tbody", {}, ...rows))));
}

const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) {
    if (name === "text") made.textContent = text;
    else {
      const title = document.createElementNS(SVG, "title");
      title.textContent = text;
      made.append(title);
    }
  }
  return made;
}

/// Time on the chart: from the first to the last thing that happened to the function.
function span(device, timeline) {
  const times = device.commands.flatMap(([at, took]) => [at, at + took]);
  for (const vector of device.vectors) {
    for (const [from] of vector.spans) times.push(from);
    const bucket = timeline.end / timeline.buckets;
    for (const [at] of vector.fires) times.push(at * bucket);
  }
  if (!times.length) return [0, timeline.end || 1];
  const first = times.reduce((a, b) => Math.min(a, b)), last = times.reduce((a, b) => Math.max(a, b));
  const margin = (last - first) * 0.02 + 1;
  return [Math.max(0, first - margin), last + margin];
}

function chart(device, timeline) {
  const WIDTH = 1380, LEFT = 210, ROW = 20;
  const [first, last] = span(device, timeline);
  const x = (t) => LEFT + (Math.min(Math.max(t, first), last) - first) / (last - first) * (WIDTH - LEFT - 70);
  const rows = device.vectors.length;
  const height = (rows + 1) * ROW + 24;
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img" });
  const names = { 1: "programmed", 2: "unmasked" };
  device.vectors.forEach((vector, index) => {
    const y = index * ROW + 2;
    svg.append(shape("rect", { class: "row", x: LEFT, y, width: WIDTH - LEFT - 70, height: ROW - 4 }),
      shape("text", { x: 4, y: y + 12 }, `vector ${vector.n}  ${vector.purpose || ""}`.slice(0, 34)),
      shape("text", { x: WIDTH - 64, y: y + 12, class: "axis" }, `${vector.fired}×`));
    for (const [from, to, state] of vector.spans) {
      svg.append(shape("rect", { class: names[state], x: x(from), y: y + 3, height: ROW - 10,
        width: Math.max(1, x(to) - x(from)) }, `${names[state]} ${(from / 1e9).toFixed(3)} to ${(to / 1e9).toFixed(3)} s`));
    }
    const bucket = timeline.end / timeline.buckets;
    const most = Math.max(1, ...vector.fires.map((fire) => fire[1]));
    for (const [at, count] of vector.fires) {
      const tall = 4 + (ROW - 8) * Math.sqrt(count / most);
      svg.append(shape("rect", { class: "fire", x: x(at * bucket), y: y + ROW - 4 - tall, width: 2, height: tall },
        `${count} interrupts`));
    }
  });
  const y = rows * ROW + 2;
  svg.append(shape("rect", { class: "row", x: LEFT, y, width: WIDTH - LEFT - 70, height: ROW - 4 }),
    shape("text", { x: 4, y: y + 12 }, device.n === null ? "commands" : `commands of function ${device.n}`));
  for (const [at, took, name, status] of device.commands) {
    svg.append(shape("rect", { class: status ? "failed" : "command", x: x(at), y: y + 2, height: ROW - 8,
      width: Math.max(1.2, x(at + took) - x(at)) }, `${name}${status ? " status 0x" + status.toString(16) : ""}`));
  }
  for (const mark of device.marks || []) {
    if (!["fault", "host.event", "rule.violation", "pci.flr"].includes(mark.k)) continue;
    svg.append(shape("line", { class: "mark", x1: x(mark.t), x2: x(mark.t), y1: 0, y2: y + ROW }, `${mark.k}: ${mark.x}`));
  }
  for (let tick = 0; tick <= 8; tick++) {
    const t = first + (last - first) * tick / 8;
    svg.append(shape("text", { class: "axis", x: x(t), y: height - 6, "text-anchor": "middle" }, (t / 1e9).toFixed(2) + " s"));
  }
  return svg;
}

function limitsTable(chosen) {
  const rows = chosen.flatMap((run) => run.combinations.map((one) => ({ run, one })));
  rows.sort((a, b) => Boolean(b.one.problem) - Boolean(a.one.problem));
  const body = rows.map(({ run, one }) => element("tr", one.problem ? { class: "differs" } : {},
    element("td", {}, run.guest), element("td", {}, one.cpus),
    element("td", {}, one.device.replace(/^mana,/, "").replace(/,netdev=[^,]*/g, "") ,
      ` ports=${Math.max(1, (one.device.match(/netdev=/g) || []).length)}`),
    element("td", { class: "number" }, String(one.expected_vectors)), element("td", { class: "number" }, String(one.vectors)),
    element("td", { class: "number" }, String(one.queues)), element("td", { class: "number" }, String(one.idle)),
    element("td", {}, one.problem || "as the model says")));
  const titles = ["kernel", "CPUs", "limits", "vectors by the model", "vectors", "queues a port", "idle vectors", ""];
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...titles.map((name) => element("th", {}, name)))),
    element("tbody", {}, ...body)));
}

function limits() {
  const chosen = runs.filter((run) => run.combinations.length);
  if (!chosen.length) return;
  const all = chosen.flatMap((run) => run.combinations);
  const differ = all.filter((one) => one.problem).length;
  const place = document.getElementById("limits");
  place.hidden = false;
  place.append(element("h2", {}, "Vector matrix"),
    element("p", {}, `${all.length} combinations of limits, ${all.length - differ} as the model of the driver's generation says` +
      (differ ? `, ${differ} not.` : ".")),
    section("All combinations", differ > 0, limitsTable(chosen)));
}

function sweepTable(run) {
  const rows = run.sweep.map((point) => element("tr", point.problem ? { class: "differs" } : {},
    element("td", { class: "number" }, String(point.n)), element("td", {}, point.do), element("td", {}, point.command || ""),
    element("td", {}, point.action || ""), element("td", {}, point.problem || "recovered")));
  const titles = ["n", "fault", "command", "the action itself", "afterwards"];
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...titles.map((name) => element("th", {}, name)))),
    element("tbody", {}, ...rows)));
}

function sweeps() {
  const chosen = runs.filter((run) => run.sweep.length);
  if (!chosen.length) return;
  const place = document.getElementById("sweeps");
  place.hidden = false;
  const points = chosen.flatMap((run) => run.sweep);
  place.append(element("h2", {}, "Sweeps"),
    element("p", {}, `${points.length} faults at ${chosen.length} sweeps, ${points.filter((point) => point.problem).length} not got over.`));
}

function coverage() {
  const byGuest = new Map();
  for (const run of runs) {
    if (!run.coverage) continue;
    const sum = byGuest.get(run.guest) || { all: new Set(), reached: new Set() };
    run.coverage.all.forEach((name) => sum.all.add(name));
    run.coverage.reached.forEach((name) => sum.reached.add(name));
    byGuest.set(run.guest, sum);
  }
  if (!byGuest.size) return;
  const place = document.getElementById("coverage");
  place.hidden = false;
  place.append(element("h2", {}, "Functions of mana.ko that were executed"));
  for (const [guest, { all, reached }] of [...byGuest].sort((a, b) => compare(a[0], b[0]))) {
    const never = [...all].filter((name) => !reached.has(name)).sort();
    const there = all.size - never.length;
    place.append(section(`${guest}: ${there} of ${all.size} (${Math.round(100 * there / all.size)} %)`, false,
      element("p", {}, "Never reached:"), element("pre", {}, never.join("\n"))));
  }
}

head();
overview();
limits();
sweeps();
coverage();
const wanted = decodeURIComponent(location.hash.slice(1));
const first = runs.find((run) => run.name === wanted) || runs.find((run) => run.is_failure) ||
  runs.find((run) => run.evidence.timeline && run.evidence.timeline.devices) || runs[0];
if (first) choose(first, Boolean(wanted));
