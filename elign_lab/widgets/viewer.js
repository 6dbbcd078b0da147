// Ball-and-stick viewer on a 2D canvas: no WebGL, no network, no build step.
// Frames arrive once, as float32 (layout: encode() in viewer.py). Camera axes: x right, y up, z to the viewer; Angstrom.

const STICK = 0.12, BOND = 1.3, OVERLAP = 0.4; // as in static.py
const SPRITE = 160, FOG_LEVELS = 8, HALO = 1.4;
const DRAG_MS = 67; // between two messages: 15 a second
const ARROW = "#f59e0b", ACCENT = "#ff9d2e", GHOST = [47, 158, 143];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const TILT = [0.96, 0.0, 0.28, 0.11, 0.91, -0.39, -0.25, 0.41, 0.88];
const ICONS = { play: "M4 2.5v11l9-5.5z", pause: "M4 2.5h3v11H4zM9 2.5h3v11H9z" };

// ---- small linear algebra (row-major 3 x 3)
const unit = (v) => v.map((c) => c / Math.hypot(...v));
const matmul = (a, b) => [0, 3, 6].flatMap((i) => [0, 1, 2].map((j) => a[i] * b[j] + a[i + 1] * b[j + 3] + a[i + 2] * b[j + 6]));
const times = (m, v) => [0, 3, 6].map((k) => m[k] * v[0] + m[k + 1] * v[1] + m[k + 2] * v[2]);
const row = (array, i) => Array.from(array.subarray(3 * i, 3 * i + 3)); // of an atom
const turn = (ax, ay) => matmul(
  [1, 0, 0, 0, Math.cos(ax), -Math.sin(ax), 0, Math.sin(ax), Math.cos(ax)],
  [Math.cos(ay), 0, Math.sin(ay), 0, 1, 0, -Math.sin(ay), 0, Math.cos(ay)],
);
const IDENTITY = turn(0, 0);
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// ---- light and colour
const L = unit([-0.42, 0.58, 0.7]), H = unit([L[0], L[1], L[2] + 1]);
function shade(x, y, z) { // light and gloss of a surface normal
  const diffuse = Math.max(0, x * L[0] + y * L[1] + z * L[2]);
  const gloss = Math.max(0, x * H[0] + y * H[1] + z * H[2]) ** 42;
  return [(0.4 + 0.62 * diffuse) * Math.min(1, 0.55 + 1.6 * z), 107 * gloss];
}
const mix = (a, b, t) => a.map((c, k) => c + (b[k] - c) * t);
const css = (c) => `rgb(${c.map(Math.round)})`;
const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
function viridis(t) {
  const x = 4 * Math.max(0, Math.min(1, Number.isNaN(t) ? 1 : t)), k = Math.min(3, Math.floor(x));
  return mix(VIRIDIS[k], VIRIDIS[k + 1], x - k);
}

// A sprite is the shading of a ball (computed once) in one colour at one depth.
let ball = null;
function ballMap() {
  const half = SPRITE / 2, r = half - 1, map = new Float32Array(3 * SPRITE * SPRITE);
  for (let j = 0, at = 0; j < SPRITE; j++) for (let i = 0; i < SPRITE; i++, at += 3) {
    const x = (i + 0.5 - half) / r, y = (half - j - 0.5) / r, d = Math.hypot(x, y);
    const n = d < 1 ? [x, y, Math.sqrt(1 - d * d)] : [x / d, y / d, 0];
    [map[at], map[at + 1]] = shade(...n);
    map[at + 2] = Math.max(0, Math.min(1, (1 - d) * r + 0.5));
  }
  return map;
}
const sprites = new Map();
function sprite(color, fog, ground) {
  const key = `${color.map((c) => c >> 2)}/${fog}/${ground}`;
  let canvas = sprites.get(key);
  if (canvas) return canvas;
  if (sprites.size > 500) sprites.clear();
  ball ??= ballMap();
  canvas = tag("canvas", { width: SPRITE, height: SPRITE });
  const ctx = canvas.getContext("2d"), image = ctx.createImageData(SPRITE, SPRITE), f = fogged(fog);
  for (let at = 0, to = 0; at < ball.length; at += 3, to += 4) {
    for (let k = 0; k < 3; k++) {
      const lit = Math.min(255, color[k] * ball[at] * gain(ground) + ball[at + 1]);
      image.data[to + k] = lit + (ground[k] - lit) * f;
    }
    image.data[to + 3] = 255 * ball[at + 2];
  }
  ctx.putImageData(image, 0, 0);
  sprites.set(key, canvas);
  return canvas;
}
const gain = (ground) => (ground[0] + ground[1] + ground[2] < 300 ? 1.25 : 1); // more light on a dark page
const fogged = (level) => (0.5 * level) / (FOG_LEVELS - 1);
let haloSprite = null;
function halo() { // soft dark ring: a contact shadow on whatever lies behind
  if (haloSprite) return haloSprite;
  haloSprite = tag("canvas", { width: 96, height: 96 });
  const ctx = haloSprite.getContext("2d"), g = ctx.createRadialGradient(48, 48, 48 / HALO * 0.9, 48, 48, 48);
  for (const [at, alpha] of [[0, 0.42], [0.5, 0.14], [1, 0]]) g.addColorStop(at, `rgba(8,12,20,${alpha})`);
  ctx.fillStyle = g;
  ctx.fillRect(0, 0, 96, 96);
  return haloSprite;
}

