"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue("--" + name).trim();
  const byId = (id) => document.getElementById(id);
  const analyzed = new Map(((data.analysis || {}).sites || []).map((s) => [s.site.node, s]));
  const decibels = (v) => (v === undefined ? "" : v === null ? "exact" : v.toFixed(1));

  const times = (data.profile || {}).site_ms || {};
  const rows = data.sites.map((site) => {
    const a = analyzed.get(site.node);
    return Object.assign({ ms: times[site.node] }, site, a ? { alone: a.alone_db, upto: a.cumulative_db, output: a.output_db, share: a.share } : {});
  });

  // the table -----------------------------------------------------------------------------------------------------
  const text = (cell) => { const s = document.createElement("span"); s.textContent = cell.getValue() || ""; return s; };
  const status = (cell) => { const s = text(cell); s.className = "status " + cell.getValue(); return s; };
  const number = (format) => (cell) => format(cell.getValue());
  const columns = [
    { title: "op", field: "op", formatter: text, responsive: 0, minWidth: 66 },
    { title: "module", field: "module", formatter: text, responsive: 0, minWidth: 100, widthGrow: 3 },
    { title: "status", field: "status", formatter: status, responsive: 0, minWidth: 98 },
  ];
  if (analyzed.size) {
    columns.push(
      { title: "share", field: "share", sorter: "number", hozAlign: "right", responsive: 0, minWidth: 84,
        formatter: number((v) => (v === undefined ? "" : (100 * v).toFixed(1) + " %")) },
      { title: "output dB", field: "output", sorter: "number", hozAlign: "right", responsive: 2, minWidth: 118, formatter: number(decibels) },
      { title: "alone dB", field: "alone", sorter: "number", hozAlign: "right", responsive: 2, minWidth: 112, formatter: number(decibels) },
      { title: "so far dB", field: "upto", sorter: "number", hozAlign: "right", responsive: 3, minWidth: 112, formatter: number(decibels) });
  }
  if (Object.keys(times).length) columns.push(
    { title: "ms", field: "ms", sorter: "number", hozAlign: "right", responsive: 1, minWidth: 84, formatter: number((v) => (v === undefined ? "" : v.toFixed(4))) });
  columns.push(
    { title: "activation", field: "activation", formatter: text, responsive: 3, minWidth: 140, widthGrow: 2 },
    { title: "weight", field: "weight", formatter: text, responsive: 3, minWidth: 140, widthGrow: 2 },
    { title: "reason", field: "reason", formatter: text, responsive: 4, minWidth: 140, widthGrow: 3 },
    { title: "node", field: "node", formatter: text, responsive: 4, minWidth: 120, widthGrow: 2 });
  const table = new Tabulator("#table", {
    data: rows, columns, index: "node", layout: "fitColumns", responsiveLayout: "hide",
    maxHeight: 520, placeholder: "no such op", initialSort: analyzed.size ? [{ column: "share", dir: "desc" }] : [],
  });
  const statuses = [...new Set(rows.map((r) => r.status))].sort();
  for (const name of statuses) byId("status").add(new Option(name, name));
  const filter = () => {
    const wanted = byId("search").value.toLowerCase(), only = byId("status").value, compute = byId("compute").checked;
    table.setFilter((row) => (!compute || row.compute) && (!only || row.status === only) &&
      (!wanted || [row.op, row.module, row.node, row.status, row.reason, row.activation, row.weight].some((v) => (v || "").toLowerCase().includes(wanted))));
  };
  table.on("tableBuilt", filter);
  table.on("dataFiltered", (_, shown) => { byId("shown").textContent = shown.length + " of " + rows.length; });
  table.on("rowClick", (_, row) => show(row.getData().node));
  for (const [id, event] of [["search", "input"], ["status", "change"], ["compute", "change"]]) byId(id).addEventListener(event, filter);

  // one op --------------------------------------------------------------------------------------------------------
  const plots = [];
  const axes = (x, y) => ({
    x: { title: { display: true, text: x, color: colour("soft") }, ticks: { color: colour("soft") }, grid: { color: colour("line") } },
    y: { title: { display: true, text: y, color: colour("soft") }, ticks: { color: colour("soft") }, grid: { color: colour("line") } },
  });
  function show(node) {
    const site = data.sites.find((s) => s.node === node), a = analyzed.get(node);
    if (!site) return;
    byId("detail").hidden = false;
    byId("detail-name").textContent = node + " (" + site.op + ")";
    const lines = [site.module, site.reason, a && "alone " + decibels(a.alone_db) + " dB: inputs " + decibels(a.activations_db) +
      " dB, weight " + decibels(a.weight_db) + " dB; up to here " + decibels(a.cumulative_db) + " dB"];
    byId("detail-text").replaceChildren(...lines.filter(Boolean).map((line) => Object.assign(document.createElement("p"), { textContent: line })));
    for (const plot of plots.splice(0)) plot.destroy();
    byId("plots").replaceChildren();
    for (const tensor of a ? [...a.activations, ...(a.weight ? [a.weight] : [])] : []) histogram(tensor);
    byId("detail").scrollIntoView({ block: "nearest" });
  }
  function histogram(tensor) {
    const box = Object.assign(document.createElement("div"), { className: "plot" });
    const canvas = box.appendChild(document.createElement("canvas"));
    byId("plots").append(box);
    const step = (tensor.bins_high - tensor.bins_low) / tensor.counts.length;
    const middle = tensor.counts.map((_, i) => tensor.bins_low + (i + 0.5) * step);
    const held = (x) => tensor.grid_low === null || (x >= tensor.grid_low - step / 2 && x <= tensor.grid_high + step / 2);
    plots.push(new Chart(canvas, {
      type: "bar",
      data: { labels: middle.map((x) => x.toPrecision(3)), datasets: [{ data: tensor.counts.map((n) => n || null), barPercentage: 1, categoryPercentage: 1,
        backgroundColor: middle.map((x) => colour(held(x) ? "quantized" : "missed")) }] },
      options: { animation: false, maintainAspectRatio: false, scales: (() => { const s = axes("value", "elements"); s.y.type = "logarithmic"; return s; })(),
        plugins: { legend: { display: false }, title: { display: true, color: colour("text"), text: tensor.name + ": " + tensor.grid + ", " + decibels(tensor.sqnr_db) + " dB, " +
          (100 * tensor.clipped).toFixed(2) + " % clipped" } } },
    }));
  }
  for (const link of document.querySelectorAll("[data-node]")) link.addEventListener("click", () => show(link.dataset.node));

  // the graph -----------------------------------------------------------------------------------------------------
  const measures = { status: "status" };
  if (analyzed.size) Object.assign(measures, { share: "share of the output's error", alone: "dB alone" });
  for (const [value, name] of Object.entries(measures)) byId("colour").add(new Option(name, value));
  const ramp = (t) => "hsl(" + Math.round(130 * Math.max(0, Math.min(1, t))) + ", 65%, 45%)";
  const shade = (row) => {
    const by = byId("colour").value;
    if (by === "share") return row.share === undefined ? colour("excluded") : ramp(1 - Math.sqrt(row.share));
    if (by === "alone") return row.alone === undefined ? colour("excluded") : row.alone === null ? ramp(1) : ramp((row.alone - 10) / 35);
    return colour(row.compute || row.status === "quantized" ? row.status : "excluded");
  };
  const drawn = new Map(rows.map((row) => [row.node, row]));
  const graph = cytoscape({
    container: byId("graph"), minZoom: 0.02, maxZoom: 3,
    elements: [
      ...data.graph.nodes.map(([id, x, y]) => ({ data: { id, label: drawn.get(id).op }, position: { x: 70 * x, y: 64 * y } })),
      ...data.graph.edges.map(([source, target]) => ({ data: { source, target } })),
    ],
    layout: { name: "preset" },
    style: [
      { selector: "node", style: { label: "data(label)", shape: "round-rectangle", width: 104, height: 34, "font-size": 12, color: "#fff",
        "text-valign": "center", "text-max-width": 98, "text-wrap": "ellipsis", "background-color": (n) => shade(drawn.get(n.id())) } },
      { selector: "edge", style: { width: 1.5, "line-color": colour("soft"), "curve-style": "bezier", "target-arrow-shape": "triangle",
        "target-arrow-color": colour("soft"), "arrow-scale": 0.8 } },
    ],
  });
  const start = () => { graph.zoom(0.8); graph.center(graph.nodes()[0]); graph.panBy({ x: 0, y: 40 - graph.height() / 2 }); };
  if (graph.nodes().length) start();
  graph.on("tap", "node", (event) => show(event.target.id()));
  const legend = () => {
    const by = byId("colour").value;
    byId("legend").textContent = by === "status" ? "green: quantized, amber: unsupported, red: missed, grey: left float, or no matrix product" : by === "share" ? "red: most of the error" : "red: 10 dB, green: 45 dB";
    graph.style().update();
  };
  byId("colour").addEventListener("change", legend);
  legend();

  // plans ---------------------------------------------------------------------------------------------------------
  if (data.plans.length) {
    new Chart(byId("pareto"), {
      type: "scatter",
      data: { datasets: [{ label: "plans", showLine: true, borderColor: colour("quantized"), backgroundColor: colour("quantized"),
        data: data.plans.map((p) => ({ x: p.bits_per_weight, y: p.expected_db })) }] },
      options: { animation: false, maintainAspectRatio: false, scales: axes("bits a weight", "expected dB"), plugins: { legend: { display: false } } },
    });
  }
  document.body.dataset.ready = "yes";
})();
