// Before anything is drawn: which colours. Not a module, since those run later.
(() => {
  const kept = (() => {
    try {
      return localStorage.getItem("rswap-theme");
    } catch {
      return null; // A browser may forbid it: the system's choice, then.
    }
  })();
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
})();
