#pragma once

#include <cstddef>
#include <cstdint>

namespace chunkft {

struct HostAdamwOptions;
struct HostAdamwSlice;

// Loops over a tile: small, without branches, so that compilers vectorise them. Each instruction set has them compiled
// for itself (host_adamw_loops.inc); `n` is the number of elements, pointers do not overlap.
struct AdamwLoops {
  const char* name;
  bool fused;  // multiply-adds are rounded once

  void (*load_bf16)(const std::uint16_t* from, float* to, std::size_t n);
  void (*load_fp16)(const std::uint16_t* from, float* to, std::size_t n);
  void (*store_bf16)(const float* from, std::uint16_t* to, std::size_t n);
  void (*store_fp16)(const float* from, std::uint16_t* to, std::size_t n);

  // The master, unless the weight is not what it rounds to: then the weight. `rounded` is the master, rounded.
  void (*join_master)(float* master, const float* rounded, const float* weight, std::size_t n);
  // The fp32 value of a bf16 weight and its residual, and back (chunkft/kernels/rounding.py).
  void (*join_residual)(const std::uint16_t* weight, const std::int16_t* residual, float* to, std::size_t n);
  void (*split_residual)(const float* from, std::uint16_t* weight, std::int16_t* residual, std::size_t n);
  // Rounds elements `first` ... of a slice; `first` is a multiple of 8.
  void (*store_stochastic)(const float* from, std::uint16_t* to, std::uint64_t seed, std::uint64_t first,
                           std::size_t n);

  // Blocks of kCodeBlock elements, the last one maybe short; one scale each.
  void (*decode_first)(const std::int8_t* codes, const float* scales, float* to, std::size_t n);
  void (*encode_first)(const float* from, std::int8_t* codes, float* scales, std::size_t n);
  void (*decode_second)(const std::uint8_t* codes, const float* scales, float* to, std::size_t n);
  void (*encode_second)(const float* from, std::uint8_t* codes, float* scales, std::size_t n);

  void (*update)(float* value, const float* grad, float* exp_avg, float* exp_avg_sq, std::size_t n,
                 const HostAdamwSlice& slice, const HostAdamwOptions& options);
};

// Elements of a tile at most: few, so that loads of one tensor and arithmetic on another are never far apart.
inline constexpr std::size_t kAdamwTile = 256;

extern const AdamwLoops kPortableAdamwLoops;
#if defined(__x86_64__)
extern const AdamwLoops kAvx2AdamwLoops;
extern const AdamwLoops kAvx512AdamwLoops;
#endif

// Those of `index`-th choice that this processor can run, the fastest first; null behind the last.
const AdamwLoops* adamw_loops(std::size_t index = 0);

}  // namespace chunkft
