// What must hold of a plan before anything of it is followed: afterwards no access leaves a tensor, the arena or the plan.
#pragma once
#include <cmath>
#include <string>

#include "plan.h"

namespace tq {

// Why `what` cannot be run.
struct Complaint {
  std::string text;
};

inline void demand(bool holds, const char* what, int64_t index, const char* why) {
  if (!holds) throw Complaint{std::string(what) + " " + std::to_string(index) + " " + why};
}

class Check {
 public:
  Check(const Header& header, const Value* values, const Op* ops, const Range* ranges, int64_t blob_bytes)
      : h(header), values(values), ops(ops), ranges(ranges), blob_bytes(blob_bytes) {}

  void all() {
    demand(h.inputs >= 1 && h.inputs < 1000 && h.outputs >= 1 && h.outputs < 1000, "header", 0, "counts no inputs or outputs");
    demand(h.split >= 0 && h.split <= h.ops && h.chunk >= 0 && h.chunk <= kMost && h.arena >= 0 && h.wide >= 0, "header", 0,
           "has sizes that are none");
    int64_t narrow = 0, wide = 0;
    bool reads = false;
    for (int i = 0; i < h.values; ++i) {
      value(i);
      reads = reads || (values[i].external >= 0 && values[i].external < 1000);
      if (values[i].external < 0) (values[i].is_wide ? wide : narrow) += sample_bytes(values[i]) / kUnit;
    }
    demand(reads, "header", 0, "names inputs that nothing reads");
    demand(h.arena <= narrow && h.wide <= wide, "header", 0, "asks for more memory than its values take");
    for (int i = 0; i < h.ranges; ++i) range(i);
    for (int i = 0; i < h.ops; ++i) op(i);
  }

 private:
  static constexpr int32_t kMost = 1 << 26;
  const Header& h;
  const Value* values;
  const Op* ops;
  const Range* ranges;
  int64_t blob_bytes;

  static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  static bool within(int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; }

  void value(int i) {
    const Value& v = values[i];
    for (int32_t x : {v.h, v.w, v.c, v.stride}) demand(within(x, 1, kMost), "value", i, "has a size that is none");
    for (int32_t x : {v.top, v.left, v.bottom, v.right}) demand(within(x, 0, kMost), "value", i, "has a border that is none");
    demand(within(v.is_float, 0, 1) && within(v.is_wide, 0, 1) && within(v.zero_point, 0, 255), "value", i, "is of no kind");
    double elements = (double(v.h) + v.top + v.bottom) * (double(v.w) + v.left + v.right) * v.stride;
    demand(elements * 4 < double(int64_t(1) << (v.external < 0 ? 31 : 40)), "value", i, "is too large");
    if (v.external >= 0) {
      bool known = v.external < 1000 ? v.external < h.inputs : v.external < 1000 + h.outputs;
      demand(known && v.is_float && v.stride == v.c && !v.top && !v.left && !v.bottom && !v.right, "value", i,
             "is no tensor of the caller's");
      return;
    }
    bool image = v.stride == 4 && v.c <= 4 && !v.is_float;
    demand(v.external == -1 && (image || (v.stride % 16 == 0 && v.stride >= v.c)), "value", i, "has pixels of no known form");
    int64_t place = v.is_wide ? h.wide : h.arena;
    demand(v.offset >= 0 && v.offset + sample_bytes(v) / kUnit <= place, "value", i, "lies outside the arena");
  }

  void range(int i) const {
    const Range& r = ranges[i];
    demand(within(r.input, 0, h.inputs - 1) && 0 <= r.low && r.low < r.high && r.high <= 255 && within(r.symmetric, 0, 1) &&
               std::isfinite(r.eps) && r.eps > 0,
           "range", i, "is none");
  }

  // Whether `bytes` of constants stand at `place`.
  bool constants(int32_t place, double bytes) const { return place >= 0 && double(place) * kUnit + bytes <= double(blob_bytes); }

