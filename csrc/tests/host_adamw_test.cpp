#include "host_adamw.h"

#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "host_adamw_loops.h"

namespace {

using namespace chunkft;

std::vector<const AdamwLoops*> all_loops() {
  std::vector<const AdamwLoops*> found;
  while (const AdamwLoops* loops = adamw_loops(found.size())) found.push_back(loops);
  return found;
}

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

// Every kind of value: random bits, those near to the limits of fp16, infinities, NaN.
std::vector<float> all_kinds(std::size_t n) {
  std::mt19937 random(7);
  std::vector<float> values = {0.0f, -0.0f, 65504.0f, 65519.99f, 65520.0f, 0x1p-14f, 0x1.ffcp-15f, 0x1p-24f, 0x1p-25f,
                               0x1.000002p-25f, 0x1p127f, 0x1.fffffep127f, -0x1.fffffep127f, 1.00390625f, 1.01171875f,
                               0x1.002p0f, 0x1.006p0f};  // the last four lie between two halves
  for (const float odd : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    values.insert(values.end(), {odd, -odd});
  }
  // NaN that are infinities in their upper half, or that carry into the sign when they are rounded
  for (const std::uint32_t bits : {0x7f800001u, 0x7f80ffffu, 0x7fffffffu, 0xffffffffu}) values.push_back(float_of(bits));
  while (values.size() < n) {
    const auto bits = static_cast<std::uint32_t>(random());
    // every second one in the range of fp16
    values.push_back(float_of(values.size() % 2 ? bits : (bits & 0x80ffffff) | ((96 + bits / 64 % 50) << 23)));
  }
  values.resize(n);
  return values;
}

double fp16_value(std::uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  const double whole = exponent < 31 ? size : fraction == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
  return half & 0x8000 ? -whole : whole;
}

TEST(every_half_is_read_as_its_definition_says) {
  std::vector<std::uint16_t> halves(kAdamwTile);
  std::vector<float> floats(kAdamwTile);
  for (const AdamwLoops* loops : all_loops()) {
    for (std::uint32_t start = 0; start < 65536; start += kAdamwTile) {
      for (std::size_t i = 0; i < kAdamwTile; ++i) halves[i] = static_cast<std::uint16_t>(start + i);
      loops->load_fp16(halves.data(), floats.data(), kAdamwTile);
      for (std::size_t i = 0; i < kAdamwTile; ++i) CHECK(same(floats[i], static_cast<float>(fp16_value(halves[i]))));
      loops->load_bf16(halves.data(), floats.data(), kAdamwTile);
      for (std::size_t i = 0; i < kAdamwTile; ++i) CHECK(bits_of(floats[i]) == std::uint32_t{halves[i]} << 16);
    }
  }
}

// `half` is the nearest of its neighbours to `value`, and the even one of two that are equally near.
template <typename Read>
bool is_nearest(std::uint16_t half, double value, std::uint16_t infinity, Read read) {
  if (std::isnan(value)) return std::isnan(read(half));
  if (std::signbit(value) != (half >> 15 != 0)) return false;
  const std::uint16_t magnitude = half & 0x7fff;
  // beyond the largest number stands what would come next, which is where infinity begins
  const auto place = [&](int m) {
    const auto number = [&](int from) { return read(static_cast<std::uint16_t>(from)); };
    return m < infinity ? number(m) : 2 * number(infinity - 1) - number(infinity - 2);
  };
  const double size = std::abs(value);
  if (magnitude > infinity) return false;
  if (std::isinf(size)) return magnitude == infinity;
  const double mine = std::abs(place(magnitude) - size);
  const bool even = magnitude % 2 == 0;
  if (magnitude > 0) {
    const double below = std::abs(place(magnitude - 1) - size);
    if (below < mine || (below == mine && !even)) return false;
  }
  if (magnitude == infinity) return size >= place(infinity) || mine <= std::abs(place(infinity - 1) - size);
  const double above = std::abs(place(magnitude + 1) - size);
  return mine < above || (mine == above && even);
}

TEST(numbers_are_rounded_to_the_nearest_half) {
  const std::vector<float> values = all_kinds(20001);
  std::vector<std::uint16_t> halves(values.size());
  for (const AdamwLoops* loops : all_loops()) {
    loops->store_fp16(values.data(), halves.data(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i) CHECK(is_nearest(halves[i], values[i], 0x7c00, fp16_value));
    const auto bf16_value = [](std::uint16_t half) -> double { return float_of(std::uint32_t{half} << 16); };
    loops->store_bf16(values.data(), halves.data(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i) CHECK(is_nearest(halves[i], values[i], 0x7f80, bf16_value));
  }
}

TEST(a_weight_and_its_residual_are_the_master_again) {
  const std::vector<float> values = all_kinds(20001);
  std::vector<std::uint16_t> weight(values.size());
  std::vector<std::int16_t> residual(values.size());
  std::vector<float> joined(values.size());
  for (const AdamwLoops* loops : all_loops()) {
    loops->split_residual(values.data(), weight.data(), residual.data(), values.size());
    loops->join_residual(weight.data(), residual.data(), joined.data(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint32_t quiet = std::isnan(values[i]) ? 0x00400000 : 0;
      CHECK(bits_of(joined[i]) == (bits_of(values[i]) | quiet));
    }
    const std::uint16_t zeros[2] = {0, 0x8000};
    const std::int16_t below[2] = {-1, -32768};
    loops->join_residual(zeros, below, joined.data(), 2);
    CHECK(bits_of(joined[0]) == 0 && bits_of(joined[1]) == 0x80000000);
  }
}

TEST(noise_is_that_of_philox) {
  // Random123's known answer for counter 0 and key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8
  const std::uint16_t expected[8] = {0xe8d5, 0x6627, 0xc58d, 0xe169, 0xac4c, 0xbc57, 0xdbd8, 0x9b00};
  for (const AdamwLoops* loops : all_loops()) {
    std::uint16_t found[8] = {};
    for (int bit = 15; bit >= 0; --bit) {
      // rounds up exactly if the noise reaches `tried`
      float values[8];
      std::uint16_t rounded[8];
      for (int i = 0; i < 8; ++i) values[i] = float_of(0x3f800000u + 0x10000u - (found[i] | 1u << bit));
      loops->store_stochastic(values, rounded, 0, 0, 8);
      for (int i = 0; i < 8; ++i) {
        if (rounded[i] == 0x3f81) found[i] = static_cast<std::uint16_t>(found[i] | 1u << bit);
      }
    }
    CHECK(std::memcmp(found, expected, sizeof expected) == 0);
  }
}

TEST(stochastic_rounding_keeps_infinities_and_nan) {
  const std::vector<float> values = all_kinds(kAdamwTile);
  std::vector<std::uint16_t> rounded(values.size());
  for (const AdamwLoops* loops : all_loops()) {
    loops->store_stochastic(values.data(), rounded.data(), 3, std::uint64_t{1} << 36, values.size() - 3);
    for (std::size_t i = 0; i < values.size() - 3; ++i) {
      const float value = float_of(std::uint32_t{rounded[i]} << 16);
      if (!std::isfinite(values[i])) CHECK(std::isnan(values[i]) ? std::isnan(value) : value == values[i]);
      if (std::isfinite(values[i])) CHECK((bits_of(values[i]) >> 16) + 1 - rounded[i] <= 1);
    }
  }
}

TEST(decoding_and_encoding_again_changes_nothing) {
  constexpr std::size_t n = 2 * kCodeBlock;
  for (const AdamwLoops* loops : all_loops()) {
    for (const float scale : {1.0f, 3.14159f, 1e-20f, 7e19f}) {
      std::int8_t first[n], first_again[n];
      std::uint8_t second[n], second_again[n];
      float values[n], scales[2] = {scale, scale}, scales_again[2];
      for (std::size_t i = 0; i < n; ++i) {
        first[i] = static_cast<std::int8_t>(i < 255 ? static_cast<int>(i) - 127 : 127);
        second[i] = static_cast<std::uint8_t>(i);
      }
      second[0] = 255;
      loops->decode_first(first, scales, values, n);
      CHECK(values[0] == -scale && values[127] == 0 && values[254] == scale);
      loops->encode_first(values, first_again, scales_again, n);
      CHECK(std::memcmp(first, first_again, n) == 0 && std::memcmp(scales, scales_again, sizeof scales) == 0);
      loops->decode_second(second, scales, values, n);
      CHECK(values[0] == scale && values[255] == scale && values[1] > 0);
      loops->encode_second(values, second_again, scales_again, n);
      CHECK(std::memcmp(second, second_again, n) == 0 && std::memcmp(scales, scales_again, sizeof scales) == 0);
    }
  }
}

TEST(codes_of_odd_blocks) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const AdamwLoops* loops : all_loops()) {
    // zeros; something tiny beside something large; a NaN; an infinity, in a block of three
    std::vector<float> values(3 * kCodeBlock + 3);
    values[kCodeBlock] = 1;
    values[kCodeBlock + 1] = 1e-30f;
    values[2 * kCodeBlock + 5] = std::nanf("");
    values[3 * kCodeBlock] = infinity;
    values[3 * kCodeBlock + 2] = 1;
    std::vector<std::int8_t> first(values.size());
    std::vector<std::uint8_t> second(values.size());
    float scales[4];
    loops->encode_first(values.data(), first.data(), scales, values.size());
    CHECK(scales[0] == 0 && scales[1] == 1 && std::isnan(scales[2]) && scales[3] == 0x1p120f);
    CHECK(first[0] == 0 && first[kCodeBlock] == 127 && first[kCodeBlock + 1] == 0 && first[3 * kCodeBlock] == 127);
    std::vector<float> again(values.size());
    loops->decode_first(first.data(), scales, again.data(), values.size());
    CHECK(again[0] == 0 && std::isnan(again[2 * kCodeBlock]) && again[3 * kCodeBlock] == 0x1p120f);
    loops->encode_second(values.data(), second.data(), scales, values.size());
    CHECK(scales[0] == 0 && std::isnan(scales[2]) && scales[3] == std::numeric_limits<float>::max());
    CHECK(second[0] == 0 && second[kCodeBlock + 1] == 1 && second[kCodeBlock + 2] == 0 && second[3 * kCodeBlock] == 255);
  }
}

// A slice in memory of exactly its size, so that a sanitizer sees what lies outside.
struct Slice {
  Slice(std::size_t n, std::size_t row, std::size_t pitch, Format weight_format, Format moments, bool extra) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::normal_distribution<float> normal;
    weight.resize(n == 0 ? 0 : (n / row - 1) * pitch + row);
    grad.resize(n);
    for (float& value : weight) value = normal(random);
    for (float& value : grad) value = normal(random);
    halves.resize(weight.size());
    for (std::uint16_t& half : halves) half = static_cast<std::uint16_t>(bits_of(normal(random)) >> 16);
    exp_avg.resize(n);
    exp_avg_sq.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      exp_avg[i] = normal(random);
      exp_avg_sq[i] = std::abs(normal(random));
    }
    first.resize(n, 3);
    second.resize(n, 9);
    scales.resize(2, std::vector<float>((n + kCodeBlock - 1) / kCodeBlock, 0.5f));
    residual.resize(extra ? n : 0);
    const bool codes = moments == Format::kCodes;
    entry = {.weight = weight_format == Format::kFloat32 ? static_cast<void*>(weight.data()) : halves.data(),
             .grad = grad.data(),
             .exp_avg = codes ? static_cast<void*>(first.data()) : exp_avg.data(),
             .exp_avg_sq = codes ? static_cast<void*>(second.data()) : exp_avg_sq.data(),
             .extra = extra ? residual.data() : nullptr,
             .exp_avg_scale = codes ? scales[0].data() : nullptr,
             .exp_avg_sq_scale = codes ? scales[1].data() : nullptr,
             .count = n,
             .row = row,
             .pitch = pitch,
             .weight_format = weight_format,
             .grad_format = Format::kFloat32,
             .exp_avg_format = moments,
             .exp_avg_sq_format = moments,
             .seed = 11,
             .decay = 0.99f,
             .step_size = 0.01f,
             .root = 0.3f};
  }

