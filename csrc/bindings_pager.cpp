#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "cuda_backend.h"
#include "engine.h"
#include "host_backend.h"

namespace chunkft {
namespace {

// Releases the GIL for a call that may block, and turns its Error into a Python exception afterwards.
template <typename Call>
auto unlocked(Call call) {
  auto result = [&] {
    py::gil_scoped_release release;
    return call();
  }();
  if (!result.ok()) raise(result.error());
  if constexpr (!std::is_same_v<decltype(result), Status>) return std::move(result.value());
}

std::vector<std::size_t> to_sizes(const py::sequence& values, const char* op, const char* name) {
  std::vector<std::size_t> sizes;
  sizes.reserve(py::len(values));
  for (const py::handle value : values) {
    sizes.push_back(to_size(value, op, (std::string(name) + "[" + std::to_string(sizes.size()) + "]").c_str()));
  }
  return sizes;
}

// CUDA hands out streams as integers of pointer size; some of the special ones are small.
Stream to_stream(const py::handle& value, const char* op) { return Stream::caller(to_size(value, op, "stream")); }

class Pager {
 public:
  Pager(const py::sequence& pages, const py::sequence& host, const py::sequence& slots, const py::object& slot_bytes,
        const std::string& backend, const py::object& device, py::object keep, const py::object& trace_events,
        const py::object& delay_seed)
      : keep_(std::move(keep)) {
    auto layout = Layout::create(to_sizes(pages, "Pager", "pages"), to_sizes(host, "Pager", "host"),
                                 to_sizes(slots, "Pager", "slots"), to_size(slot_bytes, "Pager", "slot_bytes"));
    if (!layout.ok()) raise(layout.error());
    const EngineOptions options{to_size(trace_events, "Pager", "trace_events")};
    if (options.trace_events > (std::size_t{1} << 24)) {
      raise(invalid_argument("Pager", "trace_events must be from 0 to 2**24, got " +
                                          std::to_string(options.trace_events)));
    }
    const std::size_t ordinal = to_size(device, "Pager", "device");
    if (ordinal > 1023) {
      raise(invalid_argument("Pager", "device must be from 0 to 1023, got " + std::to_string(ordinal)));
    }
    const std::size_t seed = to_size(delay_seed, "Pager", "delay_seed");
    if (seed != 0 && backend != "host") {
      raise(invalid_argument("Pager", "delay_seed must be 0 with backend \"" + backend + "\", got " + std::to_string(seed)));
    }
    engine_ = unlocked([&]() -> Result<std::unique_ptr<Engine>> {
      auto made = make_backend(backend, static_cast<int>(ordinal), seed);
      if (!made.ok()) return made.error();
      return Engine::create(std::move(layout.value()), std::move(made.value()), options);
    });
  }

  ~Pager() {
    if (engine_->forked()) {
      // Locks and threads are as the parent had them at the time of the fork: nothing here can be taken down.
      static_cast<void>(engine_.release());
      return;
    }
    py::gil_scoped_release release;
    engine_.reset();
  }
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;

  Engine& engine() { return *engine_; }

  void close() {
    // Closed in any case, so that the memory is let go of also when there is something to raise.
    Status status = [&] {
      py::gil_scoped_release release;
      return engine_->close();
    }();
    if (engine_->closed()) keep_ = py::none();
    if (!status.ok()) raise(status.error());
  }

 private:
  static Result<std::shared_ptr<Backend>> make_backend(const std::string& name, int device, std::uint64_t delay_seed) {
    if (name == "host") {
      auto made = HostBackend::create(delay_seed);
      if (!made.ok()) return made.error();
      return std::shared_ptr<Backend>(std::move(made.value()));
    }
    if (name == "cuda") {
      auto made = CudaBackend::create(device);
      if (!made.ok()) return made.error();
      return std::shared_ptr<Backend>(std::move(made.value()));
    }
    return invalid_argument("Pager", "backend must be \"host\" or \"cuda\", got \"" + name + "\"");
  }

