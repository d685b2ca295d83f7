// Products with weights of few bits, and lookups in them, for one instruction set: see rows.h.
//
// Activations are not used as floats: each block becomes integers of 16 bits but for a few codes, so that a product of
// integers, several times as fast as one of floats, is as good as exact. With VNNI they are two planes of signed bytes,
// without it words.
#include <algorithm>

#include "rows.h"
#include "simd.h"

namespace TQ_ISA {
namespace {
using tq::Activations;
using tq::Rows;

constexpr float kRadix = 254.0f;       // low bytes stay within -127 .. 127
constexpr float kMost = 127 * 254 + 126;
constexpr float kMostByte = 127;

// One register of accumulators (see R in simd.h), as bytes and as floats: 16 outputs are kPerVector of them.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kBytes = true;
#else
constexpr bool kBytes = false;
#endif
#if defined(TQ_WIDE)
constexpr int kOutputs = 16;
using N = __m512;
TQ_INLINE R field(R a, R mask, int shift) { return _mm512_and_si512(_mm512_srli_epi16(a, shift), mask); }
TQ_INLINE R mask_of(int byte) { return _mm512_set1_epi8(char(byte)); }
TQ_INLINE R with_third(R two, R bit) { return _mm512_or_si512(two, _mm512_slli_epi16(bit, 2)); }
TQ_INLINE R even(R w) { return _mm512_and_si512(w, _mm512_set1_epi16(0xff)); }
TQ_INLINE R odd(R w) { return _mm512_srli_epi16(w, 8); }
TQ_INLINE R word_dot(R c, R w, R x) { return _mm512_add_epi32(c, _mm512_madd_epi16(w, x)); }
TQ_INLINE R zero_register() { return _mm512_setzero_si512(); }
TQ_INLINE N number(R a) { return _mm512_cvtepi32_ps(a); }
TQ_INLINE N nset(float x) { return _mm512_set1_ps(x); }
TQ_INLINE N nload(const float* p) { return _mm512_loadu_ps(p); }
TQ_INLINE void nstore(float* p, N a) { _mm512_storeu_ps(p, a); }
TQ_INLINE N nfma(N a, N b, N c) { return _mm512_fmadd_ps(a, b, c); }
TQ_INLINE N nmul(N a, N b) { return _mm512_mul_ps(a, b); }
TQ_INLINE N nload_half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TQ_INLINE N nload_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kOutputs = 8;
using N = __m256;
TQ_INLINE R field(R a, R mask, int shift) { return _mm256_and_si256(_mm256_srli_epi16(a, shift), mask); }
TQ_INLINE R mask_of(int byte) { return _mm256_set1_epi8(char(byte)); }
TQ_INLINE R with_third(R two, R bit) { return _mm256_or_si256(two, _mm256_slli_epi16(bit, 2)); }
TQ_INLINE R even(R w) { return _mm256_and_si256(w, _mm256_set1_epi16(0xff)); }
TQ_INLINE R odd(R w) { return _mm256_srli_epi16(w, 8); }
TQ_INLINE R word_dot(R c, R w, R x) {
  c = _mm256_add_epi32(c, _mm256_madd_epi16(w, x));
  asm volatile("" : "+x"(c));  // compilers would make all products first, for which there are too few registers
  return c;
}
TQ_INLINE R zero_register() { return _mm256_setzero_si256(); }
TQ_INLINE N number(R a) { return _mm256_cvtepi32_ps(a); }
TQ_INLINE N nset(float x) { return _mm256_set1_ps(x); }
TQ_INLINE N nload(const float* p) { return _mm256_loadu_ps(p); }
TQ_INLINE void nstore(float* p, N a) { _mm256_storeu_ps(p, a); }
TQ_INLINE N nfma(N a, N b, N c) { return _mm256_fmadd_ps(a, b, c); }
TQ_INLINE N nmul(N a, N b) { return _mm256_mul_ps(a, b); }
TQ_INLINE N nload_half(const uint8_t* p) {
  __m256i h = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 13);
  return _mm256_mul_ps(_mm256_castsi256_ps(h), _mm256_set1_ps(0x1p112f));  // without F16C; scales are not negative
}
TQ_INLINE N nload_bytes(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
constexpr int kOutputs = 16;
using N = F;
template <class Op> TQ_INLINE R bytes_of(R a, R b, Op&& op) {
  uint8_t x[64], y[64];
  std::memcpy(x, a.v, 64);
  std::memcpy(y, b.v, 64);
  for (int i = 0; i < 64; ++i) x[i] = op(x[i], y[i]);
  return load_int(x);
}
TQ_INLINE R field(R a, R mask, int shift) { return bytes_of(a, mask, [=](int x, int m) { return uint8_t(x >> shift & m); }); }
TQ_INLINE R mask_of(int byte) { return set_int(int32_t(uint32_t(byte) * 0x01010101u)); }
TQ_INLINE R with_third(R two, R bit) { return bytes_of(two, bit, [](int x, int y) { return uint8_t(x | y << 2); }); }
TQ_INLINE R even(R w) { return field(w, set_int(0x00ff00ff), 0); }
TQ_INLINE R odd(R w) { TQ_EACH w.v[i] = int32_t(uint32_t(w.v[i]) >> 8 & 0x00ff00ffu); return w; }
TQ_INLINE R word_dot(R c, R w, R x) {
  int16_t a[32], b[32];
  std::memcpy(a, w.v, 64);
  std::memcpy(b, x.v, 64);
  TQ_EACH c.v[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return c;
}
TQ_INLINE R zero_register() { return set_int(0); }
TQ_INLINE N number(R a) { return to_float(a); }
TQ_INLINE N nset(float x) { return set(x); }
TQ_INLINE N nload(const float* p) { return load(p); }
TQ_INLINE void nstore(float* p, N a) { store(p, a); }
TQ_INLINE N nfma(N a, N b, N c) { return fma(a, b, c); }
TQ_INLINE N nmul(N a, N b) { return mul(a, b); }
TQ_INLINE N nload_half(const uint8_t* p) {
  N r;
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    std::memcpy(&half, p + 2 * i, 2);
    uint32_t word = uint32_t(half) << 13;
    std::memcpy(&r.v[i], &word, 4);
    r.v[i] *= 0x1p112f;
  }
  return r;
}
TQ_INLINE N nload_bytes(const uint8_t* p) { return from_bytes(p); }
#endif

// The codes of field `p` (four inputs) of a step, for the outputs of one register; of 8 fields where codes have 3 bits.
template <int bits, int p>
TQ_INLINE R codes_of(const uint8_t* step, int64_t stride) {
  if (bits == 8) return load_register(step);
  if (bits == 4) return field(load_register(step), mask_of(15), 4 * p);
  if (bits == 2) return field(load_register(step), mask_of(3), 2 * p);
  R two = field(load_register(step + stride * (p / 4)), mask_of(3), 2 * (p % 4));
  return with_third(two, field(load_register(step + stride * 2), mask_of(1), p));
}

#if defined(__AVX2__)
constexpr int64_t kAhead = 4096;  // bytes, of which each of four neighbouring streams fetches a line
TQ_INLINE void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0); }
#else
TQ_INLINE void prefetch(const uint8_t*) {}
#endif

