// What is wrong with the page as it is drawn now, as a list of sentences; `width` and `dark` are those asked for.
(width, dark) => {
  const faults = [];
  const root = document.documentElement;
  const say = (what, element) => {
    const text = element ? (element.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40) : "";
    faults.push(element ? `${what}: <${element.localName}> "${text}"` : what);
  };
  const shown = element => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const all = selector => [...document.querySelectorAll(selector)].filter(shown);
  const ancestors = element => {
    const line = [];
    for (let e = element; e; e = e.parentElement) line.push(e);
    return line;
  };

  // Structure.
  if (!root.lang) say("no language");
  if (!document.title.trim()) say("no title");
  if (document.querySelectorAll("h1").length !== 1) say("not one h1");

  // Width. A phone widens its window to what overflows, so the window says nothing: the layout's own width does.
  if (root.clientWidth > width) say(`laid out ${root.clientWidth} px wide`);
  if (root.scrollWidth > root.clientWidth) say(`overflows: ${root.scrollWidth} px of ${root.clientWidth}`);
  const scrolls = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  const outside = (inner, outer) => inner.left < outer.left - 1 || inner.right > outer.right + 1;
  for (const element of all("td, th, svg text")) {
    const box = element.getBoundingClientRect();
    const inside = ancestors(element).slice(0, -2).some(scrolls);
    if (!inside && outside(box, { left: 0, right: width })) say("outside the window", element);
    const svg = element.ownerSVGElement;
    if (svg && outside(box, svg.getBoundingClientRect())) say("cut by its svg", element);
  }

  // Size of text in drawings, which shrink with the window.
  for (const text of all("svg text, svg tspan")) {
    const matrix = text.getScreenCTM();
    const scale = Math.sqrt(Math.abs(matrix.a * matrix.d - matrix.b * matrix.c));
    const size = parseFloat(getComputedStyle(text).fontSize) * scale;
    if (size < 9) say(`text of ${size.toFixed(1)} px`, text);
  }

  // Colours. A canvas resolves every notation and mixes what is translucent.
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const mix = layers => {
    for (const [colour, alpha] of layers) {
      canvas.globalAlpha = alpha;
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
    }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  // What is under everything: `Canvas` follows the page's color-scheme.
  const probe = document.body.appendChild(document.createElement("div"));
  probe.style.backgroundColor = "Canvas";
  const base = getComputedStyle(probe).backgroundColor;
  probe.remove();
  const backgrounds = element =>
    [[base, 1], ...ancestors(element).reverse().map(e => [getComputedStyle(e).backgroundColor, 1])];
  const fill = element => {
    const style = getComputedStyle(element);
    return [style.fill, style.fillOpacity * style.opacity];
  };

  const light = luminance(mix(backgrounds(document.body)));
  if (dark ? light >= 0.5 : light <= 0.5) say(`a background of luminance ${light.toFixed(2)}`);
  const own = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  for (const element of all("body, body *").filter(own)) {
    const style = getComputedStyle(element);
    let layers = backgrounds(element);
    let colour = [style.color, 1];
    const svg = element.ownerSVGElement;
    if (svg) {
      if (!element.matches("text, tspan")) continue;
      // Text in a drawing lies on the shapes that are under its middle.
      element.scrollIntoView({ block: "center", inline: "center", behavior: "instant" });
      const box = element.getBoundingClientRect();
      const stack = document.elementsFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2).reverse();
      const shapes = stack.filter(e => e.ownerSVGElement === svg && !e.matches("text, tspan"));
      const filled = shapes.filter(e => !getComputedStyle(e).fill.match(/^(none|url)/) && !e.matches("line, g"));
      layers = backgrounds(svg).concat(filled.map(fill));
      colour = fill(element);
    }
    const ratio = contrast(mix(layers), mix([...layers, colour]));
    const size = parseFloat(style.fontSize);
    const large = !svg && (size >= 24 || (size >= 18.66 && style.fontWeight >= 700));
    if (ratio < (large ? 3 : 4.5)) say(`contrast of ${ratio.toFixed(2)}`, element);
  }
  window.scrollTo({ top: 0, left: 0, behavior: "instant" });

  // Drawings: their names are the accessibility tree's matter.
  for (const svg of all("svg:not(svg svg)")) {
    if (svg.getAttribute("role") !== "img") say("a drawing without role img", svg);
  }
  return { faults, drawings: all("svg:not(svg svg)").length };
}
