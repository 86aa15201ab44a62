// Draws the charts of a scaling law from the figures embedded in the page, and plans with it.
(function () {
  "use strict";
  const { figures, archs, names, shown, text, css, color, fade, axis, layout } = page;
  const by = (id) => document.getElementById(id);
  const label = (n) => text(n || "runs");
  const short = (x) => {
    if (!Number.isFinite(x)) return "none";
    for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
      if (x >= size && x < 1000 * size) return `${+(x / size).toPrecision(3)}${unit}`;
    }
    return x >= 1e15 || x < 1e-2 ? x.toExponential(2) : String(+x.toPrecision(3));
  };

  // A law is [E, A, B, alpha, beta]; k is the FLOPs of a parameter and token.
  const loss = (l, n, d) => l[0] + l[1] * n ** -l[3] + l[2] * d ** -l[4];
  function best(l, flops, k) {
    const g = ((l[3] * l[1]) / (l[4] * l[2])) ** (1 / (l[3] + l[4]));
    const n = g * (flops / k) ** (l[4] / (l[3] + l[4]));
    return { n, d: flops / k / n, loss: loss(l, n, flops / k / n) };
  }
  const tokensFor = (l, n, target) => {
    const room = target - l[0] - l[1] * n ** -l[3];
    return room > 0 ? (l[2] / room) ** (1 / l[4]) : Infinity;
  };
  function interval(values) {
    const kept = values.filter(Number.isFinite).sort((a, b) => a - b);
    if (kept.length < 20) return null;
    const at = (q) => {
      const i = q * (kept.length - 1);
      const low = Math.floor(i);
      return kept[low] + (i - low) * ((kept[low + 1] ?? kept[low]) - kept[low]);
    };
    const tail = (1 - figures.level) / 2;
    return [at(tail), at(1 - tail)];
  }

  const logx = { type: "log", exponentformat: "power", dtick: 1 };
  const draw = {};
  draw.frontier = () => {
    const traces = [];
    for (const n of shown()) {
      const a = archs[n];
      const f = a.frontier;
      if (f.low) {
        traces.push({ type: "scatter", mode: "lines", x: [...f.flops, ...[...f.flops].reverse()],
          y: [...f.high, ...[...f.low].reverse()], fill: "toself", fillcolor: fade(color(n), 0.16),
          line: { width: 0 }, hoverinfo: "skip" });
      }
      traces.push({ type: "scatter", mode: "markers", x: a.flops, y: a.loss,
        text: a.params.map((p, i) => `${short(p)} parameters, ${short(a.tokens[i])} tokens`),
        marker: { color: fade(color(n), 0.75), symbol: a.symbol, size: 6 },
        hovertemplate: `<b>${label(n)}</b><br>%{text}<br>loss %{y:.3f}<br>%{x:.2e} FLOPs<extra></extra>` });
      traces.push({ type: "scatter", mode: "lines", x: f.flops, y: f.loss,
        line: { color: color(n), dash: a.dash, width: 2.4 },
        hovertemplate: `<b>${label(n)}</b>, best size<br>loss %{y:.3f}<br>%{x:.2e} FLOPs<extra></extra>` });
    }
    return [traces, layout({ xaxis: axis("training FLOPs", logx),
      yaxis: axis(figures.metric, { type: "log", nticks: 8, tickformat: "~g" }) })];
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
  draw.residuals = () => [shown().map((n) => ({ type: "scatter", mode: "markers", x: archs[n].flops,
    y: archs[n].residuals.map((r) => 100 * r),
    text: archs[n].params.map((p, i) => `${short(p)} parameters, ${short(archs[n].tokens[i])} tokens`),
    marker: { color: archs[n].params.map(Math.log10), colorscale: "Viridis", symbol: archs[n].symbol, size: 6.5,
      line: { color: color(n), width: 1 } },
    hovertemplate: `<b>${label(n)}</b><br>%{text}<br>%{y:+.2f}%<extra></extra>` })),
  layout({ xaxis: axis("training FLOPs", logx), yaxis: axis("measured above the law, %", { zeroline: true, zerolinecolor: css("--soft") }) })];
  draw.exponents = () => {
    const traces = [];
    for (const n of shown()) {
      const found = archs[n].approaches.filter((x) => x.a !== null);
      traces.push({ type: "scatter", mode: "markers", x: found.map((x) => x.a),
        y: found.map((x) => (names.length > 1 ? `${label(n)} ${text(x.name)}` : text(x.name))),
        error_x: { type: "data", symmetric: false, array: found.map((x) => (x.high === null ? 0 : x.high - x.a)),
          arrayminus: found.map((x) => (x.low === null ? 0 : x.a - x.low)), color: color(n), thickness: 1.6 },
        marker: { color: color(n), symbol: archs[n].symbol, size: 9 },
        hovertemplate: "%{y}<br>a = %{x:.3f}<extra></extra>" });
    }
    return [traces, layout({ xaxis: axis("a: best size grows as C^a"), yaxis: axis("", { autorange: "reversed" }) })];
  };
  draw.chances = () => [shown().map((n) => ({ type: "scatter", mode: "lines", x: figures.budgets, y: archs[n].chance,
    line: { color: color(n), dash: archs[n].dash, width: 2.4 },
    hovertemplate: `<b>${label(n)}</b><br>%{y:.0%} at %{x:.1e} FLOPs<extra></extra>` })),
  layout({ xaxis: axis("training FLOPs", logx), yaxis: axis("chance to have the least loss", { tickformat: ".0%", range: [-0.03, 1.03] }),
    shapes: [{ type: "line", x0: figures.largest, x1: figures.largest, y0: 0, y1: 1, yref: "paper",
      line: { color: css("--soft"), width: 1, dash: "dot" } }] })];
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
  slider.flops.max = high + 4;
  slider.flops.value = high - 0.01;
  function plan() {
    const choice = by("arch");
    const a = archs[choice ? choice.value : names[0]];
    const flops = 10 ** Number(slider.flops.value);
    const share = 10 ** Number(slider.share.value);
    const one = (l) => {
      const o = best(l, flops, a.per_token);
      const n = share * o.n;
      const d = Math.abs(share - 1) < 1e-9 ? o.d : tokensFor(l, n, o.loss);
      return { n, d, ratio: d / n, loss: o.loss, cost: (n * d) / (o.n * o.d), best: o };
    };
    const got = one(a.law);
    const drawn = a.draws.map(one);
    const serve = Number(slider.serve.value) <= -4 ? 0 : got.best.d * 10 ** Number(slider.serve.value);
    const total = (x) => a.per_token * x.n * x.d + 2 * x.n * serve;
    const plain = a.per_token * got.best.n * got.best.d + 2 * got.best.n * serve;
    by("flops-text").value = flops.toExponential(2);
    by("share-text").value = share.toFixed(2);
    by("serve-text").value = serve ? short(serve) : "none";
    const far = flops / a.largest;
    by("far").textContent = far > 10 ? `${short(far)} times the largest measured budget of this law: an extrapolation, good only as far as the law holds there.`
      : far > 1 ? "Beyond what was measured, within a factor of ten." : "Within what was measured.";
    by("far").className = far > 10 ? "notice" : "note";
    const rows = [["parameters", got.n, drawn.map((x) => x.n)], ["training tokens", got.d, drawn.map((x) => x.d)],
      ["tokens per parameter", got.ratio, drawn.map((x) => x.ratio)], ["loss", got.loss, drawn.map((x) => x.loss)],
      ["training cost against the best size", got.cost, drawn.map((x) => x.cost)],
      ["training and serving against the best size", total(got) / plain, null]];
    const body = by("planned").tBodies[0];
    body.replaceChildren(...rows.map(([name, value, values]) => {
      const row = document.createElement("tr");
      const found = values && interval(values);
      const show = (v) => (name === "loss" ? v.toFixed(3) : short(v));
      [name, Number.isFinite(value) ? show(value) : "never reached", found ? `${show(found[0])} to ${show(found[1])}` : "–"]
        .forEach((cell, i) => {
          const td = document.createElement(i ? "td" : "th");
          td.textContent = cell;
          if (i) td.className = "n";
          row.append(td);
        });
      return row;
    }));
  }
  Object.values(slider).forEach((s) => s.addEventListener("input", plan));
  if (by("arch")) by("arch").addEventListener("change", plan);

  plan();
  page.start(draw);
})();
