// Plots (plotly.js is in the page) and ball-and-stick views on 2D canvases: no network, no WebGL.
"use strict";
const data = JSON.parse(document.getElementById("report-data").textContent);
const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// ---------------------------------------------------------------- plots
function drawPlots() {
  const axis = { gridcolor: token("line"), linecolor: token("line"), zeroline: false };
  for (const [id, figure] of Object.entries(data.plots)) {
    const layout = structuredClone(figure.layout);
    Object.assign(layout, { paper_bgcolor: "transparent", plot_bgcolor: "transparent" });
    layout.font = { color: token("text"), family: "system-ui, sans-serif", size: 12 };
    for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) Object.assign(layout[key], axis);
    const traces = figure.data.map((trace) => ({ ...trace, line: { ...trace.line, color: token(trace.meta) } }));
    Plotly.react(id, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

// ---------------------------------------------------------------- molecules
const BALL = 0.42, STICK = 0.16, GAP = 0.19; // share of the covalent radius; Angstrom; Angstrom between double bonds
const IDENTITY = [1, 0, 0, 0, 1, 0, 0, 0, 1];
const multiply = (a, b) => IDENTITY.map((_, k) => {
  const i = 3 * Math.floor(k / 3), j = k % 3;
  return a[i] * b[j] + a[i + 1] * b[j + 3] + a[i + 2] * b[j + 6];
});
const turn = (about_x, about_y) => {
  const [cx, sx, cy, sy] = [Math.cos(about_x), Math.sin(about_x), Math.cos(about_y), Math.sin(about_y)];
  return multiply([1, 0, 0, 0, cx, -sx, 0, sx, cx], [cy, 0, sy, 0, 1, 0, -sy, 0, cy]);
};
const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
const mix = (a, b, t) => a.map((c, k) => Math.round(c + (b[k] - c) * t));
const css = (c) => `rgb(${c.join(",")})`;

function drawMolecule(canvas, molecule, view, reach) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const ctx = canvas.getContext("2d"), scale = view.zoom * 0.5 * Math.min(width, height) / reach;
  ctx.setTransform(ratio, 0, 0, ratio, width * ratio / 2, height * ratio / 2);
  ctx.lineCap = "butt";
  const R = view.rotation, ground = rgb(token("well")), dark = rgb(token("outline"));
  const points = molecule.positions.map(([x, y, z], k) => {
    const depth = R[6] * x + R[7] * y + R[8] * z, near = 1 / (1 - 0.2 * depth / reach);
    const fog = Math.max(0, Math.min(0.55, 0.25 - 0.35 * depth / reach));
    const element = data.elements[molecule.numbers[k]];
    return {
      x: (R[0] * x + R[1] * y + R[2] * z) * scale * near, y: -(R[3] * x + R[4] * y + R[5] * z) * scale * near,
      at: [x, y, z], depth, fog, scale: scale * near, color: mix(rgb(element.color), ground, fog), radius: BALL * element.radius + 0.1,
    };
  });
  const items = points.map((p, k) => ({ depth: p.depth, draw: () => ball(ctx, p, molecule.unstable.includes(k), dark, ground) }));
  for (const [i, j, order] of molecule.bonds) {
    const a = points[i], b = points[j];
    const middle = { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
    // each half in the colour of its atom, from inside the surface of the ball, so that the joint is hidden from every side
    for (const [p, q] of [[a, b], [b, a]]) {
      const out = Math.min(0.5, 0.75 * p.radius / Math.hypot(...[0, 1, 2].map((c) => p.at[c] - q.at[c])));
      const start = { x: p.x + out * (q.x - p.x), y: p.y + out * (q.y - p.y) };
      items.push({ depth: 0.75 * p.depth + 0.25 * q.depth, draw: () => stick(ctx, p, start, middle, order, dark, ground) });
    }
  }
  items.sort((a, b) => a.depth - b.depth).forEach((item) => item.draw());
}

function ball(ctx, p, ringed, dark, ground) {
  const r = p.radius * p.scale;
  const light = ctx.createRadialGradient(p.x - 0.35 * r, p.y - 0.4 * r, 0.1 * r, p.x, p.y, r);
  light.addColorStop(0, css(mix(p.color, [255, 255, 255], 0.7 * (1 - p.fog))));
  light.addColorStop(0.45, css(p.color));
  light.addColorStop(1, css(mix(p.color, dark, 0.38)));
  ctx.beginPath();
  ctx.arc(p.x, p.y, r, 0, 2 * Math.PI);
  ctx.fillStyle = light;
  ctx.fill();
  ctx.lineWidth = 0.8;
  ctx.strokeStyle = css(mix(mix(p.color, dark, 0.6), ground, p.fog));
  ctx.stroke();
  if (!ringed) return;
  ctx.beginPath();
  ctx.arc(p.x, p.y, r + 2.5, 0, 2 * Math.PI);
  ctx.lineWidth = 1.5;
  ctx.strokeStyle = token("ring");
  ctx.stroke();
}

function stick(ctx, p, start, middle, order, dark, ground) {
  const length = Math.hypot(middle.x - p.x, middle.y - p.y) || 1;
  const across = [-(middle.y - p.y) / length, (middle.x - p.x) / length], width = p.scale * STICK * (order > 1 ? 0.7 : 1);
  for (let k = 0; k < order; k++) {
    // the offsets are symmetric, so the two halves meet although they look in opposite directions
    const shift = (k - (order - 1) / 2) * GAP * p.scale, ox = across[0] * shift, oy = across[1] * shift;
    const layers = [[width + 1.4, mix(mix(p.color, dark, 0.6), ground, p.fog)], [width, mix(p.color, dark, 0.15)],
      [0.35 * width, mix(p.color, [255, 255, 255], 0.35 * (1 - p.fog))]];
    for (const [line, color] of layers) {
      ctx.beginPath();
      ctx.moveTo(start.x + ox, start.y + oy);
      ctx.lineTo(middle.x + ox, middle.y + oy);
      ctx.lineWidth = line;
      ctx.strokeStyle = css(color);
      ctx.stroke();
    }
  }
}

function element(tag, properties, parent) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

function addCard(molecules, parent) {
  const card = element("div", { className: "card", tabIndex: 0 }, parent);
  card.setAttribute("role", "group");
  card.setAttribute("aria-label", "Molecules that can be turned with the arrow keys");
  const canvases = molecules.map((molecule) => {
    const figure = element("figure", { className: molecules.length === 1 ? "alone" : "" }, card);
    const canvas = element("canvas", {}, figure), caption = element("figcaption", {}, figure);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", [molecule.set, molecule.formula, ...molecule.facts].join(", "));
    element("b", { className: molecule.role, textContent: `${molecule.set} ${molecule.index}` }, caption);
    element("span", { textContent: ` ${molecule.formula}` }, caption);
    for (const fact of molecule.facts) {
      element("br", {}, caption);
      element("span", { textContent: fact }, caption);
    }
    return canvas;
  });
  const reach = Math.max(1.5, ...molecules.flatMap((m) => m.positions.map((x) => Math.hypot(...x)))) + 0.5;
  const view = { rotation: IDENTITY, zoom: 1 };
  const draw = () => canvases.forEach((canvas, k) => drawMolecule(canvas, molecules[k], view, reach));
  const rotate = (about_x, about_y) => { view.rotation = multiply(turn(about_x, about_y), view.rotation); draw(); };
  const zoom = (factor) => { view.zoom = Math.max(0.4, Math.min(6, view.zoom * factor)); draw(); };
  card.addEventListener("pointerdown", (event) => card.setPointerCapture(event.pointerId));
  card.addEventListener("pointermove", (event) => { if (event.buttons) rotate(event.movementY / 90, event.movementX / 90); });
  card.addEventListener("wheel", (event) => {
    if (document.activeElement !== card) return; // until it is clicked the wheel is the page's
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 500));
  }, { passive: false });
  card.addEventListener("dblclick", () => { Object.assign(view, { rotation: IDENTITY, zoom: 1 }); draw(); });
  const keys = { ArrowLeft: () => rotate(0, -0.15), ArrowRight: () => rotate(0, 0.15), ArrowUp: () => rotate(-0.15, 0),
    ArrowDown: () => rotate(0.15, 0), "+": () => zoom(1.15), "-": () => zoom(1 / 1.15) };
  card.addEventListener("keydown", (event) => { if (keys[event.key]) { event.preventDefault(); keys[event.key](); } });
  return draw;
}

// ---------------------------------------------------------------- the page
for (const { symbol, color } of Object.values(data.elements)) {
  const entry = element("span", {}, document.getElementById("legend"));
  element("i", {}, entry).style.background = color;
  entry.append(symbol);
}
const cards = data.cards.map((molecules) => addCard(molecules, document.getElementById("cards")));
const drawAll = () => { drawPlots(); cards.forEach((draw) => draw()); };
drawAll();
window.addEventListener("resize", () => cards.forEach((draw) => draw()));
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