struct Cell {
  const Rows& w;
  const Activations& a;
  float* out;
  int64_t row, panel, part;  // the first row, panel, and register of that panel
};

// `rows` rows by `regs` registers of outputs.
template <int bits, int planes, int rows, int regs>
TQ_INLINE void cell(const Cell& c) {
  constexpr int kFields = bits == 8 ? 1 : bits == 4 ? 2 : bits == 3 ? 8 : 4;
  const tq::RowsHeader& h = *c.w.h;
  const int64_t stored = c.w.stored_inputs(), steps = h.stored_block / (4 * kFields), half = h.scale_is_half ? 2 : 4;
  // of the registers, which are neighbours; panels of several groups have the same stride where there is more than one
  const uint8_t *codes[regs], *scales[regs], *zeros[regs];
  const int64_t stride = c.w.codes(c.panel).stride, scale_stride = c.w.scales(c.panel).stride, zero_stride = c.w.zeros(c.panel).stride;
  TQ_EACH_OF(regs, r)
    int64_t panel = c.panel + (c.part + r) / kPerVector, part = (c.part + r) % kPerVector * kOutputs;
    codes[r] = c.w.codes(panel).first + part * 4;
    scales[r] = c.w.scales(panel).first + part * half;
    zeros[r] = c.w.zeros(panel).first + part;
  });
  const N zero_of_all = nset(float(h.zero));
  const uint8_t *x[rows], *low[rows];
  TQ_EACH_OF(rows, i)
    x[i] = reinterpret_cast<const uint8_t*>(c.a.codes) + (c.row + i) * stored * (kBytes ? 1 : 2);
    low[i] = x[i] + c.a.rows * stored;  // the second plane
  });
  N y[rows][regs];
  TQ_EACH_OF(rows, i) TQ_EACH_OF(regs, r) y[i][r] = nset(0.0f); }); });
  for (int64_t b = 0, until = h.blocks_per_scale, at = 0, s = 0; b < h.blocks; ++b) {
    R sums[planes][rows][regs];
    TQ_EACH_OF(planes, q) TQ_EACH_OF(rows, i) TQ_EACH_OF(regs, r) sums[q][i][r] = zero_register(); }); }); });
    for (int64_t t = 0; t < steps; ++t, at += 4 * kFields) {
      TQ_EACH_OF(kFields, p)
        R w[regs];
        TQ_EACH_OF(regs, r) w[r] = codes_of<bits, p>(codes[r], stride); });
        if constexpr (kBytes) {
          TQ_EACH_OF(rows, i)
            TQ_EACH_OF(planes, q)
              R xs = broadcast_register((q ? low[i] : x[i]) + at + 4 * p);
              TQ_EACH_OF(regs, r) sums[q][i][r] = dot_register(sums[q][i][r], w[r], xs); });
            });
          });
        } else {
          TQ_EACH_OF(2, side)
            R words[regs];
            TQ_EACH_OF(regs, r) words[r] = side ? odd(w[r]) : even(w[r]); });
            TQ_EACH_OF(rows, i)
              R xs = broadcast_register(x[i] + 2 * (at + 4 * p) + 4 * side);
              TQ_EACH_OF(regs, r) sums[0][i][r] = word_dot(sums[0][i][r], words[r], xs); });
            });
          });
        }
      });
      TQ_EACH_OF(regs, r)
        if constexpr (rows == 1) prefetch(codes[r]);
        codes[r] += stride * (bits == 3 ? 3 : 1);
      });
    }
    TQ_EACH_OF(regs, r)
      const uint8_t* at_scale = scales[r] + s * scale_stride;
      N scale = h.scale_is_half ? nload_half(at_scale) : nload(reinterpret_cast<const float*>(at_scale));
      N zero = h.zero_is_byte ? nload_bytes(zeros[r] + s * zero_stride) : zero_of_all;
      TQ_EACH_OF(rows, i)
        const int64_t place = (c.row + i) * h.blocks + b;
        N sum = number(sums[0][i][r]);
        if constexpr (planes == 2) sum = nfma(sum, nset(kRadix), number(sums[planes - 1][i][r]));
        sum = nfma(zero, nset(-c.a.sum[place]), sum);
        y[i][r] = nfma(nmul(scale, nset(c.a.scale[place])), sum, y[i][r]);
      });
    });
    if (b + 1 == until) until += h.blocks_per_scale, ++s;
  }
  const float* bias = c.w.bias();
  TQ_EACH_OF(regs, r)
    int64_t output = (c.panel * kPerVector + c.part + r) * kOutputs, left = std::min<int64_t>(h.outputs - output, kOutputs);
    N b = bias ? nload(bias + output) : nset(0.0f);
    TQ_EACH_OF(rows, i)
      float* to = c.out + (c.row + i) * h.outputs + output;
      N v = bias ? nfma(y[i][r], nset(1.0f), b) : y[i][r];
      if (left == kOutputs) {
        nstore(to, v);
      } else if (left > 0) {
        float t[kOutputs];
        nstore(t, v);
        std::memcpy(to, t, size_t(left) * sizeof(float));
      }
    });
  });
}

