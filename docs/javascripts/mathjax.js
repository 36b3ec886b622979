// Formulas: `$...$` and `$$...$$` in pages and docstrings. pymdownx.arithmatex marks
// them; MathJax, which mkdocs.yml loads after this file, draws nothing else.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
