#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include <pybind11/stl.h>

#include "bindings.h"
#include "dlpack.h"
#include "host_arena.h"

namespace chunkft {
namespace {

// What a DLPack consumer owns: the memory's hold, and the arrays that the tensor points into.
template <typename Managed>
struct Export {
  Managed managed{};
  ArenaView view;
  std::int64_t shape = 0;
  std::int64_t stride = 1;
};

template <typename Managed>
py::object export_capsule(const ArenaView& view) {
  auto owned = std::make_unique<Export<Managed>>();
  owned->view = view;
  owned->shape = static_cast<std::int64_t>(view.nbytes);
  owned->managed.context = owned.get();
  // Consumers call this from any thread, with or without the GIL: no Python in here.
  owned->managed.deleter = [](Managed* self) { delete static_cast<Export<Managed>*>(self->context); };
  owned->managed.tensor = {.data = view.data,
                           .device = {dlpack::kCpu, 0},
                           .ndim = 1,
                           .dtype = {dlpack::kUnsignedInteger, 8, 1},
                           .shape = &owned->shape,
                           .strides = &owned->stride,
                           .byte_offset = 0};
  if constexpr (std::is_same_v<Managed, dlpack::ManagedTensorVersioned>) owned->managed.major = 1;

  PyObject* capsule = PyCapsule_New(&owned->managed, Managed::kCapsule, [](PyObject* self) {
    // A consumer renames the capsule and takes over its content; one that nobody consumed cleans up itself.
    if (!PyCapsule_IsValid(self, Managed::kCapsule)) return;
    auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(self, Managed::kCapsule));
    managed->deleter(managed);
  });
  if (capsule == nullptr) throw py::error_already_set();
  owned.release();
  return py::reinterpret_steal<py::object>(capsule);
}

py::object to_dlpack(const ArenaView& view, const py::object& stream,
                     const std::optional<std::pair<int, int>>& max_version,
                     const std::optional<std::pair<int, int>>& dl_device, std::optional<bool> copy) {
  if (!stream.is_none()) {
    raise(invalid_argument("ArenaView.__dlpack__",
                           "stream must be None for host memory, got " + py::repr(stream).cast<std::string>()));
  }
  if (dl_device && *dl_device != std::pair<int, int>(dlpack::kCpu, 0)) {
    throw py::buffer_error("ArenaView.__dlpack__: dl_device must be None or (1, 0), the CPU, got (" +
                           std::to_string(dl_device->first) + ", " + std::to_string(dl_device->second) + ")");
  }
  if (copy.value_or(false)) {
    throw py::buffer_error("ArenaView.__dlpack__: copy must be None or False, got True: a view never copies");
  }
  if (max_version && max_version->first >= 1) return export_capsule<dlpack::ManagedTensorVersioned>(view);
  return export_capsule<dlpack::ManagedTensor>(view);
}

std::shared_ptr<HostArena> make_arena(const py::object& nbytes, bool huge_pages, bool pretouch,
                                      const py::object& threads, bool within_budget) {
  const std::size_t size = to_size(nbytes, "HostArena", "nbytes");
  const std::size_t thread_count = to_size(threads, "HostArena", "threads");
  if (thread_count > 1024) {
    raise(invalid_argument("HostArena", "threads must be an integer from 0 (automatic) to 1024, got " +
                                            std::to_string(thread_count)));
  }
  const ArenaOptions options{huge_pages, pretouch, static_cast<unsigned>(thread_count), within_budget};
  auto result = [&] {
    py::gil_scoped_release release;
    return HostArena::create(size, options);
  }();
  return value_or_raise(std::move(result));
}

}  // namespace
}  // namespace chunkft

PYBIND11_MODULE(_core, m) {
  using namespace chunkft;

  m.doc() = "The native core of chunkft.";
  m.attr("__version__") = CHUNKFT_VERSION;

  py::class_<ArenaView>(m, "ArenaView", py::buffer_protocol(),
                        "A range of bytes of a HostArena that keeps the memory alive.")
      .def_readonly("nbytes", &ArenaView::nbytes)
      .def_property_readonly("address", [](const ArenaView& v) { return reinterpret_cast<std::uintptr_t>(v.data); })
      .def_buffer([](ArenaView& v) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(v.data), static_cast<py::ssize_t>(v.nbytes));
      })
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const ArenaView&) { return py::make_tuple(dlpack::kCpu, 0); });

  py::class_<HostArena, std::shared_ptr<HostArena>>(
      m, "HostArena", "Zero-filled, page-aligned host memory of an exact size, mapped apart from malloc.")
      .def(py::init(&make_arena), py::arg("nbytes"), py::kw_only(), py::arg("huge_pages") = true,
           py::arg("pretouch") = false, py::arg("threads") = 0, py::arg("within_budget") = false)
      .def_property_readonly("nbytes", &HostArena::nbytes)
      .def_property_readonly("capacity", &HostArena::capacity)
      .def_property_readonly("huge_pages", &HostArena::huge_pages)
      .def_property_readonly("closed", &HostArena::is_closed)
      .def("close", &HostArena::close, py::call_guard<py::gil_scoped_release>())
      .def(
          "view",
          [](const HostArena& arena, const py::object& offset, const py::object& nbytes) {
            const std::size_t first = to_size(offset, "HostArena.view", "offset");
            return value_or_raise(arena.view(first, to_size(nbytes, "HostArena.view", "nbytes")));
          },
          py::arg("offset"), py::arg("nbytes"))
      .def_static("live_bytes", &HostArena::live_bytes);

  bind_adamw(m);
  bind_pager(m);
  bind_cuda(m);
}
