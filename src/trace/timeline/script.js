"use strict";
// Draws the page from the JSON that is embedded in it. Times are nanoseconds from the first event.
const trace = JSON.parse(document.getElementById("data").textContent);
const GUTTER = 214, RIGHT = 76, PAD = 8, LANE = 26, COMMAND = 22, LABELS = 126, AXIS = 26;
const tip = document.getElementById("tip");

// ---- Time -------------------------------------------------------------------------------------------------

function duration(ns) {
  const digits = (x) => x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2);
  if (ns < 1e3) return ns.toFixed(0) + " ns";
  if (ns < 1e6) return digits(ns / 1e3) + " µs";
  if (ns < 1e9) return digits(ns / 1e6) + " ms";
  return digits(ns / 1e9) + " s";
}
const moment = (ns) => (ns / 1e9).toFixed(6) + " s";

// Every time at which something but interrupts happened, in order.
function happenings() {
  const times = new Set([0, trace.end]);
  for (const device of trace.devices) {
    for (const c of device.commands) { times.add(c.t); times.add(c.t + c.d); }
    for (const m of device.marks) times.add(m.t);
    for (const v of device.vectors) {
      for (const s of v.spans) { times.add(s[0]); times.add(s[1]); }
      for (const n of v.notes) times.add(n[0]);
    }
  }
  return [...times].sort((a, b) => a - b);
}

// A scale maps time to 0..1 and back. Linear time is what a clock shows; folded time lets no pause between two
// steps of the driver take more room than `cap`, so that all pauses together take about half of the page.
function linearScale() {
  const end = Math.max(trace.end, 1);
  return { at: (t) => t / end, back: (x) => x * end, gaps: [] };
}
function foldedScale() {
  const times = happenings();
  const steps = times.slice(1).map((t, i) => t - times[i]);
  const width = (cap) => steps.reduce((sum, step) => sum + Math.min(step, cap), 0);
  let cap = 1000;
  while (cap < trace.end && steps.filter((s) => s > cap).length > Math.min(40, .3 * steps.length)) cap *= 1.5;
  const long = steps.filter((s) => s > cap).length;
  const short = width(cap) - long * cap;
  if (long > 0) cap = Math.max(cap, short / long);
  const total = Math.max(width(cap), 1);
  const xs = [0];
  const gaps = [];
  steps.forEach((step, i) => {
    xs.push(xs[i] + Math.min(step, cap) / total);
    if (step > 3 * cap) gaps.push({ from: times[i], to: times[i + 1] });
  });
  const find = (list, value) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (list[mid] <= value) low = mid; else high = mid; }
    return low;
  };
  const between = (from, to, value) => {
    const i = find(from, value), span = from[i + 1] - from[i] || 1;
    return to[i] + (value - from[i]) / span * (to[i + 1] - to[i]);
  };
  if (times.length < 2) return linearScale();
  return { at: (t) => between(times, xs, t), back: (x) => between(xs, times, x), gaps };
}

const scales = { true: foldedScale(), false: linearScale() };
const view = { folded: true, from: 0, to: 1 };
const scale = () => scales[view.folded];