// ---- frames
function decode(item, floats, offset, tables) {
  const [, , n, forced, k, label] = item, take = (count) => floats.subarray(offset, (offset += count));
  const frame = { n, label, numbers: take(n), x: take(3 * n), forces: forced && take(3 * n), types: k && take(k * n), k };
  frame.ball = Array.from(frame.numbers, (z) => 0.17 + 0.31 * tables.radii[z]);
  frame.finite = Array.from({ length: n }, (_, i) => row(frame.x, i).every(Number.isFinite));
  const good = [...frame.finite.keys()].filter((i) => frame.finite[i]);
  frame.bad = n - good.length;
  frame.center = [0, 1, 2].map((c) => good.reduce((sum, i) => sum + frame.x[3 * i + c] / good.length, 0));
  if (frame.forces) {
    frame.norms = Array.from({ length: n }, (_, i) => Math.hypot(...row(frame.forces, i)));
    frame.fmax = Math.max(0, ...frame.norms.filter(Number.isFinite));
  }
  return [frame, offset];
}
function bondsOf(frame, given, tables) {
  if (frame.bonds) return frame.bonds;
  const pairs = [], { n, x, numbers, finite } = frame;
  if (given) for (const [i, j] of given) { if (i < n && j < n && finite[i] && finite[j]) pairs.push([i, j]); }
  else for (let i = 0; i < n; i++) for (let j = i + 1; j < n; j++) {
    const reach = tables.radii[numbers[i]] + tables.radii[numbers[j]];
    const d = Math.hypot(x[3 * i] - x[3 * j], x[3 * i + 1] - x[3 * j + 1], x[3 * i + 2] - x[3 * j + 2]);
    if (d < BOND * reach && d > OVERLAP * reach) pairs.push([i, j]);
  }
  return (frame.bonds = pairs);
}
function extent(frame, rotation) { // half width, half height and radius of a frame as first seen
  const e = [1.2, 1.2, 1.5];
  for (let i = 0; i < frame.n; i++) {
    if (!frame.finite[i]) continue;
    const d = row(frame.x, i).map((v, c) => v - frame.center[c]), seen = times(rotation, d), r = frame.ball[i];
    for (let a = 0; a < 2; a++) e[a] = Math.max(e[a], r + Math.abs(seen[a]));
    e[2] = Math.max(e[2], r + Math.hypot(...d));
  }
  return e;
}

