#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "status.h"

namespace chunkft {

// kCodes: 8 bits and a scale for every kCodeBlock elements, signed for the first moment, unsigned for the second.
enum class Format { kFloat32, kBfloat16, kFloat16, kCodes };
// As chunkft.kernels.adamw has them: what is kept beside a weight whose format lacks bits.
enum class Master { kNone, kFloat32, kResidual, kStochastic };

inline constexpr std::size_t kCodeBlock = 128;

// The tensors of one slice. All but the weight are contiguous and of `count` elements; scales are ceil(count / 128).
struct HostAdamwSlice {
  void* weight;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* extra;  // float master, or 16-bit residual; null for the other two
  float* exp_avg_scale;  // null unless the moments are codes
  float* exp_avg_sq_scale;
  std::size_t count;
  // Of the weight, in elements: of a row, and from row to row. Equal where it is contiguous.
  std::size_t row;
  std::size_t pitch;
  Format weight_format;
  Format grad_format;
  Format exp_avg_format;
  Format exp_avg_sq_format;
  std::uint64_t seed;  // of stochastic rounding
  float decay;         // 1 - lr weight_decay
  float step_size;     // lr / (1 - beta1^t)
  float root;          // sqrt(1 - beta2^t)
};

struct HostAdamwOptions {
  Master master = Master::kNone;
  float pull = 0.1f;  // 1 - beta1
  float beta2 = 0.999f;
  float keep2 = 0.001f;  // 1 - beta2
  float eps = 1e-8f;
  // The gradient is multiplied by one, then by the other.
  float grad_factor = 1;
  float clip_factor = 1;
  unsigned threads = 1;  // at most; fewer where there is too little to do for them
};

// AdamW (arXiv 1711.05101, algorithm 2) of all slices in place, in one pass over memory, in fp32:
//   m' = m + pull (g - m),  v' = beta2 v + keep2 g^2,  w' = decay w - step_size m' / (sqrt(v') / root + eps)
// Every element depends on its own slice alone, so the bits are the same for any number of threads. Where the processor
// has fused multiply-adds they are those of ATen's lerp and addcmul; elsewhere both go without. Threads live for the
// call: there are none that a forked child would miss. The caller keeps the tensors alive, and apart from each other.
// Refuses, before anything is changed, formats and pitches that do not fit.
Status host_adamw(std::span<const HostAdamwSlice> slices, const HostAdamwOptions& options);

}  // namespace chunkft
