// Draws the charts of a comparison from the figures embedded in the page.
(function () {
  "use strict";
  const { figures, archs, names, shown, each, text, css, dark, color, has, fade, axis, layout } = page;
  const narrow = (div) => div.clientWidth < 520;

  function bytes(n) {
    for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
      if (n >= unit) return `${+(n / unit).toPrecision(3)} ${name}`;
    }
    return `${n} B`;
  }
  const tokens = (n) => (n >= 1024 && n % 1024 === 0 ? `${n / 1024}k` : String(n));

  // Labels at 1, 2 and 5 on a logarithmic axis of more than a decade, at round steps on a shorter.
  function log(on, values, format, few) {
    if (!on) return { type: "linear" };
    const decades = Math.log10(Math.max(...values) / Math.min(...values)) || 0;
    return { type: "log", tickformat: format, ...(decades > 0.8 ? { dtick: "D2" } : { nticks: few ? 4 : 8 }) };
  }

  function line(n, more) {
    return Object.assign({ type: "scatter", mode: "lines+markers", name: text(n), meta: n, cliponaxis: false,
      line: { color: color(n), dash: archs[n].dash, width: 2.2 },
      marker: { color: color(n), symbol: archs[n].symbol, size: 7.5 } }, more);
  }

  // What is equal on the horizontal axis of the loss curves is the reader's choice.
  const draw = {};
  draw.curves = (div, on) => {
    const x = on.x;
    const y = on.y;
    const label = { tokens: "training tokens", flops: "training FLOPs", seconds: "training seconds" }[x];
    const traces = [];
    for (const n of shown()) {
      const pick = (c) => {
        const at = c[y].map((v, i) => i).filter((i) => has(c[y][i]) && has(c[x][i]));
        return { x: at.map((i) => c[x][i]), y: at.map((i) => c[y][i]) };
      };
      if (!archs[n].runs.length) continue;
      if (archs[n].runs.length > 1) {
        for (const run of archs[n].runs) {
          traces.push(line(n, { ...pick(run), mode: "lines", hoverinfo: "skip",
            line: { color: fade(color(n), 0.3), width: 1 } }));
        }
      }
      traces.push(line(n, { ...pick(archs[n].mean), mode: y === "val" ? "lines+markers" : "lines",
        hovertemplate: `<b>${text(n)}</b><br>%{y:.3f} bits per byte<br>%{x:.3s} ${label.split(" ")[1]}<extra></extra>` }));
    }
    const xs = traces.flatMap((t) => t.x);
    const ys = traces.flatMap((t) => t.y);
    return [traces, layout({
      xaxis: axis(label, { exponentformat: x === "flops" ? "e" : "SI", ...log(on.logx, xs, x === "flops" ? ".0e" : "~s") }),
      yaxis: axis("bits per byte", log(on.logy, ys, "~g")) })];
  };

  // The lower right boundary: nothing shown is both lower and further right.
  function front(points) {
    const sorted = [...points].sort((a, b) => b.x - a.x || a.y - b.y);
    const kept = [];
    for (const p of sorted) if (!kept.length || p.y < kept[kept.length - 1].y) kept.push(p);
    return kept.reverse();
  }
  // A label goes beside its circle where it covers no other circle and no label placed before.
  function place(points, div, logarithmic, range, font) {
    if (!points.length) return [];
    const lows = points.map((p) => (has(p.low) ? p.low : p.y));
    const highs = points.map((p) => (has(p.high) ? p.high : p.y));
    const [width, height] = [div.clientWidth - 80, div.clientHeight - 54];
    const tall = Math.max(...highs) - Math.min(...lows) || 1;
    const spots = points.map((p) => ({ p, r: p.d / 2,
      x: width * ((logarithmic ? Math.log10(p.x) : p.x) - range[0]) / (range[1] - range[0]),
      y: height * (1 - (p.y - Math.min(...lows) + 0.05 * tall) / (1.1 * tall)) }));
    const taken = spots.map((s) => [s.x - s.r, s.x + s.r, s.y - s.r, s.y + s.r]);
    return spots.map((s) => {
      const [w, h] = [s.p.n.length * font * 0.58, font * 1.3];
      const choices = [[s.r + 5, 0, "left"], [-s.r - 5, 0, "right"], [s.r + 3, s.r + 8, "left"],
        [s.r + 3, -s.r - 8, "left"], [-s.r - 3, s.r + 8, "right"], [-s.r - 3, -s.r - 8, "right"]];
      const cost = ([dx, dy, anchor]) => {
        const from = s.x + dx - (anchor === "right" ? w : 0);
        const box = [from, from + w, s.y - dy - h / 2, s.y - dy + h / 2];
        const outside = box[0] < 0 || box[1] > width ? 1000 : 0;
        return [outside + taken.reduce((sum, t) => sum + Math.max(0, Math.min(box[1], t[1]) - Math.max(box[0], t[0]))
          * Math.max(0, Math.min(box[3], t[3]) - Math.max(box[2], t[2])), 0), box];
      };
      const costs = choices.map(cost);
      const best = costs.reduce((b, c, i) => (c[0] < costs[b][0] - 1 ? i : b), 0);
      taken.push(costs[best][1]);
      return { x: logarithmic ? Math.log10(s.p.x) : s.p.x, y: s.p.y, text: text(s.p.n), showarrow: false,
        xanchor: choices[best][2], xshift: choices[best][0], yshift: choices[best][1],
        font: { color: css("--ink"), size: font } };
    });
  }
  draw.pareto = (div, on) => {
    const last = (n) => [...archs[n].decode].filter((r) => has(r.ms_per_token))
      .sort((a, b) => b.context - a.context)[0];
    const reach = Math.max(0, ...names.flatMap((n) => archs[n].decode.map((r) => r.context)));
    const points = [];
    for (const n of shown()) {
      const a = archs[n];
      const far = last(n);
      if (!a.final) continue;
      const at = far && far.context === reach ? far : null;
      const x = on.x === "train" ? a.rate : at && 1000 / at.ms_per_token;
      const size = on.size === "peak" ? a.peak : at && at.state_bytes;
      if (has(x)) points.push({ n, x, y: a.final[0], size, low: a.final[1], high: a.final[2] });
    }
    const most = Math.max(1, ...points.map((p) => p.size || 0));
    const small = narrow(div);
    const traces = [{ type: "scatter", mode: "lines", x: front(points).map((p) => p.x),
      y: front(points).map((p) => p.y), hoverinfo: "skip",
      line: { color: css("--soft"), width: 1.2, dash: "dot", shape: "vh" } }];

    for (const p of points) {
      const d = p.d = 10 + (small ? 34 : 52) * Math.sqrt((p.size || 0) / most);
      traces.push({ type: "scatter", mode: "markers", name: text(p.n), meta: p.n, x: [p.x], y: [p.y],
        marker: { color: fade(color(p.n), 0.28), size: d, line: { color: color(p.n), width: 1.8 } },
        error_y: has(p.low) ? { type: "data", array: [p.high - p.y], arrayminus: [p.y - p.low],
          color: color(p.n), thickness: 1.3, width: 4 } : undefined,
        hovertemplate: `<b>${text(p.n)}</b><br>%{y:.3f} bits per byte<br>%{x:,.0f} tokens/s<br>`
          + `${has(p.size) ? bytes(p.size) : "memory not measured"}<extra></extra>` });
    }
    const label = on.x === "train" ? "training tokens per second"
      : `decoded tokens per second after ${tokens(reach)} of context`;
    // Room for circles and labels.
    const xs = points.map((p) => (on.logx ? Math.log10(p.x) : p.x));
    const span = Math.max(...xs) - Math.min(...xs) || 1;
    const range = xs.length ? [Math.min(...xs) - (small ? 0.2 : 0.1) * span, Math.max(...xs) + 0.2 * span] : undefined;
    const labels = place(points, div, on.logx, range, small ? 11 : 12.5);
    return [traces, layout({ annotations: labels,
      xaxis: axis(label, { exponentformat: "SI", ...log(on.logx, points.map((p) => p.x), "~s", small), range }),
      yaxis: axis("bits per byte", {}) })];
  };

  const contexts = () => [...new Set(names.flatMap((n) => archs[n].decode.map((r) => r.context)))].sort((a, b) => a - b);
  function byContext(div, on, key, title, trace, more) {
    const traces = shown().map((n) => {
      const rows = archs[n].decode.filter((r) => has(r[key]));
      return rows.length ? line(n, { x: rows.map((r) => r.context), y: rows.map((r) => r[key]), ...trace(n, rows) }) : null;
    }).filter(Boolean);
    return [traces, layout({
      xaxis: axis("context in tokens", { ...log(on.logx, contexts()), tickvals: contexts(), ticktext: contexts().map(tokens) }),
      yaxis: axis(title, { ...log(on.logy, traces.flatMap((t) => t.y), "~g"), ...more }) })];
  }
  draw.latency = (div, on) => byContext(div, on, "ms_per_token", "ms per token", (n, rows) => ({
    error_y: { type: "data", array: rows.map((r) => (has(r.ms_high) ? r.ms_high - r.ms_per_token : 0)),
      arrayminus: rows.map((r) => (has(r.ms_low) ? r.ms_per_token - r.ms_low : 0)), color: fade(color(n), 0.6), thickness: 1.2, width: 3 },
    hovertemplate: `<b>${text(n)}</b><br>%{y:.3g} ms per token<br>after %{x:,} tokens<extra></extra>`,
  }), on.logy ? {} : { rangemode: "tozero" });
  draw.state = (div, on) => {
    const all = shown().flatMap((n) => archs[n].decode.map((r) => r.state_bytes)).filter((v) => v > 0);
    const ticks = [];
    for (let v = 2 ** 8; v <= 2 ** 44; v *= 4) if (v >= Math.min(...all) / 4 && v <= Math.max(...all) * 4) ticks.push(v);
    return byContext(div, on, "state_bytes", "state", (n, rows) => ({ text: rows.map((r) => bytes(r.state_bytes)),
      hovertemplate: `<b>${text(n)}</b><br>%{text}<br>after %{x:,} tokens<extra></extra>` }),
    on.logy ? { tickvals: ticks, ticktext: ticks.map(bytes) } : { exponentformat: "SI", rangemode: "tozero" });
  };

  draw.length = (div, on) => {
    const factors = [...new Set(names.flatMap((n) => archs[n].length.map((r) => r.factor)))];
    const traces = shown().map((n) => {
      const rows = archs[n].length.filter((r) => has(r.bpb));
      return rows.length ? line(n, { x: rows.map((r) => r.factor), y: rows.map((r) => r.bpb),
        hovertemplate: `<b>${text(n)}</b><br>%{y:.3f} bits per byte<br>at %{x}x the training length<extra></extra>` }) : null;
    }).filter(Boolean);
    return [traces, layout({
      xaxis: axis("context, in training lengths", { ...log(on.logx, factors), tickvals: factors, ticktext: factors.map((f) => `${f}x`) }),
      yaxis: axis("bits per byte", log(on.logy, traces.flatMap((t) => t.y), "~g")) })];
  };

  draw.tuning = (div, on) => {
    const traces = [];
    for (const n of shown()) {
      const rows = archs[n].tuning.filter((t) => has(t.bpb));
      if (!rows.length) continue;
      traces.push(line(n, { x: rows.map((t) => t.lr), y: rows.map((t) => t.bpb),
        customdata: rows.map((t) => (has(t.seconds) ? t.seconds.toFixed(1) : "?")),
        hovertemplate: `<b>${text(n)}</b><br>%{y:.3f} bits per byte<br>learning rate %{x:.2g}<br>cost %{customdata} s<extra></extra>` }));
      const best = rows.filter((t) => t.lr === archs[n].lr);
      traces.push({ type: "scatter", mode: "markers", x: best.map((t) => t.lr), y: best.map((t) => t.bpb), hoverinfo: "skip",
        meta: n, marker: { symbol: "circle-open", size: 16, color: color(n), line: { width: 2 } } });
    }
    const rates = [...new Set(names.flatMap((n) => archs[n].tuning.map((t) => t.lr)))].sort((a, b) => a - b);
    const apart = rates.filter((r, i) => i === 0 || r / rates[i - 1] > 1.25);
    return [traces, layout({ xaxis: axis("learning rate", { ...log(on.logx, rates), tickvals: apart, ticktext: apart.map((r) => String(+r.toPrecision(2))) }),
      yaxis: axis("bits per byte", log(on.logy, traces.flatMap((t) => t.y), "~g")) })];
  };

  // A panel for each probe: side by side, or on a narrow screen one below the other.
  function panels(div, kinds) {
    const stacked = narrow(div);
    const gap = stacked ? 0.22 : 0.06;
    const part = (1 - gap * (kinds.length - 1)) / Math.max(1, kinds.length);
    return kinds.map((k, i) => {
      const id = i ? i + 1 : "";
      const from = i * (part + gap);
      const to = Math.min(1, from + part);
      return { k, id, stacked, labels: stacked || i === 0,
        x: { anchor: `y${id}`, domain: stacked ? [0, 1] : [from, to] },
        y: { anchor: `x${id}`, domain: stacked ? [Math.max(0, 1 - to), 1 - from] : [0, 1] },
        line: (at) => ({ type: "line", xref: `x${id}`, yref: `y${id} domain`, x0: at, x1: at, y0: 0, y1: 1,
          line: { color: css("--soft"), width: 1.4, dash: "dash" } }),
        heading: (chance) => ({ xref: `x${id} domain`, yref: `y${id} domain`, x: stacked ? 1 : 0, y: 1, xanchor: stacked ? "right" : "left",
          yanchor: "bottom", showarrow: false, text: `<b>${text(figures.probes[k])}</b>, chance ${chance}`, font: { color: css("--ink"), size: 12.5 } }) };
    });
  }
  draw.probes = (div) => {
    const kinds = Object.keys(figures.probes);
    const listed = shown().filter((n) => kinds.some((k) => archs[n].probes[k])).reverse();
    const traces = [];
    const shapes = [];
    const notes = [];
    const more = { margin: { l: 10, r: 14, t: 26, b: 36 } };
    for (const p of panels(div, kinds)) {
      const { k, id } = p;
      more[`xaxis${id}`] = axis("", { range: [-0.03, 1.03], tickformat: ".0%", ...p.x });
      more[`yaxis${id}`] = axis("", { ...p.y, type: "category", categoryorder: "array",
        categoryarray: listed.map(text), range: [-0.6, listed.length - 0.4], showticklabels: p.labels,
        tickfont: { color: css("--ink"), size: 12 }, ticks: "" });
      for (const n of listed) {
        const r = archs[n].probes[k];
        if (!r) continue;
        traces.push({ type: "scatter", mode: "markers", x: [r.accuracy], y: [text(n)], xaxis: `x${id}`, yaxis: `y${id}`, meta: n,
          marker: { color: color(n), symbol: archs[n].symbol, size: 10 }, cliponaxis: false,
          error_x: { type: "data", array: [r.high - r.accuracy], arrayminus: [r.accuracy - r.low], color: color(n), thickness: 2, width: 5 },
          hovertemplate: `<b>${text(n)}</b><br>%{x:.1%} right, ${(100 * r.low).toFixed(1)}% to ${(100 * r.high).toFixed(1)}%`
            + `${has(r.at_train_length) ? `<br>${(100 * r.at_train_length).toFixed(1)}% at the training length` : ""}<extra></extra>` });
      }
      const any = names.map((n) => archs[n].probes[k]).find(Boolean);
      shapes.push(p.line(any.chance));
      notes.push(p.heading(`${(100 * any.chance).toFixed(0)}%`));
    }
    const height = (26 * listed.length + 46) * (narrow(div) ? kinds.length : 1) + 44;
    return [traces, layout({ ...more, shapes, annotations: notes, height })];
  };
  draw.twins = (div) => {
    const least = 1e-6;  // bits, for a logarithmic axis
    const told = (n, k) => archs[n].probes[k] && has(archs[n].probes[k].exact_bits);
    const kinds = Object.keys(figures.probes).filter((k) => names.some((n) => told(n, k)));
    const traces = [];
    const shapes = [];
    const notes = [];
    const more = {};
    for (const p of panels(div, kinds)) {
      const { k, id } = p;
      const on = { xaxis: `x${id}`, yaxis: `y${id}` };
      const all = names.filter((n) => told(n, k)).map((n) => archs[n].probes[k]);
      const { chance, answers } = all[0];
      const bits = all.flatMap((r) => [r.bits, r.exact_bits]).map((b) => Math.max(b, least));
      const ends = [Math.log10(Math.min(...bits)) - 0.2, Math.log10(Math.max(...bits, -Math.log2(chance))) + 0.2];
      const grid = Array.from({ length: 81 }, (_, i) => 10 ** (ends[0] + (i / 80) * (ends[1] - ends[0])));
      for (const [power, dash] of [[1, "solid"], [answers, "dot"]]) {
        traces.push({ type: "scatter", mode: "lines", x: grid, y: grid.map((b) => 2 ** (-power * b)), ...on,
          line: { color: css("--soft"), width: 1.3, dash }, hoverinfo: "skip" });
      }
      for (const n of shown().filter((m) => told(m, k))) {
        const r = archs[n].probes[k];
        for (const [y, b, low, high, open, what] of [[r.accuracy, r.bits, r.low, r.high, "-open", "of last answers"],
          [r.exact, r.exact_bits, r.exact_low, r.exact_high, "", `of sequences with all ${answers} answers`]]) {
          traces.push({ type: "scatter", mode: "markers", x: [Math.max(b, least)], y: [y], meta: n, cliponaxis: false, ...on,
            marker: { color: color(n), symbol: archs[n].symbol + open, size: 9, line: { color: color(n), width: open ? 2 : 0 } },
            error_y: { type: "data", array: [high - y], arrayminus: [y - low], color: fade(color(n), 0.6), thickness: 1.2, width: 3 },
            hovertemplate: `<b>${text(n)}</b><br>%{y:.1%} ${what} right<br>${b.toPrecision(3)} bits an answer<extra></extra>` });
        }
      }
      more[`xaxis${id}`] = axis("bits an answer", { type: "log", range: ends, tickformat: "~g",
        dtick: ends[1] - ends[0] > 2.5 ? 1 : "D2", ...p.x });
      more[`yaxis${id}`] = axis(p.labels ? "right" : "", { range: [-0.04, 1.04], tickformat: ".0%", showticklabels: p.labels, ...p.y });
      shapes.push(p.line(-Math.log2(chance)));
      notes.push(p.heading(`${+(-Math.log2(chance)).toPrecision(3)} ${chance === 0.5 ? "bit" : "bits"}; L = ${answers}`));
    }
    return [traces, layout({ ...more, shapes, annotations: notes, margin: { l: 52, r: 14, t: 26, b: 44 },
      height: (narrow(div) ? 290 * kinds.length : 320) + 30 })];
  };

  draw.budget = (div) => {
    const listed = shown().filter((n) => Object.keys(archs[n].seconds).length).reverse();
    const tint = dark() ? ["#3b4654", "#e0b14a", "#5b8fc4", "#7d6aa8", "#5aa58f", "#9aa5b1"]
      : ["#c3cad2", "#c98f1a", "#33689c", "#8673b3", "#4c9a82", "#8a94a0"];
    const traces = Object.entries(figures.kinds).map(([kind, label], i) => ({
      type: "bar", orientation: "h", name: label, y: listed.map(text), x: listed.map((n) => archs[n].seconds[kind] || 0),
      marker: { color: tint[i] }, hovertemplate: `%{y}<br>${label}: %{x:.1f} s<extra></extra>` }));
    return [traces, layout({ barmode: "stack", showlegend: true, height: 30 * listed.length + 120,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal", itemclick: false, itemdoubleclick: false },
      margin: { l: 10, r: 14, t: 10, b: 44 }, xaxis: axis("seconds", { exponentformat: "none" }),
      yaxis: axis("", { ticks: "", tickfont: { color: css("--ink") } }) })];
  };

  // Tables sort by the column whose heading is pressed; empty cells stay last.
  each("[data-sort]", (button) => button.addEventListener("click", () => {
    const heading = button.parentElement;
    const column = Number(button.dataset.sort);
    const body = button.closest("table").tBodies[0];
    const down = heading.getAttribute("aria-sort") === "ascending";
    button.closest("tr").querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => (column ? row.cells[column].dataset.v : row.cells[0].textContent);
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return x ? -1 : y ? 1 : 0;
      const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
      return (numbers ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
    };
    body.append(...[...body.rows].sort(compare));
  }));

  each(".copy", (b) => b.addEventListener("click", () => {
    const code = b.previousElementSibling;
    const done = () => { b.textContent = "copied"; setTimeout(() => { b.textContent = "copy"; }, 1500); };
    const select = () => {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, select);
    else select();
  }));

  page.start(draw);
})();
