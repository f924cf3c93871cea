"use strict";
// Texts of data and models go into the page as text nodes only.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = ["svg", "path", "line", "rect", "circle", "text", "g"];

/** An element with attributes (functions are listeners) and children; a child that is a string becomes a text node. */
function el(tag, attributes = {}, ...children) {
  const node = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => el("option", { value, selected: value === chosen }, text)));
}

const show = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))).replace("-", "−"));

// --- samples ---------------------------------------------------------------------------------------------------------

const STEP = 20;
const ORDERS = {
  none: ["the run's random order", null],
  longest: ["longest answer first", "tokens", -1],
  shortest: ["shortest answer first", "tokens", 1],
  high: ["largest margin first", "margin", -1],
  low: ["smallest margin first", "margin", 1],
  human: ["most human first (classifier)", "score", -1],
  machine: ["most machine first (classifier)", "score", 1],
  likelier: ["human answer likelier first", "gap", -1],
  likeliest: ["own answer likelier first", "gap", 1],
};
const FACTS = {
  tokens: (value) => `${value} tokens`,
  score: (value) => `classifier ${value.toFixed(2)}`,
  margin: (value) => `margin ${value.toFixed(2)} nats`,
  gap: (value) => `human answer ${Math.abs(value).toFixed(2)} nats/token ${value > 0 ? "likelier" : "less likely"}`,
};
let limit = STEP;

function currentSet() {
  return data.sets[Number($("set").value)];
}

function chooseSet() {
  const set = currentSet();
  const policies = set.labels.slice(1);
  const last = policies.includes(data.compare[1]) ? data.compare[1] : policies.at(-1);
  fill($("of"), policies.map((label) => [label, label]), last);
  const shown = ["human", ...(policies.length > 3 ? [data.compare[0], last] : policies)];
  $("shown").replaceChildren(...set.labels.map((label, i) =>
    el("label", {}, el("input", { type: "checkbox", value: i, checked: shown.includes(label), change: list }), ` ${label}`)));
  chooseOrders();
}

function chooseOrders() {
  const set = currentSet();
  const column = set.labels.indexOf($("of").value);
  const known = (key) => !key || set.rows.some((row) => Number.isFinite(row.answers[column]?.[key]));
  fill($("sort"), Object.entries(ORDERS).filter(([, [, key]]) => known(key)).map(([value, [text]]) => [value, text]), $("sort").value);
  restart();
}

function restart() {
  limit = STEP;
  list();
}

