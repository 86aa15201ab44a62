// What the pages share: the look of their charts, the legend, the theme and printing. A page's own
// script hands its charts to `page.start`; each is drawn anew from the figures embedded in the page
// whenever the reader changes something.
const page = (function () {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const archs = figures.archs;
  const names = figures.order;
  const hidden = new Set();
  const each = (selector, act) => document.querySelectorAll(selector).forEach(act);
  const shown = () => names.filter((n) => !hidden.has(n));
  // Plotly reads a little HTML in labels; names are text.
  const text = (s) => String(s).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const dark = () => root.dataset.theme === "dark";
  const color = (n) => (dark() ? archs[n].dark : archs[n].light);
  const has = (v) => v !== null && v !== undefined;
  const fade = (hex, alpha) => {
    const v = parseInt(hex.slice(1), 16);
    return `rgba(${v >> 16},${(v >> 8) & 255},${v & 255},${alpha})`;
  };

  function axis(title, more) {
    return Object.assign({
      title: { text: title, standoff: 8, font: { size: 12.5 } }, gridcolor: css("--line"),
      linecolor: css("--line"), zeroline: false, ticks: "outside", tickcolor: css("--line"),
      ticklen: 4, automargin: true,
    }, more);
  }
  function layout(more) {
    return Object.assign({
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--sans"), size: 12, color: css("--soft") },
      margin: { l: 52, r: 14, t: 10, b: 44 }, showlegend: false, hovermode: "closest",
      dragmode: touch() ? false : "zoom",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink") },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), align: "left",
        font: { family: css("--sans"), size: 12.5, color: css("--ink") } },
    }, more);
  }
  const touch = () => window.matchMedia("(pointer: coarse)").matches || window.innerWidth < 520;
  // The buttons are listed, and the address is empty, so that none of them uploads anything.
  const config = () => ({ displayModeBar: touch() ? false : "hover",
    displaylogo: false, responsive: true, plotlyServerURL: "",
    modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "svg" } });

  let draw = {};
  const switches = {};
  function redraw(chart) {
    const div = document.getElementById(`plot-${chart}`);
    if (!div) return;
    const [traces, shape] = draw[chart](div, switches[chart] || {});
    Plotly.react(div, traces, shape, config());
  }
  const redrawAll = () => Object.keys(draw).forEach(redraw);

  // The legend shows and hides in every chart and table at once.
  function toggle(members, off) {
    members.forEach((n) => (off ? hidden.add(n) : hidden.delete(n)));
    each(".chip", (b) => b.setAttribute("aria-pressed", String(!hidden.has(b.dataset.arch))));
    each("[data-family]", (b) => b.setAttribute("aria-pressed", String(family(b).some((n) => !hidden.has(n)))));
    each("tr[data-arch]", (row) => row.classList.toggle("off", hidden.has(row.dataset.arch)));
    redrawAll();
  }
  const family = (b) => names.filter((n) => archs[n].family === b.dataset.family);

  function theme(name) {
    root.dataset.theme = name;
    document.getElementById("theme").textContent = name === "dark" ? "light" : "dark";
    redrawAll();
  }

  // charts: by the key of their place, (div, switches) => [traces, layout].
  function start(charts) {
    draw = charts;
    each(".chip", (b) => b.addEventListener("click", () =>
      toggle([b.dataset.arch], !hidden.has(b.dataset.arch))));
    each("[data-family]", (b) => b.addEventListener("click", () =>
      toggle(family(b), family(b).some((n) => !hidden.has(n)))));
    // Switches above a chart: one of several, or on and off.
    each("[data-chart]", (button) => {
      const { chart, group, value } = button.dataset;
      const single = !group.startsWith("log");
      const on = (switches[chart] = switches[chart] || {});
      if (button.getAttribute("aria-pressed") === "true") on[group] = single ? value : true;
      button.addEventListener("click", () => {
        on[group] = single ? value : !on[group];
        each(`[data-chart="${chart}"][data-group="${group}"]`, (b) =>
          b.setAttribute("aria-pressed", String(single ? b.dataset.value === value : on[group])));
        redraw(chart);
      });
    });

    document.getElementById("theme").addEventListener("click", () => {
      const next = dark() ? "light" : "dark";
      try { localStorage.setItem("manyform-theme", next); } catch (error) { /* kept for this page only */ }
      theme(next);
    });
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (e) => theme(e.matches ? "dark" : "light"));
    document.getElementById("print").addEventListener("click", () => window.print());
    let before = null;
    window.addEventListener("beforeprint", () => {
      before = root.dataset.theme;
      each(".plot", (div) => {  // paper is narrower than most screens, and the charts keep their size
        div.style.width = "660px";
        if (!div.closest(".own")) div.style.height = "320px";
      });
      theme("light");
    });
    window.addEventListener("afterprint", () => {
      each(".plot", (div) => { div.style.width = div.style.height = ""; });
      theme(before || "light");
    });

    theme(root.dataset.theme);
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth !== width) { width = window.innerWidth; redrawAll(); }
    });
  }

  return { figures, archs, names, shown, each, text, css, dark, color, has, fade, axis, layout, start };
})();
