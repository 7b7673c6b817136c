// The memory of a network and its matrix product, in WebAssembly SIMD or, where a browser has none, in JavaScript.

const KERNEL_BYTES = Uint8Array.from(
  (
    "0061736d01000000010a0160067f7f7f7f7f7f000210010470616765066d656d6f727902000103020100070b010770726f6475637400" +
    "000abb0301b80302097f0b7b200441046c2106200541046c2107200641026c210d200641036c210e0340200020066a21084100210903" +
    "40fd0c000000000000000000000000000000002112201221132012211420122115201221162012211720122118201221192000210a20" +
    "0120096a210b0340200bfd000400210f200bfd0004102110200afd090200211120122011200ffde601fde4012112201320112010fde6" +
    "01fde4012113200a20066afd090200211120142011200ffde601fde4012114201520112010fde601fde4012115200a200d6afd090200" +
    "211120162011200ffde601fde4012116201720112010fde601fde4012117200a200e6afd090200211120182011200ffde601fde40121" +
    "18201920112010fde601fde4012119200b20076a210b200a41046a210a200a2008490d000b200220096a210c200c2012fd0b0400200c" +
    "2013fd0b0410200c20076a210c200c2014fd0b0400200c2015fd0b0410200c20076a210c200c2016fd0b0400200c2017fd0b0410200c" +
    "20076a210c200c2018fd0b0400200c2019fd0b0410200941206a210920092007490d000b2000200641046c6a21002002200741046c6a" +
    "2102200341046b210320030d000b0b00c301046e616d6502970101001a00017701017802017903014b04014d05014e0608726f775f6f" +
    "665f770708726f775f6f665f790808656e645f6f665f770906636f6c756d6e0a0666726f6d5f770b0666726f6d5f780c04746f5f790d" +
    "0874776f5f726f77730e0a74687265655f726f77730f027830100278311106666163746f721202613013026131140262301502623116" +
    "02633017026331180264301902643103220100030009666f75725f726f7773010d65696768745f636f6c756d6e73020373756d"
  ).match(/../g),
  (pair) => parseInt(pair, 16),
);

/** Whether this browser's WebAssembly has SIMD. */
const has_simd = () => typeof WebAssembly === "object" && WebAssembly.validate(KERNEL_BYTES);

const round_up = (count, multiple) => Math.ceil(count / multiple) * multiple;

/** The product of kernel.wat in JavaScript, for browsers without SIMD: the same arguments, some 50 times slower. */
function plain_product(memory, w, x, y, K, M, N) {
  const floats = new Float32Array(memory);
  [w, x, y] = [w / 4, x / 4, y / 4];
  for (let k = 0; k < K; k++) {
    floats.fill(0, y + k * N, y + (k + 1) * N);
    for (let m = 0; m < M; m++) {
      const factor = floats[w + k * M + m];
      for (let n = 0; n < N; n++) floats[y + k * N + n] += factor * floats[x + m * N + n];
    }
  }
}

/** Memory that is handed out from the bottom up, and products of matrices that lie in it. */
class Kernel {
  /** bytes: size of the memory, a multiple of 65,536; simd: compute in WebAssembly. */
  constructor(bytes, simd) {
    if (simd) {
      const memory = new WebAssembly.Memory({ initial: bytes / 65536 });
      const instance = new WebAssembly.Instance(new WebAssembly.Module(KERNEL_BYTES), { page: { memory } });
      this.memory = memory.buffer;
      this.multiply = instance.exports.product;
    } else {
      this.memory = new ArrayBuffer(bytes);
      this.multiply = (...given) => plain_product(this.memory, ...given);
    }
    this.used = 0; // bytes that are handed out; to set it back frees what came after
  }

  /** `size` new float32 numbers, of any values. A RangeError where the memory is full. */
  floats(size) {
    const start = this.used;
    this.used = round_up(start + 4 * size, 16);
    return new Float32Array(this.memory, start, size);
  }

  /** y (K, N) = w (K, M) x (M, N), where all three lie in this memory. What does not fill the tiles is padded. */
  product(w, x, y, K, M, N) {
    const [rows, columns, before] = [round_up(K, 4), round_up(N, 8), this.used];
    const padded_w = rows === K ? w : this.padded(w, K, M, rows, M);
    const padded_x = columns === N ? x : this.padded(x, M, N, M, columns);
    const padded_y = rows === K && columns === N ? y : this.floats(rows * columns);
    this.multiply(padded_w.byteOffset, padded_x.byteOffset, padded_y.byteOffset, rows, M, columns);
    for (let k = 0; padded_y !== y && k < K; k++) y.set(padded_y.subarray(k * columns, k * columns + N), k * N);
    this.used = before;
  }

  /** A copy of a matrix (rows, columns) with zeros around it. */
  padded(matrix, rows, columns, new_rows, new_columns) {
    const copy = this.floats(new_rows * new_columns).fill(0);
    for (let i = 0; i < rows; i++) copy.set(matrix.subarray(i * columns, (i + 1) * columns), i * new_columns);
    return copy;
  }
}