/** The rows that hold the searched text, in the chosen order, each with its number in the set. */
function chosenRows(set) {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const column = set.labels.indexOf($("of").value);
  const [, key, sign] = ORDERS[$("sort").value] ?? ORDERS.none;
  const rows = set.rows.map((row, i) => ({ ...row, number: i + 1 })).filter((row) => {
    const text = [row.prompt, ...row.answers.map((answer) => answer?.text ?? "")].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const value = (row) => row.answers[column]?.[key] ?? Infinity * sign;
  return key ? rows.sort((a, b) => sign * (value(a) - value(b)) || 0) : rows;
}

function list() {
  const set = currentSet();
  const rows = chosenRows(set);
  const columns = [...$("shown").querySelectorAll(":checked")].map((box) => Number(box.value));
  const cut = set.rows.length < set.total
    ? ` The page has ${set.rows.length.toLocaleString("en")} of ${set.total.toLocaleString("en")}, to stay small; the run's folder has all.` : "";
  $("count").textContent = `${rows.length} of ${set.rows.length} prompts match, ${Math.min(limit, rows.length)} shown.${cut}`;
  $("list").replaceChildren(...rows.slice(0, limit).map((row) => sample(set, row, columns)));
  $("more").hidden = rows.length <= limit;
}

function sample(set, row, columns) {
  const title = `sample-${row.number}`;
  return el("article", { class: "sample", "aria-labelledby": title },
    el("h3", { id: title }, `Prompt ${row.number}`), promptText(row.prompt),
    el("div", { class: "answers" }, ...columns.filter((i) => row.answers[i]).map((i) => {
      const answer = row.answers[i];
      const facts = Object.keys(FACTS).filter((key) => Number.isFinite(answer[key])).map((key) => FACTS[key](answer[key]));
      const marked = i > 0 && $("differences").checked ? marks(row.answers[0].text, answer.text) : [answer.text];
      return el("section", { "aria-label": set.labels[i] }, el("h4", {}, set.labels[i]),
        el("p", { class: "facts" }, facts.join(" · ")), el("div", { class: "text" }, ...marked));
    })));
}

const promptText = (text) => el("div", { class: "prompt text", tabindex: 0, role: "region", "aria-label": "Prompt" }, text);

/** The text in pieces, with what is not in the longest common sequence of words with `reference` in <mark>. */
function marks(reference, text) {
  const a = reference.split(/\s+/), b = text.match(/\S+\s*|^\s+/g) ?? []; // words, with the blanks that follow
  const words = b.map((piece) => piece.trim()), width = words.length + 1;
  if (a.length * width > 2e6) return [text];
  const best = new Uint16Array((a.length + 1) * width); // length of the sequence from a[i], words[j] on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = words.length - 1; j >= 0; j--) {
      const skip = Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
      best[i * width + j] = a[i] === words[j] ? best[(i + 1) * width + j + 1] + 1 : skip;
    }
  const groups = []; // [is common, text]
  for (let i = 0, j = 0; j < words.length; ) {
    const common = i < a.length && a[i] === words[j];
    if (!common && i < a.length && best[(i + 1) * width + j] >= best[i * width + j + 1]) {
      i++;
      continue;
    }
    if (groups.at(-1)?.[0] === common) groups.at(-1)[1] += b[j];
    else groups.push([common, b[j]]);
    i += common;
    j++;
  }
  return groups.map(([common, piece]) => (common ? piece : el("mark", {}, piece)));
}

function startSamples() {
  if (!data.sets.length) return;
  $("samples-section").hidden = false;
  fill($("set"), data.sets.map((set, i) => [String(i), set.name]), "0");
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("set").addEventListener("change", chooseSet);
  $("of").addEventListener("change", chooseOrders);
  $("sort").addEventListener("change", restart);
  $("search").addEventListener("input", restart);
  $("differences").addEventListener("change", list);
  $("more").addEventListener("click", () => {
    const first = limit;
    limit += STEP;
    list();
    $("list").children[first]?.querySelector(".prompt").focus();
  });
  chooseSet();
}

// --- curves ----------------------------------------------------------------------------------------------------------

const [WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM] = [340, 190, 48, 8, 8, 34];
const tint = (color) => `var(--c${color.slice(1).toLowerCase()}, ${color})`;

function legend(panel) {
  return el("div", { class: "legend" }, ...[...panel.lines, ...panel.steps].filter((shape) => shape.label).map((shape) => {
    const swatch = el("i");
    swatch.style.background = tint(shape.color);
    return el("span", {}, swatch, shape.label);
  }));
}

/** What a panel shows at each place of its horizontal axis, as text. */
function readings(panel) {
  const tick = new Map(panel.x.ticks);
  const named = panel.xlabel || "at";
  const places = new Map();
  const add = (x, key, text) => places.set(key, { x, lines: [...(places.get(key)?.lines ?? [key]), text] });
  for (const line of panel.lines)
    if (line.alpha === 1) line.x.forEach((x, i) => {
      const bar = panel.bars.find((bar) => bar.x === x && bar.color === line.color);
      const interval = bar ? ` [${show(bar.low)}, ${show(bar.high)}]` : "";
      if (line.y[i] !== null) add(x, `${named} ${tick.get(x) ?? show(x)}`, `${line.label || panel.title}: ${show(line.y[i])}${interval}`);
    });
  for (const steps of panel.steps) steps.y.forEach((y, i) => add((steps.x[i] + steps.x[i + 1]) / 2,
    `${named} ${show(steps.x[i])} to ${show(steps.x[i + 1])}`, `${steps.label || panel.ylabel}: ${(100 * y).toFixed(1)} %`));
  return [...places.values()].sort((a, b) => a.x - b.x);
}

function chart(panel) {
  const along = panel.log ? Math.log : (x) => x;
  const [x0, x1] = panel.x.limits.map(along), [y0, y1] = panel.y.limits;
  const px = (x) => LEFT + ((along(x) - x0) / (x1 - x0)) * (WIDE - LEFT - RIGHT);
  const py = (y) => TOP + ((y1 - y) / (y1 - y0)) * (HIGH - TOP - BOTTOM);
  const stroke = (shape, node, color = tint(shape.color)) => {
    node.style.cssText = `stroke:${color};stroke-width:${shape.width ?? 1.6};opacity:${shape.alpha ?? 1};fill:none;` +
      (shape.dashed ? "stroke-dasharray:4 3" : "");
    return node;
  };
  const grid = panel.y.ticks.map(([y, text]) => [
    stroke({ width: 0.7 }, el("line", { x1: LEFT, x2: WIDE - RIGHT, y1: py(y), y2: py(y) }), tint("#e6e6e6")),
    el("text", { x: LEFT - 5, y: py(y) + 3.5, "text-anchor": "end" }, text)]);
  const ticks = panel.x.ticks.map(([x, text]) => el("text", { x: px(x), y: HIGH - BOTTOM + 14, "text-anchor": "middle" }, text));
  const path = (line) => line.x.map((x, i) => (line.y[i] === null ? "" : `${i && line.y[i - 1] !== null ? "L" : "M"}${px(x)} ${py(line.y[i])}`)).join("");
  const shapes = panel.steps.map((steps) => {
    const edge = steps.y.map((y, i) => `L${px(steps.x[i])} ${py(y)}L${px(steps.x[i + 1])} ${py(y)}`).join("");
    const node = stroke(steps, el("path", { d: `M${px(steps.x[0])} ${py(0)}${edge}L${px(steps.x.at(-1))} ${py(0)}` }));
    if (steps.fill) node.style.fill = tint(steps.color);
    return node;
  });
  for (const rule of panel.rules) {
    const at = rule.y === undefined ? { x1: px(rule.x), x2: px(rule.x), y1: TOP, y2: HIGH - BOTTOM } : { x1: LEFT, x2: WIDE - RIGHT, y1: py(rule.y), y2: py(rule.y) };
    shapes.push(stroke(rule, el("line", at)));
  }
  for (const bar of panel.bars) shapes.push(stroke({ ...bar, width: 1.6 }, el("line", { x1: px(bar.x), x2: px(bar.x), y1: py(bar.low), y2: py(bar.high) })));
  for (const line of panel.lines) {
    shapes.push(stroke(line, el("path", { d: path(line) })));
    if (line.x.length <= 20) line.x.forEach((x, i) => {
      if (line.y[i] === null || line.dashed) return;
      const dot = el("circle", { cx: px(x), cy: py(line.y[i]), r: 3 });
      dot.style.fill = tint(line.color);
      shapes.push(dot);
    });
  }
  const points = readings(panel);
  const cursor = stroke({ width: 0.8 }, el("line", { y1: TOP, y2: HIGH - BOTTOM }), "currentColor");
  const tip = el("div", { class: "tip", hidden: true });
  const node = el("svg", {
    viewBox: `0 0 ${WIDE} ${HIGH}`, tabindex: 0, role: "slider", "aria-label": `${panel.title} (${panel.ylabel}): values`,
    "aria-valuemin": 0, "aria-valuemax": Math.max(0, points.length - 1), "aria-valuenow": 0, "aria-valuetext": points[0]?.lines.join(", ") ?? "nothing",
  }, ...grid.flat(), ...ticks, ...shapes, cursor,
  el("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 4, "text-anchor": "middle" }, panel.xlabel));
  const point = (i) => {
    if (!points.length) return;
    const at = Math.min(points.length - 1, Math.max(0, i)), { x, lines } = points[at];
    node.setAttribute("aria-valuenow", at);
    node.setAttribute("aria-valuetext", lines.join(", "));
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    cursor.style.opacity = 0.6;
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    const place = 12 + (px(x) / WIDE) * node.clientWidth;
    tip.style.left = `${Math.max(4, Math.min(place + 10, node.clientWidth + 20 - tip.offsetWidth))}px`;
    tip.style.top = `${node.parentElement.querySelector("h4").offsetHeight + 16}px`;
  };
  const leave = () => { tip.hidden = true; cursor.style.opacity = 0; };
  leave();
  node.addEventListener("pointermove", (event) => {
    const x = ((event.clientX - node.getBoundingClientRect().left) / node.clientWidth) * WIDE;
    point(points.reduce((best, p, i) => (Math.abs(px(p.x) - x) < Math.abs(px(points[best].x) - x) ? i : best), 0));
  });
  node.addEventListener("pointerleave", leave);
  node.addEventListener("blur", leave);
  node.addEventListener("focus", () => point(Number(node.getAttribute("aria-valuenow"))));
  node.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    point(Number(node.getAttribute("aria-valuenow")) + step);
  });
  const unit = el("h4", {}, panel.title, el("span", { class: "facts" }, ` ${panel.ylabel.replace(/\n/g, " ")}`));
  return el("div", { class: "panel" }, unit, node, tip);
}

function startCharts() {
  for (const place of document.querySelectorAll("[data-figure]")) {
    const panels = data.charts[place.dataset.figure];
    if (typeof panels === "string") {
      place.append(el("img", { src: panels, alt: "A heat map of the values in the table" }));
      continue;
    }
    const key = legend(panels[0]);
    if (key.children.length) place.before(key);
    place.append(...panels.map(chart));
  }
}

/** Let a click on a header sort the table; numbers by value, whatever follows them in their cells. */
function makeSortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const number = (text) => parseFloat(text.replace(/[−]/g, "-").replace(/,/g, ""));
  heads.forEach((head, column) => {
    if (!head.textContent || body.rows.length < 2) return;
    const button = el("button", { type: "button" }, head.textContent);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent;
      const compare = (a, b) => (number(key(a)) - number(key(b)) || (isNaN(number(key(a))) - isNaN(number(key(b)))) || key(a).localeCompare(key(b)));
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    });
  });
}

