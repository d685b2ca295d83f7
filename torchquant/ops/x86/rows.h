// A weight (outputs, inputs) of 2, 3, 4 or 8 bits a code, with scales by group or by output: one block of bytes, written
// by `torchquant/ops/x86/rows.py` and read in place.
//
// Sixteen neighbouring outputs make a panel. Its inputs are cut into blocks with one scale each, and a block into steps of
// 64 bytes (3 bits: 128 for the lower two of 32 inputs, then 64 for the upper one): lane o holds the codes of output o in
// four bytes, byte j of the field p those of input 4 p + j. Codes are unsigned: w = scale * (code - zero).
//
// Four panels (the last ones: as many as are left) lie together: 64 bytes of the first, 64 of the second and so on, so that
// they are read as one stream; likewise their scales and their zeros.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tq {

constexpr int32_t kRowsMagic = 0x51545238;
constexpr int32_t kRowsVersion = 2;

struct RowsHeader {
  int32_t magic, version, bits;
  int32_t outputs, inputs;
  int32_t block, stored_block;   // inputs of a block, and those that it has room for: whole steps
  int32_t blocks, blocks_per_scale;
  int32_t scale_is_half;         // float16, otherwise float32
  int32_t zero_is_byte;          // a byte for each scale, otherwise `zero` for all
  int32_t zero;
  int32_t scales, zeros, bias;   // units of 64 bytes from the beginning, 0: none; codes begin behind the header
  int32_t size;                  // units of 64 bytes
};
static_assert(sizeof(RowsHeader) == 64, "as in rows.py");

inline int64_t step_inputs(int32_t bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 32 : 16; }
inline int64_t step_lines(int32_t bits) { return bits == 3 ? 3 : 1; }

// Where a panel's lines (of codes, scales or zeros) are: the first, and how far it is to the next.
struct Lines {
  const uint8_t* first;
  int64_t stride;
};

struct Rows {
  const RowsHeader* h;
  const uint8_t* bytes;
  static constexpr int64_t kTogether = 4;  // panels
  int64_t panels() const { return (int64_t(h->outputs) + 15) / 16; }
  int64_t scale_blocks() const { return (int64_t(h->blocks) + h->blocks_per_scale - 1) / h->blocks_per_scale; }
  int64_t block_lines() const { return h->stored_block / step_inputs(h->bits) * step_lines(h->bits); }
  int64_t stored_inputs() const { return int64_t(h->blocks) * h->stored_block; }
  Lines lines(int64_t unit, int64_t size, int64_t count, int64_t panel) const {
    int64_t begin = panel / kTogether * kTogether, width = panels() - begin < kTogether ? panels() - begin : kTogether;
    return {bytes + unit * 64 + (begin * count + panel - begin) * size, width * size};
  }
  Lines codes(int64_t panel) const { return lines(1, 64, h->blocks * block_lines(), panel); }
  Lines scales(int64_t panel) const { return lines(h->scales, h->scale_is_half ? 32 : 64, scale_blocks(), panel); }
  Lines zeros(int64_t panel) const { return lines(h->zeros, 16, scale_blocks(), panel); }
  const float* bias() const { return h->bias ? reinterpret_cast<const float*>(bytes + int64_t(h->bias) * 64) : nullptr; }
};

// Rows of activations as integers, x = scale * code, of 16 bits with a scale for each block, or of 8 with one for each row.
struct Activations {
  int64_t rows;
  int bits;
  float least_scale;
  int8_t* codes;      // room for 2 bytes a stored input; how they lie is the kernels' own
  float* scale;       // [row][block]
  float* sum;         // [row][block] of the codes
};

enum Recurrence : int32_t { kLstm = 0, kGru, kRnnTanh, kRnnRelu };
inline int64_t gates_of(Recurrence kind) { return kind == kLstm ? 4 : kind == kGru ? 3 : 1; }

struct RowKernels {
  // Rows `begin` to `end` of x, which has `h->inputs` floats a row; to 8 bits as `choose_scale` and `quantize_scaled` do.
  void (*quantize)(const Rows&, const float* x, Activations&, int64_t begin, int64_t end);
  // The panels from `first` to `last` of the product for rows `begin` to `end`; `out` has `h->outputs` floats a row.
  void (*multiply)(const Rows&, const Activations&, float* out, int64_t begin, int64_t end, int64_t first, int64_t last);
  void (*look_up)(const Rows&, int64_t row, float* out);
  // One step of a recurrent layer for one sample of `n` states: `given` and `hidden` are the gates' parts that the input
  // and the last state make, in torch's order; the state and, of an LSTM, the cell are replaced.
  void (*step)(Recurrence, const float* given, const float* hidden, float* state, float* cell, int64_t n);
};

}  // namespace tq
