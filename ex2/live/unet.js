// The attention U-Net of ex2_model.py in JavaScript: the same classes and parameter names, for one image at a time.
//
// A tensor is {data, channels, side}: channels x side x side float32 numbers in the kernel's memory, as torch keeps an
// image (C, H, W). `state` is torch's state_dict: name -> {data, shape}. Every layer is made once and called by
// `forward`; a matrix product is the only thing that the kernel computes, all else are loops.

/** x of ex2_model.py's comments: `channels` pictures of side x side numbers; their values are not set yet. */
function new_tensor(kernel, channels, side) {
  return { data: kernel.floats(channels * side * side), channels, side };
}

/** A parameter copied to the kernel's memory, where products can use it. */
function keep(kernel, parameter) {
  const copy = kernel.floats(parameter.data.length);
  copy.set(parameter.data);
  return copy;
}

/** Turns the time t into sines and cosines, from fast to slow: the positional encoding. Rounded as in torch. */
class SinusoidalPositionEmbeddings {
  constructor(dim) {
    const half = dim / 2;
    const step = Math.fround(-Math.log(10000) / (half - 1));
    this.frequencies = Array.from({ length: half }, (_, i) => Math.fround(Math.exp(Math.fround(i * step))));
  }

  forward(time) {
    const angles = this.frequencies.map((frequency) => Math.fround(time * frequency));
    return [...angles.map(Math.sin), ...angles.map(Math.cos)]; // (dim,)
  }
}

/** y = W x + b of a vector. */
class Linear {
  constructor(state, name) {
    [this.weight, this.bias] = [state[`${name}.weight`], state[`${name}.bias`].data];
  }

  forward(x) {
    const inputs = this.weight.shape[1];
    return Array.from(this.bias, (sum, k) => {
      for (let m = 0; m < inputs; m++) sum += this.weight.data[k * inputs + m] * x[m];
      return sum;
    });
  }
}

const silu = (x) => x / (1 + Math.exp(-x));
const gelu = (x) => (x / 2) * (1 + erf(x / Math.SQRT2));

