// What a plan holds: one block of bytes, written by `torchquant/ops/x86/plan.py` and read in place.
//
// Header, `values` records of Value, `ops` records of Op, `ranges` records of Range, then weights and per-channel
// constants. Offsets into the last part, and into the arena, count units of 64 bytes. Every field is 4 bytes wide.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tq {

constexpr int32_t kMagic = 0x51543836;
constexpr int32_t kVersion = 3;
constexpr int kUnit = 64;

enum Kind : int32_t { kConv = 0, kDepthwise, kElementwise, kImport, kExport, kMean, kMaxPool, kHalo, kLayerNorm, kShuffle };
enum Activation : int32_t {
  kNone = 0, kClamp, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh, kHardswish, kHardsigmoid
};
enum Binary : int32_t { kNothing = 0, kAdd, kMul };

struct Header {
  int32_t magic, version, values, ops, inputs, outputs;
  int32_t arena;   // units of one sample
  int32_t chunk;   // samples that go through the network together, 0: chosen at run time
  int32_t blob;    // where the constants begin, in units
  int32_t size;    // bytes of the plan
  int32_t split;   // ops in front of it run on `chunk` samples, those from it on for several chunks at once; 0: none
  int32_t wide;    // units of one sample of the values that ops behind the split read or write
  int32_t ranges;
  int32_t pad[3];
};

// A tensor (samples, h, w, c), channels last: in the arena with `stride` elements a pixel and a border of `top`,
// `left`, `bottom`, `right` pixels, or one of the caller's tensors. Unsigned bytes or floats.
struct Value {
  int32_t is_float, h, w, c, stride, top, left, bottom, right, offset;
  int32_t external;  // -1: arena; i: input i; 1000 + i: output i
  int32_t zero_point;
  int32_t is_wide;   // in the second arena, that of ops behind the split
  int32_t pad[3];
};

struct Op {
  int32_t kind, input, out_byte, out_float;
  int32_t other, binary, other_broadcast;    // the second operand of an addition or product
  int32_t kh, kw, sh, sw, pt, pl, dh, dw;    // window, stride, padding before, dilation
  int32_t depth;                             // input channels of a tap, a multiple of 4
  int32_t channels;                          // output channels
  int32_t weights, compensation, scale, bias; // units from the constants' beginning
  int32_t before;
  float before_low, before_high;             // activation in front of the second operand
  int32_t after;
  float after_low, after_high;               // and behind it
  float input_scale, other_scale;            // dequantize bytes
  int32_t other_zero_point;
  float inverse;                             // 1 / scale of the bytes written
  int32_t zero_point;
  float low, high;                           // range of the bytes written, zero point subtracted
  int32_t direct, low_byte, high_byte;       // scale and bias hold `inverse`, and nothing but a clamp to these follows
  float factor;                              // layer norm: epsilon
  int32_t panel;                             // blocks of 16 output channels that go together, 0: the default
  int32_t dynamic;                           // 1 + the range of the bytes that a product reads or another op writes
  int32_t group_in, group_out, group_panel;  // of a grouped convolution: channels of a group, blocks of 16 outputs that share inputs
  int32_t nan_byte;                          // what NaN becomes: torch makes it 0, which is 128 where int8 is counted unsigned
  int32_t narrow;                            // no weight is beyond -64 .. 63: two products with bytes stay within 16 bits
  int32_t pad[3];
};

// A grid of bytes that each call makes from the range of one whole input.
struct Range {
  int32_t input, low, high, symmetric;
  float eps;                                 // the least scale
  int32_t pad[3];
};

static_assert(sizeof(Header) == 64 && sizeof(Value) == 64 && sizeof(Op) == 192 && sizeof(Range) == 32, "as in plan.py");

// What an item of work needs besides its Op.
struct Bound {
  const Value* values;
  uint8_t* const* base;   // of each value: the first byte of the chunk
  const uint8_t* blob;
  int64_t samples;        // in this chunk
  const uint8_t* call;    // constants that this call has made: of products that read a range
};

// Where an op's `compensation` and `scale` are.
inline const uint8_t* factors(const Op& op, const Bound& b) { return op.dynamic ? b.call : b.blob; }

inline int64_t row_pixels(const Value& v) { return v.w + v.left + v.right; }
inline int64_t sample_elements(const Value& v) { return (v.h + v.top + v.bottom) * row_pixels(v) * v.stride; }
inline int64_t element_size(const Value& v) { return v.is_float ? 4 : 1; }
inline int64_t sample_bytes(const Value& v) {
  int64_t bytes = sample_elements(v) * element_size(v);
  return v.external >= 0 ? bytes : (bytes + kUnit - 1) / kUnit * kUnit;
}
// The pixel (y, x) of a sample; the border has negative coordinates.
inline uint8_t* pixel(const Bound& b, int32_t value, int64_t sample, int64_t y, int64_t x) {
  const Value& v = b.values[value];
  int64_t index = ((y + v.top) * row_pixels(v) + x + v.left) * v.stride;
  return b.base[value] + sample * sample_bytes(v) + index * element_size(v);
}

// Scaled dot product attention in float: query (b, heads, rows, width), key and value (b, groups, keys, width), the last
// dimension contiguous; the result (b, rows, heads, width). Strides count elements; those of the mask may be zero.
struct Attention {
  const float *query, *key, *value;
  const void* mask;  // floats added to the scores, or bytes of which zero hides a key; or null
  float* out;
  int64_t heads, groups, rows, keys, width;
  int64_t query_stride[3], key_stride[3], value_stride[3], mask_stride[4];
  float scale;
  bool causal, mask_is_byte;
};

// One instruction set's kernels: work on the rows (or samples, or heads) from `begin` to `end` of an op's `units`.
struct Kernels {
  const char* name;
  int64_t (*units)(const Op&, const Bound&);
  void (*run)(const Op&, const Bound&, int64_t begin, int64_t end, int64_t part, int64_t parts);
  void (*attention)(const Attention&, int64_t begin, int64_t end);  // units are heads of samples
  void (*range)(const float*, int64_t n, float* least, float* most);  // both NaN where a number is not finite
};

}  // namespace tq
