// The kernels of one instruction set: compiled once for each, with TQ_ISA naming it and the flags that allow it.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "plan.h"
#include "simd.h"

namespace TQ_ISA {
using tq::Bound;
using tq::Op;
using tq::Value;

namespace {

// ---- from the float result of an op to what it stores ------------------------------------------------------------

TQ_INLINE F activate(int32_t kind, F x, F low, F high) {
  switch (kind) {
    case tq::kClamp: return clamp(x, low, high);
    case tq::kGelu: {
      F half = mul(x, set(0.5f));
      return fma(half, erf(mul(x, set(0.70710678118654752f))), half);
    }
    case tq::kGeluTanh: {
      F half = mul(x, set(0.5f));
      F inner = mul(set(0.79788456080286536f), fma(mul(mul(x, x), x), set(0.044715f), x));
      return fma(half, tanh(inner), half);
    }
    case tq::kSilu: return mul(x, sigmoid(x));
    case tq::kSigmoid: return sigmoid(x);
    case tq::kTanh: return tanh(x);
    case tq::kHardswish: return mul(x, mul(clamp(add(x, set(3.0f)), set(0.0f), set(6.0f)), set(1.0f / 6.0f)));
    case tq::kHardsigmoid: return mul(clamp(add(x, set(3.0f)), set(0.0f), set(6.0f)), set(1.0f / 6.0f));
    default: return x;
  }
}

// Where the results of one pixel go, and where its second operand is.
struct Place {
  uint8_t* byte;
  float* number;
  const uint8_t* other;
};

// `n` channels from channel `at` on: activation, second operand, activation, stores.
template <int32_t before, int32_t after>
TQ_INLINE void finish(const Op& op, const float* x, const Place& p, int64_t at, int64_t n, bool other_float, bool tail) {
  F bl = set(op.before_low), bh = set(op.before_high), al = set(op.after_low), ah = set(op.after_high);
  F inverse = set(op.inverse), low = set(op.low), high = set(op.high);
  I zero = set_int(op.zero_point), nan = set_int(op.nan_byte);
  for (int64_t i = 0; i < n; i += kLanes) {
    F y = activate(before < 0 ? op.before : before, load(x + i), bl, bh);
    if (op.binary) {
      F o;
      if (other_float) {
        o = load(reinterpret_cast<const float*>(p.other) + at + i);
      } else {
        o = mul(sub(from_bytes(p.other + at + i), set(static_cast<float>(op.other_zero_point))), set(op.other_scale));
      }
      y = op.binary == tq::kAdd ? add(y, o) : mul(y, o);
    }
    y = activate(after < 0 ? op.after : after, y, al, ah);
    if (p.number) {
      if (tail && n - i < kLanes) {
        float t[kLanes];
        store(t, y);
        std::memcpy(p.number + at + i, t, (n - i) * 4);
      } else {
        store(p.number + at + i, y);
      }
    }
    if (p.byte) store_bytes(p.byte + at + i, clamp(mul(y, inverse), low, high), zero, nan);
  }
}

void finish_any(const Op& op, const float* x, int64_t stride, const Place* p, int rows, int64_t at, int64_t n,
                bool other_float, bool tail) {
  if (op.before == tq::kNone && op.after == tq::kNone) {
    for (int r = 0; r < rows; ++r) finish<tq::kNone, tq::kNone>(op, x + r * stride, p[r], at, n, other_float, tail);
  } else if (op.before == tq::kNone && op.after == tq::kClamp) {
    for (int r = 0; r < rows; ++r) finish<tq::kNone, tq::kClamp>(op, x + r * stride, p[r], at, n, other_float, tail);
  } else if (op.before == tq::kNone && op.after == tq::kGelu) {
    for (int r = 0; r < rows; ++r) finish<tq::kNone, tq::kGelu>(op, x + r * stride, p[r], at, n, other_float, tail);
  } else {
    for (int r = 0; r < rows; ++r) finish<-1, -1>(op, x + r * stride, p[r], at, n, other_float, tail);
  }
}

struct Outputs {
  bool other_float, tail;
  int64_t byte_step = 0, number_step = 0, other_step = 0;
  const Bound& b;
  const Op& op;
  Outputs(const Op& o, const Bound& bound) : b(bound), op(o) {
    other_float = op.other >= 0 && b.values[op.other].is_float;
    tail = op.out_float >= 0 && b.values[op.out_float].external >= 0;
    if (op.out_byte >= 0) byte_step = b.values[op.out_byte].stride;
    if (op.out_float >= 0) number_step = b.values[op.out_float].stride;
    if (op.other >= 0 && !op.other_broadcast) other_step = b.values[op.other].stride * element_size(b.values[op.other]);
  }
  Place at(int64_t sample, int64_t y, int64_t x) const {
    Place p{nullptr, nullptr, nullptr};
    if (op.out_byte >= 0) p.byte = pixel(b, op.out_byte, sample, y, x);
    if (op.out_float >= 0) p.number = reinterpret_cast<float*>(pixel(b, op.out_float, sample, y, x));
    if (op.other >= 0) {
      bool fixed = op.other_broadcast;
      p.other = pixel(b, op.other, sample, fixed ? 0 : y, fixed ? 0 : x);
    }
    return p;
  }
  // From the place of a pixel to that of its right neighbour.
  TQ_INLINE void next(Place& p) const {
    if (p.byte) p.byte += byte_step;
    if (p.number) p.number += number_step;
    if (p.other) p.other += other_step;
  }
};

int64_t out_value(const Op& op) { return op.out_byte >= 0 ? op.out_byte : op.out_float; }

// Walks over the pixels of an op's output.
struct Walk {
  int64_t sample, y, x, h, w;
  Walk(const Value& v, int64_t at) : h(v.h), w(v.w) {
    sample = at / (h * w);
    int64_t rest = at - sample * h * w;
    y = rest / w;
    x = rest - y * w;
  }
  TQ_INLINE void next() {
    if (++x == w) {
      x = 0;
      if (++y == h) { y = 0; ++sample; }
    }
  }
};

// ---- convolutions and linears: an integer matrix product over the window's pixels ---------------------------------

struct Tile {
  const uint8_t* const* rows;
  const Place* places;
  int64_t skipped;          // bytes of a pixel in front of a group's channels
  const int32_t* taps;      // byte offset of each tap
  int64_t n_taps, depth;    // bytes of a tap
  const int8_t* weights;    // blocks of 16 channels
  int64_t block;            // bytes of such a block
  const int32_t* compensation;
  const float *scale, *bias;
  int64_t at, n;            // first channel, channels
  bool other_float, tail;
  void (*plain)(const Op&, const Tile&, const int32_t*, int);  // null: what follows the sums is not as simple
};

enum Operand { kAbsent, kFloats, kBytes };

// The byte of NaN wherever `y` is NaN; what is stored first has 0 there.
void mend(uint8_t* p, const float* y, int64_t n, int nan) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int bad = unordered(load(y + i)); bad; bad &= bad - 1) p[i + __builtin_ctz(bad)] = static_cast<uint8_t>(nan);
}
// The same for the rows of a tile; apart from the tile's own code, whose sums would not stay in registers around a call.
__attribute__((noinline)) void mend_rows(const Tile& t, int rows, int64_t n, int nan) {
  for (int r = 0; r < rows; ++r) mend(t.places[r].byte + t.at, t.places[r].number + t.at, n, nan);
}

