// Pictures of Load Image as Collage Layer will cut them out, before any run.
const MOST = 4096; // pixels of the long side in which the transparent border is looked for

const cutouts = new Map(); // name -> {width, height, url, isTransparent}, or null until it is loaded
const PREFIX = "file:";

/**
 * {name, width, height: of the cut-out in pixels of the file, isTransparent}, or null while it is loading.
 *
 * address: of the file. opaque: without its alpha. trim: without its transparent border. ready(): called once it is loaded.
 */
export function cutoutOf(address, { opaque, trim }, ready) {
  const name = `${PREFIX}${address} ${opaque} ${trim}`;
  if (!cutouts.has(name)) {
    cutouts.set(name, null);
    makeCutout(address, opaque, trim).then(
      (cutout) => (cutouts.set(name, cutout), ready()),
      () => {},
    );
  }
  const made = cutouts.get(name);
  return made && { name, ...made };
}

/** The address of a cut-out, or null for another name. */
export function cutoutAddress(name) {
  return name.startsWith(PREFIX) ? cutouts.get(name).url : null;
}

async function makeCutout(address, opaque, trim) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(1, MOST / Math.max(width, height));
  const sides = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = Object.assign(document.createElement("canvas"), { width: sides[0], height: sides[1] });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, ...sides);
  const { data } = context.getImageData(0, 0, ...sides);
  const { box, isTransparent } = seenOf(data, ...sides);
  const [left, top, right, bottom] = trim && !opaque && box ? box : [0, 0, ...sides];
  const cut = Object.assign(document.createElement("canvas"), { width: right - left, height: bottom - top });
  const pen = cut.getContext("2d");
  if (opaque) pen.fillRect(0, 0, cut.width, cut.height);
  pen.drawImage(canvas, -left, -top);
  const blob = await new Promise((resolve) => cut.toBlob(resolve));
  return {
    width: Math.round(cut.width / scale),
    height: Math.round(cut.height / scale),
    url: URL.createObjectURL(blob),
    isTransparent,
  };
}

/** {box: [left, top, right, bottom] of what is not transparent, or null, isTransparent: whether anything is}. */
function seenOf(data, width, height) {
  let [left, top, right, bottom] = [width, height, 0, 0];
  let isTransparent = false;
  for (let y = 0, i = 3; y < height; y++) {
    for (let x = 0; x < width; x++, i += 4) {
      if (data[i] < 255) isTransparent = true;
      if (!data[i]) continue;
      if (x < left) left = x;
      if (x >= right) right = x + 1;
      if (y < top) top = y;
      bottom = y + 1;
    }
  }
  return { box: right ? [left, top, right, bottom] : null, isTransparent };
}