// --- blind vote ------------------------------------------------------------------------------------------------------

let ballot = { key: "", pair: [], order: [], votes: [] };

/** A number that is the same for the same texts: votes are found again for these answers only. */
function checksum(text) {
  let sum = 2166136261;
  for (let i = 0; i < text.length; i++) sum = Math.imul(sum ^ text.charCodeAt(i), 16777619);
  return (sum >>> 0).toString(16);
}

function openBallot(fresh) {
  const set = data.sets[0], names = [$("vote-a").value, $("vote-b").value];
  const pair = names.map((name) => set.labels.indexOf(name));
  const usable = set.rows.map((_, i) => i).filter((i) => {
    const [a, b] = pair.map((column) => set.rows[i].answers[column]?.text);
    return a !== undefined && b !== undefined && a.trim() !== b.trim();
  });
  const key = `spin-vote ${names.join(" ")} ${checksum(usable.map((i) => pair.map((c) => set.rows[i].answers[c].text).join()).join())}`;
  let kept = null;
  try { // a page from a file may have no storage
    if (fresh) localStorage.removeItem(key);
    kept = JSON.parse(localStorage.getItem(key));
  } catch { /* the votes last as long as the page */ }
  const order = usable.map((row) => ({ row, swapped: Math.random() < 0.5, place: Math.random() })).sort((a, b) => a.place - b.place);
  ballot = { key, names, pair, order: kept?.order ?? order, votes: kept?.votes ?? [] };
  $("vote-count").open = false;
  showBallot();
}

