// Values on hover, and the way from a point to its episodes.

const shown = (value, unit) => {
  if (value === null) return "not finite";
  if (unit === "%") return `${(value * 100).toFixed(1)} %`;
  return value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : Number(value.toPrecision(5)).toLocaleString("en");
};

function steps(data) {
  return [...new Set(data.curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
}

function one(svg, tip) {
  const data = JSON.parse(svg.dataset.chart);
  const all = steps(data);
  const [left, right] = data.box;
  const [low, high] = data.x;
  const cursor = svg.querySelector(".cursor");
  const target = svg.dataset.target || svg.parentElement.closest("[data-target]")?.dataset.target;
  let at = null;
  const show = (step) => {
    at = step;
    const x = left + ((step - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.removeAttribute("visibility");
    const lines = data.curves.map((curve) => [curve, curve.points.find((point) => point[0] === step)]).filter(([, point]) => point);
    tip.textContent = [`step ${step}`, ...lines.map(([curve, point]) => `${shown(point[1], data.unit)}  ${curve.name}`)].join("\n") + (target ? "\nclick: its episodes" : "");
    tip.hidden = false;
    const box = svg.getBoundingClientRect();
    const place = box.left + (x / 480) * box.width;
    tip.style.left = `${Math.max(4, Math.min(place + 12, document.documentElement.clientWidth - tip.offsetWidth - 8)) + scrollX}px`;
    tip.style.top = `${box.top + scrollY + 6}px`;
  };
  const hide = () => {
    at = null;
    tip.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  };
  const open = () => {
    if (target && at !== null) location.href = target.replaceAll("STEP", at);
  };
  svg.addEventListener("pointermove", (event) => {
    if (!all.length) return;
    const box = svg.getBoundingClientRect();
    const step = low + ((((event.clientX - box.left) / box.width) * 480 - left) / (right - left)) * (high - low);
    show(all.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("click", open);
  svg.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter") open();
    if (!way || !all.length) return;
    event.preventDefault();
    show(all[Math.min(all.length - 1, Math.max(0, at === null ? 0 : all.indexOf(at) + way))]);
  });
}

export function charts() {
  let tip = document.querySelector(".tip");
  if (!tip) {
    tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    document.body.append(tip);
  }
  for (const svg of document.querySelectorAll(".chart")) one(svg, tip);
}
