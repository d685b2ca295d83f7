// Runs a plan: picks the instruction set, walks the ops in order, shares each between the caller's threads.
//
// Several calls may run at once, each in a workspace of its own. Threads come from torch's pool.
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "plan.h"
#include "rows.h"

#define TQ_SETS(X) X(avx512_vnni) X(avx512) X(avx_vnni) X(avx2) X(portable)
#define TQ_DECLARE(name) namespace name { extern const tq::Kernels kernels; extern const tq::RowKernels row_kernels; }
TQ_SETS(TQ_DECLARE)

namespace {
using torch::stable::Tensor;

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (name == "avx512_vnni") return avx512 && __builtin_cpu_supports("avx512vnni");
  if (name == "avx512") return avx512;
  if (name == "avx_vnni") return avx2 && __builtin_cpu_supports("avxvnni");
  if (name == "avx2") return avx2;
#endif
  return name == "portable";
}

const tq::Kernels* const kAll[] = {
#define TQ_ADDRESS(name) &name::kernels,
    TQ_SETS(TQ_ADDRESS)
};

const tq::RowKernels* row_kernels_of(const tq::Kernels* chosen) {
  static const tq::RowKernels* const all[] = {
#define TQ_ROW_ADDRESS(name) &name::row_kernels,
      TQ_SETS(TQ_ROW_ADDRESS)
  };
  int i = 0;
  while (kAll[i] != chosen) ++i;
  return all[i];
}

const tq::Kernels* best() {
  for (const auto* k : kAll)
    if (runs_here(k->name)) return k;
  return nullptr;
}

std::atomic<const tq::Kernels*> chosen{nullptr};
const tq::Kernels* kernels() {
  const auto* k = chosen.load();
  if (!k) chosen.store(k = best());
  return k;
}

// Nanoseconds of each op, collected where a caller asked for it.
std::atomic<bool> profiling{false};
std::mutex profile_lock;
std::map<const void*, std::vector<int64_t>> profile_ns;  // by plan

// Asks for pages of 2 MiB, and moves what is there already into such: weights and activations on pages of 4 KiB miss the
// TLB, and spread unevenly over the sets of the cache. Where the kernel cannot, nothing changes.
void use_large_pages(const void* memory, size_t bytes) {
  constexpr uintptr_t kPage = 4096;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1
  auto begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
  if (end <= begin) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
}

// Once for each plan: its weights.
void settle(const void* plan, size_t bytes) {
  static std::mutex lock;
  static std::set<const void*> seen;
  std::lock_guard<std::mutex> guard(lock);
  if (seen.insert(plan).second) use_large_pages(plan, bytes);
}