/** Vote 1, 2 or 0 (a tie) on the prompt that is shown; without a choice take the last vote back. */
function vote(choice) {
  const item = ballot.order[ballot.votes.length];
  if (choice === undefined) ballot.votes.pop();
  else if (item) ballot.votes.push(choice === 0 ? "tie" : ballot.names[(choice === 2) !== item.swapped ? 1 : 0]);
  try {
    localStorage.setItem(ballot.key, JSON.stringify({ order: ballot.order, votes: ballot.votes }));
  } catch { /* as above */ }
  showBallot();
}

function count() {
  const wins = ballot.names.map((name) => ballot.votes.filter((winner) => winner === name).length);
  const decided = wins[0] + wins[1];
  return { names: ballot.names, wins, ties: ballot.votes.length - decided, share: decided ? wins[0] / decided : null, interval: wilson(wins[0], decided) };
}

/** The 95 % interval of a share (Wilson 1927). */
function wilson(wins, n, z = 1.959964) {
  if (!n) return null;
  const p = wins / n, middle = p + (z * z) / (2 * n), half = z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n));
  return [middle - half, middle + half].map((end) => Math.min(1, Math.max(0, end / (1 + (z * z) / n))));
}

function showBallot() {
  const { names, pair, order, votes } = ballot, item = order[votes.length], done = !item;
  const { wins, ties, share, interval } = count();
  const percent = (value) => `${Math.round(100 * value)} %`;
  $("vote-progress").textContent = !order.length ? "There is no prompt with two different answers." : done
    ? `All ${order.length} prompts are voted on.` : `Prompt ${votes.length + 1} of ${order.length}`;
  $("tally").textContent = `${names[0]} ${wins[0]}, ${names[1]} ${wins[1]}, ties ${ties}.` + (interval
    ? ` ${names[0]} is better in ${percent(share)} of the decided votes [${percent(interval[0])}, ${percent(interval[1])}], a 95 % interval (Wilson).` : "");
  if (done && order.length) $("vote-count").open = true;
  for (const button of document.querySelectorAll("[data-vote]")) button.disabled = done;
  $("undo").disabled = $("download").disabled = !votes.length;
  if (done) return $("ballot").replaceChildren();
  const row = data.sets[0].rows[item.row];
  const answers = (item.swapped ? [...pair].reverse() : pair).map((column) => row.answers[column].text);
  $("ballot").replaceChildren(promptText(row.prompt), el("div", { class: "answers" }, ...answers.map((text, i) =>
    el("section", { class: "sample", "aria-label": `Answer ${i + 1}` }, el("h3", {}, `Answer ${i + 1}`), el("div", { class: "text" }, text)))));
}