// From sums to what is stored, where an addend and a clamp are all that follows.
template <int NV, Operand other, bool number, bool byte>
void plain_rows(const Op& op, const Tile& t, const int32_t* sums, int rows) {
  F s[NV], b[NV];
  TQ_EACH_OF(NV, v)
    s[v] = load(t.scale + v * kLanes);
    b[v] = load(t.bias + v * kLanes);
  });
  bool clamped = op.after == tq::kClamp;
  F least = set(clamped ? op.after_low : -INFINITY), most = set(clamped ? op.after_high : INFINITY);
  F inverse = set(op.inverse), low = set(op.low), high = set(op.high);
  F scale = set(op.other_scale), zero = set(static_cast<float>(op.other_zero_point));
  int zero_point = op.zero_point, nan = byte ? op.nan_byte : 0;
  alignas(64) float line[NV * kLanes];
  for (int r = 0; r < rows; ++r, sums += NV * kLanes) {
    const Place& p = t.places[r];
    F y[NV];
    TQ_EACH_OF(NV, v)
      y[v] = fma(to_float(load_int(sums + v * kLanes)), s[v], b[v]);
      if (other == kFloats) y[v] = add(y[v], load(reinterpret_cast<const float*>(p.other) + t.at + v * kLanes));
      if (other == kBytes) y[v] = fma(sub(from_bytes(p.other + t.at + v * kLanes), zero), scale, y[v]);
      y[v] = clamp(y[v], least, most);
      if (number) store(p.number + t.at + v * kLanes, y[v]);
      if (byte) y[v] = clamp(mul(y[v], inverse), low, high);
    });
    if (byte) store_quantized<NV>(p.byte + t.at, y, zero_point);
    if (nan) {
      TQ_EACH_OF(NV, v) store(line + v * kLanes, y[v]); });
      mend(p.byte + t.at, line, NV * kLanes, nan);
    }
  }
}
using PlainRows = void (*)(const Op&, const Tile&, const int32_t*, int);
template <int NV, Operand other>
PlainRows plain_of(bool number, bool byte) {
  return number ? (byte ? plain_rows<NV, other, true, true> : plain_rows<NV, other, true, false>) : plain_rows<NV, other, false, true>;
}
template <int NV>
PlainRows plain_of(Operand other, bool number, bool byte) {
  switch (other) {
    case kFloats: return plain_of<NV, kFloats>(number, byte);
    case kBytes: return plain_of<NV, kBytes>(number, byte);
    default: return plain_of<NV, kAbsent>(number, byte);
  }
}
PlainRows plain_of(int nv, Operand other, bool number, bool byte) {
  switch (nv) {
    case 2: return plain_of<2>(other, number, byte);
    case 3: return plain_of<3>(other, number, byte);
    case 4: return plain_of<4>(other, number, byte);
    default: return plain_of<1>(other, number, byte);
  }
}

// What follows the sums most often, for which there are tiles that go on in registers: floats are stored; nothing but an
// addition of floats and a lower bound may come before that, and bytes, bounded above alone, after.
enum Ending { kOther = 0, kNumbers, kNumbersAndBytes, kSumNumbers, kSumNumbersAndBytes };

Ending ending_of(const Op& op, Operand other, bool plain) {
  bool bounded = op.after == tq::kClamp && op.after_high != INFINITY;
  if (!plain || op.direct || op.out_float < 0 || other == kBytes || bounded) return kOther;
  if (op.out_byte >= 0 && op.low + static_cast<float>(op.zero_point) != 0) return kOther;
  int bytes = op.out_byte >= 0;
  return Ending((other == kAbsent ? kNumbers : kSumNumbers) + bytes);
}

template <int MR, int NV, Ending ending, bool narrow>
void tile(const Op& op, const Tile& t) {
  constexpr int NR = NV * kPerVector, kBytes = 64 / kPerVector;
  R acc[MR][NR];
  TQ_EACH_OF(NR, v)
    R c = load_register(reinterpret_cast<const char*>(t.compensation) + v * kBytes);
    TQ_EACH_OF(MR, r) acc[r][v] = c; });
  });
  const int8_t* w = t.weights;
  int64_t block = t.block, depth = t.depth;
  for (int64_t k = 0; k < t.n_taps; ++k) {
    const uint8_t* a[MR];
    int64_t tap = t.taps[k] + t.skipped;
    TQ_EACH_OF(MR, r) a[r] = t.rows[r] + tap; });
    for (int64_t d = 0; d < depth; d += 4) {
      R b[NR];
      TQ_EACH_OF(NR, v) b[v] = load_register(w + v / kPerVector * block + v % kPerVector * kBytes); });
      w += 64;
      TQ_EACH_OF(MR, r)
        R x = broadcast_register(a[r] + d);
        TQ_EACH_OF(NR, v) acc[r][v] = dot_of<narrow>(acc[r][v], x, b[v]); });
      });
    }
  }
  if (ending != kOther) {
    constexpr bool sum = ending == kSumNumbers || ending == kSumNumbersAndBytes;
    constexpr bool bytes = ending == kNumbersAndBytes || ending == kSumNumbersAndBytes;
    F s[NV], b[NV];
    TQ_EACH_OF(NV, v)
      s[v] = load(t.scale + v * kLanes);
      b[v] = load(t.bias + v * kLanes);
    });
    F least = set(op.after == tq::kClamp ? op.after_low : -INFINITY), inverse = set(op.inverse), high = set(op.high);
    int zero = op.zero_point;
    TQ_EACH_OF(MR, r)
      Place p = t.places[r];
      float* number = p.number + t.at;
      const float* addend = reinterpret_cast<const float*>(p.other) + t.at;
      uint8_t* byte = p.byte + t.at;
      F y[NV];
      TQ_EACH_OF(NV, v)
        y[v] = fma(to_float(vector_of(acc[r][v * kPerVector], acc[r][v * kPerVector + kPerVector - 1])), s[v], b[v]);
        if (sum) y[v] = add(y[v], load(addend + v * kLanes));
        y[v] = max(least, y[v]);
        store(number + v * kLanes, y[v]);
        if (bytes) y[v] = min(high, mul(y[v], inverse));
      });
      if (bytes) store_quantized<NV>(byte, y, zero);
    });
    if (bytes && op.nan_byte) mend_rows(t, MR, NV * kLanes, op.nan_byte);
    return;
  }
  if (op.direct) {
    F s[NV], b[NV];
    TQ_EACH_OF(NV, v)
      s[v] = load(t.scale + v * kLanes);
      b[v] = load(t.bias + v * kLanes);
    });
    int zero = op.zero_point, low = op.low_byte, high = op.high_byte;
    TQ_EACH_OF(MR, r)
      F y[NV];
      TQ_EACH_OF(NV, v)
        y[v] = fma(to_float(vector_of(acc[r][v * kPerVector], acc[r][v * kPerVector + kPerVector - 1])), s[v], b[v]);
      });
      store_quantized<NV>(t.places[r].byte + t.at, y, zero, low, high);
    });
    return;
  }
  if (t.plain) {
    alignas(64) int32_t sums[MR][NV * kLanes];
    TQ_EACH_OF(MR, r)
      TQ_EACH_OF(NV, v)
        store_int(&sums[r][v * kLanes], vector_of(acc[r][v * kPerVector], acc[r][v * kPerVector + kPerVector - 1]));
      });
    });
    t.plain(op, t, &sums[0][0], MR);
    return;
  }
  alignas(64) float y[MR][NV * kLanes];
  TQ_EACH_OF(NV, v)
    F s = load(t.scale + v * kLanes), b = load(t.bias + v * kLanes);
    TQ_EACH_OF(MR, r)
      store(&y[r][v * kLanes], fma(to_float(vector_of(acc[r][v * kPerVector], acc[r][v * kPerVector + kPerVector - 1])), s, b));
    });
  });
  finish_any(op, &y[0][0], NV * kLanes, t.places, MR, t.at, t.n, t.other_float, t.tail);
}

