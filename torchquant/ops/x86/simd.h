// Sixteen lanes of int32 or float, on AVX-512, on AVX2 as two halves, and anywhere as plain loops.
//
// As in the instructions, `max(a, b)` and `min(a, b)` are b where either is NaN: what may be NaN comes second.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define TQ_INLINE inline __attribute__((always_inline))

namespace TQ_ISA {

// Calls f(0), f(1) ... f(N - 1) with constants: arrays indexed by them live in registers, which loops unrolled by a pragma
// do not bring about.
template <class Body, int... K>
TQ_INLINE void each_of(Body&& body, std::integer_sequence<int, K...>) {
  (body(std::integral_constant<int, K>()), ...);
}
template <int N, class Body>
TQ_INLINE void each(Body&& body) {
  each_of(body, std::make_integer_sequence<int, N>());
}
#define TQ_EACH_OF(n, i) each<n>([&](auto i) __attribute__((always_inline)) {

constexpr int kLanes = 16;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits, ties to even

#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(TQ_PORTABLE)
#define TQ_WIDE 1
constexpr int kMaxNv = 4;
constexpr int kMaxMr[5] = {0, 12, 12, 8, 6};
using I = __m512i;
using F = __m512;
using R = __m512i;  // a register of accumulators: arrays of plain vectors stay in registers, of structs they do not
constexpr int kPerVector = 1;
TQ_INLINE I load_int(const void* p) { return _mm512_loadu_si512(p); }
TQ_INLINE void store_int(void* p, I a) { _mm512_storeu_si512(p, a); }
TQ_INLINE I broadcast4(const uint8_t* p) { int32_t x; std::memcpy(&x, p, 4); return _mm512_set1_epi32(x); }
TQ_INLINE I set_int(int32_t x) { return _mm512_set1_epi32(x); }
TQ_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
TQ_INLINE I dot(I c, I a, I b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(c, a, b);
#else  // exact: vpmaddubsw would saturate, so bytes are widened first
  __m512i m = _mm512_set1_epi32(0x00ff00ff);
  __m512i lo = _mm512_madd_epi16(_mm512_and_si512(a, m), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  __m512i hi = _mm512_madd_epi16(_mm512_and_si512(_mm512_srli_epi16(a, 8), m), _mm512_srai_epi16(b, 8));
  return _mm512_add_epi32(c, _mm512_add_epi32(lo, hi));
#endif
}
#if defined(__AVX512VNNI__)
constexpr bool kNarrowDot = false;
#else
constexpr bool kNarrowDot = true;
TQ_INLINE I narrow_dot(I c, I a, I b) {
  return _mm512_add_epi32(c, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
}
#endif
TQ_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
TQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
TQ_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
TQ_INLINE F set(float x) { return _mm512_set1_ps(x); }
TQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
TQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
TQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
TQ_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
TQ_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TQ_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
TQ_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
TQ_INLINE F load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
TQ_INLINE void store_first(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a); }
TQ_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
TQ_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
TQ_INLINE F bits(I a) { return _mm512_castsi512_ps(a); }
TQ_INLINE I bits(F a) { return _mm512_castps_si512(a); }
template <int n> TQ_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, n); }
// NV vectors of 16 channels: rounded, zero point added, clamped as bytes; y < 2^30. NaN and -infinity become `low`.
template <int NV>
TQ_INLINE void store_quantized(uint8_t* p, const F* y, int zero, int low = 0, int high = 255) {
  __m512i q[4];
  for (int v = 0; v < 4; ++v) q[v] = v < NV ? _mm512_cvtps_epi32(y[v < NV ? v : 0]) : _mm512_setzero_si512();
  __m512i z = _mm512_set1_epi16(short(zero));
  __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(q[0], q[1]), z);
  __m512i b = NV > 2 ? _mm512_adds_epi16(_mm512_packs_epi32(q[2], q[3]), z) : a;
  __m512i c = _mm512_packus_epi16(a, b);  // of each vector four lanes at a time
  if (!(__builtin_constant_p(low) && low == 0)) c = _mm512_max_epu8(c, _mm512_set1_epi8(char(low)));
  if (!(__builtin_constant_p(high) && high == 255)) c = _mm512_min_epu8(c, _mm512_set1_epi8(char(high)));
  c = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), c);
  if (NV == 4) _mm512_storeu_si512(p, c);
  if (NV == 3) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(c));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 32), _mm512_extracti32x4_epi32(c, 2));
  }
  if (NV == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(c));
  if (NV == 1) _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(c));
}
TQ_INLINE F from_bytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TQ_INLINE void store_low_bytes(uint8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
TQ_INLINE int unordered(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
TQ_INLINE I codes(F a, I zero, I nan) {
  return _mm512_mask_add_epi32(nan, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), _mm512_cvtps_epi32(a), zero);
}
TQ_INLINE R load_register(const void* p) { return load_int(p); }
TQ_INLINE R broadcast_register(const uint8_t* p) { return broadcast4(p); }
TQ_INLINE R dot_register(R c, R a, R b) { return dot(c, a, b); }
TQ_INLINE I vector_of(R first, R) { return first; }
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kMaxNv = 1;
constexpr int kMaxMr[5] = {0, 6, 0, 0, 0};
struct I { __m256i v, w; };
struct F { __m256 v, w; };
using R = __m256i;
constexpr int kPerVector = 2;
TQ_INLINE __m256i load8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TQ_INLINE I load_int(const void* p) { return {load8(p), load8(static_cast<const char*>(p) + 32)}; }
TQ_INLINE void store_int(void* p, I a) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), a.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(p) + 32), a.w);
}
TQ_INLINE I broadcast4(const uint8_t* p) {
  int32_t x; std::memcpy(&x, p, 4);
  __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
TQ_INLINE I set_int(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
TQ_INLINE I add(I a, I b) { return {_mm256_add_epi32(a.v, b.v), _mm256_add_epi32(a.w, b.w)}; }
TQ_INLINE __m256i dot8(__m256i c, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(c, a, b);
#else
  __m256i m = _mm256_set1_epi32(0x00ff00ff);
  __m256i lo = _mm256_madd_epi16(_mm256_and_si256(a, m), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  __m256i hi = _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(a, 8), m), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(c, _mm256_add_epi32(lo, hi));
#endif
}
TQ_INLINE I dot(I c, I a, I b) { return {dot8(c.v, a.v, b.v), dot8(c.w, a.w, b.w)}; }
#if defined(__AVXVNNI__)
constexpr bool kNarrowDot = false;
#else
constexpr bool kNarrowDot = true;
TQ_INLINE __m256i narrow_dot(__m256i c, __m256i a, __m256i b) {
  return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#endif
TQ_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.v), _mm256_cvtepi32_ps(a.w)}; }
TQ_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TQ_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a.v); _mm256_storeu_ps(p + 8, a.w); }
TQ_INLINE F set(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
TQ_INLINE F add(F a, F b) { return {_mm256_add_ps(a.v, b.v), _mm256_add_ps(a.w, b.w)}; }
TQ_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v), _mm256_sub_ps(a.w, b.w)}; }
TQ_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v), _mm256_mul_ps(a.w, b.w)}; }
TQ_INLINE F div(F a, F b) { return {_mm256_div_ps(a.v, b.v), _mm256_div_ps(a.w, b.w)}; }
TQ_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v), _mm256_fmadd_ps(a.w, b.w, c.w)}; }
TQ_INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v), _mm256_max_ps(a.w, b.w)}; }
TQ_INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v), _mm256_min_ps(a.w, b.w)}; }
TQ_INLINE float sum(F a) {
  float s[8]; _mm256_storeu_ps(s, _mm256_add_ps(a.v, a.w));
  return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}
