// What one machine can do at best: multiply-accumulates with operands in registers, and bytes read from each level.
#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int CHAINS = 12;  // independent accumulators: more than latency times throughput, fewer than ymm registers

template <class Vector, class Step>
void chains(long rounds, Vector seed, Step step) {
  Vector a = seed, b = seed, c = seed, d = seed, e = seed, f = seed;  // an array would stay in memory
  Vector g = seed, h = seed, i = seed, j = seed, k = seed, l = seed;
  const auto next = [&step](Vector& sum) __attribute__((always_inline)) {
    sum = step(sum);
    asm volatile("" : "+v"(sum));  // keeps every step
  };
  for (long round = 0; round < rounds; ++round) {
    next(a), next(b), next(c), next(d), next(e), next(f);
    next(g), next(h), next(i), next(j), next(k), next(l);
  }
}

#if defined(__AVX512VNNI__)
const char* int8_name = "vpdpbusd zmm";
constexpr int INT8_MACS = 64;
void int8(long rounds) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  chains(rounds, a, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, b); });
}
#elif defined(__AVXVNNI__)
const char* int8_name = "vpdpbusd ymm";
constexpr int INT8_MACS = 32;
void int8(long rounds) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
  chains(rounds, a, [=](__m256i sum) { return _mm256_dpbusd_avx_epi32(sum, a, b); });
}
#else
const char* int8_name = "vpmaddubsw, vpmaddwd, vpaddd ymm";
constexpr int INT8_MACS = 32;
void int8(long rounds) {
  const __m256i b = _mm256_set1_epi8(-5), ones = _mm256_set1_epi16(1);
  __m256i a = _mm256_set1_epi8(3);
  chains(rounds, a, [=](__m256i sum) mutable {
    asm volatile("" : "+v"(a));  // or the product would be taken out of the loop
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
  });
}
#endif

#if defined(__AVX512F__)
const char* fp32_name = "vfmadd zmm";
constexpr int FP32_MACS = 16;
void fp32(long rounds) {
  const __m512 a = _mm512_set1_ps(1.5f), b = _mm512_set1_ps(-0.25f);
  chains(rounds, a, [=](__m512 sum) { return _mm512_fmadd_ps(a, b, sum); });
}
#else
const char* fp32_name = "vfmadd ymm";
constexpr int FP32_MACS = 8;
void fp32(long rounds) {
  const __m256 a = _mm256_set1_ps(1.5f), b = _mm256_set1_ps(-0.25f);
  chains(rounds, a, [=](__m256 sum) { return _mm256_fmadd_ps(a, b, sum); });
}
#endif

#if defined(__AVX512BF16__)
const char* bf16_name = "vdpbf16ps zmm";
constexpr int BF16_MACS = 32;
void bf16(long rounds) {
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.5f), _mm512_set1_ps(1.5f));
  const __m512bh b = _mm512_cvtne2ps_pbh(_mm512_set1_ps(-0.25f), _mm512_set1_ps(-0.25f));
  chains(rounds, _mm512_set1_ps(1.0f), [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, b); });
}
#else
const char* bf16_name = "";
constexpr int BF16_MACS = 0;
void bf16(long) {}
#endif

double least_share = 1;  // of a core that the threads of a kept timing had

double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Wall seconds of work(thread), started together, the shortest of `repeats`.
template <class Work>
double seconds(int threads, int repeats, Work work) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30, share = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::atomic<int> waiting{threads};
    std::vector<Clock::time_point> starts(threads), ends(threads);
    std::vector<double> cpu(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        --waiting;
        while (waiting) {}
        cpu[t] = -cpu_seconds();
        starts[t] = Clock::now();
        work(t);
        ends[t] = Clock::now();
        cpu[t] += cpu_seconds();
      });
    for (auto& thread : pool) thread.join();
    const auto all = *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
    const double wall = std::chrono::duration<double>(all).count();
    if (wall >= best) continue;
    best = wall;
    share = *std::min_element(cpu.begin(), cpu.end()) / wall;
  }
  least_share = std::min(least_share, share);
  return best;
}

typedef long long Line __attribute__((vector_size(64)));

void read_all(const Line* lines, long count, long passes) {
  Line a = {}, b = {}, c = {}, d = {};
  for (long pass = 0; pass < passes; ++pass)
    for (const Line* line = lines; line < lines + count; line += 8) {
      a ^= line[0], b ^= line[1], c ^= line[2], d ^= line[3];
      a ^= line[4], b ^= line[5], c ^= line[6], d ^= line[7];
      asm volatile("" : : : "memory");  // every pass reads anew
    }
  const Line all = a ^ b ^ c ^ d;
  volatile long long sink = all[0] ^ all[7];
  (void)sink;
}

}  // namespace

extern "C" {

// Multiply-accumulates a second of all threads; `kind`: 0 int8, 1 fp32, 2 bf16 (0 if the CPU has none).
double macs_per_second(int kind, int threads, int repeats) {
  const long rounds = 300000;  // short, so that some repeat meets no other process
  void (*const kernels[])(long) = {int8, fp32, bf16};
  const int macs[] = {INT8_MACS, FP32_MACS, BF16_MACS};
  if (!macs[kind]) return 0;
  return double(rounds) * CHAINS * macs[kind] * threads / seconds(threads, repeats, [&](int) { kernels[kind](rounds); });
}

// The least share of a core that a thread had in any timing kept since the last call; below 1 another process ran too.
double core_share() {
  const double found = least_share;
  least_share = 1;
  return found;
}

const char* instruction(int kind) {
  const char* const names[] = {int8_name, fp32_name, bf16_name};
  return names[kind];
}

// Bytes a second that all threads read, each from `bytes` (a multiple of 512) of its own, `passes` times; 0: no memory.
double bytes_per_second(long bytes, long passes, int threads, int repeats) {
  std::vector<void*> arrays(threads);
  for (auto& array : arrays) {
    array = std::aligned_alloc(4096, bytes);
    if (!array) return 0;
    std::memset(array, 1, bytes);
  }
  const double best = seconds(threads, repeats, [&](int t) {
    read_all(static_cast<const Line*>(arrays[t]), bytes / long(sizeof(Line)), passes);
  });
  for (auto& array : arrays) std::free(array);
  return double(bytes) * passes * threads / best;
}
}