using TileFunction = void (*)(const Op&, const Tile&);
template <int NV, bool narrow, Ending ending, int... M>
TileFunction tile_of(int mr, std::integer_sequence<int, M...>) {
  static const TileFunction table[] = {tile<kMaxMr[NV] - M, NV, ending, narrow>...};
  return table[kMaxMr[NV] - mr];
}
template <int NV, bool narrow>
TileFunction tile_of(int mr, Ending ending) {
  if (mr + 1 >= kMaxMr[NV]) {
    using Two = std::make_integer_sequence<int, 2>;
    switch (ending) {
      case kNumbers: return tile_of<NV, narrow, kNumbers>(mr, Two());
      case kNumbersAndBytes: return tile_of<NV, narrow, kNumbersAndBytes>(mr, Two());
      case kSumNumbers: return tile_of<NV, narrow, kSumNumbers>(mr, Two());
      case kSumNumbersAndBytes: return tile_of<NV, narrow, kSumNumbersAndBytes>(mr, Two());
      default: break;
    }
  }
  return tile_of<NV, narrow, kOther>(mr, std::make_integer_sequence<int, kMaxMr[NV]>());
}
template <bool narrow>
TileFunction tile_of(int mr, int nv, Ending ending) {
  switch (nv) {
    case 1: return tile_of<1, narrow>(mr, ending);
#if defined(TQ_WIDE)
    case 2: return tile_of<2, narrow>(mr, ending);
    case 3: return tile_of<3, narrow>(mr, ending);
    case 4: return tile_of<4, narrow>(mr, ending);
#endif
  }
  return nullptr;
}
TileFunction tile_of(const Op& op, int mr, int nv, Ending ending) {
  return kNarrowDot && op.narrow ? tile_of<kNarrowDot>(mr, nv, ending) : tile_of<false>(mr, nv, ending);
}

thread_local std::vector<uint8_t> scratch_bytes;
uint8_t* scratch(size_t bytes) {
  if (scratch_bytes.size() < bytes + 64) scratch_bytes.resize(bytes + 64);
  auto p = reinterpret_cast<uintptr_t>(scratch_bytes.data());
  return reinterpret_cast<uint8_t*>((p + 63) / 64 * 64);
}

constexpr int64_t kBlockOfA = 192 * 1024;  // bytes of the left operand that stay in the second-level cache
constexpr int64_t kMostRows = 2048;

// Where the windows of some output pixels begin, and where their results go.
struct Rows {
  std::vector<const uint8_t*> from;
  std::vector<Place> to;
  void find(const Op& op, const Bound& b, const Outputs& outputs, int64_t begin, int64_t end) {
    if (int64_t(from.size()) < end - begin) {
      from.resize(end - begin);
      to.resize(end - begin);
    }
    const Value& out = b.values[out_value(op)];
    int64_t step = int64_t(op.sw) * b.values[op.input].stride;
    Walk walk(out, begin);
    for (int64_t i = 0; i < end - begin;) {  // line by line
      const uint8_t* source = pixel(b, op.input, walk.sample, walk.y * op.sh - op.pt, walk.x * op.sw - op.pl);
      Place place = outputs.at(walk.sample, walk.y, walk.x);
      int64_t n = std::min(out.w - walk.x, end - begin - i);
      for (int64_t k = i; k < i + n; ++k) {
        from[k] = source;
        to[k] = place;
        source += step;
        outputs.next(place);
      }
      i += n;
      walk.x += n - 1;
      walk.next();
    }
  }
};
thread_local Rows rows_of_block;

void conv(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  const Value& in = b.values[op.input];
  // taps side by side in memory are one longer tap
  bool joined = op.dw == 1 && in.stride == op.depth;
  int64_t columns = joined ? 1 : op.kw, depth = joined ? op.depth * op.kw : op.depth;
  int64_t n_taps = op.kh * columns, blocks = (op.channels + kLanes - 1) / kLanes;
  int64_t unit = op.group_out ? op.group_panel : 1, units = (blocks + unit - 1) / unit;
  int64_t first = units * part / parts * unit, last = std::min(blocks, units * (part + 1) / parts * unit);
  std::vector<int32_t> taps(n_taps);
  for (int64_t k = 0; k < n_taps; ++k)
    taps[k] = int32_t(((k / columns) * op.dh * row_pixels(in) + (k % columns) * op.dw) * in.stride);
  Tile t;
  Outputs outputs(op, b);
  t.taps = taps.data();
  t.n_taps = n_taps;
  t.depth = depth;
  t.block = n_taps * depth * kLanes;
  t.skipped = 0;
  t.other_float = outputs.other_float;
  t.tail = outputs.tail;
  bool plain = op.before == tq::kNone && (op.after == tq::kNone || op.after == tq::kClamp) && op.binary != tq::kMul &&
            op.other_broadcast == 0 && !(t.tail && op.channels % kLanes);
  Operand other = op.other < 0 ? kAbsent : t.other_float ? kFloats : kBytes;
  Ending ending = ending_of(op, other, plain);
  const auto* weights = reinterpret_cast<const int8_t*>(b.blob + int64_t(op.weights) * tq::kUnit);
  const auto* compensation = reinterpret_cast<const int32_t*>(factors(op, b) + int64_t(op.compensation) * tq::kUnit);
  const auto* scale = reinterpret_cast<const float*>(factors(op, b) + int64_t(op.scale) * tq::kUnit);
  const auto* bias = reinterpret_cast<const float*>(b.blob + int64_t(op.bias) * tq::kUnit);
  int64_t rows = std::max<int64_t>(kBlockOfA / std::max<int64_t>(op.kh * op.kw == 1 ? op.depth : op.depth * 2, 1), 24);
  rows = std::min(rows, kMostRows);
  int64_t usual = kMaxNv == 4 && blocks % 3 == 0 && (end - begin) % kMaxMr[3] == 0 ? 3 : kMaxNv;
  int64_t chosen = op.group_out ? op.group_panel : op.panel, widest = chosen ? std::min<int64_t>(chosen, kMaxNv) : usual;
  int64_t panels = (last - first + widest - 1) / widest;
  Rows& block = rows_of_block;
  for (int64_t m0 = begin; m0 < end; m0 += rows) {
    int64_t m1 = std::min(end, m0 + rows);
    block.find(op, b, outputs, m0, m1);
    for (int64_t panel = 0; panel < panels; ++panel) {
      int64_t from = first + (last - first) * panel / panels, to = first + (last - first) * (panel + 1) / panels;
      if (op.group_out) {
        from = first + panel * widest;
        to = std::min(last, from + widest);
        int64_t group = from / op.group_panel * op.group_panel * kLanes / op.group_out;
        t.skipped = std::min<int64_t>(group * op.group_in, in.stride - op.depth);
      }
      int nv = int(to - from), most = kMaxMr[nv];
      t.weights = weights + from * t.block;
      t.plain = plain && ending == kOther ? plain_of(nv, other, op.out_float >= 0, op.out_byte >= 0) : nullptr;
      t.compensation = compensation + from * kLanes;
      t.scale = scale + from * kLanes;
      t.bias = bias + from * kLanes;
      t.at = from * kLanes;
      t.n = std::min<int64_t>(op.channels, to * kLanes) - t.at;
      int64_t tiles = (m1 - m0 + most - 1) / most, size = (m1 - m0) / tiles, larger = (m1 - m0) % tiles;
      TileFunction large = tile_of(op, int(larger ? size + 1 : size), nv, ending), small = tile_of(op, int(size), nv, ending);
      t.rows = block.from.data();
      t.places = block.to.data();
      for (int64_t i = 0; i < tiles; ++i) {
        int64_t mr = size + (i < larger);
        (i < larger ? large : small)(op, t);
        t.rows += mr;
        t.places += mr;
      }
    }
  }
}

// ---- depthwise: the window's rows interleaved by fours, so that one dot product takes four taps -------------------
//
// Channels go in blocks of 64, then one of 32 and one of 16 as needed. Interleaving four byte vectors leaves channels in
// the order of `interleave_channels` in plan.py, in which weights and constants are packed: J vectors of 16 lanes.

template <int J>
struct Block {
  static TQ_INLINE int channel(int vector, int lane);
};
// 64: vector j, lane 4 i + t -> 16 i + 4 j + t. 32: lane 8 h + 4 i + t of vector v -> 16 i + 4 (2 v + h) + t. 16: as is.
template <> TQ_INLINE int Block<4>::channel(int j, int lane) { return 16 * (lane / 4) + 4 * j + lane % 4; }
template <> TQ_INLINE int Block<2>::channel(int v, int lane) { return 16 * (lane / 4 % 2) + 4 * (2 * v + lane / 8) + lane % 4; }
template <> TQ_INLINE int Block<1>::channel(int, int lane) { return lane; }

