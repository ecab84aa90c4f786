/* Before anything is drawn: the reader's own choice of light or dark, where there is one. */
document.documentElement.dataset.theme = localStorage.getItem("relay-theme") ?? "";