/** The error function by its power series, which JavaScript lacks. */
function erf(x) {
  if (Math.abs(x) > 4) return Math.sign(x);
  let sum = x;
  for (let n = 1, power = x; n < 70; n++) {
    power *= -(x * x) / n;
    sum += power / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}

/** A 1x1 or 3x3 convolution that keeps the size: a product of the filters (K, M) and of what each pixel sees (M, N). */
class Conv2d {
  constructor(kernel, state, name) {
    this.kernel = kernel;
    [this.filters, this.channels, this.size] = state[`${name}.weight`].shape; // of (filters, channels, size, size)
    this.weight = keep(kernel, state[`${name}.weight`]);
    this.bias = state[`${name}.bias`]?.data; // the projections of attention have none
  }

  forward(x) {
    const y = new_tensor(this.kernel, this.filters, x.side);
    const [before, pixels] = [this.kernel.used, x.side * x.side];
    const seen = this.size === 1 ? x.data : this.neighbourhoods(x);
    this.kernel.product(this.weight, seen, y.data, this.filters, seen.length / pixels, pixels);
    this.kernel.used = before;
    for (let k = 0; this.bias && k < this.filters; k++) {
      for (let n = k * pixels; n < (k + 1) * pixels; n++) y.data[n] += this.bias[k];
    }
    return y;
  }

  /** im2col, (channels * 3 * 3, pixels): a row for every weight of a filter, the image shifted to where it looks. */
  neighbourhoods({ data, channels, side }) {
    const pixels = side * side;
    const seen = this.kernel.floats(channels * 9 * pixels);
    for (let row = 0; row < channels * 9; row++) {
      const dy = Math.floor((row % 9) / 3) - 1;
      const dx = (row % 3) - 1;
      const to = row * pixels;
      const from = Math.floor(row / 9) * pixels + dy * side + dx;
      const last = Math.min(pixels, pixels - dy * side - dx);
      for (let n = Math.max(0, -dy * side - dx); n < last; n++) seen[to + n] = data[from + n];
      // What lies outside of the image is zero: its first or last row, and its first or last column.
      if (dy) seen.fill(0, to + (dy < 0 ? 0 : pixels - side), to + (dy < 0 ? side : pixels));
      if (dx) for (let n = dx < 0 ? 0 : side - 1; n < pixels; n += side) seen[to + n] = 0;
    }
    return seen;
  }
}

/** A convolution whose filters have mean 0 and variance 1. */
class WeightStandardizedConv2d extends Conv2d {
  constructor(kernel, state, name) {
    super(kernel, state, name);
    const length = this.weight.length / this.filters;
    for (let k = 0; k < this.filters; k++) standardize(this.weight.subarray(k * length, (k + 1) * length));
  }
}

/** Subtracts the mean of `values` and divides by the root of their variance, in place. */
function standardize(values) {
  let [sum, squares] = [0, 0];
  for (let i = 0; i < values.length; i++) sum += values[i];
  const mean = sum / values.length;
  for (let i = 0; i < values.length; i++) squares += (values[i] - mean) ** 2;
  const factor = 1 / Math.sqrt(squares / values.length + 1e-5);
  for (let i = 0; i < values.length; i++) values[i] = (values[i] - mean) * factor;
}

/** Standardizes each group of channels in place, then scales and shifts each channel. */
class GroupNorm {
  constructor(state, name, groups) {
    [this.groups, this.weight, this.bias] = [groups, state[`${name}.weight`].data, state[`${name}.bias`].data];
  }

  forward(x) {
    const [pixels, length] = [x.side * x.side, x.data.length / this.groups];
    for (let group = 0; group < this.groups; group++)
      standardize(x.data.subarray(group * length, (group + 1) * length));
    for (let c = 0; c < x.channels; c++) {
      for (let n = c * pixels; n < (c + 1) * pixels; n++) x.data[n] = x.data[n] * this.weight[c] + this.bias[c];
    }
    return x;
  }
}

/** 3x3 convolution, group norm, scale and shift by the embedding, SiLU. */
class Block {
  constructor(kernel, state, name, groups) {
    this.proj = new WeightStandardizedConv2d(kernel, state, `${name}.proj`);
    this.norm = new GroupNorm(state, `${name}.norm`, groups);
  }

  /** scale_shift: a scale for each channel, then a shift for each; or nothing. */
  forward(x, scale_shift) {
    x = this.norm.forward(this.proj.forward(x));
    const pixels = x.side * x.side;
    for (let c = 0; c < x.channels; c++) {
      const [scale, shift] = scale_shift ? [scale_shift[c] + 1, scale_shift[x.channels + c]] : [1, 0];
      for (let n = c * pixels; n < (c + 1) * pixels; n++) x.data[n] = silu(x.data[n] * scale + shift);
    }
    return x;
  }
}

/** Two blocks with a shortcut; the first is conditioned on the embedding of time and class. */
class ResnetBlock {
  constructor(kernel, state, name, groups) {
    this.mlp = new Linear(state, `${name}.mlp.1`);
    this.block1 = new Block(kernel, state, `${name}.block1`, groups);
    this.block2 = new Block(kernel, state, `${name}.block2`, groups);
    this.res_conv = `${name}.res_conv.weight` in state ? new Conv2d(kernel, state, `${name}.res_conv`) : null;
  }

  forward(x, emb) {
    const h = this.block1.forward(x, this.mlp.forward(emb.map(silu)));
    return add(this.block2.forward(h), this.res_conv ? this.res_conv.forward(x) : x);
  }
}

/** x + y, kept in x. */
function add(x, y) {
  for (let i = 0; i < x.data.length; i++) x.data[i] += y.data[i];
  return x;
}

/** The channels of x, then those of y. */
function concatenate(kernel, x, y) {
  const both = new_tensor(kernel, x.channels + y.channels, x.side);
  both.data.set(x.data);
  both.data.set(y.data, x.data.length);
  return both;
}

/** exp(x) / sum exp(x) along every row of a matrix, in place. */
function softmax_of_rows(matrix, rows, columns) {
  for (let i = 0; i < rows; i++) {
    let [largest, sum] = [-Infinity, 0];
    for (let n = i * columns; n < (i + 1) * columns; n++) if (matrix[n] > largest) largest = matrix[n];
    for (let n = i * columns; n < (i + 1) * columns; n++) sum += matrix[n] = Math.exp(matrix[n] - largest);
    for (let n = i * columns; n < (i + 1) * columns; n++) matrix[n] /= sum;
  }
}

/** The transposed matrix, (columns, rows), its numbers multiplied by `factor`. */
function transpose(kernel, matrix, rows, columns, factor = 1) {
  const turned = kernel.floats(matrix.length);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) turned[j * rows + i] = factor * matrix[i * columns + j];
  }
  return turned;
}

const [HEADS, DIM_HEAD] = [4, 32];

