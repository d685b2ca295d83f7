// Codes one after the other: coordinate descent and GPTQ's error propagation within a block of columns.
//
// Matrices hold a column of the weight in a row, (k, o), so that what is computed together lies together. Outputs are
// independent; a strip of them has its part of the block in the first-level cache. Built for the machine it runs on.

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kStrip = 32, kBlock = 128;

// Rounds half to even, as torch.round does: right for |x| < 2^22, which clamped codes are.
inline float rounded(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  return (x + magic) - magic;
}

inline float clamped(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

struct Strip {
  float values[kBlock][kStrip];

  void load(const float* from, int64_t rows, int64_t outputs, int64_t first, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(values[i], from + i * outputs + first, width * sizeof(float));
      std::memset(values[i] + width, 0, (kStrip - width) * sizeof(float));
    }
  }

  void store(float* to, int64_t rows, int64_t outputs, int64_t first, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * outputs + first, values[i], width * sizeof(float));
  }

  void add(int64_t from, int64_t to, const float* factors, const float* what) {
    for (int64_t i = from; i < to; ++i) {
      const float factor = factors[i];
      for (int64_t o = 0; o < kStrip; ++o) values[i][o] += factor * what[o];
    }
  }
};

int64_t strip_width(int64_t outputs, int64_t first) {
  return outputs - first < kStrip ? outputs - first : kStrip;
}

}  // namespace

// Let the codes of `rows` columns move, each to its best value while the others stay; returns how many did.
// codes, slope, scale, inverse: the block's rows of (k, o). metric: its square of (k, k), rows `stride` apart.
// moved: (rows, o), by how much values changed.
extern "C" int64_t tq_descend(float* codes, const float* slope, const float* scale, const float* inverse,
                              const float* metric, float* moved, int64_t rows, int64_t outputs, int64_t stride,
                              float low, float high) {
  int64_t count = 0;
  for (int64_t first = 0; first < outputs; first += kStrip) {
    const int64_t width = strip_width(outputs, first);
    Strip slopes, olds, steps, inverses, deltas;
    slopes.load(slope, rows, outputs, first, width);
    olds.load(codes, rows, outputs, first, width);
    steps.load(scale, rows, outputs, first, width);
    inverses.load(inverse, rows, outputs, first, width);
    for (int64_t j = 0; j < rows; ++j) {
      int32_t changed = 0;
      for (int64_t o = 0; o < kStrip; ++o) {
        const float old = olds.values[j][o];
        const float code = rounded(clamped(old - slopes.values[j][o] * inverses.values[j][o], low, high));
        deltas.values[j][o] = o < width ? (code - old) * steps.values[j][o] : 0.0f;
        olds.values[j][o] = code;
        changed += o < width && code != old;
      }
      count += changed;
      if (changed) slopes.add(j + 1, rows, metric + j * stride, deltas.values[j]);
    }
    olds.store(codes, rows, outputs, first, width);
    deltas.store(moved, rows, outputs, first, width);
  }
  return count;
}

// Round `rows` columns, each to nearest, and carry its error on to those behind it.
// target (changed), scale, zero_point, codes, errors: the block's rows of (k, o). upper: its square of (k, k).
extern "C" void tq_propagate(const float* target, const float* scale, const float* zero_point, const float* upper,
                             float* codes, float* errors, int64_t rows, int64_t outputs, int64_t stride, float low,
                             float high) {
  for (int64_t first = 0; first < outputs; first += kStrip) {
    const int64_t width = strip_width(outputs, first);
    Strip targets, steps, zeros, chosen, off;
    targets.load(target, rows, outputs, first, width);
    steps.load(scale, rows, outputs, first, width);
    zeros.load(zero_point, rows, outputs, first, width);
    for (int64_t j = 0; j < rows; ++j) {
      const float diagonal = upper[j * stride + j];
      float negative[kStrip];
      for (int64_t o = 0; o < kStrip; ++o) {
        const float step = o < width ? steps.values[j][o] : 1.0f, value = targets.values[j][o];
        const float code = clamped(rounded(clamped(value / step, -4e6f, 4e6f)) + zeros.values[j][o], low, high);
        const float error = (value - (code - zeros.values[j][o]) * step) / diagonal;
        chosen.values[j][o] = code;
        off.values[j][o] = error;
        negative[o] = -error;
      }
      targets.add(j + 1, rows, upper + j * stride, negative);
    }
    chosen.store(codes, rows, outputs, first, width);
    off.store(errors, rows, outputs, first, width);
  }
}
