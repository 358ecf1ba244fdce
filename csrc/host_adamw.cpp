#include "host_adamw.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "host_adamw_loops.h"

namespace chunkft {
namespace {

// What a thread takes at a time: whole tiles, so that blocks of codes and counters of noise are never divided.
constexpr std::size_t kPart = 65536;
static_assert(kPart % kAdamwTile == 0 && kAdamwTile % kCodeBlock == 0 && kCodeBlock % 8 == 0);

std::size_t bytes_of(Format format) {
  return format == Format::kFloat32 ? 4 : format == Format::kCodes ? 1 : 2;
}

template <typename T>
T* at(void* tensor, std::size_t index) {
  return static_cast<T*>(tensor) + index;
}

// Elements [first, first + n) of a contiguous tensor in fp32: where they are, or read into `buffer`.
float* open(const AdamwLoops& loops, Format format, void* tensor, std::size_t first, std::size_t n, float* buffer) {
  if (format == Format::kFloat32) return at<float>(tensor, first);
  const auto load = format == Format::kBfloat16 ? loops.load_bf16 : loops.load_fp16;
  load(at<std::uint16_t>(tensor, first), buffer, n);
  return buffer;
}

void close(const AdamwLoops& loops, Format format, const float* values, void* tensor, std::size_t first,
           std::size_t n) {
  if (format == Format::kFloat32) return;  // was updated where it is
  const auto store = format == Format::kBfloat16 ? loops.store_bf16 : loops.store_fp16;
  store(values, at<std::uint16_t>(tensor, first), n);
}

// Calls `copy(address in the weight, bytes into the tile, bytes)` for each piece of a row among [first, first + n).
template <typename Copy>
void for_rows(const HostAdamwSlice& slice, std::size_t first, std::size_t n, Copy copy) {
  const std::size_t size = bytes_of(slice.weight_format);
  std::size_t row = first / slice.row, column = first % slice.row;
  for (std::size_t done = 0; done < n; ++row, column = 0) {
    const std::size_t count = std::min(slice.row - column, n - done);
    copy(at<std::byte>(slice.weight, (row * slice.pitch + column) * size), done * size, count * size);
    done += count;
  }
}

// What a thread works in; all of it fits into the first-level cache beside what is read and written.
struct Buffers {
  alignas(64) std::byte weight[kAdamwTile * sizeof(float)];
  alignas(64) float value[kAdamwTile];
  alignas(64) float rounded[kAdamwTile];
  alignas(64) float grad[kAdamwTile];
  alignas(64) float exp_avg[kAdamwTile];
  alignas(64) float exp_avg_sq[kAdamwTile];
};

void update_tile(const AdamwLoops& loops, const HostAdamwSlice& slice, const HostAdamwOptions& options,
                 std::size_t first, std::size_t n, Buffers& tile) {
  const bool contiguous = slice.row == slice.pitch;
  void* weight = contiguous ? at<std::byte>(slice.weight, first * bytes_of(slice.weight_format)) : tile.weight;
  if (!contiguous) {
    for_rows(slice, first, n, [&](const std::byte* from, std::size_t offset, std::size_t bytes) {
      std::memcpy(tile.weight + offset, from, bytes);
    });
  }
  float* value;
  if (options.master == Master::kResidual) {
    value = tile.value;
    loops.join_residual(at<std::uint16_t>(weight, 0), at<std::int16_t>(slice.extra, first), value, n);
  } else if (options.master == Master::kFloat32) {
    value = at<float>(slice.extra, first);
    const bool bf16 = slice.weight_format == Format::kBfloat16;
    auto* halves = reinterpret_cast<std::uint16_t*>(tile.value);
    (bf16 ? loops.store_bf16 : loops.store_fp16)(value, halves, n);
    (bf16 ? loops.load_bf16 : loops.load_fp16)(halves, tile.rounded, n);
    loops.join_master(value, tile.rounded, open(loops, slice.weight_format, weight, 0, n, tile.value), n);
  } else {
    value = open(loops, slice.weight_format, weight, 0, n, tile.value);
  }

  // Not written where it is fp32, and read into the buffer where it is not.
  const float* grad = open(loops, slice.grad_format, const_cast<void*>(slice.grad), first, n, tile.grad);
  float *exp_avg = tile.exp_avg, *exp_avg_sq = tile.exp_avg_sq;
  const bool codes = slice.exp_avg_format == Format::kCodes;
  auto* first_codes = at<std::int8_t>(slice.exp_avg, first);
  auto* second_codes = at<std::uint8_t>(slice.exp_avg_sq, first);
  const std::size_t block = first / kCodeBlock;
  if (codes) {
    loops.decode_first(first_codes, slice.exp_avg_scale + block, exp_avg, n);
    loops.decode_second(second_codes, slice.exp_avg_sq_scale + block, exp_avg_sq, n);
  } else {
    exp_avg = open(loops, slice.exp_avg_format, slice.exp_avg, first, n, exp_avg);
    exp_avg_sq = open(loops, slice.exp_avg_sq_format, slice.exp_avg_sq, first, n, exp_avg_sq);
  }

  loops.update(value, grad, exp_avg, exp_avg_sq, n, slice, options);

  if (codes) {
    loops.encode_first(exp_avg, first_codes, slice.exp_avg_scale + block, n);
    loops.encode_second(exp_avg_sq, second_codes, slice.exp_avg_sq_scale + block, n);
  } else {
    close(loops, slice.exp_avg_format, exp_avg, slice.exp_avg, first, n);
    close(loops, slice.exp_avg_sq_format, exp_avg_sq, slice.exp_avg_sq, first, n);
  }
  if (options.master == Master::kResidual) {
    loops.split_residual(value, at<std::uint16_t>(weight, 0), at<std::int16_t>(slice.extra, first), n);
  } else if (options.master == Master::kStochastic) {
    loops.store_stochastic(value, at<std::uint16_t>(weight, 0), slice.seed, first, n);
  } else {
    close(loops, slice.weight_format, value, weight, 0, n);
  }
  if (!contiguous) {
    for_rows(slice, first, n, [&](std::byte* to, std::size_t offset, std::size_t bytes) {
      std::memcpy(to, tile.weight + offset, bytes);
    });
  }
}

bool is_16_bit(Format format) { return format == Format::kBfloat16 || format == Format::kFloat16; }

Status check(const HostAdamwSlice& slice, Master master, std::size_t index) {
  const auto refuse = [&](const std::string& why) {
    return invalid_argument("host_adamw", "slice " + std::to_string(index) + ": " + why);
  };
  if (slice.weight_format == Format::kCodes || slice.grad_format == Format::kCodes) {
    return refuse("weight and gradient must be fp32, bf16 or fp16, not codes");
  }
  const bool fits = master == Master::kNone      ? true
                    : master == Master::kFloat32 ? is_16_bit(slice.weight_format)
                                                 : slice.weight_format == Format::kBfloat16;
  if (!fits) return refuse("a master or stochastic rounding needs a bf16 weight, or an fp16 one with an fp32 master");
  const bool codes = slice.exp_avg_format == Format::kCodes;
  if (codes != (slice.exp_avg_sq_format == Format::kCodes)) return refuse("both moments must be codes, or neither");
  if (slice.row == 0 || slice.pitch < slice.row) {
    return refuse("rows of " + std::to_string(slice.row) + " elements, " + std::to_string(slice.pitch) +
                  " apart; needs 0 < row <= pitch");
  }
  if (slice.count == 0) return {};
  const bool kept = master == Master::kFloat32 || master == Master::kResidual;
  if (slice.weight == nullptr || slice.grad == nullptr || slice.exp_avg == nullptr || slice.exp_avg_sq == nullptr ||
      (kept && slice.extra == nullptr) ||
      (codes && (slice.exp_avg_scale == nullptr || slice.exp_avg_sq_scale == nullptr))) {
    return refuse("an address that is needed is 0");
  }
  return {};
}

}  // namespace

const AdamwLoops* adamw_loops(std::size_t index) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && index-- == 0) {
    return &kAvx512AdamwLoops;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && index-- == 0) return &kAvx2AdamwLoops;