// ---- Drawing ----------------------------------------------------------------------------------------------

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function html(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const family = (command) => command.s !== 0 && command.s !== 0x105 ? "--failed"
  : command.n.startsWith("SMC") ? "--smc" : command.n.startsWith("GDMA") ? "--gdma" : "--mana";
const short = (name) => name.replace(/^(GDMA|MANA|SMC)_/, "").toLowerCase().replaceAll("_", " ");

class Chart {
  constructor(device, root) {
    this.device = device;
    this.node = svg("svg", { role: "img", "aria-label": "Vectors of device " + device.n + " over time" });
    root.append(this.node);
    this.node.addEventListener("pointermove", (event) => this.hover(event));
    this.node.addEventListener("pointerleave", () => { tip.hidden = true; });
    this.node.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.node.addEventListener("pointerdown", (event) => this.drag(event));
    this.node.addEventListener("dblclick", () => show(0, 1));
  }
  x(t) { return GUTTER + PAD + (scale().at(t) - view.from) / (view.to - view.from) * (this.width - 2 * PAD); }
  time(x) {
    const share = (x - GUTTER - PAD) / (this.width - 2 * PAD);
    return scale().back(Math.min(1, Math.max(0, view.from + share * (view.to - view.from))));
  }
  seen(x, margin = 0) { return x >= GUTTER - margin && x <= GUTTER + this.width + margin; }
  tipped(node, text) { node.dataset.tip = text; return node; }

  draw() {
    const { vectors, commands, marks } = this.device;
    this.width = Math.max(this.node.clientWidth - GUTTER - RIGHT, 100);
    this.top = AXIS + LABELS + COMMAND + 30;
    const height = this.top + vectors.length * LANE + 10;
    this.node.setAttribute("height", height);
    const clip = "clip" + this.device.n;
    const area = svg("g", { "clip-path": `url(#${clip})` });
    // Labels may run over the right edge.
    this.labels = svg("g", {});
    this.node.replaceChildren(
      svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: GUTTER, y: 0, width: this.width, height }))),
      ...this.stripes(vectors), area, this.labels, ...this.names(vectors));
    this.gaps(area, height);
    this.axis(area, height);
    this.commands(area, commands);
    this.marks(area, marks, height);
    vectors.forEach((vector, row) => this.lane(area, vector, this.top + row * LANE));
    this.cursor = svg("line", { y1: AXIS, y2: height, stroke: "var(--soft)", "stroke-dasharray": "2 3", visibility: "hidden" });
    area.append(this.cursor);
  }

  stripes(vectors) {
    return vectors.map((_, row) => svg("rect", { x: 0, y: this.top + row * LANE, width: GUTTER + this.width, height: LANE,
      fill: row % 2 ? "none" : "var(--stripe)" }));
  }

  names(vectors) {
    const label = (x, y, text, soft) => svg("text", { x, y, class: soft ? "soft small" : "" }, text);
    const clip = (text, length) => text.length > length ? text.slice(0, length - 1) + "…" : text;
    const rows = vectors.flatMap((vector, row) => {
      const y = this.top + row * LANE + 17;
      return [label(6, y, "vector " + vector.n),
        this.tipped(label(78, y, clip(vector.purpose || "unused", 20), true), vector.purpose || "no queue uses it")];
    });
    return [label(6, AXIS + LABELS + 16, "commands", false), ...rows];
  }

  gaps(area, height) {
    if (!view.folded) return;
    for (const gap of scale().gaps) {
      const x1 = this.x(gap.from), x2 = this.x(gap.to);
      if (x2 < GUTTER || x1 > GUTTER + this.width || x2 - x1 < 1) continue;
      const band = svg("rect", { x: x1, y: AXIS, width: x2 - x1, height: height - AXIS, fill: "var(--gap)" });
      area.append(this.tipped(band, "no step of the driver for " + duration(gap.to - gap.from) + ", drawn narrower"));
      if (x2 - x1 > 34) {
        area.append(svg("text", { x: (x1 + x2) / 2, y: AXIS + 12, "text-anchor": "middle", class: "soft small" },
          duration(gap.to - gap.from)));
      }
    }
  }

  axis(area, height) {
    const count = Math.max(2, Math.floor(this.width / 130));
    for (let i = 0; i <= count; i++) {
      const x = GUTTER + PAD + i / count * (this.width - 2 * PAD), t = this.time(x);
      // Enough digits to tell a place a third of the way to the next one from this one.
      const step = Math.max(this.time(x + this.width / count / 3) - this.time(x - this.width / count / 3), 1);
      const digits = Math.min(6, Math.max(1, Math.ceil(9 - Math.log10(step))));
      area.append(svg("line", { x1: x, x2: x, y1: AXIS - 5, y2: height, stroke: "var(--line)" }));
      this.labels.append(svg("text", { x, y: 14, class: "soft small",
        "text-anchor": "middle" }, (t / 1e9).toFixed(digits) + " s"));
    }
  }

  commands(area, commands) {
    const y = AXIS + LABELS;
    let free = -Infinity, run = null;
    const flush = () => {
      if (!run) return;
      const width = Math.max(run.x2 - run.x1, 3);
      const fill = `var(${run.color})`;
      const text = run.count > 1 ? `${run.count} commands, ${moment(run.first.t)} and on; zoom in to see each\n${[...run.names].join(", ")}`
        : `${run.first.q || run.first.n}\n→ ${run.first.a}\nat ${moment(run.first.t)}`;
      area.append(this.tipped(svg("rect", { x: run.x1, y, width, height: COMMAND, rx: 1.5, fill }), text));
      const visible = run.x1 >= GUTTER - 2 && run.x1 <= GUTTER + this.width;
      if (visible && run.x1 - free > 15.5) {
        const x = run.x1 + width / 2;
        const label = short(run.first.n) + (run.count > 1 ? ` +${run.count - 1}` : "");
        this.labels.append(svg("text", { x, y: y - 5, class: "small", transform: `rotate(-50 ${x} ${y - 5})`, style: `fill:${fill}` }, label));
        free = run.x1;
      }
      run = null;
    };
    for (const command of commands) {
      const x1 = this.x(command.t), x2 = this.x(command.t + command.d), color = family(command);
      if (x2 < GUTTER - 4 || x1 > GUTTER + this.width + 4) continue;
      const failed = color === "--failed";
      if (run && x1 - run.x2 < 1.5 && Math.max(x2 - x1, run.x2 - run.x1) < 3 && !failed && run.color !== "--failed") {
        run.x2 = Math.max(x2, run.x2); run.count++; run.names.add(command.n);
      } else {
        flush();
        run = { x1, x2, first: command, count: 1, color, names: new Set([command.n]) };
      }
    }
    flush();
  }

  marks(area, marks, height) {
    let free = -Infinity;
    for (const mark of marks) {
      const x = this.x(mark.t), bad = mark.k === "rule.violation" || mark.k === "fault";
      if (!this.seen(x, 2)) continue;
      const color = bad ? "var(--failed)" : "var(--mark)", y = AXIS + LABELS + COMMAND + 14;
      const text = mark.x + "\nat " + moment(mark.t);
      area.append(svg("line", { x1: x, x2: x, y1: y, y2: height, stroke: color, "stroke-dasharray": bad ? "" : "3 3", opacity: .7 }));
      area.append(this.tipped(svg("circle", { cx: x, cy: y, r: 4, fill: color }), text));
      const label = mark.k === "vport.rx" ? (mark.x.includes("receive on") ? "receive on" : "receive off") : mark.k.replace("msix.", "MSI-X ");
      if (x > free) {
        this.labels.append(svg("text", { x: x + 7, y: y + 4, class: "soft small" }, label));
        free = x + 14 + label.length * 6.3;
      }
    }
  }

  lane(area, vector, y) {
    const names = ["", "programmed, masked", "unmasked"];
    for (const [from, to, state] of vector.spans) {
      const x1 = this.x(from), x2 = this.x(to);
      if (x2 < GUTTER || x1 > GUTTER + this.width) continue;
      const bar = svg("rect", { x: x1, y: y + 6, width: Math.max(x2 - x1, 1.5), height: LANE - 12, rx: 2,
        fill: state === 2 ? "var(--unmasked)" : "var(--programmed)" });
      area.append(this.tipped(bar, `vector ${vector.n}: ${names[state]}\nfrom ${moment(from)} for ${duration(to - from)}`));
    }
    this.ticks(area, vector, vector.fires, y, "--fired", "fires");
    this.ticks(area, vector, vector.pends, y, "--pended", "is masked and pends");
    for (const [t, text] of vector.notes) {
      const x = this.x(t), m = y + LANE / 2;
      if (!this.seen(x, 5)) continue;
      const d = `M${x} ${m - 5}L${x + 5} ${m}L${x} ${m + 5}L${x - 5} ${m}Z`;
      area.append(this.tipped(svg("path", { d, fill: "var(--made)", stroke: "var(--card)" }), `${text}\nat ${moment(t)}`));
    }
  }

  // One tick a pixel; the more interrupts in it, the taller.
  ticks(area, vector, points, y, color, verb) {
    const bins = new Map();
    for (const [t, count] of points) {
      const x = Math.round(this.x(t));
      if (!this.seen(x)) continue;
      const bin = bins.get(x) || { count: 0, first: t };
      bin.count += count;
      bins.set(x, bin);
    }
    for (const [x, bin] of bins) {
      const size = Math.min(LANE - 4, 10 + 4 * Math.log2(bin.count));
      const tick = svg("rect", { x: x - .75, y: y + (LANE - size) / 2, width: 1.5, height: size, fill: `var(${color})` });
      area.append(this.tipped(tick, `vector ${vector.n} ${verb}${bin.count > 1 ? " ×" + bin.count : ""}\nat ${moment(bin.first)}`));
    }
  }

  // ---- Hands on -------------------------------------------------------------------------------------------

  hover(event) {
    const box = this.node.getBoundingClientRect();
    const x = event.clientX - box.left;
    const inside = this.seen(x);
    this.cursor.setAttribute("visibility", inside ? "visible" : "hidden");
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    // Thin things are hard to hit: look a little to both sides too.
    const near = [0, -2, 2, -4, 4].map((dx) => document.elementsFromPoint(event.clientX + dx, event.clientY))
      .flat().filter((node) => node.dataset && node.dataset.tip);
    const text = near.length ? near[0].dataset.tip : inside ? moment(this.time(x)) : "";
    tip.hidden = !text;
    tip.textContent = text;
    const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + "px";
  }
  wheel(event) {
    event.preventDefault();
    const x = event.clientX - this.node.getBoundingClientRect().left - GUTTER;
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) return move(event.deltaX / this.width);
    zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, Math.min(1, Math.max(0, x / this.width)));
  }
  drag(event) {
    let last = event.clientX;
    this.node.setPointerCapture(event.pointerId);
    const moved = (e) => { move((last - e.clientX) / this.width); last = e.clientX; };
    this.node.addEventListener("pointermove", moved);
    this.node.addEventListener("pointerup", () => this.node.removeEventListener("pointermove", moved), { once: true });
  }
}