#if defined(TQ_WIDE)
constexpr int kAlone = 4, kRows = 4, kTogether = 2;  // registers of outputs for one row; rows and registers for several
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kAlone = 4, kRows = 4, kTogether = 2;
#else
constexpr int kAlone = 1, kRows = 1, kTogether = 1;
#endif

// Panels from `first` to `last`, of which the cells must not leave the four that lie together.
template <int bits, int planes, int rows, int regs>
void panels(const Rows& w, const Activations& a, float* out, int64_t row, int64_t first, int64_t last) {
  for (int64_t begin = first; begin < last; begin += Rows::kTogether) {
    int64_t at = begin * kPerVector, end = std::min(begin + Rows::kTogether, last) * kPerVector;
    for (; at + regs <= end; at += regs) cell<bits, planes, rows, regs>({w, a, out, row, at / kPerVector, at % kPerVector});
    for (; at < end; ++at) cell<bits, planes, rows, 1>({w, a, out, row, at / kPerVector, at % kPerVector});
  }
}

template <int bits, int planes>
void multiply_as(const Rows& w, const Activations& a, float* out, int64_t begin, int64_t end, int64_t first, int64_t last) {
  if (end - begin == 1) return panels<bits, planes, 1, kAlone>(w, a, out, begin, first, last);
  for (int64_t panel = first; panel < last; panel += Rows::kTogether) {  // whose codes stay in the cache for all rows
    int64_t until = std::min(panel + Rows::kTogether, last), row = begin;
    for (; row + kRows <= end; row += kRows) panels<bits, planes, kRows, kTogether>(w, a, out, row, panel, until);
    for (; row < end; ++row) panels<bits, planes, 1, kAlone>(w, a, out, row, panel, until);
  }
}

