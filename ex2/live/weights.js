// The weights that are inlined in the page, as float32 numbers.

const FLOAT16_FACTORS = Array.from({ length: 32 }, (_, exponent) => 2 ** (Math.max(exponent, 1) - 25));

/** float32 numbers from the bits of float16 ones: 1 for the sign, 5 for the exponent, 10 for the mantissa. */
function from_float16(bits) {
  const numbers = new Float32Array(bits.length);
  for (let i = 0; i < bits.length; i++) {
    const exponent = (bits[i] >> 10) & 31;
    const value = ((bits[i] & 1023) + (exponent ? 1024 : 0)) * FLOAT16_FACTORS[exponent];
    numbers[i] = bits[i] >> 15 ? -value : value;
  }
  return numbers;
}

/** The state_dict, name -> {data, shape}, of `bytes` that export.py wrote; parameters: [name, kind, shape] of each. */
function decode_weights(parameters, bytes) {
  const state = {};
  let at = 0;
  const take = (Numbers, count) => {
    const part = bytes.slice(at, (at += count * Numbers.BYTES_PER_ELEMENT));
    return new Numbers(part.buffer);
  };
  for (const [name, kind, shape] of parameters) {
    const size = shape.reduce((product, length) => product * length, 1);
    let data;
    if (kind === "int8") {
      const scales = take(Float32Array, shape[0]); // one for each output channel
      data = new Float32Array(take(Int8Array, size));
      for (let i = 0; i < size; i++) data[i] *= scales[Math.floor((i * shape[0]) / size)];
    } else {
      data = kind === "float16" ? from_float16(take(Uint16Array, size)) : take(Float32Array, size);
    }
    state[name] = { data, shape };
  }
  return state;
}