/** Calls `attend` with queries, keys, values and the place of the output of each head, all (DIM_HEAD, pixels). */
function for_each_head(qkv, out, attend) {
  const size = DIM_HEAD * qkv.side * qkv.side;
  for (let head = 0; head < HEADS; head++) {
    const part = (i, from) => from.data.subarray((i * HEADS + head) * size, (i * HEADS + head + 1) * size);
    attend(part(0, qkv), part(1, qkv), part(2, qkv), part(0, out));
  }
}

/** Multi-head self-attention of every position to every other. */
class Attention {
  constructor(kernel, state, name) {
    this.kernel = kernel;
    this.to_qkv = new Conv2d(kernel, state, `${name}.to_qkv`);
    this.to_out = new Conv2d(kernel, state, `${name}.to_out`);
  }

  forward(x) {
    const [kernel, pixels] = [this.kernel, x.side * x.side];
    const [qkv, out] = [this.to_qkv.forward(x), new_tensor(this.kernel, HEADS * DIM_HEAD, x.side)];
    for_each_head(qkv, out, (q, k, v, result) => {
      const before = kernel.used;
      const weights = kernel.floats(pixels * pixels); // (queries, keys)
      kernel.product(transpose(kernel, q, DIM_HEAD, pixels, DIM_HEAD ** -0.5), k, weights, pixels, DIM_HEAD, pixels);
      softmax_of_rows(weights, pixels, pixels);
      kernel.product(v, transpose(kernel, weights, pixels, pixels), result, DIM_HEAD, pixels, pixels);
      kernel.used = before;
    });
    return this.to_out.forward(out);
  }
}

/** Self-attention whose cost grows with the positions, not with their square: (v softmax(k)^T) softmax(q). */
class LinearAttention {
  constructor(kernel, state, name) {
    this.kernel = kernel;
    this.to_qkv = new Conv2d(kernel, state, `${name}.to_qkv`);
    this.to_out = new Conv2d(kernel, state, `${name}.to_out.0`);
    this.norm = new GroupNorm(state, `${name}.to_out.1`, 1);
  }

  forward(x) {
    const [kernel, pixels] = [this.kernel, x.side * x.side];
    const [qkv, out] = [this.to_qkv.forward(x), new_tensor(this.kernel, HEADS * DIM_HEAD, x.side)];
    for_each_head(qkv, out, (q, k, v, result) => {
      const before = kernel.used;
      softmax_of_rows(k, DIM_HEAD, pixels); // over the positions
      const queries = transpose(kernel, q, DIM_HEAD, pixels); // (pixels, DIM_HEAD)
      softmax_of_rows(queries, pixels, DIM_HEAD); // over the dimensions of the head
      const context = kernel.floats(DIM_HEAD * DIM_HEAD);
      kernel.product(v, transpose(kernel, k, DIM_HEAD, pixels), context, DIM_HEAD, pixels, DIM_HEAD);
      const scaled = transpose(kernel, queries, pixels, DIM_HEAD, DIM_HEAD ** -0.5);
      kernel.product(context, scaled, result, DIM_HEAD, DIM_HEAD, pixels);
      kernel.used = before;
    });
    return this.norm.forward(this.to_out.forward(out));
  }
}

/** Residual pre-norm attention: x + fn(norm(x)). */
class Residual {
  constructor(kernel, state, name, Kind) {
    this.kernel = kernel;
    this.norm = new GroupNorm(state, `${name}.fn.norm`, 1);
    this.fn = new Kind(kernel, state, `${name}.fn.fn`);
  }

  forward(x) {
    const copy = new_tensor(this.kernel, x.channels, x.side);
    copy.data.set(x.data);
    return add(this.fn.forward(this.norm.forward(copy)), x);
  }
}

/** Halves height and width: 2x2 pixels become 4 channels, then a 1x1 convolution. */
class Downsample extends Conv2d {
  forward(x) {
    const [side, small] = [x.side, new_tensor(this.kernel, x.channels * 4, x.side / 2)];
    let to = 0;
    for (let c = 0; c < x.channels; c++) {
      for (const corner of [0, 1, side, side + 1]) {
        for (let i = 0; i < side; i += 2) {
          for (let j = 0; j < side; j += 2) small.data[to++] = x.data[(c * side + i) * side + j + corner];
        }
      }
    }
    return super.forward(small);
  }
}

/** Doubles height and width by repeating pixels, then a 3x3 convolution. */
class Upsample extends Conv2d {
  forward(x) {
    const large = new_tensor(this.kernel, x.channels, x.side * 2);
    const side = large.side;
    let to = 0;
    for (let c = 0; c < x.channels; c++) {
      for (let i = 0; i < side; i++) {
        for (let j = 0; j < side; j++) large.data[to++] = x.data[(c * x.side + (i >> 1)) * x.side + (j >> 1)];
      }
    }
    return super.forward(large);
  }
}