function show(from, to) {
  const width = Math.min(1, Math.max(to - from, 1e-7));
  view.from = Math.min(Math.max(from, 0), 1 - width);
  view.to = view.from + width;
  redraw();
}
function zoom(factor, at = .5) {
  const width = view.to - view.from, middle = view.from + at * width;
  show(middle - at * width * factor, middle + (1 - at) * width * factor);
}
function move(share) {
  const by = share * (view.to - view.from);
  show(view.from + by, view.to + by);
}

// ---- The page around the charts ---------------------------------------------------------------------------

function facts(device) {
  const sum = (key) => device.vectors.reduce((total, vector) => total + vector[key], 0);
  const failed = device.commands.filter((command) => family(command) === "--failed").length;
  const entries = [["duration", duration(trace.end)], ["vectors used", device.vectors.length],
    ["interrupts", sum("fired").toLocaleString("en")], ["held back", sum("pended").toLocaleString("en")],
    ["commands", device.commands.length.toLocaleString("en")], ["failed commands", failed]];
  return html("dl", { class: "facts" }, ...entries.map(([name, value]) =>
    html("div", {}, html("dt", {}, name), html("dd", {}, String(value)))));
}
function legend() {
  const entries = [["", "--programmed", "programmed, masked"], ["", "--unmasked", "unmasked"], ["tick", "--fired", "fired"],
    ["tick", "--pended", "pending while masked"], ["dot", "--made", "EQ made on it"], ["", "--smc", "SMC"],
    ["", "--gdma", "GDMA command"], ["", "--mana", "MANA command"], ["", "--failed", "failed, or a broken rule"], ["", "--gap", "pause, drawn narrower"]];
  return html("div", { class: "legend" }, ...entries.map(([shape, color, text]) =>
    html("span", {}, html("i", { class: shape, style: `background:var(${color})` }), text)));
}
function table(device) {
  const head = ["vector", "what for", "APIC id", "programmed", "unmasked", "fired", "pended"];
  const rows = device.vectors.map((v) => [v.n, v.purpose, v.apic ?? "–", v.programmed, v.unmasked, v.fired, v.pended]);
  return html("div", { class: "card scroll" }, html("table", {},
    html("thead", {}, html("tr", {}, ...head.map((name) => html("th", {}, name)))),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map((cell) =>
      html("td", {}, typeof cell === "number" ? cell.toLocaleString("en") : cell)))))));
}

