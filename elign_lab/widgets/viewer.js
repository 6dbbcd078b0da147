// Ball-and-stick viewer on a 2D canvas: no WebGL, no network, no build step.
// Frames arrive once, as float32 (layout: encode() in viewer.py). Camera axes: x right, y up, z to the viewer; Angstrom.

const STICK = 0.12, BOND = 1.3, OVERLAP = 0.4; // as in static.py
const SPRITE = 160, FOG_STEPS = 7, HALO = 1.4;
const DRAG_MS = 67; // between two messages: 15 a second
const ARROW = "#f59e0b", ACCENT = "#ff9d2e", GHOST = [47, 158, 143];
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const ICONS = { play: "M4 2.5v11l9-5.5z", pause: "M4 2.5h3v11H4zM9 2.5h3v11H9z" };

// ---- small linear algebra (row-major 3 x 3)
const unit = (v) => v.map((c) => c / Math.hypot(...v));
const matmul = (a, b) => [0, 3, 6].flatMap((i) => [0, 1, 2].map((j) => a[i] * b[j] + a[i + 1] * b[j + 3] + a[i + 2] * b[j + 6]));
const times = (m, v) => [0, 3, 6].map((k) => m[k] * v[0] + m[k + 1] * v[1] + m[k + 2] * v[2]);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const plus = (a, b, s = 1) => a.map((c, k) => c + s * b[k]); // a + s b
const row = (array, i) => [...array.subarray(3 * i, 3 * i + 3)]; // of an atom
const turn = (ax, ay) => matmul(
  [1, 0, 0, 0, Math.cos(ax), -Math.sin(ax), 0, Math.sin(ax), Math.cos(ax)],
  [Math.cos(ay), 0, Math.sin(ay), 0, 1, 0, -Math.sin(ay), 0, Math.cos(ay)],
);
const IDENTITY = turn(0, 0), TILT = turn(0.42, 0.28);
const clamp = (x, low = 0, high = 1) => Math.max(low, Math.min(high, x));
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

// ---- light and colour
const L = unit([-0.42, 0.58, 0.7]), H = unit([L[0], L[1], L[2] + 1]);
const isDark = ([r, g, b]) => r + g + b < 300;
function shade(normal, dark) { // light and gloss of a surface; on a dark page more light, and a rim that shows dark colours
  const diffuse = Math.max(0, dot(normal, L)), gloss = 107 * Math.max(0, dot(normal, H)) ** 42, [, , z] = normal;
  const light = (0.4 + 0.62 * diffuse) * Math.min(1, 0.55 + 1.6 * z);
  return dark ? [1.25 * light, gloss + 120 * (1 - z) ** 2] : [light, gloss];
}
const mix = (a, b, t) => a.map((c, k) => c + (b[k] - c) * t);
const css = (c) => `rgb(${c.map(Math.round)})`;
const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
function viridis(t) {
  const x = 4 * clamp(Number.isNaN(t) ? 1 : t), k = Math.min(3, Math.floor(x));
  return mix(VIRIDIS[k], VIRIDIS[k + 1], x - k);
}