  bool operator==(const Slice& other) const {
    return weight == other.weight && halves == other.halves && exp_avg == other.exp_avg &&
           exp_avg_sq == other.exp_avg_sq && first == other.first && second == other.second &&
           scales == other.scales && residual == other.residual;
  }

  std::vector<float> weight, grad, exp_avg, exp_avg_sq;
  std::vector<std::uint16_t> halves;
  std::vector<std::int8_t> first;
  std::vector<std::uint8_t> second;
  std::vector<std::vector<float>> scales;
  std::vector<std::int16_t> residual;
  HostAdamwSlice entry;
};

TEST(the_update_is_that_of_the_formula_operation_by_operation) {
  constexpr std::size_t n = 20011;
  for (const AdamwLoops* loops : all_loops()) {
    const auto multiply_add = [&](float a, float b, float c) {
      const volatile float product = a * b;
      return loops->fused ? std::fma(a, b, c) : product + c;
    };
    for (const float pull : {0.1f, 0.75f}) {
      Slice s(n, n, n, Format::kFloat32, Format::kFloat32, false);
      s.exp_avg_sq[0] = std::numeric_limits<float>::infinity();
      s.exp_avg_sq[1] = std::numeric_limits<float>::denorm_min();
      s.grad[1] = s.grad[2] = s.exp_avg_sq[2] = 0;
      s.grad[3] = std::nanf("");
      HostAdamwOptions options;
      options.pull = pull;
      options.grad_factor = 0.3f;
      options.clip_factor = 0.9f;
      const Slice before = s;
      loops->update(s.weight.data(), s.grad.data(), s.exp_avg.data(), s.exp_avg_sq.data(), n, s.entry, options);
      for (std::size_t i = 0; i < n; ++i) {
        const float g = before.grad[i] * 0.3f * 0.9f, old = before.exp_avg[i];
        const float m = pull < 0.5f ? multiply_add(pull, g - old, old) : multiply_add(pull - 1, g - old, g);
        const float v = multiply_add(options.keep2 * g, g, before.exp_avg_sq[i] * options.beta2);
        const volatile float decayed = before.weight[i] * 0.99f;
        const float weight = decayed + -0.01f * m / (std::sqrt(v) / 0.3f + options.eps);
        CHECK(same(s.exp_avg[i], m) && same(s.exp_avg_sq[i], v) && same(s.weight[i], weight));
      }
    }
  }
}