struct Workspace {
  uint8_t* memory = nullptr;
  size_t bytes = 0;
  explicit Workspace(size_t size) : bytes(size) {
    constexpr size_t kPage = size_t(2) << 20;
    size_t whole = (size + kPage - 1) / kPage * kPage;
    void* p = nullptr;
    STD_TORCH_CHECK(posix_memalign(&p, kPage, whole) == 0, "torchquant: no memory for a workspace of ", whole, " bytes");
    std::memset(p, 0, whole);
    use_large_pages(p, whole);
    memory = static_cast<uint8_t*>(p);
    bytes = whole;
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() { std::free(memory); }
};

std::mutex pool_lock;
std::vector<std::unique_ptr<Workspace>> pool;

// Whether memory is made useless before it is handed out, so that what a kernel does not write cannot be what it wrote
// in an earlier call: floats are NaN, bytes 255. Slow; for tests and proofs.
std::atomic<bool> poisoning{std::getenv("TORCHQUANT_POISON") != nullptr};
void poison(void* memory, size_t bytes) {
  if (poisoning.load(std::memory_order_relaxed)) std::memset(memory, 0xFF, bytes);
}

std::unique_ptr<Workspace> unused(size_t bytes) {
  {
    std::lock_guard<std::mutex> guard(pool_lock);
    for (auto& w : pool)
      if (w->bytes >= bytes) {
        std::swap(w, pool.back());
        auto found = std::move(pool.back());
        pool.pop_back();
        return found;
      }
  }
  return std::make_unique<Workspace>(bytes);
}
std::unique_ptr<Workspace> borrow(size_t bytes) {
  auto found = unused(bytes);
  poison(found->memory, found->bytes);
  return found;
}
void give_back(std::unique_ptr<Workspace> w) {
  std::lock_guard<std::mutex> guard(pool_lock);
  if (pool.size() >= 16) pool.erase(pool.begin());  // the smaller ones of the past
  pool.push_back(std::move(w));
}

struct Plan {
  const tq::Header* header;
  const tq::Value* values;
  const tq::Op* ops;
  const tq::Range* ranges;
  const uint8_t* blob;
  const uint8_t* call = nullptr;
  explicit Plan(const uint8_t* bytes, int64_t size) {
    header = reinterpret_cast<const tq::Header*>(bytes);
    STD_TORCH_CHECK(size >= int64_t(sizeof(tq::Header)) && header->magic == tq::kMagic, "torchquant: not a plan");
    STD_TORCH_CHECK(header->version == tq::kVersion, "torchquant: the plan has version ", header->version,
                    " and these kernels run version ", tq::kVersion, ": lower the model again");
    constexpr int32_t kMost = 1 << 20;
    bool counted = true;
    for (int32_t n : {header->values, header->ops, header->ranges}) counted = counted && 0 <= n && n <= kMost;
    int64_t records = int64_t(sizeof(tq::Header)) + (counted ? header->values * int64_t(sizeof(tq::Value)) +
                      header->ops * int64_t(sizeof(tq::Op)) + header->ranges * int64_t(sizeof(tq::Range)) : 0);
    int64_t begin = int64_t(header->blob) * tq::kUnit;
    STD_TORCH_CHECK(counted && header->size == size && records <= begin && begin <= size, "torchquant: the plan is damaged: it has ",
                    size, " bytes");
    values = reinterpret_cast<const tq::Value*>(bytes + sizeof(tq::Header));
    ops = reinterpret_cast<const tq::Op*>(values + header->values);
    ranges = reinterpret_cast<const tq::Range*>(ops + header->ops);
    blob = bytes + begin;
    try {
      tq::Check(*header, values, ops, ranges, size - begin).all();
    } catch (const tq::Complaint& complaint) {
      STD_TORCH_CHECK(false, "torchquant: the plan is damaged: ", complaint.text);
    }
  }
};

// Least and largest number of a tensor, both NaN where a number is not finite.
void range_of(const float* p, int64_t n, float* least, float* most) {
  const auto* k = kernels();
  std::mutex lock;
  *least = INFINITY, *most = -INFINITY;
  torch::stable::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
    float low, high;
    k->range(p + begin, end - begin, &low, &high);
    std::lock_guard<std::mutex> guard(lock);
    if (low < *least || std::isnan(low)) *least = low;
    if (high > *most || std::isnan(high)) *most = high;
  });
}

// What a plan with dynamic inputs has of its own in each call: the ops with the scales and zero points of this call.
struct Resolved {
  std::vector<tq::Op> ops;
  std::vector<uint8_t> made;

  Resolved(Plan& plan, const std::vector<Tensor>& inputs) {
    const tq::Header& h = *plan.header;
    if (!h.ranges) return;
    std::vector<float> scales(h.ranges), least(h.ranges), most(h.ranges);
    std::vector<int32_t> zeros(h.ranges);
    for (int i = 0; i < h.ranges; ++i) {
      const tq::Range& r = plan.ranges[i];
      int same = 0;
      while (plan.ranges[same].input != r.input) ++same;
      if (same == i) range_of(static_cast<const float*>(inputs.at(r.input).const_data_ptr()), inputs.at(r.input).numel(), &least[i], &most[i]);
      least[i] = least[same], most[i] = most[same];
      choose(r, least[i], most[i], &scales[i], &zeros[i]);
    }
    ops.assign(plan.ops, plan.ops + h.ops);
    size_t units = 0;
    for (const auto& op : ops)
      if (op.dynamic && op.kind == tq::kConv) units += 2 * blocks(op);
    made.resize((units + 1) * tq::kUnit);
    auto* to = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(made.data()) + tq::kUnit - 1) / tq::kUnit * tq::kUnit);
    plan.call = to;
    int32_t at = 0;
    for (auto& op : ops) {
      if (!op.dynamic) continue;
      float scale = scales[op.dynamic - 1];
      int32_t zero = zeros[op.dynamic - 1];
      if (op.kind != tq::kConv) {
        const tq::Range& r = plan.ranges[op.dynamic - 1];
        op.inverse = static_cast<float>(1.0 / scale);
        op.zero_point = zero;
        op.low = static_cast<float>(r.low - zero);
        op.high = static_cast<float>(r.high - zero);
        continue;
      }
      int32_t n = blocks(op);
      const auto* sums = reinterpret_cast<const int32_t*>(plan.blob + int64_t(op.compensation) * tq::kUnit);
      const auto* factors = reinterpret_cast<const float*>(plan.blob + int64_t(op.scale) * tq::kUnit);
      op.compensation = at, op.scale = at + n;
      auto* sums_to = reinterpret_cast<int32_t*>(to + int64_t(op.compensation) * tq::kUnit);
      auto* factors_to = reinterpret_cast<float*>(to + int64_t(op.scale) * tq::kUnit);
      for (int c = 0; c < n * 16; ++c) sums_to[c] = int32_t(uint32_t(sums[c]) * uint32_t(zero)), factors_to[c] = factors[c] * scale;
      at += 2 * n;
    }
    plan.ops = ops.data();
  }
  Resolved(const Resolved&) = delete;

  static int32_t blocks(const tq::Op& op) { return (op.channels + 15) / 16; }

  // In float32 and in the order of torch's `determine_qparams`, so that scale and zero point are its own.
  static void choose(const tq::Range& r, float least, float most, float* scale, int32_t* zero) {
    *zero = r.symmetric ? 128 : r.low;
    *scale = NAN;
    if (!std::isfinite(least) || !std::isfinite(most)) return;
    float low = std::min(least, 0.0f), high = std::max(most, 0.0f), steps = static_cast<float>(r.high - r.low);
    if (r.symmetric) {
      *scale = std::max(std::max(-low, high) / (steps / 2), r.eps);
      return;
    }
    *scale = std::max((high - low) / steps, r.eps);
    *zero = std::min(std::max(r.low - static_cast<int32_t>(std::nearbyint(low / *scale)), r.low), r.high);
  }
};