const canvases = new Map();
function painted(key, size, paint) { // a small canvas, painted once
  if (canvases.size > 500) canvases.clear();
  if (!canvases.has(key)) {
    const canvas = tag("canvas", { width: size, height: size });
    paint(canvas.getContext("2d"));
    canvases.set(key, canvas);
  }
  return canvases.get(key);
}
const balls = {}; // light, gloss and cover of each pixel of a ball
function ballMap(dark) {
  const half = SPRITE / 2, r = half - 1, map = new Float32Array(3 * SPRITE * SPRITE);
  for (let j = 0, at = 0; j < SPRITE; j++) for (let i = 0; i < SPRITE; i++, at += 3) {
    const x = (i + 0.5 - half) / r, y = (half - j - 0.5) / r, d = Math.hypot(x, y);
    map.set(shade(d < 1 ? [x, y, Math.sqrt(1 - d * d)] : [x / d, y / d, 0], dark), at);
    map[at + 2] = clamp((1 - d) * r + 0.5);
  }
  return map;
}
const sprite = (color, fog, ground) => painted(`${color.map((c) => c >> 2)}/${fog}/${ground}`, SPRITE, (ctx) => {
  const image = ctx.createImageData(SPRITE, SPRITE), dark = isDark(ground), ball = (balls[dark] ??= ballMap(dark));
  for (let at = 0, to = 0; at < ball.length; at += 3, to += 4) {
    for (let k = 0; k < 3; k++) {
      const lit = Math.min(255, color[k] * ball[at] + ball[at + 1]);
      image.data[to + k] = lit + (ground[k] - lit) * fog;
    }
    image.data[to + 3] = 255 * ball[at + 2];
  }
  ctx.putImageData(image, 0, 0);
});
const halo = () => painted("halo", 96, (ctx) => { // soft dark ring: a contact shadow on whatever lies behind
  const g = ctx.createRadialGradient(48, 48, 48 / HALO * 0.9, 48, 48, 48);
  for (const [at, alpha] of [[0, 0.42], [0.5, 0.14], [1, 0]]) g.addColorStop(at, `rgba(8,12,20,${alpha})`);
  ctx.fillStyle = g;
  ctx.fillRect(0, 0, 96, 96);
});

// ---- frames
function* decode(items, buffer, tables) {
  const floats = new Float32Array(buffer.buffer.slice(buffer.byteOffset, buffer.byteOffset + buffer.byteLength));
  let offset = 0;
  const take = (count) => floats.subarray(offset, (offset += count));
  for (const [p, index, n, forced, k, label] of items) {
    const frame = { p, index, n, k, label, numbers: take(n), x: take(3 * n), forces: forced && take(3 * n), types: k && take(k * n) };
    frame.ball = Array.from(frame.numbers, (z) => 0.17 + 0.31 * tables.radii[z]);
    frame.finite = Array.from({ length: n }, (_, i) => row(frame.x, i).every(Number.isFinite));
    const good = [...frame.finite.keys()].filter((i) => frame.finite[i]);
    frame.bad = n - good.length;
    frame.center = good.reduce((sum, i) => plus(sum, row(frame.x, i), 1 / good.length), [0, 0, 0]);
    if (forced) {
      frame.norms = Array.from({ length: n }, (_, i) => Math.hypot(...row(frame.forces, i)));
      frame.fmax = Math.max(0, ...frame.norms.filter(Number.isFinite));
    }
    yield frame;
  }
}
function bondsOf(frame, given, tables) {
  if (frame.bonds) return frame.bonds;
  const { n, x, numbers, finite } = frame, near = [];
  for (let i = 0; i < n && !given; i++) for (let j = i + 1; j < n; j++) {
    const reach = tables.radii[numbers[i]] + tables.radii[numbers[j]];
    const d = Math.hypot(x[3 * i] - x[3 * j], x[3 * i + 1] - x[3 * j + 1], x[3 * i + 2] - x[3 * j + 2]);
    if (d < BOND * reach && d > OVERLAP * reach) near.push([i, j]);
  }
  return (frame.bonds = (given ?? near).filter(([i, j]) => finite[i] && finite[j]));
}
function extent(frame, rotation) { // half width, half height and radius of a frame as first seen
  let reach = [1.2, 1.2, 1.5];
  frame.ball.forEach((r, i) => {
    if (!frame.finite[i]) return;
    const d = plus(row(frame.x, i), frame.center, -1), [x, y] = times(rotation, d);
    reach = [x, y, Math.hypot(...d)].map((v, a) => Math.max(reach[a], r + Math.abs(v)));
  });
  return reach;
}

