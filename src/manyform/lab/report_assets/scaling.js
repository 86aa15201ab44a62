// Draws the charts of a scaling law from the figures embedded in the page, and plans with it.
(function () {
  "use strict";
  const { figures, archs, names, shown, text, css, color, fade, axis, layout } = page;
  const by = (id) => document.getElementById(id);
  const label = (n) => text(n || "runs");
  // Numbers as Python writes them with %.3g, so that the page and the command line agree.
  function digits(x, n) {
    if (x === 0) return "0";
    if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
    const [mantissa, power] = x.toExponential(n - 1).split("e");
    if (Number(power) >= -4 && Number(power) < n) return String(Number(x.toPrecision(n)));
    const size = String(Math.abs(power)).padStart(2, "0");
    return `${Number(mantissa)}e${power < 0 ? "-" : "+"}${size}`;
  }
  const short = (x) => {
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (x >= size && x < 1000 * size) return digits(x / size, 3) + unit;
    }
    return digits(x, 3);
  };
  const times = (x) => (x < 9.95 ? digits(x, 2) : Math.round(x).toLocaleString("en-US"));

  // A law is [E, A, B, alpha, beta]. What follows is manyform/scaling/best.py once more.
  const UNKNOWN = "not determined";
  const loss = (l, n, d) => l[0] + l[1] * n ** -l[3] + l[2] * d ** -l[4];
  const logSize = (l, product) =>
    (Math.log(l[3] * l[1]) - Math.log(l[4] * l[2]) + l[4] * Math.log(product)) / (l[3] + l[4]);
  const tokensFor = (l, n, target) => {
    const room = target - l[0] - l[1] * n ** -l[3];
    return room > 0 ? (l[2] / room) ** (1 / l[4]) : Infinity;
  };
  function interval(values) {
    const kept = values.filter((v) => !Number.isNaN(v)).sort((a, b) => a - b);
    if (!kept.length) return null;
    const at = (q) => {
      const i = q * (kept.length - 1);
      const low = Math.floor(i);
      const high = kept[low + 1] ?? kept[low];
      return kept[low] === high ? high : kept[low] + (i - low) * (high - kept[low]);
    };
    const tail = (1 - figures.level) / 2;
    return [at(tail), at(1 - tail)];
  }
  for (const n of names) {
    const a = archs[n];
    const ends = (v) => [Math.min(...v), Math.max(...v)];
    a.ranges = { params: ends(a.params), tokens: ends(a.tokens),
      ratio: ends(a.tokens.map((t, i) => t / a.params[i])) };
  }
  function covered(a, product, slack) {
    const { params, tokens, ratio } = a.ranges;
    const further = slack * Math.max(1, (product * a.per_token) / a.largest);
    const smallest = Math.max(params[0] / slack, Math.sqrt(product / (ratio[1] * slack)), product / (tokens[1] * further));
    const largest = Math.min(params[1] * further, Math.sqrt((product * slack) / ratio[0]), (product * slack) / tokens[0]);
    return [Math.min(smallest, largest), largest];
  }
  function atBudget(a, flops) {
    const product = flops / a.per_token;
    const cover = covered(a, product, 1);
    const limits = covered(a, product, figures.far);
    const clip = (x) => Math.min(Math.max(x, Math.log(limits[0])), Math.log(limits[1]));
    const open = (n) => !(limits[0] * (1 + 1e-9) < n && n < limits[1] * (1 - 1e-9));
    const own = logSize(a.law, product);
    const model = (n) => ({ n, d: product / n, loss: loss(a.law, n, product / n) });
    const law = model(Math.exp(clip(Number.isNaN(own) ? -Infinity : own)));
    const inside = cover[0] <= law.n && law.n <= cover[1];
    const nearest = inside ? law : model(Math.min(Math.max(law.n, cover[0]), cover[1]));
    const spread = interval(a.draws.map((l) => logSize(l, product)).filter((x) => !Number.isNaN(x)).map(clip));
    const sizes = spread && spread.map(Math.exp);
    const losses = sizes && [law, nearest].map((o) => interval(a.draws.map((l) => loss(l, o.n, o.d))));
    return { product, law, nearest, cover, open, sizes, losses,
      determined: !open(law.n) && !(sizes && open(sizes[0]) && open(sizes[1])) };
  }
  function best(a, flops) {
    const found = atBudget(a, flops);
    if (flops > a.largest && !atBudget(a, a.largest).determined) found.determined = false;
    return found;
  }
  function budgetNote(a, flops) {
    if (flops > 1.05 * a.largest) {
      return `${digits(flops, 3)} FLOPs is ${times(flops / a.largest)} times the largest measured budget (${digits(a.largest, 3)}): ${
        flops > figures.far * a.largest * (1 + 1e-9) ? "an extrapolation, good only as far as the law holds there" : "beyond what was measured"}`;
    }
    if (flops < a.smallest / 1.05) {
      return `${digits(flops, 3)} FLOPs is ${times(a.smallest / flops)} times below the smallest measured budget (${digits(a.smallest, 3)})`;
    }
    return "";
  }
  function notes(a, flops, found) {
    const out = [budgetNote(a, flops)].filter(Boolean);
    const [low, high] = found.cover;
    if (!found.determined) {
      out.push(`the best size at this budget is ${UNKNOWN} by these runs; the loss is that of the size nearest to them`);
    } else if (found.nearest !== found.law) {
      const above = found.law.n > high;
      const scope = flops <= 1.05 * a.largest ? "that the runs cover at this budget" : "of the runs, grown with the budget";
      out.push(`the best size is ${times(above ? found.law.n / high : low / found.law.n)} times ${above ? "above" : "below"
      } the sizes ${scope} (${high < 1.05 * low ? short(high) : `${short(low)} to ${short(high)}`})`);
    }
    return out;
  }
  function bestRows(found) {
    const span = (number) => {
      if (!found.sizes) return "";
      const ends = found.sizes.map((n) => [number(n), found.open(n)]).sort((a, b) => a[0] - b[0]);
      return ends.map(([v, far], i) => `${far ? ["under ", "over "][i] : ""}${short(v)}`).join(" to ");
    };
    const lossSpan = (i) => (found.losses ? found.losses[i].map((v) => v.toFixed(3)).join(" to ") : "");
    const p = found.product;
    const rows = [["parameters", (n) => n], ["tokens", (n) => p / n], ["tokens per parameter", (n) => p / n ** 2]]
      .map(([what, number]) => [what, found.determined ? short(number(found.law.n)) : UNKNOWN, span(number)]);
    if (found.determined) rows.push(["loss", found.law.loss.toFixed(3), lossSpan(0)]);
    if (!found.determined || found.nearest !== found.law) {
      rows.push([`loss nearest to the runs: ${short(found.nearest.n)} on ${short(found.nearest.d)} tokens`,
        found.nearest.loss.toFixed(3), lossSpan(1)]);
    }
    return rows;
  }

  const logx = { type: "log", exponentformat: "power", dtick: 1 };
  // The part of a chart in which nothing was run.
  const unmeasured = (from, said = "nothing was run here") => ({
    shapes: [{ type: "rect", x0: from, x1: figures.largest * figures.far, y0: 0, y1: 1, yref: "paper",
      fillcolor: css("--wash"), line: { width: 0 }, layer: "below" }],
    annotations: [{ x: Math.log10(figures.largest * figures.far), xanchor: "right", y: 0, yref: "paper", yanchor: "bottom",
      text: said, showarrow: false, font: { size: 11, color: css("--soft") } }] });
  const spanx = () => [Math.log10(figures.smallest / 1.4), Math.log10(figures.largest * figures.far)];
  const draw = {};
  draw.frontier = () => {
    const traces = [];
    for (const n of shown()) {
      const a = archs[n];
      const f = a.frontier;
      const keep = f.flops.map((_, i) => i).filter((i) => f.loss[i] !== null);
      const at = (values, rows = keep) => rows.map((i) => values[i]);
      if (f.low) {
        traces.push({ type: "scatter", mode: "lines", x: [...at(f.flops), ...at(f.flops).reverse()],
          y: [...at(f.high), ...at(f.low).reverse()], fill: "toself", fillcolor: fade(color(n), 0.09),
          line: { width: 0 }, hoverinfo: "skip" });
      }
      const run = keep.filter((i) => f.flops[i] <= a.largest);
      const after = keep.filter((i) => f.flops[i] >= (f.flops[run[run.length - 1]] || 0));
      for (const [rows, dash, width] of [[run, a.dash, 2.4], [after, a.dash, 1.1]]) {
        traces.push({ type: "scatter", mode: "lines", x: at(f.flops, rows), y: at(f.loss, rows),
          line: { color: color(n), dash, width },
          hovertemplate: `<b>${label(n)}</b>, best size covered<br>loss %{y:.3f}<br>%{x:.2e} FLOPs<extra></extra>` });
      }
    }
    for (const n of shown()) {
      const a = archs[n];
      traces.push({ type: "scatter", mode: "markers", x: a.flops, y: a.loss,
        text: a.params.map((p, i) => `${short(p)} parameters, ${short(a.tokens[i])} tokens`),
        marker: { color: color(n), symbol: a.symbol, size: 7.5, line: { color: css("--paper"), width: 0.7 } },
        hovertemplate: `<b>${label(n)}</b><br>%{text}<br>loss %{y:.3f}<br>%{x:.2e} FLOPs<extra></extra>` });
    }
    const all = shown().flatMap((n) => [...archs[n].loss, ...archs[n].frontier.loss.filter((v) => v !== null)]);
    const range = all.length ? [Math.log10(Math.min(...all) * 0.88), Math.log10(Math.max(...all) * 1.1)] : undefined;
    return [traces, layout({ xaxis: axis("training FLOPs", { ...logx, range: spanx() }),
      yaxis: axis(figures.metric, { type: "log", nticks: 8, tickformat: "~g", range }), ...unmeasured(figures.largest) })];
  };
  draw.profiles = () => {
    const traces = [];
    for (const n of shown()) {
      for (const p of archs[n].profiles) {
        traces.push({ type: "scatter", mode: "markers", x: p.params, y: p.loss,
          marker: { color: fade(color(n), 0.8), symbol: archs[n].symbol, size: 6 },
          hovertemplate: `<b>${label(n)}</b> at ${p.flops.toExponential(1)} FLOPs<br>%{x:.3s} parameters<br>loss %{y:.3f}<extra></extra>` });
        traces.push({ type: "scatter", mode: "lines", x: p.curve_params, y: p.curve_loss,
          line: { color: color(n), width: 1.4 }, hoverinfo: "skip" });
        traces.push({ type: "scatter", mode: "lines", x: p.curve_params, y: p.law_loss,
          line: { color: color(n), width: 1.2, dash: "dot" }, hoverinfo: "skip" });
      }
    }
    return [traces, layout({ xaxis: axis("parameters", { type: "log", tickformat: "~s", dtick: "D2" }),
      yaxis: axis(figures.metric, { tickformat: "~g" }) })];
  };
  const sizes = names.flatMap((n) => archs[n].params.map(Math.log10));
  const least = Math.min(...sizes);
  const wide = Math.max(...sizes) - least || 1;
  draw.residuals = () => [shown().map((n) => ({ type: "scatter", mode: "markers", x: archs[n].flops,
    y: archs[n].residuals.map((r) => 100 * r),
    text: archs[n].params.map((p, i) => `${short(p)} parameters, ${short(archs[n].tokens[i])} tokens`),
    marker: { color: fade(color(n), 0.8), symbol: archs[n].symbol,
      size: archs[n].params.map((p) => 5 + (7 * (Math.log10(p) - least)) / wide), line: { color: css("--paper"), width: 0.7 } },
    hovertemplate: `<b>${label(n)}</b><br>%{text}<br>%{y:+.2f}%<extra></extra>` })),
  layout({ xaxis: axis("training FLOPs", logx), yaxis: axis("measured above the law, %", { zeroline: true, zerolinecolor: css("--soft") }) })];
  draw.exponents = () => {
    const traces = [];
    for (const n of shown()) {
      const found = archs[n].approaches.filter((x) => x.a !== null);
      const single = names.every((m) => archs[m].approaches.filter((x) => x.a !== null).length < 2);
      traces.push({ type: "scatter", mode: "markers", x: found.map((x) => x.a),
        y: found.map((x) => (names.length === 1 ? text(x.name) : single ? label(n) : `${label(n)} ${text(x.name)}`)),
        error_x: { type: "data", symmetric: false, array: found.map((x) => (x.high === null ? 0 : x.high - x.a)),
          arrayminus: found.map((x) => (x.low === null ? 0 : x.a - x.low)), color: color(n), thickness: 1.6 },
        marker: { color: color(n), symbol: archs[n].symbol, size: 9 },
        hovertemplate: "%{y}<br>a = %{x:.3f}<extra></extra>" });
    }
    return [traces, layout({ xaxis: axis("a: the best size grows as C^a", { range: [-0.03, 1.03], dtick: 0.2 }), yaxis: axis("", { autorange: "reversed" }) })];
  };
  draw.chances = () => [shown().map((n) => ({ type: "scatter", mode: "lines", x: figures.budgets, y: archs[n].chance,
    line: { color: color(n), dash: archs[n].dash, width: 2.4 },
    hovertemplate: `<b>${label(n)}</b><br>%{y:.0%} at %{x:.1e} FLOPs<extra></extra>` })),
  layout({ xaxis: axis("training FLOPs", { ...logx, range: spanx() }), yaxis: axis("chance to have the least loss", { tickformat: ".0%", range: [-0.03, 1.03] }),
    ...unmeasured(figures.common, "not run by all") })];
  const jumps = (points, line, title, look) => [shown().filter((n) => archs[n].jump).flatMap((n) => {
    const j = archs[n].jump;
    return [{ type: "scatter", mode: "markers", x: j.scale, y: j[points],
      marker: { color: color(n), symbol: archs[n].symbol, size: 7 },
      hovertemplate: `<b>${label(n)}</b><br>%{y:.3g}<br>%{x:.2e} FLOPs<extra></extra>` },
    { type: "scatter", mode: "lines", x: j.scale, y: j[line], line: { color: color(n), dash: archs[n].dash, width: 1.6 }, hoverinfo: "skip" }];
  }), layout({ xaxis: axis("equivalent training FLOPs", logx), yaxis: axis(title, look) })];
  draw.exact = () => jumps("exact", "expected", "exact match", { tickformat: ".0%", rangemode: "tozero" });
  draw.twin = () => jumps("nats", "smooth", "nats a token", { type: "log", nticks: 6, tickformat: "~g" });

  // The planner.
  const slider = { flops: by("flops"), share: by("share"), serve: by("serve") };
  const low = Math.log10(figures.smallest);
  const high = Math.log10(figures.largest);
  slider.flops.min = low;
  slider.flops.max = high + 3;
  slider.flops.value = Math.floor(100 * Math.log10(figures.common)) / 100;
  function outside(a, n, d, flops) {
    const { params, tokens, ratio } = a.ranges;
    const grown = Math.max(1, flops / a.largest);
    return Math.max(1, params[0] / n, n / (params[1] * grown), tokens[0] / d, d / (tokens[1] * grown),
      (ratio[0] * n) / d, d / n / ratio[1]);
  }
  const written = (v, show) => (Number.isFinite(v) ? show(v) : "never reached");
  function plan() {
    const choice = by("arch");
    const a = archs[choice ? choice.value : names[0]];
    const flops = 10 ** Number(slider.flops.value);
    const share = 10 ** Number(slider.share.value);
    const found = best(a, flops);
    const base = found.law;
    const said = notes(a, flops, found);
    const same = Math.abs(share - 1) < 1e-9;
    let rows = bestRows(found);
    const serve = Number(slider.serve.value) <= -4 ? 0 : (found.determined ? base : found.nearest).d * 10 ** Number(slider.serve.value);
    let got = base;
    if (found.determined && !same) {
      const n = share * base.n;
      const d = tokensFor(a.law, n, base.loss);
      const drawn = interval(a.draws.map((l) => tokensFor(l, n, loss(l, base.n, base.d))));
      const span = (scale, show) => (drawn ? drawn.map((v) => (Number.isFinite(v) ? show(v * scale) : "never")).join(" to ") : "");
      got = { n, d, loss: base.loss };
      rows = [["parameters", short(n), ""], ["tokens for the same loss", written(d, short), span(1, short)],
        ["tokens per parameter", written(d / n, short), span(1 / n, short)], ["loss", base.loss.toFixed(3), ""]];
      const far = outside(a, n, d, flops);
      if (Number.isFinite(far) && far > 1.05) said.push(`this model lies ${times(far)} times outside what was run`);
    }
    const total = (x) => a.per_token * x.n * x.d + 2 * x.n * serve;
    const against = (value) => (found.determined ? written(value, (v) => `${digits(v, 3)}x`) : UNKNOWN);
    rows.push(["training cost against the best size", against((got.n * got.d) / (base.n * base.d)), ""]);
    if (serve) rows.push(["training and serving against the best size", against(total(got) / total(base)), ""]);
    by("flops-text").value = digits(flops, 3);
    by("share-text").value = `${share.toFixed(2)}x`;
    by("serve-text").value = serve ? short(serve) : "none";
    by("far").replaceChildren(...(said.length ? said : ["Within what was measured."]).map((sentence) => {
      const p = document.createElement("p");
      p.className = said.length ? "notice" : "note";
      p.textContent = `${sentence[0].toUpperCase()}${sentence.slice(1)}${sentence.endsWith(".") ? "" : "."}`;
      return p;
    }));
    by("planned").tBodies[0].replaceChildren(...rows.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((cell, i) => {
        const td = document.createElement(i ? "td" : "th");
        td.textContent = cell || "–";
        if (i) td.className = "n"; else td.scope = "row";
        row.append(td);
      });
      return row;
    }));
  }
  Object.values(slider).forEach((s) => s.addEventListener("input", plan));
  if (by("arch")) by("arch").addEventListener("change", plan);

  // On paper nothing opens.
  const folded = document.querySelectorAll("details.each");
  window.addEventListener("beforeprint", () => folded.forEach((d) => { d.open = true; }));
  window.addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));

  plan();
  page.start(draw);
})();