template <int J>
TQ_INLINE void interleave(const uint8_t* const* rows, uint8_t* to) {
#if defined(TQ_WIDE)
  if (J == 4) {
    __m512i a = _mm512_loadu_si512(rows[0]), b = _mm512_loadu_si512(rows[1]);
    __m512i c = _mm512_loadu_si512(rows[2]), d = _mm512_loadu_si512(rows[3]);
    __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
    __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(ab, cd));
    _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(ab, cd));
    _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(AB, CD));
    _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(AB, CD));
    return;
  }
#endif
#if defined(__AVX2__) && !defined(TQ_PORTABLE)
  if (J > 1) {
    for (int half = 0; half < J / 2; ++half) {  // 32 channels; of 64 the vectors have both halves side by side
      auto get = [half](const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + half); };
      auto put = [&](int i, __m256i x) { _mm256_store_si256(reinterpret_cast<__m256i*>(to) + i * (J / 2) + half, x); };
      __m256i a = get(rows[0]), b = get(rows[1]), c = get(rows[2]), d = get(rows[3]);
      __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
      __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
      put(0, _mm256_unpacklo_epi16(ab, cd));
      put(1, _mm256_unpackhi_epi16(ab, cd));
      put(2, _mm256_unpacklo_epi16(AB, CD));
      put(3, _mm256_unpackhi_epi16(AB, CD));
    }
    return;
  }
  if (J == 1) {
    auto get = [](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    auto put = [&](int i, __m128i x) { _mm_store_si128(reinterpret_cast<__m128i*>(to) + i, x); };
    __m128i a = get(rows[0]), b = get(rows[1]), c = get(rows[2]), d = get(rows[3]);
    __m128i ab = _mm_unpacklo_epi8(a, b), AB = _mm_unpackhi_epi8(a, b);
    __m128i cd = _mm_unpacklo_epi8(c, d), CD = _mm_unpackhi_epi8(c, d);
    put(0, _mm_unpacklo_epi16(ab, cd));
    put(1, _mm_unpackhi_epi16(ab, cd));
    put(2, _mm_unpacklo_epi16(AB, CD));
    put(3, _mm_unpackhi_epi16(AB, CD));
    return;
  }
#endif
  for (int j = 0; j < J; ++j)
    for (int lane = 0; lane < 16; ++lane)
      for (int k = 0; k < 4; ++k) to[j * 64 + lane * 4 + k] = rows[k][Block<J>::channel(j, lane)];
}

// As store_quantized, of 16 J channels in the order that interleaving gave them.
template <int J>
TQ_INLINE void store_block(uint8_t* p, const F* y, int zero, int low, int high) {
#if defined(TQ_WIDE)
  __m512i q[J];
  for (int j = 0; j < J; ++j) q[j] = _mm512_cvtps_epi32(y[j]);
  if (J == 4) {
    __m512i z = _mm512_set1_epi16(short(zero));
    __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[J > 1 ? 1 : 0]), z);
    __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(q[J > 2 ? 2 : 0], q[J > 3 ? 3 : 0]), z);
    __m512i c = _mm512_max_epu8(_mm512_packus_epi16(a, b), _mm512_set1_epi8(char(low)));
    _mm512_storeu_si512(p, _mm512_min_epu8(c, _mm512_set1_epi8(char(high))));
    return;
  }
  if (J == 2) {
    auto half = [&](int j, int h) { return h ? _mm512_extracti64x4_epi64(q[j], 1) : _mm512_castsi512_si256(q[j]); };
    int last = J > 1 ? 1 : 0;
    __m256i z = _mm256_set1_epi16(short(zero));
    __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(half(0, 0), half(0, 1)), z);
    __m256i b = _mm256_adds_epi16(_mm256_packs_epi32(half(last, 0), half(last, 1)), z);
    __m256i c = _mm256_max_epu8(_mm256_packus_epi16(a, b), _mm256_set1_epi8(char(low)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_min_epu8(c, _mm256_set1_epi8(char(high))));
    return;
  }
#endif
  if (J == 1) {
    store_quantized<1>(p, y, zero, low, high);
    return;
  }
#if defined(__AVX2__) && !defined(TQ_WIDE) && !defined(TQ_PORTABLE)
  // eight lanes of four vectors are 32 channels: of 64 the first halves of all, of 32 both halves of both
  auto eight = [&](int half, int k) { return J == 4 ? (half ? y[k % J].w : y[k % J].v) : (k % 2 ? y[k / 2].w : y[k / 2].v); };
  for (int half = 0; half < J / 2; ++half) {
    __m256i q[4];
    for (int k = 0; k < 4; ++k) q[k] = _mm256_cvtps_epi32(eight(half, k));
    __m256i z = _mm256_set1_epi16(short(zero));
    __m256i a = _mm256_adds_epi16(_mm256_packs_epi32(q[0], q[1]), z), b = _mm256_adds_epi16(_mm256_packs_epi32(q[2], q[3]), z);
    __m256i c = _mm256_max_epu8(_mm256_packus_epi16(a, b), _mm256_set1_epi8(char(low)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p) + half, _mm256_min_epu8(c, _mm256_set1_epi8(char(high))));
  }
  return;
#endif
  uint8_t bytes[J][16];
  for (int j = 0; j < J; ++j) store_quantized<1>(bytes[j], y + j, zero, low, high);
  for (int j = 0; j < J; ++j)
    for (int lane = 0; lane < 16; ++lane) p[Block<J>::channel(j, lane)] = bytes[j][lane];
}

#if defined(TQ_WIDE)
constexpr int kMaxX[5] = {0, 8, 8, 0, 5};
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kMaxX[5] = {0, 4, 2, 0, 2};
#else
constexpr int kMaxX[5] = {0, 2, 1, 0, 1};
#endif

// One block of channels of one output row.
struct Line {
  int64_t step;          // from an output pixel to the next
  const int32_t* taps;
  int64_t n_taps;
  const int8_t* weights;
  const int32_t* compensation;
  const float *scale, *bias;
  int64_t at, n;
};

template <int J, bool narrow, int XB>
void depthwise_tile(const Op& op, const Line& l, const uint8_t* from, const Outputs& outputs, Place place) {
  // as many vectors at a time as there are registers for
  constexpr int kTurns = kPerVector == 2 && J == 4 ? 2 : 1, JT = J / kTurns, JR = JT * kPerVector, kBytes = 64 / kPerVector;
  F results[XB][J];
  TQ_EACH_OF(kTurns, turn)
    const auto* compensation = reinterpret_cast<const char*>(l.compensation) + turn * JT * 64;
    R acc[XB][JR];
    TQ_EACH_OF(JR, j)
      R c = load_register(compensation + j * kBytes);
      TQ_EACH_OF(XB, i) acc[i][j] = c; });
    });
    int64_t step = l.step;
    const int8_t* weights = l.weights + turn * JT * 64;
    for (int64_t k = 0; k < l.n_taps; ++k, weights += J * 64) {
      const uint8_t* p = from + l.taps[k] + turn * JT * 64;
      R w[JR];
      TQ_EACH_OF(JR, j) w[j] = load_register(weights + j * kBytes); });
      TQ_EACH_OF(XB, i)
        TQ_EACH_OF(JR, j) acc[i][j] = dot_of<narrow>(acc[i][j], load_register(p + i * step + j * kBytes), w[j]); });
      });
    }
    TQ_EACH_OF(JT, t)
      constexpr int j = decltype(turn)::value * JT + decltype(t)::value;
      F scale = load(l.scale + j * kLanes), bias = load(l.bias + j * kLanes);
      TQ_EACH_OF(XB, i)
        results[i][j] = fma(to_float(vector_of(acc[i][t * kPerVector], acc[i][t * kPerVector + kPerVector - 1])), scale, bias);
      });
    });
  });
  TQ_EACH_OF(XB, i)
    const F* z = results[i];
    if (op.direct) {
      store_block<J>(place.byte + l.at, z, op.zero_point, op.low_byte, op.high_byte);
    } else {
      alignas(64) float lanes[J][16], natural[J * 16];
      TQ_EACH_OF(J, j) store(lanes[j], z[j]); });
      for (int j = 0; j < J; ++j)
        for (int lane = 0; lane < 16; ++lane) natural[Block<J>::channel(j, lane)] = lanes[j][lane];
      finish_any(op, natural, 0, &place, 1, l.at, l.n, outputs.other_float, outputs.tail);
    }
    outputs.next(place);
  });
}

