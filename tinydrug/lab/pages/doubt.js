const $ = id => document.getElementById(id);
const digits = value => value.toFixed(3);
DATA.kinds.forEach(kind => $("kind").add(new Option(kind + " uncertainty", kind)));
$("prompt").textContent = "Prompt: " + DATA.prompt;
$("record").textContent = JSON.stringify(DATA.record, null, 1);
$("entropy").textContent = DATA.answers.reduce((n, [, count]) => n + count, 0) +
  " passes, entropy of their answers " + digits(DATA.entropy) + " nats";
function row(table, cells, tag) {
  const line = table.insertRow();
  for (const cell of cells) line.appendChild(document.createElement(tag)).textContent = cell;
}
row($("answers"), ["passes", "answer"], "th");
DATA.answers.forEach(([text, count]) => row($("answers"), [count, text], "td"));
row($("table"), ["token", "likelihood", "total", "aleatoric", "epistemic"], "th");
DATA.tokens.forEach(t => row($("table"), [t.token, ...[t.likelihood, t.total, t.aleatoric, t.epistemic].map(digits)], "td"));
const spans = DATA.tokens.map(t => {
  const span = document.createElement("span");
  span.textContent = t.token.replaceAll("␣", " ").replaceAll("↵", "↵\n");
  span.tabIndex = 0;
  const say = () => $("now").textContent = t.token + "  likelihood " + digits(t.likelihood) + ", total " +
    digits(t.total) + " = aleatoric " + digits(t.aleatoric) + " + epistemic " + digits(t.epistemic) + " nats";
  span.onmouseenter = span.onfocus = say;
  return $("text").appendChild(span);
});
function draw() {
  const kind = $("kind").value, full = Number($("full").value);
  $("nats").textContent = full.toFixed(2) + " nats";
  DATA.tokens.forEach((t, i) => {
    const share = Math.round(100 * Math.min(1, t[kind] / full));
    spans[i].style.background = `color-mix(in srgb, ${color("two")} ${share}%, transparent)`;
    spans[i].style.color = share > 50 ? "black" : ""; // what stands out from it on a light and on a dark page
  });
}
function scale() {
  const most = Math.max(...DATA.tokens.map(t => t[$("kind").value]));
  $("full").value = Math.max(0.1, Math.ceil(20 * most) / 20);
  draw();
}
$("kind").addEventListener("input", scale);
$("full").addEventListener("input", draw);
window.addEventListener("theme", draw);
scale();
