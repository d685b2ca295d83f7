// Sixteen lanes of int32 or float, on AVX-512, on AVX2 as two halves, and anywhere as plain loops.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define TQ_INLINE inline __attribute__((always_inline))

namespace TQ_ISA {

constexpr int kLanes = 16;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits, ties to even

#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(TQ_PORTABLE)
#define TQ_WIDE 1
constexpr int kMaxNv = 4;
constexpr int kMaxMr[5] = {0, 12, 12, 8, 6};
struct I { __m512i v; };
struct F { __m512 v; };
TQ_INLINE I load_int(const void* p) { return {_mm512_loadu_si512(p)}; }
TQ_INLINE void store_int(void* p, I a) { _mm512_storeu_si512(p, a.v); }
TQ_INLINE I broadcast4(const uint8_t* p) { int32_t x; std::memcpy(&x, p, 4); return {_mm512_set1_epi32(x)}; }
TQ_INLINE I set_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
TQ_INLINE I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
TQ_INLINE I dot(I c, I a, I b) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(c.v, a.v, b.v)};
#else  // exact: vpmaddubsw would saturate, so bytes are widened first
  __m512i m = _mm512_set1_epi32(0x00ff00ff);
  __m512i lo = _mm512_madd_epi16(_mm512_and_si512(a.v, m), _mm512_srai_epi16(_mm512_slli_epi16(b.v, 8), 8));
  __m512i hi = _mm512_madd_epi16(_mm512_and_si512(_mm512_srli_epi16(a.v, 8), m), _mm512_srai_epi16(b.v, 8));
  return {_mm512_add_epi32(c.v, _mm512_add_epi32(lo, hi))};
#endif
}
TQ_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
TQ_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
TQ_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
TQ_INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
TQ_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
TQ_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
TQ_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
TQ_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
TQ_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
TQ_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
TQ_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
TQ_INLINE float sum(F a) { return _mm512_reduce_add_ps(a.v); }
TQ_INLINE float largest(F a) { return _mm512_reduce_max_ps(a.v); }
TQ_INLINE F bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
TQ_INLINE I bits(F a) { return {_mm512_castps_si512(a.v)}; }
TQ_INLINE I shift_left23(I a) { return {_mm512_slli_epi32(a.v, 23)}; }
TQ_INLINE F from_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
TQ_INLINE void store_low_bytes(uint8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
#elif defined(__AVX2__) && !defined(TQ_PORTABLE)
constexpr int kMaxNv = 2;
constexpr int kMaxMr[5] = {0, 6, 3, 0, 0};
struct I { __m256i v, w; };
struct F { __m256 v, w; };
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
TQ_INLINE I shift_left23(I a) { return {_mm256_slli_epi32(a.v, 23), _mm256_slli_epi32(a.w, 23)}; }
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
TQ_INLINE I shift_left23(I a) { TQ_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << 23); return a; }
TQ_INLINE F from_bytes(const uint8_t* p) { F r; TQ_EACH r.v[i] = p[i]; return r; }
TQ_INLINE void store_low_bytes(uint8_t* p, I a) { TQ_EACH p[i] = static_cast<uint8_t>(a.v[i]); }
#endif

// Rounds to the nearest integer, ties to even, adds the zero point and writes the low byte; |a| < 2^22.
TQ_INLINE void store_bytes(uint8_t* p, F a, I zero_point) { store_low_bytes(p, add(bits(add(a, set(kRound))), zero_point)); }

TQ_INLINE F clamp(F a, F low, F high) { return min(max(a, low), high); }
TQ_INLINE F exp(F x) {  // relative error below 2e-7 in [-87, 88]
  x = clamp(x, set(-87.0f), set(88.0f));
  F t = add(mul(x, set(1.44269504088896341f)), set(kRound));
  F n = sub(t, set(kRound));
  F r = fma(n, set(-0.693145751953125f), x);
  r = fma(n, set(-1.428606765330187e-6f), r);
  F p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set(1.0f)));
  return bits(add(bits(p), shift_left23(bits(t))));  // 2^n: n sits in the low bits of t
}
TQ_INLINE F absolute(F x) { return max(x, sub(set(0.0f), x)); }
TQ_INLINE F erf(F x) {  // Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7
  F a = absolute(x);
  F t = div(set(1.0f), fma(a, set(0.3275911f), set(1.0f)));
  F p = set(1.061405429f);
  p = fma(p, t, set(-1.453152027f));
  p = fma(p, t, set(1.421413741f));
  p = fma(p, t, set(-0.284496736f));
  p = fma(p, t, set(0.254829592f));
  F y = sub(set(1.0f), mul(mul(p, t), exp(sub(set(0.0f), mul(a, a)))));
  // the sign of x
  F positive = min(max(mul(x, set(1e38f)), set(-1.0f)), set(1.0f));
  return mul(y, positive);
}
TQ_INLINE F sigmoid(F x) { return div(set(1.0f), add(set(1.0f), exp(sub(set(0.0f), x)))); }
TQ_INLINE F tanh(F x) { return sub(set(1.0f), div(set(2.0f), add(set(1.0f), exp(add(x, x))))); }

}  // namespace TQ_ISA
