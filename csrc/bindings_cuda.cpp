#include <memory>

#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda_context.h"
#include "driver_api.h"
#include "host_arena.h"
#include "memory_budget.h"

namespace chunkft {
namespace {

py::dict cuda_info() {
  auto facts = [] {
    py::gil_scoped_release release;
    return cuda_facts();
  }();
  const CudaFacts found = value_or_raise(std::move(facts));
  py::list devices;
  for (const CudaDevice& device : found.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["total_bytes"] = device.total_bytes;
    entry["compute_capability"] = py::make_tuple(device.compute_major, device.compute_minor);
    devices.append(entry);
  }
  py::dict info;
  info["library"] = found.library;
  info["driver_version"] = py::make_tuple(found.driver_version / 1000, found.driver_version % 1000 / 10);
  info["devices"] = devices;
  return info;
}

py::object memory_budget_or_none() {
  const auto budget = memory_budget();
  if (!budget) return py::none();
  py::dict dict;
  dict["limit"] = budget->limit;
  dict["available"] = budget->available;
  dict["source"] = budget->source;
  return dict;
}

void page_lock(HostArena& arena, const py::object& device) {
  const std::size_t ordinal = to_size(device, "HostArena.page_lock", "device");
  if (ordinal > 1023) {
    raise(invalid_argument("HostArena.page_lock", "device must be from 0 to 1023, got " + std::to_string(ordinal)));
  }
  const Status status = [&]() -> Status {
    py::gil_scoped_release release;
    auto context = CudaContext::create(static_cast<int>(ordinal));
    if (!context.ok()) return context.error();
    return arena.page_lock(std::move(context.value()));
  }();
  if (!status.ok()) raise(status.error());
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_info", &cuda_info, "The CUDA driver and its devices; RuntimeError if there is no driver.");
  m.def("memory_budget", &memory_budget_or_none,
        "Bytes that this process may still take, and what limits them; None if the system does not tell.");
  py::reinterpret_borrow<py::class_<HostArena, std::shared_ptr<HostArena>>>(m.attr("HostArena"))
      .def("page_lock", &page_lock, py::arg("device") = 0)
      .def_property_readonly("page_locked", &HostArena::page_locked);
}

}  // namespace chunkft
