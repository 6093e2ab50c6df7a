for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("thead tr:last-child th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => a === "" ? 1 : b === "" ? -1 : sign * (a - b || a.localeCompare(b));
      for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b))));
    });
  });
