  const PERIOD = 2000;

  /* What a reader has chosen in a section: switches, preview, details, how far tables are scrolled, where the focus is. */
  function chosen(section) {
    const slider = section.querySelector("input[type=range]");
    const titles = slider && JSON.parse(slider.parentElement.dataset.titles);
    return {
      radios: all("input[type=radio]:checked", section).map(input => [input.name, input.value]),
      title: slider && slider.value !== slider.max ? titles[slider.value] : null,  // at its end it follows the run
      open: all("details", section).map(details => details.open),
      scrolled: all(".box", section).map(box => box.scrollLeft),
      focused: section.contains(document.activeElement) ? document.activeElement.name : null,
    };
  }

  function choose(section, { radios, title, open, scrolled, focused }) {
    for (const [name, value] of radios) {
      const input = all("input[type=radio]", section).find(input => input.name === name && input.value === value);
      if (input) input.checked = true;
    }
    const slider = section.querySelector("input[type=range]");
    const place = slider && title !== null ? JSON.parse(slider.parentElement.dataset.titles).indexOf(title) : -1;
    if (place >= 0) slider.value = place;
    all("details", section).forEach((details, i) => { details.open = open[i] ?? details.open; });
    all(".box", section).forEach((box, i) => { box.scrollLeft = scrolled[i] ?? 0; });
    if (focused) section.querySelector(`[name="${focused}"]:checked, input[type=range][name="${focused}"]`)?.focus();
  }

  function tell(problem) {
    const line = document.getElementById("problem");
    line.textContent = problem;
    line.hidden = !problem;
  }

  async function look() {
    try {
      const answer = await fetch(`state?${new URLSearchParams(versions)}`, { cache: "no-store" });
      const { sections, problem } = await answer.json();
      for (const [name, { version, html }] of Object.entries(sections)) {
        const section = document.getElementById(name), before = chosen(section);
        section.innerHTML = html;
        section.hidden = !html;
        choose(section, before);
        versions[name] = version;
      }
      if (Object.keys(sections).length) show();
      tell(problem);
    } catch {
      tell("phased-dmd watch does not answer: this is what was last seen");
    }
    setTimeout(look, PERIOD);
  }
  look();