void multiply(const Rows& w, const Activations& a, float* out, int64_t begin, int64_t end, int64_t first, int64_t last) {
  using Function = void (*)(const Rows&, const Activations&, float*, int64_t, int64_t, int64_t, int64_t);
  static constexpr Function of[4][2] = {
      {multiply_as<2, 1>, multiply_as<2, 2>},
      {multiply_as<3, 1>, multiply_as<3, 2>},
      {multiply_as<4, 1>, multiply_as<4, 2>},
      {multiply_as<8, 1>, multiply_as<8, 2>},
  };
  of[std::min(w.h->bits, 5) - 2][kBytes && a.bits == 16](w, a, out, begin, end, first, last);
}

// ---- activations ---------------------------------------------------------------------------------------------------

// The largest magnitude of n floats; NaN where one is not finite.
float magnitude(const float* x, int64_t n) {
  F most = set(0.0f), check = set(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    F v = n - i < kLanes ? load_first(x + i, n - i) : load(x + i);
    most = max(most, max(v, sub(set(0.0f), v)));
    check = fma(v, set(0.0f), check);
  }
  return largest(most) + sum(check);
}

TQ_INLINE F rounded(F x) { return sub(add(x, set(kRound)), set(kRound)); }

// Sixteen codes as signed bytes, or as words: of each four inputs the first, the third, the second and the fourth.
TQ_INLINE void put_bytes(int8_t* to, F q) { store_low_bytes(reinterpret_cast<uint8_t*>(to), codes(q, set_int(0), set_int(0))); }
TQ_INLINE void put_words(int8_t* to, F q) {
  int32_t of[kLanes];
  int16_t words[kLanes];
  store_int(of, codes(q, set_int(0), set_int(0)));
  for (int i = 0; i < kLanes; ++i) words[i] = int16_t(of[(i & ~3) + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4)]);
  std::memcpy(to, words, sizeof(words));
}

