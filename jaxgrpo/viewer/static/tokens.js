// The figures of the token under the pointer, or of the one that the arrow keys have reached.

export function tokens() {
  const box = document.querySelector("[data-tokens]");
  if (!box) return;
  const readout = document.querySelector("[data-readout]");
  const data = JSON.parse(document.querySelector("[data-figures]").textContent);
  box.tabIndex = 0;
  let at = -1;
  const show = (place) => {
    if (place < 0 || place >= data.tokens.length) return;
    box.querySelector(".on")?.classList.remove("on");
    at = place;
    box.querySelector(`[data-n="${at}"]`)?.classList.add("on");
    const [number, id, figures] = data.tokens[at];
    readout.replaceChildren();
    const add = (name, value) => {
      const span = document.createElement("span");
      const bold = document.createElement("b");
      bold.textContent = value;
      span.append(`${name} `, bold);
      readout.append(span);
    };
    add("token", number);
    add("id", id);
    for (const key of data.order) {
      if (!(key in figures)) continue;
      const value = figures[key];
      if (key === "mask") add("loss mask", value ? "sampled" : "not sampled");
      else add((data.names[key] ?? key).split(":")[0], Number.isInteger(value) ? value : Number(value.toPrecision(5)));
      if (key === "sampler_logprobs" || key === "train_logprobs") add("p", Math.exp(value).toPrecision(3));
    }
  };
  box.addEventListener("pointerover", (event) => {
    const token = event.target.closest("[data-n]");
    if (token) show(Number(token.dataset.n));
  });
  box.addEventListener("click", (event) => {
    const token = event.target.closest("[data-n]");
    if (token) show(Number(token.dataset.n));
  });
  box.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    show(Math.min(data.tokens.length - 1, Math.max(0, at + way)));
    box.querySelector(".on")?.scrollIntoView({ block: "nearest" });
  });
}