using LineFunction = void (*)(const Op&, const Line&, const uint8_t*, const Outputs&, Place);
template <int J, bool narrow, int... X>
LineFunction line_of(int64_t xb, std::integer_sequence<int, X...>) {
  static const LineFunction table[] = {depthwise_tile<J, narrow, X + 1>...};
  return table[xb - 1];
}
template <int J>
LineFunction line_of(const Op& op, int64_t xb) {
  using Pixels = std::make_integer_sequence<int, kMaxX[J]>;
  return kNarrowDot && op.narrow ? line_of<J, kNarrowDot>(xb, Pixels()) : line_of<J, false>(xb, Pixels());
}

// How a window's taps are grouped by four: down the rows, and along the last row where it would be alone in its group.
struct Groups {
  int64_t down, along, n_taps;
  explicit Groups(const Op& op) {
    bool alone = op.kh % 4 == 1 && op.kh > 1;
    down = alone ? op.kh / 4 : (op.kh + 3) / 4;
    along = alone ? (op.kw + 3) / 4 : 0;
    n_taps = down * op.kw + along;
  }
  int64_t each() const { return down + (along > 0); }  // vectors of a pixel in a line
};

template <int J>
void interleave_rows(const uint8_t* const* from, int64_t stride, int64_t from_x, int64_t to_x, uint8_t* to, int64_t pixel_bytes) {
  const uint8_t* rows[4] = {from[0], from[1], from[2], from[3]};
  for (int64_t x = from_x; x < to_x; ++x, to += pixel_bytes) {
    interleave<J>(rows, to);
    for (int k = 0; k < 4; ++k) rows[k] += stride;
  }
}

// One block of channels of the output rows y and, where `rows` is 2, y + 1, whose windows share what is interleaved.
template <int J>
void depthwise_block(const Op& op, const Bound& b, Line& l, uint8_t* line, int64_t sample, int64_t y, int rows,
                     int64_t set_bytes, const Outputs& outputs) {
  const Value& in = b.values[op.input];
  const Value& out = b.values[out_value(op)];
  Groups groups(op);
  int64_t width = (out.w - 1) * op.sw + (op.kw - 1) * op.dw + 1, pixel_bytes = groups.each() * J * 64;
  int64_t last = op.kh - 1 + (rows - 1);
  auto row_at = [&](int64_t tap) {
    return pixel(b, op.input, sample, y * op.sh - op.pt + std::min(tap, last) * op.dh, -op.pl) + l.at;
  };
  for (int64_t g = 0; g < groups.down; ++g) {
    const uint8_t* from[4] = {row_at(4 * g), row_at(4 * g + 1), row_at(4 * g + 2), row_at(4 * g + 3)};
    interleave_rows<J>(from, in.stride, 0, width, line + g * J * 64, pixel_bytes);
  }
  if (groups.along) {
    const uint8_t* row = row_at(op.kh - 1);
    int64_t whole = std::max<int64_t>(width - 3 * op.dw, 0), step = op.dw * in.stride;
    const uint8_t* from[4] = {row, row + step, row + 2 * step, row + 3 * step};
    uint8_t* to = line + groups.down * J * 64;
    interleave_rows<J>(from, in.stride, 0, whole, to, pixel_bytes);
    for (int64_t x = whole; x < width; ++x) {  // the window ends: what lies beyond has weights of zero
      for (int64_t k = 0; k < 4; ++k) from[k] = row + std::min(x + k * op.dw, width - 1) * in.stride;
      interleave<J>(from, to + x * pixel_bytes);
    }
  }
  int32_t taps[512];
  for (int64_t g = 0; g < groups.down; ++g)
    for (int64_t k = 0; k < op.kw; ++k) taps[g * op.kw + k] = int32_t(k * op.dw * pixel_bytes + g * J * 64);
  for (int64_t k = 0; k < groups.along; ++k)
    taps[groups.down * op.kw + k] = int32_t(4 * k * op.dw * pixel_bytes + groups.down * J * 64);
  l.taps = taps;
  l.step = op.sw * pixel_bytes;
  int64_t tiles = (out.w + kMaxX[J] - 1) / kMaxX[J], size = out.w / tiles, larger = out.w % tiles;
  LineFunction small = line_of<J>(op, size), large = larger ? line_of<J>(op, size + 1) : small;
  for (int row = 0; row < rows; ++row) {
    Place place = outputs.at(sample, y + row, 0);
    const uint8_t* from = line;
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t xb = size + (i < larger);
      (i < larger ? large : small)(op, l, from, outputs, place);
      from += xb * l.step;
      for (int64_t x = 0; x < xb; ++x) outputs.next(place);
    }
    l.weights += set_bytes;
  }
}

void depthwise(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& out = b.values[out_value(op)];
  Outputs outputs(op, b);
  Groups groups(op);
  int64_t padded = (op.channels + 15) / 16 * 16, set_bytes = padded * groups.n_taps * 4;
  uint8_t* line = scratch(size_t(((out.w - 1) * op.sw + (op.kw - 1) * op.dw + 1) * groups.each() * 256));
  Line l;
  l.n_taps = groups.n_taps;
  const auto* weights = reinterpret_cast<const int8_t*>(b.blob + int64_t(op.weights) * tq::kUnit);
  const auto* compensation = reinterpret_cast<const int32_t*>(b.blob + int64_t(op.compensation) * tq::kUnit);
  const auto* scale = reinterpret_cast<const float*>(b.blob + int64_t(op.scale) * tq::kUnit);
  const auto* bias = reinterpret_cast<const float*>(b.blob + int64_t(op.bias) * tq::kUnit);
  bool pairs = op.kh == 3 && op.sh == 1 && op.dh == 1;  // and a second set of weights, one row lower
  for (int64_t row = begin; row < end;) {
    int64_t sample = row / out.h, y = row % out.h;
    int rows = pairs && row + 1 < end && y + 1 < out.h ? 2 : 1;
    for (int64_t at = 0; at < padded;) {
      int64_t left = padded - at, width = left >= 64 ? 64 : left >= 32 ? 32 : 16;
      l.at = at;
      l.n = std::min<int64_t>(op.channels - at, width);
      l.weights = weights + at * groups.n_taps * 4;
      l.compensation = compensation + at;
      l.scale = scale + at;
      l.bias = bias + at;
      if (width == 64) depthwise_block<4>(op, b, l, line, sample, y, rows, set_bytes, outputs);
      else if (width == 32) depthwise_block<2>(op, b, l, line, sample, y, rows, set_bytes, outputs);
      else depthwise_block<1>(op, b, l, line, sample, y, rows, set_bytes, outputs);
      at += width;
    }
    row += rows;
  }
}

// ---- the rest ------------------------------------------------------------------------------------------------------

// One pixel's channels as floats, dequantized.
const float* numbers(const Op& op, const Bound& b, int64_t sample, int64_t y, int64_t x, float* room) {
  const Value& in = b.values[op.input];
  const uint8_t* p = pixel(b, op.input, sample, y, x);
  if (in.is_float && (in.external < 0 || in.c % kLanes == 0)) return reinterpret_cast<const float*>(p);
  if (in.is_float) {  // a caller's tensor ends where it ends
    std::memcpy(room, p, size_t(in.c) * 4);
    return room;
  }
  F zero = set(static_cast<float>(in.zero_point)), scale = set(op.input_scale);
  for (int64_t c = 0; c < in.c; c += kLanes) store(room + c, mul(sub(from_bytes(p + c), zero), scale));
  return room;
}

void elementwise(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& out = b.values[out_value(op)];
  Outputs outputs(op, b);
  auto* room = reinterpret_cast<float*>(scratch(size_t(op.channels + kLanes) * 4));
  Walk walk(out, begin);
  for (int64_t i = begin; i < end; ++i, walk.next()) {
    Place place = outputs.at(walk.sample, walk.y, walk.x);
    finish_any(op, numbers(op, b, walk.sample, walk.y, walk.x, room), 0, &place, 1, 0, op.channels, outputs.other_float, outputs.tail);
  }
}