// How many samples go through the ops in front of the split together, and through those behind it.
struct Sizes {
  int64_t chunk, group;
  size_t narrow(const tq::Header& h) const { return size_t(h.arena) * tq::kUnit * size_t(chunk); }
  size_t bytes(const tq::Header& h) const { return narrow(h) + size_t(h.wide) * tq::kUnit * size_t(group) + 4096; }
};

// Ops from `begin` to `end` on `n` samples, and the addresses of all values there.
struct Segment {
  int begin, end;
  int64_t n;
  std::vector<uint8_t*> base;
};

// How an op is cut into items: ranges of units, or for a few units, of output channels.
struct Cut {
  int64_t units, items, parts;
  Cut(const tq::Op& op, int64_t n, int threads) : units(n), items(1), parts(1) {
    if (threads == 1) return;
    int64_t blocks = (op.channels + 15) / 16;
    if (op.kind == tq::kConv && units < threads * 16 && blocks > 1) {
      parts = std::min<int64_t>(blocks, threads);
      return;
    }
    int64_t least = op.kind == tq::kConv ? 8 : op.kind == tq::kDepthwise ? 1 : op.kind == tq::kElementwise || op.kind == tq::kLayerNorm || op.kind == tq::kMaxPool ? 16 : 1;
    items = std::max<int64_t>(1, std::min<int64_t>(threads * 3, units / least));
  }
  int64_t total() const { return items * parts; }
  void run(const tq::Kernels* k, const tq::Op& op, const tq::Bound& b, int64_t item) const {
    int64_t i = item / parts, part = item % parts;
    k->run(op, b, units * i / items, units * (i + 1) / items, part, parts);
  }
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Progress {
  std::atomic<int64_t> next{0}, done{0};
};

struct Run {
  const Plan& plan;
  const tq::Kernels* k = kernels();
  uint8_t* const* inputs;
  uint8_t* const* outputs;
  int64_t samples;
  Sizes sizes;
  int threads;

  Segment segment(uint8_t* arena, int64_t first, int64_t at, int64_t n, int begin, int end) const {
    Segment s{begin, end, n, std::vector<uint8_t*>(plan.header->values)};
    for (int i = 0; i < plan.header->values; ++i) {
      const tq::Value& v = plan.values[i];
      int64_t place = int64_t(v.offset) * tq::kUnit;
      if (v.external >= 0) s.base[i] = (v.external < 1000 ? inputs[v.external] : outputs[v.external - 1000]) + (first + at) * tq::sample_bytes(v);
      else if (v.is_wide) s.base[i] = arena + sizes.narrow(*plan.header) + place * sizes.group + at * tq::sample_bytes(v);
      else s.base[i] = arena + place * sizes.chunk;
    }
    return s;
  }

  // What is to be done, in this order, for `n` samples from `first` on.
  std::vector<Segment> segments(uint8_t* arena, int64_t first, int64_t n) const {
    std::vector<Segment> found;
    int split = plan.header->split, ops = plan.header->ops;
    int64_t chunk = split ? sizes.chunk : n;
    for (int64_t at = 0; at < n; at += chunk)
      found.push_back(segment(arena, first, at, std::min(chunk, n - at), 0, split ? split : ops));
    if (split) found.push_back(segment(arena, first, 0, n, split, ops));
    return found;
  }

  tq::Bound bound(const Segment& s) const { return {plan.values, s.base.data(), plan.blob, s.n, plan.call}; }