const charts = trace.devices.map((device) => {
  const root = document.getElementById("devices");
  if (trace.devices.length > 1) root.append(html("h2", {}, "Device " + device.n));
  const card = html("section", { class: "card" }, facts(device));
  root.append(card);
  const chart = new Chart(device, card);
  card.append(legend());
  root.append(table(device));
  return chart;
});

let due = false;
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; charts.forEach((chart) => chart.draw()); });
}
const press = (id, action) => document.getElementById(id).addEventListener("click", action);
press("in", () => zoom(1 / 1.6));
press("out", () => zoom(1.6));
press("reset", () => show(0, 1));
press("fold", (event) => {
  const [from, to] = [scale().back(view.from), scale().back(view.to)];
  view.folded = !view.folded;
  event.target.setAttribute("aria-pressed", view.folded);
  show(scale().at(from), scale().at(to));
});
addEventListener("keydown", (event) => {
  const action = { "+": () => zoom(1 / 1.6), "=": () => zoom(1 / 1.6), "-": () => zoom(1.6), "0": () => show(0, 1),
    ArrowLeft: () => move(-.15), ArrowRight: () => move(.15) }[event.key];
  if (action && !event.ctrlKey && !event.metaKey) { event.preventDefault(); action(); }
});
addEventListener("resize", redraw);
redraw();