struct Kind {
  Format weight, moments;
  Master master;
};

constexpr Kind kKinds[] = {{Format::kFloat32, Format::kFloat32, Master::kNone},
                           {Format::kFloat16, Format::kFloat32, Master::kNone},
                           {Format::kBfloat16, Format::kFloat32, Master::kResidual},
                           {Format::kBfloat16, Format::kCodes, Master::kResidual},
                           {Format::kBfloat16, Format::kFloat32, Master::kStochastic}};

Slice slice_of(const Kind& kind, std::size_t n, std::size_t row, std::size_t pitch) {
  return Slice(n, row, pitch, kind.weight, kind.moments, kind.master == Master::kResidual);
}

Status update(std::vector<Slice>& slices, Master master, unsigned threads) {
  std::vector<HostAdamwSlice> entries;
  for (const Slice& slice : slices) entries.push_back(slice.entry);
  HostAdamwOptions options;
  options.master = master;
  options.threads = threads;
  return host_adamw(entries, options);
}

TEST(any_number_of_threads_gives_the_same_bits) {
  for (const Kind& kind : kKinds) {
    const auto make = [&] {
      std::vector<Slice> made;
      for (const std::size_t n : {150000u, 77u, 0u, 66000u}) made.push_back(slice_of(kind, n, 1, 1));
      return made;
    };
    std::vector<Slice> alone = make();
    CHECK(update(alone, kind.master, 1).ok());
    CHECK(!(alone == make()));
    for (unsigned threads = 2; threads <= 4; ++threads) {
      std::vector<Slice> shared = make();
      CHECK(update(shared, kind.master, threads).ok());
      CHECK(shared == alone);
    }
  }
}

