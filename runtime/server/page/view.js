// The image as the model sees it, with the kept tokens drawn on it: dropped patches dimmed, kept ones framed.

const SVG = "http://www.w3.org/2000/svg";

/** Return the reasons for which tokens of an image were kept, each with the indices of its tokens. */
export function keptFor(image) {
  const { token_indices: tokens, saliency, policy } = image;
  if (!saliency) return [];
  if (policy === "random") return [{ reason: "random", label: "at random", tokens }];
  return [
    { reason: "saliency", label: "for saliency", tokens: tokens.filter((_, i) => saliency[i]) },
    { reason: "coverage", label: "for coverage", tokens: tokens.filter((_, i) => !saliency[i]) },
  ];
}

/** Draw the image of a response into an <svg>. */
export function drawView(svg, image) {
  const { view_width: width, view_height: height } = image;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", describe(image));
  const kept = keptFor(image);
  const parts = [element("image", { href: image.view, width, height })];
  if (kept.length) {
    const clear = boxesByGrid(image.token_indices, image.grids).flat().map((box) => rectangle(box, 0));
    parts.push(element("path", { class: "dropped", d: `M0 0H${width}V${height}H0Z${clear.join("")}` }));
    for (const { reason, tokens } of kept) {
      for (const boxes of boxesByGrid(tokens, image.grids)) parts.push(...frames(reason, boxes));
    }
  }
  svg.replaceChildren(...parts);
}

/** Return a small picture of one kept token, for the legend. */
export function swatch(reason) {
  const svg = element("svg", { class: "swatch", viewBox: "0 0 16 16", "aria-hidden": "true" });
  svg.append(...frames(reason, [{ left: 1, top: 1, width: 14, height: 14 }]));
  return svg;
}

function describe(image) {
  const kept = keptFor(image).map(({ label, tokens }) => `${tokens.length} ${label}`);
  if (!kept.length) return `The image as the model sees it. All ${image.visual_tokens} tokens are kept.`;
  return `The image as the model sees it. Of ${image.visual_tokens} tokens, ${kept.join(" and ")} are kept.`;
}

/** Return the boxes of tokens, which are numbered grid by grid: a list for each grid, in pixels of the view. */
function boxesByGrid(tokens, grids) {
  let first = 0;
  return grids.map((grid) => {
    const [width, height] = [grid.width / grid.columns, grid.height / grid.rows];
    const indices = tokens.map((token) => token - first).filter((index) => index >= 0 && index < grid.rows * grid.columns);
    first += grid.rows * grid.columns;
    return indices.map((index) => ({
      left: grid.left + (index % grid.columns) * width,
      top: grid.top + Math.floor(index / grid.columns) * height,
      width,
      height,
    }));
  });
}

/** Return frames inside boxes of one size: dark below, so that they are visible on any image, and coloured above. */
function frames(reason, boxes) {
  if (!boxes.length) return [];
  const side = Math.min(boxes[0].width, boxes[0].height);
  const line = side * 0.08;
  const d = boxes.map((box) => rectangle(box, line)).join("");
  const attributes = { d, ...(reason === "coverage" ? corners(boxes[0], line) : {}) };
  return [
    element("path", { class: "frame-edge", "stroke-width": line * 2, ...attributes }),
    element("path", { class: `frame ${reason}`, "stroke-width": line, ...attributes }),
  ];
}

/** Return the dashes that leave only the corners of a frame. */
function corners(box, line) {
  const [width, height] = [box.width - 2 * line, box.height - 2 * line];
  const arm = Math.min(width, height) * 0.26;
  const dashes = [arm, width - 2 * arm, 2 * arm, height - 2 * arm, 2 * arm, width - 2 * arm, 2 * arm, height - 2 * arm, arm, 0];
  return { "stroke-dasharray": dashes.map((dash) => dash.toFixed(3)).join(" ") };
}

function rectangle({ left, top, width, height }, inset) {
  const [x, y, w, h] = [left + inset, top + inset, width - 2 * inset, height - 2 * inset].map((n) => +n.toFixed(3));
  return `M${x} ${y}h${w}v${h}h${-w}z`;
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  return made;
}