  // Whether reading whole vectors of the channels of a pixel stays inside: the arena has room behind its end.
  static bool whole_vectors(const Value& v) { return v.external < 0 || v.c % 16 == 0; }

  void op(int i) const {
    const Op& o = ops[i];
    auto need = [&](bool holds, const char* why) { demand(holds, "op", i, why); };
    for (int32_t x : {o.input, o.out_byte, o.out_float, o.other}) need(within(x, -1, h.values - 1), "names a value that is none");
    need(within(o.kind, kConv, kShuffle) && within(o.binary, kNothing, kMul) && within(o.before, kNone, kHardsigmoid) &&
             within(o.after, kNone, kHardsigmoid),
         "is of no kind");
    need(within(o.panel, 0, 16) && within(o.dynamic, 0, h.ranges) && within(o.nan_byte, 0, 255) && within(o.narrow, 0, 1),
         "has a field that is out of range");
    need(o.out_byte < 0 || (!values[o.out_byte].is_float && values[o.out_byte].external < 0), "writes bytes where there are none");
    need(o.out_float < 0 || values[o.out_float].is_float, "writes floats where there are none");
    need(o.out_byte >= 0 || o.out_float >= 0, "writes nothing");
    if (o.kind == kHalo) return;
    need(o.input >= 0, "reads nothing");
    const Value& in = values[o.input];
    const Value& out = values[o.out_byte >= 0 ? o.out_byte : o.out_float];
    if (o.out_byte >= 0 && o.out_float >= 0) {
      const Value& f = values[o.out_float];
      need(f.h == out.h && f.w == out.w && f.c == out.c, "writes two values of different sizes");
    }
    need(o.channels == out.c, "has other channels than what it writes");
    if (o.kind == kImport || o.kind == kExport) {
      need(in.h == out.h && in.w == out.w && in.c == out.c, "moves a value into one of another size");
      if (o.kind == kExport) return need(out.external >= 1000 && o.out_byte < 0, "does not write an output");
      need(in.external >= 0 && out.external < 0 && (o.out_float < 0 || values[o.out_float].external < 0), "does not read an input");
      return need(o.out_byte < 0 || o.out_float < 0 || values[o.out_float].stride == out.stride, "writes pixels of two forms");
    }
    need(o.out_byte < 0 || values[o.out_byte].stride % 16 == 0, "writes vectors into pixels that are too small");
    need((o.other >= 0) == (o.binary != kNothing), "has half a second operand");
    if (o.other >= 0) {
      const Value& other = values[o.other];
      bool fits = o.other_broadcast || (other.h >= out.h && other.w >= out.w);
      need(fits && other.c == o.channels && whole_vectors(other), "has a second operand of another size");
    }
    switch (o.kind) {
      case kConv: return product(o, in, out, need);
      case kDepthwise: return depthwise(o, in, out, need);
      case kMaxPool: return pool(o, in, out, need);
      case kShuffle: return shuffle(o, in, out, need);
      case kMean: return need(in.c == o.channels, "has other channels than what it reads");
      default:
        need(in.c == o.channels && in.h == out.h && in.w == out.w, "reads a value of another size than what it writes");
        if (o.kind == kLayerNorm) {
          double bytes = 4.0 * padded(o.channels);
          need(constants(o.scale, bytes) && constants(o.bias, bytes), "has constants outside the plan");
        }
    }
  }

  template <class Need>
  static void window(const Op& o, const Need& need) {
    for (int32_t x : {o.kh, o.kw, o.sh, o.sw, o.dh, o.dw}) need(within(x, 1, 1 << 16), "has a window that is none");
    need(within(o.pt, 0, 1 << 16) && within(o.pl, 0, 1 << 16), "has a padding that is none");
  }

  // Whether windows stay on a value and its border, in one direction.
  static bool covered(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation, int64_t padding, int64_t before, int64_t size, int64_t after) {
    return padding <= before && (outputs - 1) * stride - padding + (taps - 1) * dilation < size + after;
  }

