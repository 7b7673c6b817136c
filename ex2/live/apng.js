// PNG files with several frames, which browsers can show but not write. https://www.w3.org/TR/png-3/

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

/** A chunk of a PNG file: length, name, content, checksum. */
function png_chunk(name, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  for (let i = 0; i < 4; i++) bytes[4 + i] = name.charCodeAt(i);
  bytes.set(content, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < 8 + content.length; i++) crc = CRC_TABLE[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
  view.setUint32(8 + content.length, ~crc >>> 0);
  return bytes;
}

/** The bytes of numbers, given as [how many bytes, number] pairs, the largest byte first. */
const big_endian = (...fields) =>
  Uint8Array.from(
    fields.flatMap(([size, value]) => Array.from({ length: size }, (_, i) => (value >>> (8 * (size - 1 - i))) & 255)),
  );

/** Rows of RGBA pixels as a PNG file keeps them: a filter byte (0: none) before each, then compressed. */
async function compress_rows({ width, height, data }) {
  const rows = new Uint8Array(height * (4 * width + 1));
  for (let i = 0; i < height; i++) rows.set(data.subarray(4 * width * i, 4 * width * (i + 1)), i * (4 * width + 1) + 1);
  const compressed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(compressed).arrayBuffer());
}

/** An endless animation of ImageData of one size, as a Blob; milliseconds: how long each is shown. */
async function encode_apng(frames, milliseconds) {
  const { width, height } = frames[0];
  const chunks = [
    Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
    png_chunk("IHDR", big_endian([4, width], [4, height], [1, 8], [1, 6], [3, 0])), // 8 bits, RGBA
    png_chunk("acTL", big_endian([4, frames.length], [4, 0])),
  ];
  let number = 0; // of the chunks that belong to the animation
  for (const [i, frame] of frames.entries()) {
    const place = [
      [4, width],
      [4, height],
      [4, 0],
      [4, 0],
    ];
    chunks.push(png_chunk("fcTL", big_endian([4, number++], ...place, [2, milliseconds[i]], [2, 1000], [2, 0])));
    const pixels = await compress_rows(frame);
    if (i === 0) {
      chunks.push(png_chunk("IDAT", pixels));
    } else {
      const numbered = new Uint8Array(4 + pixels.length);
      numbered.set(big_endian([4, number++]));
      numbered.set(pixels, 4);
      chunks.push(png_chunk("fdAT", numbered));
    }
  }
  chunks.push(png_chunk("IEND", new Uint8Array(0)));
  return new Blob(chunks, { type: "image/png" });
}
