"use strict";
// Draws the report from the JSON in #data. Text from a run only ever becomes text, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.getElementById("page");
  page.replaceChildren();

  const TITLES = {
    amax: "amax: largest magnitude of the tensor",
    amax_bound: "amax bound: fp8 max × the largest inverse block scale",
    headroom: "headroom: the format's largest value over the largest scaled one; below 1 (2^0) it saturated",
    scale: "scale: what the tensor is multiplied with before the cast",
    scale_next: "scale of the next cast",
    scale_inv_max: "largest inverse block scale",
    scale_inv_min: "smallest inverse block scale",
    scale_inv_mean: "mean inverse block scale",
    underflow: "underflow: share of non-zero elements that became zero",
    saturation: "saturation: share of elements clipped at the format's largest value",
    sqnr: "SQNR: signal to quantisation noise, dB",
  };

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children.filter((child) => child !== null && child !== undefined).map((child) =>
      child instanceof Node ? child : String(child)));
    return node;
  }

  function number(value, digits = 4) {
    return typeof value === "number" ? Number(value.toPrecision(digits)).toString() : value == null ? "–" : String(value);
  }

  function matrix(run, name) {
    // Rows of fp32, NaN where nothing was logged; decoded when first shown.
    const stat = run.stats[name];
    if (!stat.rows) {
      const bytes = Uint8Array.from(atob(stat.data), (character) => character.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      const width = run.steps.length;
      stat.rows = run.operands.map((_, row) =>
        Array.from({ length: width }, (_, column) => view.getFloat32(4 * (row * width + column), true)));
    }
    return stat.rows;
  }

  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();

  function layout(extra) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("--text"), size: 13 },
      margin: { l: 70, r: 20, t: 30, b: 45 }, hovermode: "closest",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
      ...extra,
      xaxis: { title: { text: "step" }, gridcolor: colour("--line"), zeroline: false, ...(extra.xaxis || {}) },
      yaxis: { gridcolor: colour("--line"), zeroline: false, ...(extra.yaxis || {}) },
    };
  }
  const OPTIONS = { responsive: true, displaylogo: false, displayModeBar: "hover" };

  function section(title, note) {
    page.append(el("h2", {}, title));
    if (note) page.append(el("p", { class: "note" }, note));
  }

  function chart(id, height, label) {
    const node = el("div", { id, role: "img", "aria-label": label, style: `height:${height}px` });
    page.append(node);
    return node;
  }

  // -- what ran ----------------------------------------------------------------------------------------

  function header(run) {
    const emulated = run.device.startsWith("emulated");
    page.append(
      el("h1", {}, run.name),
      el("div", {},
        el("span", { class: "badge" }, run.recipe.name || "unknown recipe"),
        el("span", { class: emulated ? "badge emulated" : "badge" }, run.device),
        el("span", { class: run.status === "failed" ? "badge failed" : "badge" }, run.status)),
    );
    if (emulated) page.append(el("p", { class: "note" },
      "Numerics as on the device named, computed on a CPU: nothing here says how fast it would be."));
    if (run.error) page.append(el("p", { class: "note" }, typeof run.error === "string" ? run.error : JSON.stringify(run.error)));
    const quantized = run.manifest.filter((row) => row.quantized).length;
    const losses = run.loss.values;
    const tiles = [
      ["first loss", number(losses[0])],
      ["last loss", number(losses[losses.length - 1])],
      ["held-out loss", number(run.result.held_out_loss)],
      ["modules quantised", run.manifest.length ? `${quantized} of ${run.manifest.length}` : "–"],
      ["tensors watched", run.operands.length],
      ["alerts", run.alerts.length],
      ["last step", run.loss.steps[run.loss.steps.length - 1] ?? "–"],
    ];
    page.append(el("div", { class: "tiles" },
      ...tiles.map(([label, value]) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, label)))));
    const options = Object.entries(run.recipe).filter(([key]) => !["name", "schema_version"].includes(key))
      .map(([key, value]) => `${key}=${typeof value === "object" && value !== null ? JSON.stringify(value) : value}`);
    page.append(el("dl", {},
      el("dt", {}, "recipe"), el("dd", {}, el("code", {}, options.join("  ") || "no options")),
      el("dt", {}, "versions"), el("dd", {}, Object.entries(run.versions).map(([k, v]) => `${k} ${v}`).join(", ")),
      el("dt", {}, "directory"), el("dd", {}, el("code", {}, run.path))));
  }

  function alerts(run) {
    if (!run.alerts.length) return;
    section(data.runs.length > 1 ? `Alerts of ${run.name}` : "Alerts", "What the alert rules reported, and what to do about it.");
    const rows = run.alerts.map((alert) => el("tr", {},
      el("td", {}, alert.step), el("td", {}, alert.rule),
      el("td", {}, el("code", {}, `${alert.module} ${alert.tensor}`), alert.tensors > 1 ? ` and ${alert.tensors - 1} more` : ""),
      el("td", { class: "wrap" }, alert.message)));
    page.append(el("div", { class: "scroll" }, el("table", { class: "alerts" },
      el("thead", {}, el("tr", {}, ...["step", "rule", "worst tensor", "what was seen"].map((name) => el("th", {}, name)))),
      el("tbody", {}, ...rows))));
  }

  function losses() {
    section("Loss", data.runs.length > 1 ? "Mean per token of the global batch, every run over the same steps." : null);
    const node = chart("loss", 320, "Loss over steps");
    Plotly.newPlot(node, data.runs.map((run) => ({
      x: run.loss.steps, y: run.loss.values, name: run.name, mode: "lines", line: { width: 2 },
    })), layout({ showlegend: data.runs.length > 1, yaxis: { title: { text: "loss" } } }), OPTIONS);
  }

  // -- every tensor over the steps ---------------------------------------------------------------------

  function tensors() {
    const watched = data.runs.filter((run) => run.operands.length);
    if (!watched.length) {
      section("Tensors", "No quantised tensor was logged: the recipe is BF16, telemetry is off, or no step has been logged yet.");
      return;
    }
    section("Tensors", "A row is one operand of one layer's GEMMs, a column a logged step. Click a row to see it below.");
    const pick = (label, id, values) => {
      const select = el("select", { id }, ...values.map(([value, text]) => el("option", { value }, text)));
      return [el("label", {}, label, select), select];
    };
    const [runLabel, runSelect] = pick("run", "run", watched.map((run, index) => [index, run.name]));
    const [statLabel, statSelect] = pick("statistic", "stat", []);
    const [tensorLabel, tensorSelect] = pick("operand", "tensor",
      [["", "all"], ["input", "input"], ["weight", "weight"], ["grad_output", "grad_output"]]);
    const filter = el("input", { id: "filter", placeholder: "part of a module's name" });
    page.append(el("div", { class: "controls" }, watched.length > 1 ? runLabel : null, statLabel, tensorLabel,
      el("label", {}, "module", filter)));
    const heading = el("p", { class: "note", id: "stat-title" });
    page.append(heading);
    const heat = chart("heatmap", 480, "A statistic of every tensor over the steps");
    const detail = chart("detail", 420, "amax and scale of one tensor over the steps");
    const history = chart("window", 260, "amax history window of one tensor");
    let shown = [];

    const current = () => watched[Number(runSelect.value)];

    function fillStats() {
      const names = Object.keys(current().stats);
      const kept = statSelect.value;
      statSelect.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
      if (names.includes(kept)) statSelect.value = kept;
    }

    function draw() {
      const run = current();
      const name = statSelect.value;
      const stat = run.stats[name];
      const wanted = filter.value.toLowerCase();
      shown = run.operands.map((_, index) => index).filter((index) => {
        const operand = run.operands[index];
        return (!tensorSelect.value || operand.tensor === tensorSelect.value) && operand.module.toLowerCase().includes(wanted);
      });
      const rows = matrix(run, name);
      const share = run.stepsAColumn > 1 ? ` A column is the worst of ${run.stepsAColumn} logged steps.` : "";
      heading.textContent = (TITLES[name] || name) + (stat.logarithmic ? ", as a power of two." : ".") + share +
        (shown.length ? "" : " No module's name has this in it.");
      const labels = shown.map((index) => `${run.operands[index].module}  ${run.operands[index].tensor}`);
      const z = shown.map((index) => rows[index].map((value) => {
        if (Number.isNaN(value)) return null;
        if (!stat.logarithmic) return Number.isFinite(value) ? value : null;
        return value > 0 && Number.isFinite(value) ? Math.log2(value) : null;
      }));
      const text = shown.map((index) => rows[index].map((value) => number(value, 6)));
      heat.style.height = `${Math.min(900, Math.max(260, 90 + 16 * shown.length))}px`;
      Plotly.react(heat, [{
        type: "heatmap", x: run.steps.map(String), y: labels, z, text, colorscale: "Viridis", hoverongaps: false,
        hovertemplate: "%{y}<br>step %{x}<br>" + name.replace(/[<>&]/g, "") + " %{text}<extra></extra>",
        colorbar: { thickness: 12, title: { text: stat.logarithmic ? "log2" : "", side: "right" } },
      }], layout({
        margin: { l: 10, r: 10, t: 10, b: 45 },
        xaxis: { type: "category", nticks: 12 },
        yaxis: { autorange: "reversed", automargin: true, tickfont: { size: 11 }, type: "category" },
      }), OPTIONS);
      if (shown.length) inspect(shown[0]);
    }

    function inspect(index) {
      const run = current();
      const operand = run.operands[index];
      const lines = ["amax", "amax_bound", "scale", "scale_inv_max", "scale_inv_min"].filter((name) => run.stats[name])
        .map((name) => ({ name, values: matrix(run, name)[index] }))
        .filter(({ values }) => values.some((value) => !Number.isNaN(value)));
      Plotly.react(detail, lines.map(({ name, values }) => ({
        x: run.steps, y: values.map((value) => (value > 0 && Number.isFinite(value) ? value : null)), name, mode: "lines+markers",
        marker: { size: 4 }, line: { width: 2 }, yaxis: name.startsWith("amax") ? "y" : "y2",
      })), layout({
        title: { text: `${operand.module} ${operand.tensor} (${run.recipes[index]}, ${run.formats[index]})`, font: { size: 14 } },
        showlegend: lines.length > 2, legend: { orientation: "h", y: -0.2 }, margin: { l: 80, r: 20, t: 40, b: 45 },
        xaxis: { anchor: "y2" },
        yaxis: { title: { text: "amax" }, type: "log", exponentformat: "power", domain: [0.54, 1] },
        yaxis2: { title: { text: "scale" }, type: "log", exponentformat: "power", domain: [0, 0.46], gridcolor: colour("--line") },
      }), OPTIONS);
      const window_ = run.windows[index];
      history.style.display = window_ ? "" : "none";
      if (window_) {
        Plotly.react(history, [{ type: "bar", x: window_.map((_, age) => age - window_.length + 1), y: window_, marker: { color: colour("--accent") } }],
          layout({ title: { text: "amax history of the last logged step, newest entry at 0", font: { size: 14 } },
            margin: { l: 70, r: 20, t: 40, b: 45 }, xaxis: { title: { text: "updates ago" } }, yaxis: { title: { text: "amax" } } }), OPTIONS);
      }
      document.getElementById("detail").dataset.operand = `${operand.module} ${operand.tensor}`;
    }

    runSelect.addEventListener("change", () => { fillStats(); draw(); });
    for (const control of [statSelect, tensorSelect]) control.addEventListener("change", draw);
    filter.addEventListener("input", draw);
    fillStats();
    draw();
    heat.on("plotly_click", (event) => inspect(shown[event.points[0].pointIndex[0]]));
  }

  // -- what every module did ---------------------------------------------------------------------------

  function manifest(run) {
    section(data.runs.length > 1 ? `Modules of ${run.name}` : "Modules",
      "Read back from the built model after its first step with the recipe, not predicted.");
    if (!run.manifest.length) {
      page.append(el("p", { class: "note" }, "No manifest yet: the first step has not ended."));
      return;
    }
    const cells = (row) => [
      el("td", {}, el("code", {}, row.module)), el("td", {}, row.recipe),
      ...["input", "weight", "grad_output"].map((tensor) => el("td", {}, row.operands[tensor] ?? "–")),
      el("td", {}, row.primary ?? "–"), el("td", { class: "wrap" }, row.reason ?? ""),
    ];
    page.append(el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...["module", "recipe", "input", "weight", "grad_output", "primary weight", "why not"]
        .map((name) => el("th", {}, name)))),
      el("tbody", {}, ...run.manifest.map((row) => el("tr", { class: row.quantized ? "" : "plain" }, ...cells(row)))))));
  }

  data.runs.forEach(header);
  data.runs.forEach(alerts);
  losses();
  tensors();
  data.runs.forEach(manifest);
  page.append(el("p", { class: "note" }, `Made by nemo_fp8_recipes ${data.version}.`));
  document.documentElement.dataset.ready = "true";
})();