  template <class Need>
  static void bytes_under_windows(const Op& o, const Value& in, const Value& out, const Need& need) {
    window(o, need);
    need(!in.is_float && in.external < 0, "multiplies what are no bytes");
    need(covered(out.h, o.sh, o.kh, o.dh, o.pt, in.top, in.h, in.bottom) && covered(out.w, o.sw, o.kw, o.dw, o.pl, in.left, in.w, in.right),
         "has windows that leave what they read");
  }

  template <class Need>
  void product(const Op& o, const Value& in, const Value& out, const Need& need) const {
    bytes_under_windows(o, in, out, need);
    need(o.depth >= 4 && o.depth % 4 == 0 && o.depth <= in.stride, "has a depth that its input does not have");
    need(!o.group_out || (o.group_out >= 1 && o.group_in >= 1 && within(o.group_panel, 1, 4)), "has groups that are none");
    need(!o.direct || (o.out_byte >= 0 && o.out_float < 0), "stores directly what is not bytes alone");
    double n = double(padded(o.channels));
    need(constants(o.weights, n * o.kh * o.kw * o.depth), "has weights outside the plan");
    for (int32_t place : {o.compensation, o.scale, o.bias}) need(constants(place, 4 * n), "has constants outside the plan");
  }

  template <class Need>
  void depthwise(const Op& o, const Value& in, const Value& out, const Need& need) const {
    bytes_under_windows(o, in, out, need);
    bool alone = o.kh % 4 == 1 && o.kh > 1, pairs = o.kh == 3 && o.sh == 1 && o.dh == 1;
    double down = alone ? o.kh / 4 : (o.kh + 3) / 4, along = alone ? (o.kw + 3) / 4 : 0, taps = down * o.kw + along;
    need(taps <= 512, "has a window with too many taps");
    double width = (double(out.w) - 1) * o.sw + (double(o.kw) - 1) * o.dw + 1;
    need(width * (down + 1) * 256 < double(1 << 30), "has lines that are too long");
    need(in.c == o.channels && in.stride % 16 == 0 && !o.dynamic, "has other channels than what it reads");
    need(!o.direct || (o.out_byte >= 0 && o.out_float < 0), "stores directly what is not bytes alone");
    double n = double(padded(o.channels));
    need(constants(o.weights, n * taps * 4 * (pairs ? 2 : 1)), "has weights outside the plan");
    for (int32_t place : {o.compensation, o.scale, o.bias}) need(constants(place, 4 * n), "has constants outside the plan");
  }

  template <class Need>
  static void shuffle(const Op& o, const Value& in, const Value& out, const Need& need) {
    window(o, need);
    need((o.out_byte < 0 || o.out_float < 0) && in.is_float == out.is_float && o.other < 0, "moves values into those of another kind");
    need(o.group_out >= 1 && out.c % o.group_out == 0 && double(out.c) * o.sh * o.sw == in.c, "has other channels than what it reads");
    need((int64_t(out.h) - 1 + o.pt) / o.sh < in.h && (int64_t(out.w) - 1 + o.pl) / o.sw < in.w, "reads pixels that are none");
  }

  // Whether each window has a tap on the value, in one direction.
  static bool touches(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation, int64_t padding, int64_t size) {
    for (int64_t i = 0; i < outputs; ++i) {
      int64_t start = i * stride - padding, first = start < 0 ? (-start + dilation - 1) / dilation : 0;
      if (first >= taps || start + first * dilation >= size) return false;
    }
    return true;
  }

  template <class Need>
  static void pool(const Op& o, const Value& in, const Value& out, const Need& need) {
    window(o, need);
    need(in.c == o.channels && whole_vectors(in) && in.stride % 16 == 0, "has other channels than what it reads");
    need(in.is_float || (o.out_byte >= 0 && o.out_float < 0 && o.other < 0), "keeps bytes and writes something else");
    need(touches(out.h, o.sh, o.kh, o.dh, o.pt, in.h) && touches(out.w, o.sw, o.kw, o.dw, o.pl, in.w), "has windows that see nothing");
  }
};

}  // namespace tq