// One store for each model (a model may have several views).
function createStore(model) {
  const palette = model.get("_palette"), tables = { ...palette, rgb: palette.colors.map(rgb) };
  const store = { tables, panels: [], counts: [], reference: null, views: new Set() }; // panels: the frames of each
  const changed = () => store.views.forEach((view) => view());
  store.total = () => Math.max(0, ...store.counts);
  store.rotation = (p) => model.get("_orientations")[p] ?? TILT;
  store.at = (p, index) => { // a shorter trajectory stays on its last frame; a frame still on its way shows the one before
    const frames = store.panels[p] ?? [];
    return frames.findLast((frame, k) => frame && k <= index) ?? frames.find(Boolean);
  };
  store.receive = ({ items, counts }, buffer) => {
    for (const frame of decode(items, buffer, tables)) {
      if (frame.p < 0) { store.reference = frame; continue; }
      const frames = (store.panels[frame.p] ??= []);
      if (model.get("draggable")) frame.center = (frames[0] ?? frame).center; // only the dragged atom moves
      frame.extent = extent(frame, store.rotation(frame.p));
      frames[frame.index] = frame;
    }
    Object.assign(store, { counts, fit: null, force: null });
  };
  store.extents = () => { // fits what is laid over and every frame, except a few that flew apart
    if (store.fit) return store.fit;
    const all = store.panels.flat().map((frame) => frame.extent), over = store.reference;
    const laid = store.panels.flatMap((frames, p) => (over ? [extent({ ...over, center: frames.at(-1).center }, store.rotation(p))] : []));
    return (store.fit = [0, 1, 2].map((a) => {
      const values = all.map((e) => e[a]), limit = 1.6 * median(values);
      return Math.max(1.2, ...values.filter((v) => v <= limit), ...laid.map((e) => e[a]));
    }));
  };
  store.forceMax = () => model.get("force_max") ?? (store.force ??=
    median(store.panels.flat().filter((f) => f.forces).map((f) => f.fmax)) || 1);
  store.has = (what) => store.panels.some((frames) => frames.some((f) => f[what]));
  store.set = (name, value) => { model.set(name, value); model.save_changes(); };
  store.go = (index, quiet) => {
    const last = store.total() - 1, frame = clamp(index, 0, last);
    model.set({ frame, follow: frame >= last });
    if (!quiet) model.save_changes();
    changed();
  };
  store.report = (error) => {
    console.error(error);
    store.set("last_error", `${error}`);
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
        store.receive(message, buffers[0]);
        if (following) store.go(store.total() - 1, true); // the kernel moves its own `frame`
      }
      changed();
    } catch (error) { store.report(error); }
  });
  const play = () => {
    clearInterval(store.clock);
    if (!model.get("playing")) return;
    if (model.get("frame") >= store.total() - 1) store.go(0);
    store.clock = setInterval(() => {
      store.go(model.get("frame") + 1);
      if (model.get("frame") >= store.total() - 1) store.set("playing", false);
    }, 1000 / model.get("fps"));
  };
  model.on("change:playing change:fps", play);
  const still = model.get("_still"); // enough to draw something where no kernel answers (a saved page)
  if (still?.data) store.receive(still, still.data);
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
    const blend = types.reduce((sum, z, t) => plus(sum, store.tables.rgb[z], frame.types[i * frame.k + t]), [0, 0, 0]);
    return blend.map((c) => Math.round(c / 6) * 6); // few colours, few sprites
  });
  return frame.colors;
}

function along(ctx, a, b, paint) { // paint(length, [nx, ny]) with x from a to b and y across
  const dx = b.x - a.x, dy = b.y - a.y, length = Math.hypot(dx, dy), nx = -dy / length, ny = dx / length;
  if (length < 0.4) return;
  ctx.save();
  ctx.transform(ny, -nx, nx, ny, a.x, a.y);
  paint(length, [nx, ny]);
  ctx.restore();
}