TEST(columns_are_updated_as_contiguous_rows_and_nothing_beside_them) {
  constexpr std::size_t row = 11, pitch = 13, n = row * 7000;
  for (const Kind& kind : kKinds) {
    std::vector<Slice> dense, columns;
    dense.push_back(slice_of(kind, n, row, row));
    columns.push_back(slice_of(kind, n, row, pitch));
    Slice &a = dense[0], &b = columns[0];
    for (std::size_t i = 0; i < n; ++i) {
      b.weight[i / row * pitch + i % row] = a.weight[i];
      b.halves[i / row * pitch + i % row] = a.halves[i];
    }
    b.grad = a.grad, b.exp_avg = a.exp_avg, b.exp_avg_sq = a.exp_avg_sq;
    b.entry.grad = b.grad.data();
    const std::vector<float> weight = b.weight;
    const std::vector<std::uint16_t> halves = b.halves;
    CHECK(update(dense, kind.master, 2).ok() && update(columns, kind.master, 2).ok());
    for (std::size_t i = 0; i < b.weight.size(); ++i) {
      const std::size_t down = i / pitch, along = i % pitch;
      if (along < row) {
        CHECK(b.weight[i] == a.weight[down * row + along] && b.halves[i] == a.halves[down * row + along]);
      } else {
        CHECK(b.weight[i] == weight[i] && b.halves[i] == halves[i]);
      }
    }
    CHECK(a.exp_avg == b.exp_avg && a.first == b.first && a.scales == b.scales && a.residual == b.residual);
  }
}