  void alone(uint8_t* arena, int64_t first, int64_t n) const {
    bool timed = profiling.load(std::memory_order_relaxed);
    for (const Segment& s : segments(arena, first, n)) {
      tq::Bound b = bound(s);
      for (int i = s.begin; i < s.end; ++i) {
        const tq::Op& op = plan.ops[i];
        if (!timed) {
          k->run(op, b, 0, k->units(op, b), 0, 1);
          continue;
        }
        auto start = std::chrono::steady_clock::now();
        k->run(op, b, 0, k->units(op, b), 0, 1);
        int64_t ns = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
        std::lock_guard<std::mutex> guard(profile_lock);
        auto& all = profile_ns[plan.header];
        all.resize(plan.header->ops);
        all[i] += ns;
      }
    }
  }

  // Any number of threads may enter: each claims items until there are none, then waits for those under way.
  void together(uint8_t* arena, int64_t first, int64_t n) const {
    struct Task {
      const tq::Op& op;
      tq::Bound bound;
      Cut cut;
    };
    std::vector<Segment> all = segments(arena, first, n);
    std::vector<Task> tasks;
    for (const Segment& s : all) {
      tq::Bound b = bound(s);
      for (int i = s.begin; i < s.end; ++i) tasks.push_back({plan.ops[i], b, Cut(plan.ops[i], k->units(plan.ops[i], b), threads)});
    }
    std::vector<Progress> progress(tasks.size());
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (size_t i = 0; i < tasks.size(); ++i) {
        const Task& t = tasks[i];
        int64_t total = t.cut.total();
        for (;;) {
          int64_t item = progress[i].next.fetch_add(1, std::memory_order_relaxed);
          if (item >= total) break;
          t.cut.run(k, t.op, t.bound, item);
          progress[i].done.fetch_add(1, std::memory_order_release);
        }
        for (int spins = 0; progress[i].done.load(std::memory_order_acquire) < total;) {
          if (++spins < 4000) relax();
          else sched_yield();
        }
      }
    });
  }

  void all() const {
    int64_t group = sizes.group, groups = (samples + group - 1) / group;
    size_t bytes = sizes.bytes(*plan.header);
    int64_t apart = threads > 1 ? groups / threads * threads : groups;
    if (threads > 1 && apart) {
      std::atomic<int64_t> next{0};
      torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        auto w = borrow(bytes);
        for (int64_t i; (i = next.fetch_add(1)) < apart;)
          alone(w->memory, i * group, std::min(group, samples - i * group));
        give_back(std::move(w));
      });
    }
    auto w = borrow(bytes);
    for (int64_t i = threads > 1 ? apart : 0; i < groups; ++i) {
      int64_t first = i * group, n = std::min(group, samples - first);
      if (threads > 1) together(w->memory, first, n);
      else alone(w->memory, first, n);
    }
    give_back(std::move(w));
  }
};

constexpr int64_t kWorkingSet = int64_t(3) << 19;  // of the samples that go through the network together
constexpr int64_t kWideSet = int64_t(8) << 20;     // and behind the split, where weights are what there is to be read

Sizes sizes_of(const tq::Header& h, int64_t samples, int threads) {
  auto fitting = [](int64_t set, int32_t units) { return std::max<int64_t>(1, set / std::max<int64_t>(1, int64_t(units) * tq::kUnit)); };
  int64_t most = samples < threads ? samples : (samples + threads - 1) / threads;
  int64_t chunk = std::min(h.chunk ? h.chunk : fitting(kWorkingSet, h.arena), most);
  if (!h.split) return {chunk, chunk};
  int64_t largest = std::min(most, fitting(kWideSet, h.wide)), groups = (samples + largest - 1) / largest;
  if (samples >= threads) groups = (groups + threads - 1) / threads * threads;  // so that each thread has as many
  int64_t group = (samples + groups - 1) / groups;
  return {std::min(chunk, group), group};
}