function stick(ctx, from, to, u, color, camera, fog) {
  const a = camera.project(from), b = camera.project(to), wa = STICK * a.scale, wb = STICK * b.scale, w = Math.max(wa, wb);
  along(ctx, a, b, (length, [nx, ny]) => {
    const gradient = ctx.createLinearGradient(0, -w, 0, w);
    let q = [u[2] * ny, u[2] * nx, -u[0] * ny - u[1] * nx]; // u x n, the side of the stick that faces the viewer
    if (q[2] < 0) q = q.map((c) => -c);
    for (const t of [-1, -0.7, -0.3, 0.1, 0.5, 0.8, 1]) {
      const [light, gloss] = shade(plus([t * nx, -t * ny, 0], q, Math.sqrt(1 - t * t)), isDark(camera.ground));
      gradient.addColorStop((t + 1) / 2, css(mix(color.map((v) => v * light + gloss), camera.ground, fog)));
    }
    ctx.globalCompositeOperation = "source-atop"; // a shadow, only on what is already drawn, that is, behind
    ctx.fillStyle = "rgba(8,12,20,.16)";
    ctx.fillRect(0, -1.7 * w, length, 3.4 * w);
    ctx.globalCompositeOperation = "source-over";
    ctx.fillStyle = gradient;
    ctx.beginPath();
    ctx.ellipse(0, 0, wa * Math.abs(u[2]), wa, 0, Math.PI / 2, 1.5 * Math.PI);
    ctx.lineTo(length + 0.4, -wb); // hides the seam between the two halves
    ctx.lineTo(length + 0.4, wb);
    ctx.fill();
  });
}

const arrow = (ctx, a, b) => along(ctx, a, b, (length) => {
  const head = Math.min(9, 0.6 * length), neck = length - head, w = 0.45 * head;
  ctx.fillStyle = ARROW;
  ctx.beginPath();
  for (const [x, y] of [[0, -1.2], [neck, -1.2], [neck, -w], [length, 0], [neck, w], [neck, 1.2], [0, 1.2]]) ctx.lineTo(x, y);
  if (length > 3) ctx.fill();
});

function ring(ctx, { x, y, r }, color) {
  ctx.beginPath();
  ctx.arc(x, y, r + 2.5, 0, 2 * Math.PI);
  ctx.strokeStyle = color;
  ctx.lineWidth = 2.5;
  ctx.stroke();
}

function drawMolecule(ctx, frame, colors, camera, options) { // returns the atoms on the screen, back to front
  const points = frame.finite.map((finite, i) => finite && camera.turn(plus(row(frame.x, i), options.center, -1)));
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
    const a = points[i], b = points[j], d = plus(b, a, -1), length = Math.hypot(...d), u = unit(d);
    const start = Math.sqrt(frame.ball[i] ** 2 - STICK ** 2), end = length - Math.sqrt(frame.ball[j] ** 2 - STICK ** 2);
    const seam = Math.min(length / 2, end), half = (s, t, color) => {
      const z = a[2] + (u[2] * (s + t)) / 2;
      if (t > s) add(z, () => stick(ctx, plus(a, u, s), plus(a, u, t), u, color, camera, camera.fog(z)));
    };
    half(start, seam, colors[i]);
    half(seam, end, colors[j]);
  }
  if (options.arrows && frame.forces) points.forEach((p, i) => {
    const size = frame.norms[i];
    if (!p || !(size > 0 && size < Infinity)) return;
    const long = frame.ball[i] + 1.3 * Math.min(1.5, size / options.forceMax), v = camera.turn(row(frame.forces, i)).map((c) => c / size);
    const tip = plus(p, v, long), foot = plus(p, v, 0.9 * frame.ball[i]);
    add((tip[2] + p[2]) / 2 + 1e-3, () => arrow(ctx, camera.project(foot), camera.project(tip)));
  });
  items.sort((a, b) => a.z - b.z).forEach((item) => item.paint());
  return hits;
}

// ---- page elements
function tag(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}
const div = (name, ...children) => tag("div", { class: `elv-${name}` }, ...children);
function formula(frame, symbols) {
  const count = {};
  for (const z of frame.numbers) count[symbols[z]] = (count[symbols[z]] ?? 0) + 1;
  const rank = (s) => (count.C && { C: "0", H: "1" }[s]) || s, order = Object.keys(count).sort((a, b) => (rank(a) < rank(b) ? -1 : 1));
  return order.map((s) => s + (count[s] > 1 ? count[s] : "")).join("");
}

