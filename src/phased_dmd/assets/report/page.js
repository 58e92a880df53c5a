  const all = (query, root = document) => [...root.querySelectorAll(query)];
  document.documentElement.classList.add("js");
  function show() {
    for (const { name, value } of all("input[type=radio]:checked"))
      for (const element of all(`[data-${name}]`))
        element.hidden = value !== "all" && element.dataset[name] !== value;
    for (const { name, value, parentElement } of all("input[type=range]")) {
      for (const element of all(`[data-${name}]`)) element.hidden = element.dataset[name] !== value;
      for (const element of all(`[data-${name}s]`)) element.hidden = !element.dataset[`${name}s`].split(" ").includes(value);
      parentElement.querySelector("output").textContent = JSON.parse(parentElement.dataset.titles)[value];
    }
    document.title = document.querySelector("h1")?.textContent ?? "phased-dmd";
  }
  document.addEventListener("input", show);
  show();
