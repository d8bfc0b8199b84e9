// Draws the charts again with the axes, the smoothing and the runs that the reader chooses, and shows values.
// Without this script, the page shows the drawings of charts.py. Texts are only ever set as text, never as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { left, right, top, bottom, start, dots } = data.layout;
  const HEIGHT = 280;
  const controls = document.getElementById("controls");
  const tip = document.getElementById("tip");
  if (!controls) return;
  const chosen = (name) => controls.elements[name];
  const boxes = [...document.querySelectorAll(".legend input")];
  const visible = () => data.runs.filter((_, number) => !boxes[number] || boxes[number].checked);
  const byTokens = () => chosen("x").value === "tokens";

  function tokensAt(run, step) {
    const phase = run.phases.findLast(([first]) => first <= step);
    return phase ? phase[1] + (step - phase[0]) * phase[2] : step * run.tokens;
  }

  function add(parent, tag, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  }

  function format(value, digits = 4) {
    if (value === null || !Number.isFinite(value)) return "not finite";
    const size = Math.abs(value);
    for (const [from, unit, name] of [[1e12, 1e12, "T"], [1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
      if (size >= from && size < 1e15) return Number((value / unit).toPrecision(digits)) + name;
    if (size && (size < 1e-3 || size >= 1e15)) return String(Number(value.toPrecision(digits)).toExponential());
    return String(Number(value.toPrecision(digits)));
  }

  function ticks(low, high, log) {
    if (log && high / low >= 10) {
      const powers = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of high / low > 100 ? [1] : [1, 2, 5]) powers.push(factor * 10 ** power);
      const inside = powers.filter((value) => value >= low * 0.999 && value <= high * 1.001);
      const every = Math.ceil(inside.length / 8);
      return inside.filter((_, index) => index % every === 0);
    }
    const rough = (high - low) / 5;
    if (!(rough > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * Math.abs(high) && found.length < 15; index++)
      found.push(index * step);
    return found;
  }

  // a function from values to places; values that a logarithm does not have give null
  function scale(low, high, from, to, log) {
    const map = log ? Math.log : (value) => value;
    const width = map(high) - map(low) || 1;
    return (value) => (value === null || (log && value <= 0) ? null : from + ((to - from) * (map(value) - map(low))) / width);
  }

  function smooth(values, share) {
    const width = Math.floor(values.length * share);
    if (!width) return values;
    return values.map((_, index) => {
      const half = Math.min(index, width);
      const around = values.slice(index - half, index + half + 1).filter((value) => value !== null);
      return around.length ? around.reduce((sum, value) => sum + value) / around.length : null;
    });
  }

  function path(xs, ys) {
    let text = "", pen = "M";
    xs.forEach((x, index) => {
      if (x === null || ys[index] === null) pen = "M";
      else {
        text += `${pen}${x.toFixed(1)},${ys[index].toFixed(1)}`;
        pen = "L";
      }
    });
    return text;
  }

  function limits(values, log) {
    let low = Infinity, high = -Infinity;
    for (const value of values)
      if (value !== null && value !== undefined && !(log && value <= 0)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    return low <= high ? [low, high] : null;
  }

  function begin(svg, height, xLimits, xLog) {
    const width = Math.max(280, svg.clientWidth || 560);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const x = scale(xLimits[0], xLimits[1], left, width - right, xLog);
    const floor = height - bottom;
    for (const tick of ticks(xLimits[0], xLimits[1], xLog)) {
      add(svg, "line", { class: "grid", x1: x(tick), x2: x(tick), y1: floor, y2: floor + 4 });
      add(svg, "text", { class: "mid", x: x(tick), y: floor + 17 }, format(tick));
    }
    add(svg, "line", { class: "axis", x1: left, x2: width - right, y1: floor, y2: floor });
    add(svg, "text", { class: "mid", x: (left + width - right) / 2, y: height - 3 }, byTokens() ? "tokens" : "step");
    const clip = add(svg, "clipPath", { id: `${svg.id}-area` });
    add(clip, "rect", { x: left, y: top - 4, width: width - right - left + 4, height: floor - top + 6 });
    return { width, floor, x, inside: () => add(svg, "g", { "clip-path": `url(#${svg.id}-area)` }) };
  }

  function drawChart(chart) {
    const svg = document.getElementById(`chart-${chart.name}`);
    if (!svg) return;
    const xLog = chosen("xlog").checked, yLog = chosen("ylog").checked, tokens = byTokens();
    const series = visible().filter((run) => run.curves[chart.name] && (!tokens || run.tokens)).map((run) => {
      const curve = run.curves[chart.name];
      const xs = curve.x.map((step) => (tokens ? tokensAt(run, step) : step));
      const line = chart.smooth ? smooth(curve.y, Number(chosen("smoothing").value) / 100) : curve.y;
      return { run, curve, xs, line, low: curve.low || curve.y, high: curve.high || curve.y };
    });
    const cut = (values) => (chart.name === "loss" && !yLog ? values.slice(Math.floor(values.length * start)) : values);
    const xLimits = limits(series.flatMap((one) => one.xs), xLog);
    const yLimits = limits(series.flatMap((one) => [...cut(one.low), ...cut(one.high)]), yLog);
    svg.seen = null;
    if (!xLimits || !yLimits) {
      svg.replaceChildren();
      return;
    }
    if (!xLog) xLimits[0] = 0;
    if (yLog) {
      yLimits[0] *= 0.95;
      yLimits[1] *= 1.05;
    } else {
      if (chart.zero) yLimits[0] = Math.min(0, yLimits[0]);
      const margin = yLimits[1] / 20 - yLimits[0] / 20 || Math.abs(yLimits[1]) / 10 || 1;
      yLimits[1] += margin;
      if (!(chart.zero && yLimits[0] === 0)) yLimits[0] -= margin;
    }
    const frame = begin(svg, HEIGHT, xLimits, xLog);
    const place = scale(yLimits[0], yLimits[1], frame.floor, top, yLog);
    const y = (value) => {
      const at = place(value);
      return at === null ? null : Math.max(-HEIGHT, Math.min(2 * HEIGHT, at));
    };
    for (const tick of ticks(yLimits[0], yLimits[1], yLog)) {
      add(svg, "line", { class: "grid", x1: left, x2: frame.width - right, y1: y(tick), y2: y(tick) });
      add(svg, "text", { class: "end", x: left - 6, y: y(tick) + 4 }, format(tick));
    }
    const inside = frame.inside();
    for (const { run, curve, xs, line, low, high } of series) {
      const group = add(inside, "g", { class: run.style });
      const places = xs.map(frame.x);
      if (chart.name === "loss")
        for (const [step, kind] of run.events)
          if (kind !== "saved") {
            const x = frame.x(tokens ? tokensAt(run, step) : step);
            if (x === null) continue;
            const mark = add(group, "line", { class: "mark", x1: x, x2: x, y1: top, y2: frame.floor });
            add(mark, "title", {}, `${run.name}, step ${step}: ${kind}`);
          }
      if (curve.low) {
        const edge = (values) => places.map((x, index) => [x, y(values[index])]).filter(([x, at]) => x !== null && at !== null);
        const around = [...edge(high), ...edge(low).reverse()];
        add(group, "polygon", { class: "band", points: around.map((pair) => pair.map((at) => at.toFixed(1)).join()).join(" ") });
      } else if (line !== curve.y) add(group, "path", { class: "raw", d: path(places, curve.y.map(y)) });
      add(group, "path", { class: "line", d: path(places, line.map(y)) });
      if (xs.length <= dots && !chart.smooth)
        line.forEach((value, index) => {
          if (places[index] !== null && y(value) !== null) add(group, "circle", { cx: places[index], cy: y(value), r: 2.5 });
        });
    }
    svg.seen = { series, frame, chart };
  }

  function drawEvents() {
    const svg = document.getElementById("chart-events");
    if (!svg) return;
    const rows = data.kinds, tokens = byTokens(), xLog = chosen("xlog").checked;
    const events = visible().filter((run) => !tokens || run.tokens).flatMap((run) =>
      run.events.map(([step, kind]) => ({ run, step, kind, x: tokens ? tokensAt(run, step) : step })));
    const offset = (run) => (data.runs.indexOf(run) - (data.runs.length - 1) / 2) * Math.min(4, 10 / data.runs.length);
    const xLimits = limits(events.map((event) => event.x), xLog);
    if (!xLimits) {
      svg.replaceChildren();
      return;
    }
    if (!xLog) xLimits[0] = 0;
    const frame = begin(svg, top + data.layout.row * rows.length + bottom, xLimits, xLog);
    const y = (kind) => top + data.layout.row * (rows.indexOf(kind) + 1) - 6;
    for (const kind of rows) {
      add(svg, "text", { x: left, y: y(kind) - 7 }, kind);
      add(svg, "line", { class: "grid", x1: left, x2: frame.width - right, y1: y(kind), y2: y(kind) });
    }
    const inside = frame.inside();
    for (const { run, step, kind, x } of events) {
      if (frame.x(x) === null) continue;
      const dot = add(inside, "circle", { class: run.style, cx: frame.x(x), cy: y(kind) + offset(run), r: 3.5 });
      add(dot, "title", {}, `${run.name}, step ${step}: ${kind}`);
    }
  }

  function show(svg, event) {
    if (!svg.seen) return;
    const { series, frame, chart } = svg.seen;
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) * frame.width) / box.width;
    const found = [];
    for (const { run, curve, xs } of series) {
      let best = -1, distance = Infinity;
      xs.forEach((x, index) => {
        const place = frame.x(x);
        if (place !== null && Math.abs(place - at) < distance) [best, distance] = [index, Math.abs(place - at)];
      });
      if (best >= 0) found.push({ run, curve, best, place: frame.x(xs[best]), distance });
    }
    if (!found.length) return;
    const nearest = found.reduce((a, b) => (b.distance < a.distance ? b : a));
    svg.querySelector(".cursor")?.remove();
    add(svg, "line", { class: "cursor", x1: nearest.place, x2: nearest.place, y1: top, y2: frame.floor });
    tip.replaceChildren();
    for (const { run, curve, best } of found.slice(0, 12)) {
      const line = document.createElement("div");
      const key = document.createElement("span");
      key.className = `key ${run.style}`;
      const range = curve.low && curve.low[best] !== null ? ` (${format(curve.low[best])} to ${format(curve.high[best])})` : "";
      const unit = chart.unit ? ` ${chart.unit}` : "";
      line.append(key, `${run.name}, step ${format(curve.x[best], 7)}: ${format(curve.y[best], 5)}${range}${unit}`);
      tip.append(line);
    }
    tip.hidden = false;
    const beside = event.pageX + 14;
    tip.style.left = `${Math.max(8, Math.min(beside, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.pageY + 16}px`;
  }

  function hide(svg) {
    tip.hidden = true;
    svg.querySelector(".cursor")?.remove();
  }

  function drawAll() {
    data.charts.forEach(drawChart);
    drawEvents();
  }

  for (const chart of data.charts) {
    const svg = document.getElementById(`chart-${chart.name}`);
    svg?.addEventListener("pointermove", (event) => show(svg, event));
    svg?.addEventListener("pointerdown", (event) => show(svg, event));
    svg?.addEventListener("pointerleave", () => hide(svg));
  }
  controls.hidden = false;
  controls.addEventListener("input", drawAll);
  controls.addEventListener("submit", (event) => event.preventDefault());
  for (const box of boxes) {
    box.hidden = false;
    box.addEventListener("change", drawAll);
  }
  window.addEventListener("resize", drawAll);
  let closed = [];
  window.addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
  });
  window.addEventListener("afterprint", () => closed.forEach((details) => (details.open = false)));
  drawAll();
})();