// One store for each model (a model may have several views).
function createStore(model) {
  const tables = model.get("_palette");
  tables.rgb = tables.colors.map(rgb);
  const store = { tables, panels: [], counts: [], reference: null, views: new Set(), clock: null };
  const changed = () => store.views.forEach((view) => view());
  store.total = () => Math.max(0, ...store.counts);
  store.rotation = (p) => model.get("_orientations")[p] ?? TILT;
  store.at = (p, index) => { // a shorter trajectory stays on its last frame; a frame still on its way shows the one before
    const frames = store.panels[p]?.frames ?? [];
    let k = Math.min(index, frames.length - 1);
    while (k > 0 && !frames[k]) k--;
    return frames[k] ?? frames.find(Boolean);
  };
  store.receive = (items, buffer) => {
    const floats = new Float32Array(buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength));
    let frame, offset = 0;
    for (const item of items) {
      [frame, offset] = decode(item, floats, offset, tables);
      const [p, index] = item;
      if (p < 0) { store.reference = frame; continue; }
      const panel = (store.panels[p] ??= { frames: [], extents: [] });
      if (model.get("draggable")) frame.center = panel.center ??= frame.center; // only the dragged atom moves
      panel.frames[index] = frame;
      panel.extents[index] = extent(frame, store.rotation(p));
    }
    store.fit = store.force = null;
  };
  store.extents = () => { // fits what is laid over and every frame, except a few that flew apart
    if (store.fit) return store.fit;
    const all = store.panels.flatMap((panel) => panel?.extents ?? []), over = store.reference;
    const laid = store.panels.flatMap((panel, p) => (over ? [extent({ ...over, center: panel.frames.at(-1).center }, store.rotation(p))] : []));
    return (store.fit = [0, 1, 2].map((a) => {
      const values = all.map((e) => e[a]), limit = 1.6 * (median(values) ?? 1);
      return Math.max(1.2, ...values.filter((v) => v <= limit), ...laid.map((e) => e[a]));
    }));
  };
  store.forceMax = () => model.get("force_max") ?? (store.force ??=
    median(store.panels.flatMap((panel) => Object.values(panel?.frames ?? [])).filter((f) => f.forces).map((f) => f.fmax)) || 1);
  store.has = (what) => store.panels.some((panel) => panel?.frames.some((f) => f?.[what]));
  store.go = (index, quiet) => {
    const last = store.total() - 1, frame = Math.max(0, Math.min(last, index));
    model.set({ frame, follow: frame >= last });
    if (!quiet) model.save_changes();
    changed();
  };
  store.report = (error) => {
    console.error(error);
    model.set("last_error", `${error}`);
    model.save_changes();
  };
  // A drag waits for the answer to the one before and for DRAG_MS; meanwhile a newer one takes its place.
  const queue = [];
  let waits = 0;
  const goOn = () => { waits--; send(); };
  function send() {
    if (waits > 0 || !queue.length) return;
    waits = 2;
    model.send(queue.shift());
    setTimeout(goOn, DRAG_MS);
  }
  store.drag = (drag) => {
    if (queue.at(-1)?.done === false) queue.pop();
    queue.push(drag);
    send();
  };
  model.on("msg:custom", (message, buffers) => {
    try {
      if (message.kind === "dragged") goOn();
      if (message.kind === "clear") Object.assign(store, { panels: [], counts: [], fit: null, force: null });
      if (message.kind === "frames") {
        const following = model.get("follow");
        store.receive(message.items, buffers[0]);
        store.counts = message.counts;
        if (following) store.go(store.total() - 1, true); // the kernel moves its own `frame`
      }
      changed();
    } catch (error) { store.report(error); }
  });
  const play = () => {
    clearInterval(store.clock);
    store.clock = null;
    if (!model.get("playing")) return;
    if (model.get("frame") >= store.total() - 1) store.go(0);
    store.clock = setInterval(() => {
      store.go(model.get("frame") + 1);
      if (model.get("frame") < store.total() - 1) return;
      model.set("playing", false);
      model.save_changes();
    }, 1000 / model.get("fps"));
  };
  model.on("change:playing change:fps", play);
  const still = model.get("_still"); // enough to draw something where no kernel answers (a saved page)
  if (still?.data) {
    store.receive(still.items, still.data);
    store.counts = still.counts;
  }
  model.send({ kind: "need" }); // a new page has missed what was sent before
  return store;
}