// One block, and its codes' sum; what it has room for beyond `n` inputs is zero. Rooms are multiples of 4 inputs.
template <int bits>
float put_block(const float* x, int64_t n, int64_t room, float inverse, int8_t* to, int8_t* low) {
  F total = set(0.0f);
  for (int64_t i = 0; i < room; i += kLanes) {
    int64_t left = std::min<int64_t>(kLanes, std::max<int64_t>(n - i, 0)), stored = std::min<int64_t>(kLanes, room - i);
    F q = rounded(mul(left < kLanes ? load_first(x + i, left) : load(x + i), set(inverse)));
    if (bits == 8) q = clamp(q, set(-kMostByte), set(kMostByte));
    total = add(total, q);
    int8_t t[2][2 * kLanes], *first = stored < kLanes ? t[0] : to + i * (kBytes ? 1 : 2), *second = stored < kLanes ? t[1] : low + i;
    if (!kBytes) {
      put_words(first, q);
    } else if (bits == 8) {
      put_bytes(first, q);
    } else {
      F h = rounded(mul(q, set(1.0f / kRadix)));
      put_bytes(first, h);
      put_bytes(second, fma(h, set(-kRadix), q));
    }
    if (stored == kLanes) continue;
    std::memcpy(to + i * (kBytes ? 1 : 2), first, size_t(stored) * (kBytes ? 1 : 2));
    if (kBytes && bits == 16) std::memcpy(low + i, second, size_t(stored));
  }
  return sum(total);
}

float scale_of(float magnitude, float most, float least) {
  return std::isnan(magnitude) ? magnitude : std::max(magnitude / most, least);
}

void quantize(const Rows& w, const float* x, Activations& a, int64_t begin, int64_t end) {
  const tq::RowsHeader& h = *w.h;
  const int64_t stored = w.stored_inputs();
  for (int64_t row = begin; row < end; ++row) {
    const float* from = x + row * h.inputs;
    float scale = a.bits == 8 ? scale_of(magnitude(from, h.inputs), kMostByte, a.least_scale) : 0.0f;
    for (int64_t b = 0; b < h.blocks; ++b) {
      int64_t at = b * h.block, n = std::min<int64_t>(h.block, h.inputs - at), place = row * stored + b * h.stored_block;
      if (a.bits == 16) scale = scale_of(magnitude(from + at, n), kMost, a.least_scale);
      float inverse = std::isnan(scale) ? 0.0f : 1.0f / scale;
      int8_t *to = a.codes + place * (kBytes ? 1 : 2), *low = a.codes + a.rows * stored + place;
      auto put = a.bits == 8 ? put_block<8> : put_block<16>;
      a.sum[row * h.blocks + b] = put(from + at, n, h.stored_block, inverse, to, low);
      a.scale[row * h.blocks + b] = scale;
    }
  }
}

// ---- lookups -------------------------------------------------------------------------------------------------------

// A single code: of output `lane` of a panel, of input `k` of a block.
TQ_INLINE int code_at(int32_t bits, const uint8_t* block, int64_t stride, int64_t k, int64_t lane) {
  const int64_t inputs = tq::step_inputs(bits), field = k % inputs / 4, byte = lane * 4 + k % 4;
  const uint8_t* step = block + k / inputs * tq::step_lines(bits) * stride;
  if (bits == 8) return step[byte];
  if (bits == 4) return step[byte] >> 4 * field & 15;
  if (bits == 2) return step[byte] >> 2 * field & 3;
  return (step[stride * (field / 4) + byte] >> 2 * (field % 4) & 3) | (step[2 * stride + byte] >> field & 1) << 2;
}