// A caller's (samples, c, h, w) floats into channels last; units are image rows.
void import(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& in = b.values[op.input];
  const Value& out = b.values[out_value(op)];
  Outputs outputs(op, b);
  const auto* source = reinterpret_cast<const float*>(b.base[op.input]);
  F inverse = set(op.inverse), low = set(op.low), high = set(op.high);
  I zero = set_int(op.zero_point), nan = set_int(op.nan_byte);
  for (int64_t row = begin; row < end; ++row) {
    int64_t sample = row / out.h, y = row % out.h;
    Place place = outputs.at(sample, y, 0);
    const float* from = source + (sample * in.c * in.h + y) * in.w;
    if (place.byte && out.stride == 4) {  // images: the bytes of a pixel side by side, in one store
      for (int64_t x = 0; x < out.w; x += kLanes) {
        int64_t n = std::min<int64_t>(kLanes, out.w - x);
        auto channel = [&](int64_t c) {
          if (c >= in.c) return set_int(0);
          const float* p = from + c * in.h * in.w + x;
          alignas(64) float t[kLanes] = {};
          if (n < kLanes) {
            std::memcpy(t, p, size_t(n) * 4);
            p = t;
          }
          return codes(clamp(mul(load(p), inverse), low, high), zero, nan);
        };
        I pixels = add(add(channel(0), shift_left<8>(channel(1))), add(shift_left<16>(channel(2)), shift_left<24>(channel(3))));
        if (n == kLanes) {
          store_int(place.byte + x * 4, pixels);
        } else {
          uint8_t bytes[64];
          store_int(bytes, pixels);
          std::memcpy(place.byte + x * 4, bytes, size_t(n) * 4);
        }
      }
      continue;
    }
    // lines without a border are one long line
    int64_t lines = row_pixels(out) == out.w ? std::min(end - row, out.h - y) : 1, pixels = lines * out.w;
    for (int64_t x = 0; x < pixels; x += kLanes)
      for (int64_t c = 0; c < in.c; c += kLanes) {
        int64_t wide = std::min<int64_t>(kLanes, pixels - x), deep = std::min<int64_t>(kLanes, in.c - c);
        F t[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) t[i] = i < deep ? load_first(from + (c + i) * in.h * in.w + x, wide) : set(0.0f);
        turn(t);
        for (int64_t i = 0; i < wide; ++i) {
          int64_t at = (x + i) * out.stride + c;
          if (place.byte) store_bytes(place.byte + at, clamp(mul(t[i], inverse), low, high), zero, nan);
          if (place.number) store(place.number + at, t[i]);
        }
      }
    row += lines - 1;
  }
}

// The other way; units are image rows.
void export_(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& in = b.values[op.input];
  auto* to = reinterpret_cast<float*>(b.base[op.out_float]);
  F zero = set(static_cast<float>(in.zero_point)), scale = set(op.input_scale);
  for (int64_t row = begin; row < end;) {
    int64_t sample = row / in.h, y = row % in.h;
    int64_t lines = row_pixels(in) == in.w ? std::min(end - row, in.h - y) : 1, pixels = lines * in.w;
    const uint8_t* from = pixel(b, op.input, sample, y, 0);
    auto* line = to + (sample * in.c * in.h + y) * in.w;
    for (int64_t x = 0; x < pixels; x += kLanes)
      for (int64_t c = 0; c < in.c; c += kLanes) {
        int64_t wide = std::min<int64_t>(kLanes, pixels - x), deep = std::min<int64_t>(kLanes, in.c - c);
        F t[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          int64_t at = (x + i) * in.stride + c;
          if (i >= wide) t[i] = set(0.0f);
          else if (in.is_float) t[i] = load_first(reinterpret_cast<const float*>(from) + at, deep);
          else t[i] = mul(sub(from_bytes(from + at), zero), scale);
        }
        turn(t);
        for (int64_t i = 0; i < deep; ++i) store_first(line + (c + i) * in.h * in.w + x, t[i], wide);
      }
    row += lines;
  }
}

// Mean over the pixels of a sample; units are samples.
void mean(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& in = b.values[op.input];
  Outputs outputs(op, b);
  int64_t padded = (op.channels + kLanes - 1) / kLanes * kLanes;
  auto* total = reinterpret_cast<float*>(scratch(size_t(2 * padded + kLanes) * 4));
  float* room = total + padded;
  F share = set(1.0f / static_cast<float>(in.h * in.w));
  for (int64_t sample = begin; sample < end; ++sample) {
    std::memset(total, 0, size_t(padded) * 4);
    for (int64_t y = 0; y < in.h; ++y)
      for (int64_t x = 0; x < in.w; ++x) {
        const float* p = numbers(op, b, sample, y, x, room);
        for (int64_t c = 0; c < padded; c += kLanes) store(total + c, add(load(total + c), load(p + c)));
      }
    for (int64_t c = 0; c < padded; c += kLanes) store(total + c, mul(load(total + c), share));
    Place place = outputs.at(sample, 0, 0);
    finish_any(op, total, 0, &place, 1, 0, op.channels, outputs.other_float, outputs.tail);
  }
}

// As largest_of, and NaN where a number of a channel is NaN.
__attribute__((noinline)) void largest_or_nan(const float* from, int64_t rows, int64_t row_step, int64_t columns, int64_t step,
                                              float* to, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) to[c] = -INFINITY;
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x) {
      const auto* p = reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(from) + y * row_step + x * step);
      for (int64_t c = 0; c < channels; ++c) to[c] = p[c] > to[c] || p[c] != p[c] ? p[c] : to[c];
    }
}

// The largest of `rows` by `columns` pixels, `row_step` and `step` bytes apart: N vectors of 16 channels, bytes or floats.
template <class T, int N>
TQ_INLINE void largest_of(const T* from, int64_t rows, int64_t row_step, int64_t columns, int64_t step, T* to) {
  constexpr bool floats = std::is_same<T, float>::value;
  using Vector = std::conditional_t<floats, F, Bytes>;
  auto get = [](const T* p) {
    if constexpr (floats) return load(p);
    else return load_bytes(p);
  };
  Vector most[N];
  F check[N];  // NaN from an infinity or NaN on, which `max` may pass over
  TQ_EACH_OF(N, v)
    most[v] = get(from + kLanes * v);
    check[v] = set(0.0f);
  });
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x) {
      const T* p = reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(from) + y * row_step + x * step);
      TQ_EACH_OF(N, v)
        Vector x = get(p + kLanes * v);
        most[v] = max(most[v], x);
        if constexpr (floats) check[v] = fma(x, set(0.0f), check[v]);
      });
    }
  if constexpr (floats) {
    int bad = 0;
    TQ_EACH_OF(N, v) bad |= unordered(check[v]); });
    if (bad) return largest_or_nan(from, rows, row_step, columns, step, to, N * kLanes);
  }
  TQ_EACH_OF(N, v) std::memcpy(to + kLanes * v, &most[v], sizeof(T) * kLanes); });
}

template <class T>
void pool_pixel(const T* from, int64_t rows, int64_t row_step, int64_t columns, int64_t step, T* to, int64_t channels) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) largest_of<T, 4>(from + c, rows, row_step, columns, step, to + c);
  for (; c < channels; c += kLanes) largest_of<T, 1>(from + c, rows, row_step, columns, step, to + c);
}