// ---- drawing
function colorsOf(frame, mode, store, types) {
  const limit = mode === "force" ? store.forceMax() : 0, key = `${mode}/${limit}`;
  if (frame.colorKey === key) return frame.colors;
  frame.colorKey = key;
  frame.colors = Array.from({ length: frame.n }, (_, i) => {
    if (mode === "force" && frame.norms) return viridis(Math.round((40 * frame.norms[i]) / limit) / 40);
    if (mode !== "type" || !frame.types) return store.tables.rgb[frame.numbers[i]];
    const color = [0, 0, 0];
    for (let t = 0; t < frame.k; t++) for (let c = 0; c < 3; c++) color[c] += frame.types[i * frame.k + t] * store.tables.rgb[types[t]][c];
    return color.map((c) => Math.round(c / 6) * 6);
  });
  return frame.colors;
}

function line(ctx, a, b, color, width) {
  ctx.beginPath();
  ctx.moveTo(a.x, a.y);
  ctx.lineTo(b.x, b.y);
  ctx.strokeStyle = color;
  ctx.lineWidth = width;
  ctx.stroke();
}

function stick(ctx, from, to, u, color, camera, fog) {
  const a = camera.project(from), b = camera.project(to), dx = b.x - a.x, dy = b.y - a.y, length = Math.hypot(dx, dy);
  if (length < 0.4) return;
  const nx = -dy / length, ny = dx / length, wa = STICK * a.scale, wb = STICK * b.scale;
  const w = Math.max(wa, wb), gradient = ctx.createLinearGradient(a.x - nx * w, a.y - ny * w, a.x + nx * w, a.y + ny * w);
  let q = [u[2] * ny, u[2] * nx, -u[0] * ny - u[1] * nx]; // u x p, the side of the stick that faces the viewer
  if (q[2] < 0) q = q.map((c) => -c);
  for (const t of [-1, -0.7, -0.3, 0.1, 0.5, 0.8, 1]) {
    const c = Math.sqrt(1 - t * t), [light, gloss] = shade(t * nx + c * q[0], -t * ny + c * q[1], c * q[2]);
    gradient.addColorStop((t + 1) / 2, css(mix(color.map((v) => v * light * gain(camera.ground) + gloss), camera.ground, fogged(fog))));
  }
  ctx.globalCompositeOperation = "source-atop"; // only on what is already drawn, that is, behind
  line(ctx, a, b, "rgba(8,12,20,.16)", 3.4 * w);
  ctx.globalCompositeOperation = "source-over";
  ctx.fillStyle = gradient;
  ctx.beginPath();
  const angle = Math.atan2(dy, dx);
  ctx.ellipse(a.x, a.y, wa * Math.abs(u[2]), wa, angle, Math.PI / 2, 1.5 * Math.PI);
  const over = 0.4 / length; // hides the seam between the two halves
  ctx.lineTo(b.x + nx * -wb + dx * over, b.y + ny * -wb + dy * over);
  ctx.lineTo(b.x + nx * wb + dx * over, b.y + ny * wb + dy * over);
  ctx.fill();
}

function arrow(ctx, a, b) {
  const dx = b.x - a.x, dy = b.y - a.y, length = Math.hypot(dx, dy);
  if (length < 3) return;
  const ux = dx / length, uy = dy / length, head = Math.min(9, 0.6 * length), w = head * 0.45;
  const neck = { x: b.x - ux * head, y: b.y - uy * head };
  line(ctx, a, neck, ARROW, 2.4);
  ctx.beginPath();
  ctx.moveTo(b.x, b.y);
  ctx.lineTo(neck.x - uy * w, neck.y + ux * w);
  ctx.lineTo(neck.x + uy * w, neck.y - ux * w);
  ctx.fillStyle = ARROW;
  ctx.fill();
}

function ring(ctx, { x, y, r }, color) {
  ctx.beginPath();
  ctx.arc(x, y, r + 2.5, 0, 2 * Math.PI);
  ctx.strokeStyle = color;
  ctx.lineWidth = 2.5;
  ctx.stroke();
}

