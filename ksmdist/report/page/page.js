/* What happens as the page opens. */

const data = JSON.parse(document.getElementById("data").textContent);
const GRIDS = { contents: data.contents, cells: data.heat.cells, cumulative: data.cumulative, exposure: data.exposure, images: data.images, pairs: data.pairs };
const CHARTS = {
  split: splitChart, policy: policyChart, spectrum: spectrumChart, heat: heatChart, cumulative: cumulativeChart,
  whatif: whatifChart, huge: hugeChart,
};
const root = document.documentElement, tip = document.getElementById("tip");
let tried = null;

/* Text only: what a plot tells of an image is not to be read as markup. */
function showTip(handler, event, item, value) {
  const text = value && typeof value === "object" ? value.tip : value;
  tip.hidden = text === null || text === undefined || text === "";
  if (tip.hidden) return;
  tip.textContent = text;
  const left = Math.min(event.clientX + 12, root.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${event.clientY + 16}px`;
}

const drawn = new Map();

async function draw(place) {
  const name = place.dataset.chart, before = drawn.get(name);
  if (before) await before;
  const inner = place.firstElementChild ?? place.appendChild(element("div", { "aria-hidden": "true" })); // Vega takes its role
  const drawing = vegaEmbed(inner, { ...CHARTS[name](data, place.clientWidth, tried), autosize: { type: "pad" } }, {
    actions: false, ast: true, config: CONFIG, defaultStyle: false, mode: "vega-lite", renderer: "svg", tooltip: showTip,
  });
  drawn.set(name, drawing);
  await drawing;
}

const places = [...document.querySelectorAll("[data-chart]")];
const drawAll = async () => { for (const place of places) await draw(place); };

for (const place of document.querySelectorAll("[data-grid]")) {
  const grid = GRIDS[place.dataset.grid], behind = place.closest("details");
  if (!behind) makeTable(place, grid);
  else behind.addEventListener("toggle", () => makeTable(place, grid), { once: true });
}

const note = document.getElementById("heat-note");
if (note) {
  const { heat } = data, among = heat.tenants > 1 ? `, ${formatNumber(heat.across_tenants)} of them between tenants` : "";
  note.textContent = `${formatNumber(data.pairs.total)} pairs of images share a content other than zero${among}.`;
}

makeWhatif(data, (now) => {
  tried = now;
  const place = places.find((each) => each.dataset.chart === "whatif");
  if (drawn.has("whatif")) draw(place);
});

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const each of opened) each.open = true;
});
addEventListener("afterprint", () => { for (const each of opened) each.open = false; });

let width = root.clientWidth, waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    drawAll();
  }, 200);
});

await drawAll();
root.dataset.ready = "true";
