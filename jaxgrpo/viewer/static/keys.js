// The keyboard: elements say by data-key which key follows them; rows and turns (data-item) are walked by j and k.

const typing = (element) => element?.closest?.("input:not([type=checkbox]), select, textarea, [contenteditable]");

function walk(way) {
  const items = [...document.querySelectorAll("[data-item]")].filter((item) => item.offsetParent !== null);
  if (!items.length) return;
  const now = items.findIndex((item) => item.contains(document.activeElement));
  const next = items[Math.min(items.length - 1, Math.max(0, now < 0 ? (way > 0 ? 0 : items.length - 1) : now + way))];
  const target = next.querySelector("a[href]") && next.matches("tr") ? next.querySelector("a[href]") : next;
  target.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

export function keys() {
  const help = document.getElementById("help");
  document.querySelector("[data-help]")?.addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (typing(event.target)) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (help?.open) return;
    if (event.key === "?") return help?.showModal();
    if (event.key === "/") {
      const field = document.querySelector("[data-focus='/']");
      if (!field) return;
      event.preventDefault();
      field.focus();
      return field.select();
    }
    if (event.key === "j" || event.key === "k") return walk(event.key === "j" ? 1 : -1);
    if (event.target.closest?.(".scroll, [data-tokens], .chart") && event.key.startsWith("Arrow")) return;
    const name = (event.shiftKey && event.key.startsWith("Arrow") ? "Shift+" : "") + event.key;
    const link = [...document.querySelectorAll("[data-key]")].find((each) => each.dataset.key === name);
    if (link) {
      event.preventDefault();
      link.click();
    }
  });
}
