#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.h"
#include "host_adamw.h"

namespace chunkft {
namespace {

constexpr const char* kOp = "host_adamw";

template <typename Value, std::size_t N>
Value named(const std::string& name, const char* what, const std::pair<const char*, Value> (&known)[N]) {
  std::string allowed;
  for (const auto& [text, value] : known) {
    if (name == text) return value;
    allowed += (allowed.empty() ? "\"" : ", \"") + std::string(text) + "\"";
  }
  raise(invalid_argument(kOp, std::string(what) + " must be one of " + allowed + ", got \"" + name + "\""));
}

Format to_format(const std::string& name) {
  return named<Format>(name, "a format",
                       {{"fp32", Format::kFloat32},
                        {"bf16", Format::kBfloat16},
                        {"fp16", Format::kFloat16},
                        {"codes", Format::kCodes}});
}

template <typename T>
T* to_address(const py::handle& value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(to_size(value, kOp, "an address")));
}

// addresses, sizes, formats, seed, numbers: see _core.pyi
HostAdamwSlice to_slice(const py::handle& entry) {
  const auto wrong = [] {
    raise(invalid_argument(kOp, "a slice must be of 7 addresses, 3 sizes, 4 formats, a seed and 3 numbers"));
  };
  const auto parts = entry.cast<py::tuple>();
  if (parts.size() != 5) wrong();
  const auto places = parts[0].cast<py::tuple>(), sizes = parts[1].cast<py::tuple>();
  const auto formats = parts[2].cast<py::tuple>(), numbers = parts[4].cast<py::tuple>();
  if (places.size() != 7 || sizes.size() != 3 || formats.size() != 4 || numbers.size() != 3) wrong();
  const auto format = [&](std::size_t i) { return to_format(formats[i].cast<std::string>()); };
  return {.weight = to_address<void>(places[0]),
          .grad = to_address<const void>(places[1]),
          .exp_avg = to_address<void>(places[2]),
          .exp_avg_sq = to_address<void>(places[3]),
          .extra = to_address<void>(places[4]),
          .exp_avg_scale = to_address<float>(places[5]),
          .exp_avg_sq_scale = to_address<float>(places[6]),
          .count = to_size(sizes[0], kOp, "the number of elements"),
          .row = to_size(sizes[1], kOp, "the length of a row"),
          .pitch = to_size(sizes[2], kOp, "the distance of rows"),
          .weight_format = format(0),
          .grad_format = format(1),
          .exp_avg_format = format(2),
          .exp_avg_sq_format = format(3),
          .seed = to_size(parts[3], kOp, "seed"),
          .decay = numbers[0].cast<float>(),
          .step_size = numbers[1].cast<float>(),
          .root = numbers[2].cast<float>()};
}

void update(const py::sequence& entries, const std::string& master, float pull, float beta2, float keep2, float eps,
            float grad_factor, float clip_factor, const py::object& threads) {
  std::vector<HostAdamwSlice> slices;
  slices.reserve(py::len(entries));
  for (const py::handle entry : entries) slices.push_back(to_slice(entry));
  const std::size_t count = to_size(threads, kOp, "threads");
  if (count < 1 || count > 1024) {
    raise(invalid_argument(kOp, "threads must be an integer from 1 to 1024, got " + std::to_string(count)));
  }
  const HostAdamwOptions options{.master = named<Master>(master, "master",
                                                         {{"none", Master::kNone},
                                                          {"fp32", Master::kFloat32},
                                                          {"residual", Master::kResidual},
                                                          {"stochastic", Master::kStochastic}}),
                                 .pull = pull,
                                 .beta2 = beta2,
                                 .keep2 = keep2,
                                 .eps = eps,
                                 .grad_factor = grad_factor,
                                 .clip_factor = clip_factor,
                                 .threads = static_cast<unsigned>(count)};
  const Status status = [&] {
    py::gil_scoped_release release;
    return host_adamw(slices, options);
  }();
  if (!status.ok()) raise(status.error());
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("host_adamw", &update, py::arg("slices"), py::kw_only(), py::arg("master"), py::arg("pull"), py::arg("beta2"),
        py::arg("keep2"), py::arg("eps"), py::arg("grad_factor"), py::arg("clip_factor"), py::arg("threads"),
        "AdamW of slices that live in host memory, in place, in one pass over it.");
}

}  // namespace chunkft