/** Predicts the noise eps in x_t from x_t, the time, and optionally the class. */
class Unet {
  /** config: {dim, levels, groups, null_class}; null_class is null for a model without classes. */
  constructor(kernel, config, state) {
    const { dim, levels, groups } = config;
    const block = (name) => new ResnetBlock(kernel, state, name, groups);
    const attention = (name, Kind) => new Residual(kernel, state, name, Kind);
    [this.kernel, this.state, this.null_class] = [kernel, state, config.null_class];

    this.init_conv = new Conv2d(kernel, state, "init_conv");
    this.time_mlp = [
      new SinusoidalPositionEmbeddings(dim),
      new Linear(state, "time_mlp.1"),
      new Linear(state, "time_mlp.3"),
    ];
    this.downs = [];
    this.ups = [];
    for (let i = 0; i < levels; i++) {
      const [last, down, up] = [i === levels - 1, `downs.${i}`, `ups.${i}`];
      const shrink = last ? new Conv2d(kernel, state, `${down}.3`) : new Downsample(kernel, state, `${down}.3.1`);
      this.downs.push([block(`${down}.0`), block(`${down}.1`), attention(`${down}.2`, LinearAttention), shrink]);
      const grow = last ? new Conv2d(kernel, state, `${up}.3`) : new Upsample(kernel, state, `${up}.3.1`);
      this.ups.push([block(`${up}.0`), block(`${up}.1`), attention(`${up}.2`, LinearAttention), grow]);
    }
    this.mid_block1 = block("mid_block1");
    this.mid_attn = attention("mid_attn", Attention);
    this.mid_block2 = block("mid_block2");
    this.final_res_block = block("final_res_block");
    this.final_conv = new Conv2d(kernel, state, "final_conv");
    this.weights_end = kernel.used; // what comes after is free again after each call
  }

  /** The class embedding (emb_dim,), or the null token for `null_class`. */
  embed_classes(label) {
    if (!Number.isInteger(label) || label < 0 || label > this.null_class) {
      throw new RangeError(
        `class ${label}: this model has 0 .. ${this.null_class - 1}, and ${this.null_class} for none`,
      );
    }
    const { data, shape } = this.state["class_emb.weight"];
    const width = shape[1];
    return label === this.null_class ? this.state.null_token.data : data.subarray(label * width, (label + 1) * width);
  }

  /** eps (C, H, W) as Float32Array, for a noisy image x (C, H, W), its time t and its class, if the model has some. */
  forward(x, time, label) {
    const kernel = this.kernel;
    kernel.used = this.weights_end;
    const [encode, first_layer, second_layer] = this.time_mlp;
    let emb = second_layer.forward(first_layer.forward(encode.forward(time)).map(gelu)); // (4 dim,)
    if (this.null_class !== null) {
      const embedded = this.embed_classes(label ?? this.null_class);
      emb = emb.map((value, i) => value + embedded[i]);
    }

    let h = new_tensor(kernel, this.init_conv.channels, Math.sqrt(x.length / this.init_conv.channels));
    h.data.set(x);
    h = this.init_conv.forward(h);
    const [first, skips] = [h, []];
    for (const [block1, block2, attn, shrink] of this.downs) {
      h = block1.forward(h, emb);
      skips.push(h);
      h = attn.forward(block2.forward(h, emb));
      skips.push(h);
      h = shrink.forward(h); // half as many pixels a side; the last level keeps them
    }

    h = this.mid_block2.forward(this.mid_attn.forward(this.mid_block1.forward(h, emb)), emb);

    for (const [block1, block2, attn, grow] of this.ups) {
      h = block1.forward(concatenate(kernel, h, skips.pop()), emb);
      h = attn.forward(block2.forward(concatenate(kernel, h, skips.pop()), emb));
      h = grow.forward(h);
    }

    h = this.final_res_block.forward(concatenate(kernel, h, first), emb);
    return this.final_conv.forward(h).data.slice();
  }
}

/** A network in as little memory as it takes: it is doubled until a call fits. */
function build_unet(config, state, simd) {
  for (let bytes = 2 ** 24; ; bytes *= 2) {
    try {
      const model = new Unet(new Kernel(bytes, simd), config, state);
      model.forward(new Float32Array(config.channels * config.image_size ** 2), 0);
      return model;
    } catch (error) {
      if (!(error instanceof RangeError) || bytes >= 2 ** 31) throw error;
    }
  }
}