function drawMolecule(ctx, frame, colors, camera, options) { // returns the atoms on the screen, back to front
  const at = (i) => camera.turn(row(frame.x, i).map((v, c) => v - options.center[c]));
  const points = Array.from({ length: frame.n }, (_, i) => (frame.finite[i] ? at(i) : null));
  const items = [], hits = [], add = (z, paint) => items.push({ z, paint });
  points.forEach((p, i) => p && add(p[2], () => {
    const { x, y, scale } = camera.project(p), r = frame.ball[i] * scale;
    ctx.globalCompositeOperation = "source-atop";
    ctx.drawImage(halo(), x - HALO * r, y - HALO * r, 2 * HALO * r, 2 * HALO * r);
    ctx.globalCompositeOperation = "source-over";
    ctx.drawImage(sprite(colors[i], camera.fog(p[2]), camera.ground), x - r, y - r, 2 * r, 2 * r);
    hits.push({ i, x, y, r, z: p[2] });
  }));
  for (let [i, j] of bondsOf(frame, options.bonds, options.tables)) {
    if (points[i][2] > points[j][2]) [i, j] = [j, i]; // i is the farther one
    const a = points[i], b = points[j], d = b.map((c, k) => c - a[k]), length = Math.hypot(...d), u = unit(d);
    const point = (s) => a.map((c, k) => c + u[k] * s), middle = length / 2;
    const start = Math.sqrt(frame.ball[i] ** 2 - STICK ** 2), end = length - Math.sqrt(frame.ball[j] ** 2 - STICK ** 2);
    const half = (s, t, color) => {
      const z = a[2] + (u[2] * (s + t)) / 2;
      if (t > s) add(z, () => stick(ctx, point(s), point(t), u, color, camera, camera.fog(z)));
    };
    half(start, Math.max(start, Math.min(middle, end)), colors[i]);
    half(Math.min(middle, end), end, colors[j]);
  }
  if (options.arrows && frame.forces) points.forEach((p, i) => {
    const size = frame.norms[i];
    if (!p || !(size > 0) || size === Infinity) return;
    const long = frame.ball[i] + 1.3 * Math.min(1.5, size / options.forceMax), v = camera.turn(row(frame.forces, i)).map((c) => c / size);
    const tip = p.map((c, k) => c + v[k] * long), foot = p.map((c, k) => c + v[k] * frame.ball[i] * 0.9);
    add((tip[2] + p[2]) / 2 + 1e-3, () => arrow(ctx, camera.project(foot), camera.project(tip)));
  });
  items.sort((a, b) => a.z - b.z).forEach((item) => item.paint());
  return hits;
}

