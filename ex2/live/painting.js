// The picture to start from: painted, dropped, chosen or taken from the sample. Painting asks for a new run at once.

const painting = new Float32Array(length).fill(1); // (C, H, W) in [-1, 1]
const COLOURS = {
  white: "#ffffff",
  black: "#000000",
  grey: "#808080",
  red: "#d62828",
  yellow: "#f3a712",
  green: "#2a9d4a",
  blue: "#2667c9",
  violet: "#8e3bb0",
};
let colour = COLOURS.red;
const cursor = { i: Math.floor(size / 2), j: Math.floor(size / 2) };

/** The colour as the model sees it: red, green and blue in [-1, 1]. */
const numbers_of = (value) => [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16) / 127.5 - 1);

/** Shows the picture; every change of it ends with this, and asks for samples from it. */
function use_painting() {
  draw_images($("easel"), [painting]);
  request();
}

/** Paints a round spot. */
function paint(i, j) {
  const radius = Math.max(0.75, ($("brush").value * size) / 32); // 0.75 reaches a pixel from everywhere
  const numbers = numbers_of(colour);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      if ((y - i) ** 2 + (x - j) ** 2 > radius ** 2) continue;
      for (let c = 0; c < channels; c++) painting[(c * size + y) * size + x] = numbers[c];
    }
  }
  use_painting();
}

/** Takes the centre of an image file as the picture. */
async function take_file(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const side = Math.min(bitmap.width, bitmap.height);
    const small = make("canvas", { width: size, height: size }).getContext("2d");
    small.imageSmoothingQuality = "high";
    small.fillStyle = "#fff";
    small.fillRect(0, 0, size, size);
    small.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side, 0, 0, size, size);
    const { data } = small.getImageData(0, 0, size, size);
    for (let n = 0; n < size * size; n++)
      for (let c = 0; c < channels; c++) painting[c * size * size + n] = data[4 * n + c] / 127.5 - 1;
    use_painting();
  } catch {
    $("status").textContent = `${file.name} can't be read as a picture`;
  }
}

/** Paints where the pointer is. */
function paint_at(event) {
  const box = $("easel").getBoundingClientRect();
  paint(((event.clientY - box.top) / box.height) * size - 0.5, ((event.clientX - box.left) / box.width) * size - 0.5);
}

/** The canvas, the colours and the buttons beside it. */
function prepare_painting() {
  const canvas = $("easel");
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    paint_at(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) paint_at(event);
  });
  canvas.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (move) [cursor.i, cursor.j] = [within(cursor.i + move[0]), within(cursor.j + move[1])];
    else if (event.key === " ") paint(cursor.i, cursor.j);
    else return;
    event.preventDefault();
    if (move) draw_cursor();
  });
  const palette = document.querySelector(".palette");
  for (const [name, value] of Object.entries(COLOURS)) {
    const button = make("button", { type: "button", "aria-label": name, "aria-pressed": value === colour });
    button.style.background = value;
    button.addEventListener("click", () => {
      colour = value;
      for (const other of palette.children) other.setAttribute("aria-pressed", other === button);
    });
    palette.append(button);
  }
  $("clear").addEventListener("click", () => {
    const numbers = numbers_of(colour);
    for (let c = 0; c < channels; c++) painting.fill(numbers[c], c * size * size, (c + 1) * size * size);
    use_painting();
  });
  $("take").addEventListener("click", () => {
    painting.set(frame_at(0, Infinity).x_zero.map((value) => Math.min(1, Math.max(-1, value))));
    use_painting();
  });
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) take_file($("file").files[0]);
  });
  draw_images(canvas, [painting]);
}

/** Shows where the arrow keys have moved the brush. */
function draw_cursor() {
  draw_images($("easel"), [painting]);
  const context = $("easel").getContext("2d");
  context.fillStyle = colour;
  context.fillRect(cursor.j, cursor.i, 1, 1);
}

/** A picture may be dropped anywhere: it becomes the one to start from. */
function prepare_dropping() {
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("start").classList.add("dropping");
  });
  document.addEventListener("dragleave", () => $("start").classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("start").classList.remove("dropping");
    if (!event.dataTransfer.files[0]) return;
    document.querySelector("input[name=start][value=picture]").checked = true;
    take_file(event.dataTransfer.files[0]);
  });
}