TEST(a_weight_that_others_changed_wins_over_its_master) {
  constexpr std::size_t n = 300;
  std::vector<float> master(n), grad(n), exp_avg(n), exp_avg_sq(n);
  std::vector<std::uint16_t> weight(n);
  for (std::size_t i = 0; i < n; ++i) {
    master[i] = 1.001f + static_cast<float>(i);
    weight[i] = static_cast<std::uint16_t>((bits_of(master[i]) + 0x7fff + (bits_of(master[i]) >> 16 & 1)) >> 16);
    if (i % 3 == 0) weight[i] = 0x4000;  // 2
  }
  const std::vector<float> before = master;
  HostAdamwSlice slice{.weight = weight.data(), .grad = grad.data(), .exp_avg = exp_avg.data(),
                       .exp_avg_sq = exp_avg_sq.data(), .extra = master.data(), .exp_avg_scale = nullptr,
                       .exp_avg_sq_scale = nullptr, .count = n, .row = n, .pitch = n,
                       .weight_format = Format::kBfloat16, .grad_format = Format::kFloat32,
                       .exp_avg_format = Format::kFloat32, .exp_avg_sq_format = Format::kFloat32, .seed = 0,
                       .decay = 1, .step_size = 0.1f, .root = 1};
  HostAdamwOptions options;
  options.master = Master::kFloat32;
  CHECK(host_adamw({&slice, 1}, options).ok());
  for (std::size_t i = 0; i < n; ++i) CHECK(master[i] == (i % 3 == 0 ? 2 : before[i]));
}

TEST(a_forked_child_has_threads_of_its_own) {
  std::vector<Slice> slices;
  slices.push_back(slice_of(kKinds[0], 200000, 1, 1));
  CHECK(update(slices, Master::kNone, 4).ok());
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);
    _exit(update(slices, Master::kNone, 4).ok() ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(what_does_not_fit_is_refused_before_anything_is_changed) {
  std::vector<Slice> slices;
  slices.push_back(slice_of(kKinds[0], 10, 5, 5));
  slices.push_back(slice_of(kKinds[0], 10, 5, 5));
  const std::vector<float> before = slices[0].weight;
  const HostAdamwSlice good = slices[1].entry;
  const auto refused = [&](const HostAdamwSlice& bad, Master master, const char* why) {
    const HostAdamwSlice both[2] = {good, bad};
    HostAdamwOptions options;
    options.master = master;
    const Status status = host_adamw(both, options);
    return !status.ok() && status.error().message().find(why) != std::string::npos;
  };
  HostAdamwSlice bad = good;
  bad.row = 0;
  CHECK(refused(bad, Master::kNone, "slice 1: rows of 0 elements, 5 apart; needs 0 < row <= pitch"));
  bad.row = 6;
  CHECK(refused(bad, Master::kNone, "needs 0 < row <= pitch"));
  bad = good;
  bad.exp_avg_format = Format::kCodes;
  CHECK(refused(bad, Master::kNone, "both moments must be codes, or neither"));
  bad.exp_avg_sq_format = Format::kCodes;
  CHECK(refused(bad, Master::kNone, "an address that is needed is 0"));
  bad = good;
  bad.grad_format = Format::kCodes;
  CHECK(refused(bad, Master::kNone, "weight and gradient must be fp32, bf16 or fp16, not codes"));
  bad = good;
  bad.grad = nullptr;
  CHECK(refused(bad, Master::kNone, "an address that is needed is 0"));
  for (const Master master : {Master::kFloat32, Master::kResidual, Master::kStochastic}) {
    CHECK(refused(good, master, "needs a bf16 weight"));
  }
  CHECK(slices[0].weight == before && slices[1].weight == before);
  CHECK(host_adamw({}, {}).ok());
}

}  // namespace