  py::object keep_;
  std::unique_ptr<Engine> engine_;
};

py::dict to_dict(const Transfers& transfers) {
  py::dict dict;
  dict["copies"] = transfers.copies;
  dict["bytes"] = transfers.bytes;
  dict["timed_bytes"] = transfers.timed_bytes;
  dict["timed_ns"] = transfers.timed_ns;
  return dict;
}

py::dict to_dict(const Stats& stats) {
  py::dict dict;
  dict["loads"] = to_dict(stats.loads);
  dict["stores"] = to_dict(stats.stores);
  dict["acquires"] = stats.acquires;
  dict["waits"] = stats.waits;
  dict["exposed_ns"] = stats.exposed_ns;
  dict["host_stall_ns"] = stats.host_stall_ns;
  dict["untimed"] = stats.untimed;
  dict["events_created"] = stats.events_created;
  dict["streams_created"] = stats.streams_created;
  return dict;
}

py::list to_list(const std::vector<TraceRecord>& records) {
  py::list list;
  for (const TraceRecord& r : records) {
    const char* kind = r.kind == TraceRecord::Kind::kLoad    ? "load"
                       : r.kind == TraceRecord::Kind::kStore ? "store"
                                                             : "wait";
    list.append(py::make_tuple(kind, r.page, r.slot, r.bytes, r.submitted, r.started, r.ended));
  }
  return list;
}

}  // namespace

void bind_pager(py::module_& m) {
  auto page_of = [](const py::object& page, const char* op) { return to_size(page, op, "page"); };

  py::class_<Pager>(m, "Pager", "Pages of host memory, a few of them at a time in slots of device memory.")
      .def(py::init<const py::sequence&, const py::sequence&, const py::sequence&, const py::object&,
                    const std::string&, const py::object&, py::object, const py::object&, const py::object&>(),
           py::arg("pages"), py::arg("host"), py::arg("slots"), py::arg("slot_bytes"), py::kw_only(),
           py::arg("backend") = "host", py::arg("device") = 0, py::arg("keep") = py::none(),
           py::arg("trace_events") = 4096, py::arg("delay_seed") = 0)
      .def(
          "prefetch",
          [page_of](Pager& p, const py::object& page) {
            const std::size_t index = page_of(page, "Pager.prefetch");
            return unlocked([&] { return p.engine().prefetch(index); });
          },
          py::arg("page"))
      .def(
          "acquire",
          [page_of](Pager& p, const py::object& page, const py::object& stream, bool load) {
            const std::size_t index = page_of(page, "Pager.acquire");
            const Stream caller = to_stream(stream, "Pager.acquire");
            return unlocked([&] { return p.engine().acquire(index, caller, load); });
          },
          py::arg("page"), py::arg("stream") = 0, py::kw_only(), py::arg("load") = true)
      .def(
          "release",
          [page_of](Pager& p, const py::object& page, const py::object& stream, bool dirty, bool keep) {
            const std::size_t index = page_of(page, "Pager.release");
            const Stream caller = to_stream(stream, "Pager.release");
            unlocked([&] { return p.engine().release(index, caller, dirty, keep); });
          },
          py::arg("page"), py::arg("stream") = 0, py::kw_only(), py::arg("dirty") = true, py::arg("keep") = false)
      .def(
          "write_back",
          [page_of](Pager& p, const py::object& page) {
            const std::size_t index = page_of(page, "Pager.write_back");
            unlocked([&] { return p.engine().write_back(index); });
          },
          py::arg("page"))
      .def(
          "evict",
          [page_of](Pager& p, const py::object& page) {
            const std::size_t index = page_of(page, "Pager.evict");
            unlocked([&] { return p.engine().evict(index); });
          },
          py::arg("page"))
      .def(
          "discard",
          [page_of](Pager& p, const py::object& page, const py::object& stream) {
            const std::size_t index = page_of(page, "Pager.discard");
            std::optional<Stream> caller;
            if (!stream.is_none()) caller = to_stream(stream, "Pager.discard");
            unlocked([&] { return p.engine().discard(index, caller); });
          },
          py::arg("page"), py::arg("stream") = py::none())
      .def("flush", [](Pager& p) { unlocked([&] { return p.engine().flush(); }); })
      .def(
          "state",
          [page_of](Pager& p, const py::object& page) {
            const std::size_t index = page_of(page, "Pager.state");
            return name_of(unlocked([&] { return p.engine().state(index); }));
          },
          py::arg("page"))
      .def(
          "host_is_canonical",
          [page_of](Pager& p, const py::object& page) {
            const std::size_t index = page_of(page, "Pager.host_is_canonical");
            return unlocked([&] { return p.engine().host_is_canonical(index); });
          },
          py::arg("page"))
      .def("stats", [](Pager& p) { return to_dict(unlocked([&] { return p.engine().stats(); })); })
      .def("trace", [](Pager& p) { return to_list(unlocked([&] { return p.engine().trace(); })); })
      .def("close", &Pager::close)
      .def_property_readonly("closed", [](Pager& p) { return p.engine().closed(); })
      .def_property_readonly("backend", [](Pager& p) { return p.engine().backend_name(); });
}

}  // namespace chunkft