std::vector<Tensor> region(Tensor plan_bytes, std::vector<Tensor> inputs, std::vector<int64_t> shapes) {
  STD_TORCH_CHECK(plan_bytes.scalar_type() == torch::headeronly::ScalarType::Byte && plan_bytes.is_contiguous(), "torchquant: not a plan");
  Plan plan(static_cast<const uint8_t*>(plan_bytes.const_data_ptr()), plan_bytes.numel());
  const tq::Header& h = *plan.header;
  STD_TORCH_CHECK(int64_t(inputs.size()) == h.inputs, "torchquant: the region takes ", h.inputs, " tensors");
  std::vector<uint8_t*> in(h.inputs), out;
  int64_t samples = 0;
  for (int i = 0; i < h.inputs; ++i) {
    if (!inputs[i].is_contiguous()) inputs[i] = torch::stable::contiguous(inputs[i]);
    STD_TORCH_CHECK(inputs[i].scalar_type() == torch::headeronly::ScalarType::Float, "torchquant: input ", i,
                    " of the region is no float32");
    in[i] = static_cast<uint8_t*>(const_cast<void*>(inputs[i].const_data_ptr()));
    for (int v = 0; v < h.values; ++v) {
      const tq::Value& value = plan.values[v];
      if (value.external != i) continue;
      int64_t size = int64_t(value.h) * value.w * value.c, n = inputs[i].numel() / size;
      STD_TORCH_CHECK(n * size == inputs[i].numel() && (i == 0 || n == samples), "torchquant: input ", i,
                      " of the region has ", inputs[i].numel(), " elements, and ", size, " make a sample");
      samples = n;
    }
  }
  std::vector<int64_t> elements(h.outputs, -1);
  for (int v = 0; v < h.values; ++v) {
    const tq::Value& value = plan.values[v];
    if (value.external >= 1000) elements[value.external - 1000] = int64_t(value.h) * value.w * value.c * samples;
  }
  std::vector<Tensor> found;
  for (size_t at = 0; at < shapes.size();) {
    int64_t dims = shapes[at++];
    STD_TORCH_CHECK(dims >= 0 && dims <= int64_t(shapes.size() - at), "torchquant: the shapes of the region's outputs are damaged");
    STD_TORCH_CHECK(int64_t(found.size()) < h.outputs, "torchquant: the region returns ", h.outputs, " tensors");
    std::vector<int64_t> size;
    double given = 1;
    for (int64_t d = 0; d < dims; ++d, ++at) {
      STD_TORCH_CHECK(shapes[at] >= -inputs[0].dim(), "torchquant: the shapes of the region's outputs are damaged");
      size.push_back(shapes[at] < 0 ? inputs[0].size(-1 - shapes[at]) : shapes[at]);
      given *= double(size.back());
    }
    int64_t wanted = elements[found.size()];
    STD_TORCH_CHECK(given == double(wanted), "torchquant: output ", found.size(), " of the region has ", wanted, " elements, not ", int64_t(std::min(given, 9e18)));
    found.push_back(torch::stable::new_empty(inputs[0], size));
    out.push_back(static_cast<uint8_t*>(found.back().mutable_data_ptr()));
    poison(out.back(), size_t(found.back().numel()) * sizeof(float));
  }
  STD_TORCH_CHECK(int64_t(found.size()) == h.outputs, "torchquant: the region returns ", h.outputs, " tensors");
  if (samples == 0) return found;
  settle(plan.header, size_t(h.size));
  Resolved resolved(plan, inputs);
  int threads = std::max(1, int(torch::stable::get_num_threads()));
  Run{plan, kernels(), in.data(), out.data(), samples, sizes_of(h, samples, threads), threads}.all();
  return found;
}

// As torch's scaled_dot_product_attention without dropout; the result is (b, rows, heads, width), transposed by the caller.
Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, double scale, bool causal) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "torchquant: attention takes four dimensions");
  for (Tensor* t : {&query, &key, &value}) {
    STD_TORCH_CHECK(t->scalar_type() == torch::headeronly::ScalarType::Float, "torchquant: attention takes float32");
    if (t->stride(3) != 1) *t = torch::stable::contiguous(*t);
  }
  tq::Attention a{};
  a.query = static_cast<const float*>(query.const_data_ptr());
  a.key = static_cast<const float*>(key.const_data_ptr());
  a.value = static_cast<const float*>(value.const_data_ptr());
  a.heads = query.size(1), a.groups = key.size(1), a.rows = query.size(2), a.keys = key.size(2), a.width = query.size(3);
  int64_t batch = query.size(0);
  STD_TORCH_CHECK(key.size(0) == batch && value.size(0) == batch && value.size(1) == a.groups && value.size(2) == a.keys &&
                  key.size(3) == a.width && value.size(3) == a.width && a.groups > 0 && a.heads % a.groups == 0,
                  "torchquant: attention: sizes do not fit");
  for (int i = 0; i < 3; ++i) {
    a.query_stride[i] = query.stride(i);
    a.key_stride[i] = key.stride(i);
    a.value_stride[i] = value.stride(i);
  }
  if (mask) {
    int64_t dims = mask->dim();
    const int64_t sizes[4] = {batch, a.heads, a.rows, a.keys};
    bool is_bool = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
    STD_TORCH_CHECK(dims <= 4 && (is_bool || mask->scalar_type() == torch::headeronly::ScalarType::Float),
                    "torchquant: attention takes a mask of bool or float32 with four dimensions at most");
    for (int i = 0; i < 4; ++i) {
      int64_t d = i - 4 + dims;
      STD_TORCH_CHECK(d < 0 || mask->size(d) == 1 || mask->size(d) == sizes[i], "torchquant: attention: the mask does not fit");
      a.mask_stride[i] = d < 0 || mask->size(d) == 1 ? 0 : mask->stride(d);
    }
    a.mask = mask->const_data_ptr();
    a.mask_is_byte = is_bool;
  }
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  std::vector<int64_t> size = {batch, a.rows, a.heads, a.width};
  Tensor out = torch::stable::new_empty(query, size);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  poison(a.out, size_t(out.numel()) * sizeof(float));
  const auto* k = kernels();
  torch::stable::parallel_for(0, batch * a.heads, 1, [&](int64_t begin, int64_t end) { k->attention(a, begin, end); });
  return out;
}