void look_up(const Rows& w, int64_t row, float* out) {
  const tq::RowsHeader& h = *w.h;
  const int64_t panel = row / 16, lane = row % 16;
  const tq::Lines codes = w.codes(panel), scales = w.scales(panel), zeros = w.zeros(panel);
  for (int64_t b = 0; b < h.blocks; ++b) {
    const int64_t s = b / h.blocks_per_scale, n = std::min<int64_t>(h.block, h.inputs - b * h.block);
    const uint8_t* at = scales.first + s * scales.stride;
    float of[kLanes];
    for (int i = 0; i < kLanes; i += kOutputs)
      nstore(of + i, h.scale_is_half ? nload_half(at + i * 2) : nload(reinterpret_cast<const float*>(at) + i));
    const int zero = h.zero_is_byte ? zeros.first[s * zeros.stride + lane] : h.zero;
    const uint8_t* block = codes.first + b * w.block_lines() * codes.stride;
    for (int64_t k = 0; k < n; ++k) out[b * h.block + k] = float(code_at(h.bits, block, codes.stride, k, lane) - zero) * of[lane];
  }
}

// ---- recurrent layers -----------------------------------------------------------------------------------------------

// Sixteen states, or the first `n` of them.
template <tq::Recurrence kind, bool whole>
TQ_INLINE void step_of(const float* given, const float* hidden, float* state, float* cell, int64_t stride, int64_t n) {
  auto get = [n](const float* p) __attribute__((always_inline)) { return whole ? load(p) : load_first(p, n); };
  auto put = [n](float* p, F a) __attribute__((always_inline)) { whole ? store(p, a) : store_first(p, a, n); };
  auto gate = [&](int i) __attribute__((always_inline)) { return add(get(given + i * stride), get(hidden + i * stride)); };
  if constexpr (kind == tq::kLstm) {
    F kept = mul(sigmoid(gate(1)), get(cell));
    F c = fma(sigmoid(gate(0)), tanh(gate(2)), kept);
    put(cell, c);
    put(state, mul(sigmoid(gate(3)), tanh(c)));
  } else if constexpr (kind == tq::kGru) {
    F r = sigmoid(gate(0)), z = sigmoid(gate(1));
    F fresh = tanh(fma(r, get(hidden + 2 * stride), get(given + 2 * stride)));
    put(state, fma(sub(get(state), fresh), z, fresh));
  } else {
    put(state, kind == tq::kRnnTanh ? tanh(gate(0)) : max(set(0.0f), gate(0)));
  }
}
template <tq::Recurrence kind>
void step_as(const float* given, const float* hidden, float* state, float* cell, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step_of<kind, true>(given + i, hidden + i, state + i, cell + i, n, kLanes);
  if (i < n) step_of<kind, false>(given + i, hidden + i, state + i, cell + i, n, n - i);
}
void step(tq::Recurrence kind, const float* given, const float* hidden, float* state, float* cell, int64_t n) {
  switch (kind) {
    case tq::kLstm: return step_as<tq::kLstm>(given, hidden, state, cell, n);
    case tq::kGru: return step_as<tq::kGru>(given, hidden, state, cell, n);
    case tq::kRnnTanh: return step_as<tq::kRnnTanh>(given, hidden, state, cell, n);
    default: return step_as<tq::kRnnRelu>(given, hidden, state, cell, n);
  }
}

}  // namespace

extern const tq::RowKernels row_kernels;
const tq::RowKernels row_kernels = {quantize, multiply, look_up, step};

}  // namespace TQ_ISA