#endif
  return index == 0 ? &kPortableAdamwLoops : nullptr;
}

Status host_adamw(std::span<const HostAdamwSlice> slices, const HostAdamwOptions& options) {
  std::vector<std::size_t> ends;  // parts of the slices up to this one
  ends.reserve(slices.size());
  std::size_t parts = 0;
  for (const HostAdamwSlice& slice : slices) {
    if (Status status = check(slice, options.master, ends.size()); !status.ok()) return status;
    parts += slice.count / kPart + (slice.count % kPart != 0);
    ends.push_back(parts);
  }

  const AdamwLoops& loops = *adamw_loops();
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    Buffers tile;
    for (std::size_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      const auto index = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), part) - ends.begin());
      const HostAdamwSlice& slice = slices[index];
      const std::size_t begin = (part - (index == 0 ? 0 : ends[index - 1])) * kPart;
      const std::size_t end = begin + std::min(kPart, slice.count - begin);
      for (std::size_t first = begin; first < end; first += kAdamwTile) {
        update_tile(loops, slice, options, first, std::min(kAdamwTile, end - first), tile);
      }
    }
  };
  std::vector<std::thread> helpers;
  const std::size_t threads = std::min<std::size_t>(options.threads, parts);
  if (threads > 1) helpers.reserve(threads - 1);
  while (helpers.size() + 1 < threads) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: the others take all parts
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  return {};
}

}  // namespace chunkft