// ---- weights of few bits ------------------------------------------------------------------------------------------

tq::Rows rows_of(const Tensor& packed) {
  STD_TORCH_CHECK(packed.scalar_type() == torch::headeronly::ScalarType::Byte && packed.is_contiguous() &&
                  packed.numel() >= int64_t(sizeof(tq::RowsHeader)), "torchquant: not a packed weight");
  const auto* bytes = static_cast<const uint8_t*>(packed.const_data_ptr());
  const auto& h = *reinterpret_cast<const tq::RowsHeader*>(bytes);
  STD_TORCH_CHECK(h.magic == tq::kRowsMagic, "torchquant: not a packed weight");
  STD_TORCH_CHECK(h.version == tq::kRowsVersion, "torchquant: the packed weight has version ", h.version,
                  " and these kernels run version ", tq::kRowsVersion, ": lower the model again");
  constexpr int32_t kMost = 1 << 28;
  bool right = h.bits == 2 || h.bits == 3 || h.bits == 4 || h.bits == 8;
  for (int32_t n : {h.outputs, h.inputs, h.block, h.stored_block, h.blocks, h.blocks_per_scale}) right = right && 0 < n && n <= kMost;
  for (int32_t n : {h.scales, h.zeros, h.bias, h.size}) right = right && n >= 0;
  for (int32_t n : {h.scale_is_half, h.zero_is_byte}) right = right && (n == 0 || n == 1);
  right = right && h.stored_block >= h.block && h.stored_block % tq::step_inputs(h.bits) == 0 && h.stored_block <= 1 << 20 &&
          int64_t(h.block) * (h.blocks - 1) < h.inputs && h.inputs <= int64_t(h.block) * h.blocks && packed.numel() == int64_t(h.size) * 64;
  tq::Rows w{&h, bytes};
  if (right) {
    double panels = double(w.panels()), scales = panels * double(w.scale_blocks()), end = double(h.size) * 64;
    right = 64 + panels * h.blocks * double(w.block_lines()) * 64 <= double(h.scales) * 64 &&
            double(h.scales) * 64 + scales * (h.scale_is_half ? 32 : 64) <= end &&
            (!h.zero_is_byte || (h.zeros > 0 && double(h.zeros) * 64 + scales * 16 <= end)) &&
            (!h.bias || double(h.bias) * 64 + panels * 64 <= end);
  }
  STD_TORCH_CHECK(right, "torchquant: the packed weight is damaged: it has ", packed.numel(), " bytes");
  return w;
}

constexpr int64_t kWork = 1 << 19;  // products that are worth a thread: a fork takes as long as about half of them

// `rows` rows of floats by a packed weight, as often as asked for.
class RowProduct {
 public:
  RowProduct(const tq::Rows& weight, int64_t rows, int64_t bits, double least_scale) : w(weight) {
    a.rows = rows, a.bits = int(bits), a.least_scale = static_cast<float>(least_scale);
    size_t codes = (size_t(rows) * w.stored_inputs() * 2 + 63) / 64 * 64, floats = size_t(rows) * w.h->blocks;
    space = borrow(codes + 2 * floats * sizeof(float));
    a.codes = reinterpret_cast<int8_t*>(space->memory);
    a.scale = reinterpret_cast<float*>(space->memory + codes), a.sum = a.scale + floats;
    threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    parts = std::min({threads, (w.panels() + 3) / 4, std::max<int64_t>(1, rows * w.h->inputs * w.h->outputs / kWork)});
  }
  RowProduct(const RowProduct&) = delete;
  ~RowProduct() { give_back(std::move(space)); }

  void run(const float* from, float* to) {
    if (threads == 1 || a.rows * w.h->inputs < kWork) k->quantize(w, from, a, 0, a.rows);
    else torch::stable::parallel_for(0, a.rows, 1, [&](int64_t begin, int64_t end) { k->quantize(w, from, a, begin, end); });
    if (parts == 1) return k->multiply(w, a, to, 0, a.rows, 0, w.panels());
    auto edge = [&](int64_t i) { return std::min(w.panels(), (w.panels() + 3) / 4 * i / parts * 4); };
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) { k->multiply(w, a, to, 0, a.rows, edge(begin), edge(end)); });
  }

 private:
  const tq::Rows w;
  const tq::RowKernels* k = row_kernels_of(kernels());
  tq::Activations a;
  std::unique_ptr<Workspace> space;
  int64_t threads, parts;
};