function download() {
  const votes = ballot.votes.map((winner, i) => {
    const { row, swapped } = ballot.order[i], { id, prompt } = data.sets[0].rows[row];
    return { id, prompt, first: ballot.names[swapped ? 1 : 0], second: ballot.names[swapped ? 0 : 1], winner };
  });
  const blob = new Blob([JSON.stringify({ name: data.name, ...count(), votes }, null, 2)], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(blob), download: `votes-${ballot.names.join("-")}.json`.replace(/[^\w.-]+/g, "-") });
  link.click();
  URL.revokeObjectURL(link.href);
}

function startVote() {
  const set = data.sets[0];
  if (!set) return;
  $("to-vote").hidden = false;
  if (!new URLSearchParams(location.search).has("vote")) return;
  for (const node of [$("main"), ...document.querySelectorAll("header, .skip")]) node.hidden = true;
  $("vote").hidden = false;
  const options = set.labels.map((label) => [label, label]), last = set.labels.at(-1);
  fill($("vote-a"), options, set.labels.includes(data.compare[1]) ? data.compare[1] : last);
  fill($("vote-b"), options, set.labels[0]);
  $("vote-a").addEventListener("change", () => openBallot(false));
  $("vote-b").addEventListener("change", () => openBallot(false));
  for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => vote(Number(button.dataset.vote)));
  $("undo").addEventListener("click", () => vote());
  $("restart").addEventListener("click", () => openBallot(true));
  $("download").addEventListener("click", download);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.closest("select, input")) return;
    if (["0", "1", "2"].includes(event.key)) vote(Number(event.key));
    if (event.key === "u") vote();
  });
  openBallot(false);
}

startSamples();
startCharts();
const sections = [...document.querySelectorAll("#main h2")].filter((head) => head.offsetParent);
$("links").append(...sections.map((head) => el("li", {}, el("a", { href: `#${head.id}` }, head.textContent))));
startVote();
if (data.sortable) document.querySelectorAll("main table").forEach(makeSortable);
// The page of a run that goes on is written again before each stage: look for that, unless the page is in use.
if (data.live) setInterval(() => $("vote").hidden && !$("search").value && window.scrollY < 100 && location.reload(), 30000);