// Largest byte or float of a window, which the border does not join; units are output pixels.
void max_pool(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& in = b.values[op.input];
  const Value& out = b.values[out_value(op)];
  Outputs outputs(op, b);
  auto* line = reinterpret_cast<float*>(scratch(size_t(op.channels + kLanes) * 4));
  int64_t pixel_bytes = in.stride * element_size(in), row_step = op.dh * row_pixels(in) * pixel_bytes, step = op.dw * pixel_bytes;
  Walk walk(out, begin);
  for (int64_t i = begin; i < end; ++i, walk.next()) {
    Place place = outputs.at(walk.sample, walk.y, walk.x);
    auto inside = [](int64_t start, int64_t taps, int64_t dilation, int64_t size, int64_t* first) {  // how many taps are
      *first = start < 0 ? (-start + dilation - 1) / dilation : 0;
      return std::min(taps, (size - 1 - start) / dilation + 1) - *first;
    };
    int64_t y = walk.y * op.sh - op.pt, x = walk.x * op.sw - op.pl, ky, kx;
    int64_t rows = inside(y, op.kh, op.dh, in.h, &ky), columns = inside(x, op.kw, op.dw, in.w, &kx);
    const uint8_t* from = pixel(b, op.input, walk.sample, y + ky * op.dh, x + kx * op.dw);
    if (in.is_float) {
      pool_pixel(reinterpret_cast<const float*>(from), rows, row_step, columns, step, line, op.channels);
      finish_any(op, line, 0, &place, 1, 0, op.channels, outputs.other_float, outputs.tail);
    } else {
      pool_pixel(from, rows, row_step, columns, step, place.byte, op.channels);
    }
  }
}

// The border of a value; units are samples.
void halo(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& v = b.values[op.out_byte >= 0 ? op.out_byte : op.out_float];
  int32_t index = op.out_byte >= 0 ? op.out_byte : op.out_float;
  int fill = v.is_float ? 0 : v.zero_point;
  size_t size = size_t(v.stride * element_size(v));
  for (int64_t sample = begin; sample < end; ++sample) {
    size_t row = size_t(row_pixels(v)) * size;
    if (v.top) std::memset(pixel(b, index, sample, -v.top, -v.left), fill, row * v.top);
    for (int64_t y = 0; y < v.h; ++y) {
      if (v.left) std::memset(pixel(b, index, sample, y, -v.left), fill, size * v.left);
      if (v.right) std::memset(pixel(b, index, sample, y, v.w), fill, size * v.right);
    }
    if (v.bottom) std::memset(pixel(b, index, sample, v.h, -v.left), fill, row * v.bottom);
  }
}

// Blocks of channels become pixels: each pixel of the input holds `sh` by `sw` pixels of each group of `group_out` channels;
// `pt` and `pl` pixels in front of the result are left out. Units are rows of the result.
void shuffle(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  int64_t value = out_value(op), cell = int64_t(op.sh) * op.sw, group = op.group_out;
  const Value& out = b.values[value];
  size_t size = size_t(element_size(out)), bytes = size_t(group) * size;
  for (int64_t row = begin; row < end; ++row) {
    int64_t sample = row / out.h, y = row % out.h + op.pt;
    uint8_t* to = pixel(b, int32_t(value), sample, row % out.h, 0);
    for (int64_t x = op.pl; x < out.w + op.pl; ++x, to += size_t(out.stride) * size) {
      const uint8_t* from = pixel(b, op.input, sample, y / op.sh, x / op.sw) + size_t(y % op.sh * op.sw + x % op.sw) * bytes;
      for (int64_t g = 0; g < out.c; g += group) std::memcpy(to + size_t(g) * size, from + size_t(g * cell) * size, bytes);
    }
  }
}

// Layer norm over the channels of a pixel; units are pixels.
void layer_norm(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t, int64_t) {
  const Value& out = b.values[out_value(op)];
  Outputs outputs(op, b);
  int64_t n = op.channels, padded = (n + kLanes - 1) / kLanes * kLanes;
  auto* line = reinterpret_cast<float*>(scratch(size_t(2 * padded + kLanes) * 4));
  float* room = line + padded;
  const auto* weight = reinterpret_cast<const float*>(b.blob + int64_t(op.scale) * tq::kUnit);
  const auto* bias = reinterpret_cast<const float*>(b.blob + int64_t(op.bias) * tq::kUnit);
  Walk walk(out, begin);
  for (int64_t i = begin; i < end; ++i, walk.next()) {
    const float* p = numbers(op, b, walk.sample, walk.y, walk.x, room);
    F totals[4], squares[4];  // four at a time: each addition waits for the one before
    TQ_EACH_OF(4, v) totals[v] = squares[v] = set(0); });
    int64_t c = 0;
    for (; c + 4 * kLanes <= n; c += 4 * kLanes) {
      TQ_EACH_OF(4, v) totals[v] = add(totals[v], load(p + c + v * kLanes)); });
    }
    for (; c + kLanes <= n; c += kLanes) totals[0] = add(totals[0], load(p + c));
    float mu = sum(add(add(totals[0], totals[1]), add(totals[2], totals[3])));
    for (int64_t k = c; k < n; ++k) mu += p[k];
    mu /= static_cast<float>(n);
    F middle = set(mu);
    for (c = 0; c + 4 * kLanes <= n; c += 4 * kLanes) {
      TQ_EACH_OF(4, v)
        F d = sub(load(p + c + v * kLanes), middle);
        squares[v] = fma(d, d, squares[v]);
      });
    }
    for (; c + kLanes <= n; c += kLanes) {
      F d = sub(load(p + c), middle);
      squares[0] = fma(d, d, squares[0]);
    }
    F square = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
    float variance = sum(square);
    for (int64_t k = c; k < n; ++k) variance += (p[k] - mu) * (p[k] - mu);
    float share = 1.0f / std::sqrt(variance / static_cast<float>(n) + op.factor);
    for (int64_t k = 0; k < padded; k += kLanes) {
      F d = mul(sub(load(p + k), middle), set(share));
      store(line + k, fma(d, load(weight + k), load(bias + k)));
    }
    Place place = outputs.at(walk.sample, walk.y, walk.x);
    finish_any(op, line, 0, &place, 1, 0, n, outputs.other_float, outputs.tail);
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// to (columns, 16) from 16 rows of `from`, a stride apart; `rows` of them exist.
TQ_INLINE void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  int64_t c = 0;
  for (; rows == 16 && c + 16 <= columns; c += 16) {
    F a[16];
    for (int i = 0; i < 16; ++i) a[i] = load(from + i * stride + c);
    turn(a);
    for (int i = 0; i < 16; ++i) store(to + (c + i) * to_stride, a[i]);
  }
  for (; c < columns; ++c)
    for (int64_t r = 0; r < 16; ++r) to[c * to_stride + r] = r < rows ? from[r * stride + c] : 0.0f;
}

#if defined(TQ_WIDE)
constexpr int kRowsOfScores = 12, kVectorsOfScores = 2;
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kRowsOfScores = 6, kVectorsOfScores = 1;
#else
constexpr int kRowsOfScores = 2, kVectorsOfScores = 1;
#endif

// to (MR, NV * 16) = a (MR, depth) b (depth, NV * 16); strides in floats.
template <int MR, int NV>
void float_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* to, int64_t to_stride) {
  F acc[MR][NV];
  TQ_EACH_OF(MR, r)
    TQ_EACH_OF(NV, v) acc[r][v] = set(0.0f); });
  });
  for (int64_t d = 0; d < depth; ++d) {
    F w[NV];
    TQ_EACH_OF(NV, v) w[v] = load(b + d * b_stride + v * kLanes); });
    TQ_EACH_OF(MR, r)
      F x = set(a[r * a_stride + d]);
      TQ_EACH_OF(NV, v) acc[r][v] = fma(x, w[v], acc[r][v]); });
    });
  }
  TQ_EACH_OF(MR, r)
    TQ_EACH_OF(NV, v) store(to + r * to_stride + v * kLanes, acc[r][v]); });
  });
}
using FloatTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template <int NV, int... M>
FloatTile float_tile_of(int64_t mr, std::integer_sequence<int, M...>) {
  static const FloatTile table[] = {float_tile<M + 1, NV>...};
  return table[mr - 1];
}
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t depth,
             int64_t columns, float* to, int64_t to_stride) {
  using Rows = std::make_integer_sequence<int, kRowsOfScores>;
  int64_t c = 0;
#if defined(TQ_WIDE)
  for (; c + 4 * kLanes <= columns; c += 4 * kLanes)  // fewer loads for each product
    for (int64_t r = 0; r < rows; r += 6)
      float_tile_of<4>(std::min<int64_t>(rows - r, 6), std::make_integer_sequence<int, 6>())(
          a + r * a_stride, a_stride, b + c, b_stride, depth, to + r * to_stride + c, to_stride);
#endif
  for (; c + kVectorsOfScores * kLanes <= columns; c += kVectorsOfScores * kLanes)
    float_tile_of<kVectorsOfScores>(rows, Rows())(a, a_stride, b + c, b_stride, depth, to + c, to_stride);
  for (; c < columns; c += kLanes) float_tile_of<1>(rows, Rows())(a, a_stride, b + c, b_stride, depth, to + c, to_stride);
}