// x (..., inputs) by a packed weight (outputs, inputs). `bits` of the activations: 16, or 8 with a scale for each row.
Tensor linear(Tensor packed, Tensor x, int64_t outputs, int64_t bits, double least_scale) {
  tq::Rows w = rows_of(packed);
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float && x.dim() > 0 && x.size(x.dim() - 1) == w.h->inputs,
                  "torchquant: the linear takes float32 rows of ", w.h->inputs, " values");
  STD_TORCH_CHECK(outputs == w.h->outputs && (bits == 16 || bits == 8), "torchquant: the linear gives ", w.h->outputs, " values a row");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  std::vector<int64_t> size(x.dim(), outputs);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) size[d] = x.size(d);
  Tensor out = torch::stable::new_empty(x, size);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  poison(to, size_t(out.numel()) * sizeof(float));
  const int64_t rows = x.numel() / w.h->inputs;
  if (rows == 0) return out;
  settle(w.bytes, size_t(packed.numel()));
  RowProduct(w, rows, bits, least_scale).run(static_cast<const float*>(x.const_data_ptr()), to);
  return out;
}

constexpr double kLeastScale = 0x1p-126;  // of states, where all of them are zero

// One direction of a recurrent layer: `given` (time, samples, gates * states), or samples first, is what the input makes of
// the gates, and a packed weight (gates * states, states) multiplies the state (samples, states). Returns all states in the
// order of `given`, and of an LSTM the last cell.
std::vector<Tensor> recurrent(Tensor packed, Tensor given, Tensor state, std::optional<Tensor> cell, int64_t kind, bool batch_first, bool reverse) {
  STD_TORCH_CHECK(0 <= kind && kind <= tq::kRnnRelu && cell.has_value() == (kind == tq::kLstm), "torchquant: a recurrent layer of no kind");
  const auto form = tq::Recurrence(kind);
  tq::Rows w = rows_of(packed);
  const int64_t n = w.h->inputs, width = tq::gates_of(form) * n;
  STD_TORCH_CHECK(w.h->outputs == width && given.dim() == 3 && given.size(2) == width, "torchquant: the recurrent layer takes ", width, " gates a step");
  const int64_t steps = given.size(batch_first ? 1 : 0), samples = given.size(batch_first ? 0 : 1);
  std::vector<Tensor*> floats = {&given, &state};
  if (cell) floats.push_back(&*cell);
  for (Tensor* t : floats) {
    STD_TORCH_CHECK(t->scalar_type() == torch::headeronly::ScalarType::Float, "torchquant: a recurrent layer takes float32");
    STD_TORCH_CHECK(t == &given || (t->dim() == 2 && t->size(0) == samples && t->size(1) == n), "torchquant: the recurrent layer has ", n, " states a sample");
    if (!t->is_contiguous()) *t = torch::stable::contiguous(*t);
  }
  Tensor out = torch::stable::new_empty(given, {given.size(0), given.size(1), n});
  std::vector<Tensor> made = {out};
  poison(out.mutable_data_ptr(), size_t(out.numel()) * sizeof(float));
  std::vector<float> now(static_cast<const float*>(state.const_data_ptr()), static_cast<const float*>(state.const_data_ptr()) + samples * n);
  if (cell) made.push_back(torch::stable::clone(*cell));
  if (steps == 0 || samples == 0) return made;
  auto* cells = cell ? static_cast<float*>(made[1].mutable_data_ptr()) : now.data();
  settle(w.bytes, size_t(packed.numel()));
  RowProduct product(w, samples, 16, kLeastScale);
  std::vector<float> hidden(size_t(samples) * width);
  const auto* from = static_cast<const float*>(given.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const auto* k = row_kernels_of(kernels());
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t t = reverse ? steps - 1 - i : i;
    product.run(now.data(), hidden.data());
    for (int64_t s = 0; s < samples; ++s) {
      const int64_t place = batch_first ? s * steps + t : t * samples + s;
      k->step(form, from + place * width, hidden.data() + s * width, now.data() + s * n, cells + s * n, n);
      std::memcpy(to + place * n, now.data() + s * n, size_t(n) * sizeof(float));
    }
  }
  return made;
}

