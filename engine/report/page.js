"use strict";
for (const tool of document.querySelectorAll(".tool")) tool.hidden = false;

const filter = document.getElementById("filter");
const more = document.querySelector("details.more");
filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  if (more && wanted) more.open = true;
  for (const row of document.querySelectorAll("details.class")) {
    row.hidden = !row.dataset.name.toLowerCase().includes(wanted);
  }
});

const map = document.querySelector(".map");
const highlight = (index) => {
  if (!map) return;
  map.classList.toggle("one", index !== "");
  for (const part of map.querySelectorAll("[data-class]")) part.classList.toggle("lit", part.dataset.class === index);
};
const one = document.getElementById("one");
if (one) one.addEventListener("change", () => highlight(one.value));
for (const item of document.querySelectorAll(".map li[data-class]")) {
  item.addEventListener("pointerenter", () => highlight(item.dataset.class));
  item.addEventListener("pointerleave", () => highlight(""));
}