// ---- page elements
function tag(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const icon = (path) => `<svg viewBox="0 0 16 16" aria-hidden="true"><path d="${path}"/></svg>`;
function formula(frame, symbols) {
  const count = {};
  for (const z of frame.numbers) count[symbols[z]] = (count[symbols[z]] ?? 0) + 1;
  const rank = (s) => (count.C && { C: "0", H: "1" }[s]) || s, order = Object.keys(count).sort((a, b) => (rank(a) < rank(b) ? -1 : 1));
  return order.map((s) => s + (count[s] > 1 ? count[s] : "")).join("");
}

function createView(store, model, el) {
  const camera = { rotation: IDENTITY, zoom: 1, fit: null };
  let grab = null; // the atom that is being dragged
  const get = (name) => model.get(name), set = (name, value) => { model.set(name, value); model.save_changes(); };
  const play = tag("button", { type: "button", class: "elv-play", onclick: () => set("playing", !get("playing")) });
  const slider = tag("input", { type: "range", class: "elv-slider", "aria-label": "frame", oninput: () => {
    if (get("playing")) model.set("playing", false);
    store.go(+slider.value);
  } });
  const counter = tag("output", { class: "elv-counter" });
  const mode = tag("select", { class: "elv-mode", "aria-label": "colour by", onchange: () => set("color_by", mode.value) });
  const arrows = tag("input", { type: "checkbox", onchange: () => set("arrows", arrows.checked) });
  const arrowBox = tag("label", { class: "elv-arrows" }, arrows, "forces");
  const reset = tag("button", { type: "button", class: "elv-reset", title: "reset the view (0)", "aria-label": "reset the view", onclick: () => home() }, "⟲");
  const ramp = tag("span", { class: "elv-ramp", style: `background:linear-gradient(90deg,${VIRIDIS.map(css)})` });
  const legendText = tag("span"), legend = tag("div", { class: "elv-legend" }, "|F| 0", ramp, legendText);
  const message = tag("span"), alert = tag("div", { class: "elv-error", role: "alert" }, message,
    tag("button", { type: "button", "aria-label": "dismiss the error", onclick: () => set("last_error", "") }, "×"));
  const heading = tag("div", { class: "elv-title" }), stage = tag("div", { class: "elv-stage" });
  const bar = tag("div", { class: "elv-bar" }, play, slider, counter, mode, arrowBox);
  const root = tag("div", { class: "elv", "data-lm-suppress-shortcuts": "true" }, heading, stage, bar, alert);
  stage.style.gridTemplateColumns = `repeat(${get("_columns")}, minmax(0, 1fr))`;
  const panels = get("_titles").map((title, p) => {
    const canvas = tag("canvas", { tabindex: 0, role: "img" }), caption = tag("div", { class: "elv-caption" }), label = tag("div", { class: "elv-label", "aria-live": "polite" });
    const panel = { title, p, canvas, caption, label, hits: [], ctx: canvas.getContext("2d"), box: tag("div", { class: "elv-panel" }, canvas, caption, label) };
    stage.append(panel.box);
    listen(panel);
    return panel;
  });
  stage.append(reset, legend);
  el.append(root);

  const home = () => { Object.assign(camera, { rotation: IDENTITY, zoom: 1 }); invalidate(); };
  const zoomBy = (factor) => { camera.zoom = Math.max(0.2, Math.min(12, camera.zoom * factor)); invalidate(); };
  const rotate = (ax, ay) => { camera.rotation = matmul(turn(ax, ay), camera.rotation); invalidate(); };

  function listen(panel) {
    const { canvas } = panel, on = canvas.addEventListener.bind(canvas);
    let last = null, moved = 0;
    const tell = (done) => store.drag({ kind: "drag", panel: panel.p, frame: grab.frame, atom: grab.i, position: grab.to, done });
    on("pointerdown", (event) => {
      if (!event.isPrimary) return;
      canvas.setPointerCapture(event.pointerId);
      last = [event.clientX, event.clientY];
      moved = 0;
      const hit = get("draggable") && !event.button && under(panel, event);
      grab = hit && { ...hit, panel, frame: get("frame") };
    });
    on("pointermove", (event) => {
      if (!last) canvas.style.cursor = get("draggable") && under(panel, event) ? "move" : "";
      if (!last || !event.isPrimary) return;
      const dx = event.clientX - last[0], dy = event.clientY - last[1];
      moved += Math.abs(dx) + Math.abs(dy);
      last = [event.clientX, event.clientY];
      if (!grab) return rotate(dy * 0.009, dx * 0.009);
      grab.x += dx;
      grab.y += dy;
      if (moved < 5) return;
      grab.to = lens(panel).place(grab);
      if (get("selected") !== grab.i) set("selected", grab.i);
      tell(false);
      invalidate();
    });
    on("pointerup", (event) => { if (moved < 5) pick(panel, event); });
    on("lostpointercapture", () => { // let go, or cancelled
      if (grab?.to) tell(true);
      last = grab = null;
      invalidate();
    });
    on("dblclick", () => home());
    on("wheel", (event) => { event.preventDefault(); zoomBy(Math.exp(-event.deltaY * 0.0012)); }, { passive: false });
    on("keydown", (event) => {
      const action = { ArrowLeft: () => rotate(0, -0.12), ArrowRight: () => rotate(0, 0.12), ArrowUp: () => rotate(-0.12, 0), ArrowDown: () => rotate(0.12, 0),
        "+": () => zoomBy(1.15), "=": () => zoomBy(1.15), "-": () => zoomBy(1 / 1.15), 0: home, Escape: () => set("selected", null) }[event.key];
      if (action) { action(); event.preventDefault(); }
    });
  }
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation(); // JupyterLab would take the slider's arrow keys
    if (event.key !== " " || /^(BUTTON|SELECT)$/.test(event.target.tagName) || event.target === arrows) return;
    event.preventDefault();
    if (store.total() > 1) set("playing", !get("playing"));
  });
  const under = (panel, event) => panel.hits.findLast((h) => Math.hypot(h.x - event.offsetX, h.y - event.offsetY) <= h.r);
  function pick(panel, event) {
    const atom = under(panel, event)?.i ?? null;
    set("selected", atom);
    model.send({ kind: "pick", atom });
  }

  function lens({ canvas, p }, ground) { // camera of one panel: rotate, then a mild perspective
    const rotation = matmul(camera.rotation, store.rotation(p)), width = canvas.clientWidth, height = canvas.clientHeight, [ex, ey, radius] = camera.fit;
    const scale = camera.zoom * 0.93 * Math.min(width / (2 * ex), height / (2 * ey), (1.5 * Math.min(width, height)) / (2 * radius), 62);
    const far = 5 * radius + 8, scaled = (z) => (scale * far) / Math.max(1, far - z);
    return {
      ground, turn: (v) => times(rotation, v),
      project: ([x, y, z]) => { const s = scaled(z); return { x: width / 2 + x * s, y: height / 2 - y * s, scale: s }; },
      place: ({ x, y, z }) => { // where in Angstrom a point of the screen is, at a given depth
        const s = scaled(z), v = [(x - width / 2) / s, (height / 2 - y) / s, z];
        return store.at(p, get("frame")).center.map((c, k) => c + rotation[k] * v[0] + rotation[k + 3] * v[1] + rotation[k + 6] * v[2]);
      },
      fog: (z) => Math.round((FOG_LEVELS - 1) * Math.max(0, Math.min(1, (radius - z) / (2 * radius)))),
    };
  }

  function drawPanel(panel, ground) {
    const { canvas, ctx } = panel, ratio = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return;
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const frame = store.at(panel.p, get("frame")), tables = store.tables;
    panel.hits = [];
    const center = frame?.center ?? store.reference?.center, view = lens(panel, ground);
    if (frame) {
      const options = { bonds: get("_bonds"), tables, center, arrows: get("arrows"), forceMax: store.forceMax() };
      panel.hits = drawMolecule(ctx, frame, colorsOf(frame, get("color_by"), store, get("_types")), view, options);
    }
    if (store.reference) ghost(ctx, store.reference, view, center, [width, height, ratio]);
    caption(panel, frame);
    select(panel, frame);
    if (grab?.to && grab.panel === panel) ring(ctx, grab, ACCENT); // the atom itself follows with the answer
  }
  const spare = tag("canvas");
  function ghost(ctx, frame, view, center, [width, height, ratio]) { // drawn apart, then laid over as one translucent layer
    [spare.width, spare.height] = [width * ratio, height * ratio];
    const layer = spare.getContext("2d");
    layer.setTransform(ratio, 0, 0, ratio, 0, 0);
    drawMolecule(layer, frame, Array(frame.n).fill(GHOST), view, { tables: store.tables, center });
    for (const [order, alpha] of [["destination-over", 0.6], ["source-over", 0.14]]) { // clear behind, a hint in front
      ctx.globalCompositeOperation = order;
      ctx.globalAlpha = alpha;
      ctx.drawImage(spare, 0, 0, width, height);
    }
    ctx.globalAlpha = 1;
  }
  function caption(panel, frame) {
    const parts = [panel.title, frame?.label].filter(Boolean), bad = frame?.bad ? `${frame.bad} of ${frame.n} atoms not finite` : "";
    panel.caption.replaceChildren(...parts.map((text) => tag("span", {}, text)), ...(bad ? [tag("span", { class: "elv-bad" }, bad)] : []));
    panel.caption.hidden = !parts.length && !bad;
    const what = frame ? `${formula(frame, store.tables.symbols)}, ${frame.n} atoms` : "no frame yet";
    panel.canvas.setAttribute("aria-label", `${[...parts, what].join(", ")}. Drag or arrow keys rotate${get("draggable") ? " (on an atom, a drag moves it)" : ""}, wheel or + and - zoom, click picks an atom.`);
    panel.box.classList.toggle("elv-empty", !frame);
  }
  function select(panel, frame) {
    const { label } = panel, hit = panel.hits.find((h) => h.i === get("selected"));
    for (const [color, atoms] of Object.entries(get("marks"))) panel.hits.filter((h) => atoms.includes(h.i)).forEach((h) => ring(panel.ctx, h, color));
    label.hidden = !hit;
    if (!hit) return;
    ring(panel.ctx, hit, ACCENT);
    const { i } = hit, lines = [`${store.tables.symbols[frame.numbers[i]]} ${i}`, `(${row(frame.x, i).map((c) => c.toFixed(3)).join(", ")}) Å`];
    if (frame.norms?.[i] >= 0) lines.push(`|F| ${frame.norms[i].toPrecision(3)} eV/Å`);
    if (frame.types) {
      const share = Array.from(frame.types.subarray(i * frame.k, (i + 1) * frame.k), (w, t) => [w, store.tables.symbols[get("_types")[t]]]);
      lines.push(share.sort((a, b) => b[0] - a[0]).slice(0, 3).map(([w, s]) => `${s} ${Math.round(100 * w)} %`).join("  "));
    }
    const text = lines.join("\n");
    if (label.textContent !== text) label.textContent = text;
  }

  function controls() {
    const total = store.total(), frame = Math.min(get("frame"), Math.max(0, total - 1));
    const modes = ["element", ...["force", "type"].filter((name) => store.has(`${name}s`))];
    if (modes.join() !== mode.dataset.modes) {
      mode.replaceChildren(...modes.map((name) => tag("option", { value: name }, `by ${name}`)));
      mode.dataset.modes = modes.join();
    }
    mode.value = modes.includes(get("color_by")) ? get("color_by") : "element";
    mode.hidden = modes.length < 2;
    arrowBox.hidden = !modes.includes("force");
    arrows.checked = get("arrows");
    play.hidden = slider.hidden = counter.hidden = total < 2;
    bar.hidden = total < 2 && modes.length < 2;
    const verb = get("playing") ? "pause" : "play";
    if (play.getAttribute("aria-label") !== verb) { play.innerHTML = icon(ICONS[verb]); play.setAttribute("aria-label", verb); }
    slider.max = Math.max(0, total - 1);
    slider.value = frame;
    slider.style.setProperty("--done", `${total > 1 ? (100 * frame) / (total - 1) : 0}%`);
    slider.setAttribute("aria-valuetext", [`${frame + 1} of ${total}`, store.at(0, frame)?.label].filter(Boolean).join(", "));
    counter.textContent = `${frame + 1} / ${total}`;
    legend.hidden = mode.value !== "force";
    legendText.textContent = `≥ ${store.forceMax().toPrecision(2)} eV/Å`;
    heading.textContent = get("title");
    heading.hidden = !get("title");
    const error = get("last_error");
    message.textContent = error;
    alert.hidden = !error;
    Object.assign(root.dataset, { frame, frames: total, error });
    stage.style.setProperty("--elv-height", `${get("height")}px`);
  }

  let queued = 0, failed = false;
  function draw() {
    queued = 0;
    try {
      controls();
      const ground = (getComputedStyle(root).backgroundColor.match(/[\d.]+/g) ?? [255, 255, 255]).slice(0, 3).map(Number);
      const target = grab ? camera.fit : store.extents();
      const before = camera.fit ?? target, gap = Math.max(...target.map((v, a) => Math.abs(v - before[a])));
      camera.fit = gap < 0.02 ? target : mix(before, target, 0.25); // a growing trajectory zooms out smoothly
      panels.forEach((panel) => drawPanel(panel, ground));
      if (gap >= 0.02) invalidate();
    } catch (error) {
      if (!failed) store.report(error);
      failed = true;
    }
  }
  function invalidate() { queued ||= requestAnimationFrame(draw); }

  store.views.add(invalidate);
  const names = "frame playing selected marks color_by arrows force_max title height last_error".replace(/\w+/g, "change:$&");
  model.on(names, invalidate);
  const resized = new ResizeObserver(invalidate), themed = new MutationObserver(() => setTimeout(invalidate, 60));
  resized.observe(stage);
  themed.observe(document.body, { attributes: true });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", invalidate);
  invalidate();
  return () => {
    store.views.delete(invalidate);
    model.off(names, invalidate);
    resized.disconnect();
    themed.disconnect();
    scheme.removeEventListener("change", invalidate);
    cancelAnimationFrame(queued);
  };
}

export default () => {
  let store = null;
  return {
    initialize({ model }) {
      store = createStore(model);
      return () => clearInterval(store.clock);
    },
    render: ({ model, el }) => createView(store, model, el),
  };
};