// Indices of a table of `rows` rows, each of which is one.
struct Indices {
  Tensor values;
  bool wide;
  int64_t n;
  Indices(Tensor indices, int64_t rows) : values(std::move(indices)) {
    wide = values.scalar_type() == torch::headeronly::ScalarType::Long;
    STD_TORCH_CHECK(wide || values.scalar_type() == torch::headeronly::ScalarType::Int, "torchquant: indices are int32 or int64");
    if (!values.is_contiguous()) values = torch::stable::contiguous(values);
    n = values.numel();
    for (int64_t i = 0; i < n; ++i)
      STD_TORCH_CHECK(0 <= (*this)[i] && (*this)[i] < rows, "torchquant: index ", (*this)[i], " is out of range: the table has ", rows, " rows");
  }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(values.const_data_ptr())[i] : int64_t(static_cast<const int32_t*>(values.const_data_ptr())[i]);
  }
  // Calls f(i) for all places, and returns what is to be filled: (..., width) float32.
  template <class Fill> Tensor rows(int64_t width, Fill&& fill) const {
    std::vector<int64_t> size(values.dim() + 1, width);
    for (int64_t d = 0; d < values.dim(); ++d) size[d] = values.size(d);
    Tensor out = torch::stable::new_empty(values, size, torch::headeronly::ScalarType::Float);
    auto* to = static_cast<float*>(out.mutable_data_ptr());
    poison(to, size_t(out.numel()) * sizeof(float));
    torch::stable::parallel_for(0, n, (1 << 15) / (width + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill((*this)[i], to + i * width);
    });
    return out;
  }
};

// The rows of a packed table at `indices` (...) as floats (..., width).
Tensor lookup(Tensor packed, Tensor indices, int64_t width) {
  tq::Rows w = rows_of(packed);
  STD_TORCH_CHECK(width == w.h->inputs, "torchquant: the table has rows of ", w.h->inputs, " values");
  const auto* k = row_kernels_of(kernels());
  return Indices(indices, w.h->outputs).rows(width, [&](int64_t row, float* to) { k->look_up(w, row, to); });
}

// Likewise of a table of floats. What Inductor generates ends the process where an index is out of range.
Tensor float_lookup(Tensor table, Tensor indices) {
  STD_TORCH_CHECK(table.dim() == 2 && table.scalar_type() == torch::headeronly::ScalarType::Float, "torchquant: the table is no matrix of float32");
  if (!table.is_contiguous()) table = torch::stable::contiguous(table);
  const auto* from = static_cast<const float*>(table.const_data_ptr());
  const int64_t width = table.size(1);
  return Indices(indices, table.size(0)).rows(width, [&](int64_t row, float* to) { std::memcpy(to, from + row * width, size_t(width) * sizeof(float)); });
}

}  // namespace

// TQ_NAMESPACE: of this build alone, see native.py.
STABLE_TORCH_LIBRARY_FRAGMENT(TQ_NAMESPACE, m) {
  m.def("x86_region(Tensor plan, Tensor[] inputs, int[] shapes) -> Tensor[]");
  m.def("x86_linear(Tensor packed, Tensor x, int outputs, int bits, float least_scale) -> Tensor");
  m.def("x86_lookup(Tensor packed, Tensor indices, int width) -> Tensor");
  m.def("x86_float_lookup(Tensor table, Tensor indices) -> Tensor");
  m.def("x86_recurrent(Tensor packed, Tensor given, Tensor state, Tensor? cell, int kind, bool batch_first, bool reverse) -> Tensor[]");
  m.def("x86_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(TQ_NAMESPACE, CPU, m) {
  m.impl("x86_region", TORCH_BOX(&region));
  m.impl("x86_attention", TORCH_BOX(&attention));
  m.impl("x86_linear", TORCH_BOX(&linear));
  m.impl("x86_lookup", TORCH_BOX(&lookup));
  m.impl("x86_recurrent", TORCH_BOX(&recurrent));
  m.impl("x86_float_lookup", TORCH_BOX(&float_lookup));
}

#define TQ_EXPORT __attribute__((visibility("default")))

extern "C" {
// The instruction sets that run here, best first, separated by spaces.
TQ_EXPORT const char* torchquant_x86_sets() {
  static const std::string names = [] {
    std::string s;
    for (const auto* k : kAll)
      if (runs_here(k->name)) s += (s.empty() ? "" : " ") + std::string(k->name);
    return s;
  }();
  return names.c_str();
}
// Uses one of them from now on; 0 if it does not run here. An empty name: the best.
TQ_EXPORT int torchquant_x86_use(const char* name) {
  if (!*name) { chosen.store(best()); return 1; }
  for (const auto* k : kAll)
    if (std::string(name) == k->name && runs_here(name)) { chosen.store(k); return 1; }
  return 0;
}
// Whether workspaces and outputs are made useless before they are written; whether they were so far.
TQ_EXPORT int torchquant_x86_poison(int on) { return poisoning.exchange(on != 0); }
TQ_EXPORT void torchquant_x86_profile(int on) {
  std::lock_guard<std::mutex> guard(profile_lock);
  profile_ns.clear();
  profiling.store(on != 0);
}
// Nanoseconds of op `index` of a plan since profiling began, on one thread; -1 where it did not run.
TQ_EXPORT int64_t torchquant_x86_profiled(const void* plan, int64_t index) {
  std::lock_guard<std::mutex> guard(profile_lock);
  auto found = profile_ns.find(plan);
  return found == profile_ns.end() || index >= int64_t(found->second.size()) ? -1 : found->second[index];
}
}