function createView(store, model, el) {
  const camera = { rotation: IDENTITY, zoom: 1, fit: null };
  let grab = null; // the atom that is being dragged
  const { set } = store, get = (name) => model.get(name), toggle = () => set("playing", !get("playing"));
  const play = tag("button", { type: "button", class: "elv-play", onclick: toggle });
  const slider = tag("input", { type: "range", class: "elv-slider", "aria-label": "frame", oninput: () => {
    model.set("playing", false);
    store.go(+slider.value);
  } });
  const counter = tag("output", { class: "elv-counter" });
  const mode = tag("select", { class: "elv-mode", "aria-label": "colour by", onchange: () => set("color_by", mode.value) });
  const arrows = tag("input", { type: "checkbox", onchange: () => set("arrows", arrows.checked) });
  const arrowBox = tag("label", { class: "elv-arrows" }, arrows, "forces");
  const reset = tag("button", { type: "button", class: "elv-reset", title: "reset the view (0)", "aria-label": "reset the view", onclick: home }, "⟲");
  const ramp = tag("span", { class: "elv-ramp", style: `background:linear-gradient(90deg,${VIRIDIS.map(css)})` });
  const legend = div("legend", "|F| 0", ramp, tag("span"));
  const alert = tag("div", { class: "elv-error", role: "alert" }, tag("span"),
    tag("button", { type: "button", "aria-label": "dismiss the error", onclick: () => set("last_error", "") }, "×"));
  const heading = div("title"), stage = div("stage"), bar = div("bar", play, slider, counter, mode, arrowBox);
  const root = tag("div", { class: "elv", "data-lm-suppress-shortcuts": "true" }, heading, stage, bar, alert);
  stage.style.gridTemplateColumns = `repeat(${get("_columns")}, minmax(0, 1fr))`;
  const panels = get("_titles").map((title, p) => {
    const canvas = tag("canvas", { tabindex: 0, role: "img" }), caption = div("caption"), label = div("label");
    const panel = { title, p, canvas, caption, label, hits: [], box: div("panel", canvas, caption, label) };
    label.ariaLive = "polite";
    stage.append(panel.box);
    listen(panel);
    return panel;
  });
  stage.append(reset, legend);
  play.innerHTML = '<svg viewBox="0 0 16 16" aria-hidden="true"><path/></svg>';
  el.append(root);

  function home() { Object.assign(camera, { rotation: IDENTITY, zoom: 1 }); invalidate(); }
  function zoomBy(factor) { camera.zoom = clamp(camera.zoom * factor, 0.2, 12); invalidate(); }
  function rotate(ax, ay) { camera.rotation = matmul(turn(ax, ay), camera.rotation); invalidate(); }

  function listen(panel) {
    const { canvas } = panel, on = canvas.addEventListener.bind(canvas);
    let last = null, moved = 0;
    const tell = (done) => store.drag({ kind: "drag", panel: panel.p, frame: grab.frame, atom: grab.i, position: grab.to, done });
    on("pointerdown", (event) => {
      if (!event.isPrimary) return;
      canvas.setPointerCapture(event.pointerId);
      last = event;
      moved = 0;
      const hit = get("draggable") && !event.button && under(panel, event);
      grab = hit && { ...hit, panel, frame: get("frame") };
    });
    on("pointermove", (event) => {
      if (!last) canvas.style.cursor = get("draggable") && under(panel, event) ? "move" : "";
      if (!last || !event.isPrimary) return;
      const dx = event.clientX - last.clientX, dy = event.clientY - last.clientY;
      moved += Math.abs(dx) + Math.abs(dy);
      last = event;
      if (!grab) return rotate(dy * 0.009, dx * 0.009);
      grab.x += dx;
      grab.y += dy;
      if (moved < 5) return;
      grab.to = lens(panel).place(grab);
      if (get("selected") !== grab.i) set("selected", grab.i);
      tell(false);
      invalidate();
    });
    on("pointerup", (event) => {
      if (moved >= 5) return;
      const atom = under(panel, event)?.i ?? null;
      set("selected", atom);
      model.send({ kind: "pick", atom });
    });
    on("lostpointercapture", () => { // let go, or cancelled
      if (grab?.to) tell(true);
      last = grab = null;
      invalidate();
    });
    on("dblclick", home);
    on("wheel", (event) => {
      if (document.activeElement !== canvas) return; // until it is clicked the wheel is the page's
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY * 0.0012));
    }, { passive: false });
  }
  const keys = {
    ArrowLeft: () => rotate(0, -0.12), ArrowRight: () => rotate(0, 0.12), ArrowUp: () => rotate(-0.12, 0), ArrowDown: () => rotate(0.12, 0),
    "+": () => zoomBy(1.15), "=": () => zoomBy(1.15), "-": () => zoomBy(1 / 1.15), 0: home, Escape: () => set("selected", null),
    " ": () => { if (store.total() > 1) toggle(); },
  };
  root.onkeydown = (event) => {
    const { key, target } = event;
    if (event.ctrlKey || event.metaKey || event.altKey) return; // the browser's: Ctrl and + enlarge the page
    event.stopPropagation(); // JupyterLab would take the slider's arrow keys
    const action = (target.tagName === "CANVAS" || (target === slider && key === " ")) && keys[key];
    if (action) { action(); event.preventDefault(); }
  };
  const under = (panel, event) => panel.hits.findLast((h) => Math.hypot(h.x - event.offsetX, h.y - event.offsetY) <= h.r);

  function lens({ canvas, p }, ground) { // camera of one panel: rotate, then a mild perspective
    const rotation = matmul(camera.rotation, store.rotation(p)), [ex, ey, radius] = camera.fit;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    const scale = camera.zoom * 0.93 * Math.min(width / (2 * ex), height / (2 * ey), (1.5 * Math.min(width, height)) / (2 * radius), 62);
    const far = 5 * radius + 8, scaled = (z) => (scale * far) / Math.max(1, far - z);
    return {
      ground, width, height, turn: (v) => times(rotation, v),
      project: ([x, y, z]) => { const s = scaled(z); return { x: width / 2 + x * s, y: height / 2 - y * s, scale: s }; },
      place: ({ x, y, z }) => { // where in Angstrom a point of the screen is, at a given depth
        const s = scaled(z), v = [(x - width / 2) / s, (height / 2 - y) / s, z];
        return store.at(p, get("frame")).center.map((c, k) => c + rotation[k] * v[0] + rotation[k + 3] * v[1] + rotation[k + 6] * v[2]);
      },
      fog: (z) => Math.round(FOG_STEPS * clamp((radius - z) / (2 * radius))) / FOG_STEPS / 2,
    };
  }

  function cleared(canvas, { width, height }) { // sharp on every screen
    const ctx = canvas.getContext("2d"), size = [width, height].map((v) => Math.round(v * devicePixelRatio));
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    ctx.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    return ctx;
  }
  function drawPanel(panel, ground) {
    const view = lens(panel, ground), { tables, reference } = store;
    if (!view.width || !view.height) return;
    const ctx = cleared(panel.canvas, view), frame = store.at(panel.p, get("frame")), center = frame?.center ?? reference?.center;
    const options = { bonds: get("_bonds"), tables, center, arrows: get("arrows"), forceMax: store.forceMax() };
    panel.hits = frame ? drawMolecule(ctx, frame, colorsOf(frame, get("color_by"), store, get("_types")), view, options) : [];
    if (reference) ghost(ctx, reference, view, { tables, center });
    caption(panel, frame);
    select(panel, frame, ctx);
    if (grab?.to && grab.panel === panel) ring(ctx, grab, ACCENT); // the atom itself follows with the answer
  }
  const spare = tag("canvas");
  function ghost(ctx, frame, view, options) { // drawn apart, then laid over as one translucent layer
    drawMolecule(cleared(spare, view), frame, Array(frame.n).fill(GHOST), view, options);
    for (const [order, alpha] of [["destination-over", 0.6], ["source-over", 0.14]]) { // clear behind, a hint in front
      ctx.globalCompositeOperation = order;
      ctx.globalAlpha = alpha;
      ctx.drawImage(spare, 0, 0, view.width, view.height);
    }
    ctx.globalAlpha = 1;
  }
  function caption(panel, frame) {
    const parts = [panel.title, frame?.label].filter(Boolean), bad = frame?.bad ? [`${frame.bad} of ${frame.n} atoms not finite`] : [];
    panel.caption.replaceChildren(...parts.map((text) => tag("span", {}, text)), ...bad.map((text) => tag("span", { class: "elv-bad" }, text)));
    const what = frame ? `${formula(frame, store.tables.symbols)}, ${frame.n} atoms` : "no frame yet";
    panel.canvas.ariaLabel = `${[...parts, what].join(", ")}. Drag or arrow keys rotate${get("draggable") ? " (on an atom, a drag moves it)" : ""}, click picks an atom, then the wheel or + and - zoom.`;
    panel.box.classList.toggle("elv-empty", !frame);
  }
  function select({ label, hits }, frame, ctx) {
    const { symbols } = store.tables, hit = hits.find((h) => h.i === get("selected"));
    for (const [color, atoms] of Object.entries(get("marks"))) hits.filter((h) => atoms.includes(h.i)).forEach((h) => ring(ctx, h, color));
    label.hidden = !hit;
    if (!hit) return;
    ring(ctx, hit, ACCENT);
    const { i } = hit, lines = [`${symbols[frame.numbers[i]]} ${i}`, `(${row(frame.x, i).map((c) => c.toFixed(3)).join(", ")}) Å`];
    if (frame.norms?.[i] >= 0) lines.push(`|F| ${frame.norms[i].toPrecision(3)} eV/Å`);
    if (frame.types) {
      const share = get("_types").map((z, t) => [frame.types[i * frame.k + t], symbols[z]]);
      lines.push(share.sort((a, b) => b[0] - a[0]).slice(0, 3).map(([w, s]) => `${s} ${Math.round(100 * w)} %`).join("  "));
    }
    const text = lines.join("\n");
    if (label.textContent !== text) label.textContent = text;
  }

  function controls() {
    const total = store.total(), last = Math.max(0, total - 1), frame = Math.min(get("frame"), last);
    const modes = ["element", ...["force", "type"].filter((name) => store.has(`${name}s`))];
    if (`by ${modes.join("by ")}` !== mode.textContent) mode.replaceChildren(...modes.map((name) => tag("option", { value: name }, `by ${name}`)));
    mode.value = get("color_by");
    mode.value ||= "element"; // it is not among the options
    mode.hidden = modes.length < 2;
    arrowBox.hidden = !modes.includes("force");
    arrows.checked = get("arrows");
    play.hidden = slider.hidden = counter.hidden = total < 2;
    bar.hidden = total < 2 && modes.length < 2;
    const verb = get("playing") ? "pause" : "play";
    play.ariaLabel = verb;
    play.querySelector("path").setAttribute("d", ICONS[verb]);
    slider.max = last;
    slider.value = frame;
    slider.style.setProperty("--done", `${last && (100 * frame) / last}%`);
    slider.ariaValueText = [`${frame + 1} of ${total}`, store.at(0, frame)?.label].filter(Boolean).join(", ");
    counter.textContent = `${frame + 1} / ${total}`;
    legend.hidden = mode.value !== "force";
    legend.lastChild.textContent = `≥ ${store.forceMax().toPrecision(2)} eV/Å`;
    heading.textContent = get("title");
    const error = get("last_error");
    alert.firstChild.textContent = error;
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
      const room = get("arrows") && store.has("forces") ? 0.9 : 0; // for arrows that point outwards
      const target = grab ? camera.fit : store.extents().map((v) => v + room);
      const before = camera.fit ?? target, gap = Math.hypot(...plus(target, before, -1));
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
  scheme.onchange = invalidate;
  invalidate();
  return () => {
    store.views.delete(invalidate);
    model.off(names, invalidate);
    resized.disconnect();
    themed.disconnect();
    scheme.onchange = null;
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
