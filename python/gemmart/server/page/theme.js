// Before anything is painted: the colours that the reader has chosen.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("gemmart.theme")) ?? "";
} catch {
  // The browser keeps nothing for this page; its own colours stand.
}