// Whether all of `rows` by `columns` numbers are.
bool all_finite(const float* p, int64_t rows, int64_t stride, int64_t columns) {
  float check = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) check += p[r * stride + c] * 0.0f;
  return check == 0;
}

void attention(const tq::Attention& t, int64_t begin, int64_t end) {
  int64_t keys = (t.keys + kLanes - 1) / kLanes * kLanes, width = (t.width + kLanes - 1) / kLanes * kLanes;
  int64_t most = kRowsOfScores;
  auto* turned = reinterpret_cast<float*>(scratch(size_t(t.width * keys + keys * width + most * (keys + width)) * 4));
  float* values = turned + t.width * keys;
  float* scores = values + keys * width;
  float* found = scores + most * keys;
  F scale = set(t.scale);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t sample = unit / t.heads, head = unit % t.heads, group = head / (t.heads / t.groups);
    const float* key = t.key + sample * t.key_stride[0] + group * t.key_stride[1];
    const float* value = t.value + sample * t.value_stride[0] + group * t.value_stride[1];
    int64_t value_stride = t.value_stride[2];
    for (int64_t k = 0; k < keys; k += kLanes)
      transpose(key + k * t.key_stride[2], t.key_stride[2], std::min<int64_t>(t.keys - k, kLanes), t.width, turned + k, keys);
    if (t.width % kLanes) {
      for (int64_t k = 0; k < t.keys; ++k) {
        std::memcpy(values + k * width, value + k * value_stride, size_t(t.width) * 4);
        std::memset(values + k * width + t.width, 0, size_t(width - t.width) * 4);
      }
      value = values;
      value_stride = width;
    }
    // torch multiplies the values of keys that a row does not see by zero, which is NaN where they are not finite
    bool short_rows = t.causal && all_finite(value, t.keys, value_stride, t.width);
    int64_t tiles = (t.rows + most - 1) / most;
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t row = t.rows * i / tiles, rows = t.rows * (i + 1) / tiles - row;
      const float* query = t.query + sample * t.query_stride[0] + head * t.query_stride[1] + row * t.query_stride[2];
      int64_t seen = short_rows ? std::min(t.keys, row + rows) : t.keys, padded = (seen + kLanes - 1) / kLanes * kLanes;
      product(query, t.query_stride[2], turned, keys, rows, t.width, padded, scores, keys);
      float shares[kRowsOfScores];
      for (int64_t r = 0; r < rows; ++r) {
        float* line = scores + r * keys;
        int64_t n = t.causal ? std::min(t.keys, row + r + 1) : t.keys;
        int64_t at = t.mask ? sample * t.mask_stride[0] + head * t.mask_stride[1] + (row + r) * t.mask_stride[2] : 0;
        const auto* numbers = t.mask && !t.mask_is_byte ? static_cast<const float*>(t.mask) + at : nullptr;
        F high = set(-INFINITY);
        int64_t k = 0;
        if (!t.mask || (numbers && t.mask_stride[3] == 1)) {
          for (; k + kLanes <= n; k += kLanes) {
            F x = numbers ? fma(load(line + k), scale, load(numbers + k)) : mul(load(line + k), scale);
            high = max(high, x);
            store(line + k, x);
          }
        }
        int64_t whole_vectors = k;
        for (; k < n; ++k) {
          float x = line[k] * t.scale;
          if (numbers) x += numbers[k * t.mask_stride[3]];
          else if (t.mask && !(static_cast<const uint8_t*>(t.mask) + at)[k * t.mask_stride[3]]) x += -INFINITY;  // NaN stays
          line[k] = x;
        }
        for (; k < padded; ++k) line[k] = -INFINITY;
        for (k = whole_vectors; k < padded; k += kLanes) high = max(high, load(line + k));
        float top = largest(high);
        if (top == -INFINITY) top = 0;  // no key is seen: all weights become zero
        F total = set(0.0f), most_of_all = set(top);
        for (k = 0; k < padded; k += kLanes) {
          F w = exp(sub(load(line + k), most_of_all));
          store(line + k, w);
          total = add(total, w);
        }
        float whole = sum(total);
        shares[r] = whole == 0 ? 0.0f : 1.0f / whole;
      }
      product(scores, keys, value, value_stride, rows, seen, width, found, width);
      for (int64_t r = 0; r < rows; ++r) {
        float* to = t.out + ((sample * t.rows + row + r) * t.heads + head) * t.width;
        F share = set(shares[r]);
        int64_t d = 0;
        for (; d + kLanes <= t.width; d += kLanes) store(to + d, mul(load(found + r * width + d), share));
        for (; d < t.width; ++d) to[d] = found[r * width + d] * shares[r];
      }
    }
  }
}

// ---- dynamic quantization -------------------------------------------------------------------------------------------

void range(const float* p, int64_t n, float* least, float* most) {
  constexpr int N = 4;
  F low[N], high[N], check[N];
  TQ_EACH_OF(N, v)
    low[v] = set(INFINITY);
    high[v] = set(-INFINITY);
    check[v] = set(0.0f);
  });
  auto take = [&](int v, F x) __attribute__((always_inline)) {
    low[v] = min(x, low[v]);
    high[v] = max(x, high[v]);
    check[v] = fma(x, set(0.0f), check[v]);  // NaN from an infinity or NaN on, which the others may pass over
  };
  int64_t i = 0;
  for (; i + N * kLanes <= n; i += N * kLanes) {
    TQ_EACH_OF(N, v) take(v, load(p + i + v * kLanes)); });
  }
  for (; i < n; i += kLanes) {
    alignas(64) float t[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) t[k] = p[std::min(i + k, n - 1)];
    take(0, load(t));
  }
  float bad = sum(add(add(check[0], check[1]), add(check[2], check[3])));
  *least = -largest(sub(set(0.0f), min(min(low[0], low[1]), min(low[2], low[3])))) + bad;
  *most = largest(max(max(high[0], high[1]), max(high[2], high[3]))) + bad;
}

int64_t units(const Op& op, const Bound& b) {
  if (op.kind == tq::kExport) return b.samples * b.values[op.input].h;
  const Value& out = b.values[out_value(op)];
  switch (op.kind) {
    case tq::kDepthwise: case tq::kImport: case tq::kShuffle: return b.samples * out.h;
    case tq::kMean: case tq::kHalo: return b.samples;
    default: return b.samples * out.h * out.w;
  }
}

void run(const Op& op, const Bound& b, int64_t begin, int64_t end, int64_t part, int64_t parts) {
  switch (op.kind) {
    case tq::kConv: return conv(op, b, begin, end, part, parts);
    case tq::kDepthwise: return depthwise(op, b, begin, end, part, parts);
    case tq::kElementwise: return elementwise(op, b, begin, end, part, parts);
    case tq::kImport: return import(op, b, begin, end, part, parts);
    case tq::kExport: return export_(op, b, begin, end, part, parts);
    case tq::kMean: return mean(op, b, begin, end, part, parts);
    case tq::kMaxPool: return max_pool(op, b, begin, end, part, parts);
    case tq::kHalo: return halo(op, b, begin, end, part, parts);
    case tq::kLayerNorm: return layer_norm(op, b, begin, end, part, parts);
    case tq::kShuffle: return shuffle(op, b, begin, end, part, parts);
  }
}

}  // namespace

extern const tq::Kernels kernels;
#define TQ_TEXT2(x) #x
#define TQ_TEXT(x) TQ_TEXT2(x)
const tq::Kernels kernels = {TQ_TEXT(TQ_ISA), units, run, attention, range};

}  // namespace TQ_ISA
