const $ = id => document.getElementById(id), D = DATA;
const at = () => [Number($("site").value), Number($("depth").value), Number($("dose").value)];
const windowName = w => D.windows[w][0] + "–" + D.windows[w][1];
const WIDTH = 28; // characters of a bar
D.sites.forEach((site, i) => $("site").add(new Option(site + " (" + D.what[i] + ")", i)));
$("depth").max = D.windows.length - 1;
$("dose").max = D.doses.length - 1;
$("about").textContent = D.about;
$("record").textContent = JSON.stringify(D.record, null, 1);
const text = color => ({color: color("ink"), family: "system-ui, sans-serif"});
const wide = () => innerWidth > 600; // else there is no room for a scale of colours
const eye = far => ({x: -1.45 * far, y: -1.6 * far, z: far}); // so far that the names of the axes are in view
const CONFIG = {responsive: true, displaylogo: false};
const quiet = () => ({modebar: {bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("one")}});
function axis(title, more) {
  return Object.assign({title: {text: title}, gridcolor: color("line"), zerolinecolor: color("line"),
    color: color("ink")}, more);
}
function drawSurface() {
  const [s, w, d] = at(), z = D.divergence[s][w], [first, last] = D.windows[w];
  const all = ($("same").checked ? D.divergence[s].flat(2) : z.flat()).filter(v => v !== null);
  const logs = $("log").checked, top = Math.max(1e-9, ...all);
  const least = Math.min(top / 10, ...all.filter(v => v > 0)), ends = logs ? [least, top].map(Math.log10) : [0, top];
  const height = v => v === null ? null : logs ? Math.log10(Math.max(v, least)) : v;
  const title = logs ? "1 − cos, power of ten" : "1 − cos", layers = z[0].map((_, i) => i);
  const surface = {type: "surface", x: layers, y: D.doses, z: z.map(row => row.map(height)), text: z,
    colorscale: "Cividis", cmin: ends[0], cmax: ends[1], showscale: wide(), colorbar: {title: {text: title}, thickness: 14},
    hovertemplate: "layer %{x}<br>θ %{y} rad<br>1 − cos %{text:.4g}<extra></extra>"};
  const line = {type: "scatter3d", mode: "lines", x: layers, y: layers.map(() => D.doses[d]), z: z[d].map(height),
    line: {color: color("two"), width: 6}, hoverinfo: "skip", showlegend: false};
  const band = {type: "scatter3d", mode: "lines", x: [first - .5, last + .5], y: [0, 0], z: [ends[0], ends[0]],
    line: {color: color("two"), width: 16}, hoverinfo: "skip", showlegend: false};
  Plotly.react("surface", [surface, band, line], {paper_bgcolor: "rgba(0,0,0,0)", font: text(color), ...quiet(),
    margin: {l: 10, r: 0, t: 30, b: 0}, uirevision: "stay", scene: {uirevision: "stay",
      camera: {eye: eye(wide() ? 1.15 : 1.45), center: {x: -.1, y: 0, z: -.1}}, aspectratio: {x: 1.4, y: 1, z: .8},
      xaxis: axis("layer"), yaxis: axis("dose θ, radians"),
      zaxis: axis(title, {range: [ends[0] - (ends[1] - ends[0]) / 20, ends[1]]})}}, CONFIG);
}
function drawEnds() {
  const [s, w, d] = at(), logs = $("log").checked;
  const z = D.doses.map((_, j) => D.windows.map((_, i) => D.divergence[s][i][j].at(-1)));
  const least = Math.min(1, ...z.flat().filter(v => v > 0));
  const height = v => v === null ? null : logs ? Math.log10(Math.max(v, least)) : v;
  Plotly.react("ends", [{type: "heatmap", x: D.windows.map((_, i) => windowName(i)), y: D.doses.map(String),
      z: z.map(row => row.map(height)), text: z, colorscale: "Cividis",
      showscale: wide(), colorbar: {title: {text: logs ? "power of ten" : "1 − cos"}, thickness: 14},
      hovertemplate: "layers %{x}<br>θ %{y} rad<br>1 − cos %{text:.4g}<extra></extra>"}],
    {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: text(color), ...quiet(),
     margin: {l: 60, r: 10, t: 30, b: 60}, xaxis: axis("injection window, layers", {type: "category"}),
     yaxis: axis("dose θ, radians", {type: "category"}),
     shapes: [{type: "rect", x0: w - .5, x1: w + .5, y0: d - .5, y1: d + .5,
               line: {color: color("two"), width: 3}}]}, CONFIG);
}
function drawTokens() {
  const [s, w, d] = at(), p = D.drugged[s][w][d], table = $("tokens");
  const full = Math.max(...D.sober, ...p.filter(v => v !== null), 1e-9);
  table.replaceChildren();
  const head = table.createTHead().insertRow();
  for (const name of ["token", "", "sober", "drugged"])
    head.appendChild(document.createElement("th")).textContent = name;
  D.tokens.forEach((token, i) => {
    const row = table.insertRow(), a = Math.round(D.sober[i] / full * WIDTH), b = Math.round(p[i] / full * WIDTH);
    row.insertCell().textContent = token;
    const bar = row.insertCell();
    for (const [kind, sign, n] of [["common", "|", Math.min(a, b)], ["shortfall", "-", a - b], ["excess", "+", b - a]])
      if (n > 0) {
        const part = document.createElement("span");
        part.className = kind;
        part.textContent = sign.repeat(n);
        bar.append(part);
      }
    for (const likelihood of [D.sober[i], p[i]])
      row.insertCell().textContent = likelihood === null ? "?" : likelihood.toFixed(3);
  });
  const kl = D.kl[s][w][d], flips = D.flips[s][w][d];
  $("effect").textContent = kl === null ? "not measured" :
    "KL(sober‖drugged) of the next token " + kl.toPrecision(3) + " nats; another likeliest token in " +
    Math.round(100 * flips) + " % of the seeds";
}
function draw() {
  const [s, w, d] = at();
  $("window").textContent = "layers " + windowName(w);
  $("theta").textContent = D.doses[d] + " rad";
  history.replaceState(null, "", "#" + [D.sites[s], w, d].join(","));
  drawSurface(); drawEnds(); drawTokens();
}
function go() {
  const [site, w, d] = location.hash.slice(1).split(","); // letters and digits alone
  $("site").value = Math.max(0, D.sites.indexOf(site));
  $("depth").value = Number(w) || 0;
  $("dose").value = d === undefined ? D.show : Number(d) || 0;
  draw();
}
for (const id of ["site", "depth", "dose", "same", "log"]) $(id).addEventListener("input", draw);
window.addEventListener("theme", draw);
window.addEventListener("hashchange", go);
go();
$("ends").on("plotly_click", event => {
  const [w, d] = event.points[0].pointIndex.slice().reverse();
  $("depth").value = w; $("dose").value = d; draw();
});