TQ_INLINE float largest(F a) {
  float s[8]; _mm256_storeu_ps(s, _mm256_max_ps(a.v, a.w));
  float m = s[0];
  for (int i = 1; i < 8; ++i) m = s[i] > m ? s[i] : m;
  return m;
}
TQ_INLINE F bits(I a) { return {_mm256_castsi256_ps(a.v), _mm256_castsi256_ps(a.w)}; }
TQ_INLINE I bits(F a) { return {_mm256_castps_si256(a.v), _mm256_castps_si256(a.w)}; }
template <int n> TQ_INLINE I shift_left(I a) { return {_mm256_slli_epi32(a.v, n), _mm256_slli_epi32(a.w, n)}; }
TQ_INLINE __m128i quantized(F y, int zero, int low, int high) {
  __m256i q = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(y.v), _mm256_cvtps_epi32(y.w)), 0xd8);
  q = _mm256_adds_epi16(q, _mm256_set1_epi16(short(zero)));
  __m128i c = _mm_packus_epi16(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  return _mm_min_epu8(_mm_max_epu8(c, _mm_set1_epi8(char(low))), _mm_set1_epi8(char(high)));
}
template <int NV>
TQ_INLINE void store_quantized(uint8_t* p, const F* y, int zero, int low = 0, int high = 255) {
  for (int v = 0; v < NV; ++v)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + v, quantized(y[v], zero, low, high));
}
TQ_INLINE F from_bytes(const uint8_t* p) {
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(x, 8)))};
}
TQ_INLINE void store_low_bytes(uint8_t* p, I a) {
  __m256i m = _mm256_set1_epi32(0xff);
  __m256i x = _mm256_packus_epi32(_mm256_and_si256(a.v, m), _mm256_and_si256(a.w, m));
  x = _mm256_permute4x64_epi64(x, 0xd8);
  __m128i y = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), y);
}
TQ_INLINE int unordered(F a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) | _mm256_movemask_ps(_mm256_cmp_ps(a.w, a.w, _CMP_UNORD_Q)) << 8;
}
TQ_INLINE __m256i codes8(__m256 a, __m256i zero, __m256i nan) {
  __m256i q = _mm256_add_epi32(_mm256_cvtps_epi32(a), zero);
  return _mm256_blendv_epi8(q, nan, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
TQ_INLINE I codes(F a, I zero, I nan) { return {codes8(a.v, zero.v, nan.v), codes8(a.w, zero.w, nan.w)}; }
TQ_INLINE R load_register(const void* p) { return load8(p); }
TQ_INLINE R broadcast_register(const uint8_t* p) { int32_t x; std::memcpy(&x, p, 4); return _mm256_set1_epi32(x); }
TQ_INLINE R dot_register(R c, R a, R b) { return dot8(c, a, b); }
TQ_INLINE I vector_of(R first, R second) { return {first, second}; }
#else
constexpr int kMaxNv = 1;
constexpr int kMaxMr[5] = {0, 2, 0, 0, 0};
struct I { int32_t v[16]; };
struct F { float v[16]; };
#define TQ_EACH for (int i = 0; i < 16; ++i)
TQ_INLINE I load_int(const void* p) { I r; std::memcpy(r.v, p, 64); return r; }
TQ_INLINE void store_int(void* p, I a) { std::memcpy(p, a.v, 64); }
TQ_INLINE I set_int(int32_t x) { I r; TQ_EACH r.v[i] = x; return r; }
TQ_INLINE I broadcast4(const uint8_t* p) { int32_t x; std::memcpy(&x, p, 4); return set_int(x); }
TQ_INLINE I add(I a, I b) { TQ_EACH a.v[i] += b.v[i]; return a; }
TQ_INLINE I dot(I c, I a, I b) {
  uint8_t x[64]; int8_t y[64];
  std::memcpy(x, a.v, 64); std::memcpy(y, b.v, 64);
  TQ_EACH c.v[i] += x[4 * i] * y[4 * i] + x[4 * i + 1] * y[4 * i + 1] + x[4 * i + 2] * y[4 * i + 2] + x[4 * i + 3] * y[4 * i + 3];
  return c;
}
TQ_INLINE F to_float(I a) { F r; TQ_EACH r.v[i] = static_cast<float>(a.v[i]); return r; }
TQ_INLINE F load(const float* p) { F r; std::memcpy(r.v, p, 64); return r; }
TQ_INLINE void store(float* p, F a) { std::memcpy(p, a.v, 64); }
TQ_INLINE F set(float x) { F r; TQ_EACH r.v[i] = x; return r; }
TQ_INLINE F add(F a, F b) { TQ_EACH a.v[i] += b.v[i]; return a; }
TQ_INLINE F sub(F a, F b) { TQ_EACH a.v[i] -= b.v[i]; return a; }
TQ_INLINE F mul(F a, F b) { TQ_EACH a.v[i] *= b.v[i]; return a; }
TQ_INLINE F div(F a, F b) { TQ_EACH a.v[i] /= b.v[i]; return a; }
TQ_INLINE F fma(F a, F b, F c) { TQ_EACH a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
TQ_INLINE F max(F a, F b) { TQ_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
TQ_INLINE F min(F a, F b) { TQ_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
TQ_INLINE float sum(F a) { float s = 0; TQ_EACH s += a.v[i]; return s; }
TQ_INLINE float largest(F a) { float m = a.v[0]; TQ_EACH m = a.v[i] > m ? a.v[i] : m; return m; }
TQ_INLINE F bits(I a) { F r; std::memcpy(r.v, a.v, 64); return r; }
TQ_INLINE I bits(F a) { I r; std::memcpy(r.v, a.v, 64); return r; }
template <int n> TQ_INLINE I shift_left(I a) { TQ_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); return a; }
template <int NV>
TQ_INLINE void store_quantized(uint8_t* p, const F* y, int zero, int low = 0, int high = 255) {
  for (int v = 0; v < NV; ++v)
    TQ_EACH {
      float x = y[v].v[i];
      long q = x > -1e9f ? std::lrintf(x) + zero : low;  // NaN is not
      p[16 * v + i] = static_cast<uint8_t>(q < low ? low : q > high ? high : q);
    }
}
TQ_INLINE F from_bytes(const uint8_t* p) { F r; TQ_EACH r.v[i] = p[i]; return r; }
TQ_INLINE void store_low_bytes(uint8_t* p, I a) { TQ_EACH p[i] = static_cast<uint8_t>(a.v[i]); }
TQ_INLINE int unordered(F a) { int m = 0; TQ_EACH m |= (a.v[i] != a.v[i]) << i; return m; }
TQ_INLINE I codes(F a, I zero, I nan) {
  I q = bits(add(a, set(kRound)));
  TQ_EACH q.v[i] = a.v[i] == a.v[i] ? q.v[i] - 0x4b400000 + zero.v[i] : nan.v[i];  // without the bits of kRound
  return q;
}
using R = I;
constexpr int kPerVector = 1;
constexpr bool kNarrowDot = false;
TQ_INLINE R load_register(const void* p) { return load_int(p); }
TQ_INLINE R broadcast_register(const uint8_t* p) { return broadcast4(p); }
TQ_INLINE R dot_register(R c, R a, R b) { return dot(c, a, b); }
TQ_INLINE I vector_of(R first, R) { return first; }
#endif

// `narrow`: no byte of b is beyond -64 .. 63, so that the 16 bits of vpmaddubsw are enough.
template <bool narrow>
TQ_INLINE R dot_of(R c, R a, R b) {
#if !defined(TQ_PORTABLE) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)
  if constexpr (narrow) return narrow_dot(c, a, b);
#endif
  return dot_register(c, a, b);
}

#if !defined(TQ_WIDE)
// Of a vector the first n lanes, up to 16, the others zero.
TQ_INLINE F load_first(const float* p, int64_t n) {
  float t[kLanes] = {};
  std::memcpy(t, p, size_t(n) * 4);
  return load(t);
}
TQ_INLINE void store_first(float* p, F a, int64_t n) {
  float t[kLanes];
  store(t, a);
  std::memcpy(p, t, size_t(n) * 4);
}
#endif

// Lane i of vector j becomes lane j of vector i.
TQ_INLINE void turn(F* a) {
#if defined(TQ_WIDE)
  F t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    a[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    a[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // a[4 g + i] holds lanes i, 4 + i, 8 + i, 12 + i of vectors 4 g .. 4 g + 3
    t[i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    a[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
  }
#else
  float t[16][16], turned[16][16];
  for (int i = 0; i < 16; ++i) store(t[i], a[i]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) turned[i][j] = t[j][i];
  for (int i = 0; i < 16; ++i) a[i] = load(turned[i]);
#endif
}

typedef uint8_t Bytes __attribute__((vector_size(16)));
TQ_INLINE Bytes load_bytes(const uint8_t* p) { Bytes b; std::memcpy(&b, p, 16); return b; }
TQ_INLINE Bytes max(Bytes a, Bytes b) { return a > b ? a : b; }

// `codes`: rounded to the nearest integer, ties to even, the zero point added; NaN becomes `nan`; |a| < 2^22.
TQ_INLINE void store_bytes(uint8_t* p, F a, I zero_point, I nan) { store_low_bytes(p, codes(a, zero_point, nan)); }

TQ_INLINE F clamp(F a, F low, F high) { return min(high, max(low, a)); }
TQ_INLINE F exp(F x) {  // relative error below 2e-7 in [-87.6, 88.3]; 0 and infinity beyond
  constexpr float kBiased = kRound + 127;  // so that the low bits are the exponent of 2^n
  x = clamp(x, set(-88.0f), set(89.0f));
  F t = add(mul(x, set(1.44269504088896341f)), set(kBiased));
  F n = sub(t, set(kBiased));
  F r = fma(n, set(-0.693145751953125f), x);
  r = fma(n, set(-1.428606765330187e-6f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set(1.0f)));
  return mul(p, bits(shift_left<23>(bits(t))));  // 2^n, which is 0 for n = -127 and infinity for 128
}
TQ_INLINE F erf(F x) {  // x P(x^2) / Q(x^2) on [-4, 4], beyond which erf is 1 to float accuracy; absolute error below 4e-7
  x = clamp(x, set(-4.0f), set(4.0f));
  F s = mul(x, x);
  F p = set(-2.72614225801306e-10f);
  p = fma(p, s, set(2.77068142495902e-08f));
  p = fma(p, s, set(-2.10102402082508e-06f));
  p = fma(p, s, set(-5.69250639462346e-05f));
  p = fma(p, s, set(-7.34990630326855e-04f));
  p = fma(p, s, set(-2.95459980854025e-03f));
  p = fma(p, s, set(-1.60960333262415e-02f));
  F q = set(-1.45660718464996e-05f);
  q = fma(q, s, set(-2.13374055278905e-04f));
  q = fma(q, s, set(-1.68282697438203e-03f));
  q = fma(q, s, set(-7.37332916720468e-03f));
  q = fma(q, s, set(-1.42647390514189e-02f));
  return div(mul(x, p), q);
}
TQ_INLINE F sigmoid(F x) { return div(set(1.0f), add(set(1.0f), exp(sub(set(0.0f), x)))); }
TQ_INLINE F tanh(F x) { return sub(set(1.0f), div(set(2.0f), add(set(1.0f), exp(add(x, x))))); }

}  // namespace TQ_ISA
