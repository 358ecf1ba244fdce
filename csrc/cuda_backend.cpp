#include "cuda_backend.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <tuple>

namespace chunkft {
namespace {

std::int64_t steady_nanoseconds() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

CuDevicePtr device_pointer(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }

}  // namespace

Result<std::unique_ptr<CudaBackend>> CudaBackend::create(int device, std::int64_t anchor_period) {
  auto context = CudaContext::create(device);
  if (!context.ok()) return context.error();
  std::unique_ptr<CudaBackend> made(new CudaBackend(std::move(context.value()), anchor_period));
  if (Status status = made->open(); !status.ok()) return status.error();
  return made;
}

Status CudaBackend::open() {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status();
  const DriverApi& api = context_->api();
  for (CuStream* stream : {&load_, &store_, &time_}) {
    if (CuResult result = api.cuStreamCreate(stream, kCuStreamNonBlocking)) {
      *stream = nullptr;
      return api.error(result, "cuStreamCreate");
    }
  }
  for (Anchor& anchor : anchors_) {
    if (CuResult result = api.cuEventCreate(&anchor.event, kCuEventDefault)) {
      anchor.event = nullptr;
      return api.error(result, "cuEventCreate");
    }
  }
  if (CuResult result = drop_anchor(0)) return api.error(result, "cuEventRecord");
  return api.check(api.cuEventSynchronize(anchors_[0].event), "cuEventSynchronize");
}

CudaBackend::~CudaBackend() {
  std::ignore = enter_to_give_back(*context_, "cuStreamDestroy_v2", [this](const DriverApi& api) {
    for (CuStream stream : {load_, store_, time_}) {
      if (stream == nullptr) continue;
      give_back([&] { return api.cuStreamSynchronize(stream); });
      give_back([&] { return api.cuStreamDestroy_v2(stream); });
    }
    for (Anchor& anchor : anchors_) {
      if (anchor.event != nullptr) give_back([&] { return api.cuEventDestroy_v2(anchor.event); });
    }
    return kCudaSuccess;
  });
}

CuStream CudaBackend::handle(Stream stream) const {
  switch (stream.lane) {
    case Lane::kLoad:
      return load_;
    case Lane::kStore:
      return store_;
    case Lane::kCaller:
      break;
  }
  return reinterpret_cast<CuStream>(stream.handle);
}

Result<Event> CudaBackend::create_event(bool timing) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status().error();
  const DriverApi& api = context_->api();
  auto entry = std::make_unique<Entry>();
  entry->timing = timing;
  if (CuResult result = api.cuEventCreate(&entry->event, timing ? kCuEventDefault : kCuEventDisableTiming)) {
    return api.error(result, "cuEventCreate");
  }
  return reinterpret_cast<Event>(entry.release());
}

void CudaBackend::destroy_event(Event event) {
  std::unique_ptr<Entry> entry(reinterpret_cast<Entry*>(event));
  if (entry == nullptr) return;
  std::ignore = enter_to_give_back(*context_, "cuEventDestroy_v2", [&](const DriverApi& api) {
    return give_back([&] { return api.cuEventDestroy_v2(entry->event); });
  });
}

Status CudaBackend::copy(Stream stream, void* dst, const void* src, std::size_t bytes) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status();
  const DriverApi& api = context_->api();
  switch (stream.lane) {
    case Lane::kLoad:
      return api.check(api.cuMemcpyHtoDAsync_v2(device_pointer(dst), src, bytes, load_), "cuMemcpyHtoDAsync_v2", bytes);
    case Lane::kStore:
      return api.check(api.cuMemcpyDtoHAsync_v2(dst, device_pointer(src), bytes, store_), "cuMemcpyDtoHAsync_v2",
                       bytes);
    case Lane::kCaller:
      break;
  }
  return invalid_argument("CudaBackend.copy", "stream must be the load or the store lane, got a caller's stream");
}

Status CudaBackend::record(Event event, Stream stream, RecordSite) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status();
  auto* entry = reinterpret_cast<Entry*>(event);
  if (entry->timing) {
    drop_anchor_if_due();
    entry->anchor = latest_anchor_.load();
  }
  const DriverApi& api = context_->api();
  return api.check(api.cuEventRecord(entry->event, handle(stream)), "cuEventRecord");
}

Status CudaBackend::wait(Stream stream, Event event, WaitSite) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status();
  const DriverApi& api = context_->api();
  return api.check(api.cuStreamWaitEvent(handle(stream), reinterpret_cast<Entry*>(event)->event, 0),
                   "cuStreamWaitEvent");
}

Result<bool> CudaBackend::query(Event event) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status().error();
  const DriverApi& api = context_->api();
  const CuResult result = api.cuEventQuery(reinterpret_cast<Entry*>(event)->event);
  if (result == kCudaNotReady) return false;
  if (result != kCudaSuccess) return api.error(result, "cuEventQuery");
  return true;
}

Status CudaBackend::synchronize(Event event, WaitSite) {
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status();
  const DriverApi& api = context_->api();
  return api.check(api.cuEventSynchronize(reinterpret_cast<Entry*>(event)->event), "cuEventSynchronize");
}

CuResult CudaBackend::drop_anchor(unsigned number) {
  Anchor& anchor = anchors_[number % kAnchors];
  anchor.nanoseconds = steady_nanoseconds();
  anchor_due_ = anchor.nanoseconds + anchor_period_;
  return context_->api().cuEventRecord(anchor.event, time_);
}

void CudaBackend::drop_anchor_if_due() {
  if (steady_nanoseconds() < anchor_due_.load()) return;
  // Whoever comes while another thread is at it goes on with the anchor that there is.
  std::unique_lock lock(anchor_mutex_, std::try_to_lock);
  if (!lock.owns_lock() || steady_nanoseconds() < anchor_due_.load()) return;
  const unsigned next = latest_anchor_.load() + 1;
  // Without a new anchor, times get coarser and nothing else happens.
  if (drop_anchor(next) == kCudaSuccess) latest_anchor_ = next;
}

Result<std::int64_t> CudaBackend::timestamp(Event event) {
  auto* entry = reinterpret_cast<Entry*>(event);
  if (!entry->timing) {
    return invalid_argument("CudaBackend.timestamp", "event must be one created with timing=true, got one without");
  }
  CudaContext::Guard guard(*context_);
  if (!guard.status().ok()) return guard.status().error();
  const DriverApi& api = context_->api();
  std::lock_guard lock(anchor_mutex_);
  const unsigned latest = latest_anchor_.load();
  // The slot after the latest may hold a time without a record, from an attempt that failed.
  const unsigned oldest = latest + 1 < kAnchors ? 0 : latest + 2 - kAnchors;
  // Downwards from the event's own anchor: one that the time stream has only just been given may not be reached yet.
  for (unsigned number = std::clamp(entry->anchor.load(), oldest, latest);; --number) {
    const Anchor& anchor = anchors_[number % kAnchors];
    float milliseconds = 0;
    const CuResult result = api.cuEventElapsedTime(&milliseconds, anchor.event, entry->event);
    if (result == kCudaSuccess) return anchor.nanoseconds + static_cast<std::int64_t>(1e6 * double{milliseconds});
    if (result != kCudaNotReady || number == oldest) return api.error(result, "cuEventElapsedTime");
  }
}

}  // namespace chunkft
